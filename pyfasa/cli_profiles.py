"""The commands around profiles: calibrate, embed, extract, remove, inspect. pyfasa.cli registers them."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated, Any

import typer

from pyfasa import console
from pyfasa.options import Chunks, Force, Model, PlotFile, ProfileFile, Seed


def calibrate(
    model: Model,
    text: Annotated[
        list[Path] | None,
        typer.Option(
            "--text",
            help="Text to calibrate on; repeatable. Default: the sources of Python's standard library on this "
            "machine, with hidden facts and questions about them; none is bundled or downloaded.",
        ),
    ] = None,
    method: Annotated[
        str, typer.Option("--method", help="allocation, variance, greedy or agreement.")
    ] = "allocation",
    index_bytes: Annotated[
        float | None,
        typer.Option(
            "--index-bytes",
            help="Bytes of the side index per token and KV head; default: 0.16 per dim.",
        ),
    ] = None,
    n_fc: Chunks = None,
    bits: Annotated[
        int | None, typer.Option("--bits", help="1, 2, 4 or 8 bits per dim; not with allocation.")
    ] = None,
    ctx: Annotated[
        int | None,
        typer.Option(
            "-c",
            "--ctx",
            min=1,
            help="Tokens of a document; default: 4096, or what the model was trained on if less.",
        ),
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
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only tell what would be done, and what it takes.")
    ] = False,
    force: Force = False,
) -> None:
    """Find the frequency chunks that predict a model's attention; writes a profile."""
    from pyfasa.embed import find_profile, sidecar_path

    path = output or sidecar_path(model)
    if path.exists() and not force:
        raise ValueError(f"{path} exists; choose another name with -o, or replace it with --force")
    from pyfasa.calibration import calibrate as find_chunks
    from pyfasa.calibration_plan import check_output, make_plan
    from pyfasa.gguf_header import Header

    Header.read(model)  # a model that is not there is told before the folder that is not
    for file in (path, keep):
        if file is not None:
            check_output(file)
    asked: dict[str, Any] = {
        "method": method, "index_bytes": index_bytes, "n_fc": n_fc, "bits": bits, "n_ctx": ctx,
        "seed": seed, "add": add or [],
    }  # fmt: skip
    if dry_run:
        from pyfasa.dry_run import outlook

        plan = make_plan(model, text or None, **asked)
        console.stdout().print(console.pairs("dry run", outlook(plan, path)))
        return
    profile = find_chunks(model, text or None, keep=keep, tell=console.note, **asked)
    profile.save(path, force=force)
    console.note(f"wrote {path}: {console.confidence(profile)}")
    found = find_profile(model)
    if found != path == sidecar_path(model):
        console.note(
            f"warning: {found} carries a profile of its own, which is found before {path.name}; put this one in its "
            f"place with `pyfasa embed {model} OUT --profile {path}`"
        )
    _name_card(model if found == path else path)


def _name_card(file: Path) -> None:
    console.note(f"for its model card: {shlex.join(['pyfasa', 'inspect', str(file), '--card'])}")


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
    _name_card(output)


def extract(
    model: Model,
    output: Annotated[Path, typer.Option("-o", "--output", help="The profile file to write.")],
    force: Force = False,
) -> None:
    """Write the profile inside a model to a file of its own."""
    from pyfasa import embed as files

    files.extract(model).save(output, force=force)
    console.note(f"wrote {output}")


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


def inspect(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A model or a profile.")],
    plot: PlotFile = None,
    card: Annotated[
        bool, typer.Option("--card", help="Print Markdown for a model card instead.")
    ] = False,
) -> None:
    """Show a model's identity, its profile, and what the side index costs."""
    from pyfasa import plotting
    from pyfasa.embed import find_profile
    from pyfasa.gguf_header import Header
    from pyfasa.identity import ModelIdentity
    from pyfasa.profile import SIDECAR_TYPE, Profile

    if plot is not None:
        plotting.check_output(plot)
    source: Path | None = file
    is_model = Header.read(file).values.get("general.type") != SIDECAR_TYPE
    if is_model:
        identity = ModelIdentity.read(file)
        source = find_profile(file)
    else:
        identity = Profile.load(file).identity
    out = console.stdout()
    if not card:
        out.print(console.pairs("model", vars(identity)))
    if source is None:
        if plot is not None or card:
            use = "to plot" if plot is not None else "for a card"
            raise ValueError(
                f"{file} has no profile {use}; make one with `pyfasa calibrate {file}`"
            )
        out.print(f"no profile: make one with `pyfasa calibrate {file}`", markup=False)
        return
    profile = Profile.load(source)
    profile.check_model(identity)
    if card:
        from pyfasa import model_card

        console.write(model_card.card(profile, source, file if is_model else None) + "\n")
    else:
        for table in console.profile_tables(source, profile):
            out.print(table)
    if plot is not None:
        from pyfasa.profile_plot import profile_figure

        plotting.save(profile_figure(profile), plot)
        console.note(f"wrote {plot}")
