"""After llama-cpp-python's tests of chat: every format it has, its own template, JSON, tools."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from llama_cpp import LogitsProcessorList, llama_chat_format
from llama_cpp.llama_chat_format import LlamaChatCompletionHandlerRegistry

from pyfasa import Llama
from support import verified
from upstream import (
    ANSWER,
    LAYERS,
    MESSAGES,
    PROMPT,
    QUESTION,
    SPARSE,
    STORY,
    agreed,
    both_raise,
    said,
)

OWN = "chat_template.default"  # the model's template; llama-cpp-python's "chatml" adds an empty system turn
WITHOUT_FILES = sorted(
    set(LlamaChatCompletionHandlerRegistry()._chat_handlers) - {"functionary-v1", "functionary-v2"}
)
START = "".join(STORY.splitlines(keepends=True)[:4])
CONVERSATION = [
    {"role": "system", "content": "Answer from the text."},
    {"role": "user", "content": f"{START}\nWhere does quiet otter live?"},
    {"role": "assistant", "content": "quiet otter lives at 5521 Main Street."},
    {"role": "user", "content": QUESTION},
]
LOOKUP = {
    "type": "object",
    "properties": {
        "name": {"enum": ["amber falcon", "icy comet"]},
        "code": {"type": "string", "pattern": "^[0-9]{5}$"},
    },
    "required": ["name", "code"],
}
CLOSE = {
    "type": "object",
    "properties": {"ticket": {"enum": ["one", "two"]}},
    "required": ["ticket"],
}
TOOLS = [
    {"type": "function", "function": {"name": name, "parameters": schema}}
    for name, schema in (("lookup", LOOKUP), ("close", CLOSE))
]


def chosen(name: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name}}


def check_lookup(text: str) -> None:
    found = json.loads(text)
    assert list(found) == ["name", "code"]
    assert found["name"] in ("amber falcon", "icy comet")
    assert len(found["code"]) == 5
    assert found["code"].isdigit()


# ---- formats -------------------------------------------------------------------------------------


def test_there_are_formats() -> None:
    assert len(WITHOUT_FILES) >= 25
    assert {"chatml", "llama-2", "llama-3", "mistral-instruct"} < set(WITHOUT_FILES)


@pytest.mark.parametrize("name", [OWN, *WITHOUT_FILES])
def test_formats(name: str, tiny_model_path: Path) -> None:
    """Prompt and answer are the parent's; marks that the model does not know are text to it."""

    def ask(llm: Any, steps: LogitsProcessorList) -> Any:
        def on_one_line(ids: Any, scores: Any) -> Any:  # to some formats a line is all
            scores[llm.token_nl()] = -100.0
            return scores

        return llm.create_chat_completion(
            CONVERSATION,
            temperature=0.0,
            max_tokens=8,
            logits_processor=LogitsProcessorList([*steps, on_one_line]),
        )

    response = agreed(tiny_model_path, ask, chat_format=name)
    assert response["object"] == "chat.completion"
    assert response["choices"][0]["message"]["role"] == "assistant"


@pytest.mark.parametrize("name", ["functionary-v1", "functionary-v2", "no such format"])
def test_formats_that_need_what_is_not_there(name: str, tiny_model_path: Path) -> None:
    def ask(llm: Any) -> None:
        llm.chat_format = name
        llm.create_chat_completion(MESSAGES)

    error = both_raise(tiny_model_path, ask)
    assert ("hf_tokenizer_path" in error) == name.startswith("functionary")
    assert ("Invalid chat handler: no such format" in error) == (name == "no such format")


@pytest.mark.parametrize("name", [OWN, "chatml-function-calling"])
def test_the_answer_is_found(name: str, tiny: Llama) -> None:
    tiny.chat_format = name
    text, reason, usage = said(tiny.create_chat_completion(MESSAGES, temperature=0.0))
    assert (text, reason) == (ANSWER, "stop")
    assert usage["prompt_tokens"] == len(tiny.tokenize(PROMPT.encode(), special=True))
    assert tiny.fasa.counters.nodes["sparse"] == usage["completion_tokens"] * LAYERS


def test_a_conversation_goes_on_from_its_prefix(tiny: Llama) -> None:
    tiny.chat_format = OWN
    messages = list(MESSAGES)
    for question, answer in (
        (None, ANSWER),
        ("Where does quiet otter live?", "quiet otter lives at 5521 Main Street."),
        (QUESTION, ANSWER),
    ):
        messages += [{"role": "user", "content": question}] if question else []
        before = tiny.fasa.counters.cells_indexed
        assert said(tiny.create_chat_completion(messages, temperature=0.0))[0] == answer
        indexed = (tiny.fasa.counters.cells_indexed - before) // LAYERS
        assert (indexed > 280) if question is None else (indexed < 100)
        messages.append({"role": "assistant", "content": answer})


HANDLERS = {
    "tokenizer config": llama_chat_format.hf_tokenizer_config_to_chat_completion_handler(
        {
            "bos_token": "<|endoftext|>",
            "eos_token": "<|im_end|>",
            "chat_template": "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
            "{% if not loop.last %}{{ eos_token + '\n' }}{% endif %}{% endfor %}",
        }
    ),
    "template": llama_chat_format.Jinja2ChatFormatter(
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content + eos_token }}\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
        eos_token="<|im_end|>",
        bos_token="<|endoftext|>",
    ).to_chat_handler(),
}


@pytest.mark.parametrize("name", HANDLERS)
def test_handlers_made_from_templates(name: str, tiny_model_path: Path) -> None:
    settings = {**SPARSE, "chat_handler": HANDLERS[name]}
    with verified(tiny_model_path, **settings) as llm:
        text, reason, usage = said(llm.create_chat_completion(MESSAGES, temperature=0.0))
        assert (text, reason) == (ANSWER, "stop")
        assert usage["prompt_tokens"] == len(llm.tokenize(PROMPT.encode(), special=True))


# ---- JSON ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [OWN, "chatml", "llama-2", "chatml-function-calling"])
def test_json_of_a_schema(name: str, tiny: Llama) -> None:
    tiny.chat_format = name
    form = {"type": "json_object", "schema": LOOKUP}
    response = tiny.create_chat_completion(
        MESSAGES, temperature=0.0, max_tokens=60, response_format=form
    )
    assert response["choices"][0]["finish_reason"] == "stop"
    check_lookup(response["choices"][0]["message"]["content"])


def test_json_without_a_schema(tiny: Llama) -> None:
    bias = {tiny.tokenize(b'"')[0]: 5.0, tiny.token_nl(): -100.0}  # so that it comes to an end
    response = tiny.create_chat_completion(
        MESSAGES,
        temperature=0.0,
        max_tokens=60,
        response_format={"type": "json_object"},
        logit_bias=bias,
    )
    text, reason, _ = said(response)
    assert reason == "stop"
    assert json.loads(text)


# ---- tools ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("name", ["chatml", "chatml-function-calling"])
def test_a_tool_that_was_chosen(name: str, stream: bool, tiny: Llama) -> None:
    tiny.chat_format = name
    response = tiny.create_chat_completion(
        MESSAGES,
        tools=TOOLS,
        tool_choice=chosen("lookup"),
        temperature=0.0,
        max_tokens=60,
        stream=stream,
    )
    if stream:
        chunks = [chunk["choices"][0] for chunk in response]
        calls = [chunk["delta"]["tool_calls"][0] for chunk in chunks[1:-1]]
        reason, called = chunks[-1]["finish_reason"], {call["function"]["name"] for call in calls}
        text = "".join(call["function"]["arguments"] for call in calls)
    else:
        ((call,), reason, _) = said(response)
        called, text = {call["name"]}, call["arguments"]
    assert (reason, called) == ("tool_calls", {"lookup"})
    check_lookup(text)


@pytest.mark.parametrize("name", ["chatml", "chatml-function-calling"])
def test_a_function_in_the_old_way(name: str, tiny: Llama) -> None:
    tiny.chat_format = name
    response = tiny.create_chat_completion(
        MESSAGES,
        functions=[tool["function"] for tool in TOOLS],
        function_call={"name": "close"},
        temperature=0.0,
        max_tokens=60,
    )
    call = response["choices"][0]["message"]["function_call"]
    assert call["name"] == "close"
    assert json.loads(call["arguments"])["ticket"] in ("one", "two")


def test_a_tool_that_the_model_chooses(tiny: Llama) -> None:
    """Towards functions with a push, since this model was not trained to call any."""
    first = tiny.tokenize(b"functions")[0]

    def push(ids: Any, scores: Any) -> Any:
        scores[first] += 100.0
        return scores

    tiny.chat_format = "chatml-function-calling"
    response = tiny.create_chat_completion(
        MESSAGES,
        tools=TOOLS[:1],
        tool_choice="auto",
        temperature=0.0,
        logits_processor=LogitsProcessorList([push]),
    )
    calls, reason, _ = said(response)
    assert reason == "tool_calls"
    assert {call["name"] for call in calls} == {"lookup"}
    for call in calls:
        check_lookup(call["arguments"])


def test_tools_that_are_not_asked_for(tiny: Llama) -> None:
    tiny.chat_format = "chatml-function-calling"
    ask = {"tools": TOOLS, "tool_choice": "none", "temperature": 0.0}
    assert said(tiny.create_chat_completion(MESSAGES, **ask))[0] == ANSWER


@pytest.mark.parametrize(
    ("name", "arguments", "sentence"),
    [
        ("chatml", {"tool_choice": chosen("none")}, "Tool choice 'none' not found in tools."),
        ("chatml-function-calling", {"tool_choice": chosen("none")}, "'none' not found in tools"),
        ("chatml-function-calling", {"tool_choice": "auto", "stream": True}, "not supported"),
    ],
    ids=["chatml", "function calling", "stream"],
)
def test_tools_that_cannot_be_called(
    name: str, arguments: dict[str, Any], sentence: str, tiny_model_path: Path
) -> None:
    def ask(llm: Any) -> None:
        llm.chat_format = name
        first = llm.tokenize(b"functions")[0]

        def push(ids: Any, scores: Any) -> Any:
            scores[first] += 100.0
            return scores

        processors = LogitsProcessorList([push])
        llm.create_chat_completion(MESSAGES, tools=TOOLS, logits_processor=processors, **arguments)

    error = both_raise(tiny_model_path, ask)
    assert error.startswith("ValueError")
    assert sentence in error
