"""Where pyfasa.Llama finds its profile, and what it says when there is none that fits."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pyfasa import Llama, Profile
from pyfasa.embed import embed, sidecar_path
from pyfasa.errors import DenseWarning, ModelFileError, ProfileError
from support import opened, random_tokens, warned

TOKENS = random_tokens(10)


def test_without_a_profile_one_warning_and_dense(copied: Path) -> None:
    with warned() as sentences, opened(copied) as x:
        assert not x.fasa.active
        assert x.fasa.profile is None
        reason = x.fasa.reason
        x.eval(TOKENS[:9])
        x.eval(TOKENS[9:10])
        assert x.fasa.counters.nodes["sparse"] == 0
    assert sentences == [f"Decoding is dense: {reason}"]
    assert reason == f"copy.gguf has no FASA profile; make one with: pyfasa calibrate {copied}"


def test_the_warning_points_at_the_caller(copied: Path) -> None:
    with pytest.warns(DenseWarning) as caught:
        Llama(str(copied), verbose=False).close()
    assert caught[0].filename == __file__


def test_profile_false_is_dense_without_a_warning(copied: Path, profile: Profile) -> None:
    profile.save(sidecar_path(copied))
    with warned() as sentences, opened(copied, profile=False) as x:
        assert not x.fasa.active
        assert x.fasa.reason == "FASA is switched off: profile is False."
    assert sentences == []


def test_profile_true_is_refused(path: Path) -> None:
    with pytest.raises(ValueError, match="give a path, a Profile, None to look for one, or False"):
        Llama(str(path), profile=True)


@pytest.mark.parametrize("kind", ["profile", "path", "str", "sidecar", "embedded"])
def test_sources_of_a_profile(kind: str, copied: Path, profile: Profile, tmp_path: Path) -> None:
    file = tmp_path / "elsewhere.gguf"
    profile.save(file)
    given: Any = {"profile": profile, "path": file, "str": str(file)}.get(kind)
    model = copied
    if kind == "sidecar":
        profile.save(sidecar_path(copied))
    if kind == "embedded":
        replace(profile, n_fc=3).save(sidecar_path(copied))  # the model's own goes first
        model = tmp_path / "model.gguf"
        embed(copied, profile, model)
    with warned() as sentences, opened(model, profile=given) as x:
        assert x.fasa.active
        assert x.fasa.reason is None
        assert x.fasa.profile == profile
        assert x.fasa.n_fc == profile.n_fc
    assert sentences == []


def test_a_profile_of_another_model(copied: Path, other_profile: Profile) -> None:
    both = r"the model 'random-7' and does not fit 'random-0': .*architecture stablelm / llama"
    with pytest.raises(ProfileError, match=both):
        Llama(str(copied), profile=other_profile)
    other_profile.save(sidecar_path(copied))
    with pytest.raises(ProfileError, match=both):
        Llama(str(copied), profile=sidecar_path(copied))
    with pytest.warns(DenseWarning, match=both) as caught, opened(copied) as x:
        assert not x.fasa.active
    assert len(caught) == 1


def test_a_damaged_profile(copied: Path, profile: Profile) -> None:
    beside = sidecar_path(copied)
    profile.save(beside)
    content = beside.read_bytes()
    beside.write_bytes(content[: len(content) // 2])
    with pytest.raises(ProfileError, match=beside.name):
        Llama(str(copied), profile=beside)
    with pytest.warns(DenseWarning, match=beside.name) as caught, opened(copied) as x:
        assert not x.fasa.active
    assert len(caught) == 1
    assert beside.read_bytes() == content[: len(content) // 2]


def test_a_missing_profile(path: Path, tmp_path: Path) -> None:
    with pytest.raises(ProfileError, match=r"none\.gguf"):
        Llama(str(path), profile=tmp_path / "none.gguf")


@pytest.mark.parametrize("given", [None, False, "profile"])
def test_a_missing_model(given: Any, profile: Profile, tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match=r"none\.gguf does not exist; check the path\.$"):
        Llama(str(tmp_path / "none.gguf"), profile=profile if given == "profile" else given)


@pytest.mark.parametrize("given", [None, False, "profile"])
def test_a_file_that_is_no_model(given: Any, profile: Profile, tmp_path: Path) -> None:
    file = tmp_path / "text.gguf"
    file.write_text("This is no model.")
    with pytest.raises(ModelFileError, match=r"text\.gguf"):
        Llama(str(file), profile=profile if given == "profile" else given, verbose=False)
