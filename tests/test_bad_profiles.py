"""Damaged and impossible profiles: always a ProfileError that says what is wrong, never a crash."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pyfasa.errors import ProfileError
from pyfasa.gguf_header import NUMBER_TYPES, Value
from pyfasa.profile import Profile, _pack
from test_profile import make_identity, make_profile


def write(path: Path, values: dict[str, Value], endianess: Any = gguf.GGUFEndian.LITTLE) -> Path:
    """A GGUF file of these keys, by another writer than pyfasa's own."""
    writer = gguf.GGUFWriter(path, "", endianess=endianess)
    writer.kv_data[0].clear()  # general.architecture, which a sidecar has not
    for key, value in values.items():
        if isinstance(value, str):
            writer.add_key_value(key, value, gguf.GGUFValueType.STRING)
        elif isinstance(value, np.ndarray):
            kind = NUMBER_TYPES[value.dtype]
            writer.add_key_value(key, value.tolist(), gguf.GGUFValueType.ARRAY, kind)
        else:
            writer.add_key_value(key, value.item(), NUMBER_TYPES[value.dtype])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


def edited(array: Any, place: tuple[int, ...], value: float) -> Any:
    copy = np.array(array, dtype=np.float64 if array.dtype.kind == "f" else np.int64)
    copy[place] = value
    return copy


GOOD = make_profile()


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (
            {"chunks": edited(GOOD.chunks, (1, 0, 2), 8)},
            "Layer 1, KV head 0 .*chunk 8; head_dim 16",
        ),
        ({"chunks": edited(GOOD.chunks, (0, 1, 3), GOOD.chunks[0, 1, 0])}, "same chunk twice"),
        ({"chunks": edited(GOOD.chunks, (0, 0, 0), -1)}, "chunks holds -1 to 7; .* 0 to 65535"),
        ({"chunks": edited(GOOD.chunks, (0, 0, 0), 70000)}, "chunks holds 0 to 70000"),
        ({"chunks": GOOD.chunks.astype(float)}, "chunks holds float64 values"),
        ({"chunks": None}, "chunks holds object values"),
        ({"chunks": GOOD.chunks[:1]}, r"chunks has the shape \(1, 2, 8\); .*\(2, 2\)"),
        ({"chunks": GOOD.chunks[:, :, :0], "bits": GOOD.bits[:, :, :0]}, "n_ranked is at least 1"),
        ({"bits": GOOD.bits[:, :, :4]}, r"bits has the shape \(2, 2, 4\), chunks has \(2, 2, 8\)"),
        ({"bits": edited(GOOD.bits, (1, 1, 7), 3)}, "Layer 1, KV head 1 has 3 bits; 1, 2, 4 and 8"),
        ({"bits": edited(GOOD.bits, (1, 1, 2), 0)}, "in use after an unused rank"),
        (
            {"center": edited(GOOD.center, (0, 1, 5), np.nan)},
            "center of layer 0, KV head 1, dim 5",
        ),
        ({"center": edited(GOOD.center, (0, 1, 5), 1e39)}, "is inf; it must be finite"),
        ({"scale": edited(GOOD.scale, (1, 0, 0), 0)}, "scale .* is 0.0; .*finite and above 0"),
        ({"scale": edited(GOOD.scale, (1, 0, 0), -np.inf)}, "is -inf"),
        ({"scale": GOOD.chunks}, r"scale has the shape \(2, 2, 8\); .*\(2, 2, 16\)"),
        ({"n_fc": 0}, "n_fc is 0; 8 chunks are ranked"),
        ({"n_fc": 2.0}, "n_fc is 2.0; it must be a whole number"),
        ({"seed": -1}, "seed is -1; it must be a whole number, 0 to"),
        ({"method": None}, "method is None; it must be a text"),
        ({"data_name": "\ud800"}, "data_name is .* UTF-8"),
        ({"identity": make_identity(head_dim=15, n_rot=14)}, "head_dim is 15; it must be even"),
        ({"identity": make_identity(head_dim=512)}, "head_dim is 512; .* 2 to 256"),
        ({"identity": make_identity(n_rot=18)}, "n_rot is 18; .* 2 to 16"),
        ({"identity": make_identity(rope="mrope")}, "rope is 'mrope'; .*'norm' or 'neox'"),
        ({"identity": make_identity(rope_freq_base=0.0)}, "rope_freq_base is 0.0; .*above 0"),
        ({"identity": make_identity(n_layer=0)}, "n_layer is 0; .* 1 to"),
    ],
)
def test_an_impossible_profile_cannot_be_made(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ProfileError, match=sentence):
        make_profile(**changes)


def test_files_of_other_writers_are_read(tmp_path: Path) -> None:
    """This also proves that write() makes good files, so that the cases below fail for a reason."""
    values = GOOD.to_fields() | {"pyfasa.chunks": GOOD.chunks.ravel().astype(np.int32)}
    assert Profile.load(write(tmp_path / "other.gguf", values)) == GOOD


@pytest.mark.parametrize("key", GOOD.to_fields())
def test_a_key_that_is_missing_or_of_another_kind_is_named(key: str, tmp_path: Path) -> None:
    values = GOOD.to_fields()
    value = values.pop(key)
    if key not in ("pyfasa.version", "pyfasa.center", "pyfasa.scale"):
        with pytest.raises(ProfileError, match=rf"p\.gguf: {key} is missing"):
            Profile.load(write(tmp_path / "p.gguf", values))
    values[key] = np.bool_(True) if isinstance(value, str) else "text"
    with pytest.raises(ProfileError, match=rf"p\.gguf: {key} is a (bool|str) where"):
        Profile.load(write(tmp_path / "p.gguf", values))


@pytest.mark.parametrize(
    ("key", "value", "sentence"),
    [
        ("pyfasa.version", np.uint32(2), "version 2, and this pyfasa knows 1 to 1; update pyfasa"),
        ("pyfasa.version", np.uint32(0), "version 0"),
        ("pyfasa.n_ranked", np.uint32(7), "pyfasa.chunks has 32 values where 2 x 2 x 7 should be"),
        ("pyfasa.bits", GOOD.bits.ravel()[1:], "pyfasa.bits has 31 values where 2 x 2 x 8"),
        ("pyfasa.center", np.zeros(3, np.float32), "pyfasa.center has 3 values where 2 x 2 x 16"),
        ("pyfasa.scale", np.full(64, np.nan, np.float32), "scale .* is nan"),
        ("pyfasa.chunks", np.zeros(32, np.uint16), "same chunk twice"),
        ("pyfasa.chunks", np.full(32, 8, np.uint16), "chunk 8; head_dim 16 has 0 to 7"),
        ("pyfasa.chunks", GOOD.chunks.ravel() + 0.5, "chunks holds float64 values"),
        ("pyfasa.bits", np.full(32, 3, np.uint8), "Layer 0, KV head 0 has 3 bits; 1, 2, 4 and 8"),
        ("pyfasa.bits", np.full(32, -4, np.int8), "bits holds -4 to -4; its values are 0 to 255"),
        ("pyfasa.center", np.full(64, -np.inf, np.float32), "center .* is -inf"),
        (
            "pyfasa.scale",
            np.zeros(64, np.float32),
            "scale .* is 0.0; it must be finite and above 0",
        ),
        ("pyfasa.n_ranked", np.uint32(0), "pyfasa.chunks has 32 values where 2 x 2 x 0"),
        ("pyfasa.n_ranked", np.int32(-8), "pyfasa.chunks has 32 values where 2 x 2 x -8"),
        ("pyfasa.model.n_layer", np.uint32(3), "pyfasa.chunks has 32 values where 3 x 2 x 8"),
        ("pyfasa.model.n_layer", np.uint32(0), "model.n_layer is 0; .* 1 to"),
        ("pyfasa.model.n_layer", np.uint64(2**60), "model.n_layer is 1152921504606846976"),
        ("pyfasa.model.rope_freq_base", np.float64(np.nan), "model.rope_freq_base is nan"),
    ],
)
def test_a_wrong_value_is_named(key: str, value: Value, sentence: str, tmp_path: Path) -> None:
    path = write(tmp_path / "wrong.gguf", GOOD.to_fields() | {key: value})
    with pytest.raises(ProfileError, match=rf"wrong\.gguf: .*{sentence}"):
        Profile.load(path)


@pytest.mark.parametrize("key", ["pyfasa.chunks", "pyfasa.bits", "pyfasa.center", "pyfasa.scale"])
def test_an_empty_array_is_named(key: str, tmp_path: Path) -> None:
    """gguf-py writes none, so this is pyfasa's own way of packing."""
    pairs = GOOD.to_fields() | {key: np.asarray(GOOD.to_fields()[key])[:0]}
    body = b"".join(_pack(name, value) for name, value in pairs.items())
    (tmp_path / "p.gguf").write_bytes(struct.pack("<4sIQQ", b"GGUF", 3, 0, len(pairs)) + body)
    with pytest.raises(ProfileError, match=rf"p\.gguf: {key} has 0 values where 2 x 2 x (8|16)"):
        Profile.load(tmp_path / "p.gguf")


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (None, "cannot be read: No such file"),
        (b"", "is not a GGUF file: it is shorter"),
        (b"#!/bin/sh\n" * 99, "is not a GGUF file: it begins with"),
        (b"GGUF" + bytes([9, 0, 0, 0]) + bytes(16), "has GGUF version 9"),
        (b"GGUF" + bytes([3, 0, 0, 0]) + b"\xff" * 16, "is damaged or cut off"),
        (b"GGUF" + bytes([3, 0, 0, 0]) + bytes(16), "holds no pyfasa profile"),
    ],
)
def test_what_is_no_profile_file(content: bytes | None, sentence: str, tmp_path: Path) -> None:
    path = tmp_path / "odd.gguf"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ProfileError, match=rf"odd\.gguf {sentence}"):
        Profile.load(path)


def test_a_folder_is_no_profile_file(tmp_path: Path) -> None:
    with pytest.raises(ProfileError, match="cannot be read: Is a directory"):
        Profile.load(tmp_path)


def test_a_big_endian_file_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "big.gguf", GOOD.to_fields(), gguf.GGUFEndian.BIG)
    with pytest.raises(ProfileError, match=r"big\.gguf is a big-endian GGUF file.*convert-endian"):
        Profile.load(path)


def test_a_model_without_a_profile_says_so(plain_model_path: Path) -> None:
    with pytest.raises(ProfileError, match=r"holds no pyfasa profile.*pyfasa calibrate"):
        Profile.load(plain_model_path)


def test_every_cut_is_noticed(tmp_path: Path) -> None:
    GOOD.save(tmp_path / "p.gguf")
    data = (tmp_path / "p.gguf").read_bytes()
    end = len(data.rstrip(b"\0"))
    cut = tmp_path / "cut.gguf"
    for n_bytes in (*range(0, end, 7), end - 1):
        cut.write_bytes(data[:n_bytes])
        with pytest.raises(ProfileError, match=r"cut\.gguf"):
            Profile.load(cut)


@settings(
    max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(changes=st.lists(st.tuples(st.integers(0), st.binary(min_size=1, max_size=8)), min_size=1))
def test_damage_gives_a_profile_or_a_sentence(
    changes: list[tuple[int, bytes]], tmp_path: Path
) -> None:
    GOOD.save(tmp_path / "p.gguf", force=True)
    data = bytearray((tmp_path / "p.gguf").read_bytes())
    for place, new in changes:
        start = place % len(data)
        data[start : start + len(new)] = new
    (tmp_path / "p.gguf").write_bytes(data)
    sentence = "p.gguf is still a profile"
    try:
        Profile.load(tmp_path / "p.gguf").validate()
    except ProfileError as error:
        sentence = str(error)
    assert "p.gguf" in sentence
