"""doctor: every judgement on made-up machines, and the report on this one."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from pyfasa import doctor
from pyfasa.cli import app

# what llama_print_system_info() says on a machine with AMX, and with a GPU
AMX_INFO = "CPU : SSE3 = 1 | AVX2 = 1 | FMA = 1 | AVX512 = 1 | AMX_INT8 = 1 | OPENMP = 1 | "
CUDA_INFO = "CUDA : ARCHS = 900 | USE_GRAPHS = 1 | CPU : AVX2 = 1 | FMA = 0 | "

AMX_CPU = frozenset(["avx", "avx2", "fma", "avx512f", "amx_tile", "amx_int8", "amx_bf16"])
AVX2_CPU = frozenset(["avx", "avx2", "fma"])


def test_system_features() -> None:
    assert doctor.system_features(CUDA_INFO) == {
        "CUDA": {"ARCHS", "USE_GRAPHS"},
        "CPU": {"AVX2"},
    }
    assert "AMX_INT8" in doctor.system_features(AMX_INFO)["CPU"]
    assert doctor.system_features("") == {}


def test_cuda_is_judged() -> None:
    assert doctor.judge_cuda(False, False, "no device").status == "ok"
    assert doctor.judge_cuda(True, True, "kernels").status == "ok"
    missing = doctor.judge_cuda(True, False, "libpyfasa_cuda.so could not be loaded")
    assert missing.status == "note"
    assert "nvcc" in missing.remedy


@pytest.mark.parametrize(
    ("flags", "built", "made_by", "status"),
    [
        (AVX2_CPU, {"AVX2"}, "GCC 12.2.0", "ok"),
        (AMX_CPU, {"AVX2"}, "GCC 12.2.0", "ok"),
        (AMX_CPU, {"AVX2", "AMX_INT8"}, "GCC 12.2.0", "problem"),
        (AMX_CPU, {"AVX2", "AMX_INT8"}, "unknown compiler", "problem"),
        (AMX_CPU, {"AVX2", "AMX_INT8"}, "GCC 14.1.0", "ok"),
        (AMX_CPU, {"AVX2", "AMX_INT8"}, "Clang 18.0.0", "ok"),
    ],
)
def test_amx_crash(flags: frozenset[str], built: set[str], made_by: str, status: str) -> None:
    finding = doctor.judge_amx(flags, frozenset(built), made_by)
    assert finding.status == status
    if status == "problem":
        for word in ("CMAKE_ARGS", "-mno-amx-tile", "--no-cache-dir", "SIGSEGV"):
            assert word in finding.value + finding.remedy


def test_instruction_sets() -> None:
    judge = doctor.judge_instructions
    assert judge(AVX2_CPU, frozenset({"AVX", "AVX2", "FMA"})).status == "ok"
    idle = judge(AMX_CPU, frozenset({"AVX", "AVX2", "FMA"}))
    assert idle.status == "note"
    assert "AVX512" in idle.value
    assert "AMX" not in idle.value
    foreign = judge(AVX2_CPU, frozenset({"AVX2", "AVX512"}))
    assert foreign.status == "problem"
    assert "AVX512" in foreign.value
    assert judge(frozenset(), frozenset({"AVX2"})).status == "ok"


@pytest.mark.parametrize(
    ("nodes", "failures", "status", "word"),
    [
        ({"sparse": 12}, 0, "ok", "every layer"),
        ({"sparse": 10, "no_profile": 2}, 0, "note", "no_profile 2"),
        ({"sparse": 0, "kv_type": 12}, 0, "problem", "kv_type 12"),
        ({}, 0, "problem", "flash_attn"),
        ({"sparse": 12}, 3, "problem", "bug"),
    ],
)
def test_nodes(nodes: dict[str, int], failures: int, status: str, word: str) -> None:
    finding = doctor.judge_nodes(nodes, failures)
    assert finding.status == status
    assert word in finding.value + finding.remedy


def test_compiler_of_a_library(tmp_path: Path) -> None:
    library = tmp_path / "lib.so"
    assert doctor.compiler(library) == "unknown compiler"
    library.write_bytes(b"\x7fELF\0GCC: (Debian 12.2.0-14+deb12u1) 12.2.0\0")
    assert doctor.compiler(library) == "GCC 12.2.0"
    library.write_bytes(b"\x7fELF\0GCC: (GNU) 12.2.0\0Ubuntu clang version 18.1.3\0")
    assert doctor.compiler(library) == "Clang 18.1.3"


def test_this_machine() -> None:
    """pyfasa is installed where its tests run, so the installation has no problem."""
    findings = doctor.examine()
    assert [f for f in findings if f.status == "problem"] == []
    topics = [f.topic for f in findings]
    for topic in (
        "CPU",
        "llama-cpp-python",
        "ggml",
        "devices",
        "pyfasa kernels",
        "CUDA kernels",
        "hook",
        "AMX",
    ):
        assert topic in topics


def test_unsupported_llama_cpp_python(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llama_cpp.__version__", "0.2.1")
    problems = [f for f in doctor.examine() if f.status == "problem"]
    assert [f.topic for f in problems] == ["llama-cpp-python"]
    assert "pip install llama-cpp-python==" in problems[0].remedy


def test_broken_llama_cpp_python(monkeypatch: pytest.MonkeyPatch) -> None:
    """What cannot be imported ends the report with the way out, not with a traceback."""
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    findings = doctor.examine()
    assert [f.topic for f in findings if f.status == "problem"] == ["llama-cpp-python"]
    assert "--no-cache-dir" in findings[-1].remedy


def test_bundled_model(tiny_model_path: Path) -> None:
    result = CliRunner().invoke(app, ["doctor", str(tiny_model_path), "--json"])
    assert result.exit_code == 0, result.stdout
    checks = {check["topic"]: check for check in json.loads(result.stdout)["checks"]}
    assert checks["layers with chunks"]["value"] == "6 of 6"
    assert "every layer is sparse" in checks["decode"]["value"]
    share = float(checks["side index"]["value"].split(", ")[1].split(" %")[0])
    assert 0 < share <= 8


def test_model_without_profile(tiny_model_path: Path, tmp_path: Path) -> None:
    plain = tmp_path / "plain.gguf"
    runner = CliRunner()
    assert runner.invoke(app, ["remove", str(tiny_model_path), str(plain)]).exit_code == 0
    result = runner.invoke(app, ["doctor", str(plain)])
    assert result.exit_code == 1
    assert "PROBLEM profile" in result.stdout
    assert "pyfasa calibrate" in result.stdout


def test_missing_model(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["doctor", str(tmp_path / "none.gguf")])
    assert result.exit_code == 1
    assert "PROBLEM model" in result.stdout
    assert "Traceback" not in result.stdout + result.stderr
