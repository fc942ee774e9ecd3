"""Training documents: plain text, or text with hidden facts and questions about some of them.

Names, forms and answers come from `pyfasa.documents`, which evaluation uses too. Sample number i
of a seed is always the same, so a resumed run sees what an unbroken one would have seen.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from tokenizers import Tokenizer
from torch import Tensor
from torch.utils.data import Dataset

from pyfasa.documents import Fact, invent_facts

from . import RecipeError
from .text import END_OF_TEXT, TOKENIZER, Tokens, load

Encode = Callable[[str], Sequence[int]]

USER, ASSISTANT, END = "<|im_start|>user\n", "<|im_start|>assistant\n", "<|im_end|>\n"

# An answer is a few tokens in thousands: weighted up, or text prediction drowns it.
TEXT_WEIGHT, QUESTION_WEIGHT, ANSWER_WEIGHT = 1.0, 0.2, 4.0

FACT_SHARE = 0.6  # of the documents; the others are plain text
LEDGER_SHARE = 0.2  # of the documents with facts: half of their tokens are facts, all of one form
LEDGER_FACT_TOKENS = 28
MAX_LEDGER = 1000
N_FORMS = 5


class Sample(NamedTuple):
    """One document of T + 1 tokens; row t of the other two belongs to target tokens[t + 1]."""

    tokens: Tensor  # int64 [T + 1]
    weight: Tensor  # float32 [T], weight of the target in the loss
    answer: Tensor  # bool [T], whether the target is part of an answer


class Samples(Dataset[Sample]):
    """Sample i of a seed, for a DataLoader with workers.

    text        array written by `text.prepare`
    context     T, tokens per sample
    fact_share  0 = plain text only, 1 = every document has facts
    """

    def __init__(
        self,
        text: Path,
        context: int,
        seed: int,
        *,
        fact_share: float = FACT_SHARE,
        tokenizer: Path = TOKENIZER,
    ) -> None:
        load(text, context + 1)
        self.text, self.context, self.seed = text, context, seed
        self.fact_share, self.tokenizer = fact_share, tokenizer
        self._opened: tuple[Tokens, Encode] | None = None

    def __getitem__(self, index: int) -> Sample:
        if self._opened is None:
            # Opened in the worker: a mapped file would be copied whole on its way there.
            encoder = Tokenizer.from_file(str(self.tokenizer))
            self._opened = load(self.text, self.context + 1), lambda text: encoder.encode(text).ids
        text, encode = self._opened
        rng = random.Random(f"{self.seed}/{self.context}/{index}")
        if rng.random() < self.fact_share:
            return document_with_facts(rng, text, self.context, encode)
        return plain_document(rng, text, self.context)


def plain_document(rng: random.Random, text: Tokens, context: int) -> Sample:
    """`context` + 1 tokens of text from a random place, all of weight 1."""
    tokens = torch.from_numpy(_cut(rng, text, context + 1))
    return Sample(
        tokens, torch.full((context,), TEXT_WEIGHT), torch.zeros(context, dtype=torch.bool)
    )


def document_with_facts(rng: random.Random, text: Tokens, context: int, encode: Encode) -> Sample:
    """One conversation of `context` + 1 tokens: a document with facts, then a turn per question.

    Text fills what facts and questions leave. Raises RecipeError if not even one fact fits.
    """
    facts, n_asked = draw_facts(rng, context)
    lines = [encode(f"\n{fact.sentence}\n") for fact in facts]
    questions: list[Sequence[int]] = []
    answers: list[Sequence[int]] = []
    for fact in facts[:n_asked]:
        before = END + USER if questions else "\n\n"
        questions.append(encode(f"{before}{fact.question}{END}{ASSISTANT}"))
        answers.append(encode(fact.answer))
    opening, closing = encode(USER), encode(END)

    def room() -> int:
        parts = [opening, *lines, *questions, *answers, closing]
        return context + 1 - sum(map(len, parts))

    while (n_text := room()) < 0:
        if len(lines) == 1:
            raise RecipeError(
                f"a context of {context} tokens is too short for one fact and its question; "
                "train at 128 or more."
            )
        lines.pop()
        del questions[len(lines) :], answers[len(lines) :]

    filler = _cut(rng, text, n_text)
    # One message holds one document: where files meet in it, a newline does.
    filler[filler == END_OF_TEXT] = encode("\n")[0]
    pieces = [(opening, TEXT_WEIGHT, False)]
    pieces += [(piece, TEXT_WEIGHT, False) for piece in _hide(rng, filler, lines)]
    for question, answer in zip(questions, answers, strict=True):
        pieces += [(question, QUESTION_WEIGHT, False), (answer, ANSWER_WEIGHT, True)]
    pieces.append((closing, QUESTION_WEIGHT, False))
    lengths = torch.tensor([len(tokens) for tokens, _, _ in pieces])
    return Sample(
        torch.tensor([token for tokens, _, _ in pieces for token in tokens]),
        torch.tensor([weight for _, weight, _ in pieces]).repeat_interleave(lengths)[1:],
        torch.tensor([answer for _, _, answer in pieces]).repeat_interleave(lengths)[1:],
    )


def draw_facts(rng: random.Random, context: int) -> tuple[list[Fact], int]:
    """Facts in random order, and how many of the first to ask about.

    Short documents get few of both, so that text is left to hide them in.
    """
    n_asked = rng.randint(4, 32) if context >= 2048 else rng.randint(2, 7)
    if rng.random() < LEDGER_SHARE:
        n_facts = min(max(context // (2 * LEDGER_FACT_TOKENS), 1), MAX_LEDGER)
        # Forms come in equal shares, so one form of five times as many is the wanted number.
        drawn = invent_facts(rng, n_facts * N_FORMS)
        form = rng.choice(drawn).form
        facts = [fact for fact in drawn if fact.form == form]
    else:
        n_facts = max(n_asked, rng.randint(4, max(5, context // 96)))
        facts = invent_facts(rng, n_facts)
    return facts, min(n_asked, len(facts))


def _cut(rng: random.Random, text: Tokens, n: int) -> npt.NDArray[np.int64]:
    """`n` consecutive tokens of the text, int64 [n]."""
    start = rng.randint(0, len(text) - n)
    return text[start : start + n].astype(np.int64)


def _hide(
    rng: random.Random, text: npt.NDArray[np.int64], lines: Sequence[Sequence[int]]
) -> list[Sequence[int]]:
    """Cut the text at random places and put one line at each cut."""
    cuts = [0, *sorted(rng.randint(0, len(text)) for _ in lines), len(text)]
    pieces: list[Sequence[int]] = []
    for (start, end), line in zip(pairwise(cuts), [*lines, ()], strict=True):
        pieces += [text[start:end].tolist(), line]
    return pieces
