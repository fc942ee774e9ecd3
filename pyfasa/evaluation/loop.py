"""The loop over documents, questions and settings on one open model."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pyfasa.evaluation import mass, teacher
from pyfasa.evaluation import tasks as questions
from pyfasa.evaluation.decode import (
    QUESTION,
    Observed,
    answer,
    applied,
    n_layer,
    prompt_of,
    read,
    read_observed,
    restored,
    shared_prefix,
)
from pyfasa.evaluation.plan import Plan
from pyfasa.evaluation.results import ResultsFile, Row
from pyfasa.evaluation.settings import Setting
from pyfasa.evaluation.tasks import Group, make_cases, read_custom
from pyfasa.identity import ModelIdentity
from pyfasa.samples import make_samples

if TYPE_CHECKING:
    from pyfasa.llama import Llama

Tell = Callable[[str, int], None]  # what is done now, and how many results that was


def run(
    llm: Llama,
    plan: Plan,
    settings: Sequence[Setting],
    file: ResultsFile,
    tell: Tell = lambda what, done: None,
) -> list[Row]:
    """``evaluate`` on an open model, with settings made and a file opened."""
    labels = [setting.label for setting in settings]
    if twice := [label for label in labels if labels.count(label) > 1]:
        raise ValueError(f"the setting {twice[0]!r} is given twice: give each a name of its own")
    needed = max(plan.tokens) + plan.room
    if set(plan.tasks) != {"custom"} and needed > llm.n_ctx():
        raise ValueError(
            f"documents of {max(plan.tokens)} tokens need a context of {needed}, but n_ctx is "
            f"{llm.n_ctx()}: ask for shorter documents, or load the model with a larger n_ctx"
        )
    with restored(llm.fasa):
        one = _Run(llm, plan, settings, file, tell)
        return list(one.rows())


@dataclass
class _Run:
    llm: Llama
    plan: Plan
    settings: Sequence[Setting]
    file: ResultsFile
    tell: Tell

    def __post_init__(self) -> None:
        identity = ModelIdentity.read(self.llm.model_path)
        digest = hashlib.sha256(f"{identity.tensor_hash} {identity.sample_hash}".encode())
        self.model = f"{Path(self.llm.model_path).name} {digest.hexdigest()[:12]}"
        types = self.llm.context_params
        self.cache = f"{types.type_k}/{types.type_v}"

    def tokenize(self, text: str) -> list[int]:
        return list(self.llm.tokenize(text.encode(), add_bos=False))

    def rows(self) -> Iterator[Row]:
        plan = self.plan
        forced = [task for task in plan.tasks if task in teacher.TASKS]
        for task in plan.tasks:
            if task == "custom":
                assert plan.custom is not None
                for group in read_custom(plan.custom, plan.max_tokens or 128):
                    yield from self._group(group)
            elif task in questions.TASKS:
                for n in plan.tokens:
                    for group in make_cases(task, self.tokenize, n, plan.questions, plan.seed):
                        yield from self._group(group)
        for n, number in ((n, i) for n in plan.tokens for i in range(plan.texts)):
            if forced:
                yield from self._text(forced, n, number)
            if mass.TASK in plan.tasks:
                yield from self._mass(n, number)

    # ---- questions ----

    def _group(self, group: Group) -> Iterator[Row]:
        prompts = [prompt_of(self.llm, case) for case in group]
        for case, prompt in zip(group, prompts, strict=True):
            needed = len(prompt) + (self.plan.max_tokens or case.max_tokens)
            if needed > self.llm.n_ctx():
                raise ValueError(
                    f"{case.task} {case.id} needs {needed} tokens with its answer, but n_ctx is "
                    f"{self.llm.n_ctx()}: shorten it, or load the model with a larger n_ctx"
                )
        start = shared_prefix(prompts)
        ready = False
        for case, prompt in zip(group, prompts, strict=True):
            base = {"task": case.task, "case": case.id, "prompt": _digest(prompt)}
            done = {s.label: self.file.get(self._blank(s, **base).key) for s in self.settings}
            todo = [s for s in self.settings if done[s.label] is None]
            if todo and not ready and start:
                self.tell(f"{case.task}: reading {start:,} tokens", 0)
                read(self.llm, prompt[:start], 0)
                ready = True
            made = dict(self._answers(case, prompt, start, todo, base))
            for setting in self.settings:
                row = done[setting.label] or made[setting.label]
                yield row
                self.tell(f"{case.task} {case.id}", 1)

    def _answers(
        self, case: questions.Case, prompt: list[int], start: int, todo: Sequence[Setting],
        base: dict[str, str],
    ) -> Iterator[tuple[str, Row]]:  # fmt: skip
        if not todo:
            return
        observing = any(s.selector is not None and s.selector.observes for s in todo)
        observed = None
        if observing:
            observed = read_observed(self.llm, prompt[start:-1], start)
        else:
            read(self.llm, prompt[start:-1], start)
        for setting in todo:
            with applied(self.llm, setting, observed):
                found = answer(
                    self.llm, prompt, self.plan.max_tokens or case.max_tokens, case.one_line
                )
            row = self._blank(
                setting, **base, n_tokens=case.n_tokens, depth=case.depth, expected=case.expected,
                answer=found.text, score=case.score(found.text), n_steps=found.n_steps,
                attended=found.attended,
            )  # fmt: skip
            self.file.add(row)
            yield setting.label, row

    # ---- text ----

    def _text(self, names: Sequence[str], n_tokens: int, number: int) -> Iterator[Row]:
        plan = self.plan
        text = teacher.make_text(self.tokenize, n_tokens + plan.rows + 1, plan.seed, number)
        tokens = list(self.llm.tokenize(text.encode()))[: n_tokens + plan.rows + 1]
        base = {"case": f"{n_tokens}/{number}/{plan.rows}", "prompt": _digest(tokens)}

        def known(setting: Setting, task: str) -> Row | None:
            return self.file.get(self._blank(setting, task=task, **base).key)

        missing = [s for s in self.settings if any(known(s, task) is None for task in names)]
        dense, observed = np.zeros((0, 0), np.float32), None
        if missing:
            self.tell(f"text: reading {n_tokens:,} tokens", 0)
            observed = self._read_text(tokens[:n_tokens], missing)
            with self.llm.dense():
                batches = teacher.log_probabilities(self.llm, tokens[n_tokens:], n_tokens)
                dense = np.concatenate(list(batches))
        for setting in self.settings:
            if setting in missing:
                with applied(self.llm, setting, observed):
                    found = teacher.compare(self.llm, tokens[n_tokens:], n_tokens, dense)
                for task in names:
                    self.file.add(
                        self._blank(
                            setting, **base, task=task, n_tokens=n_tokens,
                            score=float(np.mean(found.kld)), n_steps=len(found.kld),
                            **vars(found),
                        )
                    )  # fmt: skip
            for task in names:
                row = known(setting, task)
                assert row is not None
                yield row
                self.tell(f"text {number}: {setting.label}", 1)

    def _read_text(self, tokens: list[int], missing: Sequence[Setting]) -> Observed | None:
        read(self.llm, tokens[:-QUESTION], 0)
        last, start = tokens[-QUESTION:], len(tokens) - QUESTION
        if any(s.selector is not None and s.selector.observes for s in missing):
            return read_observed(self.llm, last, start)
        read(self.llm, last, start)
        return None

    # ---- attention mass ----

    def _mass(self, n_tokens: int, number: int) -> Iterator[Row]:
        plan = self.plan
        seed = teacher.SEEDS * (plan.seed + 1) + number
        (sample,) = make_samples(self.llm.model_path, None, n_tokens, seed, documents=1)
        base = {
            "case": f"{n_tokens}/{number}",
            "prompt": _digest([t for run, _ in sample.runs for t in run]),
        }
        done = {
            s.label: self.file.get(self._blank(s, task=mass.TASK, **base).key)
            for s in self.settings
        }
        missing = [s for s in self.settings if done[s.label] is None]
        if missing:
            self.tell(f"mass: reading {n_tokens:,} tokens", 0)
            layers = mass.capture(self.llm, sample, n_layer(self.llm))
            by_label = {s.label: s for s in missing}
            for label, found in mass.masses(layers, missing):
                row = self._blank(
                    by_label[label], task=mass.TASK, **base, n_tokens=n_tokens, score=found,
                    n_steps=mass.ROWS,
                    attended=min(1.0, (by_label[label].budget or n_tokens) / n_tokens),
                )  # fmt: skip
                self.file.add(row)
                done[label] = row
                self.tell(f"mass {number}: {label}", 1)
        yield from (row for row in done.values() if row is not None)

    def _blank(self, setting: Setting, *, task: str, case: str, prompt: str, **found: Any) -> Row:
        """A row with what is known before it is run, and what was found."""
        values: dict[str, Any] = {
            "n_tokens": 0, "depth": None, "expected": (), "answer": "", "score": 0.0, "n_steps": 0,
            "attended": 1.0,
        }  # fmt: skip
        return Row(
            task=task, case=case, prompt=prompt, setting=setting.label, model=self.model,
            seed=self.plan.seed, cache=self.cache, profile=setting.fingerprint, name=setting.name,
            budget=setting.budget, bytes_per_cell=setting.bytes_per_cell, **{**values, **found},
        )  # fmt: skip


def _digest(tokens: Sequence[int]) -> str:
    return hashlib.sha256(np.asarray(tokens, np.int32).tobytes()).hexdigest()[:12]
