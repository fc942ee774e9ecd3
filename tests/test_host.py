"""A llama.cpp that cannot be decorated: dense with one warning, an error if FASA was asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import llama_cpp
import pytest

import pyfasa.attach
from pyfasa import Llama, Profile, calibrate, native
from pyfasa.embed import sidecar_path
from pyfasa.errors import DenseWarning, HostError
from support import logits, opened, opened_plain, random_profile, random_tokens, warned, write_model

LAYOUT = "The CPU device is laid out differently."


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A model with a profile beside it."""
    path = write_model(tmp_path / "model.gguf")
    random_profile(path).save(sidecar_path(path))
    return path


@pytest.fixture(params=["version", "self test"])
def sentence(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Breaks the host and gives the sentence that has to come."""

    def fail() -> None:
        raise HostError(LAYOUT)

    if request.param == "version":
        monkeypatch.setattr(llama_cpp, "__version__", "0.3.99")
        return (
            "llama-cpp-python 0.3.99 is installed, but this pyfasa works with 0.3.36 only; "
            "run: pip install llama-cpp-python==0.3.36"
        )
    monkeypatch.setattr(pyfasa.attach, "self_test", fail)
    return LAYOUT


def test_this_host_can_be_decorated(path: Path) -> None:
    assert llama_cpp.__version__ == pyfasa.attach.SUPPORTED_LLAMA_CPP
    pyfasa.attach.check_host()
    native.self_test()
    built, loaded = native.ggml_versions()
    assert built == loaded
    with warned() as sentences, opened(path) as llm:
        assert llm.fasa.active
    assert sentences == []


def test_a_profile_that_is_found_gives_one_warning(path: Path, sentence: str) -> None:
    with warned() as sentences, opened(path) as llm:
        assert not llm.fasa.active
        assert llm.fasa.reason == sentence
        assert llm.fasa.profile is None
        llm.eval(random_tokens(20))
        found = logits(llm)
        with pytest.raises(RuntimeError, match="FASA is not attached to this context"):
            llm.fasa.reset()
    assert sentences == [f"Decoding is dense: {sentence}"]
    with opened_plain(path) as plain:
        plain.eval(random_tokens(20))
        assert (found == logits(plain)).all()


@pytest.mark.parametrize("kind", ["path", "profile"])
def test_a_profile_that_was_asked_for_is_an_error(path: Path, sentence: str, kind: str) -> None:
    beside = sidecar_path(path)
    given: Any = str(beside) if kind == "path" else Profile.load(beside)
    with pytest.raises(HostError) as caught:
        Llama(str(path), profile=given, verbose=False)
    assert str(caught.value) == sentence


def test_dense_on_purpose_needs_no_warning(path: Path, sentence: str) -> None:
    with warned() as sentences, opened(path, profile=False) as llm:
        assert not llm.fasa.active
        llm.eval(random_tokens(5))
    assert sentences == []


def test_calibrate_says_so_too(path: Path, sentence: str) -> None:
    with pytest.raises(HostError) as caught:
        calibrate(path, progress=False)
    assert str(caught.value) == sentence


def test_the_warning_can_be_filtered(path: Path, sentence: str) -> None:
    with pytest.warns(DenseWarning) as caught:
        Llama(str(path), verbose=False).close()
    assert [w.category for w in caught] == [DenseWarning]


def test_no_cpu_backend(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A context whose backends did not come through the decorated device."""
    monkeypatch.setattr(native.Session, "n_backends", 0)
    sentence = "llama.cpp created no CPU backend for this context."
    with warned() as sentences, opened(path) as llm:
        assert llm.fasa.reason == sentence
    assert sentences == [f"Decoding is dense: {sentence}"]
    with pytest.raises(HostError, match=sentence):
        Llama(str(path), profile=sidecar_path(path), verbose=False)
