"""The rivals, as plain NumPy: each scores the cells of one decoded row, higher = selected first.

They run inside the native attention node (``llm.fasa.scoring``), so that all of them see the same cache, the same
sinks and recent cells, the same select and the same exact attention; only the scores differ. Shapes as in
``pyfasa.native.Scoring``: q (n_head, head_dim), keys (n_head_kv, n_cell, head_dim), scores (n_head, n_cell). Query
head h reads KV head h // group. Memory is counted in bytes that are read per cached token and KV head.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from pyfasa.native import Scoring

F32 = npt.NDArray[np.float32]
Bool = npt.NDArray[np.bool_]
Ints = npt.NDArray[np.int64]

WINDOW = 32  # last prompt rows that SnapKV and H2O observe
POOL = 7  # cells over which SnapKV takes the maximum


class Selector(ABC):
    """One way to score cells. `observes`: it wants the queries of the prompt's end."""

    observes = False

    @abstractmethod
    def bytes_per_cell(self, head_dim: int) -> float:
        """Bytes read to score one cached token of one KV head, K in f16."""

    def start(self, budget: int) -> None:  # noqa: B027
        """Before each answer: forgets what was kept of another one."""

    def observe(self, layer: int, queries: F32, keys: F32) -> None:  # noqa: B027
        """The prompt's last queries (n_rows, n_head, head_dim) and all its keys (n, n_head_kv, head_dim)."""

    @abstractmethod
    def __call__(self, row: Scoring) -> None:
        """Fills ``row.scores``."""


def by_kv_head(q: F32, n_head_kv: int) -> F32:
    """(n_head, head_dim) -> (n_head_kv, group, head_dim)"""
    return q.reshape(n_head_kv, -1, q.shape[1])


class Kept:
    """What a selector derives from the keys of each layer, brought up to date from the first change on.

    derive: keys (n_head_kv, n, head_dim) and which are visible (n,) -> (n_head_kv, ceil(n / block), ...)
    """

    def __init__(self, derive: Callable[[F32, Bool], F32], block: int = 1) -> None:
        self._derive = derive
        self._block = block
        self._layers: dict[int, tuple[F32, Bool]] = {}

    def clear(self) -> None:
        self._layers.clear()

    def update(self, row: Scoring) -> F32:
        old, seen = self._layers.get(row.layer, (None, row.visible[:0]))
        # Rows of one batch see different cells of it, without a change of their keys.
        n = min(len(seen), len(row.visible), row.first_changed)
        same = seen[:n] == row.visible[:n]
        first = (n if same.all() else int(np.argmin(same))) // self._block * self._block
        new = self._derive(row.keys[:, first:], row.visible[first:])
        if old is not None:
            new = np.concatenate([old[:, : first // self._block], new], axis=1)
        self._layers[row.layer] = new, row.visible.copy()
        return new


class Oracle(Selector):
    """Exact scores q . k: what any scoring with less to read is measured against."""

    def bytes_per_cell(self, head_dim: int) -> float:
        return 2.0 * head_dim

    def __call__(self, row: Scoring) -> None:
        q = by_kv_head(row.q, len(row.keys))
        row.scores[:] = np.matmul(q, row.keys.transpose(0, 2, 1)).reshape(row.scores.shape)


class Streaming(Selector):
    """StreamingLLM (arXiv 2309.17453): sinks, which are always kept, and the most recent cells."""

    def bytes_per_cell(self, head_dim: int) -> float:
        return 0.0

    def __call__(self, row: Scoring) -> None:
        row.scores[:] = np.arange(row.scores.shape[1], dtype=np.float32)


class Quest(Selector):
    """Quest (arXiv 2406.10774): cells score as their page, by the upper bound of q . k over the page.

    Minimum and maximum of each channel and page in f16: 4 * head_dim / page bytes per token.
    """

    def __init__(self, page: int) -> None:
        if page < 1:
            raise ValueError(f"A Quest page has {page} tokens; at least 1 is needed, 16 is usual.")
        self.page = page
        self._bounds = Kept(self._derive, page)

    def bytes_per_cell(self, head_dim: int) -> float:
        return 4.0 * head_dim / self.page

    def start(self, budget: int) -> None:
        self._bounds.clear()

    def _derive(self, keys: F32, visible: Bool) -> F32:
        """(n_head_kv, n_page, 2, head_dim): lowest and highest visible; 0 in a page that is hidden."""
        short = -keys.shape[1] % self.page
        seen = np.pad(visible, (0, short)).reshape(-1, self.page, 1)
        pages = np.pad(keys, ((0, 0), (0, short), (0, 0))).reshape(
            len(keys), -1, self.page, keys.shape[2]
        )
        low = np.where(seen, pages, np.float32(np.inf)).min(axis=2)
        high = np.where(seen, pages, np.float32(-np.inf)).max(axis=2)
        some: Bool = np.asarray(seen.any(axis=1))
        return np.where(some[:, None], np.stack([low, high], axis=2), np.float32(0))

    def __call__(self, row: Scoring) -> None:
        low, high = np.moveaxis(self._bounds.update(row), 2, 0).transpose(0, 1, 3, 2)
        q = by_kv_head(row.q, len(row.keys))
        bound = np.matmul(np.maximum(q, 0), high) + np.matmul(np.minimum(q, 0), low)
        cells = np.repeat(bound, self.page, axis=2)[:, :, : row.scores.shape[1]]
        row.scores[:] = cells.reshape(row.scores.shape)


class SparQ(Selector):
    """SparQ (arXiv 2312.04985): q . k over the R channels where |q|, summed over the group, is largest.

    Reads R channels of K in f16: 2 R bytes per token.
    """

    def __init__(self, channels: int) -> None:
        if channels < 1:
            raise ValueError(f"SparQ reads {channels} channels; at least 1 is needed.")
        self.channels = channels

    def bytes_per_cell(self, head_dim: int) -> float:
        return 2.0 * min(self.channels, head_dim)

    def __call__(self, row: Scoring) -> None:
        q = by_kv_head(row.q, len(row.keys))
        group = q.shape[1]
        order = np.argsort(-np.abs(q).sum(axis=1), axis=1, kind="stable")
        for h, best in enumerate(order[:, : self.channels]):
            row.scores[h * group : (h + 1) * group] = q[h][:, best] @ row.keys[h][:, best].T


class DoubleSparsity(Selector):
    """Double Sparsity (arXiv 2408.07092): q . k over calibrated channels, 4 bits each and a step per token.

    channels (n_layer, n_head_kv, R): see ``pyfasa.evaluation.channels``. R / 2 + 2 bytes per token.
    """

    def __init__(self, channels: Ints) -> None:
        self.channels = channels
        self._layers: dict[int, Kept] = {}

    def bytes_per_cell(self, head_dim: int) -> float:
        return float(self.channels.shape[2] / 2 + 2)

    def start(self, budget: int) -> None:
        self._layers.clear()

    def __call__(self, row: Scoring) -> None:
        chosen = self.channels[row.layer, : len(row.keys)][:, None]  # (n_head_kv, 1, R)
        kept = self._layers.setdefault(
            row.layer, Kept(lambda keys, _: four_bits(np.take_along_axis(keys, chosen, axis=2)))
        )
        q = np.take_along_axis(by_kv_head(row.q, len(row.keys)), chosen, axis=2)
        labels = kept.update(row).transpose(0, 2, 1)
        row.scores[:] = np.matmul(q, labels).reshape(row.scores.shape)


def four_bits(x: F32) -> F32:
    """x (..., n) as 16 levels with one step per row keep it."""
    step = np.abs(x).max(axis=-1, keepdims=True) / np.float32(7.5)
    codes = np.rint(np.divide(x, step, out=np.zeros_like(x), where=step > 0) + np.float32(7.5))
    kept: F32 = (np.clip(codes, 0, 15) - np.float32(7.5)) * step
    return kept


class SnapKV(Selector):
    """SnapKV (arXiv 2404.14469): the attention of the prompt's last 32 rows decides for the whole answer.

    Their mass, pooled by the maximum over 7 cells, is the score of a prompt cell; the window itself and what comes
    later are kept. Nothing is read per step.
    """

    observes = True

    def __init__(self) -> None:
        self._mass: dict[int, F32] = {}

    def bytes_per_cell(self, head_dim: int) -> float:
        return 0.0

    def start(self, budget: int) -> None:
        self._mass.clear()

    def observe(self, layer: int, queries: F32, keys: F32) -> None:
        queries = queries[-WINDOW:]
        mass = attention(queries, keys).sum(axis=1)[:, : max(len(keys) - len(queries), 0)]
        padded = np.pad(mass, ((0, 0), (POOL // 2, POOL // 2)))
        windows = np.lib.stride_tricks.sliding_window_view(padded, POOL, axis=1)
        self._mass[layer] = windows.max(axis=2)

    def __call__(self, row: Scoring) -> None:
        mass = self._mass.get(row.layer, np.zeros((len(row.q), 0), np.float32))
        n = min(mass.shape[1], row.scores.shape[1])
        row.scores[:] = WINDOW + 1  # more than any mass
        row.scores[:, :n] = mass[:, :n]


class H2O(Selector):
    """H2O (arXiv 2306.14048): accumulated attention decides, half of the budget is recent; what goes stays away.

    Starts with the attention of the prompt's last 32 rows instead of all of them. Nothing is read per step.
    """

    observes = True

    def __init__(self) -> None:
        self._budget = 0
        self._mass: dict[int, F32] = {}  # -1: evicted

    def bytes_per_cell(self, head_dim: int) -> float:
        return 0.0

    def start(self, budget: int) -> None:
        self._budget = budget
        self._mass.clear()

    def observe(self, layer: int, queries: F32, keys: F32) -> None:
        self._mass[layer] = attention(queries[-WINDOW:], keys).sum(axis=1)

    def __call__(self, row: Scoring) -> None:
        n = row.scores.shape[1]
        mass = self._mass.get(row.layer, np.zeros((len(row.q), 0), np.float32))
        mass = np.pad(mass[:, :n], ((0, 0), (0, max(n - mass.shape[1], 0))))
        recent = np.flatnonzero(row.visible)[-max(self._budget // 2, 1) :]
        row.scores[:] = mass
        row.scores[:, recent] = mass.max() + 1 + np.arange(len(recent), dtype=np.float32)

        scores = np.where(row.visible, row.scores, -np.inf)
        best = np.argsort(-scores, axis=1, kind="stable")[:, : self._budget]
        chosen = np.zeros_like(scores, np.bool_)
        np.put_along_axis(chosen, best, True, axis=1)
        chosen &= row.visible & (row.scores >= 0)
        mass = mass + attention(row.q[None], row.keys.transpose(1, 0, 2), chosen)[:, 0]
        self._mass[row.layer] = np.where(row.visible & ~chosen, np.float32(-1), mass)


def attention(queries: F32, keys: F32, allowed: Bool | None = None) -> F32:
    """Softmax weights (n_head, n_rows, n) of queries (n_rows, n_head, head_dim) over keys (n, n_head_kv, head_dim).

    Scaled by 1 / sqrt(head_dim). The rows are the last of the n cells and see no later ones, or `allowed` (n_head, n).
    """
    n_rows, n_head, head_dim = queries.shape
    n, n_head_kv, _ = keys.shape
    q = queries.transpose(1, 0, 2).reshape(n_head_kv, -1, head_dim) / np.float32(np.sqrt(head_dim))
    logits = np.matmul(q, keys.transpose(1, 2, 0)).reshape(n_head, n_rows, n)
    if allowed is None:
        seen = np.arange(n) <= np.arange(n - n_rows, n)[:, None]
        logits = np.where(seen, logits, np.float32(-np.inf))
    else:
        logits = np.where(allowed[:, None], logits, np.float32(-np.inf))
    weights = np.exp(logits - logits.max(axis=2, keepdims=True))
    shares: F32 = weights / weights.sum(axis=2, keepdims=True)
    return shares
