"""pyfasa env and pyfasa exec, with tools that are scripts."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from pyfasa.errors import HostError
from pyfasa.plugin import has_ggml_inside, library_path, loading, model_of
from pyfasa.profile import Profile

TOOL = """#!/bin/sh
exec {python} -c 'import json, os, sys; print(json.dumps([sys.argv[1:], dict(os.environ)]))' "$@"
"""


def pyfasa(*arguments: object) -> subprocess.CompletedProcess[str]:
    env = {k: v for k, v in os.environ.items() if not k.startswith(("PYFASA_", "GGML_", "LLAMA_"))}
    return subprocess.run(
        [sys.executable, "-m", "pyfasa", *map(str, arguments)],
        capture_output=True,
        text=True,
        env=env,
        timeout=120,
        check=False,
    )


def executed(*arguments: object) -> tuple[list[str], dict[str, str], str]:
    """Arguments and variables of plugin and llama.cpp that the tool got, and stderr."""
    done = pyfasa("exec", *arguments)
    assert done.returncode == 0, done.stderr
    got, variables = json.loads(done.stdout)
    kept = ("PYFASA_", "GGML_", "LLAMA_")
    return got, {k: v for k, v in variables.items() if k.startswith(kept)}, done.stderr


@pytest.fixture
def tool(tmp_path: Path) -> Path:
    path = tmp_path / "llama-tool"
    path.write_text(TOOL.format(python=sys.executable))
    path.chmod(0o755)
    return path


@pytest.fixture
def owner(copied: Path, profile: Profile) -> Path:
    """A model with a profile beside it, and a blank in its path."""
    target = copied.with_name("my model.gguf")
    copied.rename(target)
    profile.save(target.with_name("my model-fasa.gguf"))
    return target


def test_env_prints_what_a_shell_can_read(owner: Path) -> None:
    done = pyfasa("env", owner, "--budget", 256, "--log", "--stats", "a b.json")
    assert done.returncode == 0
    script = (
        done.stdout
        + 'echo "$GGML_BACKEND_PATH|$PYFASA_PROFILE|$PYFASA_BUDGET|$PYFASA_LOG|$PYFASA_STATS"'
    )
    shell = subprocess.run(["sh", "-c", script], capture_output=True, text=True, check=True)
    sidecar = owner.with_name("my model-fasa.gguf")
    stats = Path("a b.json").resolve()
    assert shell.stdout.strip() == f"{library_path()}|{sidecar}|256|1|{stats}"
    assert "PYFASA_MIN_CTX" not in done.stdout


def test_env_refuses_a_model_without_profile(path: Path) -> None:
    done = pyfasa("env", path)
    assert done.returncode == 1
    assert done.stdout == ""
    assert "has no FASA profile" in done.stderr


def test_env_refuses_the_profile_of_another_model(
    path: Path, other_profile: Profile, tmp_path: Path
) -> None:
    other_profile.save(tmp_path / "other.gguf")
    done = pyfasa("env", path, "--profile", tmp_path / "other.gguf")
    assert done.returncode == 1
    assert "does not fit" in done.stderr


@pytest.mark.parametrize("dashes", [["--"], []], ids=["dashes", "no dashes"])
def test_exec_runs_the_tool_with_its_own_options(
    tool: Path, owner: Path, dashes: list[str]
) -> None:
    line = [tool, "-m", owner, "--budget", "7", "-c", "4096", "--help"]
    got, variables, err = executed("--budget", 64, "--min-ctx", 0, *dashes, *line)
    assert got == [str(word) for word in line[1:]]
    assert variables == {
        "GGML_BACKEND_PATH": str(library_path()),
        "PYFASA_PROFILE": str(owner.with_name("my model-fasa.gguf")),
        "PYFASA_BUDGET": "64",
        "PYFASA_MIN_CTX": "0",
    }
    assert err == ""


def test_exec_of_a_server_that_has_no_model(tool: Path, owner: Path) -> None:
    sidecar = owner.with_name("my model-fasa.gguf")
    for words in (["--model", owner], ["--profile", sidecar]):
        _, variables, err = executed(*words, "--", tool, "-p", "50052")
        assert variables["PYFASA_PROFILE"] == str(sidecar)
        assert err == ""


def test_exec_without_a_profile_runs_dense(tool: Path, path: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "damaged.gguf"
    damaged.write_bytes(b"GGUF")
    for line, words in (
        (["-m", path], "has no FASA profile"),
        (["-m", damaged], "is not a GGUF file"),
        (["-m", tmp_path / "none.gguf"], "cannot be read"),
        ([], "Neither a model nor a profile is named"),
    ):
        _, variables, err = executed("--", tool, *line)
        assert variables == {}
        (sentence,) = err.splitlines()
        assert words in sentence
        assert sentence.startswith("pyfasa: ")
        assert sentence.endswith("Decoding is dense.")


def test_exec_of_nothing(owner: Path) -> None:
    done = pyfasa("exec", "--model", owner, "--", "no-such-tool")
    assert done.returncode == 1
    assert "no-such-tool cannot be run" in done.stderr


def test_exit_codes_are_those_of_the_tool(tool: Path, owner: Path) -> None:
    tool.write_text("#!/bin/sh\nexit 7\n")
    assert pyfasa("exec", "--", tool, "-m", owner).returncode == 7


def test_a_tool_with_ggml_inside_is_told(tool: Path, owner: Path) -> None:
    """The marker behind a real program, which does not mind."""
    shutil.copy(shutil.which("env") or "/usr/bin/env", tool)
    assert not has_ggml_inside(tool)
    with open(tool, "ab") as file:
        file.write(b"GGML_BACKEND_PATH")
    assert has_ggml_inside(tool)
    done = pyfasa("exec", "--model", owner, "--", tool)
    assert done.returncode == 0
    assert "has ggml linked inside" in done.stderr
    assert "GGML_BACKEND_PATH=" not in done.stdout


def test_scripts_and_missing_tools_have_no_ggml_inside(tool: Path) -> None:
    tool.write_text("#!/bin/sh\n# GGML_BACKEND_PATH\n")
    assert not has_ggml_inside(tool)
    assert not has_ggml_inside("no-such-tool")


@pytest.mark.parametrize(
    ("words", "found"),
    [
        ([], None),
        (["-m", "a"], "a"),
        (["--model", "a", "-c", "5", "-m", "b"], "b"),
        (["--model=a"], "a"),
        (["-c", "5", "-m"], None),
    ],
)
def test_model_of_a_command(words: Sequence[str], found: str | None) -> None:
    assert model_of(["llama-cli", *words], {}) == found
    assert model_of(["llama-cli", *words], {"LLAMA_ARG_MODEL": "z"}) == (found or "z")


def test_builds_with_linked_backends_are_made_to_load(tmp_path: Path) -> None:
    """llama-cpp-python's own libllama is such a build; a script is none."""
    import llama_cpp

    library = tmp_path / "libllama.so"
    shutil.copy(Path(llama_cpp.__file__).parent / "lib" / "libllama.so", library)
    library.chmod(0o755)
    folder = Path(llama_cpp.__file__).parent / "lib"
    for file in folder.glob("libggml*"):
        shutil.copy(file, tmp_path)
    name = "LLAMA_ARG_OVERRIDE_TENSOR"
    assert list(loading(library, {})) == [name]
    assert loading(library, {name: "own"}) == {}
    assert loading(sys.executable, {}) == {}
    assert loading("no-such-tool", {}) == {}


def test_other_systems_have_no_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(HostError, match=r"exists on Linux only; use pyfasa\.Llama here\.$"):
        library_path()
