"""The roofline of bench: bytes of a token, the floor that they set, and the memory's bandwidth."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import llama_cpp
import pytest
from gguf.constants import GGMLQuantizationType
from typer.testing import CliRunner

from pyfasa import benchmark, machine, roofline
from pyfasa.benchmark import Repetition
from pyfasa.cli import app
from pyfasa.gguf_header import Tensor
from pyfasa.identity import ModelIdentity
from pyfasa.native import Counters, Timings
from pyfasa.roofline import Reads


def test_bytes_of_a_token() -> None:
    reads = Reads(weights=1000, cell=10)
    assert reads.of_token(50) == 1500
    assert reads.of_token(50, dense=0.0, scored=70, attended=200) == 1270
    # half of the layers dense: half of the cache, and what the others read
    assert reads.of_token(50, dense=0.5, scored=70, attended=100) == 1000 + 250 + 70 + 100
    # heads of a group that read the same cells cannot move more than the cache
    assert reads.of_token(50, dense=0.0, scored=70, attended=4000) == 1000 + 70 + 500
    assert reads.of_token(50, dense=0.5, scored=70, attended=4000) == 1000 + 250 + 70 + 250


def test_columns() -> None:
    """2 GB at 8 GB/s are a quarter of a second, half of the time that was measured."""
    assert roofline.columns(2e9, 8.0, 0.5e9) == {
        "bytes_token": 2_000_000_000,
        "bandwidth_gbs": 8.0,
        "floor_ns": 0.25e9,
        "floor_share": 0.5,
    }
    assert roofline.columns(2e9, None, 0.5e9) == {
        "bytes_token": 2_000_000_000,
        "bandwidth_gbs": None,
        "floor_ns": None,
        "floor_share": None,
    }


def tensor(name: str, n_bytes: int) -> Tensor:
    return Tensor(Path("m.gguf"), name, (n_bytes // 4,), GGMLQuantizationType.F32, 0, n_bytes)


def test_weights_that_a_token_reads() -> None:
    layer = [tensor("blk.0.attn_q.weight", 100), tensor("blk.0.ffn_up.weight", 300)]
    embedding, output = tensor("token_embd.weight", 5000), tensor("output.weight", 7000)
    experts = [tensor("blk.0.ffn_up_exps.weight", 800), tensor("blk.0.ffn_up_shexp.weight", 60)]
    assert roofline.tensor_bytes([*layer, embedding], 1.0) == 5400
    assert roofline.tensor_bytes([*layer, embedding, output], 1.0) == 7400
    assert roofline.tensor_bytes([*layer, output, *experts], 0.25) == 7400 + 200 + 60


def test_weights_of_the_bundled_model(tiny_model_path: Path) -> None:
    """Its output layer shares the embeddings, so it is read whole; llama.cpp counts the same."""
    llm = llama_cpp.Llama(str(tiny_model_path), vocab_only=False, n_ctx=64, verbose=False)
    size = llama_cpp.llama_model_size(llm.model)
    llm.close()
    assert roofline.weight_bytes(tiny_model_path) == size


def test_bandwidth() -> None:
    assert roofline.read_bandwidth(2, 1 << 22, 2) > 0
    with pytest.raises(ValueError, match=r"0 threads.*--bandwidth"):
        roofline.read_bandwidth(0, 1 << 22)
    with pytest.raises(ValueError, match="0 bytes"):
        roofline.read_bandwidth(2, 0)


def test_bandwidth_reads_every_byte_in_all_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr("pyfasa.roofline.np.max", lambda a: seen.append(a.nbytes))
    roofline.read_bandwidth(3, 12_000, 5)
    assert seen == [4000] * 15


def test_arrays_are_bounded_by_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr("pyfasa.roofline.np.max", lambda a: seen.append(a.nbytes))
    monkeypatch.setattr("pyfasa.roofline.available_memory", lambda: 800_000)
    roofline.read_bandwidth(1, None, 1)
    assert seen == [100_000]


def test_counters_become_bytes() -> None:
    """Two repetitions of ten tokens, a quarter of the nodes dense."""
    zeros: dict[str, Any] = {field.name: 0 for field in fields(Counters)}
    counted = {"nodes": {"sparse": 45, "no_profile": 15}, "bytes_scored": 700}
    results = [
        Repetition(1, Counters(**(zeros | counted | {"bytes_attended": n})), Timings(*[0] * 7))
        for n in (1000, 3000)
    ]
    found = benchmark.bytes_token(Reads(weights=5000, cell=8), 100, 10, results)
    assert found == 5000 + 0.25 * 105.5 * 8 + 70 + 200


def bench(*options: str) -> list[dict[str, Any]]:
    result = CliRunner().invoke(app, ["bench", *options, "-n", "2", "-r", "2", "-o", "json"])
    assert result.exit_code == 0, result.stderr
    rows: list[dict[str, Any]] = json.loads(result.stdout)
    return rows


def test_rows_of_the_bundled_model(tiny_model_path: Path) -> None:
    options = ["-d", "4000", "-ctk", "q8_0", "-ctv", "f16", "--budget", "64"]
    dense, fasa = bench("-m", str(tiny_model_path), *options, "--bandwidth", "10")
    model = ModelIdentity.read(tiny_model_path)
    n_value = model.n_layer * model.n_head_kv * model.head_dim
    cell = n_value * 34 // 32 + n_value * 2
    weights = roofline.weight_bytes(tiny_model_path)
    assert dense["bytes_token"] == round(weights + 4001.5 * cell)
    attended = 64 * cell * model.n_head / model.n_head_kv
    index = fasa["bytes_token"] - weights - attended
    # 63 blocks of 64 cells at about 10 bytes per KV head
    assert 6 < index / (63 * 64 * model.n_layer * model.n_head_kv) < 14
    for r in (dense, fasa):
        assert r["bandwidth_gbs"] == 10
        assert r["floor_ns"] == pytest.approx(r["bytes_token"] / 10, rel=1e-5)
        assert r["floor_share"] == pytest.approx(r["floor_ns"] / (r["avg_ns"] / 2), rel=1e-6)


def test_a_gpu_is_not_judged_by_the_memory_of_the_host(
    tiny_model_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu = machine.Device("CUDA0", "a GPU", "GPU")
    monkeypatch.setattr("pyfasa.machine.devices", lambda: [gpu])
    monkeypatch.setattr("pyfasa.roofline.read_bandwidth", lambda *_: pytest.fail("measured"))
    options = ["-m", str(tiny_model_path), "-d", "300", "-ngl", "-1"]
    for r in bench(*options):
        assert r["backend"] == "CUDA"
        assert r["bytes_token"] > 0
        assert (r["bandwidth_gbs"], r["floor_ns"], r["floor_share"]) == (None, None, None)
    assert {r["bandwidth_gbs"] for r in bench(*options, "--bandwidth", "3000")} == {3000}


def test_impossible_bandwidth(tiny_model_path: Path) -> None:
    result = CliRunner().invoke(app, ["bench", "-m", str(tiny_model_path), "--bandwidth", "0"])
    assert result.exit_code == 1
    assert "0.0 GB/s; it must be above 0" in result.stderr
