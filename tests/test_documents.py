"""A document has the wanted length in tokens, and its facts can be asked for."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import llama_cpp
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyfasa.documents import MAX_FACTS, Fact, ask, is_right, make_document
from pyfasa.errors import HostError

Tokenize = Callable[[str], Sequence[int]]


def words(text: str) -> list[int]:
    """A tokenizer for tests: words, newlines and other signs, four characters at most."""
    return [hash(piece) for piece in re.findall(r"\w{1,4}|\n\s*|\S| +", text)]


@pytest.fixture(scope="module")
def tokenize(tiny_model_path: Path) -> Tokenize:
    llm = llama_cpp.Llama(str(tiny_model_path), vocab_only=True, verbose=False)
    return lambda text: llm.tokenize(text.encode(), add_bos=False)


@pytest.mark.parametrize(
    ("n_tokens", "n_facts"), [(700, 4), (2000, 10), (8000, 40), (32000, 160), (32000, 1000)]
)
@pytest.mark.parametrize("seed", [0, 1])
def test_length_is_within_one_percent_and_never_above(
    tokenize: Tokenize, n_tokens: int, n_facts: int, seed: int
) -> None:
    document = make_document(tokenize, n_tokens, n_facts, seed)
    assert document.n_tokens == len(tokenize(document.text))
    assert 0.99 * n_tokens <= document.n_tokens <= n_tokens


@settings(max_examples=15, deadline=None)
@given(st.integers(100, 3000), st.integers(1, 120), st.integers(0, 2**64))
def test_any_length_and_density(n_tokens: int, n_facts: int, seed: int) -> None:
    n_facts = min(n_facts, n_tokens // 25)
    document = make_document(words, n_tokens, n_facts, seed)
    assert min(0.99 * n_tokens, n_tokens - 4) <= document.n_tokens <= n_tokens
    assert len(document.facts) == n_facts


def test_each_fact_is_one_line_in_the_order_of_the_document(tokenize: Tokenize) -> None:
    document = make_document(tokenize, 8000, 40, 3)
    lines = document.text.split("\n")
    where = [lines.index(fact.sentence) for fact in document.facts]
    assert where == sorted(where)
    for fact in document.facts:
        assert lines.count(fact.sentence) == 1
        assert document.text.count(fact.name) == 1


def test_position_is_the_token_at_which_the_sentence_starts(tokenize: Tokenize) -> None:
    document = make_document(tokenize, 8000, 40, 3)
    for fact in document.facts:
        start = document.text.index(fact.sentence)
        assert fact.position == len(tokenize(document.text[: start + 1])) - 1


def test_facts_are_spread_over_the_whole_depth(tokenize: Tokenize) -> None:
    document = make_document(tokenize, 16000, 16, 5)
    depths = [fact.position / document.n_tokens for fact in document.facts]
    for i, depth in enumerate(depths):
        assert (i - 1) / 16 < depth < (i + 2) / 16


def test_names_and_values_are_unique_and_forms_in_equal_shares() -> None:
    document = make_document(words, 30000, 1000, 0)
    assert len({fact.name for fact in document.facts}) == 1000
    assert len({fact.value for fact in document.facts}) == 1000
    assert all(re.fullmatch("[1-9][0-9]{6}", fact.value) for fact in document.facts)
    forms = [fact.form for fact in document.facts]
    assert {form: forms.count(form) for form in forms} == dict.fromkeys(
        ("code", "address", "key", "phone", "ticket"), 200
    )


def test_forms_are_those_the_bundled_model_was_trained_on() -> None:
    document = make_document(words, 2000, 5, 0)
    found = {
        fact.form: tuple(
            text.replace(fact.name, "NAME").replace(fact.value, "VALUE")
            for text in (fact.sentence, fact.question, fact.answer)
        )
        for fact in document.facts
    }
    assert found == {
        "code": (
            "The secret code for NAME is VALUE.",
            "What is the secret code for NAME?",
            "The secret code for NAME is VALUE.",
        ),
        "address": (
            "Remember that NAME lives at VALUE Main Street.",
            "Where does NAME live?",
            "NAME lives at VALUE Main Street.",
        ),
        "key": ("key NAME: VALUE", "What is the value of key NAME?", "VALUE"),
        "phone": (
            "The phone number of NAME is VALUE.",
            "What is the phone number of NAME?",
            "VALUE",
        ),
        "ticket": (
            "Ticket NAME was closed with reference VALUE.",
            "Which reference closed ticket NAME?",
            "VALUE",
        ),
    }


def test_the_seed_decides() -> None:
    first = make_document(words, 1500, 8, 11)
    assert make_document(words, 1500, 8, 11) == first
    other = make_document(words, 1500, 8, 12)
    assert not {fact.value for fact in first.facts} & {fact.value for fact in other.facts}
    assert other.text[:200] != first.text[:200]


def test_text_comes_from_the_folder_that_is_named(tmp_path: Path) -> None:
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "module.py").write_text("alpha = 1\n" * 200)
    (tmp_path / "_sysconfigdata_linux.py").write_text("beta = 2\n" * 200)
    (tmp_path / "umlaut.py").write_text("gämma = 3\n" * 200, encoding="utf-8")
    document = make_document(words, 300, 2, 0, sources=tmp_path)
    hidden = {fact.sentence for fact in document.facts}
    assert {line for line in document.text.split("\n")[:-1] if line not in hidden} == {"alpha = 1"}


def test_a_machine_without_sources_is_told_the_way_out(tmp_path: Path) -> None:
    (tmp_path / "module.pyc").write_bytes(b"\0")
    with pytest.raises(HostError, match=r"has no \.py files.*use a Python that keeps the sources"):
        make_document(words, 500, 2, 0, sources=tmp_path)


def test_more_text_than_there_is(tmp_path: Path) -> None:
    (tmp_path / "module.py").write_text("alpha = 1\n" * 50)
    with pytest.raises(ValueError, match="5000 tokens was asked for, but all sources together"):
        make_document(words, 5000, 2, 0, sources=tmp_path)


@pytest.mark.parametrize(
    ("n_facts", "digits", "most"),
    [
        (0, (7, 7), MAX_FACTS),
        (-1, (7, 7), MAX_FACTS),
        (MAX_FACTS + 1, (4, 7), MAX_FACTS),
        (5, (1, 1), 4),
        (1, (0, 3), 0),
        (1, (5, 4), 0),
    ],
)
def test_number_of_facts_out_of_range(n_facts: int, digits: tuple[int, int], most: int) -> None:
    with pytest.raises(ValueError, match=f"n_facts is {n_facts}, but there can be 1 to {most} "):
        make_document(words, 1000, n_facts, 0, digits=digits)


def test_values_have_the_digits_that_were_asked_for() -> None:
    facts = make_document(words, 4000, 100, 0, digits=(2, 5)).facts
    assert {len(fact.value) for fact in facts} == {2, 3, 4, 5}


@pytest.mark.parametrize("n_tokens", [-5, 0, 300])
def test_facts_that_do_not_fit(n_tokens: int) -> None:
    with pytest.raises(ValueError, match=rf"alone take \d+ tokens, but .* {n_tokens}: ask for few"):
        make_document(words, n_tokens, 100, 0)


def test_all_questions_share_the_document_as_their_prefix() -> None:
    messages = ask("Where does quiet otter live?", "one\ntwo")
    assert messages == [{"role": "user", "content": "one\ntwo\n\nWhere does quiet otter live?"}]


FACT = Fact("key", "solar piano", "9031755", "", "", "", 0)


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        ("9031755", True),
        ("The secret code for solar piano is 9031755.", True),
        ("It is **9031755**, not 1234567", True),
        ("", False),
        ("903175", False),
        ("90317553", False),
        ("19031755", False),
        ("903 1755", False),
        ("9031756", False),
    ],
)
def test_an_answer_is_right_when_it_has_the_whole_number(answer: str, right: bool) -> None:
    assert is_right(answer, FACT) is right
    assert is_right(answer, replace(FACT, value="7777777")) is False
