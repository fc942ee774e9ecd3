"""recall: the attention mass of selected cells, against loops."""

from __future__ import annotations

import numpy as np
import pytest

from pyfasa.recall import Attention


@pytest.fixture
def attention() -> Attention:
    rng = np.random.default_rng(5)
    queries = rng.normal(size=(3, 2, 8)).astype(np.float32)
    keys = 3 * rng.normal(size=(40, 8)).astype(np.float32)
    return Attention.of(queries, keys, np.array([20, 31, 40]), sinks=2, recent=3)


def test_weights_are_the_softmax_of_visible_cells(attention: Attention) -> None:
    for i, (row, head) in enumerate(np.ndindex(3, 2)):
        seen = int(attention.visible[row])
        logits = attention.keys[:seen].astype(np.float64) @ attention.queries[row, head] / 8**0.5
        wanted = np.exp(logits) / np.exp(logits).sum()
        np.testing.assert_allclose(attention.weights[i, :seen], wanted, rtol=1e-4, atol=1e-7)
        assert (attention.weights[i, seen:] == 0).all()


@pytest.mark.parametrize("budget", [5, 6, 12, 19])
def test_mass_against_loops(attention: Attention, budget: int) -> None:
    rng = np.random.default_rng(budget)
    scores = rng.normal(size=(6, 40)).astype(np.float32)
    found = attention.mass(scores.copy(), [budget])
    for i, (row, _) in enumerate(np.ndindex(3, 2)):
        seen = int(attention.visible[row])
        forced = {0, 1, seen - 3, seen - 2, seen - 1}
        rest = sorted(set(range(seen)) - forced, key=lambda c: -scores[i, c])
        cells = sorted(forced) + rest[: budget - len(forced)]
        assert found[0, i] == pytest.approx(attention.weights[i, cells].sum(), rel=1e-5)


def test_the_oracle_finds_the_most(attention: Attention) -> None:
    rng = np.random.default_rng(1)
    budgets = (6, 10, 25, 400)
    most = attention.most(budgets)
    assert (np.diff(most, axis=0) >= -1e-6).all()
    np.testing.assert_allclose(most[-1], 1, rtol=1e-5)
    for _ in range(20):
        found = attention.mass(rng.normal(size=(6, 40)).astype(np.float32), budgets)
        assert (found <= most + 1e-6).all()
