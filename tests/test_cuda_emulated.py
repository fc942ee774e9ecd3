"""Decoding on a CUDA device, with llama.cpp's own graphs, where there is no GPU: kernels run on the CPU."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import emulated
from test_cuda import has_gpu

SCRIPTS = ("check", "head_start")
FOLDER = Path(__file__).parent / "gpu"

pytestmark = [
    pytest.mark.skipif(has_gpu, reason="llama.cpp has a CUDA device here"),
    pytest.mark.skipif(sys.platform != "linux", reason="the emulation is built on Linux only"),
    pytest.mark.skipif(emulated.compiler() is None, reason="the emulation needs a C++ compiler"),
]


@pytest.fixture(scope="module")
def running(
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[dict[str, subprocess.Popen[str]]]:
    """All scripts, side by side."""
    site = emulated.make_site(tmp_path_factory.mktemp("emulated"))
    found = {name: emulated.start(site, FOLDER / f"{name}.py", "--quick") for name in SCRIPTS}
    yield found
    for process in found.values():
        process.kill()


@pytest.mark.parametrize("script", SCRIPTS)
def test_emulated_device(script: str, running: dict[str, subprocess.Popen[str]]) -> None:
    text, _ = running[script].communicate(timeout=600)
    found = text.splitlines()
    assert not [line for line in found if line.startswith("FAIL")]
    assert running[script].returncode == 0, "\n".join(found[-30:])
    assert len([line for line in found if line.startswith("ok")]) >= 40
