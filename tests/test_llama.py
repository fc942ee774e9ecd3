"""What one does with a llama_cpp.Llama, done sparsely with a pyfasa.Llama."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import pytest
from llama_cpp.llama_cache import LlamaRAMCache

from pyfasa import Profile
from pyfasa.documents import ask, is_right, make_document
from support import bundled_profile, opened, opened_plain, random_tokens

TOKENS = random_tokens(300)


def test_completion_and_streaming_below_min_ctx_are_those_of_the_parent(
    path: Path, profile: Profile
) -> None:
    prompt = TOKENS[:40]
    arguments: dict[str, Any] = {"max_tokens": 12, "temperature": 0.0}
    with opened_plain(path) as plain:
        wanted = plain.create_completion(prompt, **arguments)["choices"]
    with opened(path, profile=profile) as x:
        assert x.create_completion(prompt, **arguments)["choices"] == wanted
        parts = [c["choices"][0]["text"] for c in x(prompt, stream=True, **arguments)]
        assert x.fasa.counters.nodes["short_context"] > 0
    assert len(parts) > 1
    assert "".join(parts) == wanted[0]["text"]


def test_sparse_completion_goes_through_every_entry(llm: Any) -> None:
    prompt = TOKENS[:300]
    texts = []
    for stream in (False, True):
        llm.reset()
        llm.fasa.reset()
        answer = llm.create_completion(prompt, max_tokens=8, temperature=0.0, stream=stream)
        chunks = answer if stream else [answer]
        texts.append("".join(chunk["choices"][0]["text"] for chunk in chunks))
        # The first token comes from the prefill; broken UTF-8 at the end may cost some more.
        assert llm.fasa.counters.nodes["sparse"] >= 2 * 7
    assert texts[0] == texts[1]


def test_chat_finds_a_fact_sparsely(tiny_model_path: Path) -> None:
    """The bundled model, 600 tokens of text, 96 cells attended per head."""
    profile = bundled_profile(tiny_model_path)
    with opened(tiny_model_path, profile=profile, budget=96, min_ctx=0) as x:
        document = make_document(
            lambda text: x.tokenize(text.encode(), add_bos=False), 600, n_facts=1, seed=3
        )
        (fact,) = document.facts
        messages = ask(fact.question, document.text)
        answer = x.create_chat_completion(messages, max_tokens=24, temperature=0.0)
        text = answer["choices"][0]["message"]["content"]
        chunks = x.create_chat_completion(messages, max_tokens=24, temperature=0.0, stream=True)
        deltas = [chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks]
        counters = x.fasa.counters
    assert is_right(text, fact)
    assert "".join(deltas) == text
    assert counters.nodes["sparse"] > 6 * 10
    assert counters.share_attended < 0.17


def test_embeddings(path: Path, profile: Profile) -> None:
    with opened_plain(path, embedding=True) as plain:
        wanted = plain.embed("some text")
    with opened(path, profile=profile, embedding=True, budget=64, min_ctx=0) as x:
        assert np.array_equal(x.embed("some text"), wanted)
        assert x.create_embedding("some text")["data"][0]["embedding"] == wanted


def test_logits_of_all_tokens(path: Path, profile: Profile) -> None:
    with opened_plain(path, logits_all=True) as plain:
        plain.eval(TOKENS[:50])
        wanted = plain.scores[:50].copy()
    with opened(path, profile=profile, logits_all=True, budget=64, min_ctx=0) as x:
        x.eval(TOKENS[:50])
        assert np.array_equal(x.scores[:50], wanted)
        for token in TOKENS[50:53]:
            x.eval([token])
        assert np.isfinite(x.scores[50:53]).all()
        assert x.fasa.counters.nodes["sparse"] == 2 * 3


@pytest.mark.parametrize(("max_rows", "reason"), [(3, "prefill"), (4, "sparse")])
def test_a_draft_model_asks_for_several_rows(
    max_rows: int, reason: str, path: Path, profile: Profile
) -> None:
    class Draft:
        def __call__(self, input_ids: Any, /, **_: Any) -> Any:
            return np.array([9, 9, 9], np.intc)

    settings = {"draft_model": Draft(), "budget": 64, "min_ctx": 0, "max_rows": max_rows}
    with opened(path, profile=profile, **settings) as x:
        x.fasa.verify = True
        x.eval(TOKENS[:100])
        x.fasa.reset()
        stream = x.generate(TOKENS[:100], top_k=1, temp=0.0)
        assert len(list(islice(stream, 3))) == 3
        counters = x.fasa.counters
    assert counters.nodes[reason] == sum(counters.nodes.values()) == 2 * 2  # all after the prompt
    assert counters.verify_failures == 0


def test_a_ram_cache(llm: Any) -> None:
    llm.set_cache(LlamaRAMCache())
    llm.fasa.verify = True
    texts = [
        llm.create_completion(prompt, max_tokens=4, temperature=0.0)["choices"][0]["text"]
        for prompt in (TOKENS[:200], TOKENS[100:300], TOKENS[:200])
    ]
    assert texts[0] == texts[2]
    assert llm.fasa.counters.verify_failures == 0


def test_cells_are_removed_only_where_there_are_some(
    llm: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    removed = []
    remove = llama_cpp.llama_memory_seq_rm

    def counted(memory: Any, seq_id: int, p0: int, p1: int) -> bool:
        removed.append(p0)
        return bool(remove(memory, seq_id, p0, p1))

    monkeypatch.setattr(llama_cpp.llama_cpp, "llama_memory_seq_rm", counted)
    llm.reset()
    llm.eval(TOKENS[:20])  # the cells of a former test may be there
    del removed[:]
    llm.eval(TOKENS[20:21])
    assert removed == []
    llm.n_tokens = 10
    llm.eval(TOKENS[10:11])
    assert removed == [10]
    last = llama_cpp.llama_memory_seq_pos_max(llama_cpp.llama_get_memory(llm.ctx), 0)
    assert last == 10
    assert "kv_cache_seq_rm" not in vars(llm._ctx)
