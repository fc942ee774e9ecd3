"""attend: exact softmax attention over given cells, against float64.

A result may be twice as far from float64 as plain float32 NumPy is, or within an NMSE that float32
reaches easily: logits of ordinary size err by 1e-6, weights as much relative to themselves.
"""

from __future__ import annotations

from dataclasses import replace

import gguf
import numpy as np
import numpy.typing as npt
import pytest

from pyfasa import native, reference
from test_index import every_isa, fresh_rng

MAX_NMSE = 1e-9
F16, Q8_0, IQ4_NL = (native.KV_TYPES[name] for name in ("f16", "q8_0", "iq4_nl"))
F64 = npt.NDArray[np.float64]

every_pair = pytest.mark.parametrize(
    ("k_type", "v_type"),
    [
        pytest.param(k, v, id=f"{n}-{m}")
        for n, k in native.KV_TYPES.items()
        for m, v in native.KV_TYPES.items()
    ],
)
# Each type once as K and once as V.
every_type = pytest.mark.parametrize(
    ("k_type", "v_type"),
    [
        pytest.param(k, v, id=f"{n}-{m}")
        for (n, k), (m, v) in zip(
            native.KV_TYPES.items(),
            [*list(native.KV_TYPES.items())[3:], *list(native.KV_TYPES.items())[:3]],
            strict=True,
        )
    ],
)


def stored(x: native.F32, kind: int, padding: int) -> tuple[native.U8, F64]:
    """Rows of a cache with `padding` bytes between cells, and the values that they stand for, as gguf reads them."""
    if kind == IQ4_NL:  # gguf reads this type but does not write it: any bytes will do
        n_block = x.size // 32
        blocks = np.random.default_rng(abs(int(x.flat[0] * 1e6))).integers(
            0, 256, (n_block, 18), np.uint8
        )
        steps = np.abs(x).reshape(n_block, 32).max(axis=1, keepdims=True) / 127
        blocks[:, :2] = steps.astype(np.float16).view(np.uint8)
        rows = blocks.reshape(len(x), -1)
    else:
        rows = np.ascontiguousarray(gguf.quants.quantize(x, gguf.GGMLQuantizationType(kind))).view(
            np.uint8
        )
    values = gguf.quants.dequantize(rows, gguf.GGMLQuantizationType(kind)).astype(np.float64)
    spaced = np.full((len(x), rows.shape[1] + padding), 0xAA, np.uint8)
    spaced[:, : rows.shape[1]] = rows
    return spaced, values


def make(
    rng: np.random.Generator, n_kv: int = 1025, k_type: int = F16, v_type: int = F16,
    k_dim: int = 128, v_dim: int = 128, padding: int = 68, spread: float = 1.0,
) -> tuple[native.KV, native.F32, F64, F64]:  # fmt: skip
    """A cache, a query, and the cache's keys and values as numbers."""
    k, keys = stored(rng.normal(0, spread, (n_kv, k_dim)).astype(np.float32), k_type, padding)
    v, values = stored(rng.normal(0, 1, (n_kv, v_dim)).astype(np.float32), v_type, padding)
    q = rng.normal(size=k_dim).astype(np.float32)
    kv = native.KV(k, v, k_type, v_type, k_dim, v_dim, scale=float(np.float32(k_dim**-0.5)))
    return kv, q, keys, values


def logits_of(kv: native.KV, q: native.F32, keys: F64, cells: native.I32, dtype: type) -> F64:
    logits = keys[cells].astype(dtype) @ q.astype(dtype) * dtype(kv.scale)
    if kv.softcap:
        logits = dtype(kv.softcap) * np.tanh(logits / dtype(kv.softcap))
    return logits if kv.mask is None else logits + kv.mask[cells].astype(dtype)


def naive(
    kv: native.KV, q: native.F32, keys: F64, values: F64, cells: native.I32
) -> npt.NDArray[np.float32]:
    """Attention in float32, as one would write it."""
    logits = logits_of(kv, q, keys, cells, np.float32)
    weights = np.exp(logits - logits.max())
    return weights @ values[cells].astype(np.float32) / weights.sum()


def check(
    isa: int, kv: native.KV, q: native.F32, keys: F64, values: F64, cells: native.I32
) -> tuple[float, float, F64]:
    m, d, o = native.attend(isa, kv, q, cells)
    actual = o.astype(np.float64) / d
    expected = reference.attend(q, keys, values, cells, kv.scale, kv.softcap, kv.mask)
    error = np.square(actual - expected).sum()
    plain = np.square(naive(kv, q, keys, values, cells) - expected).sum()
    assert error <= max(4 * plain, MAX_NMSE * np.square(expected).sum())
    logits = logits_of(kv, q, keys, cells, np.float64)
    assert m == pytest.approx(logits.max(), rel=1e-5, abs=1e-5)
    assert d == pytest.approx(np.exp(logits - m).sum(), rel=2e-4)
    slack = 1e-5 * np.abs(values[cells]).max()
    assert (actual >= values[cells].min(axis=0) - slack).all(), "outside the hull of V"
    assert (actual <= values[cells].max(axis=0) + slack).all(), "outside the hull of V"
    return m, d, actual


def selection(rng: np.random.Generator, n_kv: int, n: int) -> native.I32:
    return np.sort(rng.permutation(n_kv)[:n]).astype(np.int32)


@pytest.mark.parametrize("kind", native.KV_TYPES.values(), ids=native.KV_TYPES)
@pytest.mark.parametrize("dim", [32, 64, 96, 256])
def test_rows_are_read_as_gguf_reads_them(kind: int, dim: int) -> None:
    """The plain reading, which the side index is made with; equal but for float32's last bit."""
    x = fresh_rng().normal(size=(113, dim)).astype(np.float32)
    rows, values = stored(x, kind, 0)
    assert rows.shape[1] == native.kv_row_bytes(kind, dim)
    np.testing.assert_allclose(native.kv_to_float(kind, rows, dim), values, rtol=1e-6, atol=1e-7)


@every_isa
@every_pair
def test_every_pair_of_types(isa: int, k_type: int, v_type: int) -> None:
    rng = fresh_rng()
    kv, q, keys, values = make(rng, 113, k_type, v_type, 64, 96, padding=2)
    check(isa, kv, q, keys, values, selection(rng, 113, 77))


@every_isa
@every_type
@pytest.mark.parametrize(
    "dims", [(32, 32), (64, 64), (96, 96), (128, 128), (256, 256), (192, 128), (32, 224)]
)
def test_head_sizes(isa: int, k_type: int, v_type: int, dims: tuple[int, int]) -> None:
    rng = fresh_rng()
    kv, q, keys, values = make(rng, 333, k_type, v_type, *dims)
    check(isa, kv, q, keys, values, selection(rng, 333, 200))


@every_isa
@every_type
@pytest.mark.parametrize(
    ("n_kv", "n"), [(1, 1), (64, 64), (113, 1), (113, 63), (113, 65), (1025, 1025), (1025, 12)]
)
def test_selection_sizes(isa: int, k_type: int, v_type: int, n_kv: int, n: int) -> None:
    rng = fresh_rng()
    kv, q, keys, values = make(rng, n_kv, k_type, v_type)
    check(isa, kv, q, keys, values, selection(rng, n_kv, n))


@every_isa
def test_order_of_cells_does_not_matter(isa: int) -> None:
    rng = fresh_rng()
    kv, q, keys, values = make(rng, k_type=Q8_0)
    cells = selection(rng, 1025, 300)
    _, _, straight = check(isa, kv, q, keys, values, cells)
    _, _, shuffled = check(isa, kv, q, keys, values, rng.permutation(cells))
    np.testing.assert_allclose(shuffled, straight, rtol=1e-4, atol=1e-5)


@every_isa
@every_type
@pytest.mark.parametrize("softcap", [1.0, 30.0, 50.0])
def test_softcap(isa: int, k_type: int, v_type: int, softcap: float) -> None:
    rng = fresh_rng()
    kv, q, keys, values = make(rng, 400, k_type, v_type, spread=8)
    check(isa, replace(kv, softcap=softcap), q, keys, values, selection(rng, 400, 250))


@every_isa
@pytest.mark.parametrize("scale", [1.0, 0.01, -0.1, 0.0])
def test_scale(isa: int, scale: float) -> None:
    rng = fresh_rng()
    kv, q, keys, values = make(rng, 200)
    check(isa, replace(kv, scale=scale), q, keys, values, np.arange(200, dtype=np.int32))


@every_isa
@every_type
def test_mask_is_added(isa: int, k_type: int, v_type: int) -> None:
    rng = fresh_rng()
    kv, q, keys, values = make(rng, 500, k_type, v_type)
    mask = rng.normal(0, 2, 500).astype(np.float16)
    mask[rng.random(500) < 0.3] = -np.inf
    cells = selection(rng, 500, 300)
    _, _, masked = check(isa, replace(kv, mask=mask), q, keys, values, cells)
    seen = cells[mask[cells] > -np.inf]
    _, _, alone = check(isa, replace(kv, mask=mask), q, keys, values, seen)
    np.testing.assert_allclose(masked, alone, rtol=1e-4, atol=1e-5)


@every_isa
def test_a_first_tile_without_a_visible_cell(isa: int) -> None:
    rng = fresh_rng()
    kv, q, keys, values = make(rng, 256)
    mask = np.full(256, -np.inf, np.float16)
    mask[130:140] = 0
    check(isa, replace(kv, mask=mask), q, keys, values, np.arange(256, dtype=np.int32))


@every_isa
def test_a_mask_of_zeros_is_no_mask(isa: int) -> None:
    rng = fresh_rng()
    kv, q, *_ = make(rng, 113)
    cells = np.arange(113, dtype=np.int32)
    without = native.attend(isa, kv, q, cells)
    zeros = native.attend(isa, replace(kv, mask=np.zeros(113, np.float16)), q, cells)
    assert without[:2] == zeros[:2]
    np.testing.assert_array_equal(without[2], zeros[2])


@every_isa
@pytest.mark.parametrize("n", [0, 1, 113])
def test_nothing_visible_leaves_the_state_empty(isa: int, n: int) -> None:
    kv, q, *_ = make(fresh_rng(), 113)
    hidden = replace(kv, mask=np.full(113, -np.inf, np.float16))
    m, d, o = native.attend(isa, hidden, q, np.arange(n, dtype=np.int32))
    assert m == -np.inf
    assert d == 0
    assert not o.any()


@every_isa
@every_type
@pytest.mark.parametrize("cut", [0, 1, 64, 100, 299, 300])
def test_two_calls_make_one(isa: int, k_type: int, v_type: int, cut: int) -> None:
    rng = fresh_rng()
    kv, q, keys, values = make(rng, 640, k_type, v_type, spread=4)
    cells = selection(rng, 640, 300)
    _, _, whole = check(isa, kv, q, keys, values, cells)
    first = native.attend(isa, kv, q, cells[:cut])
    _, d, o = native.attend(isa, kv, q, cells[cut:], first)
    np.testing.assert_allclose(o / d, whole, rtol=1e-4, atol=1e-5)


@every_isa
def test_a_hidden_continuation_keeps_the_state(isa: int) -> None:
    kv, q, *_ = make(fresh_rng(), 128)
    mask = np.zeros(128, np.float16)
    mask[64:] = -np.inf
    kv = replace(kv, mask=mask)
    m, d, o = native.attend(isa, kv, q, np.arange(64, dtype=np.int32))
    again = native.attend(isa, kv, q, np.arange(64, 128, dtype=np.int32), (m, d, o))
    assert again[0] == m
    assert again[1] == pytest.approx(d, rel=1e-6)
    np.testing.assert_allclose(again[2], o, rtol=1e-6)


@every_isa
@every_type
@pytest.mark.parametrize("size", [1e3, 1e4, 1e6, 1e20, 1e30])
def test_extreme_logits_stay_finite(isa: int, k_type: int, v_type: int, size: float) -> None:
    """The winner takes all: exp underflows for the others, and must not overflow for it."""
    rng = fresh_rng()
    kv, q, _, values = make(rng, 200, k_type, v_type)
    q = (q * size).astype(np.float32)
    m, d, o = native.attend(isa, kv, q, np.arange(200, dtype=np.int32))
    assert np.isfinite(m)
    assert np.isfinite(d)
    assert 1 - 1e-6 <= d <= 200
    assert np.isfinite(o).all()
    slack = 1e-5 * np.abs(values).max()
    assert (o / d >= values.min(axis=0) - slack).all()
    assert (o / d <= values.max(axis=0) + slack).all()


@every_isa
def test_rising_logits_rescale_the_state(isa: int) -> None:
    """The maximum moves in every tile, by more than float32's exp can span."""
    rng = fresh_rng()
    kv, q, keys, values = make(rng, 640)
    mask = (np.arange(640) * 2).astype(np.float16)
    for direction in (mask, mask[::-1].copy()):
        cells = np.arange(640, dtype=np.int32)
        check(isa, replace(kv, mask=direction), q, keys, values, cells)


@every_isa
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e-42])
def test_queries_that_are_no_numbers_do_not_crash(isa: int, value: float) -> None:
    kv, q, *_ = make(fresh_rng(), 113, Q8_0, Q8_0)
    q[3] = value
    native.attend(isa, kv, q, np.arange(113, dtype=np.int32))


@every_isa
def test_duplicate_cells_count_twice(isa: int) -> None:
    kv, q, keys, values = make(fresh_rng(), 64)
    check(isa, kv, q, keys, values, np.array([5, 5, 9], np.int32))


@every_isa
@pytest.mark.parametrize("changes", [
    {"k_dim": 0}, {"k_dim": 48}, {"k_dim": 288}, {"v_dim": 16}, {"k_type": 4}, {"v_type": 12}, {"v_type": -1},
])  # fmt: skip
def test_caches_without_a_kernel_are_refused(isa: int, changes: dict[str, int]) -> None:
    kv, *_ = make(fresh_rng(), 8)
    kv = replace(kv, **changes)
    q = np.zeros(kv.k_dim, np.float32)
    with pytest.raises(ValueError, match=r"kernel.*\.$"):
        native.attend(isa, kv, q, np.arange(8, dtype=np.int32))
