"""Whether a context can be decoded sparsely, and with what: the host, the profile, the frequencies, the session."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import llama_cpp

from pyfasa.embed import find_profile
from pyfasa.errors import HostError, ProfileError
from pyfasa.identity import ModelIdentity
from pyfasa.native import Config, Session, self_test
from pyfasa.profile import Profile

SUPPORTED_LLAMA_CPP = "0.3.36"

ProfileArgument = str | os.PathLike[str] | Profile | bool | None

# Arguments of llama_cpp.Llama that change the frequencies a profile was calibrated with, and what leaves them alone.
_UNCHANGED: dict[str, tuple[Any, ...]] = {
    "rope_freq_scale": (None, 0.0, 1.0),
    "rope_scaling_type": (None, llama_cpp.LLAMA_ROPE_SCALING_TYPE_UNSPECIFIED),
    "yarn_ext_factor": (-1.0,),
    "yarn_attn_factor": (1.0,),
    "yarn_beta_fast": (32.0,),
    "yarn_beta_slow": (1.0,),
    "yarn_orig_ctx": (0,),
}


@dataclass(frozen=True)
class Attachment:
    """What a context gets: a session to create it in, or the reason why it has none."""

    session: Session | None = None
    profile: Profile | None = None
    identity: ModelIdentity | None = None
    reason: str | None = None  # why decoding is dense
    expected: bool = False  # dense because the caller said so: nothing to warn of


def check_host() -> None:
    """Raises HostError when the installed llama-cpp-python cannot be decorated; the sentence names the way out."""
    version = llama_cpp.__version__
    if version != SUPPORTED_LLAMA_CPP:
        raise HostError(
            f"llama-cpp-python {version} is installed, but this pyfasa works with {SUPPORTED_LLAMA_CPP} only; "
            f"run: pip install llama-cpp-python=={SUPPORTED_LLAMA_CPP}"
        )
    self_test()


def attach(
    path: str,
    argument: ProfileArgument,
    config: Config,
    flash_attn: bool,
    kwargs: Mapping[str, Any],
) -> Attachment:
    """Prepares a session for a model, with the profile that ``argument`` asks for (see ``pyfasa.Llama``).

    What stands in the way is the attachment's reason; it is raised instead when the caller asked for a profile, or
    when waiting will not help: ProfileError, HostError, ModelFileError, or ValueError for n_fc above the profile's.
    """
    if argument is True:
        raise ValueError(
            "profile is True; give a path, a Profile, None to look for one, or False for dense."
        )
    if kwargs.get("vocab_only"):
        return Attachment(reason="vocab_only loads no weights.", expected=True)
    asked = argument is not None and argument is not False
    try:
        if not flash_attn:
            raise HostError(
                "flash_attn is False, so there are no attention nodes to replace; leave it out."
            )
        check_host()
        if argument is not False:
            _check_split(kwargs)
        identity = _identity(path, optional=argument is False)
        profile = _profile(path, argument)
        if profile is not None and identity is not None:
            profile.check_model(identity)
            _check_frequencies(identity, kwargs)
            if config.n_fc > profile.n_ranked:
                raise ValueError(
                    f"n_fc is {config.n_fc}; the profile ranks {profile.n_ranked} chunks."
                )
    except (HostError, ProfileError) as error:
        if asked:
            raise
        return Attachment(reason=str(error), expected=argument is False)
    reason = None
    if profile is None:
        reason = (
            f"{os.path.basename(path)} has no FASA profile; make one with: pyfasa calibrate {path}"
        )
    if argument is False:
        reason = "FASA is switched off: profile is False."
    return Attachment(Session(profile, config), profile, identity, reason, argument is False)


def _identity(path: str, *, optional: bool) -> ModelIdentity | None:
    try:
        return ModelIdentity.read(path)
    except ProfileError:  # an architecture without chunks: dense does not mind
        if optional:
            return None
        raise


def _profile(path: str, argument: ProfileArgument) -> Profile | None:
    if argument is False:
        return None
    if isinstance(argument, Profile):
        return argument
    where = find_profile(path) if argument is None else os.fspath(argument)  # type: ignore[arg-type]
    return None if where is None else Profile.load(where)


def _check_split(kwargs: Mapping[str, Any]) -> None:
    """Attention of a layer must be one node on one device, as it is when layers are split."""
    if kwargs.get("split_mode") == llama_cpp.LLAMA_SPLIT_MODE_TENSOR and kwargs.get("n_gpu_layers"):
        raise HostError(
            f"split_mode is {llama_cpp.LLAMA_SPLIT_MODE_TENSOR} (LLAMA_SPLIT_MODE_TENSOR), which spreads the "
            "attention of every layer over all devices, where it cannot be replaced; use LLAMA_SPLIT_MODE_LAYER."
        )


def _check_frequencies(identity: ModelIdentity, kwargs: Mapping[str, Any]) -> None:
    """A profile holds for the frequencies of the model file."""
    changed = {
        name: kwargs[name]
        for name, same in _UNCHANGED.items()
        if kwargs.get(name, same[0]) not in same
    }
    base = kwargs.get("rope_freq_base") or identity.rope_freq_base
    if base != identity.rope_freq_base:
        changed["rope_freq_base"] = base
    overrides: Mapping[str, Any] = kwargs.get("kv_overrides") or {}
    changed |= {key: value for key, value in overrides.items() if ".rope." in key}
    for name, value in changed.items():
        raise ProfileError(
            f"{name} is {value}, which changes the frequencies that the profile was calibrated with "
            f"(base {identity.rope_freq_base:g}); leave it out, or pass profile=False."
        )
