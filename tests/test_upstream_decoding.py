"""After llama-cpp-python's tests of tokens, batches, logits and sampling by hand: all with pyfasa.Llama."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import pytest
from llama_cpp._internals import LlamaBatch, LlamaSampler
from llama_cpp.llama_speculative import LlamaPromptLookupDecoding

from pyfasa import Llama
from pyfasa.llama import KV_TYPES
from support import MAX_NMSE, decode, logits, nmse, opened, opened_plain, verified
from upstream import ANSWER, CONTEXT, LAYERS, PROMPT, SPARSE, STORY, both_raise

TEXTS = [
    "",
    "Hello World",
    " two  spaces ",
    "tab\tand\r\nlines\n",
    "é ☃ 漢字 🎉",
    "a <|im_start|> b<|im_end|>",
    STORY,
]


# ---- tokens --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def plain(tiny_model_path: Path) -> Iterator[Any]:
    with opened_plain(tiny_model_path, **CONTEXT) as llm:
        yield llm


@pytest.fixture(scope="module", params=["model", "vocabulary"])
def reader(request: pytest.FixtureRequest, tiny_model_path: Path) -> Iterator[Any]:
    with opened(tiny_model_path, **CONTEXT, vocab_only=request.param == "vocabulary") as llm:
        yield llm


@pytest.mark.parametrize("special", [False, True])
@pytest.mark.parametrize("text", TEXTS, ids=lambda text: repr(text[:12]))
def test_text_to_tokens_and_back(text: str, special: bool, reader: Any, plain: Any) -> None:
    tokens = reader.tokenize(text.encode(), special=special)
    assert tokens == plain.tokenize(text.encode(), special=special)
    assert reader.detokenize(tokens, special=True) == text.encode()
    markers = text.count("<|im_") if special else 0
    assert sum(token in (1, 2) for token in tokens) == markers
    hidden = text.replace("<|im_start|>", "").replace("<|im_end|>", "") if special else text
    assert reader.detokenize(tokens) == hidden.encode()


def test_a_beginning_is_added_when_the_model_asks_for_it(tiny_model_path: Path) -> None:
    asks = {"tokenizer.ggml.add_bos_token": True}
    with verified(tiny_model_path, **SPARSE, kv_overrides=asks) as llm:
        tokens = llm.tokenize(b"Hello World")
        assert tokens == [llm.token_bos(), *llm.tokenize(b"Hello World", add_bos=False)]
        assert llm.tokenize(b"") == [llm.token_bos()]
        assert llm.detokenize(tokens) == b"Hello World"
        response = llm.create_completion(PROMPT, max_tokens=4, temperature=0.0)
        assert response["usage"]["prompt_tokens"] == 1 + len(
            llm.tokenize(PROMPT.encode(), False, True)
        )


def test_what_a_model_says_about_itself(reader: Any, plain: Any) -> None:
    for name in ("token_bos", "token_eos", "token_nl", "n_vocab"):
        assert getattr(reader, name)() == getattr(plain, name)(), name
    for name in ("metadata", "model_path", "chat_format", "n_batch", "last_n_tokens_size"):
        assert getattr(reader, name) == getattr(plain, name), name
    assert reader.tokenizer().encode("key") == plain.tokenizer().encode("key")


def test_what_a_context_says_about_itself(tiny: Llama, plain: Any) -> None:
    assert (tiny.n_ctx(), tiny.n_embd()) == (plain.n_ctx(), plain.n_embd()) == (512, 384)
    assert tiny.pooling_type() == plain.pooling_type()
    tokens = tiny.tokenize(STORY.encode())
    tiny.eval(tokens)
    tiny.eval([tiny.token_nl()])
    assert list(tiny.eval_tokens) == [*tokens, tiny.token_nl()]
    assert tiny._input_ids.tolist() == list(tiny.eval_tokens)


# ---- batches and logits --------------------------------------------------------------------------


def test_batches_and_samplers_by_hand(tiny: Llama) -> None:
    """llama.cpp's own steps: a batch, a decode, a chain of samplers."""

    def generated(seed: int) -> list[int]:
        batch = LlamaBatch(n_tokens=512, embd=0, n_seq_max=1)
        sampler = LlamaSampler()
        sampler.add_top_k(50)
        sampler.add_top_p(0.9, 1)
        sampler.add_temp(3.0)
        sampler.add_dist(seed)
        tiny._ctx.kv_cache_clear()
        tokens = tiny._model.tokenize(STORY.encode(), True, True)
        n_past, found = 0, []
        for _ in range(6):
            batch.set_batch(tokens, n_past=n_past, logits_all=False)
            tiny._ctx.decode(batch)
            n_past += len(tokens)
            tokens = [sampler.sample(tiny._ctx, -1)]
            found += tokens
        batch.close()
        sampler.close()
        return found

    first, second = generated(1337), generated(1337)
    assert first == second != generated(1338)
    assert tiny.fasa.counters.nodes["sparse"] == 3 * 5 * LAYERS


@pytest.fixture(scope="module")
def tokens(plain: Any) -> list[int]:
    found: list[int] = plain.tokenize(STORY.encode())
    return found


@pytest.mark.parametrize("types", [("f16", "f16"), ("q8_0", "q8_0"), ("f16", "q8_0")], ids="-".join)
def test_logits_are_those_of_the_parent(
    types: tuple[str, str], tiny_model_path: Path, tokens: list[int]
) -> None:
    settings = {**CONTEXT, "type_k": KV_TYPES[types[0]], "type_v": KV_TYPES[types[1]]}

    def after_the_prompt(llm: Any) -> Any:
        llm.eval(tokens[:-8])
        return decode(llm, tokens[-8:])

    with opened_plain(tiny_model_path, **settings) as parent:
        wanted = after_the_prompt(parent)
    with verified(tiny_model_path, budget=512, min_ctx=0, **settings) as llm:
        assert nmse(after_the_prompt(llm), wanted) < MAX_NMSE
        llm.reset()
        llm.fasa.min_ctx = 512
        assert np.array_equal(after_the_prompt(llm), wanted)
        llm.reset()
        llm.fasa.min_ctx, llm.fasa.budget = 0, 48
        assert nmse(after_the_prompt(llm), wanted) > 2 * MAX_NMSE  # the comparison notices
        nodes = llm.fasa.counters.nodes
    assert (nodes["sparse"], nodes["short_context"]) == (2 * 8 * LAYERS, 8 * LAYERS)


@pytest.mark.parametrize("n_batch", [64, 88], ids=lambda n: f"n_batch{n}")
def test_a_prompt_longer_than_a_batch(
    n_batch: int, tiny_model_path: Path, tokens: list[int]
) -> None:
    """The last batch has 11 or 3 rows: prefill, or as few as a decode step may have."""
    settings = {**CONTEXT, "n_batch": n_batch, "n_ubatch": 32, "logits_all": True}
    with opened_plain(tiny_model_path, **settings) as parent:
        parent.eval(tokens)
        wanted = parent.scores[: len(tokens)].copy()
    with verified(tiny_model_path, budget=512, min_ctx=0, **settings) as llm:
        llm.eval(tokens[:-1])
        llm.eval(tokens[-1:])
        assert nmse(llm.scores[: len(tokens)], wanted) < MAX_NMSE
        assert np.isfinite(llm.scores[: len(tokens)]).all()


def test_scores_are_those_of_the_last_steps(tiny_model_path: Path, tokens: list[int]) -> None:
    with verified(tiny_model_path, **SPARSE, logits_all=True) as llm:
        llm.eval(tokens[:-3])
        for token in tokens[-3:]:
            llm.eval([token])
            assert np.array_equal(llm.scores[llm.n_tokens - 1], logits(llm))
        assert len(llm.eval_logits) == len(tokens)
        rows = np.array(llm.eval_logits, np.float32)[-3:]
    with verified(tiny_model_path, **SPARSE) as llm:
        llm.eval(tokens[:-3])
        assert np.array_equal(decode(llm, tokens[-3:]), rows)


# ---- sampling by hand ----------------------------------------------------------------------------


def test_eval_and_sample_by_hand(tiny: Llama) -> None:
    tiny.eval(tiny.tokenize(PROMPT.encode(), special=True))
    found = []
    while (token := tiny.sample(temp=0.0)) != tiny.token_eos():
        assert token == int(np.argmax(logits(tiny)))
        found.append(token)
        tiny.eval([token])
    assert tiny.detokenize(found).decode() == ANSWER
    assert tiny.fasa.counters.nodes["sparse"] == len(found) * LAYERS


def test_generate_goes_on_without_a_reset(tiny: Llama) -> None:
    prompt = tiny.tokenize(PROMPT.encode(), special=True)
    tiny.eval(prompt[:200])
    parts = [list(islice(tiny.generate(prompt[200:], temp=0.0, reset=False), 4))]
    parts.append(list(islice(tiny.generate(parts[0][-1:], temp=0.0, reset=False), 5)))
    assert tiny.n_tokens == len(prompt) + 8
    text = tiny.detokenize(parts[0] + parts[1]).decode()
    assert len(text) > 10
    assert ANSWER.startswith(text)


@pytest.mark.parametrize("right", [True, False], ids=["right", "wrong"])
def test_tokens_sent_into_the_generator_are_a_guess(right: bool, tiny_model_path: Path) -> None:
    """All are evaluated at once; those behind the first wrong one are taken back."""
    with verified(tiny_model_path, **SPARSE, logits_all=True) as llm:
        answer = llm.tokenize(ANSWER.encode())
        stream = llm.generate(llm.tokenize(PROMPT.encode(), special=True), temp=0.0)
        found = [next(stream), stream.send(answer[1:4] if right else answer[2:5])]
        found += islice(stream, len(answer) - 2)
        stream.close()
        assert found == answer
        assert llm.fasa.counters.graphs == len(answer) - (3 if right else 0)


def test_prompt_lookup_drafts_tokens_without_changing_the_answer(tiny_model_path: Path) -> None:
    draft = LlamaPromptLookupDecoding(max_ngram_size=2, num_pred_tokens=3)
    settings = {**SPARSE, "draft_model": draft}
    with verified(tiny_model_path, **settings) as llm:
        response = llm.create_completion(PROMPT, temperature=0.0)
        assert response["choices"][0]["text"] == ANSWER
        assert (
            llm.fasa.counters.graphs < 1 + response["usage"]["completion_tokens"]
        )  # some came free


# ---- a full context ------------------------------------------------------------------------------


def test_more_tokens_than_the_context_has(tiny_model_path: Path) -> None:
    def ask(llm: llama_cpp.Llama) -> None:
        llm.eval(llm.tokenize(2 * STORY.encode()))

    assert both_raise(tiny_model_path, ask) == "RuntimeError: llama_decode returned 1"


def test_the_context_is_used_to_its_last_cell(tiny: Llama) -> None:
    tokens = (2 * tiny.tokenize(STORY.encode()))[:512]
    tiny.eval(tokens[:-2])
    decode(tiny, tokens[-2:])
    with pytest.raises(RuntimeError, match="llama_decode returned 1"):
        tiny.eval(tokens[:1])
    assert tiny.n_tokens == 512


# ---- embeddings ----------------------------------------------------------------------------------


def test_embeddings_are_those_of_the_parent(tiny_model_path: Path) -> None:
    texts = STORY.splitlines()[:3]

    def vectors(llm: Any) -> Any:
        alone = [llm.embed(text, normalize=True) for text in texts]
        return llm.create_embedding(texts)["data"], llm.embed(texts, return_count=True), alone

    with opened_plain(tiny_model_path, **CONTEXT, embedding=True) as parent:
        wanted = vectors(parent)
    with verified(tiny_model_path, **SPARSE, embedding=True) as llm:
        llm.eval(llm.tokenize(STORY.encode()))
        llm.eval([llm.token_nl()])
        assert vectors(llm) == wanted
        assert llm.n_tokens == 0
    assert np.allclose([np.linalg.norm(row) for row in wanted[2][0]], 1.0)
