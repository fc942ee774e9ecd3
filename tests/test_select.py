"""select: exactly the best cells, by property and, where the answer is unique, by value."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyfasa import native, reference
from pyfasa._native import ffi, lib
from test_index import every_isa, fresh_rng, guarded

MAX = np.finfo(np.float32).max


def peaks_of(scores: native.F32) -> native.F32:
    """Peak g of a block is the best score of its cells 8 i + g; NaN loses."""
    return np.fmax.reduce(scores.reshape(-1, 8, 8), axis=1).reshape(-1)


def run(isa: int, scores: native.F32, budget: int) -> native.I32:
    """Through the C interface, on poisoned and guarded outputs."""
    peaks, n_block = peaks_of(scores), len(scores) // native.BLOCK_CELLS
    kept_scores, kept_peaks = scores.copy(), peaks.copy()
    scratch, check_scratch = guarded(scores.shape, np.float32)
    cells, check_cells = guarded(scores.shape, np.int32)
    n = ffi.new("int64_t *", -1)
    status = lib.fasa_select(
        isa, ffi.from_buffer("float[]", scores), ffi.from_buffer("float[]", peaks), n_block, budget,
        ffi.from_buffer("float[]", scratch), ffi.from_buffer("int32_t[]", cells), n,
    )  # fmt: skip
    assert status == lib.FASA_STATUS_OK
    check_scratch()
    check_cells()
    np.testing.assert_array_equal(scores, kept_scores, "inputs must not change")
    np.testing.assert_array_equal(peaks, kept_peaks, "inputs must not change")
    return cells[: n[0]].copy()


def check(isa: int, scores: native.F32, budget: int) -> native.I32:
    cells = run(isa, scores, budget)
    visible = scores > -np.inf  # False for NaN
    assert len(cells) == min(budget, visible.sum())
    assert (np.diff(cells) > 0).all(), "ascending, hence unique"
    assert visible[cells].all()
    left = visible.copy()
    left[cells] = False
    if len(cells) and left.any():
        threshold = scores[cells].min()
        assert threshold >= scores[left].max()
        ties = np.flatnonzero(visible & (scores == threshold))
        taken = cells[scores[cells] == threshold]
        np.testing.assert_array_equal(taken, ties[: len(taken)], "ties favour lower cells")
    return cells


def budgets(n: int) -> list[int]:
    """Around the number of peaks and of cells, where select takes other paths."""
    near = {n // 8 - 1, n // 8, n // 8 + 1, n // 2, n - 1, n, n + 1}
    return sorted(({1, 2, 7, 4 * n} | near) - {0})


@every_isa
@pytest.mark.parametrize("n_block", [1, 2, 17, 40, 600])
@pytest.mark.parametrize(
    "kind", ["gaussian", "ties", "hidden", "few", "clustered", "wide", "zeros", "misleading"]
)
def test_best_cells(isa: int, n_block: int, kind: str) -> None:
    rng = fresh_rng()
    n = 64 * n_block
    scores = rng.normal(size=n).astype(np.float32)
    if kind == "ties":
        scores = np.rint(scores)
    elif kind == "hidden":
        scores[rng.random(n) < 0.5] = -np.inf
    elif kind == "few":
        scores[rng.random(n) < 0.95] = -np.inf
    elif kind == "clustered":  # all good cells in one block: most peaks say nothing
        scores[: n // n_block] += 100
    elif kind == "wide":
        scores *= np.float32(10.0) ** rng.integers(-38, 38, n).astype(np.float32)
    elif kind == "zeros":  # -0 and 0 are equal, what is beside them is not
        scores = rng.choice(np.array([0.0, -0.0, 1e-45, -1e-45, 3e-45], np.float32), n)
    elif kind == "misleading":  # the best cells are those that select samples
        i = np.arange(256)
        scores[(256 * i + 101 * i % 256) * n // 65536] += 100
    for budget in budgets(n):
        cells = check(isa, scores, budget)
        expected = reference.select(scores.astype(np.float64), budget)
        np.testing.assert_array_equal(cells, expected)


@every_isa
@settings(max_examples=40, deadline=None)
@given(
    values=st.lists(
        st.one_of(
            st.floats(width=32, allow_nan=False),
            st.sampled_from([-np.inf, 0.0, -0.0, 1.0, float(MAX), -float(MAX), 1e-45, -1e-45]),
        ),
        min_size=64, max_size=64,
    ),
    repeat=st.integers(1, 5),
    budget=st.integers(1, 400),
)  # fmt: skip
def test_any_floats(isa: int, values: list[float], repeat: int, budget: int) -> None:
    check(isa, np.tile(np.array(values, np.float32), repeat), budget)


@every_isa
@pytest.mark.parametrize("budget", [1, 63, 64, 65, 500, 1088])
def test_a_descending_row_has_one_answer(isa: int, budget: int) -> None:
    scores = -np.arange(1088, dtype=np.float32)
    np.testing.assert_array_equal(run(isa, scores, budget), np.arange(budget))
    np.testing.assert_array_equal(run(isa, scores[::-1].copy(), budget), np.arange(1088)[-budget:])


@every_isa
@pytest.mark.parametrize("value", [0.0, -0.0, -3.5, 1e-45, MAX, -MAX, np.inf])
def test_equal_scores_give_the_first_cells(isa: int, value: float) -> None:
    scores = np.full(320, value, np.float32)
    for budget in (1, 39, 40, 41, 319, 320, 1000):
        np.testing.assert_array_equal(run(isa, scores, budget), np.arange(min(budget, 320)))


@every_isa
def test_nothing_visible_selects_nothing(isa: int) -> None:
    for budget in (1, 8, 9, 64, 100):
        assert len(run(isa, np.full(64, -np.inf, np.float32), budget)) == 0
    assert len(run(isa, np.empty(0, np.float32), 5)) == 0


@every_isa
def test_the_lowest_finite_score_is_visible(isa: int) -> None:
    scores = np.full(64, -np.inf, np.float32)
    scores[[5, 50]] = -MAX
    np.testing.assert_array_equal(run(isa, scores, 1), [5])
    np.testing.assert_array_equal(run(isa, scores, 64), [5, 50])


@every_isa
@pytest.mark.parametrize("share", [0.01, 0.5, 1.0])
def test_not_a_number_is_never_selected(isa: int, share: float) -> None:
    rng = fresh_rng()
    scores = rng.normal(size=640).astype(np.float32)
    scores[rng.random(640) < share] = np.nan
    for budget in budgets(640):
        check(isa, scores, budget)


@every_isa
def test_forced_cells_are_always_in(isa: int) -> None:
    """Sinks and recent cells get the largest float; a budget of just them selects just them."""
    rng = fresh_rng()
    scores = (rng.normal(size=1088) * 1e30).astype(np.float32)
    forced = np.sort(rng.permutation(1088)[:36])
    scores[forced] = MAX
    for budget in (36, 37, 136, 500):
        assert np.isin(forced, check(isa, scores, budget)).all()
    np.testing.assert_array_equal(run(isa, scores, 36), forced)


@every_isa
def test_a_larger_budget_keeps_what_a_smaller_one_had(isa: int) -> None:
    rng = fresh_rng()
    scores = np.rint(rng.normal(size=640) * 4).astype(np.float32)
    before = run(isa, scores, 1)
    for budget in range(2, 660, 31):
        now = run(isa, scores, budget)
        assert np.isin(before, now).all()
        before = now


@every_isa
@pytest.mark.parametrize("budget", [0, -1])
def test_a_budget_below_one_is_refused(isa: int, budget: int) -> None:
    with pytest.raises(ValueError, match="budget"):
        native.select(isa, np.zeros(64, np.float32), np.zeros(8, np.float32), budget)
