"""Calling the compiled core: arrays as checked pointers, failures as exceptions, its constants."""

from __future__ import annotations

from typing import Any

import llama_cpp  # noqa: F401  loads the ggml libraries that the core is linked against
import numpy as np
import numpy.typing as npt

from pyfasa._native import ffi, lib
from pyfasa.errors import HostError

F32 = npt.NDArray[np.float32]
U8 = npt.NDArray[np.uint8]
U16 = npt.NDArray[np.uint16]
U64 = npt.NDArray[np.uint64]
I32 = npt.NDArray[np.int32]
I64 = npt.NDArray[np.int64]

BLOCK_CELLS: int = lib.FASA_BLOCK_CELLS
PEAKS: int = lib.FASA_PEAKS
MAX_HEAD_DIM: int = lib.FASA_MAX_HEAD_DIM
MAX_ROWS: int = lib.FASA_MAX_ROWS
PAYS_FROM: int = lib.FASA_PAYS_FROM
KV_TYPES: dict[str, int] = {
    "f32": lib.FASA_KV_F32,
    "f16": lib.FASA_KV_F16,
    "bf16": lib.FASA_KV_BF16,
    "q8_0": lib.FASA_KV_Q8_0,
    "q4_0": lib.FASA_KV_Q4_0,
    "q4_1": lib.FASA_KV_Q4_1,
    "q5_0": lib.FASA_KV_Q5_0,
    "q5_1": lib.FASA_KV_Q5_1,
    "iq4_nl": lib.FASA_KV_IQ4_NL,
}
ISA_REFERENCE: int = lib.FASA_ISA_REFERENCE
ISA_PORTABLE: int = lib.FASA_ISA_PORTABLE
ISA_AVX2: int = lib.FASA_ISA_AVX2
ISA_AVX512: int = lib.FASA_ISA_AVX512
ISA_AUTO: int = lib.FASA_ISA_AUTO
ROPE_IDS: dict[str, int] = {"norm": lib.FASA_ROPE_NORM, "neox": lib.FASA_ROPE_NEOX}


def text(sentence: Any) -> str:
    """A C string."""
    found: bytes = ffi.string(sentence)
    return found.decode()


def check(status: int) -> None:
    """Raises what a status means, with the core's sentence."""
    if status == lib.FASA_STATUS_OK:
        return
    sentence = text(lib.fasa_last_error())
    if status == lib.FASA_STATUS_ARGUMENT:
        raise ValueError(sentence)
    if status == lib.FASA_STATUS_HOST:
        raise HostError(sentence)
    if status == lib.FASA_STATUS_MEMORY:
        raise MemoryError(sentence)
    raise RuntimeError(sentence)


def pointer(kind: str, array: npt.NDArray[Any], dtype: Any, size: int | None = None) -> Any:
    """A C pointer to an array that must be contiguous, of ``dtype``, and of ``size`` values."""
    if array.dtype != dtype or not array.flags.c_contiguous:
        raise ValueError(
            f"The array is {array.dtype}, contiguous {array.flags.c_contiguous}; "
            f"a contiguous array of {np.dtype(dtype)} is needed."
        )
    if size is not None and array.size != size:
        raise ValueError(f"The array has {array.size} values; {size} are needed.")
    return ffi.from_buffer(kind, array, require_writable=array.flags.writeable)
