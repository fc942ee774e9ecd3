"""Train a model of the recipe, stage by stage at growing context, and export it.

`python -m models.recipe.train --out runs/a`; after an interruption the same with `--resume`.
"""

from __future__ import annotations

import argparse
import math
import shutil
import sys
import time
from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from . import RecipeError, text
from .checkpoint import Checkpoint, Stage
from .evaluate import evaluate
from .export import WEIGHT_TYPES, export
from .model import VARIANTS, Model, rope_tables
from .samples import Sample, Samples

CHECKPOINT = "checkpoint.pt"

# About 0.7 billion tokens, the amount that the bundled model saw.
DEFAULT_STAGES = (Stage(2048, 64, 3000), Stage(8192, 16, 1500), Stage(32768, 4, 800))
PEAK_LEARNING_RATE = 2e-3
WARM_UP_STEPS = 150
FINAL_SHARE = 0.03
HELD_OUT_DOCUMENTS = 4


def learning_rate(peak: float, step: int, done: float) -> float:
    """Linear warm-up over the first steps, cosine down to 3% of `peak`; `done` is 0..1."""
    cosine = 0.5 * (1 + math.cos(math.pi * done))
    return peak * min(1.0, (step + 1) / WARM_UP_STEPS) * (FINAL_SHARE + (1 - FINAL_SHARE) * cosine)


class Run:
    """One training run in its folder: text arrays, checkpoint, and in the end the GGUF file."""

    def __init__(self, folder: Path, state: Checkpoint, device: torch.device, workers: int) -> None:
        self.folder, self.device, self.workers = folder, device, workers
        self.variant, self.stages, self.seed = state.variant, state.stages, state.seed
        self.peak, self.step = state.learning_rate, state.step
        torch.manual_seed(state.seed)
        torch.set_float32_matmul_precision("high")
        self.model = Model(state.config).to(device)
        decayed = [p for p in self.model.parameters() if p.ndim > 1]
        norms = [p for p in self.model.parameters() if p.ndim == 1]
        self.optimizer = torch.optim.AdamW(
            [{"params": decayed, "weight_decay": 0.1}, {"params": norms, "weight_decay": 0.0}],
            lr=self.peak,
            betas=(0.9, 0.95),
            fused=device.type == "cuda",
        )
        if state.model:
            self.model.load_state_dict(state.model)
            self.optimizer.load_state_dict(state.optimizer)
        on_gpu = device.type == "cuda"
        self.loss = torch.compile(self.model.loss) if on_gpu else self.model.loss

    def state(self) -> Checkpoint:
        """The run as it stands."""
        return Checkpoint(
            self.variant,
            self.model.config,
            self.stages,
            self.seed,
            self.peak,
            self.step,
            self.model.state_dict(),
            self.optimizer.state_dict(),
        )

    def train(self, save_every: int, log_every: int) -> None:
        """Do the steps that are left, saving the state every `save_every` steps and per stage."""
        total = sum(stage.tokens for stage in self.stages)
        tokens_before = [0, *accumulate(stage.tokens for stage in self.stages)]
        steps_before = [0, *accumulate(stage.steps for stage in self.stages)]
        for stage, seen, first in zip(self.stages, tokens_before, steps_before, strict=False):
            last = first + stage.steps
            if self.step >= last:
                continue
            tables = rope_tables(self.model.config, stage.context, self.device)
            started, at = time.monotonic(), self.step
            for batch in self.batches(stage, self.step - first):
                done = (seen + (self.step - first) * stage.context * stage.batch) / total
                loss, recalled = self.train_step(batch, tables, done)
                self.step += 1
                if self.step % log_every == 0:
                    n_tokens = (self.step - at) * stage.context * stage.batch
                    rate = n_tokens / (time.monotonic() - started)
                    print(
                        f"step {self.step} of {steps_before[-1]}, context {stage.context}: "
                        f"loss {loss.item():.4f}, answer tokens right {recalled.item():.3f}, "
                        f"{rate:.0f} tokens/s",
                        flush=True,
                    )
                if self.step % save_every == 0 or self.step == last:
                    self.state().save(self.folder / CHECKPOINT)
            print(f"held out, {self.score(stage.context)}", flush=True)

    def batches(self, stage: Stage, first: int) -> Iterator[Sample]:
        """The batches of a stage from its step `first` on, each field stacked along a new dim 0."""
        samples = Samples(self.folder / text.TRAIN, stage.context, self.seed)
        return iter(
            DataLoader(
                samples,
                batch_size=stage.batch,
                sampler=range(first * stage.batch, stage.steps * stage.batch),
                num_workers=self.workers,
                pin_memory=self.device.type == "cuda",
            )
        )

    def train_step(self, batch: Sample, tables: Tensor, done: float) -> tuple[Tensor, Tensor]:
        """One optimizer step; returns the loss and the share of answer tokens that were right."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.peak, self.step, done)
        tokens, weight, answer = (part.to(self.device, non_blocking=True) for part in batch)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            loss, hit = self.loss(tokens[:, :-1], tokens[:, 1:], weight, tables)
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach(), hit[answer].float().mean()

    def score(self, context: int) -> str:
        """Scores on the text that training does not see, or why there are none."""
        path, seed = self.folder / text.HELD_OUT, self.seed + 1
        try:
            facts, texts = (Samples(path, context, seed, fact_share=share) for share in (1.0, 0.0))
        except RecipeError as error:
            return f"not scored: {error}"
        some = range(HELD_OUT_DOCUMENTS)
        return str(
            evaluate(self.model, (facts[i] for i in some), (texts[i] for i in some), context)
        )


def start(args: argparse.Namespace) -> Checkpoint:
    """State to begin from: a new folder with the text read, or the saved state of an old one."""
    out: Path = args.out
    if args.resume:
        return Checkpoint.load(out / CHECKPOINT)
    stages = tuple(map(Stage.parse, args.stage)) or DEFAULT_STAGES
    config = VARIANTS[args.variant]
    try:
        out.mkdir(parents=True)
    except FileExistsError:
        raise FileExistsError(
            f"{out} exists already; add --resume to go on with it, or name another folder."
        ) from None
    try:
        folders = args.text or [text.standard_library()]
        n_train, n_held_out = text.prepare(folders, out, suffixes=args.suffix or text.SUFFIXES)
        text.load(out / text.TRAIN, max(stage.context for stage in stages) + 1)
    except BaseException:
        shutil.rmtree(out)
        raise
    print(f"text: {n_train} tokens to train on, {n_held_out} held out", flush=True)
    return Checkpoint(args.variant, config, stages, args.seed, args.learning_rate, 0, {}, {})


def pick_device(name: str | None) -> torch.device:
    """The device called `name`, or the best there is."""
    has_cuda = torch.cuda.is_available()
    try:
        device = torch.device(name or ("cuda" if has_cuda else "cpu"))
    except RuntimeError:
        raise RecipeError(f"device {name!r} is not known; choose cpu, cuda or cuda:N.") from None
    if device.type not in ("cpu", "cuda") or (device.type == "cuda" and not has_cuda):
        raise RecipeError(f"device {name!r} cannot be used by this PyTorch; choose cpu.")
    return device


def count(value: str) -> int:
    """A number of 1 or more, for argparse."""
    number = int(value)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is below 1")
    return number


def parser() -> argparse.ArgumentParser:
    """Options of the command line."""
    p = argparse.ArgumentParser(prog="python -m models.recipe.train", description=__doc__)
    p.add_argument("--out", type=Path, required=True, help="new folder for everything written")
    p.add_argument("--resume", action="store_true", help="go on with the run in OUT as it was set")
    p.add_argument("--text", type=Path, action="append", help="folder of text (repeatable)")
    p.add_argument("--suffix", action="append", help="endings of text files (repeatable)")
    p.add_argument("--variant", choices=VARIANTS, default="tiny-12m")
    p.add_argument(
        "--stage",
        action="append",
        default=[],
        metavar="CONTEXTxBATCHxSTEPS",
        help=f"repeatable; default {' '.join(map(str, DEFAULT_STAGES))}",
    )
    p.add_argument("--seed", type=int, default=1)
    p.add_argument("--learning-rate", type=float, default=PEAK_LEARNING_RATE, help="at its peak")
    p.add_argument("--type", choices=WEIGHT_TYPES, default="q8_0", help="weights of the GGUF file")
    p.add_argument("--device", help="default: cuda if there is one")
    p.add_argument("--workers", type=int, default=4, help="processes that make documents")
    p.add_argument("--save-every", type=count, default=500, help="steps between checkpoints")
    p.add_argument("--log-every", type=count, default=100, help="steps between lines of progress")
    return p


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    args = parser().parse_args(arguments)
    try:
        device = pick_device(args.device)
        state = start(args)
        run = Run(args.out, state, device, args.workers)
        if not args.resume:
            run.state().save(args.out / CHECKPOINT)
        run.train(args.save_every, args.log_every)
        target = args.out / f"pyfasa-{run.variant}-{args.type.upper()}.gguf"
        n_ctx = max(stage.context for stage in run.stages)
        name = f"pyfasa-{run.variant}"
        export(run.model, target, name=name, n_ctx=n_ctx, weight_type=args.type, force=True)
    except (OSError, RecipeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped; --resume goes on from the last checkpoint", file=sys.stderr)
        return 130
    print(f"wrote {target}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
