"""The command `pyfasa eval`. pyfasa.cli registers it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pyfasa import console
from pyfasa.options import (
    KvType,
    Model,
    ProfileFile,
    Seed,
    Table,
    Threads,
    TypeK,
    TypeV,
    decimals,
    numbers,
    words,
)


def evaluate(
    model: Model,
    task: Annotated[
        str,
        typer.Option(
            "--task",
            metavar="T,..",
            help="needle, multikey, tracking, aggregation, mass, kld, ppl, custom.",
        ),
    ] = "needle",
    tokens: Annotated[
        str, typer.Option("--tokens", metavar="N,..", help="Lengths of the documents.")
    ] = "4096,8192",
    questions: Annotated[
        int, typer.Option("--questions", help="Questions per task and length.")
    ] = 20,
    setting: Annotated[
        str,
        typer.Option(
            "--setting",
            metavar="S,..",
            help="dense, oracle, fasa, streaming, snapkv, h2o; with a size like :16, or at all "
            "--index-bytes without: variance, agreement, greedy, allocation, random, lowfreq "
            "(bytes), quest (tokens of a page), sparq, double-sparsity (channels).",
        ),
    ] = "dense,oracle,fasa,streaming",
    budget: Annotated[
        str, typer.Option("--budget", metavar="B,..", help="Tokens that a head attends to.")
    ] = "1024",
    index_bytes: Annotated[
        str,
        typer.Option(
            "--index-bytes",
            metavar="N,..",
            help="Bytes read per token and KV head, for settings without a size.",
        ),
    ] = "10",
    rows: Annotated[int, typer.Option("--rows", help="Decode rows per text of kld and ppl.")] = 256,
    texts: Annotated[int, typer.Option("--texts", help="Texts of kld and ppl.")] = 1,
    custom: Annotated[
        Path | None,
        typer.Option("--custom", help='JSONL of {"prompt": .., "expected": ..} for task custom.'),
    ] = None,
    max_tokens: Annotated[
        int | None, typer.Option("-n", "--max-tokens", help="Tokens of an answer at most.")
    ] = None,
    seed: Seed = 0,
    type_k: TypeK = KvType.f16,
    type_v: TypeV = KvType.f16,
    threads: Threads = None,
    profile: ProfileFile = None,
    results: Annotated[
        Path | None,
        typer.Option(
            "--results",
            help="JSONL of all answers; what is in it, or was calibrated for it, is not run again.",
        ),
    ] = None,
    output: Annotated[Table, typer.Option("-o", "--output", help="Output format.")] = Table.md,
    plot: Annotated[
        Path | None, typer.Option("--plot", metavar="DIR", help="Folder for plots (PNG).")
    ] = None,
) -> None:
    """Ask about documents under dense attention, FASA and its rivals; tables, plots."""
    from pyfasa.evaluation import evaluate as measure
    from pyfasa.evaluation import plots, tables
    from pyfasa.plotting import check
    from pyfasa.profile import Profile

    if plot is not None:
        check()  # before hours of work
    found = measure(
        model,
        words(setting),
        tasks=words(task),
        tokens=numbers(tokens),
        questions=questions,
        budgets=numbers(budget),
        index_bytes=decimals(index_bytes),
        seed=seed,
        rows=rows,
        texts=texts,
        custom=custom,
        max_tokens=max_tokens,
        profile=None if profile is None else Profile.load(profile),
        results=results,
        type_k=type_k.value,
        type_v=type_v.value,
        n_threads=threads,
    )
    typer.echo((tables.to_json if output is Table.json else tables.to_markdown)(found))
    if plot is not None:
        for path in plots.save_all(found, plot):
            console.note(f"wrote {path}")
