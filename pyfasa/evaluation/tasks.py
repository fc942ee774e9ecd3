"""Questions with known answers, as data: generated from local text with a seed, in RULER's spirit (arXiv 2404.06654).

needle       facts at a grid of depths among distractors that share the adjective or the noun of an asked name
multikey     facts of one form with near-identical names: the name must match in full
tracking     chains of variable assignments; all variables with a value are asked for
aggregation  the most common words of a long list of words
custom       prompts and expected answers of your own, from a JSONL file

Questions about the same document share it as the beginning of their prompts, so it is prefilled once.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any

from pyfasa.documents import ADJECTIVES, FORMS, NOUNS, Fact, Tokenize, hide, make_fact

QUESTIONS = 10  # about one document
TOKENS_PER_QUESTION = 100  # at least: a question brings two distractors
TOKENS_PER_FACT = 200  # about as in the training of the bundled model
TOKENS_PER_NEAR_FACT = 100
CHAIN = 4  # variables with one value
COMMON = 5  # words asked for in aggregation
_SEEDS = 1_000_000  # keeps the documents apart from those of a calibration with a small seed


@dataclass(frozen=True)
class Case:
    """One question.

    task       name of the task
    id         tells it apart within the task, for one seed
    document   text before the question, shared by neighbours; may be empty
    question   what is asked
    expected   texts that the answer must hold; the score is the share of them that is found
    n_tokens   of a document as it was asked for; 0 for custom
    depth      where the answer stands, 0 to 1; None: in many places
    max_tokens to generate at most
    one_line   the answer ends with its line
    """

    task: str
    id: str
    document: str
    question: str
    expected: tuple[str, ...]
    n_tokens: int = 0
    depth: float | None = None
    max_tokens: int = 24
    one_line: bool = True
    meta: dict[str, Any] = field(default_factory=dict)

    def score(self, answer: str) -> float:
        """Share of the expected texts that stand in the answer, each as a whole word or number."""
        text = answer.lower()
        found = [
            re.search(rf"(?<!\w){re.escape(one.lower())}(?!\w)", text) is not None
            for one in self.expected
        ]
        return sum(found) / len(found)


Group = tuple[Case, ...]  # cases about one document


def make_cases(
    task: str, tokenize: Tokenize, n_tokens: int, n_questions: int, seed: int
) -> Iterator[Group]:
    """n_questions cases about documents of n_tokens tokens, document by document.

    tokenize  text to tokens, without BOS
    seed      equal arguments give equal cases on one version of Python

    Raises ValueError for an unknown task, or if a document of n_tokens is too short for the task.
    """
    if task not in TASKS:
        raise ValueError(f"{task!r} is no task with documents; there are {', '.join(TASKS)}")
    if n_questions < 1:
        raise ValueError(f"n_questions is {n_questions}: at least 1 is needed")
    make, most = TASKS[task]
    per_document = max(1, min(most, n_tokens // TOKENS_PER_QUESTION))
    for number, first in enumerate(range(0, n_questions, per_document)):
        rng = random.Random(f"{task} {_SEEDS * (seed + 1) + number}")
        cases = make(tokenize, n_tokens, min(per_document, n_questions - first), rng)
        yield tuple(
            replace(
                case, task=task, id=f"{n_tokens}/{number}/{i}", n_tokens=n_tokens,
                meta={**case.meta, "document": number},
            )
            for i, case in enumerate(cases)
        )  # fmt: skip


# ---- facts --------------------------------------------------------------------------------------


def _needle(tokenize: Tokenize, n_tokens: int, n: int, rng: random.Random) -> list[Case]:
    pairs = _apart(rng, n)
    forms = [list(FORMS)[i % len(FORMS)] for i in range(n)]
    rng.shuffle(forms)
    asked = [(form, f"{a} {b}") for form, (a, b) in zip(forms, pairs, strict=True)]
    used = {name for _, name in asked}
    others: list[tuple[str, str]] = []
    n_others = max(2 * n, n_tokens // TOKENS_PER_FACT - n)
    while len(others) < n_others:
        i = len(others) % n  # two for each, and so on: one shares the adjective, one the noun
        adjective, noun = pairs[i]
        keep_adjective = len(others) // n % 2 == 0
        name = f"{adjective} {rng.choice(NOUNS)}"
        if not keep_adjective:
            name = f"{rng.choice(ADJECTIVES)} {noun}"
        if name not in used:
            used.add(name)
            others.append((forms[i], name))
    return _hidden(tokenize, n_tokens, asked, others, rng)


def _multikey(tokenize: Tokenize, n_tokens: int, n: int, rng: random.Random) -> list[Case]:
    n_facts = max(2 * n, n_tokens // TOKENS_PER_NEAR_FACT)
    side = max(2, int(n_facts**0.5))
    while side**2 < n_facts and side < min(len(ADJECTIVES), len(NOUNS)):
        side += 1
    grid = list(product(rng.sample(ADJECTIVES, side), rng.sample(NOUNS, side)))
    rng.shuffle(grid)
    form = rng.choice(list(FORMS))
    facts = [(form, f"{a} {b}") for a, b in grid[:n_facts]]
    return _hidden(tokenize, n_tokens, facts[:n], facts[n:], rng)


def _apart(rng: random.Random, n: int) -> list[tuple[str, str]]:
    """n names that share no word."""
    return list(zip(rng.sample(ADJECTIVES, n), rng.sample(NOUNS, n), strict=True))


def _hidden(
    tokenize: Tokenize,
    n_tokens: int,
    asked: Sequence[tuple[str, str]],
    others: Sequence[tuple[str, str]],
    rng: random.Random,
) -> list[Case]:
    """Asked facts at even depths, the others anywhere; values of 7 digits, unique in the document."""
    values = rng.sample(range(10**6, 10**7), len(asked) + len(others))
    facts = [make_fact(*known, str(v)) for known, v in zip([*asked, *others], values, strict=True)]
    rng.shuffle(order := list(range(len(asked))))
    depths = [(place + 0.5) / len(asked) for place in order]
    depths += [rng.random() for _ in others]
    placed = sorted(zip(depths, facts, strict=True), key=lambda pair: pair[0])
    document = hide(tokenize, n_tokens, [fact for _, fact in placed], sorted(depths), rng)
    cases = [
        _fact_case(document.text, fact, depth) for depth, fact in zip(depths, facts, strict=True)
    ]
    return sorted(cases[: len(asked)], key=lambda case: case.depth or 0)


def _fact_case(text: str, fact: Fact, depth: float) -> Case:
    meta = {"name": fact.name, "form": fact.form}
    return Case("", "", text, fact.question, (fact.value,), depth=depth, meta=meta)


# ---- many places at once ------------------------------------------------------------------------


def _tracking(tokenize: Tokenize, n_tokens: int, n: int, rng: random.Random) -> list[Case]:
    """One chain per question, and as many that nobody asks for; links stand in order, anywhere."""
    chains = []
    letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
    names = ["".join(rng.choices(letters, k=5)) for _ in range(4 * n * CHAIN)]
    names = list(dict.fromkeys(names))[: 2 * n * CHAIN]
    values = [str(v) for v in rng.sample(range(10**4, 10**5), 2 * n)]
    placed: list[tuple[float, Fact]] = []
    for i, value in enumerate(values):
        own = names[i * CHAIN : (i + 1) * CHAIN]
        sources = [value, *(f"VAR {name}" for name in own[:-1])]
        links = [f"VAR {name} = {source}" for name, source in zip(own, sources, strict=True)]
        depths = sorted(rng.random() for _ in links)
        placed += zip(depths, (_line(link) for link in links), strict=True)
        chains.append((value, own))
    placed.sort(key=lambda pair: pair[0])
    document = hide(tokenize, n_tokens, [f for _, f in placed], [d for d, _ in placed], rng)
    question = (
        "Find all variables that are assigned the value {value}, directly or through other "
        "variables. Answer with their names only."
    )
    return [
        Case("", "", document.text, question.format(value=value), tuple(own), max_tokens=64,
             one_line=False, meta={"name": value})
        for value, own in chains[:n]
    ]  # fmt: skip


def _line(sentence: str) -> Fact:
    return Fact("", "", "", sentence, "", "", position=0)


def _aggregation(tokenize: Tokenize, n_tokens: int, n: int, rng: random.Random) -> list[Case]:
    """A numbered list in which COMMON words stand five times as often as any other."""
    words = [*ADJECTIVES, *NOUNS]
    rng.shuffle(words)
    common, rare = words[:COMMON], words[COMMON:]

    def listed(n_times: int) -> list[str]:
        found = [
            *(w for w in common for _ in range(5 * n_times)),
            *(w for w in rare for _ in range(n_times)),
        ]
        random.Random(n_times).shuffle(found)
        return found

    def text(entries: Sequence[str]) -> str:
        lines = "\n".join(f"{i}. {word}" for i, word in enumerate(entries, 1))
        return f"Below is a numbered list of words. Some of them stand in it more often than others.\n\n{lines}"

    n_times = 1
    while len(tokenize(text(listed(n_times)))) < n_tokens:
        n_times *= 2
    entries = listed(n_times)
    rng.shuffle(entries)
    low, high = 0, len(entries)
    while high - low > 1:  # a shuffled list is as mixed at its beginning as in whole
        middle = (low + high) // 2
        low, high = (
            (middle, high) if len(tokenize(text(entries[:middle]))) <= n_tokens else (low, middle)
        )
    entries = entries[:low]
    counts = {word: entries.count(word) for word in words}
    ranked = sorted(words, key=lambda word: -counts[word])
    if counts[ranked[COMMON - 1]] == counts[ranked[COMMON]]:
        raise ValueError(
            f"a list of {n_tokens} tokens is too short to have {COMMON} most common words; ask for "
            "more tokens"
        )
    question = (
        f"What are the {COMMON} most common words in the list above? Answer with the words only."
    )
    return [
        Case("", "", text(entries), question, tuple(ranked[:COMMON]), max_tokens=64, one_line=False)
    ]


_Make = Callable[[Tokenize, int, int, random.Random], list[Case]]
TASKS: dict[str, tuple[_Make, int]] = {  # and how many questions a document has at most
    "needle": (_needle, QUESTIONS),
    "multikey": (_multikey, QUESTIONS),
    "tracking": (_tracking, 4),
    "aggregation": (_aggregation, 1),
}


# ---- custom -------------------------------------------------------------------------------------


def read_custom(path: str | Path, max_tokens: int = 128) -> list[Group]:
    """Cases of a JSONL file, those with equal documents in one group, in the order of the file.

    Each line is an object with "prompt", "expected" (a text or a list of texts) and, if several prompts are about
    the same text, "document".

    Raises ValueError with the number of the line that is wrong.
    """
    groups: dict[str, list[Case]] = {}
    lines = Path(path).read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines, 1):
        if line.strip():
            case = _custom_case(path, number, line, max_tokens)
            groups.setdefault(case.document, []).append(case)
    alone = [(case,) for case in groups.pop("", [])]
    if not groups and not alone:
        raise ValueError(f"{path} has no prompts; each line is like {_LIKE}")
    return [*map(tuple, groups.values()), *alone]


_LIKE = '{"prompt": "...", "expected": "..."}'


def _custom_case(path: str | Path, number: int, line: str, max_tokens: int) -> Case:
    try:
        values = json.loads(line)
    except ValueError:
        values = None
    if not isinstance(values, dict):
        raise ValueError(f"line {number} of {path} is no JSON object; it must be like {_LIKE}")
    prompt, expected = values.get("prompt"), values.get("expected")
    wanted = [expected] if isinstance(expected, str) else expected
    document = values.get("document", "")
    texts = [prompt, document, *(wanted if isinstance(wanted, list) else [None])]
    if not wanted or not prompt or not all(isinstance(text, str) for text in texts):
        raise ValueError(
            f'line {number} of {path} needs "prompt", a text, and "expected", a text or a list of '
            f'texts; "document" is optional: {_LIKE}'
        )
    return Case(
        "custom", f"line {number}", document, prompt, tuple(wanted), max_tokens=max_tokens,
        one_line=False,
    )  # fmt: skip
