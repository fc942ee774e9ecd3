"""The `pyfasa` command: parse, call, print. Larger commands have files of their own.

Results go to stdout, everything else to stderr. Exit codes: 0 done, 1 an error told in one
sentence, 2 wrong usage, 130 interrupted.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from pyfasa import cli_bench, cli_plugin, cli_profiles, cli_serve, console
from pyfasa.cli_chat import chat
from pyfasa.cli_eval import evaluate
from pyfasa.options import (
    Chunks,
    Documents,
    KvType,
    MinCtx,
    Model,
    ProfileFile,
    Seed,
    Temperature,
    Threads,
    TypeK,
    TypeV,
)


class Commands(console.Group):
    """Lists bench, which has a command of its own and would come last, before eval."""

    def list_commands(self, ctx: Any) -> list[str]:
        names = super().list_commands(ctx)
        names.remove("bench")
        names.insert(names.index("eval"), "bench")
        return names


app = typer.Typer(
    cls=Commands,
    help="Faster decoding over long contexts on top of llama-cpp-python (FASA, arXiv 2602.03152).",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        from pyfasa.machine import pyfasa_version

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


def run(
    model: Model,
    prompt: Annotated[str, typer.Option("-p", "--prompt", help="What to ask.")] = "",
    file: Documents = None,
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
    temp: Temperature = 0.0,
    seed: Seed = 0,
    profile: ProfileFile = None,
) -> None:
    """Ask a model, with documents before the question."""
    parts = [console.read_text(path) for path in file or []]
    text = "\n\n".join([*parts, prompt] if prompt else parts)
    if not text:
        raise typer.BadParameter("nothing to read: give a prompt with -p, documents with --file")
    tokens, n_ctx_train = console.prompt_tokens(model, text)
    n_ctx = ctx or len(tokens) + max_tokens + 1
    if len(tokens) >= n_ctx:
        raise ValueError(f"the text has {len(tokens)} tokens and the context {n_ctx}; raise -c")
    llm = console.open_model(
        model,
        n_ctx,
        n_ctx_train,
        threads,
        type_k=type_k.value,
        type_v=type_v.value,
        seed=seed,
        profile=False if dense else profile,
        budget=budget,
        n_fc=n_fc,
        min_ctx=min_ctx,
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


def doctor(
    model: Annotated[
        Path | None, typer.Argument(metavar="[MODEL]", help="Also check this.")
    ] = None,
    ctx: Annotated[int, typer.Option("-c", "--ctx", min=1, help="Context to plan for.")] = 32768,
    type_k: TypeK = KvType.f16,
    type_v: TypeV = KvType.f16,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Tell what is installed, whether FASA can work, and what to do about each problem.

    Each finding is ok, a note (it works, and could work better) or a PROBLEM (FASA cannot work, or the context does not
    fit), with what to do. Exit code: 0 without a problem, 1 with one.
    """
    from pyfasa import doctor as checks
    from pyfasa.judgements import line

    findings = checks.examine(type_k.value, type_v.value)
    if model is not None:
        healthy = not any(finding.status == "problem" for finding in findings)
        findings += checks.examine_model(
            model, n_ctx=ctx, type_k=type_k.value, type_v=type_v.value, live=healthy
        )
    ok = not any(finding.status == "problem" for finding in findings)
    if as_json:
        typer.echo(json.dumps({"ok": ok, "checks": [vars(f) for f in findings]}, indent=2))
    else:
        typer.echo("\n".join(line(finding) for finding in findings))
    raise typer.Exit(0 if ok else 1)


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


# Here, so that `pyfasa --help` lists them as they are used: ask, make a profile, measure, look after the installation.
for command in (
    run,
    chat,
    cli_profiles.calibrate,
    cli_profiles.embed,
    cli_profiles.extract,
    cli_profiles.remove,
    cli_profiles.inspect,
):
    app.command()(command)
app.add_typer(cli_bench.app, name="bench")
app.command("eval")(evaluate)
app.command()(cli_plugin.env)
# options of the tool are its own, also without "--"
app.command("exec", context_settings={"allow_interspersed_args": False})(cli_plugin.execute)
# every setting of the server is an option, which it reads itself
app.command(
    "serve",
    add_help_option=False,
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
)(cli_serve.serve)
app.command()(doctor)
app.command()(demo)


def main() -> None:
    """The console script."""
    app(prog_name="pyfasa")
