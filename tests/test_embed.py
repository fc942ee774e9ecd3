"""A profile inside a model file: nothing else changes, nothing is lost, and it can be taken out."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import gguf
import llama_cpp
import numpy as np
import pytest

from pyfasa import embed as embedding
from pyfasa.embed import embed, extract, find_profile, remove, sidecar_path
from pyfasa.errors import ModelFileError, ProfileError
from pyfasa.identity import ModelIdentity
from pyfasa.profile import Profile
from test_identity import requantize, write_model
from test_profile import make_profile


def profile_of(path: Path, **changes: Any) -> Profile:
    return make_profile(ModelIdentity.read(path), **changes)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_model(tmp_path / "small.gguf")


@pytest.fixture(scope="module")
def tiny_embedded(plain_model_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("embed") / "tiny.gguf"
    embed(plain_model_path, profile_of(plain_model_path), path)
    return path


def pairs(path: Path) -> dict[str, bytes]:
    """Key -> its bytes in the file, as gguf-py reads them; without pyfasa's own keys."""
    reader = gguf.GGUFReader(path)
    return {
        key: b"".join(part.tobytes() for part in field.parts)
        for key, field in reader.fields.items()
        if not key.startswith(("GGUF.", "pyfasa."))
    }


def test_everything_else_is_kept_bit_for_bit(plain_model_path: Path, tiny_embedded: Path) -> None:
    before, after = pairs(plain_model_path), pairs(tiny_embedded)
    assert list(before) == list(after)
    assert before == after
    old, new = gguf.GGUFReader(plain_model_path), gguf.GGUFReader(tiny_embedded)
    assert new.data_offset % new.alignment == 0
    assert len(old.tensors) == len(new.tensors)
    for a, b in zip(old.tensors, new.tensors, strict=True):
        assert (a.name, a.tensor_type, a.shape.tolist()) == (
            b.name,
            b.tensor_type,
            b.shape.tolist(),
        )
        np.testing.assert_array_equal(a.data, b.data)


def test_extract_gives_the_profile_back(plain_model_path: Path, tiny_embedded: Path) -> None:
    assert extract(tiny_embedded) == profile_of(plain_model_path)
    with pytest.raises(ProfileError, match="holds no pyfasa profile"):
        extract(plain_model_path)


def test_llama_cpp_loads_the_copy(tiny_embedded: Path) -> None:
    llm = llama_cpp.Llama(str(tiny_embedded), vocab_only=True, verbose=False)
    assert llm.metadata["pyfasa.method"] == "variance"
    assert llm.n_vocab() == 4096
    llm.close()


def test_remove_undoes_embed(plain_model_path: Path, tiny_embedded: Path, tmp_path: Path) -> None:
    remove(tiny_embedded, tmp_path / "plain.gguf")
    assert (tmp_path / "plain.gguf").read_bytes() == plain_model_path.read_bytes()
    with pytest.raises(ProfileError, match="carries no pyfasa profile"):
        remove(tmp_path / "plain.gguf", tmp_path / "again.gguf")


@pytest.mark.parametrize("alignment", [8, 32, 256])
def test_the_alignment_is_kept(alignment: int, tmp_path: Path) -> None:
    path, out = tmp_path / "a.gguf", tmp_path / "b.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_custom_alignment(alignment)
    for key, value in {"block_count": 1, "embedding_length": 8, "attention.head_count": 1}.items():
        writer.add_uint32(f"llama.{key}", value)
    writer.add_tensor("blk.0.attn_norm.weight", np.arange(3, dtype=np.float32))
    writer.add_tensor("blk.0.attn_q.weight", np.ones((8, 8), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    embed(path, profile_of(path), out)
    reader = gguf.GGUFReader(out)
    assert reader.data_offset % alignment == 0
    np.testing.assert_array_equal(reader.tensors[0].data, np.arange(3))
    remove(out, out, force=True)
    assert out.read_bytes() == path.read_bytes()


def test_embedding_again_replaces_the_old_profile(model: Path, tmp_path: Path) -> None:
    once, twice = tmp_path / "once.gguf", tmp_path / "twice.gguf"
    embed(model, profile_of(model, seed=1), once)
    embed(once, profile_of(model, center=None, scale=None, seed=2), twice)
    assert extract(twice) == profile_of(model, center=None, scale=None, seed=2)
    remove(twice, tmp_path / "plain.gguf")
    assert (tmp_path / "plain.gguf").read_bytes() == model.read_bytes()


def test_llama_quantize_keeps_an_embedded_profile(tiny_embedded: Path, tmp_path: Path) -> None:
    q4 = requantize(tiny_embedded, tmp_path / "q4.gguf", llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0)
    profile = extract(q4)
    assert profile == extract(tiny_embedded)
    profile.check_model(ModelIdentity.read(q4))


def test_progress_counts_to_the_end(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embedding, "_CHUNK_BYTES", 1000)
    calls: list[tuple[int, int]] = []
    embed(
        model, profile_of(model), tmp_path / "out.gguf", progress=lambda *call: calls.append(call)
    )
    done, total = zip(*calls, strict=True)
    assert len(calls) > 2
    assert list(done) == sorted(set(done))
    assert set(total) == {done[-1]} == {(tmp_path / "out.gguf").stat().st_size}


@pytest.mark.parametrize("stop", [KeyboardInterrupt, RuntimeError, MemoryError])
@pytest.mark.parametrize("target", ["new.gguf", "old.gguf", "small.gguf"])
def test_an_interruption_leaves_everything_as_it_was(
    stop: type[BaseException],
    target: str,
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(embedding, "_CHUNK_BYTES", 1000)
    (tmp_path / "old.gguf").write_bytes(b"old")
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}

    def interrupt(done: int, total: int) -> None:
        if done > total // 2:
            raise stop

    with pytest.raises(stop):
        embed(model, profile_of(model), tmp_path / target, force=True, progress=interrupt)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_an_existing_file_is_replaced_only_with_force(model: Path, tmp_path: Path) -> None:
    profile, content = profile_of(model), model.read_bytes()
    link = tmp_path / "link.gguf"
    link.symlink_to(model)
    for target in (model, link):
        with pytest.raises(ProfileError, match=rf"{target.name} exists.*force"):
            embed(model, profile, target)
    embed(model, profile, link, force=True)
    assert model.read_bytes() == content
    assert extract(link) == profile
    embed(model, profile, model, force=True)
    assert extract(model) == profile


def test_a_profile_of_another_model_is_refused(model: Path, plain_model_path: Path) -> None:
    out = model.with_name("out.gguf")
    with pytest.raises(ProfileError, match="'pyfasa-tiny-12m' and does not fit 'small'"):
        embed(model, profile_of(plain_model_path), out)
    assert not out.exists()


def test_a_split_model_is_refused_with_a_way_out(tmp_path: Path) -> None:
    write_model(tmp_path / "part.gguf", split_max_tensors=2)
    first = tmp_path / "part-00001-of-00003.gguf"
    profile = profile_of(first)
    sentence = r"part of a split model.*before splitting.*-fasa\.gguf"
    with pytest.raises(ModelFileError, match=sentence):
        embed(first, profile, tmp_path / "out.gguf")
    renamed = first.rename(tmp_path / "renamed.gguf")
    with pytest.raises(ModelFileError, match=sentence):
        embed(renamed, profile, tmp_path / "out.gguf")
    assert not (tmp_path / "out.gguf").exists()


def test_a_missing_folder_is_a_sentence(model: Path, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"out\.gguf could not be written: No such file"):
        embed(model, profile_of(model), tmp_path / "nowhere" / "out.gguf")


def test_the_embedded_profile_is_found_before_the_sidecar(model: Path, tmp_path: Path) -> None:
    assert find_profile(model) is None
    profile_of(model).save(sidecar_path(model))
    assert find_profile(str(model)) == tmp_path / "small-fasa.gguf"
    embed(model, profile_of(model), model, force=True)
    assert find_profile(model) == model


def test_a_split_model_has_one_sidecar(tmp_path: Path) -> None:
    shard = tmp_path / "big-model-00002-of-00003.gguf"
    assert sidecar_path(shard) == tmp_path / "big-model-fasa.gguf"
    assert sidecar_path("x/v1.5-Q4_K.gguf") == Path("x/v1.5-Q4_K-fasa.gguf")


def test_a_profile_embedded_before_splitting_is_found(tmp_path: Path) -> None:
    """gguf-split keeps all keys in the first file, and any file may be given."""
    whole = write_model(tmp_path / "m.gguf")
    embed(whole, profile_of(whole), whole, force=True)
    first, second = (tmp_path / f"m-0000{i}-of-00002.gguf" for i in (1, 2))
    os.rename(whole, first)
    write_model(second)
    assert find_profile(second) == first
    assert Profile.load(second) == extract(first)
