"""llama-bench, llama-cli and llama-completion with the plugin: sparse and right, or dense where something is wrong."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pyfasa.documents import Document, ask, is_right
from pyfasa.native import Counters, reasons
from tools import THREADS, Tools, plugin

BENCH = ("-p", 0, "-n", 4, "-r", 1, "-fa", 1, "-t", THREADS, "-o", "json")


def lines(stderr: str) -> list[str]:
    return [line for line in stderr.splitlines() if line.startswith("pyfasa:")]


def test_bench_decodes_sparsely(tools: Tools, tiny_model_path: Path, tmp_path: Path) -> None:
    stats = tmp_path / "stats.json"
    env = plugin(tiny_model_path, stats=stats, verify=1)
    done = tools.run("llama-bench", "-m", tiny_model_path, "-d", 2500, *BENCH, env=env)
    assert lines(done.stderr) == []
    (row,) = json.loads(done.stdout)
    assert row["n_depth"] == 2500
    counters = json.loads(stats.read_text())["counters"]
    assert set(counters) == set(Counters.__dataclass_fields__)
    assert list(counters["nodes"]) == list(reasons())
    assert counters["nodes"]["sparse"] == 6 * 4  # layers and tokens; the warm-up is short
    assert counters["cells_verified"] > 0
    assert counters["verify_failures"] == 0


@pytest.mark.parametrize("tool", ["llama-cli", "llama-completion"])
def test_a_long_document(
    tool: str, tools: Tools, tiny_model_path: Path, documents: list[Document], tmp_path: Path
) -> None:
    """The same answer with and without the plugin, and the right one."""
    document, stats = documents[0], tmp_path / "stats.json"
    prompt = tmp_path / "prompt.txt"
    fact = document.facts[9]
    prompt.write_text(ask(fact.question, document.text)[0]["content"])
    line = ["-m", tiny_model_path, "-c", 8192, "-t", THREADS, "-fa", "on", "-f", prompt, "-n", 40]
    line += ["--temp", 0, "--single-turn", "--no-display-prompt", "--no-warmup", "--simple-io"]
    answers = [
        tools.run(tool, *line, env=env).stdout.replace(document.text, "")
        for env in (None, plugin(tiny_model_path, budget=512, stats=stats, verify=1))
    ]
    dense, sparse = (
        "\n".join(row for row in answer.splitlines() if "t/s" not in row) for answer in answers
    )
    assert is_right(sparse, fact)
    assert sparse == dense
    counters = json.loads(stats.read_text())["counters"]
    assert counters["nodes"]["sparse"] > 0
    assert counters["verify_failures"] == 0


@pytest.mark.parametrize(
    ("profile", "settings"),
    [
        (None, {}),
        ("none.gguf", {}),
        ("model", {"budget": "much"}),
        ("other", {}),
        ("plain", {}),
    ],
    ids=["no profile", "missing file", "text", "another model's", "a model without"],
)
def test_what_is_wrong_is_told_once(
    profile: str | None,
    settings: dict[str, object],
    tools: Tools,
    tiny_model_path: Path,
    plain_model_path: Path,
    documents: list[Document],
    tmp_path: Path,
) -> None:
    from support import random_profile, write_model

    other = tmp_path / "other.gguf"
    random_profile(write_model(tmp_path / "random.gguf")).save(other)
    paths = {"model": tiny_model_path, "other": other, "plain": plain_model_path}
    prompt = tmp_path / "prompt.txt"
    prompt.write_text(documents[0].text[:9000])
    line = ["-m", tiny_model_path, "-c", 8192, "-t", THREADS, "-fa", "on", "-f", prompt, "-n", 24]
    line += ["--temp", 0, "-no-cnv", "--no-warmup", "--no-display-prompt"]
    dense = tools.run("llama-completion", *line)
    where = None if profile is None else paths.get(profile, tmp_path / profile)
    env = plugin(where, **({"min_ctx": 0} | settings))
    done = tools.run("llama-completion", *line, env=env)
    assert done.stdout == dense.stdout
    assert len(lines(done.stderr)) == (0 if profile is None else 1)


LATE = """
import ctypes, sys
from pathlib import Path
folder, plugin = Path(sys.argv[1]), sys.argv[2]
base = ctypes.CDLL(str(folder / "libggml-base.so.0"), ctypes.RTLD_GLOBAL)
ggml = ctypes.CDLL(str(folder / "libggml.so.0"), ctypes.RTLD_GLOBAL)
ggml.ggml_backend_load(plugin.encode())
sys.stderr.write("the plugin is loaded\\n")
ggml.ggml_backend_load(str(folder / "libggml-cpu.so").encode())
sys.stderr.write("the device is there\\n")
ggml.ggml_backend_reg_by_name(b"none")
sys.stderr.write("ggml has looked at its backends\\n")
"""


def test_a_device_that_comes_later_is_served(tools: Tools, tiny_model_path: Path) -> None:
    env = plugin(tiny_model_path, log=1)
    done = subprocess.run(
        [sys.executable, "-c", LATE, str(tools.folder), env["GGML_BACKEND_PATH"]],
        env=os.environ | env,
        capture_output=True,
        text=True,
        check=True,
    )
    said = [row for row in done.stderr.splitlines() if not row.startswith("load_backend")]
    assert said[:2] == ["the plugin is loaded", "the device is there"]
    assert said[2].startswith("pyfasa: FASA for 'pyfasa-tiny-12m'")
    assert said[3] == "ggml has looked at its backends"
