"""Bits per frequency chunk under a byte budget for the whole model, spent where they buy attention mass.

A *shape* says how many of a KV head's best chunks get 4, 2 and 1 bits; the rest gets none. Calibration measures
what each shape of a fixed list finds in each head. `spend` then starts every head at its cheapest shape and buys,
again and again, the step that adds the most mass per byte, along the upper hull of each head's shapes
(Shoham and Gersho 1988): at the end no byte could be moved to another head with profit.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

import numpy as np
import numpy.typing as npt

from pyfasa.profile import entry_bytes

F64 = npt.NDArray[np.float64]
U8 = npt.NDArray[np.uint8]
Shape = tuple[int, int, int]  # eighths of the head's chunks with 4, 2 and 1 bits

EIGHTHS = 8
_COUNTS = ((0, 1, 2, 4, 8), (0, 1, 2, 3, 4, 6, 8), (0, 1, 2, 3, 4, 6, 8))
WIDTHS = (4, 2, 1)


def shapes() -> list[Shape]:
    """The list: at most all chunks, at least an eighth; not more chunks with more bits than with the next fewer."""
    return [
        (a, b, c)
        for a, b, c in product(*_COUNTS)
        if 0 < a + b + c <= EIGHTHS and (a <= b or b == c == 0) and (b <= c or c == 0)
    ]


def bits_of(shape: Shape, n_chunk: int) -> U8:
    """Bits per rank, best chunk first: (n_chunk,)."""
    counts = [n_chunk * eighths // EIGHTHS for eighths in np.cumsum(shape)]
    bits = np.zeros(n_chunk, np.uint8)
    for width, first, last in zip(WIDTHS, [0, *counts[:-1]], counts, strict=True):
        bits[first:last] = width
    return bits


def bytes_of(bits: npt.NDArray[np.integer]) -> int:
    """Bytes of an index entry whose chunks have these bits (n_chunk,)."""
    return int(entry_bytes(bits))


def hull(sizes: Sequence[int], gains: Sequence[float]) -> list[int]:
    """Which of the points (size, gain) lie on the upper concave hull, from the smallest to the best."""
    order = sorted(range(len(sizes)), key=lambda i: (sizes[i], -gains[i]))
    kept: list[int] = []
    for i in order:
        if kept and gains[i] <= gains[kept[-1]]:
            continue
        while len(kept) > 1 and _slope(sizes, gains, kept[-2], kept[-1]) <= _slope(
            sizes, gains, kept[-1], i
        ):
            kept.pop()
        if kept and sizes[kept[-1]] == sizes[i]:
            kept.pop()
        kept.append(i)
    return kept


def _slope(sizes: Sequence[int], gains: Sequence[float], a: int, b: int) -> float:
    return (gains[b] - gains[a]) / max(sizes[b] - sizes[a], 1e-9)


def check_least(least: float, mean_bytes: float) -> None:
    """Raises ValueError when the cheapest shapes cost more than `mean_bytes` per head."""
    if least > mean_bytes:
        raise ValueError(
            f"index_bytes is {mean_bytes:g}, and the smallest index of this model has {least:g} bytes per token and "
            f"KV head; give {least:g} or more."
        )


def spend(sizes: Sequence[int], gains: F64, mean_bytes: float) -> list[int]:
    """A shape for each head, with at most `mean_bytes` per head on average.

    sizes       bytes of each shape
    gains       (n_head, n_shape), attention mass that it finds

    Raises ValueError when the cheapest shapes cost more.
    """
    ladders = [hull(sizes, list(row)) for row in gains]
    least = sum(sizes[ladder[0]] for ladder in ladders) / len(ladders)
    check_least(least, mean_bytes)
    left = mean_bytes * len(ladders) - least * len(ladders)
    at = [0] * len(ladders)
    while True:
        best: tuple[float, int, int] | None = None
        for head, ladder in enumerate(ladders):
            if at[head] + 1 < len(ladder):
                now, then = ladder[at[head]], ladder[at[head] + 1]
                price = sizes[then] - sizes[now]
                gain = (gains[head, then] - gains[head, now]) / price
                if price <= left + 1e-9 and (best is None or gain > best[0]):
                    best = gain, head, price
        if best is None:
            return [ladder[i] for ladder, i in zip(ladders, at, strict=True)]
        at[best[1]] += 1
        left -= best[2]
