"""What a strict type checker says of a user's program; the types come from the package as it is installed."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("mypy", reason="mypy is not installed; pip install 'pyfasa[dev]' brings it.")

SAMPLE = Path(__file__).with_name("typing_sample.py")
WRONG = """
import pyfasa

pyfasa.Llama("model.gguf", budget="many")  # arg-type
pyfasa.Llama("model.gguf", profile=1.5)  # arg-type
llm = pyfasa.Llama("model.gguf", n_ctx=4096)
llm.fasa.budget = "many"  # assignment
llm.fasa.active = True  # misc
llm.fasa.speed  # attr-defined
pyfasa.calibrate("model.gguf", bits="4")  # arg-type
pyfasa.Profile.load(None)  # arg-type
pyfasa.patch(llm)  # call-arg
pyfasa.Lama  # attr-defined
"""


@pytest.mark.slow
def test_mypy(tmp_path: Path) -> None:
    wrong = tmp_path / "wrong.py"
    wrong.write_text(WRONG)
    command = [sys.executable, "-m", "mypy", "--strict", "--config-file=", "--cache-dir=cache"]
    done = subprocess.run(
        [*command, SAMPLE, wrong], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1, done.stdout + done.stderr
    found = re.findall(r"^(.+?):(\d+): error: .*\[([\w-]+)\]$", done.stdout, re.MULTILINE)
    lines = WRONG.splitlines()
    expected = [
        ("wrong.py", str(i + 1), lines[i].split("# ")[1])
        for i in range(len(lines))
        if re.search(r"# [\w-]+$", lines[i])
    ]
    assert len(expected) == 9
    assert [error for error in found if error[0] != "wrong.py"] == [], done.stdout
    assert found == expected, done.stdout
