"""Cases: the same for the same seed, with the right facts in the text, and hard where they should be."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from pyfasa.evaluation.tasks import TASKS, Case, Group, make_cases, read_custom


def words(text: str) -> list[int]:
    """A tokenizer for tests: words, newlines and other signs, four characters at most."""
    return [hash(piece) for piece in re.findall(r"\w{1,4}|\n\s*|\S| +", text)]


def made(task: str, n_tokens: int = 3000, n: int = 14, seed: int = 0) -> list[Group]:
    return list(make_cases(task, words, n_tokens, n, seed))


@pytest.mark.parametrize("task", TASKS)
def test_a_seed_decides_everything(task: str) -> None:
    n = 3 if task == "aggregation" else 14
    assert made(task, n=n) == made(task, n=n)
    assert made(task, n=n) != made(task, n=n, seed=1)


@pytest.mark.parametrize("task", TASKS)
def test_numbers_lengths_and_names_of_cases(task: str) -> None:
    n = 3 if task == "aggregation" else 14
    groups = made(task, n=n)
    cases = [case for group in groups for case in group]
    assert len(cases) == n
    assert len({case.id for case in cases}) == n
    assert all(case.task == task and case.n_tokens == 3000 for case in cases)
    assert len({group[0].document for group in groups}) == len(groups)
    for group in groups:
        assert len({case.document for case in group}) == 1
        assert 0.98 * 3000 <= len(words(group[0].document)) <= 3000


@pytest.mark.parametrize("task", ["needle", "multikey"])
def test_facts_stand_once_with_unique_values(task: str) -> None:
    for group in made(task):
        text = group[0].document
        values = re.findall(r"(?<!\d)\d{7}(?!\d)", text)
        for case in group:
            name, (value,) = case.meta["name"], case.expected
            line = next(line for line in text.split("\n") if re.search(rf"{name}\b", line))
            assert value in line
            assert name in case.question
            assert values.count(value) == 1
            where = text.index(line) / len(text)
            assert where == pytest.approx(case.depth, abs=0.08)


def test_needles_lie_on_a_grid_of_depths_among_distractors() -> None:
    first, _ = made("needle")
    assert [case.depth for case in first] == pytest.approx([(i + 0.5) / 10 for i in range(10)])
    assert len({case.meta["form"] for case in first}) == 5
    for case in first:
        adjective, noun = case.meta["name"].split()
        for shared in (rf"{adjective} (?!{noun})\w+", rf"(?!{adjective})\b\w+ {noun}\b"):
            lines = [line for line in first[0].document.split("\n") if re.search(shared, line)]
            assert any(re.search(r"(?<!\d)\d{7}(?!\d)", line) for line in lines), shared


def test_multikey_names_have_to_match_in_full() -> None:
    group = made("multikey")[0]
    names = [case.meta["name"].split() for case in group]
    assert len({case.meta["form"] for case in group}) == 1
    facts = [
        line for line in group[0].document.split("\n") if re.search(r"(?<!\d)\d{7}(?!\d)", line)
    ]
    assert len(facts) >= 30
    for adjective, noun in names:
        assert sum(adjective in line.split() for line in facts) >= 2
        assert sum(re.search(rf"\b{noun}\b", line) is not None for line in facts) >= 2


def test_tracking_asks_for_a_whole_chain() -> None:
    for case in made("tracking")[0]:
        links = dict(re.findall(r"^VAR (\w+) = (.+)$", case.document, re.MULTILINE))
        value = case.meta["name"]

        def end(name: str, links: dict[str, str] = links) -> str:
            source = links[name]
            return end(source.removeprefix("VAR ")) if source.startswith("VAR ") else source

        assert {name for name in links if end(name) == value} == set(case.expected)
        assert len(case.expected) == 4
        assert value in case.question
        places = [case.document.index(f"VAR {name} = ") for name in case.expected]
        assert places == sorted(places), "a variable must not be used before it is assigned"


def test_aggregation_asks_for_the_most_common_words() -> None:
    case = made("aggregation", n=1)[0][0]
    counts = Counter(re.findall(r"^\d+\. (\w+)$", case.document, re.MULTILINE))
    assert {word for word, _ in counts.most_common(5)} == set(case.expected)
    (_, fifth), (_, sixth) = counts.most_common(6)[4:]
    assert fifth > sixth


@pytest.mark.parametrize(
    ("expected", "answer", "score"),
    [
        (("1234567",), "The code is 1234567.", 1.0),
        (("1234567",), "12345678", 0.0),
        (("otter", "Falcon"), "falcon, otters", 0.5),
        (("c++",), "In C++, of course", 1.0),
        (("a", "b", "c", "d"), "", 0.0),
    ],
)
def test_score_is_the_share_found_as_whole_words(
    expected: tuple[str, ...], answer: str, score: float
) -> None:
    assert Case("t", "0", "", "?", expected).score(answer) == score


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (
            ("walk", words, 2000, 5, 0),
            "'walk' is no task with documents; there are needle, multikey",
        ),
        (("needle", words, 2000, 0, 0), "n_questions is 0"),
        (
            ("needle", words, 30, 10, 0),
            "the facts alone take .* ask for fewer facts or more tokens",
        ),
    ],
)
def test_wrong_arguments(arguments: Any, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        list(make_cases(*arguments))


def test_custom_prompts_share_documents(tmp_path: Path) -> None:
    path = tmp_path / "own.jsonl"
    lines = [
        {"prompt": "a?", "expected": "1", "document": "text"},
        {"prompt": "b?", "expected": ["2", "3"]},
        {"prompt": "c?", "expected": "4", "document": "text"},
        {"prompt": "d?", "expected": "5"},
    ]
    path.write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    groups = read_custom(path, 7)
    assert [[case.question for case in group] for group in groups] == [["a?", "c?"], ["b?"], ["d?"]]
    assert groups[1][0].expected == ("2", "3")
    assert {case.max_tokens for group in groups for case in group} == {7}
    assert len({case.id for group in groups for case in group}) == 4


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("{", "line 2 of .* is no JSON object"),
        ("[]", "line 2 of .* is no JSON object"),
        ('{"prompt": "a"}', 'line 2 of .* needs "prompt"'),
        ('{"prompt": "a", "expected": []}', 'line 2 of .* needs "prompt"'),
        ('{"prompt": "a", "expected": [1]}', 'line 2 of .* needs "prompt"'),
        ('{"prompt": "", "expected": "x"}', 'line 2 of .* needs "prompt"'),
        ('{"prompt": "a", "expected": "x", "document": 3}', 'line 2 of .* needs "prompt"'),
    ],
)
def test_wrong_lines_are_named(line: str, sentence: str, tmp_path: Path) -> None:
    path = tmp_path / "own.jsonl"
    path.write_text('{"prompt": "a", "expected": "x"}\n' + line)
    with pytest.raises(ValueError, match=sentence):
        read_custom(path)


def test_an_empty_file_is_told(tmp_path: Path) -> None:
    path = tmp_path / "own.jsonl"
    path.write_text("\n")
    with pytest.raises(ValueError, match="has no prompts"):
        read_custom(path)
