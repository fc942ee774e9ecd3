"""A section for a model card: what the profile is, what it costs, the command that makes it, how to use it."""

from __future__ import annotations

import math
import shlex
from pathlib import Path

from pyfasa import console
from pyfasa.calibration_plan import BUILT_IN, DEFAULT_BYTES, N_CTX, trained_context
from pyfasa.profile import Profile
from pyfasa.ranking import METHODS

USED_CTX = 32768  # of the example; less where the model was trained on less


def card(profile: Profile, source: Path, model: Path | None) -> str:
    """Markdown without a line break at the end. Says nothing about licences.

    source : the file that holds the profile.
    model : the model file; None: only the profile is known, and the model is named after it.
    """
    name = model.name if model is not None else _model_of(source)
    where = (
        f"`{source.name}` carries" if source == model else f"`{source.name}`, beside `{name}`, is"
    )
    sections = [
        "## Sparse attention over long contexts",
        f"{where} a profile for pyfasa\n"
        "(FASA, [arXiv 2602.03152](https://arxiv.org/abs/2602.03152)): the frequency chunks that predict which tokens\n"
        "each attention head looks at. The weights are those of the model.",
        _table(profile),
    ]
    command = command_of(profile, name)
    if command is not None:
        sections.append(f"Made with\n\n```sh\n{command}\n```")
    sections.append(f"Used with\n\n```python\n{_usage(source, name, model)}\n```")
    return "\n\n".join(sections)


def command_of(profile: Profile, model: str) -> str | None:
    """The command that makes an equal profile on the same text and model; None for one that no command makes.

    Of texts only the names are known, and runs that were added with --add are not.
    """
    if profile.method not in ("allocation", *METHODS):
        return None
    words = ["pyfasa", "calibrate", model]
    if profile.data_name != BUILT_IN:
        words += [word for name in profile.data_name.split(", ") for word in ("--text", name)]
    if profile.method == "allocation":
        words += _spent(profile)
    else:
        bits = str(int(profile.bits.max()))
        words += ["--method", profile.method, "--n-fc", str(profile.n_fc), "--bits", bits]
    if profile.n_ctx != N_CTX:
        words += ["--ctx", str(profile.n_ctx)]
    if profile.seed != 0:
        words += ["--seed", str(profile.seed)]
    return shlex.join(words)


def _spent(profile: Profile) -> list[str]:
    """--index-bytes, unless the default buys the same: what it leaves is less than a byte, and nothing costs less."""
    sizes = profile.bytes_per_cell()
    sizes = sizes[sizes > 0]  # layers that stay dense have no share of the budget
    if (
        sizes.size == 0
        or 0 <= DEFAULT_BYTES * profile.identity.head_dim * sizes.size - sizes.sum() < 1
    ):
        return []
    return ["--index-bytes", f"{math.ceil(1e4 * sizes.mean()) / 1e4:g}"]


def _table(profile: Profile) -> str:
    used = (profile.bits[:, :, : profile.n_fc] > 0).sum(axis=2)
    sparse = used.max(axis=1) > 0
    least, most = int(used[sparse].min(initial=profile.n_ranked)), int(used.max())
    chunks = str(most) if least >= most else f"{least} to {most}"
    index, kv = console.index_memory(profile, 64)
    values = {
        "method": profile.method,
        "frequency chunks": f"{chunks} of {profile.identity.head_dim // 2} per KV head",
        "layers": f"{int(sparse.sum())} of {len(sparse)}; the others stay dense",
        "side index": f"{float(profile.bytes_per_cell().mean()):.3g} bytes per token and KV head",
        "share of the f16 K/V cache": console.percent(index / kv),
        "calibrated on": f"{profile.data_name}: documents of {profile.n_ctx:,} tokens, {profile.n_queries:,} queries",
        "made by": profile.created_by,
    }
    if sparse.all():
        del values["layers"]
    found = console.confidence(profile).partition(", ")[2]
    if found:
        values["finds"] = found
    rows = [{"profile": name, "": value} for name, value in values.items()]
    return console.markdown(rows, left=("profile", ""))


def _model_of(source: Path) -> str:
    """The name of the model that a sidecar is found beside."""
    return (
        f"{source.stem.removesuffix('-fasa')}.gguf"
        if source.stem.endswith("-fasa")
        else "model.gguf"
    )


def _usage(source: Path, name: str, model: Path | None) -> str:
    trained = 0 if model is None else trained_context(model)
    n_ctx = min(USED_CTX, trained or USED_CTX)
    found = source == model or source.stem.endswith("-fasa")
    profile = "" if found else f', profile="{source.name}"'
    return (
        "import pyfasa\n\n"
        f'llm = pyfasa.Llama("{name}"{profile}, n_ctx={n_ctx})\n'
        'print(llm.create_chat_completion([{"role": "user", "content": "..."}])["choices"][0]["message"])'
    )
