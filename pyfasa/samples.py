"""The token runs that calibration evaluates: documents with questions about them, or a user's texts."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import closing, redirect_stderr
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import llama_cpp
import numpy as np
import numpy.typing as npt
from llama_cpp.llama_chat_format import Jinja2ChatFormatter

from pyfasa.documents import Document, make_document
from pyfasa.errors import ModelFileError

if TYPE_CHECKING:
    from pyfasa.llama import Llama
    from pyfasa.native import Session

F32 = npt.NDArray[np.float32]

DOCUMENTS = 2
FACTS = 16
QUERIES_OF_TEXT = 128  # the last tokens of a text ask
MIN_TEXT = 512
WINDOWS = 8  # of a long text, evenly spread


@dataclass(frozen=True)
class Sample:
    """Token runs of one document, in order; the queries of runs marked True are used."""

    runs: list[tuple[list[int], bool]]

    @property
    def n_tokens(self) -> int:
        return sum(len(tokens) for tokens, _ in self.runs)

    def visible(self) -> npt.NDArray[np.int64]:
        """How many cells each of the queries sees, itself among them."""
        ends = np.cumsum([len(tokens) for tokens, _ in self.runs])
        seen = [
            np.arange(end - len(tokens), end) + 1
            for end, (tokens, wanted) in zip(ends, self.runs, strict=True)
            if wanted
        ]
        return np.concatenate(seen)


def evaluate_sample(llm: Llama, sample: Sample) -> Session:
    """Evaluates a sample from its first token on, dense; the session has captured the queries of the wanted runs."""
    llm.n_tokens = 0  # the next eval removes the cells of the sample before
    with llm.fasa.capturing() as session:
        session.captured_clear()
    for tokens, wanted in sample.runs:
        with llm.fasa.capturing() if wanted else llm.dense():
            llm.eval(tokens)
    return session


def captured_layer(session: Session, layer: int, n_tokens: int) -> tuple[F32, F32] | None:
    """Queries (n_row, n_head, head_dim) and keys (n_tokens, n_head_kv, head_dim); None for a layer that stays dense."""
    try:
        queries = session.captured(layer)
    except RuntimeError:  # a layer without a replaceable attention node
        return None
    return queries, session.keys(layer, 0, n_tokens)


def open_vocabulary(model_path: str | os.PathLike[str]) -> llama_cpp.Llama:
    """A model without weights: tokenizer, metadata and chat template."""
    # verbose=False lets warnings through, and a context without weights earns one.
    with redirect_stderr(StringIO()):
        return llama_cpp.Llama(os.fspath(model_path), vocab_only=True, verbose=False)


def make_samples(
    model_path: str | os.PathLike[str],
    texts: Sequence[str | os.PathLike[str]] | None,
    n_ctx: int,
    seed: int,
    documents: int = DOCUMENTS,
    most: int = 0,
) -> list[Sample]:
    """One sample per window of a text, or the built-in documents; ``pyfasa.calibrate`` documents the arguments.

    most : tokens of a sample at most; 0: no limit. Built-in documents are shortened to leave room for the questions,
        which otherwise come after n_ctx tokens. ValueError if they then say nothing.
    """
    if texts is not None and len(texts) == 0:
        raise ValueError(
            "texts is an empty list; name files, or leave it out for the built-in documents."
        )
    # The context's size depends on the samples, so they are made with the vocabulary alone.
    with closing(open_vocabulary(model_path)) as vocab:
        if texts is None:
            seeds = range(seed * documents, (seed + 1) * documents)
            return [_with_questions(vocab, n_ctx, own, most) for own in seeds]
        return [sample for text in texts for sample in _from_text(vocab, Path(text), n_ctx)]


def _from_text(vocab: llama_cpp.Llama, path: Path, n_ctx: int) -> list[Sample]:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ModelFileError(
            f"The calibration text {path} cannot be read: {error.strerror}."
        ) from error
    tokens = vocab.tokenize(content, add_bos=True)
    if len(tokens) < MIN_TEXT:
        raise ValueError(
            f"{path} has {len(tokens)} tokens; a calibration text needs at least {MIN_TEXT}. Name a longer one, or "
            "none for the built-in documents."
        )
    n = max(1, min(WINDOWS, len(tokens) // n_ctx))
    starts = np.linspace(0, max(0, len(tokens) - n_ctx), n).astype(int)
    return [Sample(_asked(tokens[start : start + n_ctx])) for start in starts]


def _asked(tokens: list[int]) -> list[tuple[list[int], bool]]:
    """Runs of a text whose last tokens ask."""
    return [(tokens[:-QUERIES_OF_TEXT], False), (tokens[-QUERIES_OF_TEXT:], True)]


def _with_questions(vocab: llama_cpp.Llama, n_ctx: int, seed: int, most: int) -> Sample:
    """A document in the model's chat template, then every question with its answer as further turns."""

    def tokenize(text: str, *, start: bool = False) -> list[int]:
        return list(vocab.tokenize(text.encode(), add_bos=start, special=True))

    n_document = n_ctx - 64
    while True:
        document = make_document(tokenize, n_document, FACTS, seed)
        (first, _), *turns = _turns(vocab, document)
        # Answers look back at one place of the document; its end and the first question ask as text does.
        sample = Sample(
            [
                *_asked(tokenize(first, start=True)),
                *((tokenize(text), wanted) for text, wanted in turns),
            ]
        )
        over = sample.n_tokens - most
        if most == 0 or over <= 0:
            return sample
        n_document -= over
        if n_document < MIN_TEXT // 2:
            raise ValueError(
                f"The model was trained on contexts of {most} tokens, and the questions about a built-in document "
                f"leave {max(0, n_document)} of them for the document; name a text of your own to calibrate on."
            )


def _turns(vocab: llama_cpp.Llama, document: Document) -> list[tuple[str, bool]]:
    """Text runs, True for answers. Without a chat template: questions and answers on lines of their own."""
    template = vocab.metadata.get("tokenizer.chat_template")
    rng = np.random.default_rng(len(document.text))
    facts = [document.facts[i] for i in rng.permutation(len(document.facts))]
    if template is None:
        runs = [(document.text, False)]
        for fact in facts:
            runs += [(f"\n\nQuestion: {fact.question}\nAnswer: ", False), (fact.answer, True)]
        return runs
    formatter = Jinja2ChatFormatter(
        template=template,
        eos_token=vocab._model.token_get_text(vocab.token_eos()) if vocab.token_eos() != -1 else "",
        bos_token="",
    )
    messages: list[dict[str, str]] = []
    runs = []
    done = ""
    for i, fact in enumerate(facts):
        content = f"{document.text}\n\n{fact.question}" if i == 0 else fact.question
        messages.append({"role": "user", "content": content})
        prompt = formatter(messages=cast("Any", messages)).prompt
        runs += [(prompt[_shared(done, prompt) :], False), (fact.answer, True)]
        done = prompt + fact.answer
        messages.append({"role": "assistant", "content": fact.answer})
    return runs


def _shared(a: str, b: str) -> int:
    """Length of the common beginning."""
    unequal = (i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y)
    return next(unequal, min(len(a), len(b)))
