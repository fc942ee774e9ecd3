"""After llama-cpp-python's tests of grammars: sampled text conforms, whatever FASA attends to."""

from __future__ import annotations

import json
import re
from itertools import takewhile
from pathlib import Path
from typing import Any

import pytest
from llama_cpp import LlamaGrammar

from pyfasa import Llama
from support import opened_plain, verified
from upstream import ANSWER, CONTEXT, LAYERS, PROMPT, QUESTION, SPARSE, STORY, agreed, said

TREE = """
root ::= node
node ::= leaf | "(" node node ")"
leaf ::= "."
"""


def grammar(text: str) -> LlamaGrammar:
    return LlamaGrammar.from_string(text, verbose=False)


def of_schema(schema: dict[str, Any]) -> LlamaGrammar:
    return LlamaGrammar.from_json_schema(json.dumps(schema), verbose=False)


def nested(text: str) -> str:
    """A tree with every pair folded into a leaf, until nothing changes."""
    while (folded := text.replace("(..)", ".")) != text:
        text = folded
    return text


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    ("rules", "pattern"),
    [
        ('root ::= "true" | "false"', "true|false"),
        ("root ::= [0-9]{4} [a-f]? [!]", "[0-9]{4}[a-f]?!"),
        (
            'root ::= word (", " word){2} "."\nword ::= [A-Z] [a-z]{1,5}',
            r"([A-Z][a-z]{1,5}[,.] ?){3}",
        ),
        ('root ::= "é" [一-鿿] "🎉"?', "é[一-鿿]🎉?"),
    ],
    ids=["words", "ranges", "rules", "unicode"],
)
def test_samples_conform(rules: str, pattern: str, seed: int, tiny: Llama) -> None:
    text, reason, _ = said(
        tiny.create_completion(
            STORY, temperature=2.0, seed=seed, max_tokens=60, grammar=grammar(rules)
        )
    )
    assert re.fullmatch(pattern, text)
    assert reason == "stop"


def test_a_recursive_grammar(tiny: Llama) -> None:
    for seed in range(4):
        response = tiny.create_completion(
            STORY, temperature=1.5, seed=seed, max_tokens=40, grammar=grammar(TREE)
        )
        text, reason, _ = said(response)
        assert set(text) <= set("(.)")
        assert (nested(text) == ".") == (reason == "stop")


SCHEMAS: dict[str, tuple[dict[str, Any], Any]] = {
    "references": (
        {
            "$defs": {
                "Point": {
                    "type": "object",
                    "properties": {"x": {"enum": [1, 2]}, "y": {"type": "boolean"}},
                    "required": ["x", "y"],
                }
            },
            "type": "object",
            "properties": {"at": {"$ref": "#/$defs/Point"}, "mode": {"const": "walk"}},
            "required": ["at", "mode"],
        },
        lambda v: v["at"]["x"] in (1, 2) and v["at"]["y"] in (True, False) and v["mode"] == "walk",
    ),
    "any of": (
        {
            "type": "object",
            "properties": {
                "unit": {"anyOf": [{"enum": ["celsius", "kelvin"]}, {"type": "null"}]},
                "warm": {"type": "boolean"},
            },
            "required": ["unit", "warm"],
        },
        lambda v: v["unit"] in ("celsius", "kelvin", None) and v["warm"] in (True, False),
    ),
    "an array": (
        {"type": "array", "items": {"enum": ["a", "b"]}, "minItems": 2, "maxItems": 3},
        lambda v: 2 <= len(v) <= 3 and set(v) <= {"a", "b"},
    ),
    "a pattern": (
        {"type": "string", "pattern": "^[a-c]{3}-[0-9]{2}$"},
        lambda v: re.fullmatch("[a-c]{3}-[0-9]{2}", v) is not None,
    ),
}


@pytest.mark.parametrize("temperature", [0.0, 1.5])
@pytest.mark.parametrize("name", SCHEMAS)
def test_json_schemas(name: str, temperature: float, tiny: Llama) -> None:
    schema, conforms = SCHEMAS[name]
    text, reason, _ = said(
        tiny.create_completion(
            PROMPT, temperature=temperature, seed=1, max_tokens=90, grammar=of_schema(schema)
        )
    )
    assert reason == "stop"
    assert conforms(json.loads(text))


def test_a_grammar_from_a_file(tiny: Llama, tmp_path: Path) -> None:
    file = tmp_path / "answer.gbnf"
    file.write_text('root ::= "It is " [0-9]{5} "."')
    response = tiny.create_completion(
        PROMPT, temperature=0.0, grammar=LlamaGrammar.from_file(str(file), verbose=False)
    )
    assert re.fullmatch(r"It is \d{5}\.", response["choices"][0]["text"])


def test_a_grammar_that_leaves_the_value_open(tiny: Llama) -> None:
    """The value comes from the text, through the cells that were selected."""
    rules = 'root ::= "The secret code for amber falcon is " [0-9]+ "."'
    response = tiny.create_completion(PROMPT, temperature=0.0, grammar=grammar(rules))
    text, reason, usage = said(response)
    assert (text, reason) == (ANSWER, "stop")
    assert tiny.fasa.counters.nodes["sparse"] == usage["completion_tokens"] * LAYERS


def test_a_grammar_is_used_again(tiny: Llama) -> None:
    rules = grammar('root ::= [0-9]{3} "!"')
    for stream in (False, True, False):
        response = tiny.create_completion(STORY, temperature=0.0, grammar=rules, stream=stream)
        chunks = response if stream else [response]
        text = "".join(chunk["choices"][0]["text"] for chunk in chunks)
        assert re.fullmatch(r"\d{3}!", text)


def test_a_grammar_in_a_chat(tiny: Llama) -> None:
    messages = [{"role": "user", "content": f"{STORY}\n{QUESTION}"}]
    rules = grammar('root ::= "yes" | "no"')
    response = tiny.create_chat_completion(messages, temperature=0.0, grammar=rules)
    assert response["choices"][0]["message"]["content"] in ("yes", "no")


def test_a_grammar_in_the_generator(tiny: Llama) -> None:
    tokens = tiny.tokenize(PROMPT.encode(), special=True)
    stream = tiny.generate(tokens, temp=0.0, grammar=grammar('root ::= "ab" | "cd"'))
    found = list(takewhile(lambda token: token != tiny.token_eos(), stream))
    assert tiny.detokenize(found) in (b"ab", b"cd")


def test_samples_are_those_of_the_parent(tiny_model_path: Path) -> None:
    rules = 'root ::= "The " [a-z ]{4,30} "."'
    agreed(
        tiny_model_path,
        lambda llm, steps: llm.create_completion(
            PROMPT, temperature=0.0, grammar=grammar(rules), logits_processor=steps
        ),
    )


def test_seeds_and_states(tiny_model_path: Path) -> None:
    """Each completion draws a new seed from the last one, and a state holds it; dense, as the parent does."""
    rules = "root ::= [1-9] [0-9]{3}"

    def numbers(llm: Any) -> list[str]:
        def number() -> str:
            response = llm.create_completion(STORY, temperature=1.5, grammar=grammar(rules))
            text: str = response["choices"][0]["text"]
            return text

        *tokens, last = llm.tokenize(STORY.encode())
        llm.eval(tokens)
        llm.eval([last])  # as it will be when the state is loaded
        llm.set_seed(1337)
        state = llm.save_state()
        found = [number(), number()]
        llm.load_state(state)
        return [*found, number(), number()]

    with verified(tiny_model_path, **SPARSE) as llm:
        sparse = numbers(llm)
        llm.reset()
        with llm.dense():
            dense = numbers(llm)
    with opened_plain(tiny_model_path, **CONTEXT) as plain:
        assert numbers(plain) == dense
    for first, second, *again in (sparse, dense):
        assert first != second
        assert again == [first, second]
