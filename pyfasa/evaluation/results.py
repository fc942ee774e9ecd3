"""One row per case and setting: written as it is made, never run twice, summed up per task, length and setting."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

import numpy as np

from pyfasa.errors import WriteError
from pyfasa.evaluation.teacher import TASKS as TEACHER_TASKS
from pyfasa.profile import replacing

Key = tuple[str, str, str, str, int, str, str, str]


@dataclass(frozen=True)
class Row:
    """One case under one setting.

    What is the same when it is run again, and so is not:

    task, case      of the case; setting: label of the setting
    model           name and hash; cache: types of K and V; profile: hash of the setting's, or empty
    seed            of everything; prompt: hash of the prompt's tokens

    name, budget, bytes_per_cell, n_tokens, depth, expected: of the setting and the case
    answer, score   the text, and the share of the expected texts in it; of ppl and kld: mean KLD as the score
    n_steps         decode steps; attended: share of the visible cells that they read, 1 when dense
    kld, same_top, nll, nll_dense   of ppl and kld, see ``teacher.Comparison``
    """

    task: str
    case: str
    setting: str
    model: str
    seed: int
    cache: str
    profile: str
    prompt: str
    name: str
    budget: int | None
    bytes_per_cell: float | None
    n_tokens: int
    depth: float | None
    expected: tuple[str, ...]
    answer: str
    score: float
    n_steps: int
    attended: float
    kld: tuple[float, ...] = ()
    same_top: float | None = None
    nll: float | None = None
    nll_dense: float | None = None

    @property
    def key(self) -> Key:
        return (
            self.task, self.case, self.setting, self.model, self.seed, self.cache, self.profile,
            self.prompt,
        )  # fmt: skip

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Row:
        """Raises KeyError or TypeError for values that are no row."""
        known = {field.name: values[field.name] for field in fields(cls)}
        return cls(**{**known, "expected": tuple(known["expected"]), "kld": tuple(known["kld"])})


class ResultsFile:
    """Rows in a JSONL file, or in memory alone without a path. Each row is on disk once `add` returns.

    A last line without its end, of a run that was killed, is dropped when the file is opened. Raises ValueError with
    the number of a line that is no row, WriteError if the file cannot be written.
    """

    def __init__(self, path: str | os.PathLike[str] | None = None) -> None:
        self.path = None if path is None else Path(path)
        self._file: TextIO | None = None
        self._rows: dict[Key, Row] = {}
        if self.path is not None and self.path.exists():
            self._load(self.path)

    def _load(self, path: Path) -> None:
        data = path.read_bytes()
        whole = data[: data.rfind(b"\n") + 1]
        for number, line in enumerate(whole.splitlines(), 1):
            try:
                row = Row.from_dict(json.loads(line))
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(
                    f"line {number} of {path} is no result of pyfasa eval; name another file with "
                    "--results, or remove the line"
                ) from error
            self._rows[row.key] = row
        if len(whole) < len(data):
            with replacing(path, force=True) as file:
                file.write(whole)

    def __enter__(self) -> ResultsFile:
        if self.path is not None:
            try:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                self._file = open(self.path, "a", encoding="utf-8")
            except OSError as error:
                raise WriteError(f"{self.path} cannot be written: {error.strerror}.") from error
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def get(self, key: Key) -> Row | None:
        return self._rows.get(key)

    def add(self, row: Row) -> None:
        self._rows[row.key] = row
        if self._file is not None:
            try:
                self._file.write(json.dumps(asdict(row)) + "\n")
                self._file.flush()
            except OSError as error:
                raise WriteError(
                    f"{self.path} cannot be written: {error.strerror}. Run the command again with "
                    "more room; what is there is kept."
                ) from error


def read_rows(path: str | os.PathLike[str]) -> list[Row]:
    """All rows of a results file. Raises ValueError if it is none."""
    if not Path(path).exists():
        raise ValueError(f"{path} does not exist; make it with pyfasa eval --results")
    return list(ResultsFile(path)._rows.values())


@dataclass(frozen=True)
class Summary:
    """All rows of a task at one length under one setting.

    score      mean share of expected texts found, 0 to 1; nan for ppl and kld
    as_dense   share of the answers that equal dense's, of ppl and kld: share of equal top tokens; nan without dense
    mean_kld, median_kld, p99_kld   over rows, in nats; ppl, ppl_ratio: to dense; all nan for tasks with answers
    """

    task: str
    n_tokens: int
    setting: str
    name: str
    budget: int | None
    bytes_per_cell: float | None
    n: int
    score: float
    as_dense: float
    attended: float
    mean_kld: float
    median_kld: float
    p99_kld: float
    ppl: float
    ppl_ratio: float

    @property
    def order(self) -> tuple[Any, ...]:
        """Dense first; per budget the oracle, then by index bytes."""
        return (
            self.budget or 0,
            self.name != "oracle",
            self.bytes_per_cell or 0.0,
            self.name != "fasa",
            self.name,
        )


def summarize(rows: Iterable[Row]) -> list[Summary]:
    """Per task and length in the order of the rows, settings in the order of ``Summary.order``."""
    groups: dict[tuple[str, int], dict[str, list[Row]]] = {}
    for row in rows:
        groups.setdefault((row.task, row.n_tokens), {}).setdefault(row.setting, []).append(row)
    found: list[Summary] = []
    for settings in groups.values():
        dense = {row.case: row for own in settings.values() for row in own if row.budget is None}
        found += sorted((_summary(own, dense) for own in settings.values()), key=lambda s: s.order)
    return found


def _summary(rows: Sequence[Row], dense: dict[str, Row]) -> Summary:
    first = rows[0]
    nan = float("nan")
    kld = np.array([value for row in rows for value in row.kld])
    teacher = first.task in TEACHER_TASKS
    same = [row.answer == dense[row.case].answer for row in rows if row.case in dense]
    score = nan if teacher else float(np.mean([row.score for row in rows]))
    as_dense = float(np.mean(same)) if same else nan
    ppl = ratio = nan
    if teacher:
        weights = [row.n_steps for row in rows]
        nll = float(np.average([row.nll or 0.0 for row in rows], weights=weights))
        nll_dense = float(np.average([row.nll_dense or 0.0 for row in rows], weights=weights))
        ppl, ratio = float(np.exp(nll)), float(np.exp(nll - nll_dense))
        as_dense = float(np.average([row.same_top or 0.0 for row in rows], weights=weights))
    return Summary(
        task=first.task, n_tokens=first.n_tokens, setting=first.setting, name=first.name,
        budget=first.budget, bytes_per_cell=first.bytes_per_cell,
        n=sum(row.n_steps for row in rows) if teacher else len(rows),
        score=score, as_dense=as_dense, attended=float(np.mean([row.attended for row in rows])),
        mean_kld=float(kld.mean()) if len(kld) else nan,
        median_kld=float(np.median(kld)) if len(kld) else nan,
        p99_kld=float(np.quantile(kld, 0.99)) if len(kld) else nan,
        ppl=ppl, ppl_ratio=ratio,
    )  # fmt: skip
