"""The side index follows the K cache through everything that can happen to a cache."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import pytest

from pyfasa import Llama
from pyfasa.llama import kv_type
from pyfasa.native import Config, Session
from support import (
    NEOX_PARTIAL,
    NORM,
    NORM_ONE_LAYER,
    Shape,
    decode,
    nmse,
    opened,
    opened_plain,
    random_profile,
    random_tokens,
    write_model,
)

N = 400
A, B = random_tokens(N + 8, seed=1), random_tokens(N + 8, seed=2)
SPARSE: dict[str, Any] = {"budget": 64, "min_ctx": 0, "sinks": 2, "recent": 8}
# Far below what a stale index does, far above rounding that depends on how tokens are batched.
SAME = 1e-5


@pytest.fixture(scope="module", params=[NORM, NEOX_PARTIAL], ids=str)
def path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    shape: Shape = request.param
    return write_model(tmp_path_factory.mktemp("model") / f"{shape}.gguf", shape)


@pytest.fixture(scope="module", params=["f16", "q8_0"])
def types(request: pytest.FixtureRequest) -> dict[str, str]:
    return {"type_k": request.param, "type_v": request.param}


@contextmanager
def verified(path: Path, **arguments: Any) -> Iterator[Any]:
    """A sparse Llama that compares its index with the K cache before every use."""
    settings = {"profile": random_profile(path), **SPARSE, **arguments}
    with opened(path, **settings) as llm:
        llm.fasa.verify = True
        yield llm
        counters = llm.fasa.counters
        assert counters.verify_failures == 0
        assert counters.cells_verified > 0


def after(path: Path, prompt: list[int], rest: list[int], **arguments: Any) -> Any:
    """Logits of the rest in a context that has seen nothing but the prompt."""
    with verified(path, **arguments) as fresh:
        fresh.eval(prompt)
        return decode(fresh, rest)


def test_the_comparison_notices_stale_entries(path: Path) -> None:
    """What these tests compare changes when the scored cells do."""
    first = after(path, A[:N], A[N:])
    with verified(path, profile=random_profile(path, seed=1)) as other:
        other.eval(A[:N])
        assert nmse(decode(other, A[N:]), first) > 100 * SAME


def test_removed_and_evaluated_again(path: Path, types: dict[str, str]) -> None:
    with verified(path, **types) as llm:
        llm.eval(A[:N])
        decode(llm, A[N:])
        llm.n_tokens = 150  # eval() removes what comes after
        llm.eval(B[150:N])
        found = decode(llm, B[N:])
    assert nmse(found, after(path, A[:150] + B[150:N], B[N:], **types)) < SAME


def test_generate_reuses_a_prefix(path: Path, types: dict[str, str]) -> None:
    def generated(llm: Llama, prompt: list[int]) -> list[int]:
        stream = llm.generate(prompt, top_k=1, temp=0.0)
        return [token for token, _ in zip(stream, range(6), strict=False)]

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


def test_cleared_memory(path: Path) -> None:
    with verified(path) as llm:
        llm.eval(A[:N])
        decode(llm, A[N:])
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(llm._ctx.ctx), True)
        assert llm.fasa.counters.stale_events > 0
        llm.reset()
        llm.eval(B[:N])
        assert np.array_equal(decode(llm, B[N:]), after(path, B[:N], B[N:]))


def test_save_state_and_load_state(path: Path, types: dict[str, str]) -> None:
    with verified(path, **types) as llm:
        llm.eval(A[:N])
        state = llm.save_state()
        wanted = decode(llm, A[N:])
        llm.reset()
        llm.eval(B[:N])
        decode(llm, B[N:])
        llm.load_state(state)
        assert np.array_equal(decode(llm, A[N:]), wanted)
        assert llm.fasa.counters.stale_events > 0
    with verified(path, **types) as other:
        other.eval(B[:100])
        decode(other, B[100:102])
        other.load_state(state)
        assert np.array_equal(decode(other, A[N:]), wanted)


def sequence_state(llm: Llama) -> Any:
    context = llm._ctx.ctx
    size = llama_cpp.llama_state_seq_get_size(context, 0)
    data = (ctypes.c_uint8 * size)()
    assert llama_cpp.llama_state_seq_get_data(context, data, size, 0) == size
    return data


def test_sequence_state_set_into_another_context(path: Path, types: dict[str, str]) -> None:
    with verified(path, **types) as llm:
        llm.eval(A[:N])
        state = sequence_state(llm)
        wanted = decode(llm, A[N:])
    with verified(path, **types) as other:
        other.eval(B[:N])
        decode(other, B[N:])
        data = llama_cpp.llama_state_seq_set_data(other._ctx.ctx, state, len(state), 0)
        assert data == len(state)
        other.n_tokens = N
        assert nmse(decode(other, A[N:]), wanted) < SAME


def test_k_shift(types: dict[str, str], tmp_path: Path) -> None:
    """Keys are rotated in place. One layer: there keys hang on token and position only."""
    path = write_model(tmp_path / "model.gguf", NORM_ONE_LAYER)
    with verified(path, **types) as llm:
        llm.eval(A[:N])
        decode(llm, A[N : N + 4])
        memory = llama_cpp.llama_get_memory(llm._ctx.ctx)
        assert llama_cpp.llama_memory_can_shift(memory)
        assert llama_cpp.llama_memory_seq_rm(memory, 0, 100, 200)
        llama_cpp.llama_memory_seq_add(memory, 0, 200, -1, -100)
        llm.n_tokens -= 100
        before = llm.fasa.counters.stale_events
        found = decode(llm, A[N + 4 :])
        assert llm.fasa.counters.stale_events > before
    wanted = after(path, A[:100] + A[200 : N + 4], A[N + 4 :], **types)
    unshifted = after(path, A[: N + 4], A[N + 4 :], **types)
    # Keys are rounded once more, which may change a selection at its edge.
    assert nmse(found, wanted) < 0.02 < nmse(unshifted, wanted)


def test_sequences_side_by_side(path: Path) -> None:
    """Two sequences share the cells; the mask tells them apart."""
    with verified(path, embedding=True) as llm:  # the parent's way to several sequences
        memory = llama_cpp.llama_get_memory(llm._ctx.ctx)
        llm.eval(A[:N])
        llama_cpp.llama_memory_seq_cp(memory, 0, 1, -1, -1)
        llama_cpp.llama_memory_seq_rm(memory, 0, 200, -1)
        llm.n_tokens = 200
        llm.eval(B[200:300])
        llm.eval(B[300:301])
        assert llm.fasa.counters.nodes["sparse"] == 2
        visible = llm.fasa.counters.cells_visible
        assert visible == 2 * 4 * 301  # not the cells of sequence 1


def test_context_created_twenty_times(path: Path) -> None:
    profile = random_profile(path)
    wanted = None
    for _ in range(20):
        with opened(path, profile=profile, n_ctx=512, **SPARSE) as llm:
            llm.eval(A[:64])
            found = decode(llm, A[64:66])
            assert llm.fasa.counters.nodes["sparse"] == 4
        wanted = found if wanted is None else wanted
        assert np.array_equal(found, wanted)


@pytest.mark.parametrize("first_closed", [0, 1])
def test_two_models_interleaved(path: Path, first_closed: int, types: dict[str, str]) -> None:
    wanted = [after(path, t[:N], t[N:], **types) for t in (A, B)]
    settings = {"profile": random_profile(path), **SPARSE, **types}
    with opened(path, **settings) as one, opened(path, **settings) as two:
        models = (one, two)
        found: list[list[Any]] = [[], []]
        for llm, tokens in zip(models, (A, B), strict=True):
            llm.fasa.verify = True
            llm.eval(tokens[:N])
        for i in range(4):
            for llm, tokens, rows in zip(models, (A, B), found, strict=True):
                rows += list(decode(llm, tokens[N + i : N + i + 1]))
        models[first_closed].close()
        left = 1 - first_closed
        found[left] += list(decode(models[left], (A, B)[left][N + 4 :]))
        assert models[left].fasa.counters.verify_failures == 0
        assert models[left].fasa.counters.nodes["sparse"] == 2 * 8
    assert np.array_equal(found[left], wanted[left])
    assert np.array_equal(found[first_closed], wanted[first_closed][:4])


def test_closed_twice_and_asked_afterwards(path: Path) -> None:
    with opened(path, profile=random_profile(path)) as llm:
        llm.eval(A[:10])
        llm.close()
        llm.close()
        assert not llm.fasa.active
        assert llm.fasa.reason == "The model is closed."
        for ask in (lambda: llm.fasa.counters, lambda: llm.fasa.timings, llm.fasa.reset):
            with pytest.raises(RuntimeError, match=r"closed\.$"):
                ask()


def test_dropped_without_close(path: Path) -> None:
    llm = Llama(str(path), profile=random_profile(path), verbose=False, **SPARSE)
    session = llm._fasa.session
    assert session is not None
    del llm
    with pytest.raises(RuntimeError, match="closed"):
        session.counters()


def test_only_armed_contexts_are_decorated_and_closing_undecorates(path: Path) -> None:
    session = Session(None, Config())
    try:
        with opened_plain(path) as plain:
            plain.eval(A[:10])
            assert session.n_backends == 0
        with session.armed():
            armed = llama_cpp.Llama(str(path), n_threads=2, flash_attn=True, verbose=False)
        assert session.n_backends == 1
        armed.eval(A[:10])
        with opened_plain(path) as plain:
            plain.eval(A[:10])
        assert session.counters().graphs == 1
        armed.close()
        assert session.n_backends == 0
    finally:
        session.close()


def test_a_session_closed_first_leaves_a_working_context(path: Path) -> None:
    """Detaching restores the backend's own functions while the context lives on."""
    with opened_plain(path) as plain:
        plain.eval(A[:N])
        wanted = decode(plain, A[N:])
    session = Session(random_profile(path), Config(budget=64, min_ctx=0))
    with session.armed():
        llm: Any = llama_cpp.Llama(
            str(path), n_ctx=1024, n_threads=2, flash_attn=True, verbose=False
        )
    llm.eval(A[:N])
    assert nmse(decode(llm, A[N : N + 2]), wanted[:2]) > SAME
    session.close()
    llm.reset()
    llm.eval(A[:N])
    assert np.array_equal(decode(llm, A[N:]), wanted)
    llm.close()


def test_plain_llama_is_untouched_after_pyfasa(path: Path) -> None:
    with opened_plain(path, type_k=kv_type("q8_0", "")) as plain:
        plain.eval(A[:N])
        wanted = decode(plain, A[N:])
    with verified(path) as llm:
        llm.eval(A[:N])
        decode(llm, A[N:])
    with opened_plain(path, type_k=kv_type("q8_0", "")) as plain:
        plain.eval(A[:N])
        assert np.array_equal(decode(plain, A[N:]), wanted)
