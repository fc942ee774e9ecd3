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


def quantize(x: F32, dims: Ints, bits: int) -> Row:
    """Codes and steps of x (n, n_dim): x ~ step * (code - (2^bits - 1) / 2), the step refined by least squares."""
    middle = (2**bits - 1) / 2
    if bits == 2:
        step = np.float32(GAUSS_STEP_2_BITS) * np.sqrt(np.mean(np.square(x), axis=1))
    else:
        step = np.max(np.abs(x), axis=1) / np.float32(middle)
    inverse = np.divide(1, step, out=np.zeros_like(step), where=step > 0)
    codes = np.clip(np.rint(x * inverse[:, None] + np.float32(middle)), 0, 2**bits - 1)
    levels = codes - middle
    fit = (x * levels).sum(axis=1)
    steps = np.where(fit > 0, fit / np.square(levels).sum(axis=1), 0).astype(np.float16)
    return Row(dims, bits, codes.astype(np.uint8), steps.astype(np.float32))


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
    for width in (8, 4, 2):
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
