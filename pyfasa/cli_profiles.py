"""The commands around profiles: calibrate, embed, extract, remove, inspect. pyfasa.cli registers them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from pyfasa import console
from pyfasa.options import Chunks, Force, Model, PlotFile, ProfileFile, Seed


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
) -> None:
    """Show a model's identity, its profile, and what the side index costs."""
    from pyfasa import plotting
    from pyfasa.embed import find_profile
    from pyfasa.identity import Header, ModelIdentity
    from pyfasa.profile import SIDECAR_TYPE, Profile

    if plot is not None:
        plotting.check_output(plot)
    out = console.stdout()
    source: Path | None = file
    if Header.read(file).values.get("general.type") == SIDECAR_TYPE:
        model = Profile.load(file).identity
    else:
        model = ModelIdentity.read(file)
        source = find_profile(file)
    out.print(console.pairs("model", vars(model)))
    if source is None and plot is not None:
        raise ValueError(f"{file} has no profile to plot; make one with `pyfasa calibrate {file}`")
    if source is None:
        out.print(f"no profile: make one with `pyfasa calibrate {file}`", markup=False)
        return
    profile = Profile.load(source)
    profile.check_model(model)
    for table in console.profile_tables(source, profile):
        out.print(table)
    if plot is not None:
        from pyfasa.profile_plot import profile_figure

        plotting.save(profile_figure(profile), plot)
        console.note(f"wrote {plot}")
