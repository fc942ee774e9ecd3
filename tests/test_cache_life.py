"""The side index follows the K cache through everything that can happen to the cells of a sequence."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import pytest

from caches import (
    EVERYTHING,
    SAME,
    SHAPES,
    TYPES,
    A,
    B,
    N,
    after,
    both,
    generated,
    memory,
    plain,
    sequence_state,
    set_sequence_state,
    verified,
    written,
)
from support import (
    F32,
    MAX_NMSE,
    NEOX_GROUP_1,
    NEOX_PARTIAL,
    NORM,
    NORM_ONE_LAYER,
    decode,
    nmse,
    random_profile,
    random_tokens,
)

K_TYPES = [*TYPES, "q4_0"]
# llama.cpp aborts when it shifts quantized K of a partial rotary model.
SHIFTABLE = [
    *((NORM, name) for name in K_TYPES),
    (NEOX_GROUP_1, "q8_0"),
    (NEOX_PARTIAL, "f16"),
]
# A state does not say in which order its cells were written: sinks and recent may be others.
SCORED_ONLY: dict[str, Any] = {"sinks": 0, "recent": 0}
N_SMALL = 256  # cells of a context that runs full


@pytest.fixture(scope="module", params=SHAPES, ids=str)
def path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(tmp_path_factory.mktemp("model"), request.param)


@pytest.fixture(scope="module")
def one_layer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """There keys hang on token and position only."""
    return written(tmp_path_factory.mktemp("model"), NORM_ONE_LAYER)


@pytest.fixture(scope="module", params=SHIFTABLE, ids=lambda x: f"{x[0]}-{x[1]}")
def shiftable(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, str]]:
    """A model and its types of K and V."""
    shape, name = request.param
    return written(tmp_path_factory.mktemp("model"), shape), both(name)


def test_the_comparison_notices_stale_entries(path: Path) -> None:
    """What these tests compare changes when the scored cells do."""
    first = after(path, A[:N], A[N:])
    with verified(path, profile=random_profile(path, seed=1)) as other:
        other.eval(A[:N])
        assert nmse(decode(other, A[N:]), first) > 100 * SAME


# ---- one sequence starts anew --------------------------------------------------------------------


def test_removed_and_evaluated_again(path: Path, types: dict[str, str]) -> None:
    with verified(path, **types) as llm:
        llm.eval(A[:N])
        decode(llm, A[N:])
        llm.n_tokens = 150  # eval() removes what comes after
        llm.eval(B[150:N])
        found = decode(llm, B[N:])
    assert nmse(found, after(path, A[:150] + B[150:N], B[N:], **types)) < SAME


def test_generate_reuses_a_prefix(path: Path, types: dict[str, str]) -> None:
    second = A[:200] + B[200:N]
    with verified(path, **types) as llm:
        generated(llm, A[:N])
        llm.fasa.reset()
        found = generated(llm, second)
        assert llm.fasa.counters.cells_indexed < 2 * (N + 10)  # the prefix was kept, once per layer
        assert found == generated(llm, second)  # from the cache this time
    with verified(path, **types) as fresh:
        fresh.eval(second[:200])
        assert found == generated(fresh, second)


def test_reset(path: Path, types: dict[str, str]) -> None:
    with verified(path, **types) as llm:
        llm.eval(A[:N])
        decode(llm, A[N:])
        llm.reset()
        llm.eval(B[:N])
        found = decode(llm, B[N:])
    assert np.array_equal(found, after(path, B[:N], B[N:], **types))


@pytest.mark.parametrize("data", [True, False])
def test_cleared_memory(path: Path, data: bool) -> None:
    """With data the keys become zeros; without, only the cells are free."""
    with verified(path) as llm:
        llm.eval(A[:N])
        decode(llm, A[N:])
        llama_cpp.llama_memory_clear(memory(llm), data)
        assert (llm.fasa.counters.stale_events > 0) == data
        llm.reset()
        llm.eval(B[:N])
        assert np.array_equal(decode(llm, B[N:]), after(path, B[:N], B[N:]))


# ---- holes and shifts ----------------------------------------------------------------------------


def hole(llm: llama_cpp.Llama) -> None:
    """Tokens decoded next go into the cells that became free in the middle."""
    assert llama_cpp.llama_memory_seq_rm(memory(llm), 0, 150, 250)


def hole_refilled(llm: llama_cpp.Llama) -> None:
    """The new tail lies in the hole, in what was the end, and behind it."""
    hole(llm)
    decode(llm, B[:3])
    llm.n_tokens = N - 20
    llm.eval(B[N - 20 : N] + B[100:200])


def shifted(llm: llama_cpp.Llama) -> None:
    """Keys are rotated in place, by the next decode call."""
    hole(llm)
    llama_cpp.llama_memory_seq_add(memory(llm), 0, 250, -1, -100)
    llm.n_tokens -= 100


def shifted_twice(llm: llama_cpp.Llama) -> None:
    """Rotations add up before they are applied; the second time some cells are rotated back."""
    shifted(llm)
    llama_cpp.llama_memory_seq_rm(memory(llm), 0, 0, 20)
    llama_cpp.llama_memory_seq_add(memory(llm), 0, 20, 200, -20)
    llama_cpp.llama_memory_seq_rm(memory(llm), 0, 200, 240)
    llama_cpp.llama_memory_seq_add(memory(llm), 0, 240, -1, -60)
    llm.n_tokens -= 60
    decode(llm, B[:2])
    llama_cpp.llama_memory_seq_rm(memory(llm), 0, 5, 15)
    llama_cpp.llama_memory_seq_add(memory(llm), 0, 15, -1, -10)
    llm.n_tokens -= 10


def divided(llm: llama_cpp.Llama) -> None:
    """Self-extend: two old tokens share a position."""
    llama_cpp.llama_memory_seq_div(memory(llm), 0, 0, N, 2)
    llm.n_tokens = N // 2


Operation = Callable[[llama_cpp.Llama], None]
OPERATIONS = [hole, hole_refilled, shifted, shifted_twice, divided]


def operated(llm: llama_cpp.Llama, operation: Operation | None) -> F32:
    llm.eval(A[:N])
    decode(llm, A[N : N + 2])
    if operation is not None:
        operation(llm)
    return decode(llm, A[N + 2 :])


@pytest.mark.parametrize("operation", OPERATIONS)
def test_as_llama_cpp_does_it(operation: Operation, shiftable: tuple[Path, dict[str, str]]) -> None:
    """Everything attended: the result is that of llama.cpp after the same calls."""
    path, types = shiftable
    with plain(path, **types) as llm:
        wanted = operated(llm, operation)
    with verified(path, **EVERYTHING, **types) as llm:
        assert nmse(operated(llm, operation), wanted) <= MAX_NMSE
    with plain(path, **types) as llm:
        assert nmse(operated(llm, None), wanted) > 20 * MAX_NMSE  # the operation shows


@pytest.mark.parametrize("operation", OPERATIONS)
def test_as_in_a_context_that_got_the_result(
    operation: Operation, shiftable: tuple[Path, dict[str, str]]
) -> None:
    """Some cells attended: an index built at once from the same keys selects the same."""
    path, types = shiftable
    with verified(path, **SCORED_ONLY, **types) as llm:
        operated(llm, operation)
        state, n_tokens = sequence_state(llm), llm.n_tokens
        found = decode(llm, B[:4])
    with verified(path, **SCORED_ONLY, **types) as fresh:
        set_sequence_state(fresh, state, n_tokens)
        assert nmse(decode(fresh, B[:4]), found) < SAME


@pytest.mark.parametrize(("name", "limit"), [("f16", 0.001), ("q8_0", 0.003), ("q4_0", 0.05)])
def test_k_shift_as_if_the_tokens_had_never_been(one_layer: Path, name: str, limit: float) -> None:
    """One layer: the shifted keys are those of a run without the removed tokens, but for rounding."""
    k_types = both(name)
    with verified(one_layer, **k_types) as llm:
        llm.eval(A[:N])
        decode(llm, A[N : N + 4])
        assert llama_cpp.llama_memory_can_shift(memory(llm))
        shifted(llm)
        before = llm.fasa.counters.stale_events
        found = decode(llm, A[N + 4 :])
        assert llm.fasa.counters.stale_events > before
    wanted = after(one_layer, A[:150] + A[250 : N + 4], A[N + 4 :], **k_types)
    unshifted = after(one_layer, A[: N + 4], A[N + 4 :], **k_types)
    # Keys are rounded once more, which may change a selection at its edge.
    assert nmse(found, wanted) < limit < 0.2 < nmse(unshifted, wanted)


def test_recent_are_the_last_tokens_wherever_they_lie(one_layer: Path) -> None:
    """Only the recent cells attended: as in llama.cpp with nothing else left."""
    with plain(one_layer) as llm:
        llm.eval(A[:N])
        decode(llm, B[:10])
        llama_cpp.llama_memory_seq_rm(memory(llm), 0, 0, N + 10 - 7)
        wanted = decode(llm, B[10:11])
    with verified(one_layer, budget=8, sinks=0, recent=8) as llm:
        llm.eval(A[:N])
        hole(llm)
        decode(llm, B[:10])  # into the hole
        assert nmse(decode(llm, B[10:11]), wanted) <= MAX_NMSE


def test_sinks_are_the_first_tokens_wherever_they_lie(one_layer: Path) -> None:
    """The first cells hold new tokens after the first tokens were dropped."""
    with plain(one_layer) as llm:
        llm.eval(A[20:N] + B[:20])
        llama_cpp.llama_memory_seq_rm(memory(llm), 0, 4, N - 1)
        wanted = decode(llm, B[20:21])
    with verified(one_layer, budget=6, sinks=4, recent=2) as llm:
        llm.eval(A[:N])
        llama_cpp.llama_memory_seq_rm(memory(llm), 0, 0, 20)
        llama_cpp.llama_memory_seq_add(memory(llm), 0, 20, -1, -20)
        llm.n_tokens -= 20
        llm.eval(B[:20])
        assert nmse(decode(llm, B[20:21]), wanted) < 0.005  # shifted keys are rounded once more


# ---- a full context ------------------------------------------------------------------------------


def endless(llm: llama_cpp.Llama, n_keep: int = 16) -> F32:
    """llama.cpp's own way: half of what is not kept is dropped whenever the context is full."""
    n_discard = (N_SMALL - n_keep) // 2
    rows = []
    llm.eval(A[: N_SMALL - 10])
    for seed in range(3):
        rows.append(decode(llm, random_tokens(N_SMALL - llm.n_tokens, seed)))  # to the last cell
        llama_cpp.llama_memory_seq_rm(memory(llm), 0, n_keep, n_keep + n_discard)
        llama_cpp.llama_memory_seq_add(memory(llm), 0, n_keep + n_discard, -1, -n_discard)
        llm.n_tokens -= n_discard
        rows.append(decode(llm, random_tokens(5, seed)))
        llm.eval(random_tokens(n_discard - 10, seed))
    return np.concatenate(rows)


def test_full_and_shifted_again_and_again(shiftable: tuple[Path, dict[str, str]]) -> None:
    path, types = shiftable
    arguments: dict[str, Any] = {"n_ctx": N_SMALL, **types}
    with plain(path, **arguments) as llm:
        wanted = endless(llm)
    with verified(path, **EVERYTHING, **arguments) as llm:
        found = endless(llm)
        assert llm.fasa.counters.stale_events >= 3
    # Later keys inherit what q4_0 rounds differently.
    assert nmse(found, wanted) <= MAX_NMSE * (4 if types["type_k"] == "q4_0" else 1)
    arguments |= SCORED_ONLY
    with verified(path, **arguments) as llm:
        endless(llm)
        state, n_tokens = sequence_state(llm), llm.n_tokens
        found = decode(llm, A[:4])
    with verified(path, **arguments) as fresh:
        set_sequence_state(fresh, state, n_tokens)
        assert nmse(decode(fresh, A[:4]), found) < SAME


def until_full(llm: llama_cpp.Llama, prompt: list[int]) -> list[int]:
    tokens: list[int] = []
    with pytest.raises(RuntimeError, match=r"^llama_decode returned 1$"):
        tokens.extend(llm.generate(prompt, top_k=1, temp=0.0))
    return tokens


def test_a_full_context_ends_as_upstream(path: Path) -> None:
    """generate() shifts nothing: it fails when no cell is left, and a completion stops before."""
    prompt = A[: N_SMALL - 8]
    found = []
    for opener in (plain, verified):
        arguments = {} if opener is plain else EVERYTHING
        with opener(path, n_ctx=N_SMALL, **arguments) as llm:
            tokens = until_full(llm, prompt)
            choices = llm.create_completion(prompt, max_tokens=None, temperature=0.0)["choices"]
            with pytest.raises(ValueError, match="exceed context window of 256"):
                llm.create_completion(A[:N_SMALL])
            again = generated(llm, A[:100] + B[100:200])
            found.append((tokens, choices, again))
    assert found[0] == found[1]
    assert len(found[0][0]) == 1 + 8  # the last one was sampled and found no cell
    assert found[0][1][0]["finish_reason"] == "length"


def test_sparse_goes_on_after_a_full_context(path: Path, types: dict[str, str]) -> None:
    with verified(path, n_ctx=N_SMALL, **types) as llm:
        until_full(llm, A[: N_SMALL - 8])
        llm.n_tokens = 100
        llm.eval(B[100:200])
        found = decode(llm, B[200:204])
    wanted = after(path, A[:100] + B[100:200], B[200:204], n_ctx=N_SMALL, **types)
    assert nmse(found, wanted) < SAME


# ---- two sequences -------------------------------------------------------------------------------


def test_sequences_side_by_side(path: Path) -> None:
    """Two sequences share the cells; the mask tells them apart."""
    with verified(path, embedding=True) as llm:  # the parent's way to several sequences
        llm.eval(A[:N])
        llama_cpp.llama_memory_seq_cp(memory(llm), 0, 1, -1, -1)
        llama_cpp.llama_memory_seq_rm(memory(llm), 0, 200, -1)
        llm.n_tokens = 200
        llm.eval(B[200:300])
        llm.eval(B[300:301])
        assert llm.fasa.counters.nodes["sparse"] == 2
        visible = llm.fasa.counters.cells_visible
        assert visible == 2 * 4 * 301  # not the cells of sequence 1
