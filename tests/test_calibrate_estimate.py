"""What a calibration takes: memory against what llama.cpp and NumPy really hold, and time for being there."""

from __future__ import annotations

import importlib
import math
import re
import tracemalloc
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import zoo
from pyfasa import calibrate, estimate
from pyfasa.calibration_plan import Plan, make_plan
from pyfasa.dry_run import rehearse
from pyfasa.reference import chunk_dims
from pyfasa.samples import captured_layer, evaluate_sample
from pyfasa.tally import Entries, Tally
from support import NEOX_PARTIAL, SMALL, opened, write_model

module = importlib.import_module("pyfasa.calibration")
MIB = 2**20


@pytest.fixture(scope="module", params=["bundled", "partial", "windows"])
def planned(
    request: pytest.FixtureRequest, tiny_model_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> Plan:
    """Plans of models of several shapes, on a text of 700 tokens or more."""
    folder = tmp_path_factory.mktemp("planned")
    text = folder / "text.txt"
    text.write_text("".join(f"{i} is the number of a line.\n" for i in range(200)))
    path = {
        "bundled": lambda: tiny_model_path,
        "partial": lambda: write_model(folder / "m.gguf", NEOX_PARTIAL),
        "windows": lambda: zoo.write(folder / "m.gguf", "mimo2"),
    }[request.param]()
    return make_plan(path, [text], n_ctx=700)


def test_weights_and_caches_are_those_of_llama_cpp(
    planned: Plan, capfd: pytest.CaptureFixture[str]
) -> None:
    """The cache to the rounding of llama.cpp's own report; its buffers from below, as far as they are counted."""
    with opened(planned.model_path, n_ctx=planned.longest.n_tokens, profile=False, verbose=True):
        log = capfd.readouterr().err
    found = estimate.memory(planned)
    assert found.weights == Path(planned.model_path).stat().st_size
    caches = re.findall(r"CPU KV buffer size = +([\d.]+) MiB", log)
    assert found.cache / MIB == pytest.approx(sum(map(float, caches)), abs=0.02)
    graph = float(re.findall(r"CPU compute buffer size = +([\d.]+) MiB", log)[0])
    counted = found.graph / MIB - 4 * 512 * int(re.findall(r"n_vocab += (\d+)", log)[0]) / MIB
    assert counted <= graph
    assert counted > 0.75 * graph or planned.identity.name.startswith(
        "random"
    )  # 512 tokens of vocabulary
    assert found.total == found.weights + found.cache + found.graph + found.held


def test_queries_are_those_that_are_captured(planned: Plan) -> None:
    with opened(planned.model_path, n_ctx=planned.longest.n_tokens, profile=False) as llm:
        session = evaluate_sample(llm, planned.longest)
        found = [
            captured_layer(session, layer, planned.longest.n_tokens)
            for layer in range(planned.identity.n_layer)
        ]
    sizes = [layer[0].nbytes for layer in found if layer is not None]
    counted = estimate.queries_bytes(planned)
    assert sizes
    assert counted == (planned.identity.n_layer + 1) * sizes[0]  # also of layers that stay dense


def test_segments_are_those_that_are_kept(planned: Plan) -> None:
    model, rows = planned.identity, planned.empty.candidates
    keys = np.random.default_rng(0).standard_normal((100, model.head_dim), np.float32)
    dims = chunk_dims(model.head_dim, model.n_rot, model.rope)
    channel = np.ones(model.head_dim, np.float32)
    entries = Entries(keys, dims, 0 * channel, channel)
    for bits in rows:
        entries.of(bits)
    kept = sum(values.nbytes for values in entries._known.values())
    assert kept == 4 * len(keys) * estimate.segment_dims(rows)


@pytest.mark.parametrize("method", ["allocation", "variance"])
def test_a_layer_holds_what_was_said(
    method: str, tiny_model_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The peak that NumPy reports while a layer is added up, to a tenth; heads one after the other."""
    monkeypatch.setattr("os.cpu_count", lambda: 1)
    plan = make_plan(tiny_model_path, method=method, n_ctx=2048)
    model = plan.identity
    rng = np.random.default_rng(0)
    visible = plan.longest.visible()
    queries = rng.standard_normal((len(visible), model.n_head, model.head_dim), np.float32)
    tally = Tally.zeros(model, plan.empty.method, plan.empty.candidates)
    tracemalloc.start()
    try:
        shape = (plan.longest.n_tokens, model.n_head_kv, model.head_dim)
        tally.add_layer(model, 0, queries, rng.standard_normal(shape, np.float32), visible)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert estimate.layer_bytes(plan) == pytest.approx(peak, rel=0.1)


def test_sums_are_those_that_are_saved(planned: Plan, tmp_path: Path) -> None:
    planned.empty.save(tmp_path / "run.npz")
    with np.load(tmp_path / "run.npz") as stored:
        arrays = {name: stored[name] for name in stored.files}
    sizes = [array.nbytes for array in arrays.values() if array.ndim > 0]
    assert estimate.sums_bytes(planned.empty) == sum(sizes) > 0


def test_the_copy_of_the_cache_for_the_probe_counts(path: Path, text: Path) -> None:
    """Where it is more than what follows: one KV head, one query head, many layers."""
    plan = make_plan(path, [text], n_ctx=640)
    deep = replace(plan, identity=replace(plan.identity, n_layer=1000, n_head=1, n_head_kv=1))
    found = estimate.memory(deep)
    assert found.held == found.cache // 2 == 1000 * 768 * 128


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_a_time_is_given(name: str, tmp_path: Path, text: Path) -> None:
    """Also for a cache with windows, which cannot be filled."""
    plan = make_plan(zoo.write(tmp_path / "m.gguf", name), [text], n_ctx=640)
    found = rehearse(plan)
    assert math.isfinite(found)
    assert found > 0


def test_memory_is_told_before_the_model_is_opened(
    path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_memory(*_: Any, **__: Any) -> None:
        raise MemoryError

    told: list[str] = []
    monkeypatch.setattr(module, "Llama", no_memory)
    with pytest.raises(MemoryError):
        calibrate(path, [text], tell=told.append, **SMALL)
    plan = make_plan(path, [text], n_ctx=640)
    assert told == [f"memory: {estimate.memory(plan)}"]


def test_a_probe_leaves_the_profile_as_it_is(path: Path, text: Path) -> None:
    told: list[str] = []
    assert calibrate(path, [text], tell=told.append, **SMALL) == calibrate(path, [text], **SMALL)
    assert [line.split(":")[0] for line in told] == ["memory", "time"]


def test_as_people_read_it() -> None:
    found = estimate.Memory(weights=3 * 2**30, cache=2**29, graph=2**20, held=2**28)
    assert str(found).startswith("about 3.8 GiB: weights 3.0 GiB, K/V cache 512.0 MiB, ")
    spoken = [estimate.duration(n).split(",")[0] for n in (0.34, 42.4, 100.4, 3600)]
    assert spoken == ["about 0.3 s", "about 42 s", "about 1.7 minutes", "about 60.0 minutes"]
