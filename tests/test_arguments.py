"""pyfasa.Llama takes the arguments of llama_cpp.Llama and its own, and refuses all others."""

from __future__ import annotations

import inspect
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import llama_cpp
import numpy as np
import pytest

import pyfasa
from pyfasa import Llama, Profile
from pyfasa.llama import KV_TYPES
from support import decode, nmse, opened, opened_plain, random_tokens, warned

TOKENS = random_tokens(310)


def test_every_argument_of_the_parent_is_accepted(path: Path, profile: Profile) -> None:
    parameters = inspect.signature(llama_cpp.Llama.__init__).parameters
    defaults = {
        name: p.default
        for name, p in parameters.items()
        if p.default is not inspect.Parameter.empty and name != "flash_attn"
    }
    assert len(defaults) > 40
    with (
        warned() as sentences,
        opened(path, **{**defaults, "verbose": False}, profile=profile) as x,
    ):
        assert x.fasa.active
        assert isinstance(x, llama_cpp.Llama)
    assert sentences == []


def test_own_arguments_are_not_those_of_the_parent() -> None:
    own = set(inspect.signature(Llama.__init__).parameters)
    of_parent = set(inspect.signature(llama_cpp.Llama.__init__).parameters)
    assert own - of_parent == {
        *("profile", "budget", "n_fc", "index_bits", "min_ctx", "max_rows", "sinks", "recent")
    }


def test_unknown_arguments_are_refused(path: Path) -> None:
    with pytest.raises(TypeError, match=r"bugdet, n_cxt: neither pyfasa\.Llama nor llama_cpp"):
        Llama(str(path), n_cxt=512, bugdet=64)


def test_paths_of_pathlib(path: Path, profile: Profile) -> None:
    x = Llama(path, profile=profile, verbose=False)
    assert x.fasa.active
    x.close()


def test_from_pretrained(path: Path, profile: Profile, monkeypatch: pytest.MonkeyPatch) -> None:
    hub, utils = ModuleType("huggingface_hub"), ModuleType("huggingface_hub.utils")

    class FileSystem:
        def ls(self, repo: str, recursive: bool) -> list[str]:
            return [f"{repo}/README.md", f"{repo}/random.gguf"]

    hub.HfFileSystem = FileSystem  # type: ignore[attr-defined]
    hub.hf_hub_download = lambda **_: str(path)  # type: ignore[attr-defined]
    utils.validate_repo_id = lambda _: None  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    monkeypatch.setitem(sys.modules, "huggingface_hub.utils", utils)
    x = Llama.from_pretrained(
        "someone/random", "*.gguf", profile=profile, budget=70, n_ctx=512, verbose=False
    )
    assert type(x) is Llama
    assert x.fasa.active
    assert x.fasa.budget == 70
    x.close()


@pytest.mark.parametrize("name", ["f16", "q8_0", "Q8_0"])
def test_type_names(name: str, path: Path, profile: Profile) -> None:
    with opened(path, profile=profile, type_k=name, type_v=KV_TYPES[name.lower()]) as x:
        assert x.context_params.type_k == x.context_params.type_v == KV_TYPES[name.lower()]


@pytest.mark.parametrize("value", ["q9_0", "", 2.5, b"f16"])
def test_unknown_type_names(value: Any, path: Path) -> None:
    with pytest.raises(ValueError, match=r"type_v is .* one of f32, f16, bf16, q8_0"):
        Llama(str(path), profile=False, type_v=value)


@pytest.mark.parametrize("value", [4, 9999, -1])
def test_type_ids_that_do_not_exist(value: int, path: Path) -> None:
    """In a process of its own: llama.cpp aborts on them."""
    code = (
        "import pyfasa, sys\n"
        f"try: pyfasa.Llama({str(path)!r}, profile=False, type_k={value}, verbose=False)\n"
        "except ValueError as error: sys.exit(str(error))\n"
    )
    root = Path(pyfasa.__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1, f"the process died with {done.returncode}"
    assert f"type_k is {value}" in done.stderr


@pytest.mark.parametrize(
    "types", [("q4_0", "f16"), ("f16", "q4_0"), ("bf16", "bf16")], ids="-".join
)
def test_other_types_are_sparse(types: tuple[str, str], path: Path, profile: Profile) -> None:
    arguments = {"type_k": KV_TYPES[types[0]], "type_v": KV_TYPES[types[1]]}
    with opened(path, profile=profile, budget=64, min_ctx=0, **arguments) as x:
        x.eval(TOKENS[:300])
        sparse = decode(x, TOKENS[300:])
        nodes = x.fasa.counters.nodes
        x.n_tokens = 300
        with x.dense():
            dense = decode(x, TOKENS[300:])
    assert {name: n for name, n in nodes.items() if n} == {"prefill": 2, "sparse": 2 * 10}
    with opened_plain(path, **arguments) as plain:
        plain.eval(TOKENS[:300])
        assert np.array_equal(dense, decode(plain, TOKENS[300:]))
    assert nmse(sparse, dense) < 0.5  # a quarter of the cells of a random model
