"""allocation: shapes are bits per rank, and a budget is spent where it buys the most."""

from __future__ import annotations

from itertools import pairwise, product
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyfasa import allocation
from test_profile import make_identity, make_profile


@pytest.mark.parametrize("n_chunk", [8, 32, 48, 64])
def test_shapes_are_bits_per_rank(n_chunk: int) -> None:
    listed = allocation.shapes()
    assert len(set(listed)) == len(listed) > 40
    for shape in listed:
        bits = allocation.bits_of(shape, n_chunk)
        assert bits.tolist() == sorted(bits.tolist(), reverse=True)
        counts = [int((bits == width).sum()) for width in (4, 2, 1)]
        assert sum(counts) * 8 == pytest.approx(sum(shape) * n_chunk, abs=8)
        assert sum(counts) > 0


@given(st.lists(st.sampled_from([0, 1, 2, 4, 8]), min_size=8, max_size=8))
@settings(deadline=None, max_examples=50)
def test_bytes_are_those_of_the_profile(drawn: list[int]) -> None:
    used = sorted((b for b in drawn if b), key=drawn.index) or [1]
    row = used + [0] * (8 - len(used))
    bits = np.broadcast_to(np.array(row), (2, 2, 8))
    profile = make_profile(make_identity(head_dim=16, n_rot=16), bits=bits, n_fc=8)
    assert (profile.bytes_per_cell() == allocation.bytes_of(np.array(row))).all()


def brute_force(sizes: list[int], gains: Any, total: float) -> float:
    """The most mass of any choice that the budget allows."""
    return max(
        sum(gains[h][i] for h, i in enumerate(choice))
        for choice in product(range(len(sizes)), repeat=len(gains))
        if sum(sizes[i] for i in choice) <= total
    )


@given(st.integers(0, 10_000), st.integers(2, 6))
@settings(deadline=None, max_examples=100)
def test_spending_is_as_good_as_any_choice_but_for_one_step(seed: int, mean_bytes: int) -> None:
    """On the hulls greedy buying is optimal up to the step that no longer fits."""
    rng = np.random.default_rng(seed)
    sizes = [2, 3, 5, 8]
    gains = np.sort(rng.random((3, 4)), axis=1)
    chosen = allocation.spend(sizes, gains, mean_bytes)
    assert sum(sizes[i] for i in chosen) <= 3 * mean_bytes
    reached = sum(gains[h][i] for h, i in enumerate(chosen))
    steps = [
        gains[h, b] - gains[h, a]
        for h in range(3)
        for a, b in pairwise(allocation.hull(sizes, list(gains[h])))
    ]
    assert reached >= brute_force(sizes, gains, 3 * mean_bytes) - max(steps, default=0) - 1e-9


def test_bytes_go_to_the_head_that_gains() -> None:
    sizes = [2, 4, 8]
    gains = np.array([[0.5, 0.51, 0.52], [0.1, 0.5, 0.9]])
    assert allocation.spend(sizes, gains, 2) == [0, 0]
    assert allocation.spend(sizes, gains, 5) == [0, 2]
    assert allocation.spend(sizes, gains, 8) == [2, 2]
    with pytest.raises(
        ValueError, match=r"index_bytes is 1\.5, and the smallest index .* has 2 bytes"
    ):
        allocation.spend(sizes, gains, 1.5)


@given(st.lists(st.tuples(st.integers(1, 9), st.floats(0, 1, width=16)), min_size=1, max_size=9))
def test_a_hull_is_concave_and_above_all_points(points: list[tuple[int, float]]) -> None:
    sizes, gains = [p[0] for p in points], [p[1] for p in points]
    kept = allocation.hull(sizes, gains)
    xs, ys = [sizes[i] for i in kept], [gains[i] for i in kept]
    assert xs == sorted(set(xs))
    assert xs[0] == min(sizes)
    slopes = np.diff(ys) / np.diff(xs) if len(kept) > 1 else np.array([])
    assert (slopes > 0).all()
    assert (np.diff(slopes) <= 1e-9).all()
    for size, gain in points:
        assert gain <= np.interp(size, xs, ys) + 1e-6
