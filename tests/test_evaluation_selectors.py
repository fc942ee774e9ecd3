"""Every selector against its definition, written out cell by cell."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from pyfasa.evaluation.selectors import (
    H2O,
    DoubleSparsity,
    Oracle,
    Quest,
    Selector,
    SnapKV,
    SparQ,
    Streaming,
    attention,
)

N_HEAD, N_HEAD_KV, DIM = 6, 2, 16
GROUP = N_HEAD // N_HEAD_KV


@dataclass
class Row:
    """As pyfasa.native.Scoring, without the core."""

    q: Any
    keys: Any
    visible: Any
    layer: int = 0
    first_changed: int = 0

    def __post_init__(self) -> None:
        self.scores = np.full((N_HEAD, self.keys.shape[1]), np.nan, np.float32)
        self.keys.setflags(write=False)


def make_row(rng: np.random.Generator, n: int, **known: Any) -> Row:
    values = {
        "q": rng.standard_normal((N_HEAD, DIM)).astype(np.float32),
        "keys": rng.standard_normal((N_HEAD_KV, n, DIM)).astype(np.float32),
        "visible": np.ones(n, np.bool_),
    }
    return Row(**{**values, **known})


def score(selector: Selector, row: Row) -> Any:
    selector(row)  # type: ignore[arg-type]
    assert np.isfinite(row.scores[:, row.visible]).all(), "every visible cell needs a score"
    return row.scores


def key(row: Row, head: int, cell: int) -> Any:
    return row.keys[head // GROUP, cell]


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> np.random.Generator:
    return np.random.default_rng(len(request.node.name))


def test_oracle_is_the_exact_score(rng: np.random.Generator) -> None:
    row = make_row(rng, 70)
    found = score(Oracle(), row)
    for head, cell in np.ndindex(found.shape):
        assert found[head, cell] == pytest.approx(row.q[head] @ key(row, head, cell), abs=1e-4)


def test_streaming_prefers_later_cells(rng: np.random.Generator) -> None:
    assert (np.diff(score(Streaming(), make_row(rng, 70)), axis=1) > 0).all()


def bound(row: Row, head: int, cell: int, page: int) -> float:
    """The highest q . k that keys within the page's bounds can have."""
    first = cell // page * page
    cells = [t for t in range(first, min(first + page, row.keys.shape[1])) if row.visible[t]]
    if not cells:
        return 0.0
    keys = np.stack([key(row, head, t) for t in cells])
    return float(sum(max(q * low, q * high) for q, low, high in
                     zip(row.q[head], keys.min(axis=0), keys.max(axis=0), strict=True)))  # fmt: skip


@pytest.mark.parametrize("page", [1, 16, 24, 100])
def test_quest_is_the_bound_of_the_page(rng: np.random.Generator, page: int) -> None:
    visible = np.ones(77, np.bool_)
    visible[[3, 40, 41]] = False
    visible[70:] = False
    row = make_row(rng, 77, visible=visible)
    found = score(Quest(page), row)
    for head, cell in np.ndindex(found.shape):
        assert found[head, cell] == pytest.approx(bound(row, head, cell, page), abs=1e-3)
    exact = score(Oracle(), make_row(rng, 77, q=row.q, keys=row.keys))
    assert (found[:, visible] >= exact[:, visible] - 1e-3).all()


@pytest.mark.parametrize(
    "selector", [Quest(16), DoubleSparsity(np.tile(np.arange(5), (3, N_HEAD_KV, 1)))], ids=type
)
def test_what_is_kept_follows_every_change(rng: np.random.Generator, selector: Selector) -> None:
    """Growth, truncation, rewriting and cells that become visible, layers in turns: as if made anew."""
    selector.start(8)
    layers = [make_row(rng, 50).keys.copy() for _ in range(3)]
    for _ in range(60):
        layer = int(rng.integers(3))
        old = layers[layer]
        first = int(rng.integers(max(1, old.shape[1] - 30), old.shape[1] + 1))
        new = rng.standard_normal((N_HEAD_KV, int(rng.integers(1, 40)), DIM)).astype(np.float32)
        layers[layer] = np.concatenate([old[:, :first], new], axis=1)
        n = layers[layer].shape[1]
        visible = np.arange(n) < int(rng.integers(max(1, n - 20), n + 1))
        known = {"q": make_row(rng, 1).q, "keys": layers[layer], "visible": visible, "layer": layer}
        found = score(selector, Row(**known, first_changed=first))
        fresh = Quest(16) if isinstance(selector, Quest) else DoubleSparsity(selector.channels)
        np.testing.assert_array_equal(found[:, visible], score(fresh, Row(**known))[:, visible])


def test_start_forgets_another_answer(rng: np.random.Generator) -> None:
    selector = Quest(16)
    score(selector, make_row(rng, 64))
    other = make_row(rng, 64)
    other.first_changed = 64  # of another setting's last call
    selector.start(8)
    np.testing.assert_array_equal(score(selector, other), score(Quest(16), make_row(
        rng, 64, q=other.q, keys=other.keys)))  # fmt: skip


def test_sparq_reads_the_largest_channels_of_the_group(rng: np.random.Generator) -> None:
    row = make_row(rng, 70)
    found = score(SparQ(5), row)
    for h in range(N_HEAD_KV):
        heads = range(h * GROUP, (h + 1) * GROUP)
        size = sum(np.abs(row.q[head]) for head in heads)
        best = sorted(range(DIM), key=lambda d: -size[d])[:5]
        for head in heads:
            expected = row.keys[h][:, best] @ row.q[head][best]
            np.testing.assert_allclose(found[head], expected, atol=1e-4)


def test_double_sparsity_is_the_score_of_16_levels(rng: np.random.Generator) -> None:
    channels = np.stack([rng.permutation(DIM)[:6] for _ in range(N_HEAD_KV)])[None]
    row = make_row(rng, 40)
    found = score(DoubleSparsity(channels), row)
    for head, cell in np.ndindex(found.shape):
        chosen = channels[0, head // GROUP]
        k = key(row, head, cell)[chosen]
        step = np.abs(k).max() / 7.5
        levels = np.clip(np.round(k / step + 7.5), 0, 15) - 7.5
        assert np.abs(levels * step - k).max() <= step * 0.51
        assert found[head, cell] == pytest.approx(row.q[head][chosen] @ (levels * step), abs=2e-2)


def observed(rng: np.random.Generator, n: int, n_rows: int) -> tuple[Any, Any]:
    queries = rng.standard_normal((n_rows, N_HEAD, DIM)).astype(np.float32)
    return queries, rng.standard_normal((n, N_HEAD_KV, DIM)).astype(np.float32)


def softmax_row(q: Any, keys: Any) -> Any:
    logits = keys @ q / np.sqrt(DIM)
    weights = np.exp(logits - logits.max())
    return weights / weights.sum()


def test_attention_is_a_causal_softmax(rng: np.random.Generator) -> None:
    queries, keys = observed(rng, 30, 5)
    found = attention(queries, keys)
    for head, row in np.ndindex(N_HEAD, 5):
        n = 25 + row + 1
        expected = softmax_row(queries[row, head], keys[:n, head // GROUP])
        np.testing.assert_allclose(found[head, row, :n], expected, atol=1e-6)
        assert (found[head, row, n:] == 0).all()


def test_snapkv_keeps_what_the_window_attended_to(rng: np.random.Generator) -> None:
    queries, keys = observed(rng, 90, 40)
    selector = SnapKV()
    selector.start(20)
    selector.observe(0, queries, keys)
    found = score(selector, make_row(rng, 96))
    mass = attention(queries[-32:], keys).sum(axis=1)
    before = 90 - 32
    for head, cell in np.ndindex(N_HEAD, before):
        around = mass[head, max(0, cell - 3) : min(cell + 4, before)]
        assert found[head, cell] == pytest.approx(around.max(), abs=1e-5)
    assert found[:, before:].min() > found[:, :before].max()
    again = make_row(rng, 96)  # other queries later change nothing
    np.testing.assert_array_equal(score(selector, again), found)
    selector.start(20)
    assert len(np.unique(score(selector, make_row(rng, 96)))) == 1, "start forgets the prompt"


def test_h2o_keeps_heavy_and_recent_cells_and_what_goes_stays_away(
    rng: np.random.Generator,
) -> None:
    budget, n = 16, 60
    queries, keys = observed(rng, n, 10)
    selector = H2O()
    selector.start(budget)
    selector.observe(0, queries, keys)
    mass = attention(queries, keys).sum(axis=1)
    alive = [set(range(n)) for _ in range(N_HEAD)]
    mass = [dict(enumerate(map(float, own))) for own in mass]
    cells = keys.transpose(1, 0, 2)
    for step in range(12):
        new = rng.standard_normal((N_HEAD_KV, 1, DIM)).astype(np.float32)
        cells = np.concatenate([cells, new], axis=1)
        row = make_row(rng, n + step + 1, keys=cells)
        found = score(selector, row)
        recent = range(n + step + 1 - budget // 2, n + step + 1)
        for head in range(N_HEAD):
            alive[head].add(n + step)
            mass[head].setdefault(n + step, 0.0)
            heavy = sorted(alive[head] - set(recent), key=lambda t: -mass[head][t])
            kept = sorted({*recent, *heavy[: budget - len(recent)]})
            assert set(np.argsort(-found[head], kind="stable")[:budget]) == set(kept)
            weights = softmax_row(row.q[head], cells[head // GROUP, kept])
            for t, weight in zip(kept, weights, strict=True):
                mass[head][t] += float(weight)
            alive[head] = set(kept)


def test_bytes_per_cell() -> None:
    channels = np.zeros((1, 1, 16), np.int64)
    rivals = [Oracle(), Quest(16), SparQ(5), DoubleSparsity(channels), SnapKV(), H2O(), Streaming()]
    assert [one.bytes_per_cell(64) for one in rivals] == [128, 16, 10, 10, 0, 0, 0]


@pytest.mark.parametrize(
    ("make", "sentence"),
    [(lambda: Quest(0), "page has 0 tokens"), (lambda: SparQ(0), "reads 0 channels")],
)
def test_wrong_sizes(make: Any, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        make()
