"""Ctrl-C at any moment: the process lives, the model goes on and says the same, no file is left half written."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from pyfasa import Llama
from pyfasa.documents import ask, make_document

SETTINGS: dict[str, Any] = {
    "n_ctx": 1024,
    "n_batch": 64,  # prefill in many calls, so that Python gets to see a signal between them
    "n_threads": 1,
    "n_threads_batch": 1,
    "budget": 96,
    "min_ctx": 0,
    "verbose": False,
}
PLACES = (0.02, 0.25, 0.5, 0.7, 0.9)  # of the time that an undisturbed call takes


# ---- what the children run ------------------------------------------------------------------------------


def interrupted(seconds: float, act: Callable[[], object]) -> bool:
    """Whether Ctrl-C after so many seconds ended act(), which is called again if it is done before."""
    timer = threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGINT))
    done = False
    try:
        timer.start()
        for _ in range(3):
            act()
        done = True
        timer.join()  # too late: it must still come in here
        time.sleep(0.01)
    except KeyboardInterrupt:
        pass
    return not done


def seconds_of(act: Callable[[], object]) -> float:
    start = time.perf_counter()
    act()
    return time.perf_counter() - start


def prompt_of(llm: Llama) -> list[int]:
    """A question about a document of 700 tokens."""
    document = make_document(lambda text: llm.tokenize(text.encode(), add_bos=False), 700, 4, 3)
    message = ask(document.facts[1].question, document.text)[0]["content"]
    return llm.tokenize(message.encode(), add_bos=True)


def interrupt_generation(model: str) -> None:
    """Interrupts loading, prefill and decoding in turn; after each the same model answers again."""
    llm = Llama(model, **SETTINGS)
    llm.fasa.verify = True
    prompt = prompt_of(llm)

    def answer() -> str:
        # the last token alone: a sparse row each time, whatever of the prompt is still in the cache
        llm.create_completion(prompt[:-1], max_tokens=1)
        found: Any = llm.create_completion(prompt, max_tokens=12, temperature=0)
        return str(found["choices"][0]["text"])

    def prefill() -> None:
        llm.reset()
        llm.eval(prompt)

    def decode() -> None:
        for _ in zip(range(60), llm.generate(prompt, top_k=1), strict=False):
            pass

    def load() -> None:
        other = Llama(model, **SETTINGS)
        other.eval(prompt[:70])
        other.close()

    wanted, hits = answer(), {"load": 0, "prefill": 0, "decode": 0}
    for act in (load, prefill, decode):
        usual = seconds_of(act)
        for place in PLACES:
            hit = interrupted(place * usual, act)
            assert answer() == wanted, f"another answer after {act.__name__} at {place}"
            hits[act.__name__] += hit
    counters = llm.fasa.counters
    print(json.dumps([hits, counters.nodes["sparse"], counters.verify_failures]))


def generate_for_ever(model: str) -> None:
    llm = Llama(model, **SETTINGS)
    prompt = prompt_of(llm)
    while True:
        llm.reset()
        print("start", flush=True)
        for _ in llm.create_completion(prompt, max_tokens=40, temperature=0, stream=True):
            pass


# ---- the tests ---------------------------------------------------------------------------------------------


@contextmanager
def child(*arguments: object) -> Iterator[subprocess.Popen[str]]:
    """A Python process that finds pyfasa and these tests; killed at the end if it still runs."""
    process = subprocess.Popen(
        [sys.executable, *(str(a) for a in arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        # Programs that a shell starts in the background ignore Ctrl-C, and so would their children.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def function(name: str, model: Path) -> tuple[str, ...]:
    return ("-c", f"import sys, test_interrupts as t; t.{name}(sys.argv[1])", str(model))


def test_generation_interrupted_at_many_places(tiny_model_path: Path) -> None:
    with child(*function("interrupt_generation", tiny_model_path)) as process:
        out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    hits, n_sparse, n_failures = json.loads(out)
    assert n_failures == 0
    assert n_sparse > 0
    assert min(hits.values()) > len(PLACES) / 2, "too few interruptions to tell"


@pytest.mark.parametrize(
    ("signal_number", "seconds"),
    [(signal.SIGINT, 0.0), (signal.SIGINT, 0.31), (signal.SIGTERM, 0.17)],
)
def test_a_signal_that_nobody_catches(
    signal_number: signal.Signals, seconds: float, tiny_model_path: Path
) -> None:
    """It ends the process as it ends every Python process, with the model still open."""
    with child(*function("generate_for_ever", tiny_model_path)) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "start\n"
        time.sleep(seconds)
        process.send_signal(signal_number)
        _, err = process.communicate(timeout=20)
    assert process.returncode == -signal_number
    assert ("KeyboardInterrupt" in err) == (signal_number == signal.SIGINT)


def wait_for_library(process: subprocess.Popen[str], name: str) -> None:
    """Until the process has mapped a file: it is past the imports that every command begins with."""
    maps = Path(f"/proc/{process.pid}/maps")
    deadline = time.monotonic() + 30
    while name not in maps.read_text():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.002)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs /proc")
@pytest.mark.parametrize("seconds", [0.0, 0.7])
@pytest.mark.parametrize("command", ["calibrate", "demo"])
def test_commands(command: str, seconds: float, plain_model_path: Path, tmp_path: Path) -> None:
    model, out = tmp_path / "model.gguf", tmp_path / "out.gguf"
    model.write_bytes(plain_model_path.read_bytes())
    out.write_bytes(b"what was there before")
    arguments = {
        "calibrate": ["calibrate", model, "-c", 4096, "-o", out, "--force"],
        "demo": ["demo", "--tokens", 4000, "-t", 1],
    }[command]
    before = {file: file.read_bytes() for file in tmp_path.iterdir()}
    with child("-m", "pyfasa", *arguments) as process:
        wait_for_library(process, "libllama")
        time.sleep(seconds)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=30)
    assert process.returncode == 130
    told = [
        line
        for line in err.split("\n")
        if line.strip() and not line.startswith(("memory: ", "time: "))
    ]
    assert told in ([], ["interrupted"])
    assert {file: file.read_bytes() for file in tmp_path.iterdir()} == before
