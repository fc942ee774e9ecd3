"""index: codes and steps of a key are those of the NumPy reference; nothing beside them changes."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from pyfasa import native, reference

POISON = 0xAA
GUARD = 256  # poisoned bytes before and after an array
# Rows that the compiled core must survive and, where finite, describe as well as ordinary ones.
UGLY_ROWS = ("zeros", "outlier", "denormal", "negative", "constant", "large")


def fresh_rng() -> np.random.Generator:
    """New values each run; the seed is printed, and PYFASA_TEST_SEED repeats a run that failed."""
    seed = int(os.environ.get("PYFASA_TEST_SEED", "") or int.from_bytes(os.urandom(4), "little"))
    print(f"PYFASA_TEST_SEED={seed}")
    return np.random.default_rng(seed)


def _isa(isa: int) -> Any:
    missing = f"this CPU or build has no {native.isa_name(isa)}"
    mark = pytest.mark.skipif(not native.isa_usable(isa), reason=missing)
    return pytest.param(isa, id=native.isa_name(isa).replace(" ", "-"), marks=mark)


every_isa = pytest.mark.parametrize("isa", [_isa(i) for i in native.isas()])


def guarded(shape: tuple[int, ...], dtype: Any) -> tuple[npt.NDArray[Any], Callable[[], None]]:
    """A poisoned array between poisoned guards, and a check that the guards are intact."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    memory = np.full(size + 2 * GUARD, POISON, np.uint8)

    def check() -> None:
        assert (memory[:GUARD] == POISON).all(), "bytes before the array were written"
        assert (memory[GUARD + size :] == POISON).all(), "bytes after the array were written"

    return memory[GUARD : GUARD + size].view(dtype).reshape(shape), check


def step_values(codes: native.U8) -> native.F32:
    """A step is a byte of 4 exponent and 4 mantissa bits; the exponent begins at 2^-8."""
    exponent, mantissa = codes.astype(int) >> 4, codes & 15
    return np.ldexp(1 + mantissa / 16, exponent - 8).astype(np.float32)


@dataclass(frozen=True)
class Head:
    """What one KV head keeps; `bits` 0 stands for a mix of 1, 2, 4 and 8."""

    dim: int
    n_rot: int
    rope: str
    n_fc: int
    bits: int
    channels: bool = False  # with center and scale

    def __str__(self) -> str:
        width = f"{self.bits}bit" if self.bits else "mixed"
        extra = "-channels" if self.channels else ""
        return f"{self.dim}d-rot{self.n_rot}-{self.rope}-{self.n_fc}fc-{width}{extra}"

    def draw(self, rng: np.random.Generator) -> Drawn:
        chunks = rng.permutation(self.dim // 2)[: self.n_fc].astype(np.uint16)
        bits = np.full(self.n_fc, self.bits, np.uint8)
        if not self.bits:
            bits = rng.choice(np.array([1, 2, 4, 8], np.uint8), self.n_fc)
        center = scale = None
        if self.channels:
            center = rng.normal(0, 3, self.dim).astype(np.float32)
            scale = rng.uniform(0.1, 10, self.dim).astype(np.float32)
        layout = native.Layout(self.dim, self.n_rot, self.rope, chunks, bits, center, scale)
        return Drawn(self, layout, chunks, bits, center, scale)


@dataclass(frozen=True)
class Drawn:
    """A head with its chunks chosen."""

    head: Head
    layout: native.Layout
    chunks: native.U16
    bits: native.U8
    center: native.F32 | None
    scale: native.F32 | None

    def rows(self, keys: native.F32) -> list[reference.Row]:
        """The side index by the NumPy reference."""
        dims = reference.chunk_dims(self.head.dim, self.head.n_rot, self.head.rope)
        with np.errstate(over="ignore"):  # 1 / step of denormal rows
            return reference.index_rows(keys, dims, self.chunks, self.bits, self.center, self.scale)

    def channels(self, keys: native.F32, dims: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
        """What is quantized: the kept dims, centered and scaled in float32 like both sides do."""
        x = keys if self.center is None else keys - self.center
        x = x if self.scale is None else x / self.scale
        return x[:, dims].astype(np.float64)

    def written(self, keys: native.F32) -> native.U8:
        """A native index of all keys."""
        n_block = -(-len(keys) // native.BLOCK_CELLS)
        index = np.full((n_block, self.layout.block_bytes), POISON, np.uint8)
        native.index_write(self.layout, keys, np.arange(len(keys)), index)
        return index

    def unpacked(self, index: native.U8) -> list[reference.Row]:
        """Codes and steps as they lie in the index, in the layout of native/layout.h."""
        n_block = len(index)
        rows, offset = [], 0
        for expected in self.rows(np.zeros((1, self.head.dim), np.float32)):
            bits, n_used = expected.bits, len(expected.dims)
            unit = 8 if bits == 1 else 4  # with 1 bit two quads share their bytes
            n_quad = -(-n_used // unit) * unit // 4
            steps = step_values(index[:, offset : offset + 64]).reshape(-1)
            offset += 64
            size = n_quad * 32 * bits
            raw = index[:, offset : offset + size].reshape(n_block, -1, max(bits // 2, 1), 1, 16, 4)
            offset += size
            shifts = np.arange(0, 8, bits, dtype=np.uint8).reshape(1, 1, 1, -1, 1, 1)
            fields = raw >> shifts & np.uint8(2**bits - 1)
            cells_first = fields.reshape(n_block, n_quad, 64, 4).transpose(0, 2, 1, 3)
            codes = cells_first.reshape(n_block * 64, n_quad * 4)
            rows.append(reference.Row(expected.dims, bits, codes[:, :n_used], steps))
        assert offset == index.shape[1]
        return rows


HEADS = [
    Head(128, 128, "norm", 16, 4),
    Head(128, 64, "neox", 17, 0, channels=True),
    Head(128, 128, "neox", 64, 0),
    Head(64, 64, "neox", 11, 2),
    Head(64, 32, "norm", 32, 8, channels=True),
    Head(96, 96, "norm", 7, 8),
    Head(96, 64, "neox", 24, 2, channels=True),
    Head(80, 40, "neox", 13, 0, channels=True),
    Head(256, 256, "neox", 128, 0),
    Head(256, 128, "norm", 128, 2),
    Head(256, 64, "neox", 128, 8, channels=True),
    Head(128, 128, "norm", 20, 1),
    Head(96, 64, "neox", 13, 1, channels=True),
    Head(256, 256, "neox", 128, 1),
    Head(32, 32, "norm", 1, 4),
    Head(6, 4, "neox", 3, 0),
    Head(2, 2, "norm", 1, 8),
]  # fmt: skip
every_head = pytest.mark.parametrize("head", HEADS, ids=str)


def ugly_keys(rng: np.random.Generator, n: int, dim: int) -> native.F32:
    """Gaussian keys with one row of each ugly kind among the first ones."""
    keys = rng.normal(0, 1, (n, dim)) * rng.uniform(0.1, 30, (n, 1))
    for row, kind in zip(range(n), UGLY_ROWS, strict=False):
        if kind == "zeros":
            keys[row] = 0
        elif kind == "outlier":
            keys[row, rng.integers(dim)] = 1e4
        elif kind == "denormal":
            keys[row] *= 1e-40
        elif kind == "negative":
            keys[row] = -np.abs(keys[row])
        elif kind == "constant":
            keys[row] = 3.25
        else:
            keys[row] *= 100
    return keys.astype(np.float32)


def first_step(x: npt.NDArray[np.float64], bits: int) -> npt.NDArray[np.float64]:
    """Step from which codes are rounded, before that of 1 and 2 bits is refined."""
    if bits <= 2:
        return reference.GAUSS_STEP_2_BITS * np.sqrt(np.mean(np.square(x), axis=1))
    peak = np.max(np.abs(x), axis=1) / ((2**bits - 1) / 2)
    return reference.round_steps(peak.astype(np.float32), up=True).astype(np.float64)


@every_head
@pytest.mark.parametrize("n", [113, 64, 1])
def test_codes_are_those_of_the_reference(head: Head, n: int) -> None:
    """Bit-exact; a level that lies on a rounding boundary, within float32, may go either way."""
    rng = fresh_rng()
    drawn = head.draw(rng)
    keys = ugly_keys(rng, n, head.dim)
    for mine, theirs in zip(drawn.unpacked(drawn.written(keys)), drawn.rows(keys), strict=True):
        x = drawn.channels(keys, mine.dims)
        step = first_step(x, mine.bits)
        # Below the normal numbers 1 / step has no full precision, and codes are free.
        normal = (step > 1e-36) | (step == 0)
        level = np.divide(x, step[:, None], out=np.zeros_like(x), where=step[:, None] > 0)
        level += (2**mine.bits - 1) / 2
        boundary = np.abs(level - np.floor(level) - 0.5) < 1e-4
        distance = np.abs(mine.codes[:n].astype(int) - theirs.codes.astype(int))
        assert distance[normal].max(initial=0) <= 1
        assert not distance[normal][~boundary[normal] | (step == 0)[normal, None]].any()


@every_head
def test_step_keeps_the_projection_on_the_key(head: Head) -> None:
    """1 and 2 bits: sum(x x) / sum(x level), within half a unit of four mantissa bits.

    4 and 8 bits: within a unit of what reaches the largest value.
    """
    rng = fresh_rng()
    drawn = head.draw(rng)
    keys = ugly_keys(rng, 113, head.dim)
    for row in drawn.unpacked(drawn.written(keys)):
        x = drawn.channels(keys, row.dims)
        levels = row.codes[: len(keys)] - (2**row.bits - 1) / 2
        along, square = (x * levels).sum(axis=1), np.square(x).sum(axis=1)
        fit = np.clip(np.divide(square, along, out=0 * along, where=along > 0), 2.0**-8, 248)
        steps = row.steps[: len(keys)]
        if row.bits <= 2:
            np.testing.assert_array_less(np.abs(steps / fit - 1), 2.0**-5 + 1e-4)
        else:
            np.testing.assert_allclose(steps, first_step(x, row.bits), rtol=1 / 16 + 1e-6)


@pytest.mark.parametrize(("bits", "max_nmse"), [(1, 0.7), (2, 0.16), (4, 0.026), (8, 1.1e-4)])
def test_quantization_error_of_gaussian_keys(bits: int, max_nmse: float) -> None:
    """1 and 2 bits: e / (1 - e) of Max 1960's e = 0.3634, 0.1188, for steps that keep the projection.

    Others: step^2 / 12 for a peak of 3.5 deviations, doubled.
    """
    rng = fresh_rng()
    drawn = Head(128, 128, "norm", 32, bits).draw(rng)
    keys = rng.normal(size=(640, 128)).astype(np.float32)
    (row,) = drawn.unpacked(drawn.written(keys))
    x = drawn.channels(keys, row.dims)
    assert np.square(row.values() - x).sum() / np.square(x).sum() <= max_nmse


@every_head
def test_writing_one_cell_leaves_its_neighbours(head: Head) -> None:
    rng = fresh_rng()
    drawn = head.draw(rng)
    index, check = guarded((3, drawn.layout.block_bytes), np.uint8)
    before = index.copy()
    for cell in (0, 63, 64, 100, 191):
        index[:] = before
        key = rng.normal(size=(1, head.dim)).astype(np.float32)
        native.index_write(drawn.layout, key, np.array([cell]), index)
        others = np.arange(192) != cell
        was, now = drawn.unpacked(before), drawn.unpacked(index)
        for a, b in zip(was, now, strict=True):
            np.testing.assert_array_equal(a.codes[others], b.codes[others])
            # bytes, since poison is no number
            np.testing.assert_array_equal(
                a.steps[others].view(np.uint32), b.steps[others].view(np.uint32)
            )
        alone = drawn.unpacked(drawn.written(np.repeat(key, 192, axis=0)))
        for a, b in zip(alone, now, strict=True):
            np.testing.assert_array_equal(a.codes[cell], b.codes[cell])
            assert a.steps[cell] == b.steps[cell]
    check()


@every_head
def test_order_of_writing_does_not_matter(head: Head) -> None:
    rng = fresh_rng()
    drawn = head.draw(rng)
    keys = ugly_keys(rng, 113, head.dim)
    order = rng.permutation(113)
    shuffled = np.full((2, drawn.layout.block_bytes), POISON, np.uint8)
    native.index_write(drawn.layout, keys[order], order, shuffled)
    np.testing.assert_array_equal(shuffled, drawn.written(keys))


def test_last_write_of_a_cell_wins() -> None:
    rng = fresh_rng()
    drawn = Head(64, 64, "norm", 9, 0).draw(rng)
    keys = rng.normal(size=(2, 64)).astype(np.float32)
    twice, once = drawn.written(keys[:1]), drawn.written(keys[1:])
    native.index_write(drawn.layout, keys, np.zeros(2, np.int64), twice)
    np.testing.assert_array_equal(twice, once)


@every_head
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 3e38, -3e38])
def test_rows_that_are_no_numbers_do_no_harm(head: Head, value: float) -> None:
    """Such a row gets some codes and a step that is a number; the cells beside it keep theirs."""
    rng = fresh_rng()
    drawn = head.draw(rng)
    clean = rng.normal(size=(64, head.dim)).astype(np.float32)
    keys = clean.copy()
    keys[7] = value
    keys[9, rng.integers(head.dim)] = value
    others = np.setdiff1d(np.arange(64), [7, 9])
    pairs = zip(
        drawn.unpacked(drawn.written(keys)), drawn.unpacked(drawn.written(clean)), strict=True
    )
    for dirty, expected in pairs:
        np.testing.assert_array_equal(dirty.codes[others], expected.codes[others])
        np.testing.assert_array_equal(dirty.steps[others], expected.steps[others])
        assert np.isfinite(dirty.steps).all()
        assert (dirty.steps >= 0).all()


def test_step_beyond_its_range_is_capped() -> None:
    drawn = Head(32, 32, "norm", 16, 4).draw(fresh_rng())
    keys = np.full((1, 32), 1e30, np.float32)
    (row,) = drawn.unpacked(drawn.written(keys))
    assert row.steps[0] == 248
    assert (row.codes[0] == 15).all()


def test_padding_of_an_odd_number_of_chunks_is_zero() -> None:
    rng = fresh_rng()
    drawn = Head(64, 64, "norm", 5, 4).draw(rng)
    index = drawn.written(rng.normal(size=(64, 64)).astype(np.float32))
    quads = index[0, 64:].reshape(3, 2, 16, 4)  # quad, half, cell, lane
    assert not quads[2, :, :, 2:].any()
    assert quads[2, :, :, :2].any()


def test_no_cells_write_nothing() -> None:
    drawn = Head(64, 64, "norm", 5, 4).draw(fresh_rng())
    index = np.full((1, drawn.layout.block_bytes), POISON, np.uint8)
    native.index_write(drawn.layout, np.empty((0, 64), np.float32), np.empty(0, np.int64), index)
    assert (index == POISON).all()
