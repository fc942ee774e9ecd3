"""A chat with a model: documents, turns, and what of them is in the cache. No terminal.

Documents stand before the question that follows them, in one message, as in `pyfasa run`. Each turn
evaluates what differs from the cache only, so a document is read once.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from pyfasa import console
from pyfasa.console import Answer, Stream, read_text
from pyfasa.errors import FasaError, WriteError

if TYPE_CHECKING:
    from pyfasa.chat.states import States
    from pyfasa.llama import Llama

Progress = Callable[[int, int], None]

WORTH_SAVING = 512  # tokens from which reading a state is quicker than reading the text
_PROBES = ("A", "0")  # questions that begin differently: what their chats share is there before


_WAYS_OUT = (
    "Keep the chat with /save FILE, then forget its turns with /clear, or start a larger context"
)


class ChatFullError(FasaError, ValueError):
    """The next turn does not fit into the context."""


@dataclass(frozen=True)
class Document:
    """A text that was given to the model."""

    name: str
    text: str


@dataclass(frozen=True)
class Turn:
    """Documents and a question, and what was answered; stopped: by Ctrl-C."""

    documents: tuple[Document, ...]
    question: str
    answer: str = ""
    stopped: bool = False

    @property
    def content(self) -> str:
        """The user's message."""
        return "\n\n".join([*(document.text for document in self.documents), self.question])


@dataclass(frozen=True)
class Reading:
    """What reading documents took.

    n_tokens:    of the chat up to the end of the documents
    n_evaluated: those that the model had to evaluate
    from_disk:   whether a state was loaded
    unsaved:     why no state could be saved, as a sentence
    """

    n_tokens: int
    n_evaluated: int
    seconds: float
    from_disk: bool
    unsaved: str | None = None


def read_document(path: Path) -> Document:
    """The text of a file; OSError when it cannot be read, ValueError when it is empty or not text."""
    text = read_text(path)
    if not text.strip():
        raise ValueError(f"{path} is empty; give a document with text.")
    if "\0" in text:
        raise ValueError(f"{path} is not text: it has zero bytes. Convert it to text first.")
    return Document(str(path), text)


class Conversation:
    """The turns of a chat, and the model that answers.

    max_tokens: of one answer
    states:     where prefilled documents are kept; None: nowhere
    """

    def __init__(
        self,
        llm: Llama,
        *,
        max_tokens: int = 1024,
        temp: float = 0.0,
        states: States | None = None,
    ) -> None:
        self.llm = llm
        self.turns: list[Turn] = []
        self.pending: list[Document] = []
        self.last: Answer | None = None
        self._max_tokens = max_tokens
        self._temp = temp
        self._states = states
        self._running: Stream | None = None

    @property
    def documents(self) -> list[Document]:
        """All documents, in the order in which they were given."""
        return [*chain.from_iterable(turn.documents for turn in self.turns), *self.pending]

    @property
    def model_name(self) -> str:
        return os.path.basename(self.llm.model_path)

    @property
    def cut(self) -> str | None:
        """Why the last answer ended before its end, as a sentence; None when it did not."""
        if self.llm.n_tokens + 1 >= self.llm.n_ctx():
            return f"The answer ends where the context does, at {self.llm.n_ctx():,} tokens. {_WAYS_OUT} with -c."
        if self.last is not None and self.last.n_steps + 1 >= self._max_tokens:
            return f"The answer was cut at {self._max_tokens:,} tokens; start with a larger -n for longer ones."
        return None

    def add(self, document: Document) -> None:
        """Puts a document before the next question; ChatFullError, and no change, if it does not fit."""
        self.pending.append(document)
        try:
            self._check_room(
                len(self._before_question()),
                f"With {document.name} the chat",
                "Give a shorter document, or start",
            )
        except ChatFullError:
            self.pending.pop()
            raise

    def clear(self) -> None:
        """Forgets all turns; their documents stay, and are still in the cache."""
        self.pending = self.documents
        self.turns = []
        self.last = None

    def read(self, progress: Progress) -> Reading:
        """Evaluates the documents before the next question, or loads the state of an earlier time.

        States are kept of the documents that open a chat: what follows is not likely to come again.
        """
        start = time.perf_counter()
        tokens = self._before_question()
        known = self._shared(tokens)
        keep = self._states is not None and not self.turns and len(tokens) - known >= WORTH_SAVING
        if keep and self._states is not None and self._states.load(self.llm, tokens):
            return Reading(len(tokens), 0, time.perf_counter() - start, from_disk=True)
        evaluated = self._evaluate(tokens, progress)
        reading = Reading(len(tokens), evaluated, time.perf_counter() - start, from_disk=False)
        if keep and self._states is not None:
            try:
                self._states.save(self.llm, tokens)
            except WriteError as error:
                return replace(reading, unsaved=str(error))
        return reading

    def ask(self, question: str, progress: Progress) -> Generator[str, None, None]:
        """Reads a question and returns its answer as pieces of text; close it to stop early.

        What was said up to an interruption stays in the chat; a question that got no word does not.
        Raises ChatFullError, and changes nothing, if the question does not fit.
        """
        turn = Turn(tuple(self.pending), question)
        tokens = self._tokens([*self.turns, turn])
        self._check_room(len(tokens), "With this question the chat", _WAYS_OUT)
        self._evaluate(tokens[:-1], progress)
        return self._answer(turn, tokens)

    def _answer(self, turn: Turn, tokens: list[int]) -> Generator[str, None, None]:
        stream = Stream(self.llm, tokens, self._max_tokens, self._temp)
        stopped = True
        self._running = stream
        try:
            yield from stream
            stopped = False
        finally:
            self._running = None
            self.last = stream.answer
            if self.last.text or not stopped:
                self.turns.append(replace(turn, answer=self.last.text, stopped=stopped))
                self.pending = []

    def now(self) -> Answer | None:
        """The answer so far, while one runs; else the last one."""
        return self.last if self._running is None else self._running.answer

    def status(self) -> str:
        """One line: speed, depth, share of the cache that was read, budget."""
        llm, answer = self.llm, self.now()
        parts = [f"depth {llm.n_tokens:,} of {llm.n_ctx():,}"]
        if answer is not None:
            parts = [
                f"{answer.speed:,.1f} tokens/s",
                *parts,
                f"cache read {console.percent(answer.cells_read)}",
            ]
        parts.append(f"budget {llm.fasa.budget:,}" if llm.fasa.active else "dense")
        return " | ".join(parts)

    # ---- tokens and cache ----

    def _tokens(self, turns: Sequence[Turn]) -> list[int]:
        """The chat in the model's template, up to where the answer of the last turn begins."""
        messages: list[dict[str, str]] = []
        for turn in turns:
            messages.append({"role": "user", "content": turn.content})
            messages.append({"role": "assistant", "content": turn.answer})
        return console.message_tokens(self.llm, messages[:-1])

    def _before_question(self) -> list[int]:
        """The chat and the pending documents, as far as it does not depend on the next question."""
        first, second = (
            self._tokens([*self.turns, Turn(tuple(self.pending), probe)]) for probe in _PROBES
        )
        return first[: _common(first, second)]

    def _check_room(self, n_tokens: int, what: str, way_out: str) -> None:
        n_ctx = self.llm.n_ctx()
        if n_tokens + 1 >= n_ctx:
            raise ChatFullError(
                f"{what} has {n_tokens:,} tokens and the context {n_ctx:,}; nothing was changed. "
                f"{way_out} with -c {n_tokens + self._max_tokens} or more."
            )

    def _shared(self, tokens: Sequence[int]) -> int:
        """How many of the first tokens are in the cache."""
        return _common(self.llm.input_ids[: self.llm.n_tokens].tolist(), tokens)

    def _evaluate(self, tokens: Sequence[int], progress: Progress) -> int:
        """Brings the cache to hold just these tokens; returns how many were evaluated."""
        import llama_cpp

        llm = self.llm
        shared = self._shared(tokens)
        if shared < llm.n_tokens and not llm._ctx.kv_cache_seq_rm(-1, shared, -1):
            # a recurrent model cannot go back
            llama_cpp.llama_memory_clear(llm._ctx.memory, True)
            shared = 0
        llm.n_tokens = shared
        missing = tokens[shared:]
        progress(0, len(missing))
        console.prefill(llm, missing, progress)
        return len(missing)


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """Length of the common prefix."""
    n = min(len(a), len(b))
    differ = np.flatnonzero(np.asarray(a[:n]) != np.asarray(b[:n]))
    return int(differ[0]) if differ.size else n
