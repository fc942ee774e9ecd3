"""A stream of its own for each sequence (kv_unified = false): one node serves the cells of several streams."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest

from pyfasa.llama import KV_TYPES
from sequences import (
    NARROW,
    Compared,
    Context,
    Model,
    RefusedError,
    Row,
    alone,
    compared,
    context,
    loaded,
    row_errors,
    rows_of,
    used,
)
from support import MAX_NMSE, NORM, NORM_ONE_LAYER, nmse, random_tokens

TEXTS = [random_tokens(420, seed=10 + seq) for seq in range(4)]
LENGTHS = (130, 40, 97, 203)
CELLS = 512
STREAMS: dict[str, Any] = {"n_seq_max": 4, "unified": False, "n_ctx": 4 * CELLS}
SAME = 1e-6  # see test_sequences.py


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Model]:
    with loaded(NORM, tmp_path_factory.mktemp("model")) as model:
        yield model


@pytest.fixture(scope="module")
def one_layer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Model]:
    """Its keys and queries hang on token and position only, so selections are the same in all contexts."""
    with loaded(NORM_ONE_LAYER, tmp_path_factory.mktemp("one_layer")) as model:
        yield model


def fill(live: Compared | Context, lengths: Sequence[int] = LENGTHS) -> None:
    for seq, length in enumerate(lengths):
        live.feed(seq, TEXTS[seq][:length])


def batch(counts: dict[int, int], lengths: Sequence[int] = LENGTHS) -> list[Row]:
    """The next so many rows of each sequence, sequence by sequence."""
    rows = []
    for seq, n in counts.items():
        first = lengths[seq]
        rows += rows_of(seq, first, TEXTS[seq][first : first + n])
    return rows


def assert_as_if_alone(
    model: Model, found: np.ndarray[Any, Any], counts: dict[int, int], **types: str
) -> None:
    """The rows of each sequence in turn are those of a context that holds nothing else."""
    first_row = 0
    for seq, n in counts.items():
        first = LENGTHS[seq]
        wanted = alone(model, TEXTS[seq][:first], TEXTS[seq][first : first + n], **types)
        assert nmse(found[first_row : first_row + n], wanted) < SAME
        first_row += n


@pytest.mark.parametrize(
    ("counts", "n_graphs"),
    [
        ({0: 1, 1: 1, 2: 1, 3: 1}, 1),
        ({0: 3, 1: 3}, 1),
        ({0: 8, 1: 8, 2: 8, 3: 8}, 1),  # the limit is per stream
        ({1: 1, 2: 1}, 1),  # not from the first stream on
        ({2: 5}, 1),
        ({0: 1, 2: 1}, 2),  # llama.cpp puts neighbours together only
        ({0: 2, 1: 1, 2: 4}, 3),  # and equally many rows of each: 1 1 1, then 1 and 3
    ],
    ids=str,
)
@pytest.mark.parametrize("type_k", ["f16", "q8_0", "q4_0"])
def test_rows_select_as_if_alone(
    type_k: str, counts: dict[int, int], n_graphs: int, one_layer: Model
) -> None:
    with compared(one_layer, type_k=type_k, **STREAMS) as live:
        fill(live)
        live.reset()
        found = live.decode(batch(counts))
        assert used(live.full) == used(live.narrow) == {"sparse": n_graphs}
        sums = [n * LENGTHS[seq] + n * (n + 1) // 2 for seq, n in counts.items()]
        assert live.full.counters.cells_visible == 4 * sum(sums)
    assert_as_if_alone(one_layer, found, counts, type_k=type_k)


def test_too_many_rows_per_stream_are_prefill(model: Model) -> None:
    with compared(model, **STREAMS) as live:
        fill(live)
        live.reset()
        found = live.decode(batch({0: 9, 1: 9}))
        assert used(live.narrow) == {"prefill": 2}
        assert np.array_equal(found, live.dense)


def test_golden_counters(model: Model) -> None:
    """Every number for one graph with a row of each of three streams, by hand."""
    lengths = (100, 150, 20)
    setup = {**STREAMS, "n_seq_max": 3, "n_ctx": 3 * CELLS}
    with context(model, NARROW, **setup) as live:
        fill(live, lengths)
        live.decode(batch({0: 1, 1: 1, 2: 1}, lengths))
        counters = live.counters
        assert used(live) == {"prefill": 2 * 3, "sparse": 2}
    assert counters.graphs == 3 + 1
    assert counters.cells_visible == 2 * 4 * (101 + 151 + 21)
    assert counters.cells_attended == 2 * 4 * (48 + 48 + 21)
    assert counters.index_bytes == 3 * CELLS * int(model.profile.bytes_per_cell().sum())
    assert counters.kv_bytes == 2 * 3 * CELLS * 2 * (2 * 64) * 2  # K and V rows of 128 f16
    assert counters.cells_indexed == 2 * (2 + 3 + 1) * 64  # blocks in use, whole at first
    assert counters.stale_events == counters.verify_failures == 0


def test_one_index_serves_whatever_streams_a_graph_has(one_layer: Model) -> None:
    """A view of some streams and one of others are the same index: nothing is rebuilt."""
    lengths = [130, 40, 97, 200]
    with compared(one_layer, **STREAMS) as live:
        fill(live, lengths)
        live.decode(batch({0: 1, 1: 1, 2: 1, 3: 1}, lengths))
        live.reset()
        live.step({1: 3})
        live.step({2: 4, 3: 5})
        live.step({0: 6, 1: 7, 2: 8, 3: 9})
        assert used(live.narrow) == {"sparse": 3}
        assert live.narrow.counters.cells_indexed == 1 + 2 + 4
        assert live.narrow.counters.index_bytes == live.full.counters.index_bytes


def test_long_beside_nearly_empty(model: Model) -> None:
    """min_ctx counts the longest row; the others attend to what little they see."""
    lengths = (400, 2, 60)
    with compared(model, **STREAMS) as live:
        live.configure(min_ctx=100)
        fill(live, lengths)
        live.reset()
        found = live.decode(batch({0: 2, 1: 2, 2: 2}, lengths))
        counters = live.narrow.counters
        assert used(live.narrow) == {"sparse": 2}
        assert counters.cells_visible == 2 * 4 * (401 + 402 + 3 + 4 + 61 + 62)
        assert counters.cells_attended == 2 * 4 * (48 + 48 + 3 + 4 + 61 + 62)
        errors = row_errors(found, live.dense)
        assert max(errors[2:]) <= MAX_NMSE < min(errors[:2])
        found = live.decode(rows_of(1, 4, [5, 6]))  # alone they are short
        assert used(live.narrow) == {"sparse": 2, "short_context": 2}


def test_copies_that_wait_for_the_next_graph(one_layer: Model) -> None:
    """llama.cpp copies K late: from 0 over 1, from there to 3, and 0 is gone before it happens."""
    with compared(one_layer, **STREAMS) as live:
        fill(live)
        live.decode(batch({0: 1, 1: 1, 2: 1, 3: 1}))
        live.reset()
        live.do(lambda c: c.copy(0, 1))
        live.do(lambda c: c.copy(1, 3))
        live.do(lambda c: c.remove(0))
        assert live.narrow.counters.stale_events == 0
        found = live.step({0: 3, 1: TEXTS[0][131], 2: TEXTS[2][98], 3: TEXTS[1][0]})
        assert live.narrow.counters.stale_events == 2  # copies, of one layer each
    kept = TEXTS[0][:131]
    assert nmse(found[1:2], alone(one_layer, kept, TEXTS[0][131:132])) < SAME
    assert nmse(found[2:3], alone(one_layer, TEXTS[2][:98], TEXTS[2][98:99])) < SAME
    assert nmse(found[3:4], alone(one_layer, kept, TEXTS[1][:1])) < SAME


def test_what_streams_cannot_do_is_refused(model: Model) -> None:
    with compared(model, **STREAMS) as live:
        fill(live, (50, 50))
        live.do(lambda c: c.copy(0, 1))
        with pytest.raises(RefusedError, match=r"decode 1$"):  # no cell can be in two streams
            live.decode([Row(5, 50, (0, 1))])
        live.do(lambda c: c.keep(0))
        assert live.plain.end(1) == 50  # of another stream
        live.step({0: 6, 1: 7})
        assert used(live.full) == {"prefill": 2 * 2, "sparse": 2}


def test_capture_of_streams_is_dense(model: Model) -> None:
    with compared(model, **STREAMS) as live:
        fill(live)
        live.configure(capture=True)
        live.reset()
        found = live.step({0: 5, 1: 6})
        assert used(live.narrow) == {"streams": 2}
        assert np.array_equal(found, live.dense)
        live.configure()
        live.step({0: 7, 1: 8})
        assert used(live.narrow) == {"streams": 2, "sparse": 2}


@pytest.mark.parametrize("type_kv", KV_TYPES)
def test_every_type(type_kv: str, one_layer: Model) -> None:
    """The cells of the second and later streams start in the middle of the cache tensor."""
    types = {"type_k": type_kv, "type_v": type_kv}
    with compared(one_layer, **STREAMS, **types) as live:
        fill(live)
        live.reset()
        found = live.decode(batch({1: 2, 2: 2, 3: 2}))
        assert used(live.narrow) == {"sparse": 1}
    assert_as_if_alone(one_layer, found, {1: 2, 2: 2, 3: 2}, **types)


def test_two_threads(one_layer: Model) -> None:
    with compared(one_layer, n_threads=2, **STREAMS) as live:
        fill(live)
        counts = {0: 5, 1: 5, 2: 5}
        assert_as_if_alone(one_layer, live.decode(batch(counts)), counts)
        assert live.narrow.counters.nodes["sparse"] == 1
