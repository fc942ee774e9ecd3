"""Shared fixtures: the bundled model, a random one, and no surprise from the environment.

Imports stand inside, so that tests that need no compiled core run without it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from pyfasa import Profile

ROOT = Path(__file__).resolve().parents[1]

# Minutes long, and they need llama.cpp's tools: make test-tools
collect_ignore = [] if os.environ.get("PYFASA_TOOLS") else ["tools"]


@pytest.fixture(scope="session")
def tiny_model_path() -> Path:
    """The model that comes with pyfasa."""
    path = ROOT / "models" / "pyfasa-tiny-12m-Q8_0.gguf"
    assert path.exists(), "models/ must hold the bundled model"
    return path


@pytest.fixture(scope="session")
def plain_model_path(tiny_model_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model without its profile."""
    from pyfasa.embed import remove

    path = tmp_path_factory.mktemp("plain") / tiny_model_path.name
    remove(tiny_model_path, path)
    return path


@pytest.fixture(scope="session")
def one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model for tests to which its shape does not matter."""
    from support import write_model

    return write_model(tmp_path_factory.mktemp("model") / "random.gguf")


@pytest.fixture(scope="session")
def path(one: Path) -> Path:
    """The model of a test; a file may have its own instead, of several shapes."""
    return one


@pytest.fixture(scope="session", params=["f16", "q8_0"])
def types(request: pytest.FixtureRequest) -> dict[str, str]:
    """K and V of one type, as arguments of pyfasa.Llama."""
    return {"type_k": request.param, "type_v": request.param}


@pytest.fixture(scope="session")
def profile(path: Path) -> Profile:
    """A profile of the random model."""
    from support import random_profile

    return random_profile(path)


@pytest.fixture(scope="session")
def other_profile(tmp_path_factory: pytest.TempPathFactory) -> Profile:
    """A profile of another model."""
    from support import NEOX_PARTIAL, random_profile, write_model

    folder = tmp_path_factory.mktemp("other")
    return random_profile(write_model(folder / "other.gguf", NEOX_PARTIAL, seed=7))


@pytest.fixture
def copied(path: Path, tmp_path: Path) -> Path:
    """The random model alone in a folder, for files beside it."""
    target = tmp_path / "copy.gguf"
    target.write_bytes(path.read_bytes())
    return target


@pytest.fixture
def llm(path: Path, profile: Profile) -> Iterator[Any]:
    """The random model, sparse from the first token on."""
    from support import opened

    with opened(path, profile=profile, budget=64, min_ctx=0) as opened_llm:
        yield opened_llm


@pytest.fixture
def tiny(tiny_model_path: Path) -> Iterator[Any]:
    """The bundled model, sparse from the first token on: 48 cells of a context of 512, verified."""
    from support import verified
    from upstream import SPARSE

    with verified(tiny_model_path, **SPARSE) as opened_llm:
        yield opened_llm


@pytest.fixture(autouse=True)
def _no_upstream_switches(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("LLAMA_ATTN_ROT_DISABLE", "PYFASA_DEBUG"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="module")
def few_facts() -> Iterator[None]:
    """For calibrating a random model, which has a token per byte, so that questions are long."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pyfasa.samples.FACTS", 4)
        yield


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """A text of 700 bytes, which are as many tokens of a random model."""
    import numpy as np

    file = tmp_path / "text.txt"
    file.write_bytes(bytes(np.random.default_rng(0).integers(32, 127, 700).astype(np.uint8)))
    return file
