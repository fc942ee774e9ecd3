"""``evaluate``: every case of every task under every setting, resumable."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from pyfasa.console import stderr
from pyfasa.evaluation import settings as named
from pyfasa.evaluation import teacher
from pyfasa.evaluation.loop import run
from pyfasa.evaluation.plan import TOKENS, Plan, clipped
from pyfasa.evaluation.results import ResultsFile, Row
from pyfasa.evaluation.settings import Setting

if TYPE_CHECKING:
    from pyfasa.llama import Llama
    from pyfasa.profile import Profile


def evaluate(
    model: str | os.PathLike[str] | Llama,
    settings: Sequence[str | Setting] = named.DEFAULTS,
    *,
    tasks: Sequence[str] = ("needle",),
    tokens: Sequence[int] = TOKENS,
    questions: int = 20,
    budgets: Sequence[int] = named.BUDGETS,
    index_bytes: Sequence[float] = named.INDEX_BYTES,
    seed: int = 0,
    rows: int = teacher.ROWS,
    texts: int = 1,
    custom: str | os.PathLike[str] | None = None,
    max_tokens: int | None = None,
    profile: Profile | None = None,
    results: str | os.PathLike[str] | None = None,
    type_k: str = "f16",
    type_v: str = "f16",
    n_threads: int | None = None,
    progress: bool = True,
) -> list[Row]:
    """Asks a model under every setting, greedily, and returns a row per case and setting.

    model        a GGUF file, or an open ``pyfasa.Llama``, which gets its profile and settings back, also after an error
    settings     names (see ``settings``), each at every budget and index size, or ``Setting`` objects as they are
    tasks        needle, multikey, tracking, aggregation, kld, ppl, custom (see ``tasks`` and ``teacher``)
    tokens       lengths of the documents; of a file, clipped to the context that the model was trained for
    questions    per task and length
    budgets      cells per query head; index_bytes: per token and KV head, for names without a size
    seed         of documents, calibrations and random chunks
    rows, texts  of kld and ppl: decode rows per text, and how many texts
    custom       JSONL file of the task custom
    max_tokens   of an answer; None: what suits the task
    profile      of the setting "fasa"; None: the model's own, else a fresh calibration
    results      JSONL file to which rows are appended as they are made; rows that are there are not run again, nor are
                 the calibrations that are kept beside it (see ``settings.resolve``)
    type_k, type_v, n_threads   of the context when `model` is a file

    min_ctx is the budget here: what is longer than the budget is selected from.

    Raises ValueError (also ProfileError, ModelFileError) for wrong arguments, files and lengths, HostError if FASA
    cannot run, WriteError if the results cannot be written.
    """
    plan = Plan(
        tuple(tasks), tuple(tokens), questions, seed, rows, texts,
        None if custom is None else Path(custom), max_tokens,
    )  # fmt: skip
    is_file = isinstance(model, (str, os.PathLike))
    model_path = Path(model if isinstance(model, (str, os.PathLike)) else model.model_path)
    named.check_names([one for one in settings if isinstance(one, str)], empty=len(settings) > 0)
    if is_file:
        plan = clipped(plan, model_path)
    with ResultsFile(results) as file, _bar(progress) as bar:
        made: list[Setting] = []
        for one in settings:
            made += [one] if isinstance(one, Setting) else []
        names = [one for one in settings if isinstance(one, str)]
        if names:
            made += named.resolve(
                names, model_path, budgets=budgets, index_bytes=index_bytes, profile=profile,
                seed=seed, n_threads=n_threads, results=results, progress=lambda what: bar(what, 0),
            )  # fmt: skip
        bar.total(plan.n_rows(len(made)))
        if not isinstance(model, (str, os.PathLike)):
            return run(model, plan, made, file, bar)
        bar("loading the model", 0)
        with closing(_open(model_path, plan, type_k, type_v, n_threads)) as llm:
            return run(llm, plan, made, file, bar)


def _open(model: Path, plan: Plan, type_k: str, type_v: str, n_threads: int | None) -> Llama:
    """The model with a context for the longest document or prompt."""
    from pyfasa.evaluation.plan import context_size
    from pyfasa.llama import Llama

    threads = n_threads or os.cpu_count()
    return Llama(
        model, n_ctx=context_size(plan, model), profile=False, type_k=type_k, type_v=type_v,
        n_threads=threads, n_threads_batch=threads, verbose=False,
    )  # fmt: skip


class _Bar:
    """Progress on stderr."""

    def __init__(self, bar: Progress) -> None:
        self._bar = bar
        self._task = bar.add_task("starting", total=None)

    def total(self, n_rows: int) -> None:
        self._bar.update(self._task, total=n_rows)

    def __call__(self, what: str, done: int) -> None:
        self._bar.update(self._task, description=what, advance=done)


@contextmanager
def _bar(show: bool) -> Iterator[_Bar]:
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=stderr(), transient=True, disable=not show) as bar:
        yield _Bar(bar)
