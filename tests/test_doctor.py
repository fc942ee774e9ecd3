"""doctor: every judgement on made-up machines, and the report on this one."""

from __future__ import annotations

import json
import os
import re
import sys
from contextlib import closing
from itertools import product
from pathlib import Path

import llama_cpp
import pytest
from typer.testing import CliRunner

from pyfasa import doctor, judgements, machine
from pyfasa.cli import app
from pyfasa.flash_attention import Pair, Service, services
from pyfasa.footprint import Footprint, footprint
from pyfasa.identity import ModelIdentity
from pyfasa.judgements import Finding
from pyfasa.llama import Llama
from pyfasa.options import KvType

# what llama_print_system_info() says on a machine with AMX, and with a GPU
AMX_INFO = "CPU : SSE3 = 1 | AVX2 = 1 | FMA = 1 | AVX512 = 1 | AMX_INT8 = 1 | OPENMP = 1 | "
CUDA_INFO = "CUDA : ARCHS = 900 | USE_GRAPHS = 1 | CPU : AVX2 = 1 | FMA = 0 | "

AMX_CPU = frozenset(["avx", "avx2", "fma", "avx512f", "amx_tile", "amx_int8", "amx_bf16"])
AVX2_CPU = frozenset(["avx", "avx2", "fma"])


def test_system_features() -> None:
    assert machine.system_features(CUDA_INFO) == {
        "CUDA": {"ARCHS", "USE_GRAPHS"},
        "CPU": {"AVX2"},
    }
    assert "AMX_INT8" in machine.system_features(AMX_INFO)["CPU"]
    assert machine.system_features("") == {}


def test_cuda_is_judged() -> None:
    assert judgements.judge_cuda(False, False, "no device").status == "ok"
    assert judgements.judge_cuda(True, True, "kernels").status == "ok"
    missing = judgements.judge_cuda(True, False, "libpyfasa_cuda.so could not be loaded")
    assert missing.status == "note"
    assert "nvcc" in missing.remedy


CPU, GPU = machine.Device("CPU", "a CPU", "CPU"), machine.Device("CUDA0", "a GPU", "GPU")
TYPES = [kind.value for kind in KvType]
ALL: dict[Pair, Service] = dict.fromkeys(product(TYPES, TYPES), "served")


def cuda_pairs() -> dict[Pair, Service]:
    """CUDA as llama.cpp builds it: four equal pairs, iq4_nl in none, copies for the others."""
    found: dict[Pair, Service] = {}
    for k, v in ALL:
        equal = k == v and k in ("f16", "bf16", "q8_0", "q4_0")
        found[k, v] = "served" if equal else "refused" if "iq4_nl" in (k, v) else "converted"
    return found


def test_pairs_of_flash_attention() -> None:
    alone = judgements.judge_pairs({CPU: ALL}, "q5_1", "iq4_nl")
    assert (alone.status, alone.remedy) == ("ok", "")
    assert alone.value == "CPU: all 81 pairs of K and V types; asked for is q5_1/iq4_nl"
    both = {GPU: cuda_pairs(), CPU: ALL}
    fine = judgements.judge_pairs(both, "q8_0", "q8_0")
    assert fine.status == "ok"
    served = "f16/f16, bf16/bf16, q8_0/q8_0, q4_0/q4_0"
    assert f"CUDA0: {served}, 60 converted to f16 for every token, 17 refused" in fine.value


@pytest.mark.parametrize("pair", [("q8_0", "f16"), ("f32", "f32"), ("iq4_nl", "iq4_nl")])
def test_pairs_that_a_gpu_does_not_serve(pair: Pair) -> None:
    finding = judgements.judge_pairs({GPU: cuda_pairs(), CPU: ALL}, *pair)
    assert finding.status == "note"
    assert "CUDA0" in finding.remedy
    assert "q8_0/q8_0" in finding.remedy
    # no build of llama.cpp has kernels for f32 and iq4_nl
    for word in ("GGML_CUDA_FA_QUANTS=all", "--no-cache-dir"):
        assert (word in finding.remedy) == (pair == ("q8_0", "f16"))


def test_pairs_that_the_cpu_does_not_compute() -> None:
    finding = judgements.judge_pairs({CPU: ALL | {("f16", "f32"): "refused"}}, "f16", "f32")
    assert finding.status == "problem"
    assert "-ctk q8_0 -ctv q8_0" in finding.remedy
    other = machine.Device("Vulkan0", "a GPU", "GPU")
    finding = judgements.judge_pairs({other: cuda_pairs(), CPU: ALL}, "f16", "q8_0")
    assert finding.status == "note"
    assert "GGML_CUDA" not in finding.remedy


def test_pairs_on_this_cpu() -> None:
    """The CPU backend computes each pair; ggml itself was asked."""
    found = {device.name: of for device, of in services().items()}
    assert found["CPU"] == ALL


MIB = 1 << 20
NEED = Footprint(weights=100 * MIB, cell=7168, index=1024)  # 2 MiB for 256 tokens
Q8_0 = Footprint(weights=100 * MIB, cell=3072, index=1024)


def test_footprint() -> None:
    assert NEED.cache(1000) == 7168 * 1024
    assert NEED.total(1000) == NEED.total(1024) == 108 * MIB
    assert NEED.largest_context(108 * MIB) == 1024
    assert NEED.largest_context(110 * MIB - 1) == 1024
    assert NEED.largest_context(110 * MIB) == 1280
    assert NEED.largest_context(99 * MIB) == 0


@pytest.mark.parametrize(
    ("available", "status", "words"),
    [
        (200 * MIB, "ok", []),
        (121 * MIB, "ok", []),  # 108 MiB are less than nine tenths
        (119 * MIB, "note", ["-c 768", "-ctk q8_0 -ctv q8_0, up to 1,024 tokens"]),
        (115 * MIB, "note", ["-c 256", "up to 768 tokens"]),
        (107 * MIB, "problem", ["a smaller quantization"]),
        (50 * MIB, "problem", ["a smaller quantization"]),
    ],
)
def test_memory(available: int, status: str, words: list[str]) -> None:
    finding = judgements.judge_memory("memory", available, 1024, NEED, Q8_0)
    assert finding.status == status
    assert "108.0 MiB at 1,024 tokens: weights 100.0 MiB, K/V 7.0 MiB, side index 1.0 MiB" in (
        finding.value
    )
    assert (finding.remedy == "") == (status == "ok")
    for word in words:
        assert word in finding.remedy


def test_memory_of_a_gpu_and_what_nobody_tells() -> None:
    """What does not fit into a GPU fits elsewhere; a q8_0 cache is no advice where it is one."""
    finding = judgements.judge_memory("GPU memory", MIB, 1024, NEED, Q8_0, "fewer layers there")
    assert finding.status == "note"
    assert "fewer layers there" in finding.remedy
    finding = judgements.judge_memory("memory", 119 * MIB, 1024, NEED, NEED)
    assert "-c 768" in finding.remedy
    assert "q8_0" not in finding.remedy
    assert judgements.judge_memory("memory", None, 1024, NEED, Q8_0).status == "ok"


@pytest.mark.parametrize("types", [("f16", "f16"), ("q8_0", "q5_1"), ("f32", "iq4_nl")])
def test_footprint_is_what_is_allocated(types: tuple[str, str], tiny_model_path: Path) -> None:
    """Against the sizes that llama.cpp and the core have after one sparse token."""
    llm = Llama(
        str(tiny_model_path), n_ctx=1000, budget=64, min_ctx=1, verbose=False,
        type_k=types[0], type_v=types[1],
    )  # fmt: skip
    with closing(llm):
        llm.eval([1] * 100)
        llm.eval([1])
        counters = llm.fasa.counters
        size = llama_cpp.llama_model_size(llm.model)
        profile = llm.fasa.profile
    found = footprint(tiny_model_path, ModelIdentity.read(tiny_model_path), profile, *types)
    assert counters.nodes["sparse"] == 6
    assert found.weights == size
    assert found.cache(1000) == counters.kv_bytes
    assert found.index * 1024 == pytest.approx(counters.index_bytes, rel=0.1)


def test_available_memory() -> None:
    available, total = machine.available_memory(), os.sysconf("SC_PHYS_PAGES") * 4096
    assert available is not None
    assert total / 1000 < available <= total


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
    finding = judgements.judge_amx(flags, frozenset(built), made_by)
    assert finding.status == status
    if status == "problem":
        for word in ("CMAKE_ARGS", "-mno-amx-tile", "--no-cache-dir", "SIGSEGV"):
            assert word in finding.value + finding.remedy


def test_instruction_sets() -> None:
    judge = judgements.judge_instructions
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
    finding = judgements.judge_nodes(nodes, failures)
    assert finding.status == status
    assert word in finding.value + finding.remedy


def test_compiler_of_a_library(tmp_path: Path) -> None:
    library = tmp_path / "lib.so"
    assert machine.compiler(library) == "unknown compiler"
    library.write_bytes(b"\x7fELF\0GCC: (Debian 12.2.0-14+deb12u1) 12.2.0\0")
    assert machine.compiler(library) == "GCC 12.2.0"
    library.write_bytes(b"\x7fELF\0GCC: (GNU) 12.2.0\0Ubuntu clang version 18.1.3\0")
    assert machine.compiler(library) == "Clang 18.1.3"


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
        "flash attention",
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


def test_context_that_does_not_fit(tiny_model_path: Path) -> None:
    """Exit code 1, a context that does, and that one is fine. Both with the same memory."""
    command = ["doctor", str(tiny_model_path), "--json", "-c"]

    def checks(n_ctx: int) -> dict[str, dict[str, str]]:
        result = CliRunner().invoke(app, [*command, str(n_ctx)])
        found = {check["topic"]: check for check in json.loads(result.stdout)["checks"]}
        assert result.exit_code == (1 if found["memory"]["status"] == "problem" else 0)
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pyfasa.doctor.available_memory", lambda: 200 * MIB)
        memory = checks(1_000_000)["memory"]
        assert memory["status"] == "problem"
        n_ctx = re.search(r"\(-c (\d+)\)", memory["remedy"])
        assert n_ctx is not None
        assert checks(int(n_ctx[1]))["memory"]["status"] == "ok"
        assert checks(int(n_ctx[1]) + 256)["memory"]["status"] == "note"


def test_gpus_serve_what_the_system_has_no_memory_for(
    tiny_model_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def findings(n_bytes: int) -> dict[str, Finding]:
        gpu = machine.Device("CUDA0", "a GPU", "GPU", n_bytes, n_bytes)
        monkeypatch.setattr("pyfasa.doctor.devices", lambda memory: [CPU, gpu])
        monkeypatch.setattr("pyfasa.doctor.available_memory", lambda: 20 * MIB)
        return {f.topic: f for f in doctor.examine_model(tiny_model_path, live=False)}

    large, small = findings(1 << 30), findings(10 * MIB)
    assert (large["GPU memory"].status, large["memory"].status) == ("ok", "note")
    assert "n_gpu_layers=-1" in large["memory"].remedy
    assert (small["GPU memory"].status, small["memory"].status) == ("note", "problem")
    assert "offload_kqv=False" in small["GPU memory"].remedy


def test_model_without_profile(tiny_model_path: Path, tmp_path: Path) -> None:
    plain = tmp_path / "plain.gguf"
    runner = CliRunner()
    assert runner.invoke(app, ["remove", str(tiny_model_path), str(plain)]).exit_code == 0
    result = runner.invoke(app, ["doctor", str(plain)])
    assert result.exit_code == 1
    assert "PROBLEM profile" in result.stdout
    assert "side index 0 B" in result.stdout
    assert "pyfasa calibrate" in result.stdout


def test_missing_model(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["doctor", str(tmp_path / "none.gguf")])
    assert result.exit_code == 1
    assert "PROBLEM model" in result.stdout
    assert "Traceback" not in result.stdout + result.stderr
