"""Code that constructs its own ``llama_cpp.Llama`` gets ``pyfasa.Llama`` instead."""

from __future__ import annotations

import sys
from types import ModuleType, TracebackType

import llama_cpp

from pyfasa.llama import Llama

_in_force: list[Patch] = []  # at most one: what a process's llama_cpp.Llama means is global


class Patch:
    """What :func:`patch` did; as a context manager it undoes that at the end of the block."""

    def __init__(self) -> None:
        self._original = llama_cpp.Llama
        self._places = [
            (module, name)
            for module in list(sys.modules.values())
            if isinstance(module, ModuleType)
            for name, value in list(vars(module).items())
            if value is self._original
        ]
        for module, name in self._places:
            setattr(module, name, Llama)

    def __enter__(self) -> Patch:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.undo()

    def undo(self) -> None:
        """Puts ``llama_cpp.Llama`` back; a second call does nothing.

        Modules that were imported in between and took the name keep ``pyfasa.Llama``.
        """
        for module, name in self._places:
            if getattr(module, name, None) is Llama:
                setattr(module, name, self._original)
        self._places = []
        if self in _in_force:
            _in_force.remove(self)


def patch() -> Patch:
    """Makes ``llama_cpp.Llama`` mean ``pyfasa.Llama``, also in modules that have imported the name already.

    For code that makes its own model: LangChain's ``ChatLlamaCpp``, LlamaIndex' ``LlamaCPP``. Arguments of
    ``pyfasa.Llama`` reach it through theirs (``model_kwargs``). Objects that exist stay what they are.

        with pyfasa.patch():
            chat = ChatLlamaCpp(model_path="model.gguf", n_ctx=32768, model_kwargs={"budget": 2048})

    Without ``with`` it holds until :func:`unpatch`. RuntimeError when it is in force already.
    """
    if _in_force:
        raise RuntimeError(
            "llama_cpp.Llama is pyfasa.Llama already; call pyfasa.unpatch() before patching again."
        )
    _in_force.append(Patch())
    return _in_force[0]


def unpatch() -> None:
    """Undoes :func:`patch`. RuntimeError when it is not in force."""
    if not _in_force:
        raise RuntimeError("llama_cpp.Llama is not patched; there is nothing to undo.")
    _in_force[0].undo()
