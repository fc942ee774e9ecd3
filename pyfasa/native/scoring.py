"""Scores from Python in place of the side index, for evaluation; see ``fasa_scoring`` in the cdef."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from pyfasa._native import ffi
from pyfasa.native.call import BLOCK_CELLS, F32


@dataclass(frozen=True)
class Scoring:
    """One decoded row of one attention layer, before select; arrays are valid during the call only.

    layer          number of the layer
    q              (n_head, head_dim), in the basis in which RoPE acts
    keys           (n_head_kv, n_cell, head_dim), likewise; read only
    first_changed  keys of earlier cells are those of this layer's last call
    visible        (n_cell,), which cells the row may see
    scores         (n_head, n_cell), to be filled; higher is selected first, hidden cells never are
    """

    layer: int
    q: F32
    keys: F32
    first_changed: int
    visible: npt.NDArray[np.bool_]
    scores: F32


Scorer = Callable[[Scoring], None]


def c_scorer(scorer: Scorer, errors: list[BaseException]) -> Any:
    """A fasa_scorer that calls ``scorer``; what it raises is appended to ``errors``, and it is not called again."""

    def call(_: Any, c: Any) -> int:
        if errors:
            return 1
        try:
            scorer(_scoring(c))
        except BaseException as error:  # also Ctrl-C: nothing may pass through the graph
            errors.append(error)
            return 1
        return 0

    return ffi.callback("fasa_scorer", call, error=1)


def _scoring(c: Any) -> Scoring:
    n_score = c.n_block * BLOCK_CELLS

    def floats(start: Any, n: int) -> F32:
        array: F32 = np.frombuffer(ffi.buffer(start, 4 * n), np.float32)
        return array

    size = c.n_cell * c.head_dim
    rows = [floats(c.keys + h * c.key_stride, size) for h in range(c.n_head_kv)]
    keys = np.lib.stride_tricks.as_strided(
        rows[0],
        (c.n_head_kv, c.n_cell, c.head_dim),
        (4 * c.key_stride, 4 * c.head_dim, 4),
        writeable=False,
    )
    words = np.frombuffer(ffi.buffer(c.visible, 8 * c.n_block), np.uint8)
    visible = np.unpackbits(words, bitorder="little")[: c.n_cell].astype(np.bool_)
    scores = floats(c.scores, c.n_head * n_score).reshape(c.n_head, n_score)[:, : c.n_cell]
    q = floats(c.q, c.n_head * c.head_dim).reshape(c.n_head, c.head_dim)
    return Scoring(c.layer, q, keys, c.first_changed, visible, scores)
