"""Where a chat is typed and read: a terminal with prompt_toolkit and rich, or plain lines of a pipe."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.live import Live
from rich.markdown import Markdown
from rich.text import Text

from pyfasa import console
from pyfasa.chat.commands import COMMANDS
from pyfasa.chat.conversation import Progress

if TYPE_CHECKING:
    from prompt_toolkit import PromptSession
    from prompt_toolkit.history import History
    from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent

    from pyfasa.chat.session import Screen

_SHORT = 256  # tokens that are read before a bar could be seen
_REFRESH_S = 0.1
# a document could have a model say what moves the cursor or worse
_NO_CONTROLS = {c: None for c in (*range(32), *range(127, 160)) if c not in (9, 10)}


def screen() -> Screen:
    """The terminal if there is one, else plain lines."""
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        return Plain()
    try:
        return Terminal()
    except ModuleNotFoundError:
        console.note(
            "warning: prompt_toolkit is not installed, so there is no history and no status line; "
            "get it with `pip install prompt_toolkit`"
        )
        return Plain()


class Plain:
    """Lines from stdin, text to stdout as it comes, all else to stderr. A backslash at its end continues a line."""

    interactive = False

    def read(self, status: Callable[[], str]) -> str:
        line = sys.stdin.readline()
        if not line:
            raise EOFError
        line = line.rstrip("\r\n")
        while line.endswith("\\"):
            line = line[:-1] + "\n" + sys.stdin.readline().rstrip("\r\n")
        return line

    def note(self, text: str) -> None:
        console.note(text)

    def show(self, what: RenderableType) -> None:
        console.stdout().print(what)

    @contextmanager
    def progress(self, title: str) -> Iterator[Progress]:
        with _bar(title) as update:
            yield update

    def answer(self, pieces: Iterator[str], status: Callable[[], str]) -> None:
        try:
            for piece in pieces:
                console.write(piece)
        finally:
            console.write("\n")


class Terminal(Plain):
    """Editing, history and a status line while typing; Markdown and the same line while it answers."""

    interactive = True

    def __init__(self) -> None:
        from prompt_toolkit import PromptSession
        from prompt_toolkit.completion import WordCompleter

        self._prompt: PromptSession[str] = PromptSession(
            history=_history(),
            multiline=True,
            key_bindings=_keys(),
            completer=WordCompleter(list(COMMANDS), sentence=True),
            complete_while_typing=False,
            prompt_continuation=". ",
        )

    def read(self, status: Callable[[], str]) -> str:
        # what is written to stderr meanwhile would go into the line that is typed
        return self._prompt.prompt("> ", bottom_toolbar=status)

    def answer(self, pieces: Iterator[str], status: Callable[[], str]) -> None:
        out = console.stdout()
        rest = ""
        shown = 0.0
        # refreshed here and not by a thread: status reads counters of the core that decodes
        try:
            with Live(console=out, auto_refresh=False, transient=True) as live:
                for piece in pieces:
                    rest += piece.translate(_NO_CONTROLS)
                    block, rest = finished(rest)
                    if block:
                        out.print(Markdown(block), "")
                    if block or time.monotonic() - shown >= _REFRESH_S:
                        line = Text(status(), style="dim", no_wrap=True, overflow="ellipsis")
                        live.update(Group(_tail(rest, out.height - 3), line), refresh=True)
                        shown = time.monotonic()
        finally:
            # also after Ctrl-C: what was said stays on the screen
            if rest.strip():
                out.print(Markdown(rest), "")


def finished(text: str) -> tuple[str, str]:
    """Text split where its last block of Markdown begins: what stands before will not look otherwise.

    A block begins after a blank line, outside of code fences, with a line that is not indented.
    """
    offset = start = 0
    fence = blank = False
    for line in text.splitlines(keepends=True):
        if blank and not fence and line.strip() and not line[0].isspace():
            start = offset
        if line.lstrip().startswith(("```", "~~~")):
            fence = not fence
        blank = not line.strip()
        offset += len(line)
    return text[:start], text[start:]


def _tail(text: str, height: int) -> RenderableType:
    """The block that is being written; of one that is higher than the screen, its last lines."""
    lines = text.splitlines()
    return Markdown(text) if len(lines) <= height else Text("\n".join(lines[-max(height, 1) :]))


@contextmanager
def _bar(title: str) -> Iterator[Progress]:
    """A bar that shows once it is told that there is much to read."""
    with ExitStack() as stack:
        bar: Progress | None = None

        def update(done: int, total: int) -> None:
            nonlocal bar
            if bar is None and total >= _SHORT:
                bar = stack.enter_context(console.token_progress(title))
            if bar is not None:
                bar(done, total)

        yield update


def history_path() -> Path:
    """Where questions are remembered: XDG_STATE_HOME, else ~/.local/state."""
    base = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(base) / "pyfasa" / "chat_history"


def _history() -> History:
    from prompt_toolkit.history import FileHistory, InMemoryHistory

    path = history_path()
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        path.touch(mode=0o600)
    except OSError as error:
        console.note(f"warning: no history beyond this chat: {path}: {error.strerror}")
        return InMemoryHistory()
    return FileHistory(path)


def _keys() -> KeyBindings:
    from prompt_toolkit.key_binding import KeyBindings

    keys = KeyBindings()

    @keys.add("enter")
    def _(event: KeyPressEvent) -> None:
        buffer = event.current_buffer
        if buffer.document.text_before_cursor.endswith("\\"):
            buffer.delete_before_cursor()
            buffer.newline()
        else:
            buffer.validate_and_handle()

    @keys.add("escape", "enter")
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.newline()

    return keys
