"""A chat from its first document to the end of its input: what is asked, read, answered and told."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, closing
from typing import Protocol

from rich.console import RenderableType

from pyfasa import console
from pyfasa.chat import commands
from pyfasa.chat.conversation import Conversation, Document, Progress


class Screen(Protocol):
    """Where a chat is typed and read."""

    @property
    def interactive(self) -> bool:
        """Whether somebody sits before it, who sees the status and tries again after an error."""

    def read(self, status: Callable[[], str]) -> str:
        """The next input. EOFError at the end, KeyboardInterrupt for Ctrl-C."""

    def note(self, text: str) -> None:
        """Shows a line beside the answers."""

    def show(self, what: RenderableType) -> None:
        """Shows the result of a command."""

    def progress(self, title: str) -> AbstractContextManager[Progress]:
        """A bar while tokens are read."""

    def answer(self, pieces: Iterator[str], status: Callable[[], str]) -> None:
        """Shows an answer while it is made."""


class Session:
    """One conversation on one screen."""

    def __init__(self, conversation: Conversation, screen: Screen) -> None:
        self.conversation = conversation
        self.screen = screen

    def run(self, documents: Sequence[Document] = ()) -> bool:
        """Chats until the input ends; whether no line of a pipe failed. Raises for `documents` only."""
        for document in documents:
            self.conversation.add(document)
        if documents:
            self.read()
        well = True
        while True:
            try:
                line = self.screen.read(self.conversation.status).strip()
            except EOFError:
                return well or self.screen.interactive
            except KeyboardInterrupt:
                if self.screen.interactive:
                    continue  # it cleared the line
                raise
            try:
                self.do(line)
            except commands.Leave:
                return well or self.screen.interactive
            except KeyboardInterrupt:
                if not self.screen.interactive:
                    raise
                self.screen.note("stopped")
            except Exception as error:  # a chat is not lost over one line
                self.screen.note(console.error_line(error))
                well = False

    def do(self, line: str) -> None:
        """One input: a command or a question."""
        if line.startswith("/"):
            commands.run(self, line)
        elif line:
            self.ask(line)

    def read(self) -> None:
        """Reads the documents that wait, and tells how long it took."""
        try:
            with self.screen.progress("reading") as progress:
                done = self.conversation.read(progress)
        except KeyboardInterrupt:
            self.screen.note("stopped; the rest is read with the next question")
            return
        if done.from_disk:
            self.screen.note(f"{done.n_tokens:,} tokens from disk in {done.seconds:.2f} s")
        else:
            speed = done.n_evaluated / max(done.seconds, 1e-9)
            self.screen.note(
                f"read {done.n_evaluated:,} tokens in {done.seconds:.1f} s, {speed:,.0f} tokens/s"
            )
        if done.unsaved:
            self.screen.note(f"warning: {done.unsaved}")

    def ask(self, question: str) -> None:
        """Asks and shows the answer; Ctrl-C ends it, and what was said stays in the chat."""
        try:
            with self.screen.progress("reading") as progress:
                pieces = self.conversation.ask(question, progress)
            with closing(pieces):
                self.screen.answer(pieces, self.conversation.status)
        except KeyboardInterrupt:
            self.screen.note("stopped")
            return
        if sentence := self.conversation.cut:
            self.screen.note(sentence)
        if not self.screen.interactive:
            self.screen.note(self.conversation.status())
