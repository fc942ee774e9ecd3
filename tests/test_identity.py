"""A model is recognized by its file: the same model in other weight types, and no other model."""

from __future__ import annotations

import ctypes
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import llama_cpp
import numpy as np
import pytest

from pyfasa.errors import ModelFileError, ProfileError
from pyfasa.identity import ModelIdentity, rope_of

KEYS: dict[str, Any] = {
    "block_count": 2,
    "context_length": 64,
    "embedding_length": 32,
    "attention.head_count": 4,
    "attention.head_count_kv": 2,
    "rope.freq_base": 5000.0,
    "rope.dimension_count": 4,
}


def write_model(
    path: Path,
    arch: str = "llama",
    seed: int = 0,
    norm_seed: int = 0,
    type_q: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F16,
    changes: dict[str, Any] | None = None,
    **writer_options: Any,
) -> Path:
    """Two layers of attention weights, 32 wide. changes: keys to set, or with None to leave out."""
    writer = gguf.GGUFWriter(path, arch, **writer_options)
    for key, value in (KEYS | (changes or {})).items():
        if isinstance(value, list):
            writer.add_array(f"{arch}.{key}", value)
        elif isinstance(value, float):
            writer.add_float32(f"{arch}.{key}", value)
        elif value is not None:
            writer.add_uint32(f"{arch}.{key}", value)
    weights, norms = np.random.default_rng(seed), np.random.default_rng(norm_seed)
    for layer in range(2):
        norm = norms.normal(size=32).astype(np.float32)
        writer.add_tensor(f"blk.{layer}.attn_norm.weight", norm)
        for name, rows in (("q", 32), ("k", 16)):
            full = weights.normal(size=(rows, 32)).astype(np.float32)
            data = gguf.quants.quantize(full, type_q)
            writer.add_tensor(f"blk.{layer}.attn_{name}.weight", data, raw_dtype=type_q)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def requantize(source: Path, target: Path, file_type: int) -> Path:
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = file_type
    params.allow_requantize = True
    params.nthread = 2
    status = llama_cpp.llama_model_quantize(
        str(source).encode(), str(target).encode(), ctypes.byref(params)
    )
    assert status == 0
    return target


def test_the_bundled_model(tiny_model_path: Path) -> None:
    found = ModelIdentity.read(tiny_model_path)
    assert (found.name, found.architecture) == ("pyfasa-tiny-12m", "llama")
    assert (found.n_layer, found.n_head, found.n_head_kv) == (6, 8, 2)
    assert (found.head_dim, found.n_rot, found.rope) == (64, 64, "norm")
    assert (found.rope_freq_base, found.sample_type) == (500000.0, "Q8_0")


@pytest.mark.parametrize(
    ("file_type", "sample_type"),
    [
        (llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0, "Q4_0"),
        (llama_cpp.LLAMA_FTYPE_MOSTLY_F16, "F16"),
    ],
)
def test_llama_quantize_keeps_the_identity(
    file_type: int, sample_type: str, tiny_model_path: Path, tmp_path: Path
) -> None:
    model = ModelIdentity.read(tiny_model_path)
    other = ModelIdentity.read(requantize(tiny_model_path, tmp_path / "other.gguf", file_type))
    assert other.sample_type == sample_type
    assert other.sample_hash != model.sample_hash
    assert model.differences(other) == other.differences(model) == []


def test_weights_of_one_type_that_quantizers_write_alike_must_be_equal(tmp_path: Path) -> None:
    model = ModelIdentity.read(write_model(tmp_path / "a.gguf"))
    other = ModelIdentity.read(write_model(tmp_path / "b.gguf", seed=1))
    (difference,) = model.differences(other)
    assert difference.startswith("sample_hash ")


def test_an_importance_matrix_does_not_make_another_model(tmp_path: Path) -> None:
    """The same weights in Q4_0 differ in bytes when quantized with another importance matrix."""
    q4 = gguf.GGMLQuantizationType.Q4_0
    model = ModelIdentity.read(write_model(tmp_path / "a.gguf", type_q=q4))
    other = ModelIdentity.read(write_model(tmp_path / "b.gguf", type_q=q4, seed=1))
    assert model.sample_hash != other.sample_hash
    assert model.differences(other) == []


def test_other_norms_make_another_model(tmp_path: Path) -> None:
    q4 = gguf.GGMLQuantizationType.Q4_0
    model = ModelIdentity.read(write_model(tmp_path / "a.gguf"))
    other = ModelIdentity.read(write_model(tmp_path / "b.gguf", type_q=q4, norm_seed=1))
    (difference,) = model.differences(other)
    assert difference.startswith("tensor_hash ")


def test_the_name_does_not_count_and_every_dimension_does(tmp_path: Path) -> None:
    model = ModelIdentity.read(write_model(tmp_path / "a.gguf"))
    assert model.differences(replace(model, name="other")) == []
    assert model.differences(replace(model, head_dim=9)) == ["head_dim 8 / 9"]
    assert model.differences(replace(model, rope="neox", n_rot=8)) == [
        "n_rot 4 / 8",
        "rope norm / neox",
    ]
    assert model.differences(replace(model, rope_freq_base=1e6)) == [
        "rope_freq_base 5000.0 / 1000000.0"
    ]


def test_defaults_of_missing_keys(tmp_path: Path) -> None:
    gone = ("rope.freq_base", "rope.dimension_count", "attention.head_count_kv")
    path = write_model(tmp_path / "plain.gguf", changes=dict.fromkeys(gone))
    found = ModelIdentity.read(path)
    assert found.name == "plain"
    assert (found.head_dim, found.n_rot, found.n_head_kv) == (8, 8, 4)
    assert found.rope_freq_base == 10000.0


def test_key_length_and_heads_per_layer(tmp_path: Path) -> None:
    changes = {
        "attention.key_length": 6,
        "attention.head_count": [4, 6],
        "attention.head_count_kv": [3, 1],
    }
    found = ModelIdentity.read(write_model(tmp_path / "a.gguf", changes=changes))
    assert (found.head_dim, found.n_head, found.n_head_kv) == (6, 6, 3)


def rope_of_llama_cpp(path: Path) -> int | None:
    """llama_model_rope_type() of a file; None when this llama.cpp cannot load it."""
    params = llama_cpp.llama_model_default_params()
    params.vocab_only = True
    model = llama_cpp.llama_model_load_from_file(str(path).encode(), params)
    if not model:
        return None
    try:
        return int(llama_cpp.llama_model_rope_type(model))
    finally:
        llama_cpp.llama_model_free(model)


def test_rope_agrees_with_llama_cpp(tmp_path: Path) -> None:
    """For every architecture that the gguf package can name."""
    names = {-1: None, 0: "norm", 2: "neox"}
    # A drafter's pairing depends on the model that it drafts for: pyfasa leaves it out.
    architectures = set(gguf.MODEL_ARCH_NAMES.values()) - {"dflash", "clip"}
    compared: dict[str | None, int] = {}
    for arch in sorted(architectures):
        path = tmp_path / f"{arch}.gguf"
        writer = gguf.GGUFWriter(path, arch)
        writer.add_tokenizer_model("no_vocab")
        for key in ("block_count", "context_length", "embedding_length", "vocab_size"):
            writer.add_uint32(f"{arch}.{key}", 1)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        theirs = rope_of_llama_cpp(path)
        if theirs is None:
            continue
        try:
            ours: str | None = rope_of(arch)
        except ProfileError:
            ours = None
        assert ours == names.get(theirs), arch
        compared[ours] = compared.get(ours, 0) + 1
    assert compared["norm"] >= 30
    assert compared["neox"] >= 50
    assert compared[None] >= 15


@pytest.mark.parametrize(
    ("arch", "sections", "sentence"),
    [
        ("qwen2vl", [], "'qwen2vl' use M-RoPE"),
        ("glm4", [8, 12, 12, 0], "'glm4' use M-RoPE"),
        ("mamba", [], "'mamba' has no RoPE, or is not known"),
        ("llama99", [], "'llama99' has no RoPE, or is not known"),
    ],
)
def test_architectures_without_plain_rope(arch: str, sections: list[int], sentence: str) -> None:
    with pytest.raises(ProfileError, match=sentence):
        rope_of(arch, sections)
    assert rope_of("glm4", [0, 0, 0, 0]) == "norm"


def test_m_rope_sections_are_read_from_the_file(tmp_path: Path) -> None:
    changes = {"rope.dimension_sections": [1, 1, 0, 0]}
    with pytest.raises(ProfileError, match="'glm4' use M-RoPE"):
        ModelIdentity.read(write_model(tmp_path / "a.gguf", "glm4", changes=changes))


def test_a_split_model_is_the_same_model(tmp_path: Path) -> None:
    whole = ModelIdentity.read(write_model(tmp_path / "whole.gguf"))
    write_model(tmp_path / "part.gguf", split_max_tensors=2)
    shards = sorted(tmp_path.glob("part-*.gguf"))
    assert len(shards) == 3
    for shard in shards:
        assert replace(ModelIdentity.read(shard), name=whole.name) == whole
    shards[1].unlink()
    with pytest.raises(ModelFileError, match=r"part-00002-of-00003\.gguf is missing"):
        ModelIdentity.read(shards[0])


def test_files_that_are_no_model(tmp_path: Path) -> None:
    path = write_model(tmp_path / "a.gguf", changes={"block_count": None})
    with pytest.raises(ModelFileError, match=r"a\.gguf does not give llama\.block_count"):
        ModelIdentity.read(path)
    data = write_model(tmp_path / "b.gguf").read_bytes()
    (tmp_path / "b.gguf").write_bytes(data[:-200])
    with pytest.raises(ModelFileError, match=r"b\.gguf is cut off: its tensors end at byte"):
        ModelIdentity.read(tmp_path / "b.gguf")
    write_model(tmp_path / "c.gguf", endianess=gguf.GGUFEndian.BIG)
    with pytest.raises(ModelFileError, match=r"c\.gguf is a big-endian"):
        ModelIdentity.read(tmp_path / "c.gguf")
    with pytest.raises(ModelFileError, match=r"d\.gguf cannot be read: No such file"):
        ModelIdentity.read(tmp_path / "d.gguf")
