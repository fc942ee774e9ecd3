"""Code blocks of the documentation: parsed, and run on the bundled model.

A block is run as it stands, in a folder that has ``models/``, the bundled model as ``model.gguf`` and a few documents;
only what makes commands long is cut by options added to them (SHORTER). What cannot run is marked in the page, above
the block, `<!-- not run: REASON -->`, or `<!-- not run (exec, serve): REASON -->` for these commands of a block of
shell lines. It is parsed all the same.
"""

from __future__ import annotations

import ast
import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "models/README.md")),
    *sorted((ROOT / "docs").glob("*.md")),
]
# text: output and drawings; markdown: output that is Markdown
LANGUAGES = {"sh", "python", "yaml", "json", "text", "markdown"}
BLOCK = re.compile(
    r"^(?:<!-- not run(?: \((?P<names>[\w, -]+)\))?: (?P<reason>[^\n]+) -->\n)?"
    r"^(?P<fence>```+)(?P<language>\w*)[^\n]*\n(?P<code>.*?)^(?P=fence)$",
    re.MULTILINE | re.DOTALL,
)

# Added at the end of a command, where the last of equal options counts: what makes it short.
SHORTER = {
    "calibrate": "-c 512 --text long.txt",
    "eval": "--tokens 512 --questions 1 --rows 8 --setting dense,fasa --budget 64",
    "bench": "-d 256 -n 2 -r 1",
    "run": "-n 8",
    "chat": "-n 8",
    "demo": "--tokens 1000 --questions 1",
}
SECONDS = 600  # of one command, where everything else is busy too
MOST_NOT_RUN = 0.4  # of all blocks with code


@dataclass(frozen=True)
class Block:
    """One block of code."""

    page: Path
    line: int
    language: str
    code: str
    names: tuple[str, ...]  # commands that are not run; none: with a reason nothing is run
    reason: str

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"

    def lines(self) -> list[str]:
        """Commands of a shell block; of a text block those after a prompt."""
        text = self.code.replace("\\\n", " ")
        lines = [line.strip() for line in text.splitlines()]
        if self.language == "text":
            return [line.removeprefix("$ ") for line in lines if line.startswith("$ pyfasa ")]
        return [line for line in lines if line and not line.startswith("#")]

    def runs(self, line: str) -> bool:
        """Whether a command is to be run: it is not excluded, and not one of those that are only checked."""
        if self.reason and (not self.names or {*self.names} & {*words_of(line)}):
            return False
        return first_word(line) not in CHECKED


def blocks() -> list[Block]:
    found = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for match in BLOCK.finditer(text):
            names = tuple(re.split(r",\s*", match["names"])) if match["names"] else ()
            line = text.count("\n", 0, match.start("language")) + 1
            found.append(
                Block(page, line, match["language"], match["code"], names, match["reason"] or "")
            )
    return found


BLOCKS = blocks()


def of(*languages: str) -> pytest.MarkDecorator:
    """Parametrizes a test with the blocks of these languages."""
    return pytest.mark.parametrize("block", [b for b in BLOCKS if b.language in languages], ids=str)


# ---- shell lines -----------------------------------------------------------------------------------


def commands(line: str) -> list[list[str]]:
    """The commands of a line as words, those inside "$(..)" too."""
    inside: list[str] = re.findall(r"\$\(([^()]*)\)", line)
    lexer = shlex.shlex(line, posix=True, punctuation_chars="|;&<>")
    lexer.whitespace_split = True
    found: list[list[str]] = [[]]
    for word in lexer:
        if word in ("|", ";", "&&", "||", "&"):
            found.append([])
        else:
            found[-1].append(word)
    for words in found:
        while words and re.match(r"\w+=", words[0]):  # set for this command only
            del words[0]
    return [
        *(words for words in found if words),
        *(words for text in inside for words in commands(text)),
    ]


def words_of(line: str) -> set[str]:
    """What a directive may name: the programs of a line and the commands of pyfasa."""
    found = set()
    for words in commands(line):
        found |= {words[0], *(words[1:2] if words[0] == "pyfasa" else [])}
    return found


def first_word(line: str) -> str:
    return commands(line)[0][0]


def check_pyfasa(words: list[str]) -> None:
    """The command line is one that the real one accepts; nothing is run."""
    import typer

    from pyfasa.cli import app

    name, *arguments = words
    if name.startswith("-"):
        assert name in ("--help", "--version")
        return
    until = next((i for i, word in enumerate(arguments) if word in (">", ">>", "<")), None)
    arguments = arguments[:until]
    group = typer.main.get_command(app)
    group.commands[name].make_context(name, list(arguments))  # type: ignore[attr-defined]
    if name == "serve":
        from pyfasa.server.settings import read

        read(arguments)


def check_make(words: list[str]) -> None:
    """The target exists."""
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([\w-]+):", text, re.MULTILINE))
    assert {word for word in words if "=" not in word} <= targets


def check_pip(words: list[str]) -> None:
    """Our extras exist."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    _, section = text.split("[project.optional-dependencies]\n")
    section = section.split("\n[")[0]
    extras = set(re.findall(r"^(\w+) = \[", section, re.MULTILINE))
    assert words[0] == "install"
    for name, named in re.findall(r"([\w.-]+)\[([\w,]+)\]", " ".join(words[1:])):
        if name in (".", "pyfasa"):
            assert set(named.split(",")) <= extras


def check_activate(words: list[str]) -> None:
    """The environment is where `make setup` puts it."""
    assert words == [".venv/bin/activate"]
    assert "VENV    := .venv" in (ROOT / "Makefile").read_text(encoding="utf-8")


# Never run here, only checked: they change the machine, or take many minutes.
CHECKED: dict[str, Callable[[list[str]], None]] = {
    "make": check_make,
    "pip": check_pip,
    "apt": lambda words: None,
    ".": check_activate,
}


# ---- a folder to run in, and a server --------------------------------------------------------------


@dataclass(frozen=True)
class Workspace:
    """A folder with models and documents."""

    folder: Path
    url: Callable[[], str]

    def run(self, arguments: list[str]) -> str:
        """stdout of a program in the folder, which must end well."""
        done = subprocess.run(
            arguments,
            cwd=self.folder,
            env=environment(self.folder),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=SECONDS,
            check=False,
        )
        assert done.returncode == 0, f"{arguments}: {done.stdout[-1000:]}{done.stderr[-2000:]}"
        return done.stdout

    def served(self, code: str) -> str:
        """The code, pointed at a server that runs, if it speaks to one."""
        return code.replace("localhost:8000", self.url()) if "localhost:8000" in code else code


def environment(folder: Path) -> dict[str, str]:
    path = os.pathsep.join(
        [str(folder / "bin"), str(Path(sys.executable).parent), os.environ["PATH"]]
    )
    homes = {f"XDG_{name}_HOME": str(folder / name) for name in ("CACHE", "STATE", "CONFIG")}
    others = {"CURL_HOME": str(folder), "COLUMNS": "120", "OMP_WAIT_POLICY": "passive"}
    return {**os.environ, **homes, **others, "PATH": path}


def make_workspace(folder: Path) -> None:
    from pyfasa.documents import make_document

    (folder / "models").symlink_to(ROOT / "models")
    bundled = ROOT / "models" / "pyfasa-tiny-12m-Q8_0.gguf"
    for name in ("model.gguf", bundled.name):
        shutil.copy(bundled, folder / name)
    text = make_document(lambda text: [0] * (len(text) // 3), 800, 3, seed=1).text
    for name in (
        "long.txt",
        "report.txt",
        "notes.md",
        "contract.txt",
        "contracts.txt",
        "letters.txt",
    ):
        (folder / name).write_text(text, encoding="utf-8")
    (folder / ".curlrc").write_text("fail\n")  # an answer of 400 is a failure here
    (folder / "bin").mkdir()
    shim = folder / "bin" / "pyfasa"
    cases = "".join(f'  "{name} "*) set -- "$@" {options};;\n' for name, options in SHORTER.items())
    real = Path(sys.executable).parent / "pyfasa"
    shim.write_text(
        f'#!/bin/sh\ncase "$1 $2" in\n  "bench compare") ;;\n{cases}esac\nexec {shlex.quote(str(real))} "$@"\n'
    )
    shim.chmod(0o755)


def listens(url: str) -> bool:
    try:
        urllib.request.urlopen(url, timeout=5).close()
    except OSError:
        return False
    return True


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[Path], Workspace]]:
    """A workspace per page: blocks of a page follow each other."""
    running: list[subprocess.Popen[bytes]] = []

    @cache
    def url() -> str:
        folder = of_page(Path("server")).folder
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        command = ["pyfasa", "serve", "model.gguf", "--n_ctx", "8192", "--port", str(port)]
        command[0] = str(Path(sys.executable).parent / "pyfasa")
        running.append(subprocess.Popen(command, cwd=folder, env=environment(folder)))
        deadline = time.monotonic() + 60
        while not listens(f"http://127.0.0.1:{port}/health"):
            assert running[-1].poll() is None, "the server ended"
            assert time.monotonic() < deadline, "the server did not start within a minute"
            time.sleep(0.1)
        return f"127.0.0.1:{port}"

    @cache
    def of_page(page: Path) -> Workspace:
        folder = tmp_path_factory.mktemp(page.stem)
        make_workspace(folder)
        return Workspace(folder, url)

    yield of_page
    for process in running:
        process.terminate()
        process.wait(30)


# ---- tests -----------------------------------------------------------------------------------------


def test_every_fence_is_a_block() -> None:
    """None is lost by an odd fence, and each says what it is."""
    assert not [page for page in PAGES if "```" in BLOCK.sub("", page.read_text(encoding="utf-8"))]
    assert {b.language for b in BLOCKS} <= LANGUAGES
    assert not [str(b) for b in BLOCKS if b.names and b.language != "sh"]
    directives = sum(page.read_text(encoding="utf-8").count("\n<!-- not run") for page in PAGES)
    assert directives == sum(bool(b.reason) for b in BLOCKS)  # each stands right above its block


@of("python")
def test_python_parses(block: Block) -> None:
    names = {node.id for node in ast.walk(ast.parse(block.code)) if isinstance(node, ast.Name)}
    imported = "import pyfasa" in block.code
    assert imported or "pyfasa" not in names


@of("sh", "text")
def test_commands_exist(block: Block) -> None:
    for line in block.lines():
        for words in commands(line):
            if words[0] == "pyfasa":
                check_pyfasa(words[1:])
            elif words[0] in CHECKED:
                CHECKED[words[0]](words[1:])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_in_sentences_exist(page: Path) -> None:
    """Inline code that begins with `pyfasa`: the command, and the names of its options."""
    import typer

    from pyfasa.cli import app

    group = typer.main.get_command(app)
    text = BLOCK.sub("", page.read_text(encoding="utf-8"))
    for code in re.findall(r"`pyfasa ([a-z][^`]*)`", text):
        name, *words = code.split()
        if name == "was":  # a message
            continue
        command = group.commands[name]  # type: ignore[attr-defined]
        own = {option for parameter in command.params for option in parameter.opts} | {"--help"}
        given = list(words[: words.index("--") if "--" in words else None])
        unknown = {word for word in given if word.startswith("-")} - own
        assert name == "serve" or not unknown, code


@of("yaml")
def test_yaml(block: Block, tmp_path: Path) -> None:
    from pyfasa.server.settings import read

    assert isinstance(yaml.safe_load(block.code), dict)
    if "models:" in block.code:  # a config file of the server
        (tmp_path / "config.yaml").write_text(block.code, encoding="utf-8")
        read(["--config_file", str(tmp_path / "config.yaml")])


@of("json")
def test_json(block: Block) -> None:
    json.loads(block.code)


@of("python")
def test_python_runs(block: Block, workspace: Callable[[Path], Workspace]) -> None:
    if block.reason:
        pytest.skip(f"{block}: {block.reason}")
    own = workspace(block.page)
    printed = own.run([sys.executable, "-c", own.served(block.code)])
    for answer, expected in re.findall(r"^(.*) \| expected: (.*)$", printed, re.MULTILINE):
        assert expected in answer


@of("sh")
def test_commands_run(block: Block, workspace: Callable[[Path], Workspace]) -> None:
    wanted = [line for line in block.lines() if block.runs(line)]
    missing = {"curl"} & {word for line in wanted for word in words_of(line)}
    if missing - {name for name in missing if shutil.which(name)}:
        pytest.skip(f"{block}: no curl here")
    if not wanted:
        pytest.skip(f"{block}: {block.reason or 'only checked'}")
    own = workspace(block.page)
    for line in wanted:
        own.run(["bash", "-euo", "pipefail", "-c", own.served(line)])


def test_little_is_not_run(capsys: pytest.CaptureFixture[str]) -> None:
    code = [b for b in BLOCKS if b.language in ("python", "sh")]
    left_out = [b for b in code if b.reason and not b.names]
    with capsys.disabled():
        for block in (b for b in code if b.reason):
            print(f"\n{block}: {', '.join(block.names) or 'all of it'} not run: {block.reason}")
    assert len(left_out) <= MOST_NOT_RUN * len(code)
