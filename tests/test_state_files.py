"""A cache saved and restored in every way that llama.cpp and llama-cpp-python have."""

from __future__ import annotations

import copy
import ctypes
import pickle
from collections.abc import Callable
from pathlib import Path

import llama_cpp
import numpy as np
import pytest
from llama_cpp.llama_cache import BaseLlamaCache, LlamaDiskCache, LlamaRAMCache

from caches import (
    EVERYTHING,
    SAME,
    SHAPES,
    SPARSE,
    A,
    B,
    N,
    after,
    both,
    plain,
    sequence_state,
    verified,
    written,
)
from support import MAX_NMSE, decode, nmse, opened, random_profile

Restore = Callable[[llama_cpp.Llama], bool]
Keep = Callable[[llama_cpp.Llama, Path], Restore]


@pytest.fixture(scope="module", params=SHAPES, ids=str)
def path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(tmp_path_factory.mktemp("model"), request.param)


# ---- ways to keep a cache; each gives a way to restore it, which says whether it worked ----------


def by_save_state(llm: llama_cpp.Llama, _: Path) -> Restore:
    state = llm.save_state()

    def restore(other: llama_cpp.Llama) -> bool:
        try:
            other.load_state(state)
        except RuntimeError:
            return False
        return True

    return restore


def by_file(llm: llama_cpp.Llama, folder: Path) -> Restore:
    file = str(folder / "state").encode()
    n_tokens = llm.n_tokens
    tokens = (llama_cpp.llama_token * n_tokens)(*llm.input_ids[:n_tokens].tolist())
    assert llama_cpp.llama_state_save_file(llm._ctx.ctx, file, tokens, n_tokens)

    def restore(other: llama_cpp.Llama) -> bool:
        found = (llama_cpp.llama_token * other.n_ctx())()
        n = ctypes.c_size_t()
        done = llama_cpp.llama_state_load_file(
            other._ctx.ctx, file, found, len(found), ctypes.byref(n)
        )
        if done:
            assert found[: n.value] == tokens[:]
            other.n_tokens = n.value
        return bool(done)

    return restore


def by_sequence(llm: llama_cpp.Llama, _: Path) -> Restore:
    state, n_tokens = sequence_state(llm), llm.n_tokens

    def restore(other: llama_cpp.Llama) -> bool:
        other.n_tokens = n_tokens
        return llama_cpp.llama_state_seq_set_data(other._ctx.ctx, state, len(state), 0) > 0

    return restore


def by_sequence_file(llm: llama_cpp.Llama, folder: Path) -> Restore:
    file = str(folder / "sequence").encode()
    n_tokens = llm.n_tokens
    tokens = (llama_cpp.llama_token * n_tokens)(*llm.input_ids[:n_tokens].tolist())
    assert llama_cpp.llama_state_seq_save_file(llm._ctx.ctx, file, 0, tokens, n_tokens) > 0

    def restore(other: llama_cpp.Llama) -> bool:
        found = (llama_cpp.llama_token * other.n_ctx())()
        n = ctypes.c_size_t()
        size = llama_cpp.llama_state_seq_load_file(
            other._ctx.ctx, file, 0, found, len(found), ctypes.byref(n)
        )
        if size > 0:
            assert found[: n.value] == tokens[:]
            other.n_tokens = n.value
        return size > 0

    return restore


def on_device(llm: llama_cpp.Llama, _: Path) -> Restore:
    """The cells stay in buffers of the context; the bytes hold only what describes them.

    llama.cpp copies a part of them only when they are quantized.
    """
    flags = llama_cpp.LLAMA_STATE_SEQ_FLAGS_ON_DEVICE
    n_tokens, context = llm.n_tokens, llm._ctx.ctx
    size = llama_cpp.llama_state_seq_get_size_ext(context, 0, flags)
    state = (ctypes.c_uint8 * size)()
    assert llama_cpp.llama_state_seq_get_data_ext(context, state, size, 0, flags) == size

    def restore(other: llama_cpp.Llama) -> bool:
        other.n_tokens = n_tokens
        return llama_cpp.llama_state_seq_set_data_ext(other._ctx.ctx, state, size, 0, flags) > 0

    return restore


ACROSS = [by_save_state, by_file, by_sequence, by_sequence_file]


@pytest.mark.parametrize("keep", [*ACROSS, on_device])
def test_into_the_same_context(
    keep: Keep, path: Path, types: dict[str, str], tmp_path: Path
) -> None:
    if keep is on_device:
        types = both("f16")
    with verified(path, **types) as llm:
        llm.eval(A[:N])
        restore = keep(llm, tmp_path)
        wanted = decode(llm, A[N:])
        llm.reset()
        llm.eval(B[:N])
        decode(llm, B[N:])
        before = llm.fasa.counters.stale_events
        assert restore(llm)
        assert llm.fasa.counters.stale_events > before
        assert nmse(decode(llm, A[N:]), wanted) < SAME


@pytest.mark.parametrize("keep", ACROSS)
@pytest.mark.parametrize("n_before", [0, 102])
def test_into_another_context(
    n_before: int, keep: Keep, one: Path, types: dict[str, str], tmp_path: Path
) -> None:
    """One that is new, or one with an index already; its cache has another size."""
    with verified(one, **types) as llm:
        llm.eval(A[:N])
        restore = keep(llm, tmp_path)
        wanted = decode(llm, A[N:])
    n_ctx = 1024 if keep is by_save_state else 768  # input_ids are as long as the context
    with verified(one, n_ctx=n_ctx, **types) as other:
        if n_before:
            other.eval(B[: n_before - 2])
            decode(other, B[n_before - 2 : n_before])
        assert restore(other)
        assert nmse(decode(other, A[N:]), wanted) < SAME


@pytest.mark.parametrize("keep", ACROSS)
def test_from_llama_cpp_and_back(
    keep: Keep, one: Path, types: dict[str, str], tmp_path: Path
) -> None:
    with plain(one, **types) as dense:
        dense.eval(A[:N])
        restore = keep(dense, tmp_path)
        densely = decode(dense, A[N:])
    with verified(one, **types) as llm:
        llm.eval(B[:N])
        decode(llm, B[N:])
        assert restore(llm)
        found = decode(llm, A[N:])
        llm.n_tokens = N
        with llm.dense():
            assert np.array_equal(decode(llm, A[N:]), densely)
        llm.n_tokens = N
        decode(llm, A[N : N + 4])
        restore = keep(llm, tmp_path)
        with llm.dense():
            wanted = decode(llm, A[N + 4 :])
    assert nmse(found, after(one, A[:N], A[N:], **types)) < SAME
    with plain(one, **types) as dense:
        assert restore(dense)
        assert np.array_equal(decode(dense, A[N + 4 :]), wanted)


# ---- what llama.cpp refuses ----------------------------------------------------------------------


@pytest.mark.parametrize("keep", ACROSS)
@pytest.mark.parametrize(
    ("type_k", "type_v"), [("f16", "q8_0"), ("q8_0", "f16"), ("q4_0", "q4_0")], ids=str
)
def test_a_state_of_other_types(
    type_k: str, type_v: str, keep: Keep, one: Path, tmp_path: Path
) -> None:
    """Where only V differs a file has overwritten K before the refusal."""
    with plain(one, type_k=type_k, type_v=type_v) as dense:
        dense.eval(A[:N])
        restore = keep(dense, tmp_path)
    with verified(one) as llm:
        llm.eval(B[:N])
        decode(llm, B[N:])
        assert not restore(llm)
        llm.reset()
        llm.eval(B[:N])
        found = decode(llm, B[N:])
    assert nmse(found, after(one, B[:N], B[N:])) < SAME


@pytest.mark.parametrize("share", [0.01, 0.2, 0.4, 0.95])
def test_a_file_that_ends_too_early(
    share: float, one: Path, types: dict[str, str], tmp_path: Path
) -> None:
    """Some keys are those of the file, others stay: as in llama.cpp, which leaves it at that.

    With the file of a sequence llama.cpp aborts.
    """
    results = []
    with plain(one, **types) as dense:
        dense.eval(A[:N])
        restore = by_file(dense, tmp_path)
        (file,) = tmp_path.iterdir()
        content = file.read_bytes()
        file.write_bytes(content[: int(len(content) * share)])
    for opener in (plain, verified):
        settings = types if opener is plain else {**EVERYTHING, **types}
        with opener(one, **settings) as llm:
            llm.eval(B[:N])
            decode(llm, B[N : N + 2])
            assert not restore(llm)
            size = llama_cpp.llama_memory_seq_pos_max(llama_cpp.llama_get_memory(llm._ctx.ctx), 0)
            llm.n_tokens = size + 1
            mixed = decode(llm, B[N + 2 :])
            llm.reset()
            llm.eval(B[:N])
            results.append((mixed, decode(llm, B[N:])))
    for wanted, found in zip(*results, strict=True):
        assert nmse(found, wanted) <= MAX_NMSE


# ---- completions with a cache --------------------------------------------------------------------


def completed(llm: llama_cpp.Llama, prompt: list[int]) -> list[int]:
    """The tokens of a completion, but for the last one, which is not evaluated."""
    llm.create_completion(prompt, max_tokens=6, temperature=0.0)
    return llm.input_ids[len(prompt) : llm.n_tokens].tolist()


@pytest.mark.parametrize("kind", ["ram", "disk"])
def test_two_prompts_by_turns(kind: str, path: Path, types: dict[str, str], tmp_path: Path) -> None:
    prompts = (A[:300], B[:300])
    cache: BaseLlamaCache = LlamaRAMCache() if kind == "ram" else LlamaDiskCache(str(tmp_path))
    with verified(path, **types) as llm:
        llm.set_cache(cache)
        rounds = [[completed(llm, prompt) for prompt in prompts] for _ in range(3)]
        assert llm.fasa.counters.stale_events > 0  # states were loaded
        assert llm.fasa.counters.nodes["prefill"] == 2 * 2  # and prompts not evaluated again
    for i, prompt in enumerate(prompts):
        with verified(path, **types) as fresh:
            assert rounds[0][i] == completed(fresh, prompt)
        with verified(path, **types) as fresh:
            fresh.eval(prompt[:-1])  # from the cache, the last token is decoded alone
            assert rounds[1][i] == rounds[2][i] == completed(fresh, prompt)


# ---- copies --------------------------------------------------------------------------------------


@pytest.mark.parametrize("copied", ["pickle", "copy", "deepcopy"])
def test_a_copy_goes_on_from_a_state(copied: str, path: Path, types: dict[str, str]) -> None:
    """Copies are new contexts, as upstream; a state moves between them."""
    with opened(path, profile=random_profile(path), **SPARSE, **types) as llm:
        llm.eval(A[:N])
        state = llm.save_state()
        wanted = decode(llm, A[N:])
        if copied == "pickle":
            twin, state = pickle.loads(pickle.dumps((llm, state)))
        else:
            twin = getattr(copy, copied)(llm)
    try:  # the original is closed
        twin.fasa.verify = True
        assert twin.n_tokens == 0
        twin.load_state(state)
        assert np.array_equal(decode(twin, A[N:]), wanted)
        counters = twin.fasa.counters
        assert counters.nodes["sparse"] == 2 * 8
        assert counters.verify_failures == 0
    finally:
        twin.close()
