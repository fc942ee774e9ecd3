"""Model files and profiles with bytes cut off or flipped: a sentence or dense decoding, and the process lives."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import pytest

import pyfasa
from caches import TINY
from pyfasa import Profile, native
from pyfasa.embed import sidecar_path
from pyfasa.errors import DenseWarning, ModelFileError, ProfileError
from pyfasa.gguf_header import Header
from pyfasa.identity import ModelIdentity
from support import decode, opened, opened_plain, random_profile, random_tokens, write_model
from test_bad_profiles import write
from test_identity import write_model as write_identity_model

TOKENS = random_tokens(44, seed=3)
SMALL: dict[str, Any] = {"n_ctx": 64, "n_threads": 1, "n_threads_batch": 1, "verbose": False}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model") / "tiny.gguf", TINY)


# ---- models ---------------------------------------------------------------------------------------------


def lives(make: Callable[..., Any], path: str) -> str:
    """How opening a model and decoding ends in a process of its own: "ok", a sentence, or "died ..."."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        resource.setrlimit(resource.RLIMIT_CPU, (10, 10))
        try:
            llm = make(path, **SMALL, flash_attn=True)
            llm.eval(TOKENS[:30])
            llm.eval(TOKENS[30:31])
            text = "ok"
        except (ValueError, RuntimeError) as error:
            text = f"{type(error).__name__}: {error}"
        os.write(writing, text.encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        text = pipe.read()
    _, status = os.waitpid(child, 0)
    return text if status == 0 else f"died with status {status}"


def report(paths: list[str]) -> None:
    """For each model, how pyfasa.Llama and llama_cpp.Llama end; run where no thread has been started yet."""
    profile = Profile.load(paths[0])
    keep = os.dup(1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    found = []
    for path in paths[1:]:
        ends = [
            lives(pyfasa.Llama, path),
            lives(lambda *a, **k: pyfasa.Llama(*a, profile=profile, min_ctx=0, **k), path),
            lives(lambda *a, **k: pyfasa.Llama(*a, **{**k, "flash_attn": False}), path),
        ]
        found.append([*ends, lives(llama_cpp.Llama, path)])
    os.write(keep, json.dumps(found).encode())


def ends_of(model: Path, files: list[Path]) -> list[list[str]]:
    sidecar = model.with_name("profile.gguf")
    random_profile(model).save(sidecar, force=True)
    code = "import json, sys, test_damaged_files as t; t.report(json.load(sys.stdin))"
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        input=json.dumps([str(file) for file in [sidecar, *files]]),
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        timeout=100,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    found: list[list[str]] = json.loads(result.stdout)
    return found


def test_a_model_that_is_cut_off(model: Path, tmp_path: Path) -> None:
    """Header and tensor data; without flash attention it is llama.cpp that has to notice."""
    content, head = model.read_bytes(), Header.read(model)
    lengths = [0, 3, 23, 24, 100, head.kv_end // 2, head.kv_end, head.kv_end + 40, head.info_end]
    lengths += [head.data_start, head.data_start + 1, (head.data_start + len(content)) // 2]
    lengths += [len(content) - 33]
    files = [tmp_path / f"cut-{n}.gguf" for n in lengths]
    for file, n in zip(files, lengths, strict=True):
        file.write_bytes(content[:n])
    for file, (found, asked, host, _) in zip(files, ends_of(model, files), strict=True):
        assert found.startswith("ModelFileError: ")
        assert file.name in found
        assert asked == found
        assert host.startswith("ValueError: ")
    assert [file.stat().st_size for file in files] == lengths  # nobody wrote to them


def test_a_model_with_flipped_bits(model: Path, tmp_path: Path) -> None:
    """Where llama.cpp itself lives, so does pyfasa; what it says is a sentence."""
    content, head = model.read_bytes(), Header.read(model)
    tokens = [head.extents[key] for key in head.extents if key.startswith("tokenizer.ggml.")]
    places = [
        place
        for place in range(head.info_end)
        if not any(first + 64 <= place < last for first, last in tokens)
    ]
    rng = np.random.default_rng(5)
    files = []
    for i, place in enumerate(rng.choice(places, 60, replace=False)):
        flipped = bytearray(content)
        flipped[place] ^= 1 << int(rng.integers(8))
        files.append(tmp_path / f"flip-{i}.gguf")
        files[-1].write_bytes(flipped)
    ends = ends_of(model, files)
    for *ours, plain in ends:
        for end in ours:
            assert not end.startswith("died") or plain.startswith("died")
            assert end == "ok" or end.endswith(".") or end.startswith(("died", "ValueError: "))
    kinds = {end.split(":")[0].split(" ")[0] for found, *_ in ends for end in [found]}
    assert {"ok", "ModelFileError"} <= kinds  # the flips do something, and not always


# ---- profiles ---------------------------------------------------------------------------------------------


def test_a_sidecar_with_flipped_bits(model: Path, tmp_path: Path) -> None:
    """It is refused, or it is still a profile: then everything that is attended is what llama.cpp attends."""
    path = tmp_path / model.name
    path.write_bytes(model.read_bytes())
    sidecar = sidecar_path(path)
    shape = (TINY.n_layer, TINY.n_head_kv, TINY.head_dim)
    center = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    good = replace(random_profile(path), center=center, scale=np.ones(shape, np.float32))
    good.save(sidecar)
    content = sidecar.read_bytes()
    with opened_plain(path, **SMALL) as plain:
        plain.eval(TOKENS[:40])
        wanted = decode(plain, TOKENS[40:])
    rng = np.random.default_rng(11)
    n_refused = n_active = 0
    for _ in range(40):
        flipped = bytearray(content)
        flipped[int(rng.integers(len(content)))] ^= 1 << int(rng.integers(8))
        sidecar.write_bytes(flipped)
        try:
            Profile.load(sidecar).check_model(good.identity)
            active = True
        except ProfileError:
            active = False
        settings = {**SMALL, "budget": 64, "min_ctx": 0}
        if not active:
            n_refused += 1
            with pytest.raises(ProfileError):
                pyfasa.Llama(str(path), profile=sidecar, **settings)
            if n_refused > 4:  # the same way each time
                continue
        with pytest.warns(DenseWarning) if not active else pytest.MonkeyPatch.context():
            llm = pyfasa.Llama(str(path), **settings)
        assert llm.fasa.active == active
        llm.eval(TOKENS[:40])
        if active:
            n_active += 1
            llm.fasa.verify = True
            assert np.allclose(decode(llm, TOKENS[40:]), wanted, atol=0.05)
            assert llm.fasa.counters.nodes["sparse"] == 4
            assert llm.fasa.counters.verify_failures == 0
        else:
            assert np.array_equal(decode(llm, TOKENS[40:]), wanted)
        llm.close()
        assert sidecar.read_bytes() == flipped
    assert n_refused > 5
    assert n_active > 5


def forged(profile: Profile, **changes: Any) -> Profile:
    """A profile with values that its own checks refuse, for what stands behind them."""
    copy = replace(profile)
    for name, value in changes.items():
        object.__setattr__(copy, name, value)
    return copy


def edited(array: Any, place: tuple[int, ...], value: float) -> Any:
    copy = np.array(array)
    copy[place] = value
    return copy


@pytest.mark.parametrize(
    ("field", "value", "sentence"),
    [
        ("chunks", 32, "Chunk 32 is out of range; .* below head_dim / 2 = 32"),
        ("chunks", 65535, "Chunk 65535 is out of range"),
        ("bits", 3, "has 3 bits; 1, 2, 4 and 8 exist"),
        ("bits", 255, "has 255 bits"),
        ("center", np.nan, "center nan and scale 1; they must be finite"),
        ("center", -np.inf, "center -inf"),
        ("scale", 0.0, "center 0 and scale 0"),
        ("scale", -1.0, "scale -1"),
        ("scale", np.inf, "scale inf"),
    ],
)
def test_the_core_refuses_it_too(field: str, value: float, sentence: str, path: Path) -> None:
    """The last KV head of the last layer: all are checked before anything is decoded."""
    good = random_profile(path)
    shape = (*good.chunks.shape[:2], good.identity.head_dim)
    arrays = {
        "chunks": good.chunks,
        "bits": good.bits,
        "center": np.zeros(shape, np.float32),
        "scale": np.ones(shape, np.float32),
    }
    bad = forged(good, **{field: edited(arrays[field], (-1, -1, 3), value)})
    with pytest.raises(ValueError, match=sentence):
        native.Session(bad, native.Config())


def test_a_profile_that_the_core_refuses_changes_nothing(path: Path) -> None:
    good = random_profile(path)
    bad = forged(good, chunks=edited(good.chunks, (1, 1, 31), good.chunks[1, 1, 0]))
    with opened(path, profile=good, budget=64, min_ctx=0) as llm:
        with pytest.raises(ValueError, match="is listed twice; ids must be different"):
            llm.fasa.use(bad)
        assert llm.fasa.profile == good
        llm.eval(TOKENS[:40])
        decode(llm, TOKENS[40:41])
        assert llm.fasa.counters.nodes["sparse"] == 2


@pytest.mark.parametrize("alignment", [np.inf, np.nan, 0, 24, -32, "32"])
def test_an_alignment_that_is_none(alignment: float | str, tmp_path: Path) -> None:
    value = alignment if isinstance(alignment, str) else np.asarray(alignment)[()]
    file = write(tmp_path / "odd.gguf", {"general.alignment": value})
    with pytest.raises(ModelFileError, match=r"odd\.gguf is damaged or cut off"):
        Header.read(file)


def test_a_list_of_whole_numbers_that_are_none(tmp_path: Path) -> None:
    changes = {"rope.dimension_sections": [np.inf, np.nan]}
    file = write_identity_model(tmp_path / "odd.gguf", "glm4", changes=changes)
    with pytest.raises(ModelFileError, match=r"odd\.gguf does not give glm4.rope.dimension_sec"):
        ModelIdentity.read(file)


def test_models_are_refused_before_they_are_loaded(model: Path, tmp_path: Path) -> None:
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(model.read_bytes()[:-64])
    with pytest.raises(ModelFileError, match=r"cut\.gguf is cut off: its tensors end at byte"):
        pyfasa.Llama(str(cut), profile=False, verbose=False)
