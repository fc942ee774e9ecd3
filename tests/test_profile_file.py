"""The core's reader of profile files and Python's: what one takes the other takes, with the same values."""

from __future__ import annotations

import struct
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from pyfasa.embed import embed
from pyfasa.errors import ProfileError
from pyfasa.native.profile_file import PROFILE_VERSION, read_profile_file
from pyfasa.profile import VERSION, Profile
from support import (
    NEOX_FUSED,
    NEOX_PARTIAL,
    NORM,
    NORM_ONE_LAYER,
    Shape,
    random_profile,
    write_model,
)


def assert_same(path: Path, profile: Profile) -> None:
    file, identity = read_profile_file(path), profile.identity
    for name in (
        "name", "n_layer", "n_head", "n_head_kv", "head_dim", "n_rot", "rope", "rope_freq_base"
    ):  # fmt: skip
        assert getattr(file, name) == getattr(identity, name)
    assert file.n_fc == profile.n_fc
    np.testing.assert_array_equal(file.chunks, profile.chunks)
    np.testing.assert_array_equal(file.bits, profile.bits)
    for name in ("center", "scale"):
        found, wanted = getattr(file, name), getattr(profile, name)
        assert (found is None) == (wanted is None)
        if wanted is not None:
            np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize("shape", [NORM, NORM_ONE_LAYER, NEOX_PARTIAL, NEOX_FUSED], ids=str)
def test_all_values(shape: Shape, tmp_path: Path) -> None:
    model = write_model(tmp_path / "model.gguf", shape)
    plain = random_profile(model, n_fc=5)
    rows = (*plain.chunks.shape[:2], plain.identity.head_dim)
    rng = np.random.default_rng(1)
    full = replace(
        plain,
        center=rng.normal(size=rows).astype(np.float32),
        scale=np.exp(rng.normal(size=rows)).astype(np.float32),
        importance=rng.random(plain.chunks.shape).astype(np.float32),
        identity=replace(plain.identity, name='Größe "7B"'),
    )
    for number, profile in enumerate((plain, full)):
        path = tmp_path / f"{number}.gguf"
        profile.save(path)
        assert Profile.load(path) == profile
        assert_same(path, profile)
    embed(model, plain, tmp_path / "embedded.gguf")
    assert_same(tmp_path / "embedded.gguf", plain)


def test_the_bundled_model(tiny_model_path: Path) -> None:
    assert_same(tiny_model_path, Profile.load(tiny_model_path))


def test_both_know_the_same_version() -> None:
    assert PROFILE_VERSION == VERSION


def test_every_damaged_key_is_refused_by_both(profile: Profile, tmp_path: Path) -> None:
    """Keys that the core reads, one after the other, under another name."""
    path = tmp_path / "profile.gguf"
    profile.save(path)
    data = path.read_bytes()
    keys = [
        "version", "n_fc", "n_ranked", "chunks", "bits",
        *(f"model.{name}" for name in (
            "name", "n_layer", "n_head", "n_head_kv", "head_dim", "n_rot", "rope", "rope_freq_base"
        )),
    ]  # fmt: skip
    for key in keys:
        name = f"pyfasa.{key}".encode()
        field = struct.pack("<Q", len(name)) + name
        assert data.count(field) == 1
        path.write_bytes(data.replace(field, field[:-1] + b"?"))
        with pytest.raises(ProfileError):
            Profile.load(path)
        with pytest.raises(ValueError, match=r"is missing|holds no pyfasa profile"):
            read_profile_file(path)


def test_values_out_of_range_are_refused_by_both(profile: Profile, tmp_path: Path) -> None:
    path = tmp_path / "profile.gguf"
    profile.save(path)
    data = path.read_bytes()
    for key, kind, value in (
        ("version", "I", 2),
        ("version", "I", 0),
        ("n_ranked", "I", 0),
        ("n_ranked", "I", 2**31),
        ("n_fc", "Q", 0),
        ("n_fc", "Q", 2**63),
        ("model.n_layer", "Q", 0),
        ("model.n_head_kv", "Q", 2**40),
        ("model.head_dim", "Q", 63),
        ("model.n_rot", "Q", 66),
    ):
        name = f"pyfasa.{key}".encode()
        at = data.index(struct.pack("<Q", len(name)) + name) + 8 + len(name) + 4
        changed = data[:at] + struct.pack(f"<{kind}", value) + data[at + struct.calcsize(kind) :]
        path.write_bytes(changed)
        with pytest.raises(ProfileError):
            Profile.load(path)
        with pytest.raises(ValueError, match=str(path)):
            read_profile_file(path)
