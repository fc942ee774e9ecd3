"""The state of a training run in one file, replaced whole or not at all."""

from __future__ import annotations

import os
import pickle
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from . import RecipeError
from .model import Config


@dataclass(frozen=True)
class Stage:
    """`steps` steps of `batch` documents of `context` tokens each."""

    context: int
    batch: int
    steps: int

    def __post_init__(self) -> None:
        if min(self.context, self.batch, self.steps) < 1:
            raise RecipeError(f"stage {self} has a number below 1.")

    @classmethod
    def parse(cls, text: str) -> Stage:
        """Read `CONTEXTxBATCHxSTEPS`, such as `2048x64x3000`."""
        try:
            context, batch, steps = map(int, text.split("x"))
        except ValueError:
            raise RecipeError(
                f"stage {text!r} is not CONTEXTxBATCHxSTEPS; write for example 2048x64x3000."
            ) from None
        return cls(context, batch, steps)

    def __str__(self) -> str:
        return f"{self.context}x{self.batch}x{self.steps}"

    @property
    def tokens(self) -> int:
        """Tokens trained on in the whole stage."""
        return self.context * self.batch * self.steps


@dataclass(frozen=True)
class Checkpoint:
    """What a run needs to go on; samples are made from seed and step, so no RNG state is kept."""

    variant: str
    config: Config
    stages: tuple[Stage, ...]
    seed: int
    learning_rate: float
    step: int  # steps done, over all stages
    model: dict[str, torch.Tensor]
    optimizer: dict[str, Any]

    @property
    def longest_context(self) -> int:
        """Longest context trained on so far, in tokens."""
        first = 0
        seen = 1
        for stage in self.stages:
            if self.step > first:
                seen = max(seen, stage.context)
            first += stage.steps
        return seen

    def save(self, path: Path) -> None:
        """Write beside `path`, flush to the disk, then rename over it."""
        partial = path.with_name(f"{path.name}.partial-{os.getpid()}")
        content = {field: getattr(self, field) for field in self.__dataclass_fields__}
        content["config"] = asdict(self.config)
        content["stages"] = [str(stage) for stage in self.stages]
        try:
            with partial.open("wb") as file:
                torch.save(content, file)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: Path) -> Checkpoint:
        """Read a checkpoint to the CPU; RecipeError if the file is not one."""
        if not path.is_file():
            raise FileNotFoundError(f"{path} is not there; train first, or name another file.")
        try:
            content = torch.load(path, map_location="cpu", weights_only=True)
            content["config"] = Config(**content["config"])
            content["stages"] = tuple(map(Stage.parse, content["stages"]))
            return cls(**content)
        except (RuntimeError, pickle.UnpicklingError, EOFError, KeyError, TypeError) as error:
            raise RecipeError(f"{path} is not a checkpoint of this recipe ({error}).") from error
