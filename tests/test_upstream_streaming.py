"""After llama-cpp-python's tests of streams: chunks make up the text, whole characters only, and may be left."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from llama_cpp import LlamaGrammar, StoppingCriteriaList

from pyfasa import Llama
from support import opened_plain, verified
from upstream import ANSWER, CONTEXT, LAYERS, MESSAGES, PROMPT, SPARSE, STORY, agreed


def pieces(llm: Any, **arguments: Any) -> tuple[list[str], str | None]:
    """The texts of the chunks, and why the last one ended."""
    chunks = [c["choices"][0] for c in llm.create_completion(stream=True, **arguments)]
    assert [c["finish_reason"] for c in chunks[:-1]] == [None] * (len(chunks) - 1)
    return [c["text"] for c in chunks], chunks[-1]["finish_reason"]


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"max_tokens": 5},
        {"stop": ["482"]},
        {"stop": "falcon is"},
        {"stop": ["not there", "con"]},
        {"top_k": 5, "temperature": 2.0, "seed": 5},
        {"mirostat_mode": 2, "temperature": 1.0, "seed": 5},
        {"repeat_penalty": 1.1, "logit_bias": {3: 1.0}},
    ],
    ids=lambda arguments: "-".join(arguments) or "greedy",
)
def test_chunks_make_up_the_text(arguments: dict[str, Any], tiny: Llama) -> None:
    arguments = {"prompt": PROMPT, "max_tokens": 24, "temperature": 0.0, **arguments}
    whole = tiny.create_completion(**arguments)["choices"][0]
    tiny.reset()
    found, reason = pieces(tiny, **arguments)
    assert ("".join(found), reason) == (whole["text"], whole["finish_reason"])
    assert len(found) > 3
    assert arguments["temperature"] > 0.0 or ANSWER.startswith(whole["text"])


def test_what_a_chunk_holds(tiny: Llama) -> None:
    chunks = list(tiny(PROMPT, temperature=0.0, stream=True, model="a name"))
    assert len({c["id"] for c in chunks}) == len({c["created"] for c in chunks}) == 1
    assert {(c["object"], c["model"]) for c in chunks} == {("text_completion", "a name")}
    assert all(
        set(c["choices"][0]) == {"text", "index", "logprobs", "finish_reason"} for c in chunks
    )
    # A chunk for each token, and one that says why.
    assert len(chunks) == len(tiny.tokenize(ANSWER.encode())) + 1
    assert chunks[-1]["choices"][0]["finish_reason"] == "stop"


def test_a_chunk_comes_as_soon_as_its_token(tiny: Llama) -> None:
    n_prompt = len(tiny.tokenize(PROMPT.encode(), special=True))
    stream = tiny.create_completion(PROMPT, temperature=0.0, stream=True)
    for i in range(6):
        next(stream)
        assert tiny.n_tokens == n_prompt + i
        assert tiny.fasa.counters.nodes["sparse"] == i * LAYERS
    stream.close()


def test_a_stream_may_be_left(tiny: Llama) -> None:
    for n in (1, 4, 0):
        stream = tiny.create_completion(PROMPT, temperature=0.0, stream=True)
        taken = [chunk["choices"][0]["text"] for chunk in islice(stream, n)]
        stream.close()
        assert ANSWER.startswith("".join(taken))
        other, _ = pieces(tiny, prompt=STORY, max_tokens=3, temperature=0.0)
        assert len(other) == 4
    assert "".join(pieces(tiny, prompt=PROMPT, temperature=0.0)[0]) == ANSWER


def test_a_criterion_that_raises_ends_the_stream_only(tiny: Llama) -> None:
    def fail(ids: Any, scores: Any) -> bool:
        if len(ids) % 2:
            raise KeyError("enough")
        return False

    arguments: dict[str, Any] = {"prompt": PROMPT, "temperature": 0.0}
    with pytest.raises(KeyError, match="enough"):
        pieces(tiny, stopping_criteria=StoppingCriteriaList([fail]), **arguments)
    assert "".join(pieces(tiny, **arguments)[0]) == ANSWER


@pytest.mark.parametrize("max_tokens", [3, 4, 6, 40])
def test_chunks_are_whole_characters(max_tokens: int, tiny_model_path: Path) -> None:
    """The model has no token for any of these; a limit cuts one in two."""
    word = "é☃漢🎉ß"
    arguments: dict[str, Any] = {"prompt": STORY, "max_tokens": max_tokens, "temperature": 0.0}

    def ask(llm: Any) -> Any:
        grammar = LlamaGrammar.from_string(f'root ::= "{word}"', verbose=False)
        found = pieces(llm, grammar=grammar, **arguments)
        return found, llm.create_completion(grammar=grammar, **arguments)["choices"]

    with opened_plain(tiny_model_path, **CONTEXT) as plain:
        wanted = ask(plain)
    with verified(tiny_model_path, **SPARSE) as llm:
        assert len(llm.tokenize(word.encode())) > 10
        assert ask(llm) == wanted
    text = "".join(wanted[0][0])
    assert text
    assert word.startswith(text)
    assert (text == word) == (max_tokens == 40)


def test_log_probabilities_of_chunks(tiny_model_path: Path) -> None:
    """Those of the whole text, one by one."""
    with verified(tiny_model_path, **SPARSE, logits_all=True) as llm:
        ask = {"prompt": PROMPT, "temperature": 0.0, "logprobs": 2}
        whole = llm.create_completion(**ask)["choices"][0]
        llm.reset()
        chunks = [c["choices"][0] for c in llm.create_completion(stream=True, **ask)]
        assert "".join(c["text"] for c in chunks) == whole["text"] == ANSWER
        for name in ("tokens", "text_offset"):
            found = [value for c in chunks[:-1] for value in c["logprobs"][name]]
            assert found == whole["logprobs"][name]
        found = [value for c in chunks[:-1] for value in c["logprobs"]["token_logprobs"]]
        assert np.array_equal(found, whole["logprobs"]["token_logprobs"])


def test_a_streamed_chat(tiny: Llama) -> None:
    tiny.chat_format = "chat_template.default"  # the model's own
    chunks = list(tiny.create_chat_completion(MESSAGES, temperature=0.0, stream=True))
    deltas = [c["choices"][0]["delta"] for c in chunks]
    assert deltas[0] == {"role": "assistant"}
    assert "".join(delta["content"] for delta in deltas[1:-1]) == ANSWER
    assert deltas[-1] == {}
    assert chunks[-1]["choices"][0]["finish_reason"] == "stop"
    assert {c["object"] for c in chunks} == {"chat.completion.chunk"}
    assert len({c["id"] for c in chunks}) == 1


def test_streams_are_those_of_the_parent(tiny_model_path: Path) -> None:
    def ask(llm: Any, steps: Any) -> Any:
        chunks = list(
            llm.create_completion(
                STORY, max_tokens=12, temperature=0.0, stream=True, logits_processor=steps
            )
        )
        text = "".join(c["choices"][0]["text"] for c in chunks)
        return {"choices": [{**chunks[-1]["choices"][0], "text": text}], "usage": None}

    response = agreed(tiny_model_path, ask)
    assert len(response["choices"][0]["text"]) > 12
