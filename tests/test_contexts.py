"""Contexts that come and go, side by side and in threads, and what is left of them."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import pytest

from caches import SAME, SHAPES, SPARSE, TINY, A, B, N, after, both, verified, written
from pyfasa import Llama
from pyfasa.llama import kv_type
from pyfasa.native import Config, Session
from support import F32, decode, nmse, opened, opened_plain, random_profile


@pytest.fixture(scope="module", params=SHAPES, ids=str)
def path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(tmp_path_factory.mktemp("model"), request.param)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(tmp_path_factory.mktemp("model"), TINY)


# ---- two at once ---------------------------------------------------------------------------------


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


def decode_again_and_again(path: Path, tokens: list[int], rounds: int, **arguments: Any) -> F32:
    """The result of every round, which starts at the same prompt."""
    with verified(path, **arguments) as llm:
        llm.eval(tokens[:N])
        found = []
        for _ in range(rounds):
            llm.n_tokens = N
            found.append(decode(llm, tokens[N : N + 3]))
        assert llm.fasa.counters.nodes["sparse"] == 2 * 3 * rounds
    return np.array(found)


@pytest.mark.parametrize("n_threads", [1, 2])
def test_two_python_threads(n_threads: int, one: Path) -> None:
    """Each with its own model, of its own types."""
    work = [(A, both("f16")), (B, both("q8_0"))]
    alone = [
        decode_again_and_again(one, tokens, 1, n_threads=n_threads, **types)
        for tokens, types in work
    ]
    with ThreadPoolExecutor(2) as pool:
        together = [
            pool.submit(decode_again_and_again, one, tokens, 30, n_threads=n_threads, **types)
            for tokens, types in work
        ]
    for result, wanted in zip(together, alone, strict=True):
        assert np.array_equal(result.result(), np.repeat(wanted, 30, axis=0))


def test_models_open_and_close_while_another_decodes(one: Path, tiny: Path) -> None:
    wanted = decode_again_and_again(one, A, 1)

    def come_and_go() -> int:
        for _ in range(12):
            after(tiny, A[:40], A[40:42], n_ctx=256, n_threads=1)
            with opened_plain(tiny, n_ctx=256, n_threads=1) as plain:
                plain.eval(A[:40])
        return 12

    with ThreadPoolExecutor(2) as pool:
        others = pool.submit(come_and_go)
        found = pool.submit(decode_again_and_again, one, A, 30)
    assert others.result() == 12
    assert np.array_equal(found.result(), np.repeat(wanted, 30, axis=0))


@pytest.mark.parametrize("how", ["close", "drop"])
def test_made_used_and_closed_in_three_threads(how: str, one: Path) -> None:
    def make() -> Llama:
        return Llama(str(one), profile=random_profile(one), n_ctx=1024, verbose=False, **SPARSE)

    def use(llm: Llama) -> F32:
        llm.fasa.verify = True
        llm.eval(A[:N])
        found = decode(llm, A[N:])
        assert llm.fasa.counters.verify_failures == 0
        return found

    def end(models: list[Llama]) -> None:
        llm = models.pop()
        if how == "close":
            llm.close()

    def in_a_thread(call: Callable[..., Any], *arguments: Any) -> Any:
        with ThreadPoolExecutor(1) as pool:  # a thread that ends with the block
            return pool.submit(call, *arguments).result()

    models = [in_a_thread(make)]
    session = models[0]._fasa.session
    assert np.array_equal(in_a_thread(use, models[0]), after(one, A[:N], A[N:], n_threads=1))
    in_a_thread(end, models)
    assert session is not None
    assert session.closed


# ---- one after the other -------------------------------------------------------------------------


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


# ---- attached and detached -----------------------------------------------------------------------


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
    session = Session(random_profile(path), Config(**SPARSE))
    with session.armed():
        llm: Any = llama_cpp.Llama(
            str(path), n_ctx=1024, n_threads=2, flash_attn=True, verbose=False
        )
    llm.eval(A[:N])
    assert nmse(decode(llm, A[N : N + 2]), wanted[:2]) > SAME
    state = llm.save_state()
    session.close()
    llm.load_state(state)  # the buffers' functions too
    llm.reset()
    llm.eval(A[:N])
    assert np.array_equal(decode(llm, A[N:]), wanted)
    llm.close()
    with verified(path) as again:
        again.load_state(state)
        assert nmse(decode(again, A[N + 2 :]), after(path, A[:N], A[N:])[2:]) < SAME


@pytest.mark.parametrize("how", ["enabled", "dense", "use"])
def test_switched_off_while_the_cache_changes(how: str, path: Path, types: dict[str, str]) -> None:
    """What is written densely in between is in the index when FASA is switched on again."""
    with verified(path, **types) as llm:
        llm.eval(A[:N])
        decode(llm, A[N:])
        profile = llm.fasa.profile

        def densely() -> F32:
            llm.n_tokens = 100
            llm.eval(B[100:300])
            return decode(llm, B[300:310])

        if how == "enabled":
            llm.fasa.enabled = False
            between = densely()
            llm.fasa.enabled = True
        elif how == "dense":
            with llm.dense():
                between = densely()
        else:
            llm.fasa.use(None)
            between = densely()
            llm.fasa.use(profile)
        found = decode(llm, B[310:314])
    with verified(path, **types) as fresh:
        with fresh.dense():
            fresh.eval(A[:100] + B[100:300])
            wanted = decode(fresh, B[300:310])
        assert nmse(between, wanted) < SAME
        assert nmse(decode(fresh, B[310:314]), found) < SAME


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
