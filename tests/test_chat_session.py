"""Chats as they are typed: commands, Ctrl-C, pipes, and a terminal with a keyboard."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from chats import Typed, chatting, hidden, text_of
from pyfasa import console
from pyfasa.chat.commands import COMMANDS
from pyfasa.chat.conversation import Conversation
from pyfasa.chat.session import Session
from pyfasa.chat.terminal import Plain, Terminal, finished, screen
from pyfasa.cli_chat import context_size
from pyfasa.documents import Document as Hidden
from pyfasa.documents import is_right


@pytest.fixture(scope="module")
def document(tiny_model_path: Path) -> Hidden:
    return hidden(tiny_model_path, 700, 4)


@pytest.fixture(scope="module")
def shared(tiny_model_path: Path) -> Iterator[Conversation]:
    with chatting(tiny_model_path, n_ctx=1024, budget=128, min_ctx=None) as conversation:
        yield conversation


@pytest.fixture
def chat(shared: Conversation) -> Conversation:
    shared.turns, shared.pending, shared.last = [], [], None
    shared.llm.fasa.enabled = True
    shared.llm.fasa.budget = 128
    return shared


def typed(chat: Conversation, *lines: str | type[BaseException], well: bool = True) -> Typed:
    screen = Typed(*lines)
    assert Session(chat, screen).run() is well
    return screen


# ---- commands -----------------------------------------------------------------------------------


def test_file_ask_stats(chat: Conversation, document: Hidden, tmp_path: Path) -> None:
    path = tmp_path / "the document.txt"
    path.write_text(document.text)
    fact = document.facts[1]
    screen = typed(chat, f"/file {path}", fact.question, "/stats")
    assert re.match(r"read \d+ tokens in [\d.]+ s, [\d,]+ tokens/s", screen.notes[0])
    assert is_right(screen.answers[0], fact)
    assert re.fullmatch(
        r"[\d,.]+ tokens/s \| depth \d+ of 1,024 \| cache read \d+ % \| budget 128",
        screen.notes[1],
    )
    for word in ("documents", "tokens/s", "sparse", "side index", "128 tokens per head"):
        assert word in screen.shown[0]


def test_stats_before_an_answer(chat: Conversation) -> None:
    assert "no answer yet" in typed(chat, "/stats").shown[0]


def test_dense_and_back(chat: Conversation, document: Hidden) -> None:
    chat.add(text_of(document))
    question = document.facts[0].question
    screen = typed(chat, "/dense", question, "/stats", "/dense", question)
    assert screen.notes[0] == "dense, until /dense is given again"
    assert "cache read 100 % | dense" in screen.notes[1]
    assert "disabled" in screen.shown[0]
    assert screen.notes[2] == "sparse, 128 tokens per head"
    assert "budget 128" in screen.notes[3]


def test_budget(chat: Conversation) -> None:
    screen = typed(chat, "/budget 1,024", "/budget 256")
    assert screen.notes == [
        "budget 1,024 tokens per head; contexts below 2,048 tokens stay dense",
        "budget 256 tokens per head; contexts below 512 tokens stay dense",
    ]
    assert chat.llm.fasa.budget == 256


def test_save(chat: Conversation, document: Hidden, tmp_path: Path) -> None:
    chat.add(text_of(document))
    path = tmp_path / "chat.md"
    question = document.facts[0].question
    screen = typed(chat, question, f"/save {path}")
    assert path.read_text() == (
        "# Chat with pyfasa-tiny-12m-Q8_0.gguf\n\n## Question\n\n*Document: document.txt*\n\n"
        f"{question}\n\n## Answer\n\n{screen.answers[0]}\n"
    )
    again = typed(chat, f"/save {path}", well=False)
    assert "exists; choose another name" in again.notes[0]


def test_clear_help_quit(chat: Conversation, document: Hidden) -> None:
    chat.add(text_of(document))
    screen = typed(chat, document.facts[0].question, "/clear", "/help", "/quit", "/foo")
    assert screen.notes[-1] == "forgot the turns; 1 document kept"
    assert chat.turns == []
    assert len(chat.pending) == 1
    for command in COMMANDS.values():
        assert command.name in screen.shown[0]
        assert command.help in screen.shown[0]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("/foo", "/foo is no command; there are /file, /dense,"),
        ("/budget", "/budget needs N"),
        ("/budget many", "'many'; a whole number is needed"),
        ("/budget 1", "exceed the budget 1; raise budget"),
        ("/dense 3", "/dense takes nothing"),
        ("/file /nowhere/document.txt", "/nowhere/document.txt"),
        ("/save /nowhere/chat.md", "/nowhere/chat.md could not be written"),
    ],
)
def test_what_cannot_be_done_is_a_sentence(chat: Conversation, line: str, words: str) -> None:
    screen = typed(chat, line, "/budget 64", well=False)
    assert screen.notes[0].startswith("error: ")
    assert words in screen.notes[0]
    assert chat.llm.fasa.budget == 64  # it goes on


def test_a_model_without_a_profile(one: Path) -> None:
    with chatting(one, profile=False, n_ctx=512) as chat:
        screen = typed(chat, "/dense", "/dense", "/stats")
    assert screen.notes[0] == "dense, until /dense is given again"
    assert screen.notes[1].startswith("dense: ")
    assert screen.notes[1][7:] in screen.shown[0]


def test_what_was_not_foreseen_does_not_end_a_chat(
    chat: Conversation, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise KeyError("role")

    with monkeypatch.context() as patch:
        patch.setattr(console, "message_tokens", broken)
        screen = typed(chat, "What?", "/budget 64", well=False)
    assert screen.notes[0] == "error: KeyError: 'role'"
    assert chat.llm.fasa.budget == 64


def test_outgrown_is_told_and_goes_on(chat: Conversation, document: Hidden) -> None:
    long = document.text + document.text
    screen = typed(chat, long, document.facts[0].question, well=False)
    assert "the context 1,024; nothing was changed" in screen.notes[0]
    assert len(screen.answers) == 1


# ---- Ctrl-C -------------------------------------------------------------------------------------


def test_interrupt_ends_the_answer_and_not_the_chat(chat: Conversation, document: Hidden) -> None:
    chat.add(text_of(document))
    screen = Typed(document.facts[0].question)
    screen.interrupt = 2
    session = Session(chat, screen)
    assert session.run()
    assert screen.notes == ["stopped"]
    assert chat.turns[0].answer == screen.answers[0]
    assert chat.turns[0].stopped
    screen.interrupt = None
    session.do(document.facts[1].question)
    assert is_right(screen.answers[1], document.facts[1])


def test_interrupt_at_the_prompt(chat: Conversation) -> None:
    at_terminal = Typed(KeyboardInterrupt, "/budget 64", interactive=True)
    assert Session(chat, at_terminal).run()
    assert chat.llm.fasa.budget == 64
    assert at_terminal.notes[1:] == []
    with pytest.raises(KeyboardInterrupt):
        typed(chat, KeyboardInterrupt)


# ---- screens ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "done"),
    [
        ("", ""),
        ("one", ""),
        ("one\n\n", ""),
        ("one\n\ntwo", "one\n\n"),
        ("one\n\ntwo\n\nthree", "one\n\ntwo\n\n"),
        ("- one\n\n  more of it", ""),
        ("```\ncode\n\nmore", ""),
        ("```\ncode\n\nmore\n```\n\nend", "```\ncode\n\nmore\n```\n\n"),
    ],
)
def test_blocks_of_markdown(text: str, done: str) -> None:
    assert finished(text) == (done, text[len(done) :])


def test_markdown_is_shown_once(capsys: pytest.CaptureFixture[str]) -> None:
    text = "# Title\n\nsome **bold** words\n\n```python\nx = 1\n\ny = 2\n```\n\n- item\n"
    Terminal.answer(Terminal.__new__(Terminal), iter(text), lambda: "the status")
    out = capsys.readouterr().out
    for word in ("Title", "some bold words", "x = 1", "y = 2", "item"):
        assert out.count(word) == 1
    assert "the status" not in out


def test_a_model_does_not_write_to_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    text = "before\x1b[2J\x9b1m\rafter\n"
    Terminal.answer(Terminal.__new__(Terminal), iter([text]), lambda: "the status")
    assert capsys.readouterr().out.strip() == "before[2J1mafter"


def test_an_interrupted_answer_stays_on_the_screen(capsys: pytest.CaptureFixture[str]) -> None:
    def pieces() -> Iterator[str]:
        yield "what was "
        yield "said"
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Terminal.answer(Terminal.__new__(Terminal), pieces(), lambda: "the status")
    assert capsys.readouterr().out.count("what was said") == 1


def test_without_prompt_toolkit(monkeypatch: pytest.MonkeyPatch) -> None:
    notes: list[str] = []
    monkeypatch.setattr(console, "note", notes.append)
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    monkeypatch.setitem(sys.modules, "prompt_toolkit", None)
    assert type(screen()) is Plain
    assert "pip install prompt_toolkit" in notes[0]


@pytest.mark.parametrize(
    ("n_tokens", "max_tokens", "trained", "wanted"),
    [
        (3000, 1024, 0, 11192),
        (3000, 1024, 32768, 11192),
        (30000, 1024, 32768, 32768),
        (32000, 1024, 32768, 33025),
        (100, 8000, 32768, 16100),
    ],
)
def test_context_size(n_tokens: int, max_tokens: int, trained: int, wanted: int) -> None:
    assert context_size(n_tokens, max_tokens, trained) == wanted


# ---- the program --------------------------------------------------------------------------------


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    return {
        **os.environ,
        "XDG_CACHE_HOME": str(tmp_path / "cache"),
        "XDG_STATE_HOME": str(tmp_path / "state"),
        "TERM": "xterm",
    }


def command(model: Path, *arguments: object) -> list[str]:
    options = ["-t", "1", "-n", "32", *map(str, arguments)]
    return [sys.executable, "-m", "pyfasa", "chat", str(model), *options]


def test_a_pipe(
    tiny_model_path: Path, document: Hidden, tmp_path: Path, environment: dict[str, str]
) -> None:
    path = tmp_path / "document.txt"
    path.write_text(document.text)
    fact, other = document.facts[:2]
    lines = f"{fact.question}\n\n{other.question[:10]}\\\n{other.question[10:]}\n"
    told = []
    for text, code in ((lines, 0), (lines + "/foo\n", 1)):
        done = subprocess.run(
            command(tiny_model_path, "--file", path),
            input=text,
            capture_output=True,
            text=True,
            env=environment,
            timeout=120,
        )
        assert done.returncode == code, done.stderr
        answers = done.stdout.splitlines()
        assert len(answers) == 2
        assert is_right(answers[0], fact)
        told.append((answers, done.stderr))
    assert re.search(r"read \d{3} tokens", told[0][1])
    assert "tokens from disk" in told[1][1]
    assert told[0][0] == told[1][0]
    assert "Traceback" not in told[0][1] + told[1][1]


def test_no_cache(tiny_model_path: Path, document: Hidden, environment: dict[str, str]) -> None:
    path = Path(environment["XDG_CACHE_HOME"])
    path.mkdir()
    file = path.with_name("document.txt")
    file.write_text(document.text)
    done = subprocess.run(
        command(tiny_model_path, "--file", file, "--no-cache"),
        input="/quit\n",
        capture_output=True,
        text=True,
        env=environment,
        timeout=120,
        check=True,
    )
    assert re.search(r"read \d{3} tokens", done.stderr)
    assert list(path.iterdir()) == []


class Keyboard:
    """A program in a pseudo-terminal of 24 rows, which says where its cursor is when asked."""

    def __init__(self, arguments: list[str], environment: dict[str, str]) -> None:
        self._ours, theirs = pty.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("4H", 24, 100, 0, 0))
        self.process = subprocess.Popen(
            arguments,
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            env=environment,
            start_new_session=True,
            # so that Ctrl-C arrives as a signal
            preexec_fn=_make_controlling,
        )
        os.close(theirs)
        self.seen = ""

    def type(self, text: str) -> None:
        os.write(self._ours, text.encode())

    def wait_for(self, pattern: str, seconds: float = 30.0) -> None:
        """Reads until the pattern is seen behind what was waited for before."""
        end = time.monotonic() + seconds
        start = len(self.seen)
        while not re.search(pattern, plain(self.seen[start:])):
            left = end - time.monotonic()
            assert left > 0, f"{pattern!r} is not in {self.seen[start:]!r}"
            if select.select([self._ours], [], [], left)[0]:
                self.seen += self._read()

    def _read(self) -> str:
        text = os.read(self._ours, 65536).decode("utf-8", "replace")
        if "\x1b[6n" in text:
            self.type("\x1b[5;1R")
        return text

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._ours)


def _make_controlling() -> None:
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # a job in the background ignores it


def plain(text: str) -> str:
    """Without escape sequences."""
    return re.sub(r"\x1b(\[[0-?]*[ -/]*[@-~]|[()].|[=>78])", "", text)


def test_a_terminal(
    tiny_model_path: Path, document: Hidden, tmp_path: Path, environment: dict[str, str]
) -> None:
    path = tmp_path / "document.txt"
    path.write_text(document.text)
    fact = document.facts[0]
    keyboard = Keyboard(command(tiny_model_path, "--file", path), environment)
    try:
        keyboard.wait_for(r"read \d{3} tokens[\s\S]*>[\s\S]*depth \d{3} of")
        keyboard.type("a line that is not wanted")
        keyboard.wait_for("wanted")
        keyboard.type("\x03")
        keyboard.wait_for(r">[\s\S]*depth")
        keyboard.type(fact.question + "\r")
        keyboard.wait_for(rf"{fact.value}[\s\S]*tokens/s \| depth [\s\S]*cache read")
        keyboard.type("/budget \\\r12\x1b\r\r")  # lines by a backslash and by Esc Enter
        keyboard.wait_for(r"exceed the budget 12;[\s\S]*depth")
        keyboard.type("\x04")
        assert keyboard.process.wait(30) == 0
    finally:
        keyboard.close()
    assert "Traceback" not in keyboard.seen
    history = (tmp_path / "state" / "pyfasa" / "chat_history").read_text()
    assert f"+{fact.question}" in history
    assert "not wanted" not in history


ENDLESS = """
import time, llama_cpp
from pyfasa.cli import main
llama_cpp.llama_vocab_is_eog = lambda *_: time.sleep(0.002)
main()
"""


def test_ctrl_c_in_a_terminal(one: Path, tmp_path: Path, environment: dict[str, str]) -> None:
    """A model that talks on and on; Ctrl-C stops it, and it answers again."""
    arguments = command(one, "-n", 7000, "--dense")
    arguments[1:3] = ["-c", ENDLESS]
    keyboard = Keyboard(arguments, environment)
    try:
        keyboard.wait_for(r">[\s\S]*depth")
        for _ in range(2):
            keyboard.type("Tell me more\r")
            keyboard.wait_for(r"tokens/s \| depth")
            keyboard.type("\x03")
            keyboard.wait_for(r"stopped[\s\S]*>[\s\S]*tokens/s \| depth")
        keyboard.type(f"/save {tmp_path}/chat.md\r")
        keyboard.wait_for(r"wrote[\s\S]*depth")
        keyboard.type("\x04")
        assert keyboard.process.wait(30) == 0
    finally:
        keyboard.close()
    assert (tmp_path / "chat.md").read_text().count("*(stopped)*") == 2
