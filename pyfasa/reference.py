"""The method in plain NumPy: the document of record, and what the native kernels are tested against.

FASA, arXiv 2602.03152. RoPE rotates the dims of a head two by two; each pair is a frequency chunk (fc). For one
query q and the cached keys k_t the contribution of chunk i to the score is

    c_i(t) = q_i . k_t,i          (two dims each)          sum over i of c_i(t) = q . k_t

A few dominant chunks predict which cells a query attends to. So each decoded token

    1. scores   s(t) = sum over dominant i of c_i(t)                    eq. 5, the paper's TIP; here on quantized keys
    2. selects  the `budget` cells with the best s(t)
    3. attends  softmax(scale * q . k_t) over these cells alone, exactly     eq. 7, the paper's FAC

Shapes: q (head_dim,), keys (n_kv, head_dim), values (n_kv, head_dim_v), all in the basis in which RoPE acts.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

GAUSS_STEP_2_BITS = 0.9957  # best step of four uniform levels for unit variance (Max 1960)


def chunk_dims(head_dim: int, n_rot: int, rope: str) -> Ints:
    """The two dims of every chunk: (head_dim / 2, 2).

    "norm" rope rotates (2i, 2i+1), "neox" (i, i + n_rot/2). Dims past n_rot are not rotated; they pair up as
    (2i, 2i+1), so that the chunks cover the head.
    """
    i = np.arange(head_dim // 2)
    pairs = np.stack([2 * i, 2 * i + 1], axis=1)
    if rope == "neox":
        half = n_rot // 2
        pairs[:half] = np.stack([i[:half], i[:half] + half], axis=1)
    return pairs


def contributions(q: npt.NDArray[np.floating], keys: npt.NDArray[np.floating], dims: Ints) -> F64:
    """c_i(t) of every cell and chunk: (n_kv, n_chunk)."""
    products = q.astype(np.float64)[dims] * keys.astype(np.float64)[:, dims]
    total: F64 = products.sum(axis=2)
    return total


def agreement(contribution: F64, top: int) -> F64:
    """Contextual agreement of each chunk with the full score (3.3): share of the `top` best cells in common.

    contribution (n_kv, n_chunk) -> (n_chunk,)
    """
    k = min(top, len(contribution))
    best = set(np.argpartition(-contribution.sum(axis=1), k - 1)[:k].tolist())
    own = np.argpartition(-contribution, k - 1, axis=0)[:k]
    common = [len(best.intersection(column)) for column in own.T.tolist()]
    return np.array(common, np.float64) / k


@dataclass(frozen=True)
class Row:
    """Chunks of equal bits as the side index keeps them: codes (n, n_dim), one step per cell (n,)."""

    dims: Ints
    bits: int
    codes: npt.NDArray[np.uint8]
    steps: F32

    def values(self) -> F64:
        """The keys' dims as scoring sees them: (n, n_dim)."""
        middle = (2**self.bits - 1) / 2
        values: F64 = np.multiply(self.steps[:, None], self.codes - middle, dtype=np.float64)
        return values


def round_steps(steps: F32, *, up: bool = False) -> F32:
    """To a byte of 4 exponent and 4 mantissa bits, from 2^-8 to 248: the nearest such number, or the next above."""
    offset = np.uint32(119 << 23)
    kept = np.clip(steps, 2.0**-8, 248).astype(np.float32).view(np.uint32) - offset
    half = np.uint32((1 << 19) - 1 if up else 1 << 18)
    codes = np.minimum((kept + half) >> np.uint32(19), 255)
    rounded: F32 = ((codes << np.uint32(19)) + offset).astype(np.uint32).view(np.float32)
    return rounded


def _codes(x: F32, bits: int, steps: F32) -> F32:
    inverse = np.divide(1, steps, out=np.zeros_like(steps), where=steps > 0)
    middle = np.float32((2**bits - 1) / 2)
    codes: F32 = np.clip(np.rint(x * inverse[:, None] + middle), 0, 2**bits - 1)
    return codes


def quantize(x: F32, dims: Ints, bits: int) -> Row:
    """Codes and steps of x (n, n_dim): x ~ step * (code - (2^bits - 1) / 2).

    4 and 8 bits: the least step that reaches the largest value. 1 and 2 bits: codes by the spread of the values, then
    the step that keeps the projection of the entry on x, sum(x x) / sum(x level), as in RaBitQ (arXiv 2405.12497);
    least squares would shrink a cell by how badly its codes fit, and rank cells by it.
    """
    middle = (2**bits - 1) / 2
    if bits >= 4:
        steps = round_steps(np.max(np.abs(x), axis=1) / np.float32(middle), up=True)
        return Row(dims, bits, _codes(x, bits, steps).astype(np.uint8), steps)
    square = np.square(x).sum(axis=1)
    codes = _codes(x, bits, np.float32(GAUSS_STEP_2_BITS) * np.sqrt(square / x.shape[1]))
    along = (x * (codes - np.float32(middle))).sum(axis=1)
    steps = np.divide(square, along, out=np.zeros_like(square), where=along > 0)
    return Row(dims, bits, codes.astype(np.uint8), round_steps(steps))


def index_rows(
    keys: F32,
    dims: Ints,
    chunks: npt.NDArray[np.uint16],
    bits: npt.NDArray[np.uint8],
    center: F32 | None = None,
    scale: F32 | None = None,
) -> list[Row]:
    """The side index of one KV head: chunks grouped by bits, channels centered and scaled before quantization."""
    x = keys if center is None else keys - center
    x = x if scale is None else x / scale
    rows = []
    for width in (8, 4, 2, 1):
        members = chunks[bits == width].astype(np.int64)
        if len(members):
            kept = dims[members].reshape(-1)
            rows.append(quantize(np.ascontiguousarray(x[:, kept], np.float32), kept, width))
    return rows


def score(q: F32, rows: list[Row], scale: F32 | None = None) -> F64:
    """1. Scores of all cells (n_kv,). Centers shift every score of a query alike, so they are left out."""
    weighted = q.astype(np.float64) if scale is None else q.astype(np.float64) * scale
    total: F64 = np.sum([row.values() @ weighted[row.dims] for row in rows], axis=0)
    return total


def select(scores: npt.NDArray[np.floating], budget: int) -> Ints:
    """2. The `budget` best visible cells, ascending; ties in favour of lower cells. Hidden cells score -inf."""
    order = np.lexsort((np.arange(len(scores)), -scores))[:budget]
    return np.sort(order[scores[order] > -np.inf])


def attend(
    q: F32,
    keys: npt.NDArray[np.floating],
    values: npt.NDArray[np.floating],
    cells: Ints,
    scale: float,
    softcap: float = 0.0,
    mask: npt.NDArray[np.floating] | None = None,
    sink: float | None = None,
) -> F64:
    """3. Exact attention over the selected cells: (head_dim_v,). A sink only adds to the denominator."""
    logits = keys[cells].astype(np.float64) @ q.astype(np.float64) * scale
    if softcap:
        logits = softcap * np.tanh(logits / softcap)
    if mask is not None:
        logits = logits + mask[cells].astype(np.float64)
    top = max(logits.max(initial=-np.inf), -np.inf if sink is None else sink)
    weights = np.exp(logits - top)
    denominator = weights.sum() + (0.0 if sink is None else np.exp(sink - top))
    result: F64 = weights @ values[cells].astype(np.float64) / denominator
    return result
