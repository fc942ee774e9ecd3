"""The CUDA part where there is no GPU: what it says; and with one, tests/gpu/check.py on the bundled model."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pyfasa import machine, native
from pyfasa.handle import make_config

ROOT = Path(__file__).resolve().parents[1]
has_gpu = any(d.type == "GPU" and d.name.startswith("CUDA") for d in machine.devices())


def test_the_sentence_says_what_is_there() -> None:
    usable, sentence = native.cuda()
    assert sentence.endswith(".")
    if not has_gpu:
        assert not usable
        assert "no CUDA device" in sentence


def test_selecting_pays_later_on_a_gpu() -> None:
    """Later where a group of query heads reads a row of K or V once for all of them."""
    types = native.KV_TYPES
    assert native.pays_from_cuda(types["f16"], 4) == native.pays_from_cuda(types["bf16"], 4) == 6
    assert [native.pays_from_cuda(types["f16"], group) for group in (1, 3, 7, 8)] == [4, 5, 7, 8]
    assert {native.pays_from_cuda(types["q8_0"], group) for group in (1, 4, 8)} == {4}
    assert make_config(budget=100).min_ctx == 200
    assert make_config(budget=100, pays_from=7).min_ctx == 700
    assert make_config(budget=100, min_ctx=300, pays_from=7).min_ctx == 300


def test_a_head_start_can_be_switched_off(llm: Any) -> None:
    """And does nothing where there is no GPU."""
    assert llm.fasa.head_start
    for head_start in (True, False):
        llm.fasa.head_start = head_start
        assert llm.fasa.head_start == head_start
        llm.reset()
        llm.eval([1, 2, 3])
        for token in range(4, 10):
            llm.eval([token])
    llm.fasa.head_start = True
    if not has_gpu:
        assert llm.fasa.counters.head_starts == llm.fasa.counters.head_starts_undone == 0


@pytest.mark.skipif(not has_gpu, reason="llama.cpp has no CUDA device here")
@pytest.mark.parametrize("script", ["check", "head_start"])
def test_a_model_on_the_gpu(script: str) -> None:
    model = next((ROOT / "models").glob("*.gguf"))
    check = subprocess.run(
        [sys.executable, ROOT / "tests" / "gpu" / f"{script}.py", model],
        capture_output=True,
        text=True,
    )
    assert check.returncode == 0, check.stdout
