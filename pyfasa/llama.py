"""``pyfasa.Llama``: ``llama_cpp.Llama`` with sparse decoding of long contexts."""

from __future__ import annotations

import inspect
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any, cast

import llama_cpp

from pyfasa.attach import Attachment, ProfileArgument, attach
from pyfasa.errors import DenseWarning, HostError, ModelFileError
from pyfasa.handle import Fasa, make_config
from pyfasa.identity import ModelIdentity
from pyfasa.native import KV_TYPES, PAYS_FROM, cuda, pays_from_cuda


def kv_type(value: int | str | None, argument: str) -> int | None:
    """A ggml type id from an id, a name like "q8_0", or None; ValueError lists the names."""
    if value is None or value in KV_TYPES.values():
        return cast("int | None", value)
    if isinstance(value, str) and value.lower() in KV_TYPES:
        return KV_TYPES[value.lower()]
    # llama.cpp divides by the block size of a type that it does not have, and the process dies.
    names = ", ".join(KV_TYPES)
    raise ValueError(f"{argument} is {value!r}; it must be one of {names}, or its ggml id.")


class Llama(llama_cpp.Llama):
    """A drop-in for ``llama_cpp.Llama`` that decodes long contexts sparsely (FASA, arXiv 2602.03152).

    All arguments of the parent, which are documented there, plus:

    Parameters
    ----------
    profile : None, path, Profile or False
        Which frequency chunks predict attention. None: the profile inside the model file, else a file
        ``<model>-fasa.gguf`` beside it, else dense decoding with one warning. False: dense.
    budget : cells that each query head attends per decoded token.
    n_fc : chunks scored per KV head; None is the profile's own number.
    index_bits : 1, 2, 4 or 8 bits per scored dim instead of the profile's own; fewer are faster and smaller.
    min_ctx : visible cells below which decoding stays dense and bit-identical to the parent; None is 2 * budget,
        or with the cache on a CUDA device 14 * budget (f16, bf16) or 7 * budget (quantized).
    max_rows : tokens in one batch (of one sequence, or of several in one cache) up to which it is decoding, 0 to 64;
        above it is prefill and dense.
    sinks, recent : first and last visible tokens, always attended.
    flash_attn : on by default; without it there is nothing to replace and decoding is dense.
    type_k, type_v : also by name, like "q8_0".

    Raises
    ------
    ValueError : an argument out of its range; ProfileError (a ValueError) for a damaged profile or one that belongs
        to another model; ModelFileError (a ValueError) for a file that is no GGUF model.
    TypeError : an unknown argument.
    HostError : a profile was asked for and this llama-cpp-python cannot be decorated.

    Attributes
    ----------
    fasa : Fasa
        Settings, counters and timings.
    """

    def __init__(
        self,
        model_path: str | os.PathLike[str],
        *,
        profile: ProfileArgument = None,
        budget: int = 1024,
        n_fc: int | None = None,
        index_bits: int | None = None,
        min_ctx: int | None = None,
        max_rows: int = 8,
        sinks: int = 4,
        recent: int = 32,
        flash_attn: bool = True,
        type_k: int | str | None = None,
        type_v: int | str | None = None,
        **kwargs: Any,
    ) -> None:
        _refuse_unknown(kwargs)
        config = make_config(budget, n_fc, index_bits, min_ctx, max_rows, sinks, recent)
        arguments = dict(
            kwargs,
            flash_attn=flash_attn,
            type_k=kv_type(type_k, "type_k"),
            type_v=kv_type(type_v, "type_v"),
        )
        path = os.fspath(model_path)
        if not os.path.exists(path):
            raise ModelFileError(f"The model file {path} does not exist; check the path.")
        self._fasa_argument = profile
        self._fasa = attachment = attach(path, profile, config, flash_attn, kwargs)
        try:
            with attachment.session.armed() if attachment.session else nullcontext():
                super().__init__(path, **arguments)
            attachment = self._decorated(attachment)
        except BaseException:
            self.close()
            raise
        self.fasa = Fasa(
            config,
            attachment,
            follow_budget=min_ctx is None,
            pays_from=_pays_from(kv_type(type_k, "type_k"), attachment.identity, kwargs),
        )
        if attachment.reason is not None and not attachment.expected:
            warnings.warn(f"Decoding is dense: {attachment.reason}", DenseWarning, stacklevel=2)
        if attachment.profile is not None and kwargs.get("lora_path"):
            warnings.warn(
                "The profile was calibrated without this LoRA adapter; compare answers with llm.dense().",
                DenseWarning,
                stacklevel=2,
            )

    def _decorated(self, attachment: Attachment) -> Attachment:
        """The attachment as it is once the context exists."""
        if attachment.session is None or attachment.session.n_backends > 0:
            return attachment
        sentence = "llama.cpp created no CPU backend for this context."
        if self._fasa_argument is not None and self._fasa_argument is not False:
            raise HostError(sentence)
        attachment.session.close()
        return replace(attachment, session=None, profile=None, reason=sentence)

    def eval(self, tokens: Sequence[int]) -> None:
        """Evaluates tokens. More of them than ``max_rows`` are a prompt, which is read densely to its end."""
        prompt = len(tokens) > self.fasa.max_rows
        with self.fasa.prefilling() if prompt else nullcontext(), self._removing():
            super().eval(tokens)

    @contextmanager
    def _removing(self) -> Iterator[None]:
        """Inside, `eval` removes cells behind ``n_tokens`` only where there are some.

        The parent does so each time, for which llama.cpp looks at every cell: 0.2 ms per token at 131,072.
        """
        ctx = self._ctx
        vars(ctx).pop("kv_cache_seq_rm", None)  # left by an interrupt
        if llama_cpp.llama_memory_seq_pos_max(ctx.memory, 0) < self.n_tokens:
            ctx.kv_cache_seq_rm = lambda *_: True  # type: ignore[method-assign]
        try:
            yield
        finally:
            vars(ctx).pop("kv_cache_seq_rm", None)

    @contextmanager
    def dense(self) -> Iterator[Llama]:
        """Inside the block every token is decoded densely, as by ``llama_cpp.Llama``."""
        before, self.fasa.enabled = self.fasa.enabled, False
        try:
            yield self
        finally:
            self.fasa.enabled = before

    def close(self) -> None:
        """Frees model and context; a second call does nothing."""
        if hasattr(self, "_stack"):
            super().close()
        attachment: Attachment | None = getattr(self, "_fasa", None)
        if attachment is not None and attachment.session is not None:
            attachment.session.close()

    def __getstate__(self) -> dict[str, Any]:
        state: dict[str, Any] = super().__getstate__()  # type: ignore[no-untyped-call]
        state |= self.fasa.arguments()
        state["profile"] = self._fasa_argument
        if self.fasa.switched:  # by use(): None there is False here
            state["profile"] = self.fasa.profile or False
        return state | {"_fasa_enabled": self.fasa.enabled}

    def __setstate__(self, state: dict[str, Any]) -> None:
        state = dict(state)
        enabled = state.pop("_fasa_enabled")
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self.fasa.enabled = enabled


def _pays_from(type_k: int | None, model: ModelIdentity | None, kwargs: Mapping[str, Any]) -> int:
    """From how many budgets on selecting pays: later where a CUDA device that pyfasa serves computes attention."""
    on_gpu = kwargs.get("n_gpu_layers") and kwargs.get("offload_kqv", True) and cuda()[0]
    if not on_gpu or model is None:
        return PAYS_FROM
    return pays_from_cuda(
        KV_TYPES["f16"] if type_k is None else type_k, model.n_head // model.n_head_kv
    )


# Arguments of former llama_cpp.Llama, which it has ignored since; LangChain passes the first two.
_FORMER = frozenset({"f16_kv", "n_parts", "low_vram", "mul_mat_q", "n_gqa", "rms_norm_eps"})


def _refuse_unknown(kwargs: dict[str, Any]) -> None:
    # Not by name: pyfasa.patch() lets llama_cpp.Llama mean this class.
    known = inspect.signature(Llama.__mro__[1].__init__).parameters  # type: ignore[misc]
    unknown = sorted(set(kwargs) - set(known) - _FORMER)
    if unknown:
        raise TypeError(
            f"Unknown argument {', '.join(unknown)}: neither pyfasa.Llama nor llama_cpp.Llama has it."
        )
