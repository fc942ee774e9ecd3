"""``pyfasa.Llama``: ``llama_cpp.Llama`` with sparse decoding of long contexts."""

from __future__ import annotations

import inspect
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import llama_cpp
from gguf.constants import GGMLQuantizationType

from pyfasa.embed import find_profile
from pyfasa.errors import DenseWarning, HostError, ModelFileError, ProfileError
from pyfasa.handle import Fasa, make_config
from pyfasa.identity import ModelIdentity
from pyfasa.native import Session, self_test
from pyfasa.profile import Profile

SUPPORTED_LLAMA_CPP = "0.3.36"

# The types that llama.cpp's -ctk and -ctv accept.
KV_TYPES = {
    name: int(GGMLQuantizationType[name.upper()])
    for name in ("f32", "f16", "bf16", "q8_0", "q4_0", "q4_1", "q5_0", "q5_1", "iq4_nl")
}


def check_host() -> None:
    """Raises HostError when the installed llama-cpp-python cannot be decorated; the sentence names the way out."""
    version = llama_cpp.__version__
    if version != SUPPORTED_LLAMA_CPP:
        raise HostError(
            f"llama-cpp-python {version} is installed, but this pyfasa works with {SUPPORTED_LLAMA_CPP} only; "
            f"run: pip install llama-cpp-python=={SUPPORTED_LLAMA_CPP}"
        )
    self_test()


def kv_type(value: int | str | None, argument: str) -> int | None:
    """A ggml type id from an id, a name like "q8_0", or None; ValueError lists the names."""
    if value is None or isinstance(value, int):
        return value
    try:
        return KV_TYPES[value.lower()]
    except (KeyError, AttributeError):
        names = ", ".join(KV_TYPES)
        raise ValueError(
            f"{argument} is {value!r}; it must be one of {names}, or a ggml type id."
        ) from None


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
    min_ctx : visible cells below which decoding stays dense and bit-identical to the parent; None is 2 * budget.
    sinks, recent : first and last visible cells, always attended.
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
        profile: str | os.PathLike[str] | Profile | bool | None = None,
        budget: int = 1024,
        n_fc: int | None = None,
        min_ctx: int | None = None,
        sinks: int = 4,
        recent: int = 32,
        flash_attn: bool = True,
        type_k: int | str | None = None,
        type_v: int | str | None = None,
        **kwargs: Any,
    ) -> None:
        _refuse_unknown(kwargs)
        if profile is True:
            raise ValueError(
                "profile is True; give a path, a Profile, None to look for one, or False for dense."
            )
        config = make_config(budget, n_fc, min_ctx, sinks, recent)
        path = os.fspath(model_path)
        asked = profile is not None and profile is not False
        self._fasa_arguments: dict[str, Any] = {
            "profile": profile,
            "n_fc": n_fc,
            "min_ctx": min_ctx,
        }
        self._fasa_session: Session | None = None
        if not os.path.exists(path):
            raise ModelFileError(f"The model file {path} does not exist; check the path.")
        identity: ModelIdentity | None = None
        found: Profile | None = None
        reason: str | None = None
        try:
            if not flash_attn:
                raise HostError(
                    "flash_attn is False, so there are no attention nodes to replace; leave it out or True."
                )
            check_host()
            identity, found = _profile_for(path, profile, kwargs)
            if found is None:
                reason = (
                    "FASA is switched off: profile is False."
                    if profile is False
                    else (
                        f"{os.path.basename(path)} has no FASA profile; make one with: pyfasa calibrate {path}"
                    )
                )
            if n_fc is not None and found is not None and n_fc > found.n_ranked:
                raise ValueError(f"n_fc is {n_fc}; the profile ranks {found.n_ranked} chunks.")
            self._fasa_session = Session(found, config)
        except (HostError, ProfileError) as error:
            if asked:
                raise
            reason = str(error)
        if reason is not None and profile is not False:
            warnings.warn(f"Decoding is dense: {reason}", DenseWarning, stacklevel=2)
        if found is not None and kwargs.get("lora_path"):
            warnings.warn(
                "The profile was calibrated without this LoRA adapter; compare answers with llm.dense().",
                DenseWarning,
                stacklevel=2,
            )
        self.fasa = Fasa(config, identity)
        arguments = dict(
            kwargs,
            flash_attn=flash_attn,
            type_k=kv_type(type_k, "type_k"),
            type_v=kv_type(type_v, "type_v"),
        )
        try:
            if self._fasa_session is None:
                super().__init__(path, **arguments)
            else:
                with self._fasa_session.armed():
                    super().__init__(path, **arguments)
        except BaseException:
            self._close_session()
            raise
        if self._fasa_session is not None and self._fasa_session.n_backends == 0:
            self._close_session()
            reason = "llama.cpp created no CPU backend for this context."
        self.fasa._bind(self._fasa_session, found if self._fasa_session else None, reason)

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
        self._close_session()

    def _close_session(self) -> None:
        session, self._fasa_session = getattr(self, "_fasa_session", None), None
        if session is not None:
            if "fasa" in self.__dict__:
                self.fasa._session = None
                self.fasa._reason = "The model is closed."
            session.close()

    def __getstate__(self) -> dict[str, Any]:
        state: dict[str, Any] = super().__getstate__()  # type: ignore[no-untyped-call]
        return dict(
            state,
            **self._fasa_arguments,
            budget=self.fasa.budget,
            sinks=self.fasa.sinks,
            recent=self.fasa.recent,
        )


def _refuse_unknown(kwargs: dict[str, Any]) -> None:
    known = inspect.signature(llama_cpp.Llama.__init__).parameters
    unknown = sorted(name for name in kwargs if name not in known)
    if unknown:
        raise TypeError(
            f"Unknown argument {', '.join(unknown)}: neither pyfasa.Llama nor llama_cpp.Llama has it."
        )


def _profile_for(
    path: str, profile: str | os.PathLike[str] | Profile | bool | None, kwargs: dict[str, Any]
) -> tuple[ModelIdentity | None, Profile | None]:
    """The model's identity and the profile to use, checked against it; None for dense."""
    if kwargs.get("vocab_only"):
        return None, None
    if profile is False or profile is None:
        try:
            identity = ModelIdentity.read(path)
        except (ProfileError, ModelFileError):
            if profile is False:
                return None, None  # dense needs no identity
            raise
        where = None if profile is False else find_profile(path)
        found = None if where is None else Profile.load(where)
    else:
        identity = ModelIdentity.read(path)
        found = profile if isinstance(profile, Profile) else Profile.load(os.fspath(profile))  # type: ignore[arg-type]
    if found is not None:
        found.check_model(identity)
        _check_frequencies(identity, kwargs)
    return identity, found


def _check_frequencies(identity: ModelIdentity, kwargs: dict[str, Any]) -> None:
    """A profile holds for the frequencies it was calibrated with: those of the model file."""
    base = kwargs.get("rope_freq_base") or identity.rope_freq_base
    scale = kwargs.get("rope_freq_scale") or 1.0
    if base != identity.rope_freq_base:
        raise ProfileError(
            f"rope_freq_base is {base:g}, but the profile was calibrated with {identity.rope_freq_base:g}; "
            f"leave the argument out, or calibrate with it."
        )
    if scale != 1.0:
        raise ProfileError(
            f"rope_freq_scale is {scale:g}; the profile was calibrated with 1. Leave the argument out."
        )
