"""What a caller changes or asks for while a context lives: outputs, adapters, grammars, threads, settings."""

from __future__ import annotations

import json
import re
from itertools import cycle
from pathlib import Path
from typing import Any

import gguf
import llama_cpp
import numpy as np
import pytest
from llama_cpp import LlamaGrammar

from caches import (
    EVERYTHING,
    SAME,
    SHAPES,
    A,
    B,
    N,
    after,
    plain,
    verified,
    written,
)
from support import (
    F32,
    MAX_NMSE,
    NORM,
    NORM_ONE_LAYER,
    Shape,
    decode,
    nmse,
    opened,
    random_profile,
    warned,
)


@pytest.fixture(scope="module", params=SHAPES, ids=str)
def path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(tmp_path_factory.mktemp("model"), request.param)


# ---- logits of all tokens ------------------------------------------------------------------------


def all_scores(llm: llama_cpp.Llama) -> F32:
    for n in (100, 16, 3, 1, 1, 30, 1):
        llm.eval(A[llm.n_tokens : llm.n_tokens + n])
    return llm.scores[: llm.n_tokens].copy()


def test_logits_all(path: Path, types: dict[str, str]) -> None:
    """Of chunks that are prefill, of some rows at once, of single tokens."""
    with plain(path, logits_all=True, **types) as llm:
        wanted = all_scores(llm)
    with verified(path, logits_all=True, **EVERYTHING, **types) as llm:
        found = all_scores(llm)
    assert np.array_equal(found[:116], wanted[:116])
    for first, last in ((116, 119), (119, 120), (120, 121), (121, 151), (151, 152)):
        assert nmse(found[first:last], wanted[first:last]) <= MAX_NMSE


def test_logits_all_sparse(path: Path, types: dict[str, str]) -> None:
    """Asking for more logits changes none."""
    with verified(path, logits_all=True, **types) as llm:
        llm.eval(A[:N])
        for token in A[N:]:
            llm.eval([token])
        found = llm.scores[N : llm.n_tokens]
    assert nmse(found, after(path, A[:N], A[N:], **types)) < SAME


def test_logprobs(one: Path) -> None:
    arguments = {"max_tokens": 8, "temperature": 0.0, "logprobs": 3}
    with plain(one, logits_all=True) as llm:
        wanted = llm.create_completion(A[:200], **arguments)["choices"][0]["logprobs"]
    with verified(one, logits_all=True, **EVERYTHING) as llm:
        found = llm.create_completion(A[:200], **arguments)["choices"][0]["logprobs"]
    assert found["tokens"] == wanted["tokens"]
    assert np.allclose(found["token_logprobs"], wanted["token_logprobs"], atol=0.02)


# ---- embeddings ----------------------------------------------------------------------------------

TEXTS = ["ab", "c", "some words", "a longer text of forty tokens, or about so"]
POOLING = {
    "none": llama_cpp.LLAMA_POOLING_TYPE_NONE,
    "mean": llama_cpp.LLAMA_POOLING_TYPE_MEAN,
    "last": llama_cpp.LLAMA_POOLING_TYPE_LAST,
}
ATTENTION = {
    "causal": llama_cpp.LLAMA_ATTENTION_TYPE_CAUSAL,
    "non-causal": llama_cpp.LLAMA_ATTENTION_TYPE_NON_CAUSAL,
}


def embedded(llm: llama_cpp.Llama) -> F32:
    """Texts one by one, all in one batch, and some rows of two texts."""
    results = [*map(llm.embed, TEXTS), *llm.embed(TEXTS), *llm.embed(TEXTS[:2])]
    return np.concatenate([np.ravel(result) for result in results])


@pytest.mark.parametrize("pooling", POOLING)
@pytest.mark.parametrize("attention", ATTENTION)
def test_embeddings(pooling: str, attention: str, one: Path) -> None:
    """Dense below min_ctx, and right where rows are decoded sparsely."""
    arguments = {
        "embedding": True,
        "pooling_type": POOLING[pooling],
        "attention_type": ATTENTION[attention],
    }
    with plain(one, **arguments) as llm:
        wanted = embedded(llm)
    with opened(one, profile=random_profile(one), **arguments) as llm:
        assert np.array_equal(embedded(llm), wanted)
        nodes = llm.fasa.counters.nodes
        assert {name for name, n in nodes.items() if n} <= {"prefill", "short_context"}
    with verified(one, **EVERYTHING, **arguments) as llm:
        assert nmse(embedded(llm), wanted) <= MAX_NMSE
        if attention == "causal":
            llm.eval(A[:N])
            assert nmse(decode(llm, A[N:]), after(one, A[:N], A[N:], **EVERYTHING)) < SAME


def test_create_embedding(one: Path) -> None:
    with plain(one, embedding=True) as llm:
        wanted = llm.create_embedding(TEXTS)
    with opened(one, profile=random_profile(one), embedding=True) as llm:
        assert llm.create_embedding(TEXTS)["data"] == wanted["data"]


def in_a_chunk(llm: llama_cpp.Llama, causal: bool) -> F32:
    """Some rows, with or without those that come after them, and tokens that follow."""
    llm.eval(A[:30])
    llama_cpp.llama_set_causal_attn(llm._ctx.ctx, causal)
    llm.eval(A[30:36])
    llama_cpp.llama_set_causal_attn(llm._ctx.ctx, True)
    for token in A[36:40]:
        llm.eval([token])
    return llm.scores[30:40].copy()


def test_causal_attention_switched_off_for_some_rows(path: Path, types: dict[str, str]) -> None:
    arguments = {"logits_all": True, **types}
    with plain(path, **arguments) as llm:
        wanted = in_a_chunk(llm, causal=False)
        llm.reset()
        assert nmse(in_a_chunk(llm, causal=True), wanted) > 20 * MAX_NMSE  # it shows
    with verified(path, **EVERYTHING, **arguments) as llm:
        assert nmse(in_a_chunk(llm, causal=False), wanted) <= MAX_NMSE


# ---- LoRA ----------------------------------------------------------------------------------------


def write_lora(file: Path, shape: Shape, rank: int = 4) -> Path:
    """An adapter with random weights for q, k and v of every layer."""
    rng = np.random.default_rng(0)
    width, width_kv = shape.n_head * shape.head_dim, shape.n_head_kv * shape.head_dim
    w = gguf.GGUFWriter(file, shape.arch)
    w.add_type(gguf.GGUFType.ADAPTER)
    w.add_string(gguf.Keys.Adapter.TYPE, "lora")
    w.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(rank))
    for layer in range(shape.n_layer):
        for name, rows in (("q", width), ("k", width_kv), ("v", width_kv)):
            down = rng.normal(size=(rank, width)) / np.sqrt(width)
            up = 0.5 * rng.normal(size=(rows, rank))
            for part, values in (("a", down), ("b", up)):
                tensor = f"blk.{layer}.attn_{name}.weight.lora_{part}"
                w.add_tensor(tensor, values.astype(np.float32))
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    return file


@pytest.fixture(scope="module")
def lora(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    file = write_lora(tmp_path_factory.mktemp("lora") / "adapter.gguf", NORM)
    return {"lora_path": str(file), "lora_scale": 0.7}


def switching(llm: llama_cpp.Llama) -> F32:
    """With the adapter, without it, with it again, in one cache."""
    llm.eval(A[:N])
    rows = [decode(llm, A[N : N + 2])]
    context, adapter = llm._ctx.ctx, llm._lora_adapter
    assert llama_cpp.llama_set_adapters_lora(context, None, 0, None) == 0
    rows.append(decode(llm, A[N + 2 : N + 4]))
    adapters = (llama_cpp.llama_adapter_lora_p_ctypes * 1)(adapter)
    scales = (llama_cpp.ctypes.c_float * 1)(0.7)
    assert llama_cpp.llama_set_adapters_lora(context, adapters, 1, scales) == 0
    rows.append(decode(llm, A[N + 4 :]))
    return np.concatenate(rows)


def test_lora(lora: dict[str, Any], one: Path, types: dict[str, str]) -> None:
    with plain(one, **lora, **types) as llm:
        wanted = switching(llm)
    with warned() as sentences, verified(one, **EVERYTHING, **lora, **types) as llm:
        assert nmse(switching(llm), wanted) <= MAX_NMSE
    assert ["LoRA" in sentence for sentence in sentences] == [True]
    with plain(one, **types) as llm:
        llm.eval(A[:N])
        without = decode(llm, A[N:])
    with plain(one, **lora, **types) as llm:
        llm.eval(A[:N])
        always = decode(llm, A[N:])
    assert nmse(wanted[:2], without[:2]) > 0.1  # the adapter shows, and so does its absence
    assert nmse(wanted[2:4], always[2:4]) > 0.1


def test_lora_sparse(lora: dict[str, Any], one: Path, types: dict[str, str]) -> None:
    """The index is made from the keys of the model with its adapter."""
    with warned(), verified(one, **lora, **types) as llm:
        llm.eval(B[:N])
        decode(llm, B[N:])
        llm.n_tokens = 0
        llm.eval(A[:N])
        found = decode(llm, A[N:])
    with warned():
        assert nmse(found, after(one, A[:N], A[N:], **lora, **types)) < SAME


# ---- sampling ------------------------------------------------------------------------------------

GRAMMAR = r'root ::= "<" [a-f]{4,9} ("-" [0-9]{2}){3} ">"'
SCHEMA = {
    "type": "object",
    "properties": {"n": {"enum": [1, 22, 333]}, "yes": {"type": "boolean"}},
    "required": ["n", "yes"],
    "additionalProperties": False,
}


@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_grammar(temperature: float, one: Path, types: dict[str, str]) -> None:
    arguments: dict[str, Any] = {"max_tokens": 60, "temperature": temperature, "seed": 3}
    with verified(one, **types) as llm:
        for _ in range(2):  # the second prompt is in the cache
            grammar = LlamaGrammar.from_string(GRAMMAR)
            (choice,) = llm.create_completion(A[:300], grammar=grammar, **arguments)["choices"]
            assert re.fullmatch(r"<[a-f]{4,9}(-[0-9]{2}){3}>", choice["text"])
            assert choice["finish_reason"] == "stop"
        grammar = LlamaGrammar.from_json_schema(json.dumps(SCHEMA), verbose=False)
        (choice,) = llm.create_completion(B[:300], grammar=grammar, **arguments)["choices"]
        answer = json.loads(choice["text"])
        assert answer["n"] in (1, 22, 333)
        assert answer["yes"] in (True, False)
        assert llm.fasa.counters.nodes["sparse"] > 2 * 30


def test_seeds(one: Path, types: dict[str, str]) -> None:
    def sampled(llm: llama_cpp.Llama, seed: int) -> list[int]:
        llm.reset()
        llm.create_completion(A[:300], max_tokens=12, temperature=1.2, top_k=200, seed=seed)
        return llm.input_ids[300 : llm.n_tokens].tolist()

    with verified(one, **types) as llm:
        first = [sampled(llm, seed) for seed in (1, 2, 1)]
    with verified(one, **types) as llm:
        second = [sampled(llm, seed) for seed in (2, 1)]
    assert first[0] == first[2] == second[1]
    assert first[1] == second[0] != first[0]


# ---- threads -------------------------------------------------------------------------------------


def test_threads_changed_between_tokens(path: Path, types: dict[str, str]) -> None:
    """Heads are shared out evenly or split, as the number of threads goes."""
    with verified(path, **types) as llm:
        llm.eval(A[:100])
        found = []
        for token, n_threads in zip(A[100:120], cycle((1, 3, 2, 4)), strict=False):
            llama_cpp.llama_set_n_threads(llm._ctx.ctx, n_threads, 1 + n_threads % 2)
            found.append(decode(llm, [token]))
        llm.eval(B[:100])
        found.append(decode(llm, B[100:102]))
    with verified(path, n_threads=1, n_threads_batch=1, **types) as llm:
        llm.eval(A[:100])
        wanted = [decode(llm, A[100:120])]
        llm.eval(B[:100])
        wanted.append(decode(llm, B[100:102]))
    assert nmse(np.concatenate(found), np.concatenate(wanted)) < SAME


# ---- settings ------------------------------------------------------------------------------------


SETTINGS: list[dict[str, Any]] = [
    {"budget": 32},
    {"budget": 300},
    {"n_fc": 3},
    {"sinks": 0, "recent": 0},
    {"sinks": 40},
    {"recent": 60},
    {"index_bits": 2},
    {"index_bits": 8, "n_fc": 9},
]


@pytest.fixture(scope="module")
def one_layer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """There the cache does not hang on the settings of the tokens before."""
    return written(tmp_path_factory.mktemp("model"), NORM_ONE_LAYER)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_settings_changed_between_tokens(
    settings: dict[str, Any], one_layer: Path, types: dict[str, str]
) -> None:
    """Every token as in a context that has had its settings from the beginning."""
    base = {"budget": 80, "sinks": 2, "recent": 8, **types}
    with verified(one_layer, **base) as llm:
        llm.eval(A[:N])
        before = {name: getattr(llm.fasa, name) for name in settings}
        for values, n_tokens in (
            (before, N),
            (settings, N + 2),
            (before, N + 4),
            (settings, N + 6),
        ):
            for name, value in values.items():
                setattr(llm.fasa, name, value)
            assert llm.n_tokens == n_tokens
            found = decode(llm, A[n_tokens : n_tokens + 2])
            arguments = {**base, **values}
            wanted = after(one_layer, A[:n_tokens], A[n_tokens : n_tokens + 2], **arguments)
            assert nmse(found, wanted) < SAME
    other = after(one_layer, A[:n_tokens], A[n_tokens:], **base)
    assert nmse(found, other) > 50 * SAME  # the settings show
