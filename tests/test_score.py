"""score: dot products of a query and every index row, hidden cells at -inf, peaks of a block.

The reference instruction set takes the query as it is. The fast kernels quantize it, each segment
by its own step s = peak / levels, with 127 levels on either side, 64 where index codes have 8 bits.
A kept dim k then adds an error of at most s/2 * |k|, on average s^2/12 * k^2 to its square. A
normal query's peak is 3.5 deviations, so

    NMSE ~ 3.5^2 / levels^2 / 12        6.3e-5 with 127 levels, 2.5e-4 with 64
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest

from pyfasa import native, reference
from test_index import Drawn, Head, every_head, every_isa, fresh_rng, guarded, ugly_keys

LEVELS = {1: 127, 2: 127, 4: 127, 8: 64}
# Twice the expected NMSE, for heads with few dims and for the draw.
MAX_NMSE_1_BIT = 1.3e-4
MAX_NMSE_2_BITS = 1.3e-4
MAX_NMSE_4_BITS = 1.3e-4
MAX_NMSE_8_BITS = 5e-4
MAX_NMSE = {
    1: MAX_NMSE_1_BIT, 2: MAX_NMSE_2_BITS, 4: MAX_NMSE_4_BITS, 8: MAX_NMSE_8_BITS, 0: MAX_NMSE_8_BITS
}  # fmt: skip
MAX_NMSE_REFERENCE = 1e-12  # doubles, rounded to float32 once
MIN_RECALL = 0.97  # an error of 1.6 % of the scores' spread swaps about 1 % of the best quarter


def nmse(actual: npt.NDArray[np.floating], expected: npt.NDArray[np.floating]) -> float:
    error = np.square(actual.astype(np.float64) - expected).sum()
    return float(error / np.square(expected.astype(np.float64)).sum())


def queries(rng: np.random.Generator, n: int, dim: int) -> native.F32:
    return (rng.normal(size=(n, dim)) * rng.uniform(0.1, 20, (n, 1))).astype(np.float32)


def words(seen: npt.NDArray[np.bool_]) -> native.U64:
    """Visible bits of cells (64 n_block,)."""
    return np.packbits(seen, bitorder="little").view(np.uint64)


def expected_scores(drawn: Drawn, index: native.U8, q: native.F32) -> npt.NDArray[np.float64]:
    """By the NumPy reference, from the codes and steps that lie in the index."""
    rows = drawn.unpacked(index)
    return np.array([reference.score(one, rows, drawn.scale) for one in q])


def bounds(drawn: Drawn, index: native.U8, q: native.F32) -> npt.NDArray[np.float64]:
    """The largest error that rounding the query can cause, and a little for float32."""
    total = np.zeros((len(q), 64 * len(index)))
    for row in drawn.unpacked(index):
        weighted = q.astype(np.float64) * (1 if drawn.scale is None else drawn.scale)
        peak = np.abs(weighted[:, row.dims]).max(axis=1)
        size = np.abs(row.values()).sum(axis=1)
        total += np.outer(peak * (0.5 / LEVELS[row.bits] + 1e-5), size)
    return total + 1e-6


def run(
    isa: int, drawn: Drawn, q: native.F32, index: native.U8, visible: native.U64,
    blocks: tuple[int, int] | None = None,
) -> tuple[native.F32, native.F32]:  # fmt: skip
    n_block = len(visible)
    scores, check_scores = guarded((len(q), 64 * n_block), np.float32)
    peaks, check_peaks = guarded((len(q), 8 * n_block), np.float32)
    native.score(isa, drawn.layout, q, index, visible, scores, peaks, blocks)
    check_scores()
    check_peaks()
    return scores, peaks


@every_isa
@every_head
@pytest.mark.parametrize("group", [1, 3, 7])
def test_scores_are_those_of_the_reference(isa: int, head: Head, group: int) -> None:
    rng = fresh_rng()
    drawn = head.draw(rng)
    index = drawn.written(ugly_keys(rng, 192, head.dim))
    q = queries(rng, group, head.dim)
    visible = np.full(3, 2**64 - 1, np.uint64)
    scores, _ = run(isa, drawn, q, index, visible)
    expected = expected_scores(drawn, index, q)
    if isa == native.ISA_REFERENCE:
        assert nmse(scores, expected) <= MAX_NMSE_REFERENCE
    else:
        assert (np.abs(scores - expected) <= bounds(drawn, index, q)).all()


@every_isa
@pytest.mark.parametrize("group", [1, 2, 3, 4, 5, 64])
@pytest.mark.parametrize("bits", [2, 4, 8, 0])
def test_error_stays_within_that_of_the_quantized_query(isa: int, bits: int, group: int) -> None:
    rng = fresh_rng()
    drawn = Head(128, 128, "neox", 24, bits).draw(rng)
    index = drawn.written(rng.normal(size=(1088, 128)).astype(np.float32))
    q = queries(rng, group, 128)
    scores, _ = run(isa, drawn, q, index, np.full(17, 2**64 - 1, np.uint64))
    for mine, theirs in zip(scores, expected_scores(drawn, index, q), strict=True):
        assert nmse(mine, theirs) <= MAX_NMSE[bits]


@every_isa
@pytest.mark.parametrize("n_kv", [1, 64, 113, 1025])
def test_hidden_cells_score_minus_infinity(isa: int, n_kv: int) -> None:
    """Cells past n_kv hold poison; hidden ones must not leak into scores or peaks."""
    rng = fresh_rng()
    drawn = Head(96, 64, "neox", 11, 0).draw(rng)
    keys = rng.normal(size=(n_kv, 96)).astype(np.float32)
    index = drawn.written(keys)
    seen = np.zeros(64 * len(index), bool)
    seen[:n_kv] = rng.random(n_kv) < 0.7
    scores, peaks = run(isa, drawn, queries(rng, 3, 96), index, words(seen))
    assert (scores[:, ~seen] == -np.inf).all()
    assert np.isfinite(scores[:, seen]).all()
    np.testing.assert_array_equal(peaks, scores.reshape(3, -1, 8, 8).max(axis=2).reshape(3, -1))


@every_isa
@pytest.mark.parametrize("word", [0, 1, 2**63, 2**31, 2**32, 0xAAAAAAAAAAAAAAAA, 2**64 - 1])
def test_every_word_of_visible_bits(isa: int, word: int) -> None:
    rng = fresh_rng()
    drawn = Head(64, 64, "norm", 8, 4).draw(rng)
    index = drawn.written(rng.normal(size=(64, 64)).astype(np.float32))
    scores, peaks = run(isa, drawn, queries(rng, 5, 64), index, np.array([word], np.uint64))
    seen = np.array([word >> c & 1 for c in range(64)], bool)
    np.testing.assert_array_equal(np.isfinite(scores), np.broadcast_to(seen, (5, 64)))
    np.testing.assert_array_equal(peaks, scores.reshape(5, 8, 8).max(axis=1))


@every_isa
@pytest.mark.parametrize("blocks", [(0, 1), (2, 5), (4, 5), (3, 3), (0, 5)])
def test_other_blocks_are_left_alone(isa: int, blocks: tuple[int, int]) -> None:
    rng = fresh_rng()
    drawn = Head(64, 64, "norm", 9, 0).draw(rng)
    index = drawn.written(rng.normal(size=(320, 64)).astype(np.float32))
    q = queries(rng, 6, 64)
    visible = np.full(5, 2**64 - 1, np.uint64)
    whole, whole_peaks = run(isa, drawn, q, index, visible)
    part, part_peaks = run(isa, drawn, q, index, visible, blocks)
    mine = np.zeros(5, bool)
    mine[slice(*blocks)] = True
    for a, b in ((whole, part), (whole_peaks, part_peaks)):
        a, b = a.reshape(6, 5, -1), b.reshape(6, 5, -1)
        np.testing.assert_array_equal(a[:, mine], b[:, mine])
        assert (np.ascontiguousarray(b[:, ~mine]).view(np.uint8) == 0xAA).all()


@every_isa
@pytest.mark.parametrize("bits", [2, 4, 8, 0])
def test_ranking_is_that_of_the_unrounded_query(isa: int, bits: int) -> None:
    """Share of the 256 best cells, by score, so that ties do not count as misses."""
    rng = fresh_rng()
    drawn = Head(128, 128, "norm", 16, bits).draw(rng)
    index = drawn.written(rng.normal(size=(1024, 128)).astype(np.float32))
    q = queries(rng, 4, 128)
    scores, _ = run(isa, drawn, q, index, np.full(16, 2**64 - 1, np.uint64))
    for mine, theirs in zip(scores, expected_scores(drawn, index, q), strict=True):
        limit = np.sort(theirs)[-256]
        recalled = theirs[np.argsort(-mine)[:256]] >= limit - 1e-6 * np.abs(limit)
        assert recalled.mean() >= MIN_RECALL


@every_isa
def test_permuting_cells_permutes_scores(isa: int) -> None:
    rng = fresh_rng()
    drawn = Head(64, 64, "neox", 13, 0).draw(rng)
    keys = rng.normal(size=(192, 64)).astype(np.float32)
    order = rng.permutation(192)
    q = queries(rng, 3, 64)
    visible = np.full(3, 2**64 - 1, np.uint64)
    plain, _ = run(isa, drawn, q, drawn.written(keys), visible)
    permuted, _ = run(isa, drawn, q, drawn.written(keys[order]), visible)
    np.testing.assert_array_equal(permuted, plain[:, order])


@every_isa
def test_queries_of_a_group_do_not_mix(isa: int) -> None:
    """Each query alone scores as it does in the group."""
    rng = fresh_rng()
    drawn = Head(128, 128, "norm", 33, 0).draw(rng)
    index = drawn.written(rng.normal(size=(128, 128)).astype(np.float32))
    q = queries(rng, 7, 128)
    visible = np.full(2, 2**64 - 1, np.uint64)
    together, _ = run(isa, drawn, q, index, visible)
    for one, scores in zip(q, together, strict=True):
        alone, _ = run(isa, drawn, one[None], index, visible)
        np.testing.assert_array_equal(alone[0], scores)


@every_isa
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_largest_codes_do_not_overflow(isa: int, bits: int) -> None:
    """Products at their limit, of one sign: the 16-bit sums of AVX2 come closest to wrapping."""
    head = Head(256, 256, "norm", 128, bits)
    drawn = head.draw(fresh_rng())
    q = np.ones((2, 256), np.float32) * np.array([[1], [-1]], np.float32)
    for sign in (1, -1):
        keys = np.full((64, 256), sign, np.float32)
        index = drawn.written(keys)
        scores, _ = run(isa, drawn, q, index, np.full(1, 2**64 - 1, np.uint64))
        np.testing.assert_allclose(scores, expected_scores(drawn, index, q), rtol=1e-5)


@every_isa
def test_a_zero_query_scores_zero(isa: int) -> None:
    rng = fresh_rng()
    drawn = Head(64, 64, "norm", 9, 0).draw(rng)
    index = drawn.written(rng.normal(size=(64, 64)).astype(np.float32))
    scores, _ = run(
        isa, drawn, np.zeros((1, 64), np.float32), index, np.full(1, 2**64 - 1, np.uint64)
    )
    assert not scores.any()


@every_isa
@pytest.mark.parametrize("value", [np.nan, np.inf, 1e-42, 3e38])
def test_queries_that_are_no_numbers_do_no_harm(isa: int, value: float) -> None:
    rng = fresh_rng()
    drawn = Head(64, 64, "norm", 9, 0).draw(rng)
    index = drawn.written(rng.normal(size=(64, 64)).astype(np.float32))
    q = queries(rng, 3, 64)
    clean, _ = run(isa, drawn, q, index, np.full(1, 2**32 - 1, np.uint64))
    q[1] = value
    scores, _ = run(isa, drawn, q, index, np.full(1, 2**32 - 1, np.uint64))
    assert (scores[:, 32:] == -np.inf).all()
    np.testing.assert_array_equal(scores[[0, 2]], clean[[0, 2]])
