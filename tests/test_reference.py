"""The method in NumPy against what it stands for: softmax attention, written out once more."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyfasa import reference
from pyfasa.reference import F64

ROPES = [(64, 64, "norm"), (64, 64, "neox"), (64, 32, "norm"), (64, 16, "neox"), (96, 96, "neox")]


def dense(q: F64, keys: F64, values: F64, scale: float) -> F64:
    logits = keys @ q * scale
    weights = np.exp(logits - logits.max())
    result: F64 = weights @ values / weights.sum()
    return result


def mass(q: F64, keys: F64, scale: float) -> F64:
    return dense(q, keys, np.eye(len(keys)), scale)


@pytest.fixture
def data() -> tuple[F64, F64, F64]:
    """q (64,), keys (200, 64), values (200, 48) in float32 steps; peaked attention."""
    rng = np.random.default_rng(0)
    q = rng.normal(size=64) * 2
    keys, values = rng.normal(size=(200, 64)) * np.linspace(0.2, 2, 64), rng.normal(size=(200, 48))
    return tuple(a.astype(np.float32).astype(np.float64) for a in (q, keys, values))  # type: ignore[return-value]


def sparse(
    data: tuple[F64, F64, F64], n_fc: int, bits: int, budget: int
) -> tuple[F64, reference.Ints]:
    q, keys, values = data
    dims = reference.chunk_dims(64, 64, "norm")
    chunks, widths = np.arange(n_fc, dtype=np.uint16), np.full(n_fc, bits, np.uint8)
    rows = reference.index_rows(keys.astype(np.float32), dims, chunks, widths)
    cells = reference.select(reference.score(q.astype(np.float32), rows), budget)
    return reference.attend(q.astype(np.float32), keys, values, cells, 1 / 8), cells


# ---- chunks --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("head_dim", "n_rot", "rope"), ROPES)
def test_chunks_cover_every_dim_once(head_dim: int, n_rot: int, rope: str) -> None:
    dims = reference.chunk_dims(head_dim, n_rot, rope)
    assert dims.shape == (head_dim // 2, 2)
    assert sorted(dims.reshape(-1)) == list(range(head_dim))


@pytest.mark.parametrize(("head_dim", "n_rot", "rope"), ROPES)
def test_chunks_are_what_rope_rotates_together(head_dim: int, n_rot: int, rope: str) -> None:
    """Rotating by a position keeps the length of every chunk, and what is not rotated as it is."""
    rng = np.random.default_rng(1)
    x = rng.normal(size=head_dim)
    turned = x.copy()
    for i in range(n_rot // 2):
        a, b = (2 * i, 2 * i + 1) if rope == "norm" else (i, i + n_rot // 2)
        angle = 7 * 10000.0 ** (-2 * i / n_rot)
        turned[a] = x[a] * np.cos(angle) - x[b] * np.sin(angle)
        turned[b] = x[a] * np.sin(angle) + x[b] * np.cos(angle)
    dims = reference.chunk_dims(head_dim, n_rot, rope)
    assert np.allclose(np.linalg.norm(turned[dims], axis=1), np.linalg.norm(x[dims], axis=1))
    assert np.array_equal(turned[dims[n_rot // 2 :]], x[dims[n_rot // 2 :]])


@pytest.mark.parametrize(("head_dim", "n_rot", "rope"), ROPES)
def test_contributions_sum_to_the_product(head_dim: int, n_rot: int, rope: str) -> None:
    rng = np.random.default_rng(2)
    q, keys = rng.normal(size=head_dim), rng.normal(size=(50, head_dim))
    parts = reference.contributions(q, keys, reference.chunk_dims(head_dim, n_rot, rope))
    assert parts.shape == (50, head_dim // 2)
    assert np.allclose(parts.sum(axis=1), keys @ q)


def test_agreement_of_one_deciding_chunk() -> None:
    """A chunk that is the whole score agrees fully; one that turns it around, not at all."""
    rng = np.random.default_rng(3)
    decides = rng.normal(size=100) * 10
    parts = np.stack([decides, -decides / 100, np.zeros(100)], axis=1)
    found = reference.agreement(parts, 50)
    assert found[:2].tolist() == [1.0, 0.0]
    assert reference.agreement(parts, 1000).tolist() == [1.0, 1.0, 1.0]  # fewer cells than top


# ---- the index -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("bits", "worst"), [(8, 4.5e-5), (4, 1.1e-2), (2, 0.17), (1, 0.8)])
def test_quantization_error(bits: int, worst: float) -> None:
    rng = np.random.default_rng(4)
    x = rng.normal(size=(300, 32)).astype(np.float32)
    row = reference.quantize(x, np.arange(32), bits)
    assert row.codes.max() < 2**bits
    assert np.square(row.values() - x).sum() / np.square(x).sum() < worst


def test_a_row_of_zeros_is_next_to_nothing() -> None:
    """Half of the least step: no level is 0."""
    for bits in (1, 2, 4, 8):
        row = reference.quantize(np.zeros((3, 8), np.float32), np.arange(8), bits)
        assert (np.abs(row.values()) == 2.0**-9).all()


def test_steps_have_four_mantissa_bits() -> None:
    steps = reference.round_steps(np.array([0, 1e-9, 1, 1.03, 1.04, 3, 247, 1e9], np.float32))
    assert steps.tolist() == [2.0**-8, 2.0**-8, 1, 1, 1.0625, 3, 248, 248]
    up = reference.round_steps(np.array([0, 1, 1.001, 3.1], np.float32), up=True)
    assert up.tolist() == [2.0**-8, 1, 1.0625, 3.125]


def test_all_chunks_at_8_bits_rank_like_the_exact_scores(data: tuple[F64, F64, F64]) -> None:
    q, keys, _ = data
    dims = reference.chunk_dims(64, 64, "norm")
    rows = reference.index_rows(
        keys.astype(np.float32), dims, np.arange(32, dtype=np.uint16), np.full(32, 8, np.uint8)
    )
    scores, exact = reference.score(q.astype(np.float32), rows), keys @ q
    assert np.corrcoef(scores, exact)[0, 1] > 0.9999
    for budget in (10, 50, 150):
        found, best = reference.select(scores, budget), reference.select(exact, budget)
        # Cells may only change places where the scores nearly tie.
        edge = np.sort(exact)[-budget]
        changed = np.setxor1d(found, best)
        assert (np.abs(exact[changed] - edge) < 0.02 * exact.std()).all()
        assert len(changed) <= 4


def test_center_and_scale_change_no_ranking_at_8_bits(data: tuple[F64, F64, F64]) -> None:
    q, keys, _ = data
    x, q32 = keys.astype(np.float32) + np.float32(3), q.astype(np.float32)
    center, scale = x.mean(axis=0), x.std(axis=0)
    rows = reference.index_rows(
        x, reference.chunk_dims(64, 64, "norm"), np.arange(32, dtype=np.uint16),
        np.full(32, 8, np.uint8), center, scale,
    )  # fmt: skip
    scores = reference.score(q32, rows, scale)
    exact = x.astype(np.float64) @ q
    assert np.corrcoef(scores, exact)[0, 1] > 0.9999
    assert np.allclose(scores - scores.mean(), exact - exact.mean(), atol=0.02 * exact.std())


def test_mixed_bits_keep_their_chunks(data: tuple[F64, F64, F64]) -> None:
    _, keys, _ = data
    dims = reference.chunk_dims(64, 64, "neox")
    chunks = np.array([5, 30, 0, 9], np.uint16)
    rows = reference.index_rows(
        keys.astype(np.float32), dims, chunks, np.array([8, 8, 4, 2], np.uint8)
    )
    assert [(row.bits, row.dims.tolist()) for row in rows] == [
        (8, [5, 37, 30, 62]),
        (4, [0, 32]),
        (2, [9, 41]),
    ]


# ---- select --------------------------------------------------------------------------------------


@given(
    st.lists(st.integers(-4, 4) | st.just(None), max_size=80),
    st.integers(1, 100),
)
def test_select_has_the_threshold_property(values: list[int | None], budget: int) -> None:
    scores = np.array([-np.inf if v is None else v for v in values], np.float64)
    cells = reference.select(scores, budget)
    visible = np.flatnonzero(scores > -np.inf)
    assert cells.tolist() == sorted(set(cells.tolist()))
    assert len(cells) == min(budget, len(visible))
    left_out = np.setdiff1d(visible, cells)
    assert np.isin(cells, visible).all()
    if len(left_out) and len(cells):
        assert scores[cells].min() >= scores[left_out].max()
        tied = scores[cells] == scores[left_out].max()
        last_tied = cells[tied].max(initial=-1)
        same = left_out[scores[left_out] == scores[left_out].max()]
        assert not len(cells[tied]) or last_tied < same.min()  # ties: lower cells first


def test_permuting_the_cells_permutes_only_indices(data: tuple[F64, F64, F64]) -> None:
    q, keys, values = data
    order = np.random.default_rng(5).permutation(len(keys))
    out, cells = sparse(data, 16, 4, 40)
    permuted_out, permuted_cells = sparse((q, keys[order], values[order]), 16, 4, 40)
    assert sorted(order[permuted_cells]) == cells.tolist()
    assert np.allclose(permuted_out, out, rtol=1e-12)


# ---- attend --------------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", [200, 201, 10_000])
@pytest.mark.parametrize(("n_fc", "bits"), [(1, 2), (16, 4), (32, 8)])
def test_a_budget_for_all_cells_is_dense(
    data: tuple[F64, F64, F64], n_fc: int, bits: int, budget: int
) -> None:
    out, cells = sparse(data, n_fc, bits, budget)
    assert cells.tolist() == list(range(200))
    assert np.allclose(out, dense(*data, 1 / 8), rtol=1e-12)


def test_the_result_is_in_the_convex_hull(data: tuple[F64, F64, F64]) -> None:
    """A weighted mean: never outside the values attended, and exact for a constant."""
    out, cells = sparse(data, 16, 4, 30)
    chosen = data[2][cells]
    assert (out <= chosen.max(axis=0) + 1e-12).all()
    assert (out >= chosen.min(axis=0) - 1e-12).all()
    constant, _ = sparse((data[0], data[1], np.full((200, 48), 2.5)), 16, 4, 30)
    assert np.allclose(constant, 2.5)


@given(st.integers(0, 1000), st.sampled_from([2, 4, 8]), st.integers(1, 32))
def test_a_growing_budget_never_recalls_less(seed: int, bits: int, n_fc: int) -> None:
    rng = np.random.default_rng(seed)
    q, keys = rng.normal(size=64) * 2, rng.normal(size=(90, 64))
    weights = mass(q, keys, 1 / 8)
    recalled = []
    for budget in (1, 5, 20, 60, 90):
        _, cells = sparse((q, keys, keys), n_fc, bits, budget)
        recalled.append(weights[cells].sum())
    assert all(a <= b + 1e-12 for a, b in pairwise(recalled))
    assert recalled[-1] == pytest.approx(1)


def test_more_bits_and_chunks_recall_more_on_average() -> None:
    rng = np.random.default_rng(6)
    totals = dict.fromkeys([(4, 2), (16, 2), (16, 4), (32, 8)], 0.0)
    for _ in range(40):
        q, keys = rng.normal(size=64) * 3, rng.normal(size=(200, 64))
        weights = mass(q, keys, 1 / 8)
        for n_fc, bits in totals:
            totals[n_fc, bits] += weights[sparse((q, keys, keys), n_fc, bits, 20)[1]].sum() / 40
    ordered = list(totals.values())
    assert ordered == sorted(ordered)
    assert ordered[-1] > ordered[0] + 0.1


def test_large_scores_do_not_overflow(data: tuple[F64, F64, F64]) -> None:
    q, keys, values = data
    cells = np.arange(200)
    out = reference.attend((q * 1000).astype(np.float32), keys, values, cells, 1.0)
    assert np.allclose(out, values[np.argmax(keys @ q)])


def test_softcap_mask_and_sink() -> None:
    q = np.array([1.0, 0.0], np.float32)
    keys = np.array([[3.0, 0.0], [1.0, 5.0], [9.0, 0.0]])
    values = np.array([[1.0], [10.0], [100.0]])
    cells, mask = np.arange(3), np.array([0.0, -1.0, -np.inf])
    found = reference.attend(q, keys, values, cells, 0.5, softcap=2.0, mask=mask, sink=0.25)
    logits = 2 * np.tanh(np.array([1.5, 0.5]) / 2) + mask[:2]
    weights = np.exp(logits) / (np.exp(logits).sum() + np.exp(0.25))
    assert np.allclose(found, weights @ [1.0, 10.0])
