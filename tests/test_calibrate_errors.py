"""What cannot be calibrated is told in a sentence, before minutes of work."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import zoo
from pyfasa import calibrate
from pyfasa.calibration_plan import make_plan
from pyfasa.dry_run import rehearse
from pyfasa.errors import ModelFileError, ProfileError, WriteError
from support import (
    SMALL,
    write_model,
)

pytestmark = pytest.mark.usefixtures("few_facts")


@pytest.fixture
def unopened(monkeypatch: pytest.MonkeyPatch) -> None:
    """No weights are read."""
    monkeypatch.setattr(
        "pyfasa.calibration.Llama", lambda *_, **__: pytest.fail("the model was opened")
    )


@pytest.mark.usefixtures("unopened")
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


def with_keys(folder: Path, **keys: Any) -> Path:
    return zoo.write(folder / "model.gguf", "llama", keys=keys)


@pytest.mark.usefixtures("unopened")
def test_contexts_that_the_model_was_not_trained_on(text: Path, tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"n_ctx is 700; .* trained on contexts of 600 .* give 600"
    ):
        calibrate(with_keys(tmp_path, context_length=600), [text], n_ctx=700)
    with pytest.raises(ValueError, match=r"trained on contexts of 500 tokens; fewer than 512"):
        calibrate(with_keys(tmp_path, context_length=500), [text])
    with pytest.raises(
        ValueError, match=r"contexts of 700 .* questions .* name a text of your own"
    ):
        calibrate(with_keys(tmp_path, context_length=700))


def test_the_default_context_is_one_that_the_model_knows(text: Path, tmp_path: Path) -> None:
    for trained, wanted in ((600, 600), (8192, 4096), (0, 4096)):
        plan = make_plan(with_keys(tmp_path, context_length=trained), [text])
        assert (plan.n_ctx, plan.n_ctx_train) == (wanted, trained)
    assert calibrate(with_keys(tmp_path, context_length=600), [text], progress=False).n_ctx == 600


def test_questions_stay_in_the_context_that_the_model_knows(tmp_path: Path) -> None:
    """They come after the document, which is shortened for them."""
    within = make_plan(with_keys(tmp_path, context_length=2048), n_ctx=2048)
    beyond = make_plan(with_keys(tmp_path, context_length=8192), n_ctx=2048)
    assert 0.95 * 2048 < within.longest.n_tokens <= 2048 < beyond.longest.n_tokens
    assert within.n_query == pytest.approx(beyond.n_query, abs=8)


@pytest.mark.usefixtures("unopened")
@pytest.mark.parametrize(
    ("keys", "sentence"),
    [
        ({"attention.max_alibi_bias": 8.0}, r"a position bias \(ALiBi\).*max_alibi_bias is 8"),
        ({"attention.key_length_mla": 96}, r"latent attention \(MLA\).*key_length_mla is 96"),
        ({"attention.key_length": 512}, r"head_dim is 512; it must be a whole number, 2 to 256"),
    ],
    ids=["alibi", "mla", "wide"],
)
def test_attention_without_chunks(
    keys: dict[str, Any], sentence: str, text: Path, tmp_path: Path
) -> None:
    with pytest.raises(ProfileError, match=sentence):
        calibrate(with_keys(tmp_path, **keys), [text], **SMALL)


def test_attention_that_only_the_graph_shows(text: Path, tmp_path: Path) -> None:
    """Baichuan has ALiBi where it has 40 layers, and no key that says so."""
    path = zoo.write(tmp_path / "model.gguf", "llama", arch="baichuan", k_dim=32, n_layer=40)
    plan = make_plan(path, [text], n_ctx=640)
    with pytest.raises(
        ProfileError, match=r"No layer of 'random' can be calibrated: alibi \(.*run .* dense"
    ):
        rehearse(plan)


@pytest.mark.usefixtures("unopened")
def test_files_that_cannot_be_written(path: Path, text: Path, tmp_path: Path) -> None:
    for keep, sentence in (
        (tmp_path / "none" / "run.npz", r"the folder .*none takes no file \(No such file"),
        (text / "run.npz", r"takes no file \(Not a directory"),
        (Path("/proc/run.npz"), "the folder /proc takes no file"),
        (tmp_path, "is a folder, and a file is to be written there"),
    ):
        with pytest.raises(WriteError, match=sentence):
            calibrate(path, [text], keep=keep, **SMALL)
    assert [file.name for file in tmp_path.iterdir()] == ["text.txt"]
