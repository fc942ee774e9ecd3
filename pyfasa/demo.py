"""Facts hidden in a long document, asked for with dense attention and with FASA on the same K/V.

The document is evaluated once, dense. Each question then starts from it twice, so only what a
decode step reads differs. Decode speed counts from the first to the last token of an answer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rich.markup import escape
from rich.table import Table

from pyfasa import console
from pyfasa.console import Answer, percent
from pyfasa.documents import Document, Fact, ask, is_right, make_document

if TYPE_CHECKING:
    from pyfasa.llama import Llama

BUNDLED = Path("models") / "pyfasa-tiny-12m-Q8_0.gguf"
ROOM = 256  # tokens beside the document: chat template, question, answer
ANSWER_TOKENS = 48


@dataclass(frozen=True)
class Settings:
    """What to show. n_threads None: all CPUs."""

    model: Path
    n_tokens: int = 16000
    n_questions: int = 5
    budget: int = 1024
    type_k: str = "f16"
    type_v: str = "f16"
    n_threads: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if not 1000 <= self.n_tokens <= 32000:
            raise ValueError(f"a document of {self.n_tokens} tokens; choose 1,000 to 32,000")
        if not 1 <= self.n_questions <= 50:
            raise ValueError(f"{self.n_questions} questions; choose 1 to 50")


@dataclass(frozen=True)
class Asked:
    """One question and both answers."""

    fact: Fact
    dense: Answer
    fasa: Answer


def bundled_model() -> Path:
    """The model of the repository; ValueError when it is not there, as with a wheel."""
    for folder in (Path(__file__).resolve().parent.parent, Path.cwd()):
        if (folder / BUNDLED).exists():
            return folder / BUNDLED
    raise ValueError(
        f"{BUNDLED} is neither beside pyfasa nor here: it is in pyfasa's repository, not in its wheels. "
        "Copy it from there into a folder models/ here, or name a model with --model."
    )


def show(settings: Settings) -> bool:
    """Runs the demo on the terminal; true when FASA answered as many questions as dense."""
    from pyfasa.llama import Llama
    from pyfasa.machine import cpu

    out = console.stdout()
    n_threads = settings.n_threads or cpu().cores
    llm = Llama(
        str(settings.model),
        n_ctx=settings.n_tokens + ROOM,
        n_threads=n_threads,
        n_threads_batch=n_threads,
        type_k=settings.type_k,
        type_v=settings.type_v,
        budget=settings.budget,
        verbose=False,
    )
    try:
        if not llm.fasa.active:
            raise RuntimeError(
                f"FASA is not active, so there is nothing to show: {llm.fasa.reason}"
            )
        document = hide(llm, settings)
        out.print(
            f"{settings.model.name}, {n_threads} threads, K/V {settings.type_k}/{settings.type_v}; "
            f"{len(document.facts)} facts in {document.n_tokens:,} tokens of Python's own sources",
            markup=False,
            soft_wrap=True,
        )
        asked = list(interview(llm, document, settings.n_questions))
    finally:
        llm.close()
    out.print(table(asked))
    out.print(totals(asked), markup=False, soft_wrap=True)
    return right(asked, "fasa") >= right(asked, "dense")


def hide(llm: Llama, settings: Settings) -> Document:
    """A document with a fact per 200 tokens, as in the training of the bundled model."""
    return make_document(
        lambda text: llm.tokenize(text.encode(), add_bos=False),
        settings.n_tokens,
        max(settings.n_questions, settings.n_tokens // 200),
        settings.seed,
    )


def interview(
    llm: Llama,
    document: Document,
    n_questions: int,
    write: Callable[[str], None] = console.write,
) -> Iterator[Asked]:
    """Evaluates the document once, then asks about n_questions facts spread over it, each twice."""
    n = len(document.facts)
    facts = [document.facts[(2 * i + 1) * n // (2 * n_questions)] for i in range(n_questions)]
    prompts = [
        console.chat_tokens(llm, ask(fact.question, document.text)[0]["content"]) for fact in facts
    ]
    shared = _common_prefix(prompts, document.n_tokens)
    with llm.dense(), console.token_progress("reading the document") as update:
        seconds = console.prefill(llm, prompts[0][:shared], update)
    write(f"read {shared:,} tokens in {seconds:.1f} s, {shared / seconds:,.0f} tokens/s\n")

    for fact, prompt in zip(facts, prompts, strict=True):
        write(f"\n{fact.question}\n")
        answers = []
        for name in ("dense", "fasa"):
            # all behind the document goes, so both attentions read the question themselves
            llm.n_tokens = shared
            write(f"  {name:5} > ")
            with llm.dense() if name == "dense" else nullcontext():
                answers.append(console.stream(llm, prompt, ANSWER_TOKENS, write))
            write(f"   [{answers[-1].speed:,.0f} tokens/s]\n")
        yield Asked(fact, *answers)


def _common_prefix(prompts: list[list[int]], n_tokens: int) -> int:
    """Tokens that all prompts begin with; of a single prompt, those of the document."""
    if len(prompts) == 1:
        return min(n_tokens, len(prompts[0]) - 1)
    short = min(map(len, prompts))
    differ = (i for i in range(short) if len({prompt[i] for prompt in prompts}) > 1)
    return min(next(differ, short), short - 1)


def right(asked: list[Asked], name: str) -> int:
    """How many answers hold the value asked for; name is "dense" or "fasa"."""
    return sum(is_right(getattr(one, name).text, one.fact) for one in asked)


def speed(answers: list[Answer]) -> float:
    """Decoded tokens per second over all answers."""
    seconds = sum(answer.decode_s for answer in answers)
    return sum(answer.n_steps for answer in answers) / seconds if seconds > 0 else 0.0


def table(asked: list[Asked]) -> Table:
    """Question, value, and for both attentions whether it was found and how fast."""
    result = Table(title="dense against FASA", title_justify="left")
    result.add_column("question")
    for name in ("value", "dense", "FASA", "dense t/s", "FASA t/s", "ratio", "cache read"):
        result.add_column(name, justify="right")
    for one in asked:
        result.add_row(
            escape(one.fact.question),
            one.fact.value,
            *("right" if is_right(a.text, one.fact) else "wrong" for a in (one.dense, one.fasa)),
            f"{one.dense.speed:,.0f}",
            f"{one.fasa.speed:,.0f}",
            _ratio(one.fasa.speed, one.dense.speed),
            percent(one.fasa.cells_read),
        )
    return result


def totals(asked: list[Asked]) -> str:
    """One line about all questions."""
    dense, fasa = speed([one.dense for one in asked]), speed([one.fasa for one in asked])
    read = sum(one.fasa.cells_read for one in asked) / len(asked)
    return (
        f"right: dense {right(asked, 'dense')} of {len(asked)}, FASA {right(asked, 'fasa')} of "
        f"{len(asked)}; decode: {dense:,.0f} against {fasa:,.0f} tokens/s, "
        f"{_ratio(fasa, dense)}; cache read: {percent(read)}"
    )


def _ratio(fasa: float, dense: float) -> str:
    return f"{fasa / dense:.1f} x" if dense > 0 else "-"


if __name__ == "__main__":
    import sys

    from pyfasa.cli import app

    app(["demo", *sys.argv[1:]], prog_name="pyfasa")
