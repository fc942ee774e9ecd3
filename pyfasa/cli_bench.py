"""`pyfasa bench`: time decoding; `pyfasa bench compare`: two runs of it."""

from __future__ import annotations

import json
import shlex
import sys
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Annotated

import typer

from pyfasa import console
from pyfasa.options import (
    BenchOutput,
    Chunks,
    IndexBits,
    MinCtx,
    PlotFile,
    ProfileFile,
    Threads,
    kv_types,
    numbers,
)

app = typer.Typer(add_completion=False, subcommand_metavar="[compare A B]")


@app.callback(invoke_without_command=True)
def bench(
    context: typer.Context,
    model: Annotated[
        Path | None, typer.Option("-m", "--model", help="A GGUF model.  [required]")
    ] = None,
    depth: Annotated[
        str, typer.Option("-d", "--n-depth", metavar="N,..", help="Tokens in the cache.")
    ] = "8192",
    type_k: Annotated[
        str, typer.Option("-ctk", "--cache-type-k", metavar="T,..", help="Types of the K cache.")
    ] = "f16",
    type_v: Annotated[
        str, typer.Option("-ctv", "--cache-type-v", metavar="T,..", help="Types of the V cache.")
    ] = "f16",
    threads: Threads = None,
    n_gpu_layers: Annotated[
        int, typer.Option("-ngl", "--n-gpu-layers", help="Layers on the GPU; -1: all.")
    ] = 0,
    no_kv_offload: Annotated[
        int,
        typer.Option(
            "-nkvo", "--no-kv-offload", min=0, max=1, help="1: the cache in system memory."
        ),
    ] = 0,
    n_gen: Annotated[int, typer.Option("-n", "--n-gen", help="Tokens to decode.")] = 32,
    repetitions: Annotated[int, typer.Option("-r", "--repetitions", help="Repetitions.")] = 5,
    output: Annotated[
        BenchOutput,
        typer.Option("-o", "--output", help="Output format; jsonl: each row as it comes."),
    ] = BenchOutput.md,
    budget: Annotated[
        str, typer.Option("--budget", metavar="B,..", help="Tokens that a head attends to.")
    ] = "1024",
    n_fc: Chunks = None,
    index_bits: IndexBits = None,
    min_ctx: MinCtx = None,
    profile: ProfileFile = None,
    bandwidth: Annotated[
        float | None,
        typer.Option(
            "--bandwidth",
            metavar="GB/s",
            help="Of the memory, for the roofline; default: measured, but not that of a GPU.",
        ),
    ] = None,
    plot: PlotFile = None,
) -> None:
    """Time decoding, dense against FASA, with a cache filled to a depth."""
    if context.invoked_subcommand is not None:
        return
    if model is None:
        raise typer.BadParameter("bench needs a model: pyfasa bench -m model.gguf")
    from pyfasa import benchmark, plotting
    from pyfasa.machine import cpu

    if plot is not None:
        plotting.check_output(plot)  # before minutes of work
    settings = benchmark.Settings(
        model=model,
        depths=numbers(depth),
        budgets=numbers(budget),
        n_threads=threads or cpu().cores,
        n_gpu_layers=n_gpu_layers,
        offload_kqv=not no_kv_offload,
        n_gen=n_gen,
        repetitions=repetitions,
        n_fc=n_fc,
        index_bits=index_bits,
        min_ctx=min_ctx,
        profile=profile,
        bandwidth_gbs=bandwidth,
        command=shlex.join(["pyfasa", *sys.argv[1:]]),
    )
    rows = []
    stdout = sys.stdout  # on a terminal, status puts in its place what writes to stderr
    with console.stderr().status("loading") as status:
        for k, v in product(kv_types(type_k), kv_types(type_v)):
            for row in benchmark.bench(replace(settings, type_k=k, type_v=v), status.update):
                rows.append(row)
                if output is BenchOutput.jsonl:
                    print(json.dumps(row), file=stdout, flush=True)
    if output is not BenchOutput.jsonl:
        typer.echo(benchmark.FORMATS[output.value](rows))
    if plot is not None:
        from pyfasa.evaluation.plots import speed_against_depth

        plotting.save(speed_against_depth(rows), plot)
        console.note(f"wrote {plot}")


@app.command("compare")
def compare(
    a: Annotated[Path, typer.Argument(metavar="A", help="A result: csv, json or jsonl.")],
    b: Annotated[Path, typer.Argument(metavar="B", help="Another one.")],
) -> None:
    """Show how the speeds of two results differ, and whether by more than the noise."""
    from pyfasa import bench_compare

    typer.echo(bench_compare.compare(a, b))
