"""libpyfasa, loaded by llama.cpp as a backend into a process that knows nothing of pyfasa."""

from __future__ import annotations

import inspect
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest

import zoo
from pyfasa import Llama
from pyfasa._native import lib
from pyfasa.handle import make_config
from pyfasa.native import Counters, Timings, ggml_versions, reasons
from pyfasa.plugin import library_path
from pyfasa.profile import Profile
from support import MAX_NMSE, NEOX_PARTIAL, NORM_ONE_LAYER, Shape, nmse, random_profile, write_model

HOST = Path(__file__).parent / "plugin_host.py"
SPARSE = {"budget": 64, "min_ctx": 0, "sinks": 4, "recent": 8}


def run(model: Path, *arguments: str, **settings: object) -> tuple[list[float], str]:
    """Logits and stderr of a process with the plugin; settings as in docs/plugin.md, without PYFASA_."""
    env = {k: v for k, v in os.environ.items() if not k.startswith(("PYFASA_", "GGML_"))}
    env["GGML_BACKEND_PATH"] = str(library_path())
    env |= {f"PYFASA_{name.upper()}": str(value) for name, value in settings.items()}
    done = subprocess.run(
        [sys.executable, HOST, model, *arguments],
        env=env,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    logits: list[float] = json.loads(done.stdout)
    return logits, done.stderr


def lines(stderr: str) -> list[str]:
    return [line for line in stderr.splitlines() if line.startswith("pyfasa:")]


@pytest.fixture(scope="module")
def sidecar(profile: Profile, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sidecar") / "profile.gguf"
    profile.save(path)
    return path


@pytest.fixture(scope="module")
def dense(path: Path) -> list[float]:
    return run(path)[0]


def test_a_full_budget_computes_what_dense_does(
    path: Path, sidecar: Path, dense: list[float], tmp_path: Path
) -> None:
    stats = tmp_path / "stats.json"
    found, stderr = run(
        path, profile=sidecar, budget=1024, min_ctx=0, max_rows=1, stats=stats, verify=1
    )
    assert lines(stderr) == []
    assert nmse(found, dense) < MAX_NMSE
    counters = json.loads(stats.read_text())["counters"]
    assert counters["nodes"]["sparse"] == 12  # 2 layers, 6 decoded tokens
    assert counters["cells_attended"] == counters["cells_visible"] > 0
    assert counters["verify_failures"] == 0


def test_a_small_budget_is_sparse(
    path: Path, sidecar: Path, dense: list[float], tmp_path: Path
) -> None:
    stats = tmp_path / "stats.json"
    found, stderr = run(path, profile=sidecar, **SPARSE, stats=stats, log=1)
    assert nmse(found, dense) > MAX_NMSE
    first, last = lines(stderr)
    assert "'random-0'" in first
    assert str(sidecar) in first
    assert "sparse 12" in last
    counters = json.loads(stats.read_text())["counters"]
    assert counters["cells_attended"] == 64 * 4 * 12


def test_statistics_have_the_names_of_python(path: Path, sidecar: Path, tmp_path: Path) -> None:
    stats = tmp_path / 'a "name".json'
    run(path, "+signal", profile=sidecar, **SPARSE, stats=stats)
    for file in (stats, stats.with_suffix(".signal")):
        found = json.loads(file.read_text())
        assert set(found["counters"]) == {f.name for f in fields(Counters)}
        assert set(found["timings"]) == {f.name for f in fields(Timings)}
        assert list(found["counters"]["nodes"]) == list(reasons())
        assert found["settings"]["budget"] == 64
        assert found["profile"] == str(sidecar)
        assert found["ggml"] == ggml_versions()[1]
    assert found["sessions_alive"] == 1
    assert list(tmp_path.glob("*.tmp")) == []


def test_without_a_profile_nothing_happens(path: Path, dense: list[float]) -> None:
    found, stderr = run(path, budget=64)
    assert found == dense
    assert lines(stderr) == []


def other_rope(folder: Path) -> Path:
    import gguf

    source = write_model(folder / "source.gguf")
    text = source.read_bytes()
    key = b"llama.rope.freq_base"
    at = text.index(key) + len(key) + 4
    assert gguf.GGUFReader(source).get_field("llama.rope.freq_base") is not None
    changed = text[:at] + np.float32(500000.0).tobytes() + text[at + 4 :]
    target = folder / "changed.gguf"
    target.write_bytes(changed)
    return target


WRONG_MODELS: dict[str, tuple[Callable[[Path], Path], str]] = {
    "heads": (
        lambda folder: write_model(folder / "m.gguf", Shape(n_head=8, n_head_kv=4)),
        "8 heads and 4 KV heads",
    ),
    "head size": (
        lambda folder: write_model(folder / "m.gguf", Shape(head_dim=32, n_rot=32)),
        "heads have 32 dims",
    ),
    "rope": (lambda folder: write_model(folder / "m.gguf", NEOX_PARTIAL), "RoPE of type 2"),
    "base": (other_rope, "the base 500000"),
    "more layers": (lambda folder: write_model(folder / "m.gguf", Shape(n_layer=3)), "a layer 2"),
    "fewer layers": (
        lambda folder: write_model(folder / "m.gguf", NORM_ONE_LAYER),
        "no attention in layer 1",
    ),
}


@pytest.mark.parametrize("what", WRONG_MODELS)
def test_another_model_is_dense(what: str, sidecar: Path, tmp_path: Path) -> None:
    write, words = WRONG_MODELS[what]
    model = write(tmp_path)
    found, stderr = run(model, profile=sidecar, **SPARSE, stats=tmp_path / "s.json")
    (line,) = lines(stderr)
    assert words in line
    assert "'random-0'" in line
    assert found == run(model)[0]
    assert json.loads((tmp_path / "s.json").read_text())["counters"]["nodes"]["sparse"] == 0


BAD: dict[str, tuple[dict[str, object], str]] = {
    "budget text": ({"budget": "much"}, "PYFASA_BUDGET is 'much'"),
    "budget fraction": ({"budget": "64.5"}, "PYFASA_BUDGET is '64.5'"),
    "budget zero": ({"budget": 0}, "from 1 to"),
    "budget huge": ({"budget": 10**30}, "from 1 to"),
    "bits": ({"bits": 3}, "index_bits is 3"),
    "n_fc": ({"n_fc": 100}, "PYFASA_N_FC is 100; the profile ranks 32"),
    "threads": ({"threads": -2}, "PYFASA_THREADS is '-2'"),
    "rows": ({"max_rows": 65}, "PYFASA_MAX_ROWS is '65'"),
    "sinks": ({"sinks": 1000}, "exceed the budget"),
    "log": ({"log": "yes"}, "PYFASA_LOG is 'yes'"),
    "no file": ({"profile": "/nowhere.gguf"}, "/nowhere.gguf cannot be read"),
    "a folder": ({"profile": "/"}, "/ cannot be read"),
    "no gguf": ({"profile": __file__}, "cannot be read"),
    "statistics only": ({"profile": "", "stats": "x.json"}, "PYFASA_PROFILE is not"),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_settings_leave_one_line_and_dense(
    what: str, path: Path, sidecar: Path, dense: list[float]
) -> None:
    settings, words = BAD[what]
    found, stderr = run(path, **({"profile": sidecar} | settings))
    (line,) = lines(stderr)
    assert words in line
    assert line.endswith("Decoding is dense.")
    assert found == dense


def test_a_model_without_a_profile_is_named(path: Path, dense: list[float]) -> None:
    found, stderr = run(path, profile=path)
    (line,) = lines(stderr)
    assert f"{path} holds no pyfasa profile" in line
    assert found == dense


def test_statistics_that_cannot_be_written(path: Path, sidecar: Path, tmp_path: Path) -> None:
    _, stderr = run(path, profile=sidecar, **SPARSE, stats=tmp_path / "no" / "folder.json")
    (line,) = lines(stderr)
    assert "No such file or directory" in line


def test_a_process_with_pyfasa_has_one_decorator(
    path: Path, sidecar: Path, dense: list[float]
) -> None:
    found, stderr = run(path, "+pyfasa", profile=sidecar, **SPARSE, log=1)
    assert lines(stderr) == []
    assert found == dense


def test_a_tool_with_another_ggml_inside(path: Path, sidecar: Path, dense: list[float]) -> None:
    found, stderr = run(path, "+copy", profile=sidecar, **SPARSE)
    (line,) = lines(stderr)
    assert "has ggml inside" in line
    assert found == dense


@pytest.mark.slow
@pytest.mark.parametrize("arch", zoo.ZOO, ids=str)
def test_every_architecture_is_taken_for_itself(arch: zoo.Arch, tmp_path: Path) -> None:
    model = zoo.write(tmp_path / "model.gguf", arch.name)
    random_profile(model).save(tmp_path / "profile.gguf")
    stats = tmp_path / "stats.json"
    _, stderr = run(model, profile=tmp_path / "profile.gguf", **SPARSE, stats=stats, verify=1)
    assert lines(stderr) == []
    counters = json.loads(stats.read_text())["counters"]
    assert counters["nodes"]["sparse"] == 6 * len(arch.full)
    assert counters["verify_failures"] == 0


def test_defaults_are_those_of_the_core() -> None:
    """The signature of pyfasa.Llama says them, for readers; the plugin has the core's."""
    config = make_config()
    assert config.budget == lib.FASA_DEFAULT_BUDGET
    assert config.max_rows == lib.FASA_DEFAULT_MAX_ROWS
    assert config.sinks == lib.FASA_DEFAULT_SINKS
    assert config.recent == lib.FASA_DEFAULT_RECENT
    assert config.min_ctx == lib.FASA_PAYS_FROM * config.budget
    signature = inspect.signature(Llama).parameters
    for name in ("budget", "max_rows", "sinks", "recent"):
        assert signature[name].default == getattr(config, name)


def test_the_library_needs_nothing_of_python() -> None:
    data = library_path().read_bytes()
    assert b"libggml-base.so.0" in data
    assert b"libpython" not in data
