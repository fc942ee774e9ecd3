"""pyfasa inspect --card: numbers that are the profile's, a command and a use that work."""

from __future__ import annotations

import re
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from conftest import ROOT
from pyfasa import Profile
from pyfasa.embed import extract
from pyfasa.model_card import card, command_of
from support import random_profile
from test_cli import assert_sentence, call


@pytest.fixture(scope="module")
def own(tiny_model_path: Path) -> Profile:
    """The profile of the bundled model."""
    return extract(tiny_model_path)


def test_the_card_of_the_bundled_model(own: Profile, tiny_model_path: Path) -> None:
    code, out, err = call("inspect", tiny_model_path, "--card")
    assert (code, err) == (0, "")
    values = dict(re.findall(r"^\| ([\w /]+?) +\| (.+?) +\|$", out, re.MULTILINE))
    size = own.bytes_per_cell()
    assert values["method"] == "allocation"
    assert values["side index"] == f"{size.mean():.3g} bytes per token and KV head"
    share = 100 * size.sum() / (size.size * 2 * 2 * own.identity.head_dim)
    assert values["share of the f16 K/V cache"] == f"{share:.2g} %"
    used = (own.bits > 0).sum(axis=2)
    assert values["frequency chunks"] == f"{used.min()} to {used.max()} of 32 per KV head"
    assert values["calibrated on"].endswith("documents of 4,096 tokens, 676 queries")
    assert "```sh\npyfasa calibrate pyfasa-tiny-12m-Q8_0.gguf\n```" in out
    assert f"````markdown\n{out}````" in (ROOT / "docs" / "calibrate.md").read_text(
        encoding="utf-8"
    )
    assert "icen" not in out  # neutral about licences
    assert max(map(len, out.splitlines())) < 200


@pytest.mark.parametrize("kept", ["inside", "beside", "elsewhere"])
def test_its_use_works(
    kept: str, own: Profile, tiny_model_path: Path, plain_model_path: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Three lines, of which two open the model, with its profile."""
    content = (tiny_model_path if kept == "inside" else plain_model_path).read_bytes()
    model = tmp_path / ("model.gguf" if kept == "elsewhere" else "mine.gguf")
    model.write_bytes(content)
    file = {"inside": model, "beside": tmp_path / "mine-fasa.gguf"}.get(kept, tmp_path / "p.gguf")
    if kept != "inside":
        own.save(file)
    code, out, _ = call("inspect", file, "--card")
    assert code == 0
    lines = re.search(r"```python\n(.*)\n```", out, re.DOTALL)[1].split("\n")  # type: ignore[index]
    lines = [line for line in lines if line]
    assert len(lines) == 3
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec("\n".join(lines[:2]), names)
    with closing(names["llm"]) as llm:
        assert llm.fasa.profile == own
        assert llm.n_ctx() == 32768
        monkeypatch.setattr(llm, "create_chat_completion", lambda _: {"choices": [{"message": 1}]})
        exec(lines[2], names)


def test_commands(own: Profile) -> None:
    """Each setting that is not the default is named, and no other."""
    even = replace(own.with_bits(2).with_n_fc(9), method="variance")
    half = np.where(np.arange(32) < 8, 2, 0) * np.ones_like(own.bits)
    for profile, options in (
        (own, []),
        (replace(own, seed=4, n_ctx=8192), ["--ctx", "8192", "--seed", "4"]),
        (replace(own, data_name="a.txt, b.txt"), ["--text", "a.txt", "--text", "b.txt"]),
        (replace(own, bits=half, n_fc=8), ["--index-bytes", "5"]),
        (even, ["--method", "variance", "--n-fc", "9", "--bits", "2"]),
    ):
        found = command_of(profile, "m.gguf")
        assert found == " ".join(["pyfasa calibrate m.gguf", *options])


def test_a_profile_that_no_command_makes(one: Path, tmp_path: Path) -> None:
    profile = random_profile(one)
    assert command_of(profile, "m.gguf") is None
    assert "pyfasa calibrate" not in card(profile, tmp_path / "p.gguf", None)


def test_layers_that_stay_dense_are_told(own: Profile, tmp_path: Path) -> None:
    bits = own.bits.copy()
    bits[:2] = 0
    found = card(replace(own, bits=bits), tmp_path / "p.gguf", None)
    assert "4 of 6; the others stay dense" in found
    assert "layers " not in card(own, tmp_path / "p.gguf", None)


def test_no_profile_for_a_card(plain_model_path: Path) -> None:
    code, out, err = call("inspect", plain_model_path, "--card")
    assert_sentence(code, err, "no profile for a card", "pyfasa calibrate")
    assert out == ""
