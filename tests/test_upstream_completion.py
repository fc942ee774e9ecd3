"""After llama-cpp-python's tests of completions: what ends them, samplers, penalties, processors, log probabilities."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from llama_cpp import (
    LogitsProcessorList,
    MinTokensLogitsProcessor,
    StoppingCriteriaList,
)

from pyfasa import Llama
from support import opened_plain, verified
from upstream import ANSWER, CONTEXT, PROMPT, SPARSE, STORY, agreed, both_raise, said


def text_of(llm: Any, prompt: str | list[int] = PROMPT, **arguments: Any) -> str:
    response = llm.create_completion(
        prompt, **{"temperature": 0.0, "max_tokens": None, **arguments}
    )
    text: str = response["choices"][0]["text"]
    return text


def test_a_response(tiny: Llama) -> None:
    n_prompt = len(tiny.tokenize(PROMPT.encode(), special=True))
    n_answer = len(tiny.tokenize(ANSWER.encode()))
    response = tiny.create_completion(PROMPT, temperature=0.0, model="a name")
    assert response["id"].startswith("cmpl-")
    assert (response["object"], response["model"]) == ("text_completion", "a name")
    usage = {
        "prompt_tokens": n_prompt,
        "completion_tokens": n_answer,
        "total_tokens": n_prompt + n_answer,
    }
    assert said(response) == (ANSWER, "stop", usage)


def test_ways_to_ask(tiny: Llama) -> None:
    tokens = tiny.tokenize(PROMPT.encode(), special=True)
    assert text_of(tiny, tokens) == ANSWER
    assert tiny(PROMPT, temperature=0.0)["choices"][0]["text"] == ANSWER
    assert text_of(tiny, echo=True) == PROMPT + ANSWER
    assert text_of(tiny, PROMPT + ANSWER[:-4]) == ANSWER[-4:]


def test_ways_not_to_ask(tiny_model_path: Path) -> None:
    """The bundled model has no beginning to put in front of an empty prompt."""
    assert both_raise(tiny_model_path, lambda llm: llm("")).startswith("AssertionError")
    error = both_raise(tiny_model_path, lambda llm: llm([5, 6, 7], echo=True, max_tokens=1))
    assert error.startswith("TypeError")
    error = both_raise(tiny_model_path, lambda llm: llm(PROMPT, logprobs=2))
    assert error.endswith("logprobs is not supported for models created with logits_all=False")
    error = both_raise(tiny_model_path, lambda llm: llm(2 * STORY))
    assert error == "ValueError: Requested tokens (534) exceed context window of 512"


# ---- what ends a completion ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "stop", ["48", ["falcon", " code"], [".", "213"], " secret", ["not there"], [], None], ids=repr
)
def test_stop_strings(stop: Any, tiny: Llama) -> None:
    ends = [ANSWER.find(s) for s in ([stop] if isinstance(stop, str) else stop or [])]
    response = tiny.create_completion(PROMPT, temperature=0.0, max_tokens=40, stop=stop)
    text, reason, _ = said(response)
    assert text == ANSWER[: min((end for end in ends if end >= 0), default=None)]
    assert reason == "stop"


@pytest.mark.parametrize("n", [2, 5])
def test_a_limit_of_tokens(n: int, tiny: Llama) -> None:
    response = tiny.create_completion(PROMPT, temperature=0.0, max_tokens=n)
    text, reason, usage = said(response)
    assert tiny.tokenize(ANSWER.encode())[:n] == tiny.tokenize(text.encode())
    assert (reason, usage["completion_tokens"]) == ("length", n)


@pytest.mark.parametrize("max_tokens", [None, 0, -1, 10_000])
def test_without_a_limit_the_context_is_one(max_tokens: int | None, tiny: Llama) -> None:
    prompt = (2 * tiny.tokenize(STORY.encode()))[: tiny.n_ctx() - 12]
    never = {tiny.token_eos(): -100.0, tiny.token_bos(): -100.0}
    response = tiny.create_completion(prompt, max_tokens=max_tokens, logit_bias=never)
    _, reason, usage = said(response)
    assert (reason, usage["total_tokens"]) == ("length", tiny.n_ctx())


def test_stopping_criteria(tiny: Llama) -> None:
    n_prompt = len(tiny.tokenize(PROMPT.encode(), special=True))
    seen: list[int] = []

    def enough(ids: Any, scores: Any) -> bool:
        assert scores.shape == (tiny.n_vocab(),)
        seen.append(len(ids))
        return len(ids) >= n_prompt + 4

    criteria = StoppingCriteriaList([enough])
    response = tiny.create_completion(PROMPT, temperature=0.0, stopping_criteria=criteria)
    text, reason, usage = said(response)
    assert (reason, usage["completion_tokens"]) == ("stop", 4)
    assert len(text) > 5
    assert ANSWER.startswith(text)
    assert seen[:5] == list(range(n_prompt, n_prompt + 5))


def test_a_minimum_of_tokens(tiny: Llama) -> None:
    wanted = len(tiny.tokenize(ANSWER.encode())) + 3
    patience = MinTokensLogitsProcessor(wanted, tiny.token_eos())
    response = tiny.create_completion(
        PROMPT, temperature=0.0, max_tokens=30, logits_processor=LogitsProcessorList([patience])
    )
    assert response["choices"][0]["text"].startswith(ANSWER)
    assert response["usage"]["completion_tokens"] >= wanted


# ---- samplers ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "sampler", [{"top_k": 1}, {"min_p": 1.0}, {"top_p": 0.0}, {"temperature": 1e-4}], ids=str
)
def test_samplers_that_leave_one_token_are_greedy(sampler: dict[str, Any], tiny: Llama) -> None:
    assert text_of(tiny, **{"temperature": 5.0, "seed": 3, **sampler}) == ANSWER


SAMPLERS: list[dict[str, Any]] = [
    {"top_k": 0},
    {"top_k": 5, "top_p": 0.7},
    {"min_p": 0.2},
    {"typical_p": 0.3},
    {"mirostat_mode": 1, "mirostat_tau": 3.0},
    {"mirostat_mode": 2, "mirostat_eta": 0.3},
    {"repeat_penalty": 1.3, "frequency_penalty": 0.5, "presence_penalty": 0.5},
]


@pytest.mark.parametrize("sampler", SAMPLERS, ids=lambda sampler: "-".join(sampler))
def test_a_seed_makes_samples_repeatable(sampler: dict[str, Any], tiny_model_path: Path) -> None:
    """Sparse from run to run; dense, they are the parent's."""
    sampler = {"temperature": 1.5, "max_tokens": 12, "min_p": 0.0, "top_p": 1.0, **sampler}

    def sampled(llm: Any, seed: int) -> str:
        return text_of(llm, STORY, seed=seed, **sampler)

    with verified(tiny_model_path, **SPARSE) as llm:
        llm.eval(
            llm.tokenize(STORY.encode() + b"The")
        )  # of which only the last token is read again
        first = sampled(llm, 7)
        assert sampled(llm, 8) != first
        assert sampled(llm, 7) == first
        with llm.dense():
            dense = sampled(llm, 7)
    with opened_plain(tiny_model_path, **CONTEXT) as plain:
        plain.eval(plain.tokenize(STORY.encode() + b"The"))
        assert sampled(plain, 7) == dense


@pytest.mark.parametrize(
    "penalty",
    [{"presence_penalty": 100.0}, {"frequency_penalty": 100.0}, {"repeat_penalty": 1e6}],
    ids=lambda penalty: next(iter(penalty)),
)
def test_penalties_keep_tokens_from_coming_twice(penalty: dict[str, Any], tiny: Llama) -> None:
    def tokens(**arguments: float) -> list[int]:
        stream = tiny.generate(tiny.tokenize(STORY.encode()), temp=0.0, **arguments)
        return [token for token, _ in zip(stream, range(30), strict=False)]

    assert len(set(tokens(**penalty))) == 30
    assert len(set(tokens())) < 30


def test_logit_bias(tiny: Llama) -> None:
    the, end = tiny.tokenize(b"The")[0], tiny.token_eos()
    assert not text_of(tiny, logit_bias={the: -100.0}, max_tokens=5).startswith("The")
    assert text_of(tiny, logit_bias={str(the): 1000.0}, max_tokens=3) == "TheTheThe"
    assert text_of(tiny, logit_bias={end: 1000.0}) == ""
    assert text_of(tiny) == ANSWER


def test_logits_processors(tiny: Llama) -> None:
    prompt = tiny.tokenize(PROMPT.encode(), special=True)
    word = tiny.tokenize(b" otter")
    lengths = []

    def say(ids: Any, scores: Any) -> Any:
        assert ids[: len(prompt)].tolist() == prompt
        assert scores.shape == (tiny.n_vocab(),)
        lengths.append(len(ids))
        scores[word[(len(ids) - len(prompt)) % len(word)]] = 1000.0
        return scores

    n = 2 * len(word)
    text = text_of(tiny, logits_processor=LogitsProcessorList([say]), max_tokens=n)
    assert text == " otter otter"
    assert lengths == list(range(len(prompt), len(prompt) + n))


# ---- against the parent --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [
        {"prompt": PROMPT},
        {"prompt": STORY, "max_tokens": 12},
        {"prompt": PROMPT, "stop": ["213"], "echo": True},
        {"prompt": STORY, "max_tokens": 12, "presence_penalty": 1.0, "repeat_penalty": 1.2},
    ],
    ids=lambda arguments: "-".join(arguments),
)
def test_completions_are_those_of_the_parent(
    arguments: dict[str, Any], tiny_model_path: Path
) -> None:
    agreed(
        tiny_model_path,
        lambda llm, steps: llm.create_completion(
            temperature=0.0, logits_processor=steps, **arguments
        ),
    )


def test_a_suffix_is_part_of_the_prompt(tiny_model_path: Path) -> None:
    suffix = "\nTicket icy comet"
    response = agreed(
        tiny_model_path,
        lambda llm, steps: llm.create_completion(
            STORY, suffix, max_tokens=8, temperature=0.0, logits_processor=steps
        ),
    )
    with verified(tiny_model_path, **SPARSE) as llm:
        assert response["usage"]["prompt_tokens"] > len(llm.tokenize((STORY + suffix).encode()))
        text_of(llm, STORY, suffix=suffix, max_tokens=8)


def test_log_probabilities_are_those_of_the_parent(tiny_model_path: Path) -> None:
    def ask(llm: Any) -> Any:
        return llm.create_completion(PROMPT, temperature=0.0, logprobs=3)["choices"][0]

    with opened_plain(tiny_model_path, **CONTEXT, logits_all=True) as plain:
        wanted = ask(plain)["logprobs"]
    with verified(tiny_model_path, **CONTEXT, budget=512, min_ctx=0, logits_all=True) as llm:
        choice = ask(llm)
        found = choice["logprobs"]
        assert "".join(found["tokens"]) == choice["text"] == ANSWER
        assert found["text_offset"] == wanted["text_offset"]
        assert found["tokens"] == wanted["tokens"]
        assert np.allclose(found["token_logprobs"], wanted["token_logprobs"], atol=0.2)
        for token, value, best in zip(
            found["tokens"], found["token_logprobs"], found["top_logprobs"], strict=True
        ):
            assert len(best) in (3, 4)
            assert best[token] == value == max(best.values()) <= 0.0
