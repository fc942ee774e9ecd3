"""Calibration finds the chunks that decide, from the queries and keys of the running model."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pyfasa import Profile, calibrate, ranking, reference
from pyfasa.identity import ModelIdentity
from support import (
    NEOX_GROUP_1,
    NEOX_PARTIAL,
    SMALL,
    bundled_profile,
    decode,
    opened,
    random_tokens,
    write_model,
)

samples = importlib.import_module("pyfasa.samples")
pytestmark = pytest.mark.usefixtures("few_facts")


@pytest.fixture(scope="module")
def profile(path: Path, few_facts: None) -> Profile:
    return calibrate(path, **SMALL)


def test_what_a_profile_says_about_itself(path: Path, profile: Profile) -> None:
    assert profile.identity == ModelIdentity.read(path)
    assert profile.chunks.shape == profile.bits.shape == (2, 2, 32)
    assert (np.sort(profile.chunks, axis=2) == np.arange(32)).all()
    assert set(np.unique(profile.bits)) <= {0, 1, 2, 4}
    assert profile.bytes_per_cell().mean() <= 0.16 * 64
    assert profile.n_fc == (profile.bits > 0).sum(axis=2).max()
    assert (profile.method, profile.seed, profile.n_ctx) == ("allocation", 0, 640)
    assert profile.importance is not None
    assert (np.diff(profile.importance, axis=2) <= 0).all()
    assert profile.recall is not None
    assert profile.oracle is not None
    assert (profile.recall > 0.2).all()
    assert (profile.recall <= profile.oracle + 1e-6).all()
    assert profile.n_queries > 2 * 4
    assert len(profile.data_sha256) == 64
    assert profile.created_by.startswith("pyfasa ")


def test_stable_under_a_seed(path: Path, profile: Profile) -> None:
    assert calibrate(path, **SMALL) == profile
    other = calibrate(path, **SMALL, seed=1)
    assert other.data_sha256 != profile.data_sha256
    assert other.seed == 1


def test_a_token_per_byte_needs_more_room_for_questions(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(samples, "FACTS", 16)
    assert calibrate(path, n_ctx=1024, progress=False).n_queries > 2 * 16 * 7


def test_methods_bits_and_n_fc(path: Path, text: Path, profile: Profile) -> None:
    made = {
        method: calibrate(path, [text], method=method, n_fc=5, bits=2, **SMALL)
        for method in ranking.METHODS
    }
    assert set(made) == {"variance", "agreement", "greedy"}
    for method, found in made.items():
        assert (found.method, found.n_fc) == (method, 5)
        assert (found.bits == 2).all()
    assert not np.array_equal(made["variance"].chunks, made["agreement"].chunks)


def test_the_ranking_is_that_of_the_captured_queries_and_keys(path: Path, text: Path) -> None:
    """calibrate() against its parts: a third of the last tokens' queries, all keys, one KV head each."""
    found = calibrate(path, [text], method="variance", **SMALL)
    assert (found.bits == 4).all()
    assert found.n_fc == 16
    dims = reference.chunk_dims(64, 64, "norm")
    with opened(path, profile=False) as llm:
        tokens = llm.tokenize(text.read_bytes(), add_bos=True)[:640]
        llm.eval(tokens[: -samples.QUERIES_OF_TEXT])
        with llm.fasa.capturing() as session:
            llm.eval(tokens[-samples.QUERIES_OF_TEXT :])
        for layer in range(2):
            queries = session.captured(layer)
            keys = session.keys(layer, 0, len(tokens))
            for head in range(2):
                own = np.ascontiguousarray(keys[:, head])
                importance = ranking.variance(queries[::3, 2 * head : 2 * head + 2], own, dims)
                assert found.chunks[layer, head].tolist() == np.argsort(-importance).tolist()


@pytest.mark.parametrize("shape", [NEOX_GROUP_1, NEOX_PARTIAL], ids=str)
def test_neox_models(shape: Any, text: Path, tmp_path: Path) -> None:
    path = write_model(tmp_path / "neox.gguf", shape)
    found = calibrate(path, [text], **SMALL)
    assert found.identity.rope == "neox"
    assert found.chunks.shape == (2, shape.n_head_kv, 32)
    with opened(path, profile=found, budget=64, min_ctx=0) as llm:
        llm.fasa.verify = True
        llm.eval(random_tokens(200))
        decode(llm, random_tokens(3))
        assert llm.fasa.counters.nodes["sparse"] == 2 * 3
        assert llm.fasa.counters.verify_failures == 0


def test_texts(path: Path, text: Path, tmp_path: Path) -> None:
    long = tmp_path / "long.txt"
    long.write_bytes(text.read_bytes() * 3)
    found = calibrate(path, [text, str(long)], **SMALL)
    assert found.data_name == "text.txt, long.txt"
    windows = len(long.read_bytes()) // 640  # a token per byte
    assert windows > 2
    assert found.n_queries == (1 + windows) * samples.QUERIES_OF_TEXT
    # Windows reach from the first token to the last.
    again = tmp_path / "again" / "long.txt"
    again.parent.mkdir()
    again.write_bytes(long.read_bytes()[:-50] + b"x" * 50)
    assert calibrate(path, [text, again], **SMALL) != found


def test_more_bytes_find_more(path: Path, text: Path) -> None:
    """Each size is kept to, spent, and finds more attention mass than the one before."""
    found = [calibrate(path, [text], index_bytes=size, **SMALL) for size in (3, 6, 12, 24)]
    sizes = [profile.bytes_per_cell().mean() for profile in found]
    assert all(0.8 * n <= size <= n for n, size in zip((3, 6, 12, 24), sizes, strict=True))
    recalls = [float(np.mean(profile.recall)) for profile in found if profile.recall is not None]
    assert recalls == sorted(recalls)


def test_the_bundled_model_keeps_its_index_small(tiny_model_path: Path) -> None:
    profile = bundled_profile(tiny_model_path)
    assert profile.bytes_per_cell().mean() <= 0.05 * 2 * 2 * 64  # of f16 K and V
