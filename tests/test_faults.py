"""What breaks from outside: memory that runs out, a host with other slots, callbacks that fail, a full disk."""

from __future__ import annotations

import ctypes
import os
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import pytest
from llama_cpp import LogitsProcessorList, StoppingCriteriaList

import caches
from caches import SAME, A, B
from pyfasa import Llama, Profile, native
from pyfasa.embed import embed, sidecar_path
from pyfasa.errors import HostError
from support import MAX_NMSE, decode, nmse, opened, opened_plain, random_profile

N = 150
ONE = {"n_threads": 1, "n_threads_batch": 1}
EVERYTHING = {**caches.EVERYTHING, **ONE}


def verified(path: Path, **arguments: Any) -> AbstractContextManager[Any]:
    return caches.verified(path, **{**ONE, **arguments})


# ---- no memory for the side index or its work space ---------------------------------------------


@pytest.fixture(autouse=True)
def _memory_is_back() -> Iterator[None]:
    yield
    native.fail_allocations(-1)


def test_memory_that_runs_out_at_any_allocation(path: Path, profile: Profile) -> None:
    """Each of the first allocations fails in turn; the token is dense, the next one sparse again."""
    with opened_plain(path) as plain:
        plain.eval(A[:N])
        wanted = decode(plain, A[N : N + 3])
    for successes in range(100):
        with verified(path, profile=profile, **EVERYTHING) as llm:
            llm.eval(A[:N])
            native.fail_allocations(successes)
            found = [decode(llm, A[N : N + 1])]
            native.fail_allocations(-1)
            during = llm.fasa.counters.nodes
            found.append(decode(llm, A[N + 1 : N + 3]))
            assert llm.fasa.counters.nodes["sparse"] == during["sparse"] + 2 * 2
            assert llm.fasa.counters.nodes["no_memory"] == during["no_memory"]
        rows = np.concatenate(found)
        assert during["no_memory"] + during["sparse"] == 2  # one node per layer
        assert nmse(rows, wanted) < MAX_NMSE
        if during["sparse"] == 0:
            assert np.array_equal(rows[0], wanted[0])
        if during["no_memory"] == 0:
            break
    assert 2 * 2 + 3 < successes < 100  # an array per layer and KV head, and the work space


@pytest.mark.parametrize("change", ["invalidate", "n_fc", "n_kv"])
def test_memory_that_runs_out_in_the_middle(change: str, path: Path, profile: Profile) -> None:
    """An index that was there must be made anew, or its work space must grow."""
    n = 250 if change == "n_kv" else N  # a graph of 256 cells becomes one of 512
    with verified(path, profile=profile) as llm:
        llm.eval(A[:n])
        decode(llm, A[n : n + 2])
        if change == "invalidate":
            llm._fasa.session.invalidate()
        if change == "n_fc":
            llm.fasa.n_fc = 5
        native.fail_allocations(0)
        llm.fasa.reset()
        decode(llm, A[n + 2 : n + 8])
        nodes = llm.fasa.counters.nodes
        assert nodes["no_memory"] == (4 if change == "n_kv" else 12)
        assert nodes["sparse"] + nodes["no_memory"] == 12
        native.fail_allocations(-1)
        decode(llm, B[:2])
        assert llm.fasa.counters.nodes["sparse"] == nodes["sparse"] + 4
        state = llm.save_state()
        found = decode(llm, B[2:4])
    with verified(path, profile=profile) as fresh:
        if change == "n_fc":
            fresh.fasa.n_fc = 5
        fresh.load_state(state)
        assert np.array_equal(decode(fresh, B[2:4]), found)


# ---- a host that is laid out differently ----------------------------------------------------------

GET_NAME, GET_DESCRIPTION, INIT_BACKEND = 0, 1, 5


@contextmanager
def slots() -> Iterator[Any]:
    """The functions of the CPU device, as addresses that may be changed inside the block."""
    library = ctypes.CDLL(str(next(Path(llama_cpp.__file__).parent.glob("lib/libggml-base.so*"))))
    library.ggml_backend_dev_by_type = ctypes.CDLL(
        str(next(Path(llama_cpp.__file__).parent.glob("lib/libggml.so*")))
    ).ggml_backend_dev_by_type
    library.ggml_backend_dev_by_type.restype = ctypes.POINTER(ctypes.c_void_p)
    device = library.ggml_backend_dev_by_type(0)
    before = device[:6]
    try:
        yield device
    finally:
        for i, address in enumerate(before):
            device[i] = address


def foreign() -> int:
    """The address of a function that is not ggml's."""
    address = ctypes.cast(ctypes.CDLL(None).abs, ctypes.c_void_p).value
    assert address is not None
    return address


@pytest.mark.parametrize("slot", [GET_NAME, GET_DESCRIPTION, INIT_BACKEND])
def test_a_slot_of_another_library_is_not_called(slot: int, path: Path, profile: Profile) -> None:
    different = r"laid out differently .* decoding stays dense"
    with slots() as device:
        device[slot] = foreign()
        with pytest.raises(HostError, match=different):
            native.self_test()
        with pytest.raises(HostError, match=different):
            Llama(str(path), profile=profile, verbose=False)
    native.self_test()
    with opened(path, profile=profile) as llm:
        assert llm.fasa.active


# ---- callbacks of the caller that fail --------------------------------------------------------------


class TheirError(Exception):
    """What a caller's own code raises."""


def failing(calls_before: int) -> Callable[..., Any]:
    calls = 0

    def fail(_: Any, scores: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls > calls_before:
            raise TheirError
        return scores

    return fail


def consume(llm: Llama, calls_before: int, **callbacks: Any) -> None:
    stream = llm.create_completion(A[:N], max_tokens=8, temperature=0, stream=True, **callbacks)
    for i, _ in enumerate(stream):
        if i == calls_before and not callbacks:
            raise TheirError


@pytest.mark.parametrize("calls_before", [0, 3])
@pytest.mark.parametrize("where", ["logits_processor", "stopping_criteria", "consumer"])
def test_a_callback_that_raises(
    where: str, calls_before: int, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ignored: list[Any] = []
    monkeypatch.setattr(sys, "unraisablehook", lambda told: ignored.append(told.exc_type))
    fail = failing(calls_before)
    callbacks: dict[str, Any] = {
        "logits_processor": {"logits_processor": LogitsProcessorList([fail])},
        "stopping_criteria": {
            "stopping_criteria": StoppingCriteriaList([lambda ids, x: fail(ids, x) is None])
        },
    }.get(where, {})
    with verified(path) as llm:
        # llama.cpp calls logits processors: Python cannot raise through it, and generation goes on
        with nullcontext() if where == "logits_processor" else pytest.raises(TheirError):
            consume(llm, calls_before, **callbacks)
        assert set(ignored) == ({TheirError} if where == "logits_processor" else set())
        decoded = [int(token) for token in llm._input_ids[N:]]
        found = decode(llm, B[:3])
    with verified(path) as fresh:
        fresh.eval(A[:N])
        wanted = decode(fresh, decoded + B[:3])[-3:]
    assert nmse(found, wanted) < SAME


@contextmanager
def aborting(llm: Llama, calls_before: int) -> Iterator[list[int]]:
    """Inside the block graphs end after so many nodes; the callback may ask for counters."""
    seen: list[int] = []

    def abort(_: Any) -> bool:
        seen.append(llm.fasa.counters.graphs)
        return len(seen) > calls_before

    callback = llama_cpp.ggml_abort_callback(abort)
    llama_cpp.llama_set_abort_callback(llm._ctx.ctx, callback, None)
    try:
        yield seen
    finally:
        llama_cpp.llama_set_abort_callback(llm._ctx.ctx, llama_cpp.ggml_abort_callback(), None)


def test_decoding_aborted_at_any_node(path: Path) -> None:
    """The index is not taken for up to date when its graph did not end; nor is K what it would be."""
    with verified(path) as fresh:
        fresh.eval(A[:N])
        wanted = decode(fresh, A[N : N + 40])
    n_aborted = 0
    with verified(path) as llm:
        llm.eval(A[:N])
        for i in range(40):
            with aborting(llm, 2 * i) as seen, suppress(RuntimeError):
                llm.eval(A[N + i : N + i + 1])  # "llama_decode returned 2"
            if llm.n_tokens == N + i:
                assert len(seen) == 2 * i + 1
                n_aborted += 1
                llm.eval(A[N + i : N + i + 1])
            rows = llama_cpp.llama_get_logits_ith(llm._ctx.ctx, -1)
            found = np.ctypeslib.as_array(rows, (llm.n_vocab(),))
            assert nmse(found, wanted[i]) < SAME
    assert n_aborted > 15


@pytest.mark.parametrize("calls_before", [0, 7, 31])
def test_prefill_aborted(calls_before: int, path: Path) -> None:
    with verified(path) as fresh:
        fresh.eval(A[:N])
        wanted = decode(fresh, A[N : N + 6])
    with verified(path) as llm:
        llm.eval(B[:N])
        decode(llm, B[N : N + 2])
        llm.reset()
        with aborting(llm, calls_before), pytest.raises(RuntimeError, match="llama_decode"):
            llm.eval(A[:N])
        llm.reset()
        llm.eval(A[:N])
        assert np.array_equal(decode(llm, A[N : N + 6]), wanted)


# ---- a full disk ------------------------------------------------------------------------------------


def limited(n_bytes: int, *arguments: object) -> subprocess.CompletedProcess[str]:
    """The `pyfasa` command in a process that cannot write longer files."""
    return subprocess.run(
        [sys.executable, "-m", "pyfasa", *(str(a) for a in arguments)],
        capture_output=True,
        text=True,
        timeout=60,
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join(sys.path),
            "PYTHONDONTWRITEBYTECODE": "1",
        },
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, n_bytes)),
        check=False,
    )


@pytest.mark.parametrize(
    ("command", "existing"),
    [("embed", False), ("embed", True), ("extract", True), ("remove", False), ("calibrate", True)],
)
def test_a_full_disk(command: str, existing: bool, copied: Path, tmp_path: Path) -> None:
    profile, out = random_profile(copied), tmp_path / "out.gguf"
    profile.save(sidecar_path(copied))
    if command in ("extract", "remove"):
        embed(copied, profile, copied, force=True)
    text = tmp_path / "text.txt"
    text.write_text("A text of no interest. " * 60)
    arguments: dict[str, list[object]] = {
        "embed": ["embed", copied, out],
        "extract": ["extract", copied, "-o", out],
        "remove": ["remove", copied, out],
        "calibrate": ["calibrate", copied, "--text", text, "-c", 512, "-o", out],
    }
    if existing:
        out.write_bytes(b"what was there before")
    before = {file: file.read_bytes() for file in tmp_path.iterdir()}
    result = limited(256, *arguments[command], *(["--force"] if existing else []))
    assert result.returncode == 1
    assert "error: " in result.stderr
    assert "out.gguf could not be written: File too large. Nothing was changed." in result.stderr
    assert "Traceback" not in result.stderr
    assert {file: file.read_bytes() for file in tmp_path.iterdir()} == before
