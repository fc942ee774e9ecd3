"""A profile keeps its arrays, counts its bytes, and comes back from a file as it went in."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from pyfasa.errors import ProfileError, WriteError
from pyfasa.identity import ModelIdentity
from pyfasa.profile import Profile


def make_identity(**changes: Any) -> ModelIdentity:
    values: dict[str, Any] = {
        "name": "small", "architecture": "llama", "n_layer": 2, "n_head": 4, "n_head_kv": 2,
        "head_dim": 16, "n_rot": 16, "rope": "norm", "rope_freq_base": 10000.0,
        "tensor_hash": "a" * 64, "sample_type": "Q8_0", "sample_hash": "b" * 64,
    }  # fmt: skip
    return ModelIdentity(**(values | changes))


def make_profile(identity: ModelIdentity | None = None, bits: Any = 4, **changes: Any) -> Profile:
    """All chunks ranked, in another order for each KV head; half of them in use."""
    model = identity or make_identity()
    rows, n_ranked = (model.n_layer, model.n_head_kv), model.head_dim // 2
    rng = np.random.default_rng(7)
    ranked = np.broadcast_to(np.arange(n_ranked), (*rows, n_ranked))
    values: dict[str, Any] = {
        "identity": model,
        "chunks": rng.permuted(ranked, axis=2),
        "bits": np.broadcast_to(bits, (*rows, n_ranked)) if np.ndim(bits) == 0 else bits,
        "center": rng.normal(size=(*rows, model.head_dim)).astype(np.float32),
        "scale": rng.uniform(0.5, 2, size=(*rows, model.head_dim)).astype(np.float32),
        "n_fc": n_ranked // 2,
        "method": "variance",
        "data_name": "standard library",
        "data_sha256": "c" * 64,
        "n_ctx": 4096,
        "n_queries": 64,
        "seed": 1,
        "created_by": "pyfasa 0.1.0",
    }
    return Profile(**(values | changes))


@st.composite
def profiles(draw: st.DrawFn) -> Profile:
    half = draw(st.integers(1, 128))
    model = make_identity(
        name=draw(st.text()),
        architecture=draw(st.text()),
        n_layer=draw(st.integers(1, 4)),
        n_head_kv=draw(st.integers(1, 3)),
        head_dim=2 * half,
        n_rot=2 * draw(st.integers(1, half)),
        rope=draw(st.sampled_from(["norm", "neox"])),
        rope_freq_base=draw(st.floats(min_value=0, exclude_min=True, allow_infinity=False)),
    )
    rows, n_ranked = (model.n_layer, model.n_head_kv), draw(st.integers(1, half))
    used = draw(hnp.arrays(np.int64, (*rows, 1), elements=st.integers(0, n_ranked)))
    bits = draw(hnp.arrays(np.uint8, (*rows, n_ranked), elements=st.sampled_from([2, 4, 8])))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    ids = rng.permuted(np.broadcast_to(np.arange(half), (*rows, half)), axis=2)[:, :, :n_ranked]
    real = st.floats(width=32, allow_nan=False, allow_infinity=False)
    above = st.floats(width=32, min_value=0, exclude_min=True, allow_infinity=False)
    shape = (*rows, model.head_dim)
    return make_profile(
        model,
        chunks=ids,
        bits=np.where(np.arange(n_ranked) < used, bits, 0),
        center=draw(st.none() | hnp.arrays(np.float32, shape, elements=real)),
        scale=draw(st.none() | hnp.arrays(np.float32, shape, elements=above)),
        n_fc=draw(st.integers(1, n_ranked)),
        method=draw(st.text()),
        data_name=draw(st.text()),
        data_sha256=draw(st.sampled_from(["", "d" * 64])),
        n_ctx=draw(st.integers(0, 2**32 - 1)),
        n_queries=draw(st.integers(0, 2**63 - 1)),
        seed=draw(st.integers(0, 2**64 - 1)),
    )


@settings(
    max_examples=150,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(profile=profiles())
def test_a_saved_profile_comes_back_equal(profile: Profile, tmp_path: Path) -> None:
    path = tmp_path / "small-fasa.gguf"
    profile.save(path, force=True)
    found = Profile.load(path)
    assert found == profile
    assert hash(found) == hash(profile)
    assert found.identity == profile.identity
    for name in ("chunks", "bits", "center", "scale"):
        np.testing.assert_array_equal(getattr(found, name), getattr(profile, name))
    assert (found.n_fc, found.seed, found.method) == (profile.n_fc, profile.seed, profile.method)


def test_unequal_profiles_differ() -> None:
    profile = make_profile()
    center = np.array(profile.center)
    center[1, 1, 3] += 1
    assert profile != make_profile(center=center)
    assert profile != make_profile(n_fc=1) != make_profile(center=None)
    assert profile != "profile"


def test_a_profile_is_immutable_and_owns_its_arrays() -> None:
    chunks = np.tile(np.arange(8), (2, 2, 1))
    profile = make_profile(chunks=chunks)
    chunks[:] = 0
    assert profile.chunks[1, 1].tolist() == list(range(8))
    with pytest.raises(ValueError, match="read-only"):
        profile.chunks[0, 0, 0] = 1
    with pytest.raises(AttributeError):
        profile.n_fc = 2  # type: ignore[misc]


def test_numpy_numbers_are_accepted() -> None:
    profile = make_profile(n_fc=np.int64(3), seed=np.uint8(9))
    assert profile == make_profile(n_fc=3, seed=9)
    assert type(profile.n_fc) is int


def test_with_bits_leaves_unused_ranks_unused() -> None:
    bits = np.full((2, 2, 8), 4)
    bits[0] = 0
    bits[1, 0, 5:] = 0
    found = make_profile(bits=bits).with_bits(2)
    np.testing.assert_array_equal(found.bits, bits // 2)
    with pytest.raises(ProfileError, match="bits is 3; the side index has 1, 2, 4 and 8"):
        found.with_bits(3)


def test_with_n_fc_keeps_the_ranking() -> None:
    profile = make_profile()
    assert profile.with_n_fc(7).n_fc == 7
    assert profile.with_n_fc(7).with_n_fc(profile.n_fc) == profile
    with pytest.raises(ProfileError, match="n_fc is 9; 8 chunks are ranked"):
        profile.with_n_fc(9)


@pytest.mark.parametrize(
    ("head_dim", "n_fc", "bits", "n_bytes"),
    [
        (64, 16, 1, 5),
        (64, 16, 2, 9),
        (64, 16, 4, 17),
        (128, 32, 2, 17),
        (128, 32, 4, 33),
        (64, 8, 8, 17),
    ],
)
def test_bytes_per_cell_of_even_rows(head_dim: int, n_fc: int, bits: int, n_bytes: int) -> None:
    profile = make_profile(make_identity(head_dim=head_dim, n_rot=head_dim), bits)
    np.testing.assert_array_equal(profile.bytes_per_cell(n_fc), np.full((2, 2), n_bytes))


def test_bytes_per_cell_of_mixed_rows() -> None:
    bits = np.zeros((2, 2, 8), int)
    bits[0, 0, :6] = 8, 8, 8, 4, 4, 2  # (1 + 8) + (1 + 2) + (1 + 1)
    bits[0, 1, :6] = 2, 8, 8, 4, 8, 4  # the order of the ranks does not matter
    bits[1, 0, :1] = 8  # one chunk is padded to two: 1 + 4
    profile = make_profile(bits=bits, n_fc=6)
    assert profile.bytes_per_cell().tolist() == [[14, 14], [5, 0]]
    assert profile.bytes_per_cell(1).tolist() == [[5, 2], [5, 0]]
    bits[1, 1, :5] = 1  # five chunks are padded to eight: 1 + 2
    assert make_profile(bits=bits, n_fc=6).bytes_per_cell()[1, 1] == 3


def test_a_sidecar_is_a_gguf_file_of_its_own_type(tmp_path: Path) -> None:
    profile = make_profile()
    profile.save(tmp_path / "p.gguf")
    reader = gguf.GGUFReader(tmp_path / "p.gguf")
    keys = [key for key in reader.fields if not key.startswith("GGUF.")]
    assert keys[:2] == ["general.type", "pyfasa.version"]
    assert keys[-4:] == ["pyfasa.chunks", "pyfasa.bits", "pyfasa.center", "pyfasa.scale"]
    assert "general.architecture" not in keys
    assert not reader.tensors
    assert reader.fields["general.type"].contents() == "fasa-profile"
    assert reader.fields["pyfasa.n_fc"].contents() == profile.n_fc
    assert reader.fields["pyfasa.chunks"].contents() == profile.chunks.ravel().tolist()


def test_save_replaces_only_with_force(tmp_path: Path) -> None:
    path = tmp_path / "p.gguf"
    make_profile().save(path)
    with pytest.raises(ProfileError, match=r"p\.gguf exists.*force"):
        make_profile(seed=2).save(path)
    assert Profile.load(path).seed == 1
    make_profile(seed=2).save(path, force=True)
    assert Profile.load(path).seed == 2


def test_a_full_disk_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "p.gguf"
    make_profile().save(path)

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(WriteError, match=r"p\.gguf could not be written: No space left"):
        make_profile(seed=2).save(path, force=True)
    assert Profile.load(path).seed == 1
    assert os.listdir(tmp_path) == ["p.gguf"]


def test_check_model_takes_other_quantizations_of_the_same_model() -> None:
    make_profile().check_model(make_identity(name="small-Q4_0", sample_type="Q4_0", sample_hash=""))


def test_check_model_names_both_models_and_what_differs() -> None:
    other = make_identity(name="large", n_layer=3, tensor_hash="f" * 64)
    with pytest.raises(ProfileError) as caught:
        make_profile().check_model(other)
    for part in ("'small'", "'large'", "n_layer 2 / 3", "tensor_hash aaaa", "pyfasa calibrate"):
        assert part in str(caught.value)
