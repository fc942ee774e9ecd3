"""What a user's program looks like; tests/test_typing.py has a type checker read it, nothing runs it."""

from __future__ import annotations

from pathlib import Path

import llama_cpp

import pyfasa
from pyfasa import Llama, Profile, calibrate
from pyfasa.errors import DenseWarning, HostError, ModelFileError, ProfileError
from pyfasa.patching import Patch


def profile_for(model: Path) -> Profile:
    profile: Profile = calibrate(model, method="allocation", index_bytes=10.0, progress=False)
    profile.save(model.with_name(f"{model.stem}-fasa.gguf"), force=True)
    ranked: int = profile.n_ranked
    print(ranked, profile.with_bits(4), Profile.load(str(model)) == profile)
    return profile


def opened(model: str, profile: str | Path | Profile | bool | None) -> Llama:
    llm = pyfasa.Llama(model, profile=profile, budget=512, type_k="q8_0", n_ctx=32768, seed=1)
    plain: llama_cpp.Llama = llm
    tokens: list[int] = plain.tokenize(b"text")
    llm.eval(tokens)
    return llm


def settings(llm: Llama) -> dict[str, float]:
    llm.fasa.budget = 1024
    llm.fasa.n_fc = None
    llm.fasa.index_bits = 4
    llm.fasa.enabled = not llm.fasa.verify
    active: bool = llm.fasa.active
    reason: str | None = llm.fasa.reason
    found: Profile | None = llm.fasa.profile
    nodes: dict[str, int] = llm.fasa.counters.nodes
    share: float = llm.fasa.counters.share_attended
    with llm.dense() as nothing:
        print(active, reason, found, nodes, nothing)
    llm.fasa.reset()
    return {"share": share, "budget": llm.fasa.budget}


def patched(model: str) -> str:
    with pyfasa.patch() as patch:
        kind: Patch = patch
        kind.undo()
    pyfasa.patch()
    pyfasa.unpatch()
    version: str = pyfasa.__version__
    problems: tuple[type[Exception], ...] = (DenseWarning, HostError, ModelFileError, ProfileError)
    return f"{version} {problems} {model}"
