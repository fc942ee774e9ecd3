"""Ctrl-C while the command is still being imported: no traceback, exit code 130."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# SIGINT comes when the module of this name is about to be imported
CHILD = """
import os, runpy, signal, sys

signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it

class Interrupting:
    def find_spec(self, name, *_):
        if name == moment:
            sys.meta_path.remove(self)
            os.kill(os.getpid(), signal.SIGINT)

sys.meta_path.insert(0, Interrupting())
moment, sys.argv = sys.argv[1], ["pyfasa", "--version"]
try:
    %s
finally:
    assert not any(isinstance(finder, Interrupting) for finder in sys.meta_path), "nobody imported it"
"""
AS_MODULE = "runpy.run_module('pyfasa', run_name='__main__', alter_sys=True)"
AS_SCRIPT = "from pyfasa.__main__ import main; main()"

# the last one while options are read
MOMENTS = ("pyfasa.cli", "typer", "rich.console", "pyfasa.options", "pyfasa.cli_bench")


@pytest.mark.parametrize("start", [AS_MODULE, AS_SCRIPT])
@pytest.mark.parametrize("moment", MOMENTS)
def test_ctrl_c_while_importing(moment: str, start: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", CHILD % start, moment], capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


def test_the_console_script_is_that_module() -> None:
    scripts = (ROOT / "pyproject.toml").read_text(encoding="utf-8").split("[project.scripts]")[1]
    assert re.match(r'\s*pyfasa = "pyfasa\.__main__:main"', scripts)
