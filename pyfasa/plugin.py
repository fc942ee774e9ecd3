"""libpyfasa: FASA inside llama.cpp's own tools, which load it when GGML_BACKEND_PATH names it. See docs/plugin.md."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from pyfasa.errors import HostError, ProfileError

LIBRARY = "libpyfasa.so"
_MODEL_OPTIONS = ("-m", "--model")
_MODEL_VARIABLE = "LLAMA_ARG_MODEL"
# Names no tensor, but a tool that is given it looks for all backends first.
_LOADS_ALL = {"LLAMA_ARG_OVERRIDE_TENSOR": "pyfasa-names-no-tensor=CPU"}


def library_path() -> Path:
    """Where the library is; it lies beside the compiled binding."""
    if sys.platform != "linux":
        raise HostError(
            f"{LIBRARY}, for llama.cpp's own tools, exists on Linux only; use pyfasa.Llama here."
        )
    spec = importlib.util.find_spec("pyfasa._native")
    if spec is not None and spec.origin is not None:
        path = Path(spec.origin).with_name(LIBRARY)
        if path.exists():
            return path
    raise HostError(f"{LIBRARY} is not beside pyfasa's binding; install pyfasa again.")


def environment(
    model: str | Path | None,
    profile: str | Path | None = None,
    settings: Mapping[str, object] | None = None,
) -> dict[str, str]:
    """The variables that a tool needs to decode `model` sparsely; paths in them are absolute.

    model     a GGUF model; None where another process has it, as with an rpc-server: then `profile` is needed
    profile   in place of the model's own
    settings  variable -> value; those that are None stay unset

    Raises ProfileError when the model has no profile or it is another model's, ModelFileError for damaged files.
    """
    from pyfasa.embed import find_profile
    from pyfasa.identity import ModelIdentity
    from pyfasa.profile import Profile

    where = Path(profile) if profile is not None else None
    if where is None:
        if model is None:
            raise ProfileError(
                "Neither a model nor a profile is named; give one with --model or --profile."
            )
        where = find_profile(model)
    if where is None:
        raise ProfileError(
            f"{model} has no FASA profile; make one with: pyfasa calibrate {model}, or name one with --profile."
        )
    loaded = Profile.load(where)
    if model is not None:
        loaded.check_model(ModelIdentity.read(model))
    found = {"GGML_BACKEND_PATH": str(library_path()), "PYFASA_PROFILE": str(where.resolve())}
    return found | {
        name: str(value) for name, value in (settings or {}).items() if value is not None
    }


def model_of(command: Sequence[str], variables: Mapping[str, str] = os.environ) -> str | None:
    """The model file that a command of llama.cpp names, the last one if there are several."""
    found = variables.get(_MODEL_VARIABLE)
    for i, word in enumerate(command):
        if word in _MODEL_OPTIONS and i + 1 < len(command):
            found = command[i + 1]
        elif word.startswith("--model="):
            found = word.removeprefix("--model=")
    return found


def has_ggml_inside(tool: str | Path) -> bool:
    """Whether a program is linked with ggml statically: then no plugin reaches its decoding.

    libggml.so reads GGML_BACKEND_PATH; a program that holds the name itself has that code inside.
    """
    path = shutil.which(tool)
    if path is None:
        return False
    with open(path, "rb") as file:
        if file.read(4) != b"\x7fELF":
            return False
        tail = b""
        while chunk := file.read(1 << 24):
            if b"GGML_BACKEND_PATH" in tail + chunk:
                return True
            tail = chunk[-32:]
    return False


def loading(tool: str | Path, variables: Mapping[str, str] = os.environ) -> dict[str, str]:
    """What else makes a tool look at GGML_BACKEND_PATH; nothing for published builds.

    A build without GGML_BACKEND_DL has the CPU backend linked in. Its llama-bench and rpc-server look for others all
    the same, llama-server and llama-cli only when an option asks for devices or buffers.
    """
    path = shutil.which(tool)
    ldd = shutil.which("ldd")
    if path is None or ldd is None or any(name in variables for name in _LOADS_ALL):
        return {}
    linked = subprocess.run([ldd, path], capture_output=True, text=True, check=False).stdout
    return dict(_LOADS_ALL) if "libggml-cpu" in linked else {}
