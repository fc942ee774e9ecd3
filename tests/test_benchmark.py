"""bench: the synthetic state, repetitions that end where they began, and what it prints."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from contextlib import closing
from dataclasses import fields
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import pytest
from rich.console import Console
from typer.testing import CliRunner

from pyfasa import benchmark, roofline
from pyfasa.benchmark import Repetition, Settings
from pyfasa.cli import app
from pyfasa.native import KV_TYPES, Counters, Timings, kv_row_bytes, kv_to_float
from pyfasa.synthetic import LOW_BITS, SequenceState, _randomize, fill, read_state

N_REAL = 300


def tokens(n: int) -> list[int]:
    return np.random.default_rng(1).integers(100, 4000, n).tolist()


def load(path: Path, type_k: str = "f16", n_ctx: int = 2048) -> llama_cpp.Llama:
    """The host without pyfasa: filling works on any Llama."""
    kind = KV_TYPES[type_k]
    return llama_cpp.Llama(
        str(path), n_ctx=n_ctx, flash_attn=True, type_k=kind, type_v=kind, verbose=False
    )


def logits(llm: llama_cpp.Llama, token: int) -> np.ndarray:
    llm.eval([token])
    row = llama_cpp.llama_get_logits_ith(llm.ctx, -1)
    return np.ctypeslib.as_array(row, shape=(llm.n_vocab(),)).copy()


@pytest.fixture(params=["f16", "q8_0", "q5_1", "f32"])
def filled(request: pytest.FixtureRequest, tiny_model_path: Path) -> Iterator[llama_cpp.Llama]:
    with closing(load(tiny_model_path, request.param)) as llm:
        llm.eval(tokens(N_REAL))
        yield llm


def test_real_cells_give_the_same_logits(filled: llama_cpp.Llama) -> None:
    state = read_state(filled)
    expected = logits(filled, 7)
    fill(filled, state, N_REAL)
    assert filled.n_tokens == N_REAL
    np.testing.assert_array_equal(logits(filled, 7), expected)


def test_fewer_cells_are_a_prefix(filled: llama_cpp.Llama) -> None:
    state = read_state(filled)
    filled.n_tokens = 100
    expected = logits(filled, 7)
    fill(filled, state, 100)
    np.testing.assert_array_equal(logits(filled, 7), expected)


def test_stretched_state_is_what_llama_cpp_reads_back(filled: llama_cpp.Llama) -> None:
    """All cells arrive, in order, at positions that decoding goes on from."""
    state = read_state(filled)
    fill(filled, state, 1500)
    back = read_state(filled)
    assert back.n_cell == 1500
    wanted = SequenceState.parse(state.stretch(1500).tobytes())
    for a, b in zip(back.tensors, wanted.tensors, strict=True):
        np.testing.assert_array_equal(a.rows, b.rows)
    memory = llama_cpp.llama_get_memory(filled.ctx)
    assert llama_cpp.llama_memory_seq_pos_max(memory, 0) == 1499
    assert np.isfinite(logits(filled, 7)).all()
    assert llama_cpp.llama_memory_seq_pos_max(memory, 0) == 1500


def test_keys_are_distinct_but_close(filled: llama_cpp.Llama) -> None:
    state = read_state(filled)
    wide = SequenceState.parse(state.stretch(1500).tobytes())
    for tensor in wide.tensors[: len(wide.tensors) // 2]:
        assert len(np.unique(tensor.rows, axis=0)) == 1500
    # V rows are plain copies: they do not take part in the selection
    n_values = [len(np.unique(s.tensors[-1].rows, axis=0)) for s in (state, wide)]
    assert n_values[0] == n_values[1]
    for tensor, real in zip(wide.tensors, state.tensors, strict=True):
        np.testing.assert_array_equal(tensor.rows[:N_REAL], real.rows)


@pytest.mark.parametrize("name", KV_TYPES)
def test_random_bits_keep_keys_near(name: str) -> None:
    """Every value stays within a quarter of its block's largest; steps and minima stay as they are."""
    kind, rng = KV_TYPES[name], np.random.default_rng(0)
    n_block, block = 4 * 64, kv_row_bytes(KV_TYPES[name], 32)
    if name in ("f32", "f16", "bf16"):
        x = rng.normal(size=(64, 128)).astype(np.float32)
        wide = x.view(np.uint32) >> 16
        rows = {"f32": x, "f16": x.astype(np.float16), "bf16": wide.astype(np.uint16)}[name]
        rows = rows.view(np.uint8).reshape(64, -1)
    else:
        rows = rng.integers(0, 256, (n_block, block), np.uint8)
        rows[:, :2] = np.array([0.01], np.float16).view(np.uint8)
        if name.endswith("_1"):
            rows[:, 2:4] = np.array([0.02], np.float16).view(np.uint8)
        rows = rows.reshape(64, -1)
    before = rows.copy()
    _randomize(rows, LOW_BITS[kind], rng)
    old, new = (kv_to_float(kind, r, 128).reshape(n_block, 32) for r in (before, rows))
    assert np.isfinite(new).all()
    assert (old != new).mean() > 0.2
    size = np.abs(old).max(axis=1, keepdims=True)
    assert (np.abs(new - old) <= 0.25 * size).all()


def test_empty_and_too_deep(filled: llama_cpp.Llama) -> None:
    state = read_state(filled)
    fill(filled, state, 0)
    memory = llama_cpp.llama_get_memory(filled.ctx)
    assert llama_cpp.llama_memory_seq_pos_max(memory, 0) == -1
    with pytest.raises(ValueError, match="5000 does not fit a context of 2048"):
        fill(filled, state, 5000)


@pytest.mark.parametrize(
    "damage",
    [
        lambda blob: b"",
        lambda blob: blob[:-1],
        lambda blob: blob + b"\0",
        lambda blob: b"\0" + blob[1:],
        lambda blob: blob[:8] + b"\2\0\0\0" + blob[12:],  # two streams
    ],
)
def test_other_kinds_of_state_are_refused(filled: llama_cpp.Llama, damage: Any) -> None:
    blob = read_state(filled).stretch(10).tobytes()
    SequenceState.parse(blob)
    with pytest.raises(ValueError, match="plain KV cache"):
        SequenceState.parse(damage(blob))


@pytest.mark.parametrize(
    ("field", "value", "word"),
    [
        ("n_gen", 0, "n_gen is 0"),
        ("repetitions", -1, "repetitions -1"),
        ("depths", (1024, -1), "negative"),
        ("depths", (), "one or more"),
        ("budgets", (0,), "at least 1"),
    ],
)
def test_impossible_settings(field: str, value: Any, word: str) -> None:
    with pytest.raises(ValueError, match=word):
        Settings(**{"model": Path("m.gguf"), field: value})


COMMON = {
    "machine": "a CPU, 2 cores",
    "pyfasa_version": "1.2.3",
    "llama_cpp_python_version": "0.3.36",
    "build_commit": "abc",
    "model_type": "llama 8B Q8_0",
    "model_size": 2**20,
    "model_n_params": 8_000_000,
    "n_threads": 2,
    "type_k": "f16",
    "type_v": "q8_0",
}


def repetition(ns: int, nodes: dict[str, int], attended: int, stage_ns: int) -> Repetition:
    zeros = {field.name: 0 for field in fields(Counters)}
    counted = {"nodes": nodes, "cells_visible": 20 * attended, "cells_attended": attended}
    timings = Timings(**{field.name: stage_ns for field in fields(Timings)})
    return Repetition(ns, Counters(**(zeros | counted)), timings)


def some_rows() -> list[benchmark.Row]:
    """Dense at 100 tokens/s, FASA at 1000, of which 60 % of the time is in the stages."""
    settings = Settings(model=Path("m.gguf"), n_gen=10, repetitions=2)
    dense = [repetition(100_000_000, {"disabled": 60}, 0, 0)] * 2
    nodes = {"sparse": 60, "prefill": 0}
    fasa = [repetition(ns, nodes, 50, 1_000_000) for ns in (8_000_000, 12_000_000)]
    return [
        benchmark.row(COMMON, settings, 4096, None, 16, dense),
        benchmark.row(COMMON, settings, 4096, 1024, 16, fasa),
    ]


def test_row_arithmetic() -> None:
    dense, fasa = some_rows()
    assert (dense["attention"], dense["budget"], dense["cells_read"]) == ("dense", None, 1.0)
    assert dense["avg_ts"] == pytest.approx(100)
    assert fasa["samples_ts"] == pytest.approx([1250, 833.33], rel=1e-4)
    assert fasa["avg_ns"] == 10_000_000
    assert fasa["stddev_ns"] == pytest.approx(2_828_427, rel=1e-6)
    assert fasa["score_ns"] == pytest.approx(100_000)
    assert fasa["rest_ns"] == pytest.approx(400_000)
    assert fasa["cells_read"] == pytest.approx(0.05)
    assert fasa["nodes"] == {"sparse": 120}
    for key in ("n_prompt", "n_depth", "n_gen", "test_time", "stddev_ts"):
        assert key in fasa


def test_formats_hold_the_same_rows() -> None:
    rows = some_rows()
    assert json.loads(benchmark.FORMATS["json"](rows)) == rows
    table = list(csv.DictReader(io.StringIO(benchmark.FORMATS["csv"](rows))))
    assert [r["attention"] for r in table] == ["dense", "fasa"]
    assert list(table[0]) == list(rows[0])
    assert json.loads(table[1]["samples_ns"]) == rows[1]["samples_ns"]


def test_markdown_tables_line_up() -> None:
    text = benchmark.FORMATS["md"](some_rows())
    speed, stages, machine = text.split("\n\n")
    for table in (speed, stages):
        assert len({len(line) for line in table.splitlines()}) == 1
    dense, fasa = (line.split("|") for line in speed.splitlines()[2:])
    assert dense[-2].strip() == "1.00"
    assert fasa[-2].strip() == "10.42"
    assert "tg10 @ d4096" in fasa[-4]
    assert "100" in stages.splitlines()[2]
    assert "pyfasa 1.2.3" in machine


def test_markdown_has_the_roofline_where_the_bandwidth_is_known() -> None:
    rows = [r | roofline.columns(3e6, 2.0, r["avg_ns"] / 10) for r in some_rows()]
    _, _, floors, _ = benchmark.FORMATS["md"](rows).split("\n\n")
    assert len({len(line) for line in floors.splitlines()}) == 1
    cells = [[c.strip() for c in line.split("|")[-6:-1]] for line in floors.splitlines()[2:]]
    assert cells == [
        ["3.00", "2.0", "1500", "10000", "15 %"],
        ["3.00", "2.0", "1500", "1000", "150 %"],
    ]
    unknown = [r | roofline.columns(3e6, None, 1.0) for r in some_rows()]
    assert len(benchmark.FORMATS["md"](unknown).split("\n\n")) == 3


def test_bench_from_the_command_line(tiny_model_path: Path) -> None:
    """Two depths, one below min_ctx: dense there, sparse at the other, and the cache unharmed."""
    arguments = f"bench -m {tiny_model_path} -d 64,4096 -ctk q8_0 -ctv q8_0 -n 4 -r 2"
    arguments += " --budget 128,256 -o json"
    result = CliRunner().invoke(app, arguments.split())
    assert result.exit_code == 0, result.stderr
    rows = json.loads(result.stdout)
    assert [(r["n_depth"], r["attention"], r["budget"]) for r in rows] == [
        (depth, *kind)
        for depth in (64, 4096)
        for kind in (("dense", None), ("fasa", 128), ("fasa", 256))
    ]
    for row in rows:
        assert len(row["samples_ts"]) == 2
        assert min(row["samples_ts"]) > 0
        sparse = row["attention"] == "fasa" and row["n_depth"] == 4096
        n_nodes = 6 * 4 * 2  # layers, tokens, repetitions
        assert row["nodes"].get("sparse", 0) == (n_nodes if sparse else 0)
        assert sum(row["nodes"].values()) == n_nodes
        if sparse:
            assert row["cells_read"] == pytest.approx(row["budget"] / 4098, rel=0.01)
            assert row["score_ns"] > 0
        else:
            assert row["cells_read"] == 1.0


@pytest.mark.parametrize("terminal", [False, True])
def test_jsonl_keeps_what_a_cut_off_run_measured(
    terminal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What comes before the interrupt is on stdout, whole, also with a spinner on a terminal."""
    rows = some_rows()
    screen = Console(file=io.StringIO(), force_terminal=terminal)
    monkeypatch.setattr("pyfasa.console.stderr", lambda: screen)

    def cut_off(*_: Any) -> Iterator[benchmark.Row]:
        yield from rows
        raise KeyboardInterrupt

    monkeypatch.setattr("pyfasa.benchmark.bench", cut_off)
    result = CliRunner().invoke(app, ["bench", "-m", "m.gguf", "-o", "jsonl"])
    assert result.exit_code == 130
    assert [json.loads(line) for line in result.stdout.splitlines()] == rows


def test_jsonl_lines_are_rows(tiny_model_path: Path) -> None:
    options = ["-d", "600,700", "-n", "2", "-r", "1", "--budget", "64", "-o", "jsonl"]
    result = CliRunner().invoke(app, ["bench", "-m", str(tiny_model_path), *options])
    assert result.exit_code == 0, result.stderr
    rows = [json.loads(line) for line in result.stdout.splitlines()]
    assert [(r["n_depth"], r["attention"]) for r in rows] == [
        (depth, attention) for depth in (600, 700) for attention in ("dense", "fasa")
    ]
    for r in rows:
        assert (r["backend"], r["model"]) == ("CPU", tiny_model_path.stem)
        assert (r["n_gpu_layers"], r["no_kv_offload"]) == (0, False)


def test_baseline_of_a_cache_in_system_memory(tiny_model_path: Path) -> None:
    """Dense rows come from a context without a profile, and are as many as the others."""
    options = [
        "-d",
        "600",
        "-n",
        "2",
        "-r",
        "2",
        "--budget",
        "64,128",
        "-ngl",
        "-1",
        "-nkvo",
        "1",
        "-o",
        "json",
    ]
    result = CliRunner().invoke(app, ["bench", "-m", str(tiny_model_path), *options])
    assert result.exit_code == 0, result.stderr
    rows = json.loads(result.stdout)
    assert [(r["attention"], r["budget"]) for r in rows] == [
        ("dense", None),
        ("fasa", 64),
        ("fasa", 128),
    ]
    assert [len(r["samples_ns"]) for r in rows] == [2, 2, 2]
    assert rows[0]["nodes"].get("sparse", 0) == 0


def test_bench_needs_a_model() -> None:
    result = CliRunner().invoke(app, ["bench", "-d", "600"])
    assert result.exit_code == 2
    assert "pyfasa bench -m model.gguf" in result.stderr


def test_bench_without_profile_is_one_sentence(tiny_model_path: Path, tmp_path: Path) -> None:
    plain = tmp_path / "plain.gguf"
    runner = CliRunner()
    assert runner.invoke(app, ["remove", str(tiny_model_path), str(plain)]).exit_code == 0
    result = runner.invoke(app, ["bench", "-m", str(plain), "-d", "64"])
    assert result.exit_code == 1
    assert "FASA is not active" in result.stderr
