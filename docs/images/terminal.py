"""Pictures of pyfasa's commands in a terminal, as SVG: real runs with the bundled model on this machine.

python docs/images/terminal.py [NAME ..]    needs pyte

Each command runs in a pseudo-terminal of a fixed size, in a folder that holds the models and a report, so that no
picture has a path of this machine in it. pyte is the terminal, rich draws what it shows.
"""

from __future__ import annotations

import os
import platform
import pty
import re
import select
import signal
import struct
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from fcntl import ioctl
from pathlib import Path
from termios import TIOCSWINSZ
from typing import Any

import llama_cpp
import pyte
from rich.console import Console
from rich.style import Style
from rich.text import Text

from pyfasa.documents import Document, make_document

FOLDER = Path(__file__).resolve().parent
ROOT = FOLDER.parents[1]
MODEL = "models/pyfasa-tiny-12m-Q8_0.gguf"
SECONDS = 900  # that a command may take
COLORS = {"brown": "yellow", "brightbrown": "bright_yellow"}  # pyte's names and rich's
# without the web fonts of rich's own, and large enough for vertical lines to meet
SVG = """<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}">
<style>
.{unique_id}-matrix {{
  font: 21px/{line_height}px ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace;
}}
.{unique_id}-title {{ font: bold 18px system-ui, "DejaVu Sans", sans-serif; }}
{styles}
</style>
<defs>
{lines}
</defs>
{chrome}
<g transform="translate({terminal_x}, {terminal_y})">
{backgrounds}
<g class="{unique_id}-matrix">
{matrix}
</g>
</g>
</svg>
"""


class Terminal:
    """A command in a pseudo-terminal, and the screen that it wrote."""

    def __init__(self, command: list[str], folder: Path, columns: int, lines: int) -> None:
        self._screen = pyte.Screen(columns, lines)
        self._stream = pyte.ByteStream(self._screen)
        self._pid, self._master = pty.fork()
        if self._pid == 0:
            self._become(command, folder)
        ioctl(self._master, TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))
        self._screen.write_process_input = (
            self.type
        )  # answers to questions like: where is the cursor?

    @staticmethod
    def _become(command: list[str], folder: Path) -> None:
        os.chdir(folder)
        home = {name: str(folder / "home") for name in ("HOME", "XDG_STATE_HOME", "XDG_CACHE_HOME")}
        kept = {k: v for k, v in os.environ.items() if k in ("PATH", "LANG", "LC_ALL")}
        environment = kept | home | {"TERM": "xterm-256color", "COLORTERM": "truecolor"}
        time.sleep(0.2)  # the size is set meanwhile
        os.execve(sys.executable, [sys.executable, "-m", "pyfasa", *command], environment)

    def type(self, text: str) -> None:
        os.write(self._master, text.encode())

    def read(self, until: Callable[[str], bool] | None = None, at_once: bool = False) -> None:
        """Reads until the screen looks so and, unless at once, nothing follows; or until the command ends.

        TimeoutError after SECONDS.
        """
        end = time.monotonic() + SECONDS
        while time.monotonic() < end:
            quiet = not select.select([self._master], [], [], 0.3)[0]
            if (quiet or at_once) and until and until(self.text()):
                return
            if quiet:
                continue
            try:
                data = os.read(self._master, 65536)
            except OSError:  # it has ended
                data = b""
            if not data:
                return
            # the release of this machine's kernel says nothing about pyfasa
            self._stream.feed(data.replace(platform.platform().encode(), b"Linux"))
        raise TimeoutError(f"not within {SECONDS} seconds; the screen:\n{self.text()}")

    def close(self) -> None:
        with suppress(ProcessLookupError):
            os.kill(self._pid, signal.SIGTERM)
        os.waitpid(self._pid, 0)
        os.close(self._master)

    def text(self) -> str:
        return "\n".join(self._screen.display)

    def lines(self) -> list[Text]:
        """What is on the screen, without blank lines at the end."""
        rows = [self._line(y) for y in range(self._screen.lines)]
        while rows and not rows[-1].plain.strip():
            rows.pop()
        return rows

    def _line(self, y: int) -> Text:
        row = self._screen.buffer[y]
        line = Text(no_wrap=True, end="")
        for x in range(self._screen.columns):
            line.append(row[x].data, style_of(row[x]))
        return line


def style_of(char: Any) -> Style:
    def color(name: str) -> str | None:
        if name == "default":
            return None
        if re.fullmatch(r"[0-9a-f]{6}", name):
            return f"#{name}"
        return COLORS.get(name, name.replace("bright", "bright_"))

    return Style(
        color=color(char.fg),
        bgcolor=color(char.bg),
        bold=char.bold or None,
        italic=char.italics or None,
        underline=char.underscore or None,
        reverse=char.reverse or None,
    )


def write(name: str, command: list[str], lines: list[Text], columns: int) -> None:
    """Draws lines below the prompt that led to them."""
    prompt = Text("$ ", style="bold green", end="")
    prompt.append("pyfasa " + " ".join(command), style="bold white")
    with open(os.devnull, "w") as nowhere:
        console = Console(
            record=True,
            width=columns,
            file=nowhere,
            force_terminal=True,
            color_system="truecolor",
            legacy_windows=False,
        )
        for line in [prompt, *lines]:
            console.print(line, soft_wrap=True, highlight=False)
        drawn = console.export_svg(title="pyfasa", code_format=SVG, unique_id=name)
    private = [
        str(ROOT),
        tempfile.gettempdir(),
        str(Path.home()),
        platform.node(),
        "http://",
        "https://",
    ]
    svg = drawn.replace("http://www.w3.org/2000/svg", "")
    if found := [text for text in private if len(text) > 1 and text in svg]:
        raise ValueError(f"{name}.svg would show {found}")
    (FOLDER / f"{name}.svg").write_text(drawn, encoding="utf-8")
    print(f"{name}.svg {len(drawn):,} bytes")


@dataclass(frozen=True)
class Picture:
    """A command whose whole output is shown. At most `lines` of it."""

    command: list[str]
    columns: int = 100
    lines: int = 200

    def take(self, name: str, folder: Path, _: Document) -> None:
        terminal = Terminal(self.command, folder, self.columns, self.lines)
        with closing(terminal):
            terminal.read()
            write(name, self.command, terminal.lines(), self.columns)


class Chat:
    """A session of `pyfasa chat`: the bar while it reads, answers, counters, the status line."""

    columns = 100
    lines = 28

    def take(self, name: str, folder: Path, document: Document) -> None:
        command = ["chat", MODEL, "--file", "report.txt", "-t", "1"]
        terminal = Terminal(command, folder, self.columns, self.lines)

        def ready(n: int) -> Callable[[str], bool]:
            """The prompt after n questions waits, with its status line."""
            return lambda text: len(re.findall(r"^>", text, re.MULTILINE)) > n and "| depth" in text

        def half_read(text: str) -> bool:
            found = re.search(r"([\d,]+) of ([\d,]+) tokens", text)
            done, total = (int(n.replace(",", "")) for n in found.groups()) if found else (0, 1)
            return 2 * done > total

        with closing(terminal):
            terminal.read(half_read, at_once=True)
            write(f"{name}-reading", command, terminal.lines(), self.columns)
            terminal.read(lambda text: bool(re.search(r"^> *$", text, re.MULTILINE)))
            facts = document.facts
            typed = [facts[3].question, "/budget 256", facts[7].question, "/stats"]
            for n, line in enumerate(typed, 1):
                terminal.type(line + "\r")
                terminal.read(ready(n))
            write(name, command, terminal.lines(), self.columns)


PICTURES: dict[str, Picture | Chat] = {
    "chat": Chat(),
    "demo": Picture(["demo", "--tokens", "16000", "--questions", "4", "-t", "1"], columns=120),
    "doctor": Picture(["doctor", MODEL], columns=110),
    "inspect": Picture(["inspect", MODEL], columns=110),
    "eval": Picture(
        ["eval", MODEL, "--tokens", "4096", "--questions", "10", "-t", "1"], columns=84
    ),
    "bench": Picture(
        ["bench", "-m", MODEL, "-d", "1000,8192,30000", "-r", "3", "-t", "1"], columns=140
    ),
}


@contextmanager
def stage() -> Iterator[tuple[Path, Document]]:
    """A folder with the models and report.txt, a document of 8,000 tokens, and that document."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "models").symlink_to(ROOT / "models")
        (folder / "home").mkdir()
        with closing(llama_cpp.Llama(str(ROOT / MODEL), vocab_only=True, verbose=False)) as words:
            document = make_document(
                lambda text: words.tokenize(text.encode(), add_bos=False), 8000, 40, seed=4
            )
        (folder / "report.txt").write_text(document.text, encoding="utf-8")
        yield folder, document


def main() -> None:
    with stage() as (folder, document):
        for name in sys.argv[1:] or PICTURES:
            PICTURES[name].take(name, folder, document)


if __name__ == "__main__":
    main()
