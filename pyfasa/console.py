"""What the commands share: consoles, error messages, progress, tables, streaming an answer."""

from __future__ import annotations

import codecs
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.table import Table
from typer.core import TyperGroup

if TYPE_CHECKING:
    import llama_cpp

    from pyfasa.llama import Llama
    from pyfasa.profile import Profile


class Group(TyperGroup):
    """Turns exceptions into one sentence and exit code 1, Ctrl-C into 130, warnings into lines."""

    def invoke(self, ctx: Any) -> Any:
        debug = ctx.params.get("debug") or os.environ.get("PYFASA_DEBUG", "") not in ("", "0")
        with warnings.catch_warnings():
            warnings.showwarning = lambda message, *_, **__: note(f"warning: {message}")
            try:
                return super().invoke(ctx)
            except KeyboardInterrupt:
                note("interrupted")
                raise typer.Exit(130) from None
            except Exception as error:
                # exceptions with an exit code are typer's own: wrong usage, or an exit
                if debug or hasattr(error, "exit_code") or isinstance(error, typer.Abort):
                    raise
                note(error_line(error))
                raise typer.Exit(1) from None


def stdout() -> Console:
    """Console for results; wide when it is no terminal, so that tables in logs stay whole."""
    return Console(highlight=False, width=None if sys.stdout.isatty() else 110)


def stderr() -> Console:
    """Console for everything that is not a result: progress, speeds, warnings, errors."""
    return Console(stderr=True, highlight=False)


def note(text: str) -> None:
    """Prints one plain line on stderr; brackets in it stay brackets."""
    stderr().print(text, markup=False, soft_wrap=True)


def error_line(error: Exception) -> str:
    """What is told about an exception: its sentence; before others than are expected, its type."""
    expected = isinstance(error, (ValueError, RuntimeError, OSError, MemoryError))
    name = "" if expected and str(error) else f"{type(error).__name__}: "
    return f"error: {name}{error}"


def write(text: str) -> None:
    """Streams generated text to stdout as it is, without wrapping."""
    sys.stdout.write(text)
    sys.stdout.flush()


@contextmanager
def byte_progress(title: str) -> Iterator[Callable[[int, int], None]]:
    """A bar on stderr; the callback takes bytes done and bytes in all."""
    with _bar(title, DownloadColumn(binary_units=True), TransferSpeedColumn()) as update:
        yield update


@contextmanager
def token_progress(title: str) -> Iterator[Callable[[int, int], None]]:
    """A bar on stderr; the callback takes tokens done and tokens in all."""
    count = TextColumn("{task.completed:,.0f} of {task.total:,.0f} tokens")
    with _bar(title, count, TimeRemainingColumn()) as update:
        yield update


@contextmanager
def _bar(title: str, *columns: ProgressColumn) -> Iterator[Callable[[int, int], None]]:
    bar = Progress(TextColumn(title), BarColumn(), *columns, console=stderr(), transient=True)
    with bar:
        task = bar.add_task(title, total=1)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def human_bytes(n: float) -> str:
    """`1536` -> `1.5 KiB`."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(n) < 1024:
            return f"{n:.0f} {unit}" if unit == "B" else f"{n:.1f} {unit}"
        n /= 1024
    return f"{n:.1f} TiB"


def percent(share: float) -> str:
    """`0.0123` -> `1.2 %`; from 10 % on without decimals."""
    return f"{100 * share:.2g} %" if share < 0.1 else f"{100 * share:.0f} %"


def markdown(rows: Sequence[dict[str, str]], left: Sequence[str] = ()) -> str:
    """A Markdown table of rows with equal keys, aligned right but for the columns in `left`."""
    names = list(rows[0])
    width = {n: max(len(n), *(len(r[n]) for r in rows)) for n in names}

    def line(r: dict[str, str]) -> str:
        cells = (r[n].ljust(width[n]) if n in left else r[n].rjust(width[n]) for n in names)
        return f"| {' | '.join(cells)} |"

    rules = (f"{'-' * (width[n] + 1)}{'-' if n in left else ':'}" for n in names)
    return "\n".join([line({n: n for n in names}), f"|{'|'.join(rules)}|", *map(line, rows)])


def pairs(title: str, values: Mapping[str, object]) -> Table:
    """A table of names and values."""
    table = Table(title=title, title_justify="left", show_header=False)
    table.add_column()
    table.add_column(overflow="fold")
    for name, value in values.items():
        table.add_row(name, escape(str(value)))
    return table


# ---- profiles -----------------------------------------------------------------------------------


def index_memory(profile: Profile, n_cells: int) -> tuple[int, int]:
    """Bytes of the side index, and of K and V in f16, for a cache of n_cells."""
    model = profile.identity
    blocks = -(-n_cells // 64) * 64
    kv = n_cells * model.n_layer * model.n_head_kv * model.head_dim * 2 * 2
    return int(profile.bytes_per_cell().sum()) * blocks, kv


def confidence(profile: Profile) -> str:
    """What the index costs, and what calibration says that it finds."""
    size = float(profile.bytes_per_cell().mean())
    text = f"{size:.3g} bytes per token and KV head"
    if profile.recall is None or profile.oracle is None:
        return text
    known = profile.oracle > 0
    found, most = float(profile.recall[known].mean()), float(profile.oracle[known].mean())
    return f"{text}, {percent(found)} of the attention on 1/16 of the tokens (exact scores: {percent(most)})"


def profile_tables(source: Path, profile: Profile) -> list[Table]:
    """What a profile says, which chunks each KV head keeps, and what the side index costs."""
    import numpy as np  # not at the top: `pyfasa --help` needs none

    names = ("method", "n_fc", "n_ranked", "data_name", "data_sha256", "n_ctx", "n_queries", "seed")
    values = {"file": source, **{name: getattr(profile, name) for name in (*names, "created_by")}}

    chunks = Table(title="chunks in use, best first", title_justify="left")
    for name in (
        "layer",
        "KV head",
        "chunks",
        "bits",
        "bytes per cell",
        "attention found",
        "exact",
    ):
        chunks.add_column(name, justify="left" if name == "chunks" else "right")
    reports = [profile.recall, profile.oracle]
    size = profile.bytes_per_cell()
    for layer, head in np.ndindex(size.shape):
        bits = profile.bits[layer, head, : profile.n_fc]
        ids = profile.chunks[layer, head, : profile.n_fc][bits > 0]
        chunks.add_row(
            str(layer),
            str(head),
            " ".join(map(str, ids)) or "dense",
            "/".join(map(str, np.unique(bits[bits > 0]))),
            str(size[layer, head]),
            *("" if report is None else percent(float(report[layer, head])) for report in reports),
        )

    index = Table(title="side index", title_justify="left")
    for name in ("tokens", "side index", "K/V in f16", "share"):
        index.add_column(name, justify="right")
    for n_cells in (8192, 32768, 131072):
        own, kv = index_memory(profile, n_cells)
        index.add_row(f"{n_cells:,}", human_bytes(own), human_bytes(kv), percent(own / kv))
    return [pairs("profile", values), chunks, index]


# ---- answers ------------------------------------------------------------------------------------


def chat_tokens(llm: llama_cpp.Llama, text: str) -> list[int]:
    """Tokens of one user message in the model's chat template; of the bare text if it has none."""
    return message_tokens(llm, [{"role": "user", "content": text}])


def message_tokens(llm: llama_cpp.Llama, messages: Sequence[dict[str, str]]) -> list[int]:
    """Tokens of a chat that the model is to go on with, in its own template.

    Without a template the bare texts follow each other, with a blank line between.
    """
    from llama_cpp.llama_chat_format import Jinja2ChatFormatter

    template = llm.metadata.get("tokenizer.chat_template")
    if template is None:
        text = "\n\n".join(message["content"] for message in messages)
        return llm.tokenize(text.encode(), add_bos=True, special=True)

    def special(token: int) -> str:
        return (
            llm.detokenize([token], special=True).decode("utf-8", "replace") if token >= 0 else ""
        )

    chat = Jinja2ChatFormatter(
        template, eos_token=special(llm.token_eos()), bos_token=special(llm.token_bos())
    )
    prompt = chat(messages=cast("Any", messages)).prompt
    return llm.tokenize(prompt.encode(), add_bos=False, special=True)


def prompt_tokens(model: Path, text: str) -> tuple[list[int], int]:
    """chat_tokens of a model file, and the context size it was trained for; loads no weights."""
    from pyfasa.gguf_header import Header
    from pyfasa.samples import open_vocabulary

    trained = Header.read(model).number("context_length")
    with closing(open_vocabulary(model)) as vocabulary:
        return chat_tokens(vocabulary, text), trained


def read_text(path: Path) -> str:
    """The text of a document. Raises OSError, whose text is a sentence."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise type(error)(f"The document {path} cannot be read: {error.strerror}.") from error


def open_model(
    model: Path, n_ctx: int, n_ctx_train: int, threads: int | None, **arguments: Any
) -> Llama:
    """A model to talk to, with a warning about a context that it was not trained on.

    Why it is dense is not warned about: the commands tell it where it fits.
    n_ctx_train: 0 if that is unknown; threads: None for all CPUs
    """
    from pyfasa.errors import DenseWarning
    from pyfasa.llama import Llama
    from pyfasa.machine import cpu

    if n_ctx > n_ctx_train > 0:
        note(f"warning: a context of {n_ctx} tokens; {model.name} knows {n_ctx_train}")
    cores = threads or cpu().cores
    warnings.simplefilter("ignore", DenseWarning)
    return Llama(
        str(model),
        n_ctx=n_ctx,
        n_threads=cores,
        n_threads_batch=cores,
        verbose=False,
        **arguments,
    )


def prefill(
    llm: llama_cpp.Llama, tokens: Sequence[int], update: Callable[[int, int], None]
) -> float:
    """Evaluates tokens after those in the cache, reporting progress; returns seconds."""
    start = time.perf_counter()
    for i in range(0, len(tokens), llm.n_batch):
        llm.eval(tokens[i : i + llm.n_batch])
        update(min(i + llm.n_batch, len(tokens)), len(tokens))
    return time.perf_counter() - start


@dataclass(frozen=True)
class Answer:
    """A generated text.

    n_steps, decode_s: decode steps and their seconds, from the first to the last token
    cells_read:        share of the visible cells that their attention read; 1 when dense
    dense:             attention nodes that stayed dense, by reason name
    """

    text: str
    n_steps: int
    decode_s: float
    cells_read: float
    dense: dict[str, int]

    @property
    def speed(self) -> float:
        """Decoded tokens per second; 0 when nothing was decoded after the first token."""
        return self.n_steps / self.decode_s if self.decode_s > 0 else 0.0


class Stream:
    """Up to max_tokens after `tokens`, as pieces of text; `answer` tells of those that came so far.

    What of `tokens` is in the cache already is not evaluated again. llm.fasa's counters are reset
    after the first token, so afterwards they tell about decode steps only.
    """

    def __init__(
        self, llm: Llama, tokens: Sequence[int], max_tokens: int, temp: float = 0.0
    ) -> None:
        self._llm = llm
        self._tokens = tokens
        self._max_tokens = max_tokens
        self._temp = temp
        self._pieces: list[str] = []
        self._made: list[int] = []
        self._first = self._last = 0.0
        self._counted = _attached(llm)

    def __iter__(self) -> Iterator[str]:
        import llama_cpp

        llm, tokens, made = self._llm, self._tokens, self._made
        vocabulary = llama_cpp.llama_model_get_vocab(llm.model)
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        for token in llm.generate(tokens, temp=self._temp, repeat_penalty=1.0):
            self._last = time.perf_counter()
            if not made:
                self._first = self._last
                if self._counted:
                    llm.fasa.reset()
            made.append(token)
            if llama_cpp.llama_vocab_is_eog(vocabulary, token):
                break
            piece = decoder.decode(llm.detokenize([token], prev_tokens=[*tokens[-1:], *made[:-1]]))
            self._pieces.append(piece)
            yield piece
            if len(made) >= self._max_tokens or llm.n_tokens + 1 >= llm.n_ctx():
                break

    @property
    def answer(self) -> Answer:
        """The text so far, and what it took."""
        n_steps = max(0, len(self._made) - 1)
        answer = Answer("".join(self._pieces), n_steps, self._last - self._first, 1.0, {})
        if not self._counted:
            return answer
        counters = self._llm.fasa.counters
        return replace(
            answer,
            cells_read=cells_read(counters.nodes, counters.cells_visible, counters.cells_attended),
            dense={name: n for name, n in counters.nodes.items() if n and name != "sparse"},
        )


def stream(
    llm: Llama,
    tokens: Sequence[int],
    max_tokens: int,
    write: Callable[[str], None],
    temp: float = 0.0,
) -> Answer:
    """Generates as Stream does, writes the text piece by piece, and returns all of it."""
    pieces = Stream(llm, tokens, max_tokens, temp)
    for piece in pieces:
        write(piece)
    return pieces.answer


def _attached(llm: Llama) -> bool:
    """Whether pyfasa counts in this model; not where it cannot run at all."""
    try:
        llm.fasa.reset()
    except RuntimeError:
        return False
    return True


def cells_read(nodes: dict[str, int], visible: int, attended: int) -> float:
    """Share of the visible cells that attention read; nodes that stayed dense have read all."""
    total = sum(nodes.values())
    if total == 0 or visible == 0:
        return 1.0
    sparse = nodes.get("sparse", 0) / total
    return sparse * attended / visible + 1 - sparse
