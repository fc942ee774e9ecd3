"""Decoding with FASA: the dense result where everything is attended, and the chosen cells else."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pyfasa import native, reference
from pyfasa.llama import kv_type
from pyfasa.profile import Profile
from support import (
    MAX_NMSE,
    NEOX_FUSED,
    NEOX_GROUP_1,
    NEOX_ONE_KV_HEAD,
    NEOX_PARTIAL,
    NORM,
    NORM_GROUP_3,
    Shape,
    bundled_profile,
    decode,
    logits,
    nmse,
    opened,
    opened_plain,
    random_profile,
    random_tokens,
    write_model,
)

SHAPES = [NORM, NORM_GROUP_3, NEOX_GROUP_1, NEOX_ONE_KV_HEAD, NEOX_FUSED, NEOX_PARTIAL]
# One query head and one layer: what it selects can be shown to llama.cpp by removing other cells.
ONE_HEAD = [
    Shape(n_head=1, n_head_kv=1, n_layer=1),
    Shape("qwen2", n_head=1, n_head_kv=1, n_layer=1),
    Shape("stablelm", n_head=1, n_head_kv=1, n_layer=1, n_rot=32),
]
SAME_TYPES = [(name, name) for name in native.KV_TYPES]
MIXED_TYPES = [
    ("q8_0", "f16"), ("f16", "q8_0"), ("q5_1", "iq4_nl"), ("f32", "q4_0"), ("bf16", "q5_0"),
]  # fmt: skip
N_PROMPT = 500
TOKENS = random_tokens(N_PROMPT + 12)
PROMPT, REST = TOKENS[:N_PROMPT], TOKENS[N_PROMPT:]

Models = Callable[[Shape], Path]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Models:
    folder = tmp_path_factory.mktemp("models")

    def get(shape: Shape) -> Path:
        path = folder / f"{shape}.gguf"
        return path if path.exists() else write_model(path, shape)

    return get


def ids(types: tuple[str, str]) -> dict[str, Any]:
    return {"type_k": kv_type(types[0], "type_k"), "type_v": kv_type(types[1], "type_v")}


@pytest.mark.parametrize(
    ("shape", "types"),
    [
        (shape, types)
        for shape in SHAPES
        for types in (SAME_TYPES + MIXED_TYPES if shape == NORM else SAME_TYPES[1:4])
    ],
    ids=str,
)
def test_everything_attended_is_dense(shape: Shape, types: tuple[str, str], model: Models) -> None:
    path = model(shape)
    with opened_plain(path, **ids(types)) as plain:
        plain.eval(PROMPT)
        wanted = decode(plain, REST[:4])
    with opened(path, profile=random_profile(path), min_ctx=0, **ids(types)) as llm:
        llm.fasa.verify = True
        llm.eval(PROMPT)
        found = decode(llm, REST[:4])
        counters = llm.fasa.counters
    assert nmse(found, wanted) <= MAX_NMSE
    assert counters.nodes["sparse"] == shape.n_layer * 4
    assert counters.verify_failures == 0
    assert counters.cells_attended == counters.cells_visible


@pytest.mark.parametrize("types", [("f16", "f16"), ("q8_0", "q8_0")], ids="/".join)
def test_bundled_model_everything_attended(types: tuple[str, str], tiny_model_path: Path) -> None:
    """Six layers of rounding, most of it llama.cpp's, which quantizes q for a q8_0 cache."""
    profile = bundled_profile(tiny_model_path)
    with opened_plain(tiny_model_path, **ids(types)) as plain:
        tokens = plain.tokenize(Path(argparse.__file__).read_bytes()[20000:22000])[:412]
        plain.eval(tokens[:400])
        wanted = decode(plain, tokens[400:])
    with opened(tiny_model_path, profile=profile, min_ctx=0, **ids(types)) as llm:
        llm.fasa.verify = True
        llm.eval(tokens[:400])
        found = decode(llm, tokens[400:])
        counters = llm.fasa.counters
    assert nmse(found, wanted) <= MAX_NMSE
    assert (counters.nodes["sparse"], counters.verify_failures) == (6 * 12, 0)


@pytest.mark.parametrize("types", [("f16", "f16"), ("q8_0", "q8_0")], ids="/".join)
def test_below_min_ctx_bits_are_equal(types: tuple[str, str], model: Models) -> None:
    path = model(NORM)
    profile = random_profile(path)
    with opened_plain(path, **ids(types)) as plain:
        plain.eval(PROMPT)
        wanted = decode(plain, REST)
    # The 6th of these tokens is the first to see min_ctx cells.
    arguments = {"budget": 64, "min_ctx": N_PROMPT + 6, **ids(types)}
    with opened(path, profile=profile, **arguments) as llm:
        llm.eval(PROMPT)
        found = decode(llm, REST)
        nodes = llm.fasa.counters.nodes
    assert np.array_equal(found[:5], wanted[:5])
    assert nmse(found[5:], wanted[5:]) > MAX_NMSE  # sparse: the comparison can tell
    assert nodes["short_context"] == 2 * 5
    assert nodes["sparse"] == 2 * (len(REST) - 5)


def test_dense_and_disabled_bits_are_equal(model: Models) -> None:
    path = model(NEOX_GROUP_1)
    with opened_plain(path) as plain:
        plain.eval(PROMPT)
        wanted = decode(plain, REST[:4])
    with opened(path, profile=random_profile(path), budget=64, min_ctx=0) as llm, llm.dense():
        llm.eval(PROMPT)
        found = decode(llm, REST[:4])
        nodes = llm.fasa.counters.nodes
    assert np.array_equal(found, wanted)
    assert {name: n for name, n in nodes.items() if n} == {"disabled": 2 * 5}


def test_prompts_are_dense_to_their_last_token(model: Models) -> None:
    """Also where the last batch of a prompt has no more rows than a decode step."""
    path = model(NORM)
    with opened_plain(path, n_batch=100) as plain:
        plain.eval(PROMPT[:301])
        wanted = logits(plain)
    with opened(path, profile=random_profile(path), budget=64, min_ctx=0, n_batch=100) as llm:
        llm.eval(PROMPT[:301])
        assert np.array_equal(logits(llm), wanted)
        with llm.fasa.capturing():
            llm.eval(PROMPT[301:330])
        llm.n_tokens = 300
        llm.eval(PROMPT[300:301])  # as a token to go on from
        assert nmse(logits(llm), wanted) > MAX_NMSE
        assert {n: c for n, c in llm.fasa.counters.nodes.items() if c} == {
            "prefill": 2 * 4, "capture": 2, "sparse": 2,
        }  # fmt: skip


def test_golden_counters(model: Models) -> None:
    """Every number that counters promise, computed by hand for one run."""
    path = model(NORM)  # 2 layers, 4 query heads, 2 KV heads, 64 dims
    profile = random_profile(path)
    with opened(path, profile=profile, budget=64, min_ctx=200, n_batch=100, n_ctx=768) as llm:
        llm.eval(TOKENS[:301])  # 3 graphs of 100 rows and one of a single row, still of the prompt
        llm.eval(TOKENS[301:302])
        llm.fasa.min_ctx = 304
        llm.eval(TOKENS[302:303])
        llm.fasa.enabled = False
        llm.eval(TOKENS[303:304])
        counters = llm.fasa.counters
        assert llm.fasa.timings.total > llm.fasa.timings.score > 0
        llm.fasa.reset()
        assert llm.fasa.counters.graphs == llm.fasa.timings.total == 0
    nodes = {name: n for name, n in counters.nodes.items() if n}
    assert nodes == {"prefill": 2 * 4, "sparse": 2, "short_context": 2, "disabled": 2}
    assert counters.graphs == 3 + 1 + 1 + 1 + 1
    assert counters.cells_visible == 2 * 4 * 302
    assert counters.cells_attended == 2 * 4 * 64
    per_cell = int(profile.bytes_per_cell().sum())
    assert counters.index_bytes == 768 * per_cell
    assert counters.kv_bytes == 2 * 768 * 2 * (2 * 64) * 2  # layers, cells, K and V, row, f16
    assert counters.bytes_attended == counters.cells_attended * 2 * 64 * 2
    assert counters.bytes_scored == 5 * 64 * per_cell  # 5 blocks of 64 hold 302 cells
    assert counters.share_attended == pytest.approx(64 / 302)
    assert counters.stale_events == 0


def test_thread_counts_agree(model: Models) -> None:
    results = []
    path = model(NORM_GROUP_3)
    for n_threads in (1, 2):
        arguments = {"budget": 96, "min_ctx": 0, "n_threads": n_threads, "n_threads_batch": 1}
        with opened(path, profile=random_profile(path), type_k="q8_0", **arguments) as llm:
            llm.eval(PROMPT)
            results.append(decode(llm, REST))
            assert llm.fasa.counters.nodes["sparse"] == 2 * len(REST)
    assert nmse(results[0], results[1]) < 1e-9


def test_index_is_right_whatever_order_it_is_filled_in(model: Models) -> None:
    """Filled in prefill while sparse, or all at once when FASA is switched on: the same bits."""
    path = model(NEOX_PARTIAL)
    results = []
    for late in (False, True):
        with opened(path, profile=random_profile(path), budget=64, min_ctx=0, n_batch=64) as llm:
            llm.fasa.verify = True
            llm.eval(PROMPT[:64])
            llm.eval(PROMPT[64:65])  # an index is there from now on
            llm.fasa.enabled = not late
            llm.eval(PROMPT[65:])
            llm.fasa.enabled = True
            if late:
                llm._fasa.session.invalidate()
            results.append(decode(llm, REST))
            assert llm.fasa.counters.verify_failures == 0
    assert np.array_equal(results[0], results[1])


def test_n_fc_lowered_at_run_time(model: Models) -> None:
    path = model(NORM)
    profile = random_profile(path)
    with opened(path, profile=profile, budget=64, min_ctx=0, n_ctx=768) as llm:
        llm.fasa.verify = True
        llm.eval(PROMPT)
        for n_fc in (32, 12, 3, 1, 20):
            llm.fasa.n_fc = n_fc
            changed = decode(llm, REST[:1])
            llm.n_tokens = N_PROMPT
            assert llm.fasa.counters.index_bytes == 768 * profile.bytes_per_cell(n_fc).sum()
            with opened(path, profile=profile, budget=64, min_ctx=0, n_fc=n_fc) as fresh:
                fresh.eval(PROMPT)
                assert np.array_equal(changed, decode(fresh, REST[:1])), n_fc
        assert llm.fasa.counters.verify_failures == 0


@pytest.mark.parametrize(("sinks", "recent"), [(4, 32), (0, 10), (7, 2), (0, 1), (40, 40)])
def test_sinks_and_recent_are_attended(sinks: int, recent: int, model: Models) -> None:
    """A budget of sinks + recent leaves nothing to score: llama.cpp with these cells agrees."""
    path = model(NORM)
    arguments = {"budget": sinks + recent, "sinks": sinks, "recent": recent, "min_ctx": 0}
    with opened(path, profile=random_profile(path), **arguments) as llm:
        llm.eval(PROMPT)
        found = decode(llm, REST[:1])
    with opened_plain(path) as plain:
        plain.eval(PROMPT)
        plain._ctx.kv_cache_seq_rm(0, sinks, N_PROMPT + 1 - recent)
        wanted = decode(plain, REST[:1])
    assert nmse(found, wanted) <= MAX_NMSE


@pytest.mark.parametrize("types", [("f16", "f16"), ("q8_0", "q8_0")], ids="/".join)
@pytest.mark.parametrize("shape", ONE_HEAD, ids=str)
def test_the_selected_cells_are_those_of_the_reference(
    shape: Shape, types: tuple[str, str], model: Models
) -> None:
    """Selection by reference.py, shown to llama.cpp by removing all other cells from its cache."""
    path = model(shape)
    budget = 48
    profile = random_profile(path, n_fc=20)
    # llama.cpp continues a sequence only if it holds the last position: 2 recent cells keep it.
    with opened(path, profile=profile, budget=budget, sinks=0, recent=2, **ids(types)) as llm:
        llm.fasa.min_ctx = 0
        llm.eval(PROMPT)
        found = decode(llm, REST[:1])
        llm.n_tokens = N_PROMPT
        queries, keys = captured(llm, REST[:1])
        dense = logits(llm)[None]
    scores = scores_of(profile, 0, 0, queries[0, 0], keys[:, 0])
    scores[-2:] = np.inf
    cells = reference.select(scores, budget)
    with opened_plain(path, **ids(types)) as plain:
        plain.eval(PROMPT)
        for cell in sorted(set(range(N_PROMPT)) - set(cells.tolist())):
            plain._ctx.kv_cache_seq_rm(0, cell, cell + 1)
        plain.eval(REST[:1])
        wanted = logits(plain)[None]
    assert nmse(found, wanted) <= MAX_NMSE
    assert nmse(found, dense) > MAX_NMSE  # the cells left out do matter


def captured(llm: Any, tokens: list[int], layer: int = 0) -> tuple[Any, Any]:
    """Queries (n_tokens, n_head, head_dim) of tokens evaluated now, and all keys of the layer."""
    with llm.fasa.capturing() as session:
        session.captured_clear()
        llm.eval(tokens)
        queries = session.captured(layer)
    return queries, session.keys(layer, 0, llm.n_tokens)


def scores_of(profile: Profile, layer: int, head_kv: int, query: Any, keys: Any) -> Any:
    model = profile.identity
    rows = reference.index_rows(
        np.ascontiguousarray(keys),
        reference.chunk_dims(model.head_dim, model.n_rot, model.rope),
        profile.chunks[layer, head_kv, : profile.n_fc],
        profile.bits[layer, head_kv, : profile.n_fc],
    )
    return reference.score(query, rows)


@pytest.fixture(scope="module")
def real(tiny_model_path: Path) -> tuple[Profile, Any, Any]:
    """Profile, queries (24, n_head, head_dim) and keys of layer 3 of the bundled model."""
    profile = bundled_profile(tiny_model_path)
    with opened(tiny_model_path, profile=profile, type_k="q8_0") as llm:
        tokens = llm.tokenize(Path(argparse.__file__).read_bytes()[3000:7000])[:900]
        llm.eval(tokens[:-24])
        queries, keys = captured(llm, tokens[-24:], layer=3)
    assert queries.shape == (24, 8, 64)
    assert keys.shape == (900, 2, 64)
    return profile, queries, keys


def test_threshold_property_on_a_real_layer(real: tuple[Profile, Any, Any]) -> None:
    profile, queries, keys = real
    model, n_fc, budget = profile.identity, profile.n_fc, 100
    n_block = -(-len(keys) // native.BLOCK_CELLS)
    for head_kv in range(model.n_head_kv):
        used = profile.bits[3, head_kv, :n_fc] > 0
        layout = native.Layout(
            model.head_dim, model.n_rot, model.rope,
            profile.chunks[3, head_kv, :n_fc][used], profile.bits[3, head_kv, :n_fc][used],
        )  # fmt: skip
        index = np.zeros((n_block, layout.block_bytes), np.uint8)
        own = np.ascontiguousarray(keys[:, head_kv])
        native.index_write(layout, own, np.arange(len(own)), index)
        visible = np.packbits(np.arange(n_block * 64) < len(own), bitorder="little").view(np.uint64)
        group = np.ascontiguousarray(queries[-1, head_kv * 4 : head_kv * 4 + 4])
        scores = np.empty((4, n_block * 64), np.float32)
        peaks = np.empty((4, n_block * native.PEAKS), np.float32)
        native.score(native.ISA_AUTO, layout, group, index, visible, scores, peaks)
        for i, query in enumerate(group):
            wanted = scores_of(profile, 3, head_kv, query, own)
            assert nmse(scores[i, : len(own)], wanted) < 1e-4
            cells = native.select(native.ISA_AUTO, scores[i].copy(), peaks[i].copy(), budget)
            assert len(cells) == len(set(cells.tolist())) == budget
            left_out = np.setdiff1d(np.arange(len(own)), cells)
            assert scores[i, cells].min() >= scores[i, left_out].max()


def test_attention_mass_recalled_on_a_real_layer(real: tuple[Profile, Any, Any]) -> None:
    profile, queries, keys = real
    budgets = (16, 64, 128, 256, 512, len(keys))
    recalled = np.zeros((2, len(budgets)))
    worst = replace(profile, chunks=profile.chunks[:, :, ::-1])
    for query in queries:
        for head, q in enumerate(query):
            own = np.ascontiguousarray(keys[:, head // 4]).astype(np.float64)
            logit = own @ q / 8
            mass = np.exp(logit - logit.max())
            mass /= mass.sum()
            for row, ranking in zip(recalled, (profile, worst), strict=True):
                scores = scores_of(ranking, 3, head // 4, q, own.astype(np.float32))
                row += [mass[reference.select(scores, budget)].sum() for budget in budgets]
    recalled /= queries.shape[0] * queries.shape[1]
    calibrated, reverse = recalled
    assert all(a < b for a, b in pairwise(calibrated))
    assert calibrated[-1] == pytest.approx(1)
    assert calibrated[3] > 0.9  # 256 of 900 cells
    assert (calibrated[:-1] > reverse[:-1]).all()
