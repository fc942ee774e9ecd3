"""The stages as pure functions over NumPy arrays; shapes are documented in ``native/fasa.cdef.h``.

NumPy shapes are written outermost first, so ``[head_dim, n_q]`` there is ``(n_q, head_dim)`` here.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pyfasa._native import ffi, lib
from pyfasa.native.call import (
    BLOCK_CELLS,
    F32,
    I32,
    I64,
    MAX_HEAD_DIM,
    PEAKS,
    ROPE_IDS,
    U8,
    U16,
    U64,
    check,
    pointer,
)


class Layout:
    """What the side index keeps of one KV head.

    Parameters
    ----------
    head_dim, n_rot : dims of a head, and how many of them RoPE rotates.
    rope : "norm" or "neox".
    chunks, bits : (n_fc,) ids of frequency chunks, and 1, 2, 4 or 8 bits for each.
    center, scale : (head_dim,) or None; per-channel shift and scale taken out before quantization.
    """

    def __init__(
        self,
        head_dim: int,
        n_rot: int,
        rope: str,
        chunks: U16,
        bits: U8,
        center: F32 | None = None,
        scale: F32 | None = None,
    ) -> None:
        if rope not in ROPE_IDS:
            raise ValueError(f"rope is {rope!r}; it must be one of {', '.join(ROPE_IDS)}.")
        out = ffi.new("fasa_layout **")
        check(
            lib.fasa_layout_create(
                head_dim,
                n_rot,
                ROPE_IDS[rope],
                len(chunks),
                pointer("uint16_t[]", chunks, np.uint16),
                pointer("uint8_t[]", bits, np.uint8, len(chunks)),
                ffi.NULL if center is None else pointer("float[]", center, np.float32, head_dim),
                ffi.NULL if scale is None else pointer("float[]", scale, np.float32, head_dim),
                out,
            )
        )
        self.head_dim = head_dim
        self.handle = ffi.gc(out[0], lib.fasa_layout_free)

    @property
    def block_bytes(self) -> int:
        """Bytes of a block of 64 cells."""
        size: int = lib.fasa_layout_block_bytes(self.handle)
        return size


def index_write(layout: Layout, rows: F32, cells: I64, index: U8) -> None:
    """Writes the entries of ``cells`` (n,) from keys ``rows`` (n, head_dim) into ``index`` (n_block, block_bytes)."""
    if len(cells) and int(cells.max()) // BLOCK_CELLS * layout.block_bytes >= index.size:
        raise ValueError(f"Cell {int(cells.max())} is outside an index of {index.size} bytes.")
    check(
        lib.fasa_index_write(
            layout.handle,
            pointer("float[]", rows, np.float32, len(cells) * layout.head_dim),
            pointer("int64_t[]", cells, np.int64),
            len(cells),
            pointer("uint8_t[]", index, np.uint8),
        )
    )


def score(
    isa: int,
    layout: Layout,
    q: F32,
    index: U8,
    visible: U64,
    scores: F32,
    peaks: F32,
    blocks: tuple[int, int] | None = None,
) -> None:
    """Scores of queries ``q`` (n_q, head_dim) into ``scores`` (n_q, 64 n_block) and ``peaks`` (n_q, 8 n_block)."""
    n_q, n_block = len(q), len(visible)
    first, last = blocks or (0, n_block)
    check(
        lib.fasa_score(
            isa,
            layout.handle,
            pointer("float[]", q, np.float32, n_q * layout.head_dim),
            n_q,
            pointer("uint8_t[]", index, np.uint8, n_block * layout.block_bytes),
            pointer("uint64_t[]", visible, np.uint64),
            n_block,
            first,
            last,
            pointer("float[]", scores, np.float32, n_q * n_block * BLOCK_CELLS),
            pointer("float[]", peaks, np.float32, n_q * n_block * PEAKS),
        )
    )


def select(isa: int, scores: F32, peaks: F32, budget: int) -> I32:
    """The ``budget`` best cells of ``scores`` (64 n_block,), ascending; ``peaks`` (8 n_block,) go with them."""
    n_block = len(scores) // BLOCK_CELLS
    scratch = np.empty(len(scores), np.float32)
    cells = np.empty(len(scores), np.int32)
    n = ffi.new("int64_t *")
    check(
        lib.fasa_select(
            isa,
            pointer("float[]", scores, np.float32, n_block * BLOCK_CELLS),
            pointer("float[]", peaks, np.float32, n_block * PEAKS),
            n_block,
            budget,
            pointer("float[]", scratch, np.float32),
            pointer("int32_t[]", cells, np.int32),
            n,
        )
    )
    chosen: I32 = cells[: int(n[0])]
    return chosen


@dataclass(frozen=True)
class KV:
    """K and V of one KV head as they lie in a cache: raw rows ``k``, ``v`` (n_kv, row bytes), types, head sizes."""

    k: U8
    v: U8
    k_type: int
    v_type: int
    k_dim: int
    v_dim: int
    scale: float
    softcap: float = 0.0
    mask: npt.NDArray[np.float16] | None = None


def attend(
    isa: int, kv: KV, q: F32, cells: I32, state: tuple[float, float, F32] | None = None
) -> tuple[float, float, F32]:
    """Attention state (m, d, o) of query ``q`` (k_dim,) over ``cells``, continued from ``state``; result is o / d."""
    m, d, o = state if state is not None else (-np.inf, 0.0, np.zeros(kv.v_dim, np.float32))
    if len(cells) and not 0 <= int(cells.min()) <= int(cells.max()) < len(kv.k):
        raise ValueError(
            f"Cells go from {cells.min()} to {cells.max()}; the cache has {len(kv.k)}."
        )
    for rows, row_type, dim in ((kv.k, kv.k_type, kv.k_dim), (kv.v, kv.v_type, kv.v_dim)):
        needed = kv_row_bytes(row_type, dim)
        if rows.ndim != 2 or (rows.shape[1] < needed and dim <= MAX_HEAD_DIM):
            raise ValueError(
                f"Rows of K or V have shape {rows.shape}; {needed} bytes per cell are needed."
            )
    o = np.array(o, np.float32)
    c = ffi.new("fasa_kv *")
    c.k, c.v = pointer("uint8_t[]", kv.k, np.uint8), pointer("uint8_t[]", kv.v, np.uint8)
    c.k_stride, c.v_stride = kv.k.strides[0], kv.v.strides[0]
    c.k_type, c.v_type, c.k_dim, c.v_dim = kv.k_type, kv.v_type, kv.k_dim, kv.v_dim
    c.scale, c.softcap = kv.scale, kv.softcap
    mask = (
        ffi.NULL
        if kv.mask is None
        else pointer("uint16_t[]", kv.mask.view(np.uint16), np.uint16, len(kv.k))
    )
    c.mask = mask
    m_out, d_out = ffi.new("float *", m), ffi.new("float *", d)
    check(
        lib.fasa_attend(
            isa,
            c,
            pointer("float[]", q, np.float32, kv.k_dim),
            pointer("int32_t[]", cells, np.int32),
            len(cells),
            m_out,
            d_out,
            pointer("float[]", o, np.float32, kv.v_dim),
        )
    )
    return m_out[0], d_out[0], o


def hadamard(x: F32) -> F32:
    """Normalized Walsh-Hadamard transform of the last axis, whose length is a power of two; own inverse."""
    out: F32 = np.array(x, np.float32, order="C")
    check(
        lib.fasa_hadamard(
            pointer("float[]", out, np.float32), out.size // out.shape[-1], out.shape[-1]
        )
    )
    return out


def kv_row_bytes(kv_type: int, n: int) -> int:
    """Bytes of a K or V row of ``n`` values, a multiple of 32; 0 for a type without a kernel."""
    size: int = lib.fasa_kv_row_bytes(kv_type, n)
    return size


def kv_to_float(kv_type: int, rows: U8, n: int) -> F32:
    """Raw K or V rows (n_rows, row bytes) as floats (n_rows, n), read by the plain C++ reference."""
    needed = kv_row_bytes(kv_type, n)
    if rows.ndim != 2 or (needed and rows.shape[1] != needed):
        raise ValueError(f"Rows have shape {rows.shape}; {needed} bytes each are needed.")
    out = np.empty((len(rows), n), np.float32)
    c_rows, c_out = pointer("uint8_t[]", rows, np.uint8), pointer("float[]", out, np.float32)
    check(lib.fasa_kv_to_float(kv_type, c_rows, n, len(rows), c_out))
    return out
