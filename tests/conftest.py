"""Shared fixtures: the bundled model, and no surprise from the environment."""

from __future__ import annotations

from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


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


@pytest.fixture(autouse=True)
def _no_upstream_switches(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("LLAMA_ATTN_ROT_DISABLE", "PYFASA_DEBUG"):
        monkeypatch.delenv(name, raising=False)
