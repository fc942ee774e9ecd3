"""The commands around llama.cpp's own tools: env, exec. pyfasa.cli registers them."""

from __future__ import annotations

import os
import shlex
from pathlib import Path
from typing import Annotated

import typer

from pyfasa import console
from pyfasa.options import Chunks, IndexBits, MinCtx, ProfileFile

Budget = Annotated[
    int | None, typer.Option("--budget", min=1, help="Tokens that a head attends to.")
]
Stats = Annotated[
    Path | None,
    typer.Option("--stats", metavar="FILE", help="Counters as JSON, at exit and on SIGUSR1."),
]
Log = Annotated[bool, typer.Option("--log", help="Let the plugin say what it does.")]


def env(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="A GGUF model.")],
    profile: ProfileFile = None,
    budget: Budget = None,
    n_fc: Chunks = None,
    index_bits: IndexBits = None,
    min_ctx: MinCtx = None,
    stats: Stats = None,
    log: Log = False,
) -> None:
    """Print what a shell exports so that llama.cpp's own tools decode a model with FASA."""
    from pyfasa.plugin import environment

    chosen = _settings(budget, n_fc, index_bits, min_ctx, stats, log)
    for name, value in environment(model, profile, chosen).items():
        typer.echo(f"export {name}={shlex.quote(value)}")


def execute(
    command: Annotated[
        list[str], typer.Argument(metavar="-- TOOL ...", help="A tool of llama.cpp.")
    ],
    model: Annotated[
        Path | None, typer.Option("-m", "--model", help="Default: the one that TOOL is given.")
    ] = None,
    profile: ProfileFile = None,
    budget: Budget = None,
    n_fc: Chunks = None,
    index_bits: IndexBits = None,
    min_ctx: MinCtx = None,
    stats: Stats = None,
    log: Log = False,
) -> None:
    """Run a tool of llama.cpp with FASA: llama-server, llama-cli, llama-bench, rpc-server, .."""
    from pyfasa.errors import FasaError
    from pyfasa.plugin import environment, has_ggml_inside, loading, model_of

    named = model or model_of(command)
    chosen = _settings(budget, n_fc, index_bits, min_ctx, stats, log)
    variables: dict[str, str] = {}
    try:
        variables = environment(named, profile, chosen)
    except FasaError as error:  # the tool itself may know what to do
        console.note(f"pyfasa: {error} Decoding is dense.")
    if variables and has_ggml_inside(command[0]):
        console.note(
            f"pyfasa: {command[0]} has ggml linked inside, and no plugin reaches it; use a build of llama.cpp with "
            "shared libraries (-DBUILD_SHARED_LIBS=ON). Decoding is dense."
        )
        variables = {}
    if variables:
        variables |= loading(command[0])
    try:
        os.execvpe(command[0], command, os.environ | variables)
    except OSError as error:
        raise ValueError(
            f"{command[0]} cannot be run: {error.strerror}; give its path, or put its folder on the PATH"
        ) from None


def _settings(
    budget: int | None,
    n_fc: int | None,
    index_bits: int | None,
    min_ctx: int | None,
    stats: Path | None,
    log: bool,
) -> dict[str, object]:
    return {
        "PYFASA_BUDGET": budget,
        "PYFASA_N_FC": n_fc,
        "PYFASA_BITS": index_bits,
        "PYFASA_MIN_CTX": min_ctx,
        "PYFASA_STATS": None if stats is None else stats.resolve(),
        "PYFASA_LOG": 1 if log else None,
    }
