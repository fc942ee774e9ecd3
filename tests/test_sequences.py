"""Several sequences in one cache: every row of a batch sees its own cells, whatever happens to the others."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest

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
from support import (
    MAX_NMSE,
    NEOX_PARTIAL,
    NORM,
    NORM_ONE_LAYER,
    nmse,
    random_tokens,
)

LENGTHS = (150, 40, 97, 203, 64, 1, 120, 33)
TEXTS = [random_tokens(300, seed=seq) for seq in range(8)]
# Far below what a wrong cell does, far above the rounding of other matrix sizes.
SAME = 1e-6
LAYOUTS: dict[str, dict[str, Any]] = {
    "unified": {"unified": True, "n_ctx": 1024},
    "streams": {"unified": False, "n_ctx": 8 * 512},
}


@pytest.fixture(scope="module", params=[NORM, NEOX_PARTIAL], ids=str)
def model(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Model]:
    with loaded(request.param, tmp_path_factory.mktemp("model")) as model:
        yield model


@pytest.fixture(scope="module")
def one_layer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Model]:
    """Its keys and queries hang on token and position only, so selections are the same wherever cells lie."""
    with loaded(NORM_ONE_LAYER, tmp_path_factory.mktemp("one_layer")) as model:
        yield model


@pytest.fixture(params=LAYOUTS)
def layout(request: pytest.FixtureRequest) -> dict[str, Any]:
    return {"n_seq_max": 8, **LAYOUTS[request.param]}


def text(seq: int, n: int) -> list[int]:
    return TEXTS[seq][:n]


def fill(live: Compared | Context, lengths: Sequence[int]) -> None:
    for seq, length in enumerate(lengths):
        live.feed(seq, text(seq, length))


# ---- which cells a row sees ----


def test_the_comparison_notices_other_cells(one_layer: Model) -> None:
    """What these tests compare changes with one visible cell, and with what is selected."""
    rest = TEXTS[0][150:153]
    wanted = alone(one_layer, text(0, 150), rest)
    assert nmse(alone(one_layer, [*text(0, 149), 3], rest), wanted) > 100 * SAME
    with context(one_layer, NARROW, one_layer.other_profile) as live:
        live.feed(0, text(0, 150))
        assert nmse(live.step({0: rest[0]}), wanted[:1]) > 100 * SAME


@pytest.mark.parametrize("n_rows", range(1, 9))
def test_rows_of_different_sequences(n_rows: int, model: Model, layout: dict[str, Any]) -> None:
    lengths = LENGTHS[:n_rows]
    types = {"type_k": "q8_0", "type_v": "f16"} if n_rows % 2 else {}
    with compared(model, **layout, **types) as live:
        fill(live, lengths)
        live.reset()
        for i in range(2):
            live.step({seq: TEXTS[seq][length + i] for seq, length in enumerate(lengths)})
        counters = live.full.counters
        assert used(live.full) == {"sparse": 2 * 2}
        assert counters.cells_visible == 2 * 4 * (2 * sum(lengths) + 3 * n_rows)
        assert counters.cells_attended == counters.cells_visible
        assert counters.cells_verified > 0


def test_rows_select_as_if_alone(
    one_layer: Model, layout: dict[str, Any], types: dict[str, str]
) -> None:
    with compared(one_layer, **layout, **types) as live:
        fill(live, LENGTHS)
        found = [
            live.step({seq: TEXTS[seq][length + i] for seq, length in enumerate(LENGTHS)})
            for i in range(3)
        ]
        assert used(live.narrow)["sparse"] >= 3
    for seq, length in enumerate(LENGTHS):
        rest = TEXTS[seq][length : length + 3]
        wanted = alone(one_layer, text(seq, length), rest, **types)
        assert nmse([rows[seq] for rows in found], wanted) < SAME


@pytest.mark.parametrize("n_rows", [2, 5, 8])
def test_rows_of_one_sequence_see_the_rows_before(
    n_rows: int, one_layer: Model, layout: dict[str, Any], types: dict[str, str]
) -> None:
    """As speculative decoding sends them: each row selects as if the rows had come one by one."""
    rest = TEXTS[1][120 : 120 + n_rows]
    with compared(one_layer, **layout, **types) as live:
        fill(live, (60, 120, 80))
        live.reset()
        found = live.decode(rows_of(1, 120, rest))
        assert used(live.full) == {"sparse": 1}
        assert live.full.counters.cells_visible == 4 * sum(range(121, 121 + n_rows))
    assert max(row_errors(found, alone(one_layer, text(1, 120), rest, **types))) < SAME


def test_one_row_more_than_max_rows_is_prefill(model: Model, layout: dict[str, Any]) -> None:
    with compared(model, **layout) as live:
        fill(live, (60, 120))
        live.reset()
        found = live.decode(rows_of(1, 120, TEXTS[1][120:129]))
        assert used(live.narrow) == {"prefill": 2}
        assert np.array_equal(found, live.dense)
        live.configure(max_rows=9)
        live.decode(rows_of(1, 129, TEXTS[1][129:138]))
        assert used(live.narrow) == {"prefill": 2, "sparse": 2}
        live.configure(max_rows=1)
        live.decode(rows_of(1, 138, TEXTS[1][138:140]))
        assert used(live.narrow) == {"prefill": 4, "sparse": 2}


def test_short_and_long_rows_in_one_node(model: Model, layout: dict[str, Any]) -> None:
    """min_ctx lies between them: the short row attends to all that it sees."""
    lengths = (150, 80, 203)
    with compared(model, **layout) as live:
        live.configure(min_ctx=100)
        fill(live, lengths)
        live.reset()
        found = live.step({seq: TEXTS[seq][length] for seq, length in enumerate(lengths)})
        counters = live.narrow.counters
        assert used(live.narrow) == {"sparse": 2}
        assert counters.cells_visible == 2 * 4 * (151 + 81 + 204)
        assert counters.cells_attended == 2 * 4 * (48 + 81 + 48)
        errors = row_errors(found, live.dense)
    assert errors[1] <= MAX_NMSE < min(errors[0], errors[2])


def test_rows_that_are_all_short_are_left_to_llama_cpp(
    model: Model, layout: dict[str, Any]
) -> None:
    lengths = (150, 80, 203)
    with compared(model, **layout) as live:
        live.configure(min_ctx=205)
        fill(live, lengths)
        live.reset()
        found = live.step({seq: TEXTS[seq][length] for seq, length in enumerate(lengths)})
        assert used(live.narrow) == {"short_context": 2}
        assert np.array_equal(found, live.dense)


def test_golden_counters(model: Model) -> None:
    """Every number for one graph with three rows of one unified cache, by hand."""
    lengths = (100, 150, 20)
    with context(model, NARROW, n_seq_max=3, n_ctx=768) as live:
        fill(live, lengths)
        live.step({seq: TEXTS[seq][length] for seq, length in enumerate(lengths)})
        assert used(live) == {"prefill": 2 * 3, "sparse": 2}
        counters = live.counters
    assert counters.graphs == 3 + 1
    assert counters.cells_visible == 2 * 4 * (101 + 151 + 21)
    assert counters.cells_attended == 2 * 4 * (48 + 48 + 21)
    assert counters.index_bytes == 768 * int(model.profile.bytes_per_cell().sum())
    row = model.shape.n_head_kv * 64
    assert counters.kv_bytes == 2 * 768 * 2 * row * 2  # layers, cells, K and V, row, f16
    assert counters.bytes_attended == counters.cells_attended * 2 * 64 * 2
    assert (
        counters.cells_indexed == 2 * 5 * 64
    )  # layers, blocks that hold 273 cells: whole at first
    assert counters.stale_events == counters.verify_failures == 0


# ---- what happens to sequences ----


def test_copied_and_continued_apart(
    one_layer: Model, layout: dict[str, Any], types: dict[str, str]
) -> None:
    """In one stream a copy is bookkeeping; between streams K is copied without a SET_ROWS."""
    with compared(one_layer, **layout, **types) as live:
        fill(live, (130, 40))
        live.step({0: TEXTS[0][130]})
        live.reset()
        live.do(lambda c: c.copy(0, 2))
        found = [
            live.step({0: TEXTS[0][131 + i], 1: TEXTS[1][40 + i], 2: TEXTS[2][i]}) for i in range(3)
        ]
        counters = live.narrow.counters
        assert used(live.narrow) == {"sparse": 3}
        if layout["unified"]:
            # All of these cells lie in blocks that were indexed before.
            assert (counters.stale_events, counters.cells_indexed) == (0, 3 * 3)
        else:
            assert counters.stale_events > 0
    for seq, first, rest in [(0, 131, TEXTS[0][131:134]), (2, 131, TEXTS[2][:3])]:
        wanted = alone(one_layer, text(0, first), rest, **types)
        assert nmse([rows[seq] for rows in found], wanted) < SAME


@pytest.mark.parametrize("how", ["removed", "others_kept", "removed_at_its_end"])
def test_cells_are_reused(
    how: str, one_layer: Model, layout: dict[str, Any], types: dict[str, str]
) -> None:
    """Sequences end, and what comes next is written over their cells."""
    kept = 60 if how == "removed_at_its_end" else 0
    layout["n_ctx"] = 512 if layout["unified"] else 8 * 512
    with compared(one_layer, **layout, **types) as live:
        fill(live, (150, 97, 120))
        live.step({0: TEXTS[0][150], 1: TEXTS[1][97], 2: TEXTS[2][120]})
        if how == "others_kept":
            live.do(lambda c: c.keep(1))  # of streams only its own
            if not layout["unified"]:
                assert live.plain.end(0) == 151
                live.do(lambda c: c.remove(0))
                live.do(lambda c: c.remove(2))
        else:
            live.do(lambda c: c.remove(0, kept))
            live.do(lambda c: c.remove(2))
        assert [live.plain.end(seq) for seq in range(3)] == [kept, 98, 0]
        live.feed(0, TEXTS[3][:280])  # more than there ever was in cells behind all others
        rest = TEXTS[3][280:283]
        found = [live.step({0: token, 1: TEXTS[1][98 + i]}) for i, token in enumerate(rest)]
    wanted = alone(one_layer, text(0, kept) + TEXTS[3][:280], rest, **types)
    assert nmse([rows[0] for rows in found], wanted) < SAME
    wanted = alone(one_layer, text(1, 98), TEXTS[1][98:101], **types)
    assert nmse([rows[1] for rows in found], wanted) < SAME


def test_one_of_several_shifted(
    one_layer: Model, layout: dict[str, Any], types: dict[str, str]
) -> None:
    with compared(one_layer, **layout, **types) as live:
        fill(live, (150, 200, 70))
        live.step({0: TEXTS[0][150], 1: TEXTS[1][200], 2: TEXTS[2][70]})
        live.reset()
        live.do(lambda c: c.remove(1, 50, 100))
        live.do(lambda c: c.shift(1, 100, -1, -50))
        assert live.plain.end(1) == 151
        rest = TEXTS[1][201:205]
        found = [live.step({0: TEXTS[0][151 + i], 1: token}) for i, token in enumerate(rest)]
        assert live.narrow.counters.stale_events > 0
        assert used(live.narrow) == {"sparse": 4}
    kept = text(1, 50) + TEXTS[1][100:201]
    # Keys are rounded once more, of quantized types even those that stay where they are.
    rounded = 0.02
    shifted = nmse([rows[1] for rows in found], alone(one_layer, kept, rest, **types))
    unshifted = nmse([rows[1] for rows in found], alone(one_layer, text(1, 201), rest, **types))
    assert shifted < rounded < unshifted
    wanted = alone(one_layer, text(0, 151), TEXTS[0][151:155], **types)
    bystander = nmse([rows[0] for rows in found], wanted)
    assert bystander < (SAME if types["type_k"] == "f16" else rounded)


def test_positions_of_one_divided(
    one_layer: Model, layout: dict[str, Any], types: dict[str, str]
) -> None:
    """As self-extend does: several cells share a position."""
    with compared(one_layer, **layout, **types) as live:
        fill(live, (150, 200))
        live.step({0: TEXTS[0][150], 1: TEXTS[1][200]})
        live.reset()
        live.do(lambda c: c.divide(1, 100, -1, 2))
        assert live.plain.end(1) == 101
        for i in range(3):
            live.step({0: TEXTS[0][151 + i], 1: TEXTS[1][201 + i]})
        assert live.narrow.counters.stale_events > 0
        assert used(live.full) == {"sparse": 3}
        assert live.full.counters.cells_visible == 4 * sum(152 + i + 202 + i for i in range(3))


@pytest.mark.parametrize("target", [1, 5], ids=["over_another", "into_a_free_one"])
def test_state_of_one_loaded_into_another(
    target: int, one_layer: Model, layout: dict[str, Any], types: dict[str, str]
) -> None:
    with compared(one_layer, **layout, **types) as live:
        fill(live, (150, 97, 60))
        live.step({0: TEXTS[0][150], 1: TEXTS[1][97], 2: TEXTS[2][60]})
        live.reset()
        state = live.plain.saved(0)
        assert live.narrow.saved(0) == state  # nothing that pyfasa does changes K or V
        live.do(lambda c: c.load(state, target))
        rest = TEXTS[6][:3]
        found = [live.step({0: TEXTS[0][151 + i], target: rest[i]}) for i in range(3)]
        assert live.narrow.counters.stale_events > 0
        assert live.narrow.counters.nodes["sparse"] > 0
    for row, tokens in enumerate([TEXTS[0][151:154], rest]):
        wanted = alone(one_layer, text(0, 151), tokens, **types)
        assert nmse([rows[row] for rows in found], wanted) < SAME


def test_state_of_all_loaded(
    one_layer: Model, layout: dict[str, Any], types: dict[str, str]
) -> None:
    """Cells are packed when a state is loaded, so nearly every entry changes its place."""
    with compared(one_layer, **layout, **types) as live:
        fill(live, (60, 97, 150))
        live.step({0: TEXTS[0][60], 1: TEXTS[1][97], 2: TEXTS[2][150]})
        live.do(lambda c: c.remove(0))
        state = live.plain.saved()
        live.feed(1, TEXTS[4][:50])
        live.do(lambda c: c.load(state))
        assert [live.plain.end(seq) for seq in range(3)] == [0, 98, 151]
        found = [live.step({1: TEXTS[1][98 + i], 2: TEXTS[2][151 + i]}) for i in range(3)]
        assert live.narrow.counters.stale_events > 0
    for row, seq, n in [(0, 1, 98), (1, 2, 151)]:
        wanted = alone(one_layer, text(seq, n), TEXTS[seq][n : n + 3], **types)
        assert nmse([rows[row] for rows in found], wanted) < SAME


@pytest.mark.parametrize("data", [False, True])
def test_all_cleared(
    data: bool, one_layer: Model, layout: dict[str, Any], types: dict[str, str]
) -> None:
    with compared(one_layer, **layout, **types) as live:
        fill(live, (150, 97))
        live.step({0: 3, 1: 4})
        live.do(lambda c: c.clear(data=data))
        live.feed(1, text(5, 120))
        found = live.step({1: TEXTS[5][120], 2: 7})
    assert nmse(found[:1], alone(one_layer, text(5, 120), TEXTS[5][120:121], **types)) < SAME


def test_a_token_of_two_sequences(model: Model, types: dict[str, str]) -> None:
    """Such rows exist in a unified cache only; its cells belong to both."""
    with compared(model, n_seq_max=3, n_ctx=768, **types) as live:
        fill(live, (150, 1, 90))
        live.do(lambda c: c.copy(0, 1))
        with pytest.raises(RefusedError, match="decode -1"):  # 1 has a position 0 of its own
            live.decode([Row(5, 150, (0, 2)), Row(6, 90, (2,))])
        live.do(lambda c: c.remove(1))
        live.do(lambda c: c.copy(0, 1))
        live.reset()
        live.decode([Row(5, 150, (0, 1)), Row(6, 90, (2,))])
        live.step({0: 7, 1: 8, 2: 9})
        assert used(live.full) == {"sparse": 2 * 2}
        assert live.full.counters.cells_visible == 2 * 4 * (151 + 91 + 152 + 152 + 92)


def test_refused_calls_change_nothing(one_layer: Model, layout: dict[str, Any]) -> None:
    """llama.cpp refuses them with and without pyfasa, and what follows is right."""
    n = 150
    with compared(one_layer, **layout) as live:
        fill(live, (n, 40))
        live.step({0: TEXTS[0][n]})
        live.reset()
        for rows, code in [
            ([Row(5, n + 5)], -1),  # a gap
            ([Row(5, n)], -1),  # a position that is taken
            ([Row(5, 0, (99,))], -1),  # no such sequence
            ([Row(600, n + 1)], -1),  # no such token
        ]:
            with pytest.raises(RefusedError, match=f"decode {code}$"):
                live.decode(rows)
        live.feed(3, TEXTS[3])
        live.feed(3, TEXTS[4][:150])
        with pytest.raises(RefusedError, match=r"decode 1$"):
            live.feed(3, TEXTS[4] + TEXTS[5][:200])  # no cells are left
        live.do(lambda c: c.remove(3))
        with pytest.raises(RefusedError, match="state"):
            live.do(lambda c: c.load(c.saved(0)[:40000], 4))
        assert live.plain.spans()[:5] == [(0, n), (0, 39), (-1, -1), (-1, -1), (-1, -1)]
        found = live.step({0: TEXTS[0][n + 1], 1: TEXTS[1][40]})
    assert nmse(found[:1], alone(one_layer, text(0, n + 1), TEXTS[0][n + 1 : n + 2])) < SAME
