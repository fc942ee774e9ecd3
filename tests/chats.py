"""Helpers of the chat's tests: a model, a document with facts, a screen that remembers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import llama_cpp
from rich.console import Console

from pyfasa.chat.conversation import Conversation, Progress, Turn
from pyfasa.chat.conversation import Document as Text
from pyfasa.documents import Document, make_document
from support import opened

# one thread: two that wait for each other are slow on a machine with other work
MODEL: dict[str, Any] = {"n_ctx": 4096, "n_threads": 1, "n_threads_batch": 1}


def hidden(model: Path, n_tokens: int, n_facts: int, seed: int = 4) -> Document:
    """A document with facts, in the tokens of a model."""
    with closing(llama_cpp.Llama(str(model), vocab_only=True, verbose=False)) as vocabulary:
        return make_document(
            lambda text: vocabulary.tokenize(text.encode(), add_bos=False), n_tokens, n_facts, seed
        )


def text_of(document: Document) -> Text:
    return Text("document.txt", document.text)


@contextmanager
def chatting(model: Path, states: Any = None, **arguments: Any) -> Iterator[Conversation]:
    """A conversation with a model of its own, whose answers are short."""
    with opened(model, **(MODEL | arguments)) as llm:
        yield Conversation(llm, max_tokens=32, states=states)


@contextmanager
def counted(conversation: Conversation) -> Iterator[list[int]]:
    """The sizes of the batches that are evaluated inside the block."""
    sizes: list[int] = []
    llm = conversation.llm
    inner = llm.eval

    def counting(tokens: Sequence[int]) -> None:
        sizes.append(len(tokens))
        inner(tokens)

    llm.eval = counting  # type: ignore[method-assign]
    try:
        yield sizes
    finally:
        del llm.eval  # type: ignore[method-assign]


def no_progress(done: int, total: int) -> None:
    pass


def said(conversation: Conversation, question: str) -> str:
    return "".join(conversation.ask(question, no_progress))


def turn(question: str, answer: str) -> Turn:
    return Turn((), question, answer)


class Typed:
    """A screen on which lines are typed: text, or an exception. Keeps what was shown.

    interrupt: pieces of an answer after which Ctrl-C comes; None: never
    """

    def __init__(self, *lines: str | type[BaseException], interactive: bool = False) -> None:
        self.interactive = interactive
        self.interrupt: int | None = None
        self.notes: list[str] = []
        self.shown: list[str] = []
        self.answers: list[str] = []
        self._lines = list(lines)

    def read(self, status: Callable[[], str]) -> str:
        if not self._lines:
            raise EOFError
        line = self._lines.pop(0)
        if isinstance(line, str):
            return line
        raise line

    def note(self, text: str) -> None:
        self.notes.append(text)

    def show(self, what: Any) -> None:
        screen = Console(width=200)
        with screen.capture() as captured:
            screen.print(what)
        self.shown.append(captured.get())

    @contextmanager
    def progress(self, title: str) -> Iterator[Progress]:
        yield no_progress

    def answer(self, pieces: Iterator[str], status: Callable[[], str]) -> None:
        self.answers.append("")
        for i, piece in enumerate(pieces):
            self.answers[-1] += piece
            status()
            if i + 1 == self.interrupt:
                raise KeyboardInterrupt
