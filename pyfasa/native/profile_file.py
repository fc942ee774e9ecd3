"""The core's own reader of profile files, which the plugin has where there is no Python; tests compare it with ours."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from pyfasa._native import ffi, lib
from pyfasa.native.call import F32, ROPE_IDS, U8, U16, check, text

PROFILE_VERSION: int = lib.FASA_PROFILE_VERSION


@dataclass(frozen=True)
class ProfileFile:
    """What the core takes from a file; see ``pyfasa.Profile`` and ``ModelIdentity`` for each."""

    name: str
    n_layer: int
    n_head: int
    n_head_kv: int
    head_dim: int
    n_rot: int
    rope: str
    rope_freq_base: float
    n_fc: int
    chunks: U16
    bits: U8
    center: F32 | None
    scale: F32 | None


def read_profile_file(path: str | os.PathLike[str]) -> ProfileFile:
    """Of a sidecar or a model file with a profile; ValueError with the core's sentence for any other."""
    out = ffi.new("fasa_profile_file **")
    check(lib.fasa_profile_file_open(os.fsencode(path), out))
    file = out[0]
    try:
        model, profile = lib.fasa_profile_file_model(file), lib.fasa_profile_file_profile(file)
        (rope,) = (name for name, number in ROPE_IDS.items() if number == model.rope)
        ranks = (profile.n_layer, profile.n_head_kv, profile.n_ranked)
        channels = (profile.n_layer, profile.n_head_kv, profile.head_dim)
        return ProfileFile(
            name=text(lib.fasa_profile_file_name(file)),
            n_layer=model.n_layer,
            n_head=model.n_head,
            n_head_kv=model.n_head_kv,
            head_dim=model.head_dim,
            n_rot=model.n_rot,
            rope=rope,
            rope_freq_base=model.rope_freq_base,
            n_fc=lib.fasa_profile_file_n_fc(file),
            chunks=_copy(profile.chunks, np.uint16, ranks),
            bits=_copy(profile.bits, np.uint8, ranks),
            center=_copy(profile.center, np.float32, channels) if profile.center else None,
            scale=_copy(profile.scale, np.float32, channels) if profile.scale else None,
        )
    finally:
        lib.fasa_profile_file_free(file)


def _copy(pointer: Any, dtype: Any, shape: tuple[int, ...]) -> npt.NDArray[Any]:
    n_bytes = int(np.prod(shape)) * np.dtype(dtype).itemsize
    values: npt.NDArray[Any] = np.empty(shape, dtype)
    values.ravel()[:] = np.frombuffer(ffi.buffer(pointer, n_bytes), dtype)
    return values
