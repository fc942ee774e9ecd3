"""pyfasa calibrate on the command line: what is told before the work, --dry-run, and no work in vain."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from pyfasa import estimate
from pyfasa.calibration_plan import make_plan
from pyfasa.profile import Profile
from test_cli import assert_sentence, call


@pytest.fixture
def unread(monkeypatch: pytest.MonkeyPatch) -> None:
    """No text is evaluated."""
    monkeypatch.setattr("pyfasa.calibration._run", lambda *_: pytest.fail("it ran"))


@pytest.fixture
def lines(tmp_path: Path) -> Path:
    file = tmp_path / "lines.txt"
    file.write_text("".join(f"{i} is the number of a line.\n" for i in range(300)))
    return file


def told(out: str) -> dict[str, str]:
    """Names and values of the table, each value on one line."""
    found: dict[str, str] = {}
    name = ""
    for line in out.splitlines():
        cells = [cell.strip() for cell in line.strip("│").split("│")]
        if len(cells) == 2:
            name = cells[0] or name
            found[name] = f"{found.get(name, '')} {cells[1]}".strip()
    return found


@pytest.mark.usefixtures("unread")
def test_a_dry_run_tells_all_and_does_nothing(plain_model_path: Path) -> None:
    """On the built-in text, beside the model."""
    folder = plain_model_path.parent
    before = sorted(folder.iterdir())
    code, out, err = call("calibrate", plain_model_path, "--dry-run", "-c", 1024)
    assert (code, err) == (0, "")
    assert sorted(folder.iterdir()) == before
    found = told(out)
    plan = make_plan(plain_model_path, n_ctx=1024)
    assert "pyfasa-tiny-12m, llama, 6 layers, 2 KV heads of 64 dims" in found["model"]
    assert "contexts of 32,768 tokens" in found["model"]
    assert "Python standard library with hidden facts: 2 documents of up to 1,024" in found["text"]
    assert f"{plan.n_tokens:,} tokens in all" in found["text"]
    assert f"{plan.n_query:,} queries" in found["text"]
    assert found["method"] == "allocation"
    assert found["side index"].startswith("at most 10.2 bytes per token and KV head, 4 % of")
    assert found["output"].replace(" ", "").endswith("pyfasa-tiny-12m-Q8_0-fasa.gguf")
    assert found["memory"] == str(estimate.memory(plan))
    assert re.match(r"about \d[\d.]* (s|minutes), give or take a factor of two", found["time"])


@pytest.mark.usefixtures("unread")
def test_a_dry_run_of_other_settings(plain_model_path: Path, lines: Path, tmp_path: Path) -> None:
    """12 chunks of 2 bits are 6 bytes and a step."""
    target = tmp_path / "p.gguf"
    options = ("--method", "variance", "--n-fc", 12, "--bits", 2, "--text", lines, "-o", target)
    code, out, err = call("calibrate", plain_model_path, "--dry-run", *options)
    assert code == 0, err
    found = told(out)
    assert found["text"].startswith("lines.txt: a document of up to 4,096 tokens")
    assert found["method"] == "variance"
    assert found["side index"].startswith("7 bytes per token and KV head")
    assert not target.exists()


@pytest.mark.usefixtures("unread")
def test_what_would_fail_later_is_told_first(
    plain_model_path: Path, lines: Path, tmp_path: Path
) -> None:
    short = tmp_path / "short.txt"
    short.write_text("Too short.")
    none = tmp_path / "none"
    for options, words in (
        (("-o", none / "p.gguf"), ("p.gguf cannot be written", "No such file", "Name a file in")),
        (("-o", tmp_path, "--force"), ("is a folder",)),
        (("--keep", none / "run.npz"), ("run.npz cannot be written",)),
        (("--text", short), ("short.txt has", "at least 512", "built-in documents")),
        (("--ctx", 40000), ("n_ctx is 40000", "contexts of 32768")),
        (("--index-bytes", 1.5), ("smallest index of this model has 2 bytes",)),
    ):
        for dry in ((), ("--dry-run",)):
            output = () if "-o" in options else ("-o", tmp_path / "p.gguf")
            code, _, err = call("calibrate", plain_model_path, *options, *output, *dry)
            assert_sentence(code, err, *words)
    code, _, err = call("calibrate", none / "model.gguf")
    assert_sentence(code, err, "model.gguf cannot be read: No such file")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["lines.txt", "short.txt"]


def test_what_is_told_around_the_work(plain_model_path: Path, lines: Path, tmp_path: Path) -> None:
    """The estimate before, the command for the card after; the command on the card makes the profile again."""
    model = tmp_path / "my model.gguf"
    model.write_bytes(plain_model_path.read_bytes())
    options = ("--text", lines, "--ctx", 600, "--index-bytes", 7.3, "--seed", 3)
    code, out, err = call("calibrate", model, *options)
    assert (code, out) == (0, "")
    memory, time, wrote, card = [line for line in err.splitlines() if re.match(r"\w", line)]
    assert memory == f"memory: {estimate.memory(make_plan(model, [lines], n_ctx=600))}"
    assert time.startswith("time: about ")
    assert "my model-fasa.gguf: 7." in wrote
    words = shlex.split(card.partition(": ")[2])
    assert words == ["pyfasa", "inspect", str(model), "--card"]

    code, out, err = call(*words[1:])
    assert (code, err) == (0, "")
    block = re.search(r"```sh\n(pyfasa calibrate .*)\n```", out)
    assert block is not None, out
    made = shlex.split(block[1])
    assert made[2:5] == ["my model.gguf", "--text", "lines.txt"]
    names = {"my model.gguf": str(model), "lines.txt": str(lines)}
    again = tmp_path / "again.gguf"
    code, _, err = call(*(names.get(word, word) for word in made[1:]), "-o", again)
    assert code == 0, err
    assert f"pyfasa inspect {again} --card" in err.replace("'", "")
    assert Profile.load(again) == Profile.load(tmp_path / "my model-fasa.gguf")


def test_embed_names_the_card_of_what_it_wrote(tiny_model_path: Path, tmp_path: Path) -> None:
    sidecar, target = tmp_path / "p.gguf", tmp_path / "full.gguf"
    assert call("extract", tiny_model_path, "-o", sidecar)[0] == 0
    code, _, err = call("embed", tiny_model_path, target, "--profile", sidecar)
    assert code == 0
    assert err.endswith(f"pyfasa inspect {target} --card\n")


def test_a_profile_that_would_not_be_found(
    tiny_model_path: Path, lines: Path, tmp_path: Path
) -> None:
    """The one inside the model comes first, which is told, and the card is that of the new one."""
    model = tmp_path / "m.gguf"
    model.write_bytes(tiny_model_path.read_bytes())
    code, _, err = call("calibrate", model, "--text", lines, "--ctx", 512)
    assert code == 0, err
    assert f"warning: {model} carries a profile of its own" in err
    assert err.endswith(f"pyfasa inspect {tmp_path / 'm-fasa.gguf'} --card\n")
