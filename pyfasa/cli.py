"""The `pyfasa` command: parse, call, print.

Results go to stdout, everything else to stderr. Exit codes: 0 done, 1 an error told in one
sentence, 2 wrong usage, 130 interrupted.
"""

from __future__ import annotations

import json
import shlex
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from pyfasa import console
from pyfasa.options import (
    Chunks,
    Force,
    KvType,
    MinCtx,
    Model,
    Output,
    ProfileFile,
    Seed,
    Table,
    Threads,
    TypeK,
    TypeV,
    decimals,
    kv_types,
    numbers,
    words,
)

app = typer.Typer(
    cls=console.Group,
    help="Faster decoding over long contexts on top of llama-cpp-python (FASA, arXiv 2602.03152).",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        from pyfasa.doctor import pyfasa_version

        typer.echo(f"pyfasa {pyfasa_version()}")
        raise typer.Exit()


@app.callback()
def options(
    debug: Annotated[
        bool, typer.Option("--debug", help="Show tracebacks (also: PYFASA_DEBUG=1).")
    ] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    pass


# ---- run ----------------------------------------------------------------------------------------


@app.command()
def run(
    model: Model,
    prompt: Annotated[str, typer.Option("-p", "--prompt", help="What to ask.")] = "",
    file: Annotated[
        list[Path] | None, typer.Option("-f", "--file", help="Document to put first; repeatable.")
    ] = None,
    dense: Annotated[bool, typer.Option("--dense", help="Attend to everything.")] = False,
    budget: Annotated[int, typer.Option("--budget", help="Tokens that a head attends to.")] = 1024,
    n_fc: Chunks = None,
    min_ctx: MinCtx = None,
    ctx: Annotated[
        int | None,
        typer.Option("-c", "--ctx", min=1, help="Context size; default: what is needed."),
    ] = None,
    type_k: TypeK = KvType.f16,
    type_v: TypeV = KvType.f16,
    threads: Threads = None,
    max_tokens: Annotated[
        int, typer.Option("-n", "--max-tokens", min=1, help="Tokens to generate at most.")
    ] = 256,
    temp: Annotated[float, typer.Option("--temp", min=0.0, help="0: the likeliest token.")] = 0.0,
    seed: Seed = 0,
    profile: ProfileFile = None,
) -> None:
    """Ask a model, with documents before the question."""
    parts = [path.read_text(encoding="utf-8", errors="replace") for path in file or []]
    text = "\n\n".join([*parts, prompt] if prompt else parts)
    if not text:
        raise typer.BadParameter("nothing to read: give a prompt with -p, documents with --file")
    from pyfasa.doctor import cpu
    from pyfasa.errors import DenseWarning
    from pyfasa.llama import Llama

    tokens, n_ctx_train = console.prompt_tokens(model, text)
    n_ctx = ctx or len(tokens) + max_tokens + 1
    if len(tokens) >= n_ctx:
        raise ValueError(f"the text has {len(tokens)} tokens and the context {n_ctx}; raise -c")
    if n_ctx > n_ctx_train > 0:
        console.note(f"warning: a context of {n_ctx} tokens; {model.name} knows {n_ctx_train}")
    cores = threads or cpu().cores
    # the reason is told at the end
    warnings.simplefilter("ignore", DenseWarning)
    llm = Llama(
        str(model),
        n_ctx=n_ctx,
        n_threads=cores,
        n_threads_batch=cores,
        type_k=type_k.value,
        type_v=type_v.value,
        seed=seed,
        profile=False if dense else profile,
        budget=budget,
        n_fc=n_fc,
        min_ctx=min_ctx,
        verbose=False,
    )
    try:
        with console.token_progress("reading") as update:
            seconds = console.prefill(llm, tokens[:-1], update)
        answer = console.stream(llm, tokens, max_tokens, console.write, temp)
        reason = None if dense else llm.fasa.reason
    finally:
        llm.close()
    console.write("\n")
    console.note(
        f"prompt {len(tokens):,} tokens, {(len(tokens) - 1) / max(seconds, 1e-9):,.1f} tokens/s | "
        f"decode {answer.n_steps:,} tokens, {answer.speed:,.1f} tokens/s | "
        f"cache read {console.percent(answer.cells_read)}"
    )
    if reason or (answer.dense and not dense):
        console.note(f"dense: {reason or ', '.join(answer.dense)}")


# ---- profiles -----------------------------------------------------------------------------------


@app.command()
def calibrate(
    model: Model,
    text: Annotated[
        list[Path] | None, typer.Option("--text", help="Text to calibrate on; repeatable.")
    ] = None,
    method: Annotated[
        str, typer.Option("--method", help="allocation, variance, greedy or agreement.")
    ] = "allocation",
    index_bytes: Annotated[
        float | None,
        typer.Option("--index-bytes", help="Bytes of the side index per token and KV head."),
    ] = None,
    n_fc: Chunks = None,
    bits: Annotated[
        int | None, typer.Option("--bits", help="1, 2, 4 or 8 bits per dim; not with allocation.")
    ] = None,
    ctx: Annotated[
        int | None, typer.Option("-c", "--ctx", min=1, help="Tokens of a calibration document.")
    ] = None,
    seed: Seed = 0,
    add: Annotated[
        list[Path] | None, typer.Option("--add", help="Add a run saved with --keep; repeatable.")
    ] = None,
    keep: Annotated[
        Path | None, typer.Option("--keep", metavar="RUN.npz", help="Save this run for --add.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Default: <model>-fasa.gguf.")
    ] = None,
    force: Force = False,
) -> None:
    """Find the frequency chunks that predict a model's attention; writes a profile."""
    from pyfasa.embed import sidecar_path

    path = output or sidecar_path(model)
    if path.exists() and not force:
        raise ValueError(f"{path} exists; choose another name with -o, or replace it with --force")
    from pyfasa.calibration import calibrate as find_chunks

    chosen: dict[str, Any] = {"n_ctx": ctx, "keep": keep}
    profile = find_chunks(
        str(model),
        [str(file) for file in text] if text else None,
        method=method,
        index_bytes=index_bytes,
        n_fc=n_fc,
        bits=bits,
        seed=seed,
        add=add or [],
        **{name: value for name, value in chosen.items() if value is not None},
    )
    profile.save(path, force=force)
    console.note(f"wrote {path}: {console.confidence(profile)}")


@app.command()
def embed(
    model: Model,
    output: Annotated[Path, typer.Argument(metavar="OUT", help="The model with the profile.")],
    profile: ProfileFile = None,
    force: Force = False,
) -> None:
    """Copy a model with its profile inside."""
    from pyfasa import embed as files
    from pyfasa.profile import Profile

    source = profile or files.sidecar_path(model)
    if not source.exists():
        raise ValueError(
            f"{source} does not exist; name the profile with --profile, or make it with "
            f"`pyfasa calibrate {model}`"
        )
    with console.byte_progress("writing") as update:
        files.embed(model, Profile.load(source), output, force=force, progress=update)
    console.note(f"wrote {output}")


@app.command()
def extract(
    model: Model,
    output: Annotated[Path, typer.Option("-o", "--output", help="The profile file to write.")],
    force: Force = False,
) -> None:
    """Write the profile inside a model to a file of its own."""
    from pyfasa import embed as files

    files.extract(model).save(output, force=force)
    console.note(f"wrote {output}")


@app.command()
def remove(
    model: Model,
    output: Annotated[Path, typer.Argument(metavar="OUT", help="The model without a profile.")],
    force: Force = False,
) -> None:
    """Copy a model without the profile inside."""
    from pyfasa import embed as files

    with console.byte_progress("writing") as update:
        files.remove(model, output, force=force, progress=update)
    console.note(f"wrote {output}")


@app.command()
def inspect(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A model or a profile.")],
) -> None:
    """Show a model's identity, its profile, and what the side index costs."""
    from pyfasa.embed import find_profile
    from pyfasa.identity import Header, ModelIdentity
    from pyfasa.profile import SIDECAR_TYPE, Profile

    out = console.stdout()
    source: Path | None = file
    if Header.read(file).values.get("general.type") == SIDECAR_TYPE:
        model = Profile.load(file).identity
    else:
        model = ModelIdentity.read(file)
        source = find_profile(file)
    out.print(console.pairs("model", vars(model)))
    if source is None:
        out.print(f"no profile: make one with `pyfasa calibrate {file}`", markup=False)
        return
    profile = Profile.load(source)
    profile.check_model(model)
    for table in console.profile_tables(source, profile):
        out.print(table)


# ---- bench, doctor, demo ------------------------------------------------------------------------


@app.command()
def bench(
    model: Annotated[Path, typer.Option("-m", "--model", help="A GGUF model.")],
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
    n_gen: Annotated[int, typer.Option("-n", "--n-gen", help="Tokens to decode.")] = 32,
    repetitions: Annotated[int, typer.Option("-r", "--repetitions", help="Repetitions.")] = 5,
    output: Annotated[Output, typer.Option("-o", "--output", help="Output format.")] = Output.md,
    budget: Annotated[
        str, typer.Option("--budget", metavar="B,..", help="Tokens that a head attends to.")
    ] = "1024",
    n_fc: Chunks = None,
    index_bits: Annotated[
        int | None, typer.Option("--index-bits", help="1, 2, 4 or 8 bits per scored dim.")
    ] = None,
    min_ctx: MinCtx = None,
    profile: ProfileFile = None,
) -> None:
    """Time decoding, dense against FASA, with a cache filled to a depth."""
    from pyfasa import benchmark
    from pyfasa.doctor import cpu

    settings = benchmark.Settings(
        model=model,
        depths=numbers(depth),
        budgets=numbers(budget),
        n_threads=threads or cpu().cores,
        n_gen=n_gen,
        repetitions=repetitions,
        n_fc=n_fc,
        index_bits=index_bits,
        min_ctx=min_ctx,
        profile=profile,
        command=shlex.join(["pyfasa", *sys.argv[1:]]),
    )
    with console.stderr().status("loading") as status:
        rows = [
            row
            for k in kv_types(type_k)
            for v in kv_types(type_v)
            for row in benchmark.bench(replace(settings, type_k=k, type_v=v), status.update)
        ]
    typer.echo(benchmark.FORMATS[output.value](rows))


@app.command("eval")
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
            "--results", help="JSONL of all answers; what is in it already is not run again."
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
    from pyfasa.profile import Profile

    if plot is not None:
        plots.check()  # before hours of work
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


@app.command()
def doctor(
    model: Annotated[
        Path | None, typer.Argument(metavar="[MODEL]", help="Also check this.")
    ] = None,
    ctx: Annotated[int, typer.Option("-c", "--ctx", min=1, help="Context to plan for.")] = 32768,
    type_k: TypeK = KvType.f16,
    type_v: TypeV = KvType.f16,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Tell what is installed, whether FASA can work, and what to do about each problem."""
    from pyfasa import doctor as checks

    findings = checks.examine()
    if model is not None:
        healthy = not any(finding.status == "problem" for finding in findings)
        findings += checks.examine_model(
            model, n_ctx=ctx, type_k=type_k.value, type_v=type_v.value, live=healthy
        )
    ok = not any(finding.status == "problem" for finding in findings)
    if as_json:
        typer.echo(json.dumps({"ok": ok, "checks": [vars(f) for f in findings]}, indent=2))
    else:
        typer.echo("\n".join(checks.line(finding) for finding in findings))
    raise typer.Exit(0 if ok else 1)


@app.command()
def demo(
    model: Annotated[Path | None, typer.Option("-m", "--model", help="Default: bundled.")] = None,
    tokens: Annotated[int, typer.Option("--tokens", help="Length of the document.")] = 16000,
    questions: Annotated[int, typer.Option("--questions", help="Facts to ask for.")] = 5,
    budget: Annotated[int, typer.Option("--budget", help="Tokens that a head attends to.")] = 1024,
    type_k: TypeK = KvType.f16,
    type_v: TypeV = KvType.f16,
    threads: Threads = None,
    seed: Seed = 0,
) -> None:
    """Hide facts in a long document and ask for them, dense and with FASA."""
    from pyfasa import demo as show

    settings = show.Settings(
        model=model or show.bundled_model(),
        n_tokens=tokens,
        n_questions=questions,
        budget=budget,
        type_k=type_k.value,
        type_v=type_v.value,
        n_threads=threads,
        seed=seed,
    )
    raise typer.Exit(0 if show.show(settings) else 1)


def main() -> None:
    """The console script."""
    app(prog_name="pyfasa")
