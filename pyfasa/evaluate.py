"""How many hidden facts a model finds again, dense and with FASA under any number of settings.

Every document is prefilled once, dense, and each question is asked under every setting on the same
K/V. The few tokens of a question are a prefill too: settings differ in the decode of the answer.
"""

from __future__ import annotations

import argparse
import csv
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from pyfasa.console import cells_read, markdown, percent, stderr
from pyfasa.documents import Document, Fact, ask, is_right, make_document
from pyfasa.embed import find_profile
from pyfasa.errors import HostError
from pyfasa.profile import Profile

if TYPE_CHECKING:
    from pyfasa.handle import Fasa
    from pyfasa.llama import Llama

_MARGIN = 256  # tokens around a document: chat template, question, answer
_SEEDS = 1_000_000  # keeps the documents apart from those of a calibration with a small seed


@dataclass(frozen=True)
class Setting:
    """One way to decode: the chunks that `profile` has in use and `budget` cells, or dense."""

    name: str
    profile: Profile | None = None
    budget: int | None = None

    def __post_init__(self) -> None:
        if (self.profile is None) != (self.budget is None):
            raise ValueError(
                f"the setting {self.name!r} has no {'budget' if self.profile else 'profile'}: "
                "give both, or neither for dense attention"
            )

    @property
    def n_fc(self) -> int | None:
        return None if self.profile is None else self.profile.n_fc

    @property
    def bits(self) -> str:
        """Bits per dim of the chunks in use: `4`, or `2/4/8` where mixed; empty when dense."""
        if self.profile is None:
            return ""
        used = np.unique(self.profile.bits[:, :, : self.profile.n_fc])
        return "/".join(str(bits) for bits in used if bits)

    @property
    def bytes_per_cell(self) -> float | None:
        """Side index bytes per cell and KV head, mean over all layers; None when dense."""
        return None if self.profile is None else float(self.profile.bytes_per_cell().mean())

    @property
    def label(self) -> str:
        """What tells settings apart."""
        if self.profile is None:
            return self.name
        return f"{self.name}: {self.n_fc} chunks, {self.bits} bits, {self.budget} cells"


@dataclass(frozen=True)
class Row:
    """One answer. `attended`: share of the visible cells that its decode steps read, 1 if dense."""

    setting: str  # label of the setting
    document: int
    form: str
    name: str
    value: str
    position: int  # token of the document at which the fact starts
    answer: str
    right: bool
    attended: float


@dataclass(frozen=True)
class Results:
    """All answers: of each document all questions under one setting, then under the next."""

    settings: tuple[Setting, ...]
    rows: tuple[Row, ...]
    n_tokens: int  # of a document, as wanted
    seed: int

    def right(self, setting: Setting) -> tuple[int, int]:
        """(answers that are right, answers) of a setting."""
        rows = [row for row in self.rows if row.setting == setting.label]
        return sum(row.right for row in rows), len(rows)

    def attended(self, setting: Setting) -> float:
        """Mean of `Row.attended` under a setting; nan without answers."""
        shares = [row.attended for row in self.rows if row.setting == setting.label]
        return sum(shares) / len(shares) if shares else float("nan")

    def summary(self) -> list[dict[str, Any]]:
        """One dict per setting, numbers as numbers, None where dense has none."""
        return [
            {
                "setting": setting.name,
                "n_fc": setting.n_fc,
                "bits": setting.bits,
                "bytes_per_cell": setting.bytes_per_cell,
                "budget": setting.budget,
                "right": self.right(setting)[0],
                "n": self.right(setting)[1],
                "attended": self.attended(setting),
            }
            for setting in self.settings
        ]

    def to_markdown(self) -> str:
        """The summary as a table."""

        def text(value: object, form: str = "") -> str:
            return "" if value is None else format(value, form)

        return markdown(
            [
                {
                    "setting": row["setting"],
                    "n_fc": text(row["n_fc"]),
                    "bits": row["bits"],
                    "bytes per cell": text(row["bytes_per_cell"], ".4g"),
                    "budget": text(row["budget"]),
                    "right": f"{row['right']} of {row['n']}",
                    "cells attended": percent(row["attended"]),
                }
                for row in self.summary()
            ],
            left=("setting",),
        )

    def to_dict(self) -> dict[str, Any]:
        """Everything, of types that JSON knows."""
        return {
            "n_tokens": self.n_tokens,
            "seed": self.seed,
            "summary": self.summary(),
            "rows": [asdict(row) for row in self.rows],
        }

    def save_csv(self, path: str | Path) -> None:
        """Writes one line per answer."""
        with open(path, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, [field.name for field in fields(Row)])
            writer.writeheader()
            writer.writerows(asdict(row) for row in self.rows)


def evaluate_retrieval(
    llm: Llama,
    *,
    n_tokens: int,
    n_questions: int,
    settings: Sequence[Setting],
    seed: int = 0,
    questions_per_document: int = 10,
    n_facts: int | None = None,
    max_tokens: int = 24,
    progress: bool = True,
) -> Results:
    """Asks n_questions about documents of n_tokens tokens under every setting, greedily.

    n_facts  in a document; None: one per 200 tokens, about as in the bundled model's training
    llm      a `pyfasa.Llama`; gets its profile and settings back, also after an error

    min_ctx is the budget here: the selection is measured wherever there is something to select.

    Raises ValueError if documents do not fit the context or settings are the same, HostError if
    FASA cannot run with a profile, ProfileError if a profile is not for this model.
    """
    labels = [setting.label for setting in settings]
    if twice := [label for label in labels if labels.count(label) > 1]:
        raise ValueError(f"the setting {twice[0]!r} is given twice: give each a name of its own")
    if n_questions < 1 or questions_per_document < 1:
        raise ValueError(
            f"n_questions is {n_questions} and questions_per_document is {questions_per_document}: "
            "both must be at least 1"
        )
    if n_tokens + _MARGIN > llm.n_ctx():
        raise ValueError(
            f"documents of {n_tokens} tokens need a context of {n_tokens + _MARGIN}, but n_ctx is "
            f"{llm.n_ctx()}: ask for shorter documents, or load the model with a larger n_ctx"
        )
    rows: list[Row] = []
    with _bar(progress, n_questions * len(settings)) as advance, _restored(llm.fasa):
        for number, first in enumerate(range(0, n_questions, questions_per_document)):
            n_asked = min(questions_per_document, n_questions - first)
            document = make_document(
                lambda text: llm.tokenize(text.encode(), add_bos=False),
                n_tokens,
                max(n_asked, n_tokens // 200) if n_facts is None else n_facts,
                _SEEDS * (seed + 1) + number,
            )
            facts = _spread(document.facts, n_asked)
            llm.fasa.enabled = False
            _answer(llm, document, facts[0], 1)
            for setting in settings:
                _apply(llm.fasa, setting)
                for fact in facts:
                    rows.append(_row(llm, document, number, fact, setting, max_tokens))
                    advance()
    return Results(tuple(settings), tuple(rows), n_tokens, seed)


def random_chunks(profile: Profile, seed: int = 0) -> Profile:
    """The profile with as many chunks, drawn at random from all of each KV head."""
    ids = np.arange(profile.identity.head_dim // 2, dtype=np.uint16)
    rows = np.broadcast_to(ids, (*profile.chunks.shape[:2], ids.size))
    drawn = np.random.default_rng(seed).permuted(rows, axis=2)[:, :, : profile.n_ranked]
    return replace(profile, chunks=drawn, method="random", seed=seed)


def standard_settings(
    bundled: Profile,
    variance: Profile,
    agreement: Profile,
    *,
    budgets: Sequence[int] = (256, 1024),
    seed: int = 0,
) -> list[Setting]:
    """Dense, and at each budget:

    * `bundled` as it is
    * a quarter, half and all of the chunks of `variance`, in 2, 4 and 8 bits
    * the paper's choice (FASA, eq. 5): a quarter of the chunks of `agreement`, in 8 bits
    * a quarter of the chunks at random, in 8 bits

    Raises ProfileError if `variance` or `agreement` ranks fewer chunks.
    """
    n_chunks = variance.identity.head_dim // 2
    quarter = n_chunks // 4
    profiles = [("bundled", bundled)]
    profiles += [
        ("variance", variance.with_n_fc(n_fc).with_bits(bits))
        for n_fc in (quarter, n_chunks // 2, n_chunks)
        for bits in (2, 4, 8)
    ]
    profiles += [
        ("agreement (paper)", agreement.with_n_fc(quarter).with_bits(8)),
        ("random", random_chunks(variance, seed).with_n_fc(quarter).with_bits(8)),
    ]
    fasa = [Setting(name, profile, budget) for name, profile in profiles for budget in budgets]
    return [Setting("dense"), *fasa]


def _apply(fasa: Fasa, setting: Setting) -> None:
    fasa.enabled = False
    if setting.profile is None or setting.budget is None:
        return
    fasa.n_fc = None
    fasa.use(setting.profile)
    fasa.budget = setting.budget
    fasa.min_ctx = setting.budget
    fasa.enabled = True
    if not fasa.active:
        raise HostError(
            f"the setting {setting.label!r} cannot be measured, because attention stays dense: "
            f"{fasa.reason}"
        )


@contextmanager
def _restored(fasa: Fasa) -> Iterator[None]:
    profile, enabled, budget = fasa.profile, fasa.enabled, fasa.budget
    # What follows the profile or the budget goes on to follow it.
    n_fc = None if profile is None or fasa.n_fc == profile.n_fc else fasa.n_fc
    min_ctx = None if fasa.min_ctx == 2 * budget else fasa.min_ctx
    try:
        yield
    finally:
        if fasa.profile is not profile:
            fasa.use(profile)
        fasa.n_fc, fasa.budget, fasa.min_ctx, fasa.enabled = n_fc, budget, min_ctx, enabled


def _spread(facts: Sequence[Fact], n: int) -> list[Fact]:
    """n facts, evenly over the depth of the document."""
    if n > len(facts):
        raise ValueError(
            f"{n} questions per document need as many facts, but n_facts is {len(facts)}: raise "
            "it, or ask fewer questions per document"
        )
    return [facts[(2 * i + 1) * len(facts) // (2 * n)] for i in range(n)]


def _answer(llm: Llama, document: Document, fact: Fact, max_tokens: int) -> str:
    """Greedy answer. Of what is in the cache, no more than the document is reused."""
    # A prompt that lacks only its last tokens would have those evaluated as decode steps.
    llm.n_tokens = min(llm.n_tokens, document.n_tokens)
    messages: Any = ask(fact.question, document.text)
    found: Any = llm.create_chat_completion(
        messages, temperature=0.0, repeat_penalty=1.0, max_tokens=max_tokens
    )
    return str(found["choices"][0]["message"]["content"] or "")


def _row(
    llm: Llama, document: Document, number: int, fact: Fact, setting: Setting, max_tokens: int
) -> Row:
    old = llm.fasa.counters
    answer = _answer(llm, document, fact, max_tokens)
    new = llm.fasa.counters
    attended = cells_read(
        {k: n - old.nodes.get(k, 0) for k, n in new.nodes.items() if k != "prefill"},
        new.cells_visible - old.cells_visible,
        new.cells_attended - old.cells_attended,
    )
    known = fact.form, fact.name, fact.value, fact.position
    return Row(setting.label, number, *known, answer, is_right(answer, fact), attended)


@contextmanager
def _bar(show: bool, total: int) -> Iterator[Callable[[], None]]:
    columns = (TextColumn("answers"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=stderr(), transient=True, disable=not show) as bar:
        task = bar.add_task("answers", total=total)
        yield lambda: bar.advance(task)


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints how many hidden facts a model finds again under the standard settings."""
    parser = argparse.ArgumentParser(prog="python -m pyfasa.evaluate", description=main.__doc__)
    parser.add_argument("model", help="GGUF file")
    parser.add_argument("--profile", help="default: the model's own, else a fresh calibration")
    parser.add_argument("--tokens", type=int, default=8000, help="of a document (%(default)s)")
    parser.add_argument("--questions", type=int, default=40, help="in all (%(default)s)")
    parser.add_argument("--per-document", type=int, default=10, help="questions (%(default)s)")
    parser.add_argument("--budgets", type=int, nargs="+", default=[256, 1024], help="in cells")
    parser.add_argument("--seed", type=int, default=0, help="of everything (%(default)s)")
    parser.add_argument("--csv", help="file for the answers")
    parser.add_argument("--json", help="file for the table and the answers")
    chosen = parser.parse_args(arguments)

    from pyfasa.calibration import calibrate
    from pyfasa.llama import Llama

    found = chosen.profile or find_profile(chosen.model)
    variance = calibrate(chosen.model, method="variance", seed=chosen.seed)
    agreement = calibrate(chosen.model, method="agreement", seed=chosen.seed)
    bundled = Profile.load(found) if found else variance
    n_ctx = chosen.tokens + _MARGIN
    llm = Llama(chosen.model, n_ctx=n_ctx, profile=bundled, verbose=False)
    results = evaluate_retrieval(
        llm,
        n_tokens=chosen.tokens,
        n_questions=chosen.questions,
        settings=standard_settings(
            bundled, variance, agreement, budgets=chosen.budgets, seed=chosen.seed
        ),
        seed=chosen.seed,
        questions_per_document=chosen.per_document,
    )
    print(results.to_markdown())
    if chosen.csv:
        results.save_csv(chosen.csv)
    if chosen.json:
        Path(chosen.json).write_text(json.dumps(results.to_dict(), indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
