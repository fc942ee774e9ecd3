"""How much of the attention the best cells of a score carry: the measure of a selection, without decoding.

The attention mass of a set of cells is the sum of their exact softmax weights. What a selection keeps of it bounds
the error of the head's output; the oracle, which selects by exact scores, keeps the most that a budget allows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Attention:
    """Exact attention of one KV head's query heads in one document.

    queries  (n_row, group, head_dim), keys (n_cell, head_dim), both in the basis in which RoPE acts
    visible  (n_row,) row r sees cells 0 .. visible[r] - 1
    weights  (n_row * group, n_cell), softmax of the scaled scores; 0 where hidden
    forced   (n_row, n_cell) first and last cells, which any selection has
    """

    queries: F32
    keys: F32
    visible: Ints
    weights: F32
    forced: Bools

    @classmethod
    def of(
        cls, queries: F32, keys: F32, visible: Ints, *, sinks: int = 4, recent: int = 32
    ) -> Attention:
        """Scores are scaled by head_dim^-1/2, without soft-cap."""
        _, group, dim = queries.shape
        logits = queries.reshape(-1, dim) @ keys.T * np.float32(dim**-0.5)
        cell = np.arange(len(keys))
        logits[np.repeat(cell >= visible[:, None], group, axis=0)] = -np.inf
        weights = np.exp(logits - logits.max(axis=1, keepdims=True))
        weights /= weights.sum(axis=1, keepdims=True)
        forced = (cell < sinks) | (cell >= visible[:, None] - recent)
        return cls(queries, keys, visible, weights, forced & (cell < visible[:, None]))

    def scores(self, entries: F32) -> F32:
        """Dot products with what an index keeps of the keys: (n_row * group, n_cell)."""
        found: F32 = self.queries.reshape(-1, self.keys.shape[1]) @ entries.T
        return found

    def mass(self, scores: F32, budgets: Sequence[int]) -> F64:
        """Attention mass of the `budget` best cells by `scores` (n_row * group, n_cell): (n_budget, n_row * group).

        Changes `scores`. Forced cells count against the budget; hidden ones are never selected.
        """
        n_row, group, _ = self.queries.shape
        n_cell = scores.shape[1]
        by_row = scores.reshape(n_row, group, n_cell)
        hidden = np.arange(n_cell) >= self.visible[:, None]
        np.copyto(by_row, -np.inf, where=hidden[:, None])
        np.copyto(by_row, np.inf, where=self.forced[:, None])
        places = [max(0, n_cell - budget) for budget in budgets]
        order = np.partition(scores, sorted(set(places)), axis=1)
        found = [(self.weights * (scores >= order[:, place, None])).sum(axis=1) for place in places]
        return np.array(found, np.float64)

    def most(self, budgets: Sequence[int]) -> F64:
        """Mass of the oracle: (n_budget, n_row * group)."""
        return self.mass(self.scores(self.keys), budgets)
