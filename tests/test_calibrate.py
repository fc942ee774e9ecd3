"""Calibration finds the chunks that decide, from the queries and keys of the running model."""

from __future__ import annotations

import importlib
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyfasa import Llama, Profile, calibrate, ranking, reference
from pyfasa.errors import ModelFileError, ProfileError
from pyfasa.identity import ModelIdentity
from support import (
    NEOX_GROUP_1,
    NEOX_PARTIAL,
    NORM,
    bundled_profile,
    decode,
    nmse,
    opened,
    opened_plain,
    random_tokens,
    write_model,
)

module = importlib.import_module("pyfasa.calibration")
samples = importlib.import_module("pyfasa.samples")
SMALL: dict[str, Any] = {"n_ctx": 640, "progress": False}


@pytest.fixture(scope="module", autouse=True)
def few_facts() -> Iterator[None]:
    """A random model has a token per byte, so questions are long."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(samples, "FACTS", 4)
        yield


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model") / "random.gguf", NORM)


@pytest.fixture(scope="module")
def profile(path: Path) -> Profile:
    return calibrate(path, **SMALL)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """A text of 700 bytes, which are as many tokens of a random model."""
    file = tmp_path / "text.txt"
    file.write_bytes(bytes(np.random.default_rng(0).integers(32, 127, 700).astype(np.uint8)))
    return file


# ---- ranking -------------------------------------------------------------------------------------


def arrays(
    seed: int, n_q: int = 5, group: int = 2, n_kv: int = 40, dim: int = 8
) -> tuple[Any, Any]:
    rng = np.random.default_rng(seed)
    queries = rng.normal(size=(n_q, group, dim)).astype(np.float32)
    return queries, (rng.normal(size=(n_kv, dim)) + rng.normal(size=dim)).astype(np.float32)


@given(st.integers(0, 10_000), st.sampled_from(["norm", "neox"]), st.sampled_from([8, 4]))
@settings(deadline=None)
def test_variance_against_brute_force(seed: int, rope: str, n_rot: int) -> None:
    queries, keys = arrays(seed)
    dims = reference.chunk_dims(8, n_rot, rope)
    wanted = np.zeros(4)
    for q in queries.reshape(-1, 8).astype(np.float64):
        own = [np.var([sum(q[d] * float(k[d]) for d in pair) for k in keys]) for pair in dims]
        wanted += np.array(own) / sum(own) / 10
    found = ranking.variance(queries, keys, dims)
    assert np.allclose(found, wanted, rtol=1e-6)
    assert found.sum() == pytest.approx(1)


@given(st.integers(0, 10_000), st.sampled_from(["norm", "neox"]))
@settings(deadline=None)
def test_agreement_against_brute_force(seed: int, rope: str) -> None:
    queries, keys = arrays(seed, n_q=3, n_kv=300)
    dims = reference.chunk_dims(8, 8, rope)
    wanted = np.zeros(4)
    for q in queries.reshape(-1, 8).astype(np.float64):
        exact = keys.astype(np.float64) @ q
        best = set(np.argsort(-exact)[:256])
        for i, pair in enumerate(dims):
            own = keys[:, pair].astype(np.float64) @ q[pair]
            wanted[i] += len(best & set(np.argsort(-own)[:256])) / 256 / 6
    assert np.allclose(ranking.agreement(queries, keys, dims), wanted)


@pytest.mark.parametrize("method", ranking.METHODS)
@pytest.mark.parametrize("planted", [0, 3, 13])
@pytest.mark.parametrize("rope", ["norm", "neox"])
def test_a_planted_chunk_is_found(method: str, planted: int, rope: str) -> None:
    """One chunk decides; another only shifts all scores alike, however large it is."""
    rng = np.random.default_rng(planted)
    dims = reference.chunk_dims(64, 64, rope)
    queries = rng.normal(size=(20, 2, 64)).astype(np.float32)
    keys = 0.1 * rng.normal(size=(1000, 64)).astype(np.float32)
    keys[:, dims[planted]] *= 50
    keys[:, dims[20]] += 100
    importance = ranking.METHODS[method](queries, keys, dims)
    assert np.argmax(importance) == planted
    # All that greedy tells is a place, and the second is half of the first.
    assert importance[20] <= importance[planted] / 2


@pytest.mark.parametrize("method", ranking.METHODS)
def test_keys_that_are_all_alike(method: str) -> None:
    queries, keys = arrays(0)
    found = ranking.METHODS[method](queries, np.ones_like(keys), reference.chunk_dims(8, 8, "norm"))
    assert np.isfinite(found).all()
    if method == "variance":
        assert found.tolist() == [0, 0, 0, 0]


# ---- calibrate -----------------------------------------------------------------------------------


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


def test_capturing_does_not_change_what_the_model_says(path: Path) -> None:
    tokens = random_tokens(120)
    with opened_plain(path) as plain:
        plain.eval(tokens[:100])
        wanted = decode(plain, tokens[100:])
    with opened(path, profile=False) as llm:
        llm.eval(tokens[:100])
        with llm.fasa.capturing() as session:
            found = decode(llm, tokens[100:])
        assert session.captured(1).shape == (20, 4, 64)
        llm.eval(tokens[:1])
        assert session.captured(1).shape == (20, 4, 64)  # not any more
        session.captured_clear()
        with pytest.raises(RuntimeError, match="Layer 1 has no captured queries"):
            session.captured(1)
        with pytest.raises(RuntimeError, match="Layer 9 has not computed attention"):
            session.keys(9, 0, 10)
        with pytest.raises(ValueError, match="Cells 0 to 100000 are asked for"):
            session.keys(1, 0, 100_000)
    assert nmse(found, wanted) < 5e-4


@pytest.mark.parametrize("kv", ["f16", "q8_0"])
def test_keys_come_back_in_the_basis_of_rope(kv: str, path: Path) -> None:
    """The Hadamard rotation of a quantized cache is undone, up to the cache's own rounding."""
    keys, queries = {}, {}
    tokens = random_tokens(64)
    for name in ("f16", kv):
        with opened(path, profile=False, type_k=name) as llm:
            with llm.fasa.capturing() as session:
                llm.eval(tokens)
            keys[name] = session.keys(0, 0, 64)
            queries[name] = session.captured(0)
    assert nmse(keys[kv], keys["f16"]) < 1e-4
    assert nmse(queries[kv], queries["f16"]) < 1e-6


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


def test_runs_are_kept_and_added(path: Path, text: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.txt"
    other.write_bytes(text.read_bytes()[::-1])
    both = calibrate(path, [text, other], **SMALL)
    kept = tmp_path / "run.npz"
    first = calibrate(path, [text], keep=kept, **SMALL)
    added = calibrate(path, [other], add=[kept], keep=kept, **SMALL)
    assert added.n_queries == both.n_queries == 2 * first.n_queries
    np.testing.assert_array_equal(added.chunks, both.chunks)
    for name in ("center", "scale", "importance"):
        np.testing.assert_allclose(getattr(added, name), getattr(both, name), rtol=1e-5, atol=1e-6)
    assert not np.array_equal(added.chunks, first.chunks)
    assert added.data_sha256 not in (first.data_sha256, both.data_sha256)

    with pytest.raises(ProfileError, match="different models, methods or index settings"):
        calibrate(path, [text], add=[kept], method="greedy", index_bytes=6, **SMALL)
    text.with_name("bad.npz").write_bytes(b"PK nonsense")
    with pytest.raises(ProfileError, match=r"bad\.npz is no saved calibration run"):
        calibrate(path, [text], add=[text.with_name("bad.npz")], **SMALL)
    with pytest.raises(ProfileError, match=r"none\.npz is no saved calibration run"):
        calibrate(path, [text], add=[tmp_path / "none.npz"], **SMALL)


def test_more_bytes_find_more(path: Path, text: Path) -> None:
    """Each size is kept to, spent, and finds more attention mass than the one before."""
    found = [calibrate(path, [text], index_bytes=size, **SMALL) for size in (3, 6, 12, 24)]
    sizes = [profile.bytes_per_cell().mean() for profile in found]
    assert all(0.8 * n <= size <= n for n, size in zip((3, 6, 12, 24), sizes, strict=True))
    recalls = [float(np.mean(profile.recall)) for profile in found if profile.recall is not None]
    assert recalls == sorted(recalls)


def test_a_measured_run_gives_profiles_of_all_sizes(path: Path, text: Path, tmp_path: Path) -> None:
    kept = tmp_path / "run.npz"
    tally = module.measure(path, [text], reuse=kept, **SMALL)
    noted: dict[str, Any] = {"texts": [text], "n_ctx": SMALL["n_ctx"]}
    for size in (None, 4, 12):
        wanted = calibrate(path, [text], index_bytes=size, **SMALL)
        assert module.profile_of(tally, path, index_bytes=size, **noted) == wanted
        loaded = module.Tally.load(kept)
        assert module.profile_of(loaded, path, index_bytes=size, **noted) == wanted
    with pytest.raises(ProfileError, match=r"not of the model .* and the method 'greedy'"):
        module.profile_of(tally, path, method="greedy", **noted)
    with pytest.raises(ValueError, match=r"index_bytes is 1\.5, and the smallest index"):
        module.profile_of(tally, path, index_bytes=1.5, **noted)
    other = write_model(tmp_path / "other.gguf", NORM, seed=9)
    with pytest.raises(ProfileError, match="not of the model"):
        module.profile_of(tally, other, **noted)
    one = module.measure(path, [text], method="variance", index_bytes=6, **SMALL)
    wanted = calibrate(path, [text], method="variance", index_bytes=6, **SMALL)
    assert module.profile_of(one, path, method="variance", **noted) == wanted
    with pytest.raises(ProfileError, match="the method 'allocation'"):
        module.profile_of(one, path, **noted)


def test_a_saved_run_is_reused_only_for_the_same_question(
    path: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept, run, runs = tmp_path / "run.npz", module._run, []
    monkeypatch.setattr(module, "_run", lambda *a: (runs.append(1), run(*a))[1])
    asked: dict[str, Any] = {"method": "variance", "reuse": kept, **SMALL}
    for texts, options, fresh in (
        ([text], {}, 1),
        ([text], {}, 0),
        ([text], {"n_fc": 3}, 1),
        ([text, text], {"n_fc": 3}, 1),
        ([text, text], {"n_fc": 3}, 0),
    ):
        runs.clear()
        module.measure(path, texts, **asked, **options)
        assert len(runs) == fresh, (texts, options)
    for damage in (b"nonsense", kept.read_bytes()[:-200]):
        kept.write_bytes(damage)
        with pytest.raises(ProfileError, match=r"run\.npz is no saved calibration run"):
            module.Tally.load(kept)
        runs.clear()
        module.measure(path, [text], **asked)
        assert len(runs) == 1


def test_the_bundled_model_keeps_its_index_small(tiny_model_path: Path) -> None:
    profile = bundled_profile(tiny_model_path)
    assert profile.bytes_per_cell().mean() <= 0.05 * 2 * 2 * 64  # of f16 K and V


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (
            {"method": "oracle"},
            "method is 'oracle'; it must be one of allocation, variance, agreement, greedy",
        ),
        ({"n_ctx": 511}, "n_ctx is 511; fewer than 512 tokens say nothing"),
        ({"bits": 3}, "bits is 3; it must be 1, 2, 4 or 8"),
        ({"bits": 2}, "n_fc and bits are what allocation finds; give index_bytes"),
        ({"method": "greedy", "index_bytes": 9, "n_fc": 3}, "both given; one follows"),
        ({"index_bytes": -1}, "index_bytes is -1; it must be above 0"),
        ({"index_bytes": 1.5}, "smallest index of this model has 2 bytes"),
        ({"method": "variance", "index_bytes": 1}, "a chunk of 2 bits has 2 bytes"),
        ({"method": "variance", "n_fc": 0}, "n_fc is 0; a head of 64 dims has 1 to 32 chunks"),
        ({"method": "variance", "n_fc": 33}, "n_fc is 33; a head of 64 dims has 1 to 32 chunks"),
        ({"texts": []}, "texts is an empty list; name files, or leave it out"),
        ({"seed": -1}, "seed is -1"),
    ],
    ids=lambda x: str(x)[:20],
)
def test_bad_arguments(arguments: dict[str, Any], sentence: str, path: Path) -> None:
    with pytest.raises(ValueError, match=sentence):
        calibrate(path, **{**SMALL, **arguments})


def test_bad_texts(path: Path, text: Path, tmp_path: Path) -> None:
    short = tmp_path / "short.txt"
    short.write_bytes(text.read_bytes()[:400])
    with pytest.raises(ValueError, match=r"short\.txt has 4\d\d tokens; .* at least 512"):
        calibrate(path, [text, short], **SMALL)
    with pytest.raises(ModelFileError, match=r"none\.txt cannot be read: No such file"):
        calibrate(path, [tmp_path / "none.txt"], **SMALL)
    with pytest.raises(ModelFileError, match="cannot be read: Is a directory"):
        calibrate(path, [tmp_path], **SMALL)


def test_bad_models(tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match=r"none\.gguf"):
        calibrate(tmp_path / "none.gguf", **SMALL)
    file = tmp_path / "text.gguf"
    file.write_text("This is no model.")
    with pytest.raises(ModelFileError, match=r"text\.gguf"):
        calibrate(file, **SMALL)


def test_a_model_without_rope(tmp_path: Path) -> None:
    source = write_model(tmp_path / "model.gguf")
    content = source.read_bytes().replace(b"general.architecture", b"general.architecture", 1)
    assert content.count(b"\x05\x00\x00\x00\x00\x00\x00\x00llama") >= 1
    changed = content.replace(
        b"\x05\x00\x00\x00\x00\x00\x00\x00llama", b"\x05\x00\x00\x00\x00\x00\x00\x00mamba", 1
    )
    (tmp_path / "mamba.gguf").write_bytes(changed)
    with pytest.raises(ProfileError, match="Architecture 'mamba' has no RoPE"):
        calibrate(tmp_path / "mamba.gguf", **SMALL)


@pytest.mark.parametrize("calls_before", [0, 1, 5])
def test_an_interruption_leaves_nothing_behind(
    calls_before: int, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Llama] = []
    eval_of: Callable[..., None] = llama_cpp.Llama.eval
    calls = 0

    class Watched(Llama):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            made.append(self)
            super().__init__(*args, **kwargs)

    def interrupted(self: Any, tokens: Any) -> None:
        nonlocal calls
        calls += 1
        if calls > calls_before:
            raise KeyboardInterrupt
        eval_of(self, tokens)

    monkeypatch.setattr(module, "Llama", Watched)
    monkeypatch.setattr(llama_cpp.Llama, "eval", interrupted)
    files, threads = sorted(path.parent.iterdir()), threading.active_count()
    with pytest.raises(KeyboardInterrupt):
        calibrate(path, n_ctx=640, progress=True)
    monkeypatch.undo()
    (llm,) = made
    assert llm.fasa.reason == "The model is closed."
    assert llm._fasa.session.closed
    assert sorted(path.parent.iterdir()) == files
    deadline = time.monotonic() + 5  # the progress bar's thread ends at its next tick
    while threading.active_count() > threads and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threading.active_count() == threads
    with opened_plain(path) as plain:  # and the next model works
        plain.eval(random_tokens(10))


def test_progress_goes_to_stderr_only_when_wanted(
    path: Path, text: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    calibrate(path, [text], **SMALL)
    captured = capfd.readouterr()
    assert (captured.out, captured.err) == ("", "")
    calibrate(path, [text], n_ctx=640, progress=True)
    assert capfd.readouterr().out == ""
