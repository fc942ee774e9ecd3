"""What is asked of a model: tasks, lengths, numbers; checked before anything is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from pyfasa.console import note
from pyfasa.evaluation import mass, teacher
from pyfasa.evaluation import tasks as questions
from pyfasa.evaluation.tasks import read_custom
from pyfasa.gguf_header import Header

TASKS = (*questions.TASKS, *teacher.TASKS, mass.TASK, "custom")
TOKENS = (4096, 8192)
MARGIN = 320  # tokens around a document: chat template, question, answer
MIN_TOKENS = 256


@dataclass(frozen=True)
class Plan:
    """What is asked of one model; names as in ``evaluate``."""

    tasks: Sequence[str] = ("needle",)
    tokens: Sequence[int] = TOKENS
    questions: int = 20
    seed: int = 0
    rows: int = teacher.ROWS
    texts: int = 1
    custom: Path | None = None
    max_tokens: int | None = None

    def __post_init__(self) -> None:
        if unknown := [task for task in self.tasks if task not in TASKS]:
            raise ValueError(f"{unknown[0]!r} is no task; there are {', '.join(TASKS)}")
        if not self.tasks:
            raise ValueError(f"no task is given; there are {', '.join(TASKS)}")
        if ("custom" in self.tasks) != (self.custom is not None):
            raise ValueError(
                "the task custom and a file of prompts go together: give both, or neither "
                "(on the command line --task custom --custom FILE.jsonl)"
            )
        if not self.tokens or min(self.tokens) < MIN_TOKENS:
            raise ValueError(
                f"documents of {list(self.tokens)} tokens; give one or more lengths, each at least "
                f"{MIN_TOKENS}"
            )
        for name, least in (("questions", 1), ("rows", 1), ("texts", 1), ("seed", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least {least}")
        if self.max_tokens is not None and self.max_tokens < 1:
            raise ValueError(f"max_tokens is {self.max_tokens}; it must be at least 1")

    @property
    def room(self) -> int:
        """Tokens that a context needs beside the longest document."""
        after = self.rows + 1 if set(self.tasks) & set(teacher.TASKS) else 0
        asked = mass.ROOM if mass.TASK in self.tasks else 0
        return max(MARGIN + (self.max_tokens or 0), after, asked)

    def n_rows(self, n_settings: int) -> int:
        """Results in all."""
        per_length = [
            self.texts if task in (*teacher.TASKS, mass.TASK) else self.questions
            for task in self.tasks
            if task != "custom"
        ]
        asked = sum(map(len, read_custom(self.custom))) if self.custom is not None else 0
        return n_settings * (len(self.tokens) * sum(per_length) + asked)


def clipped(plan: Plan, model: Path) -> Plan:
    """The plan with lengths that fit the context a model was trained for, told where that changes them."""
    values = Header.read(model).values
    trained = int(str(values.get(f"{values.get('general.architecture')}.context_length", 0)))
    most = trained - plan.room
    if trained == 0 or max(plan.tokens) <= most or set(plan.tasks) == {"custom"}:
        return plan
    if most < MIN_TOKENS:
        raise ValueError(
            f"{model.name} was trained for {trained} tokens, which leaves no room for a document "
            f"beside {plan.room} others; ask for fewer rows or max_tokens"
        )
    note(f"{model.name} was trained for {trained:,} tokens: longer documents are cut to {most:,}")
    return replace(plan, tokens=tuple(dict.fromkeys(min(n, most) for n in plan.tokens)))


def context_size(plan: Plan, model: Path) -> int:
    """Tokens that the longest document or prompt needs."""
    from contextlib import closing

    from pyfasa.console import chat_tokens
    from pyfasa.samples import open_vocabulary

    needed = max(plan.tokens) + plan.room if set(plan.tasks) != {"custom"} else 0
    if plan.custom is not None:
        with closing(open_vocabulary(model)) as vocabulary:
            for case in (case for group in read_custom(plan.custom) for case in group):
                text = f"{case.document}\n\n{case.question}"
                prompt = len(chat_tokens(vocabulary, text))
                needed = max(needed, prompt + MARGIN + (plan.max_tokens or case.max_tokens))
    return needed
