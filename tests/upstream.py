"""What the tests after llama-cpp-python's own ones share: a text, a question, comparison with the parent."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import numpy.typing as npt
import pytest
from llama_cpp import LogitsProcessorList

from support import F32, MAX_NMSE, nmse, opened_plain, verified

STORY = """The night train left the harbor at nine, and nobody on the platform waved.
The secret code for amber falcon is 48213.
A man with a violin case slept in the corner, while two children counted stations on a map of their own.
Remember that quiet otter lives at 5521 Main Street.
Near the border the lights went out, and the conductor walked through the cars with a lamp and a list.
key solar piano: 90317
Somebody had written a number on the wall of the tunnel, and it passed too quickly to be read by anyone.
The phone number of brave heron is 770192.
In the morning there was snow on the hills, coffee in paper cups, and a field with one gray horse in it.
Ticket icy comet was closed with reference 6610.
"""
QUESTION = "What is the secret code for amber falcon?"
ANSWER = "The secret code for amber falcon is 48213."  # each digit is a token
MESSAGES = [{"role": "user", "content": f"{STORY}\n{QUESTION}"}]
PROMPT = f"<|im_start|>user\n{STORY}\n{QUESTION}<|im_end|>\n<|im_start|>assistant\n"

# More threads would mostly wait for each other in work this small.
CONTEXT: dict[str, Any] = {"n_ctx": 512, "n_threads": 1, "n_threads_batch": 1}
SPARSE = {**CONTEXT, "budget": 48, "min_ctx": 0}
LAYERS = 6  # of the bundled model, whose logits have a deviation of 4
TIE = 1.0  # logits this close may change places by rounding


class Steps:
    """A logits processor that changes nothing: the tokens before each sampled one, and its logits."""

    def __init__(self) -> None:
        self.seen: list[tuple[list[int], F32]] = []

    def __call__(self, ids: npt.NDArray[np.intc], scores: F32) -> F32:
        self.seen.append((ids.tolist(), np.array(scores, np.float32)))
        return scores


def said(response: Any) -> Any:
    """What a completion or chat completion says: text, message or tool calls, why it ended, usage."""
    (choice,) = response["choices"]
    message = choice.get("message", {})
    calls = [call["function"] for call in message.get("tool_calls", ())]
    text = choice.get("text", message.get("content"))
    return calls or text, choice["finish_reason"], response["usage"]


def agreed(path: Path, ask: Callable[[Any, LogitsProcessorList], Any], **arguments: Any) -> Any:
    """The response of pyfasa.Llama with a budget for all cells, after comparing it with llama_cpp.Llama's.

    `ask` samples greedily with the processors it is given. The logits of all tokens are the same within
    2 * MAX_NMSE, and so is what is said, except behind a token that was as good as another.
    """
    settings = {**CONTEXT, "n_ctx": 768, **arguments}
    steps = [Steps(), Steps()]
    with opened_plain(path, **settings) as plain:
        wanted = ask(plain, LogitsProcessorList([steps[0]]))
    with verified(path, budget=768, min_ctx=0, **settings) as llm:
        found = ask(llm, LogitsProcessorList([steps[1]]))
    rows: list[tuple[F32, F32]] = []
    apart = None
    for (ids, row), (our_ids, our_row) in zip(*(s.seen for s in steps), strict=False):
        if ids != our_ids:
            assert ids[:-1] == our_ids[:-1]
            apart = rows[-1][0][[ids[-1], our_ids[-1]]]
            break
        rows.append((row, our_row))
    # Rounding goes through six layers of quantized activations.
    assert nmse([ours for _, ours in rows], [row for row, _ in rows]) < 2 * MAX_NMSE
    if apart is None and said(found) != said(wanted):
        apart = np.sort(rows[-1][0])[-2:]
    assert apart is None or abs(apart[1] - apart[0]) < TIE
    return found


def both_raise(path: Path, ask: Callable[[llama_cpp.Llama], Any]) -> str:
    """The message of the exception that both classes raise, after which pyfasa.Llama still works."""

    def error_of(llm: llama_cpp.Llama) -> str:
        try:
            ask(llm)
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        pytest.fail("Nothing was raised.")

    with opened_plain(path, **CONTEXT) as plain, verified(path, **SPARSE) as llm:
        found = error_of(llm)
        assert found == error_of(plain)
        assert said(llm.create_completion(PROMPT, temperature=0.0))[0] == ANSWER
    return found
