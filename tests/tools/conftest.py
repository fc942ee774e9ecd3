"""Fixtures for tests with llama.cpp's own tools: `make test-tools` builds them and says where they are."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from pyfasa import Llama
from pyfasa.documents import Document, make_document
from tools import Tools


@pytest.fixture(scope="session")
def tools() -> Tools:
    return Tools(Path(os.environ["PYFASA_TOOLS"]).resolve())


@pytest.fixture(scope="session")
def tokenizer(tiny_model_path: Path) -> Iterator[Llama]:
    llm = Llama(tiny_model_path, vocab_only=True, verbose=False)
    yield llm
    llm.close()


@pytest.fixture(scope="session")
def documents(tokenizer: Llama) -> list[Document]:
    """Four of 5,000 tokens, each with facts of its own."""
    return [
        make_document(
            lambda text: tokenizer.tokenize(text.encode(), add_bos=False), 5000, 25, seed=seed
        )
        for seed in range(4)
    ]
