"""After llama-cpp-python's tests of reused prompts, saved states and caches: answers are those of a fresh model."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from llama_cpp import LlamaDiskCache, LlamaRAMCache

from pyfasa import Llama
from support import verified
from upstream import ANSWER, LAYERS, PROMPT, SPARSE, STORY, said

OTHER = PROMPT.replace("48213", "66042")
OTHER_ANSWER = ANSWER.replace("48213", "66042")


def answer(llm: Any, prompt: str | list[int] = PROMPT, **arguments: Any) -> str:
    text: str = said(llm.create_completion(prompt, temperature=0.0, **arguments))[0]
    return text


def evaluated(llm: Any, prompt: str) -> list[int]:
    tokens: list[int] = llm.tokenize(prompt.encode(), special=True)
    llm.reset()
    llm.eval(tokens)
    return tokens


@pytest.fixture
def twin(tiny_model_path: Path) -> Iterator[Any]:
    """A second model like `tiny`."""
    with verified(tiny_model_path, **SPARSE) as llm:
        yield llm


def test_the_same_prompt_again(tiny: Llama) -> None:
    """Only its last token is read again."""
    assert answer(tiny) == ANSWER
    before = tiny.fasa.counters
    assert answer(tiny) == ANSWER
    after = tiny.fasa.counters
    assert after.nodes["prefill"] == before.nodes["prefill"]
    assert after.nodes["sparse"] - before.nodes["sparse"] == before.nodes["sparse"] + LAYERS


def test_an_evaluated_prompt_is_not_read_again(
    tiny: Llama, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = evaluated(tiny, PROMPT)
    monkeypatch.setattr(tiny, "reset", lambda: pytest.fail("reset() was called"))
    before = tiny.fasa.counters.graphs
    found = list(islice(tiny.generate(tokens, temp=0.0), 8))
    assert tiny.fasa.counters.graphs == before + 7
    assert tiny.n_tokens == len(tokens) + 7
    assert ANSWER.startswith(tiny.detokenize(found).decode())


@pytest.mark.parametrize("edit", ["fact", "shorter", "longer", "question"])
def test_an_edited_history(edit: str, tiny: Llama) -> None:
    """Nothing of what was read before shows in the answer."""
    prompts = {
        "fact": (OTHER, OTHER_ANSWER),
        "shorter": (
            PROMPT.replace("Remember that quiet otter lives at 5521 Main Street.\n", ""),
            ANSWER,
        ),
        "longer": (PROMPT.replace("key solar", "key hollow banjo: 12345\nkey solar"), ANSWER),
        "question": (
            PROMPT.replace(
                "What is the secret code for amber falcon?", "Where does quiet otter live?"
            ),
            "quiet otter lives at 5521 Main Street.",
        ),
    }
    prompt, wanted = prompts[edit]
    assert answer(tiny) == ANSWER
    assert answer(tiny, prompt, max_tokens=24) == wanted
    assert answer(tiny) == ANSWER


def test_a_prompt_that_was_the_start_of_another(tiny: Llama) -> None:
    evaluated(tiny, PROMPT + OTHER_ANSWER + "<|im_end|>\n" + STORY[:200])
    assert answer(tiny) == ANSWER


def test_a_state_in_the_same_model(tiny: Llama) -> None:
    tokens = evaluated(tiny, PROMPT)
    state = tiny.save_state()
    assert answer(tiny, OTHER) == OTHER_ANSWER
    tiny.load_state(state)
    assert list(tiny.eval_tokens) == tokens
    before = tiny.fasa.counters.nodes["prefill"]
    assert answer(tiny) == ANSWER
    assert tiny.fasa.counters.nodes["prefill"] == before
    assert tiny.fasa.counters.stale_events > 0


def test_a_state_in_another_model(tiny: Llama, twin: Llama) -> None:
    """With another prompt of the same length in its cache, which was indexed."""
    tokens = evaluated(tiny, PROMPT)
    state = tiny.save_state()
    assert answer(tiny) == ANSWER
    assert answer(twin, OTHER) == OTHER_ANSWER
    twin.load_state(state)
    assert twin.n_tokens == len(tokens)
    assert answer(twin) == ANSWER


def test_a_state_from_the_middle_of_an_answer(tiny: Llama, twin: Llama) -> None:
    stream = tiny.create_completion(PROMPT, temperature=0.0, stream=True)
    start = "".join(chunk["choices"][0]["text"] for chunk in islice(stream, 6))
    state = tiny.save_state()
    stream.close()
    assert answer(twin, OTHER) == OTHER_ANSWER
    twin.load_state(state)
    before = twin.fasa.counters.nodes["prefill"]
    rest = answer(
        twin, tiny.tokenize(PROMPT.encode(), special=True) + tiny.tokenize(start.encode())
    )
    assert start + rest == ANSWER
    assert twin.fasa.counters.nodes["prefill"] == before


def test_scores_in_a_state(tiny_model_path: Path) -> None:
    settings = {**SPARSE, "logits_all": True}
    with verified(tiny_model_path, **settings) as llm:
        tokens = evaluated(llm, STORY)
        llm.eval(tokens[:1])
        state, wanted = llm.save_state(), llm.scores[: len(tokens) + 1].copy()
        evaluated(llm, OTHER)
        llm.load_state(state)
        assert np.array_equal(llm._scores, wanted)


@pytest.fixture(params=["memory", "disk"])
def cache(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    return LlamaRAMCache() if request.param == "memory" else LlamaDiskCache(str(tmp_path))


def test_a_cache_is_used(
    cache: Any, tiny: Llama, twin: Llama, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model that has read another prompt loads the state of this one."""
    tiny.set_cache(cache)
    assert answer(tiny) == ANSWER
    assert answer(twin, OTHER) == OTHER_ANSWER
    twin.set_cache(cache)
    loaded = []
    load = twin.load_state
    monkeypatch.setattr(twin, "load_state", lambda state: (loaded.append(state), load(state)))
    before = twin.fasa.counters.nodes["prefill"]
    assert answer(twin) == ANSWER
    assert len(loaded) == 1
    assert twin.fasa.counters.nodes["prefill"] == before
    assert cache.cache_size > 0


def test_a_cache_without_the_prompt(cache: Any, tiny: Llama) -> None:
    tiny.set_cache(cache)
    assert [answer(tiny), answer(tiny, OTHER), answer(tiny)] == [ANSWER, OTHER_ANSWER, ANSWER]
    assert answer(tiny, STORY, max_tokens=3)
    tiny.set_cache(None)
    assert answer(tiny) == ANSWER


def test_a_cache_and_a_stream(cache: Any, tiny: Llama, twin: Llama) -> None:
    for llm in (tiny, twin):
        llm.set_cache(cache)
        chunks = llm.create_completion(PROMPT, temperature=0.0, stream=True)
        assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == ANSWER
    assert answer(twin, OTHER) == OTHER_ANSWER
