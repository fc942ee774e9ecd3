"""The command line: exit codes, one sentence per error, nothing overwritten."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from pyfasa import console
from pyfasa.cli import app
from pyfasa.profile import Profile

COMMANDS = [
    "run",
    "calibrate",
    "embed",
    "extract",
    "remove",
    "inspect",
    "bench",
    "doctor",
    "demo",
]  # as in README.md


def call(*arguments: object) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    return result.exit_code, result.stdout, result.stderr


def assert_sentence(code: int, err: str, *words: str) -> None:
    """Exit code 1, a single error, no traceback, and all of `words` in it."""
    assert code == 1
    assert err.count("error: ") == 1
    assert "Traceback" not in err
    for word in words:
        assert word in err


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_every_command(command: str) -> None:
    code, out, _ = call(command, "--help")
    assert code == 0
    assert "Usage:" in out


@pytest.mark.parametrize(
    "arguments",
    [
        ["walk"],
        ["run"],
        ["run", "m.gguf", "--frobnicate"],
        ["run", "m.gguf"],
        ["run", "m.gguf", "-p", "x", "-ctk", "q3_0"],
        ["run", "m.gguf", "-p", "x", "-n", "0"],
        ["bench", "-m", "m.gguf", "-d", "12,many"],
        ["bench", "-m", "m.gguf", "-o", "sql"],
        ["embed", "m.gguf"],
        ["extract", "m.gguf"],
    ],
    ids=" ".join,
)
def test_wrong_usage_is_exit_code_2(arguments: list[str]) -> None:
    code, _, err = call(*arguments)
    assert code == 2
    assert "Traceback" not in err


@pytest.mark.parametrize(
    "arguments",
    [
        ["run", "{}", "-p", "x"],
        ["calibrate", "{}"],
        ["embed", "{}", "out.gguf", "--profile", "{}"],
        ["extract", "{}", "-o", "out.gguf"],
        ["remove", "{}", "out.gguf"],
        ["inspect", "{}"],
        ["bench", "-m", "{}"],
        ["demo", "-m", "{}"],
    ],
    ids=lambda arguments: arguments[0],
)
@pytest.mark.parametrize("content", [None, b"", b"this is no GGUF file" * 10])
def test_missing_or_damaged_file_is_one_sentence(
    arguments: list[str], content: bytes | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "model.gguf"
    if content is not None:
        path.write_bytes(content)
    code, _, err = call(*(a.format(path) for a in arguments))
    assert_sentence(code, err, path.name)
    assert sorted(p.name for p in tmp_path.iterdir()) == (
        ["model.gguf"] if content is not None else []
    )


def test_debug_shows_the_exception(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = CliRunner().invoke(app, ["--debug", "inspect", str(tmp_path / "none.gguf")])
    assert isinstance(result.exception, ValueError)
    monkeypatch.setenv("PYFASA_DEBUG", "1")
    result = CliRunner().invoke(app, ["inspect", str(tmp_path / "none.gguf")])
    assert isinstance(result.exception, ValueError)


def test_interrupt_is_130(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("pyfasa.doctor.examine", interrupted)
    code, _, err = call("doctor")
    assert code == 130
    assert "Traceback" not in err


def test_missing_document_is_named(tiny_model_path: Path, tmp_path: Path) -> None:
    code, _, err = call("run", tiny_model_path, "-p", "x", "--file", tmp_path / "none.txt")
    assert_sentence(code, err, "none.txt")


def test_calibrate_keeps_what_is_there(tiny_model_path: Path, tmp_path: Path) -> None:
    target = tmp_path / "mine.gguf"
    target.write_bytes(b"mine")
    code, _, err = call("calibrate", tiny_model_path, "-o", target)
    assert_sentence(code, err, "mine.gguf", "--force")
    assert target.read_bytes() == b"mine"


def test_calibrate_writes_a_profile_that_fits(tiny_model_path: Path, tmp_path: Path) -> None:
    target = tmp_path / "mine.gguf"
    options = ("--ctx", 512, "--n-fc", 8, "--bits", 2, "--seed", 3)
    code, _, err = call("calibrate", tiny_model_path, "-o", target, *options)
    assert code == 0, err
    profile = Profile.load(target)
    assert (profile.n_fc, profile.n_ctx, profile.seed) == (8, 512, 3)
    assert set(profile.bits.ravel()) == {2}
    assert call("embed", tiny_model_path, tmp_path / "out.gguf", "--profile", target)[0] == 0


@pytest.mark.parametrize(
    ("option", "value"), [("--method", "magic"), ("--bits", 3), ("--n-fc", 99), ("--ctx", 10)]
)
def test_calibrate_with_impossible_settings(
    tiny_model_path: Path, tmp_path: Path, option: str, value: object
) -> None:
    target = tmp_path / "mine.gguf"
    code, _, err = call("calibrate", tiny_model_path, "-o", target, option, value)
    assert_sentence(code, err, str(value))
    assert not target.exists()


def test_embed_without_profile_says_how_to_get_one(tmp_path: Path) -> None:
    code, _, err = call("embed", tmp_path / "model.gguf", tmp_path / "out.gguf")
    assert_sentence(code, err, "model-fasa.gguf", "--profile", "pyfasa calibrate")


def test_profile_round_trip(tiny_model_path: Path, tmp_path: Path) -> None:
    """extract, embed, inspect and remove on the bundled model, which carries a profile."""
    sidecar, plain, full = (tmp_path / name for name in ("p.gguf", "plain.gguf", "full.gguf"))
    assert call("extract", tiny_model_path, "-o", sidecar)[0] == 0
    assert call("remove", tiny_model_path, plain)[0] == 0
    assert call("embed", plain, full, "--profile", sidecar)[0] == 0
    assert full.read_bytes() == tiny_model_path.read_bytes()

    assert_sentence(*call("embed", plain, full, "--profile", sidecar)[::2], "full.gguf", "exists")
    assert_sentence(*call("extract", full, "-o", sidecar)[::2], "p.gguf", "exists")
    assert call("extract", full, "-o", sidecar, "--force")[0] == 0

    code, out, _ = call("inspect", plain)
    assert code == 0
    assert "no profile" in out
    for file in (full, sidecar):
        code, out, _ = call("inspect", file)
        assert code == 0
        for word in ("pyfasa-tiny-12m", "KV head", "131,072", "MiB"):
            assert word in out


def test_run_answers_from_a_document(tiny_model_path: Path, tmp_path: Path) -> None:
    document = tmp_path / "document.txt"
    filler = "\n".join(f"line {i} of some text without a fact" for i in range(60))
    fact = "The secret code for amber falcon is 48213."
    document.write_text(f"{filler}\n{fact}\n{filler}\n")
    question = "What is the secret code for amber falcon?"
    common = ("run", tiny_model_path, "-p", question, "--file", document, "-n", 30)

    code, out, err = call(*common, "--budget", 128)
    assert code == 0, err
    assert "48213" in out
    assert "tokens/s" in err
    assert "cache read" in err
    assert "100 %" not in err

    code, out, err = call(*common, "--dense")
    assert code == 0, err
    assert "48213" in out
    assert "cache read 100 %" in err


def test_run_says_why_it_is_dense(tiny_model_path: Path) -> None:
    code, _, err = call("run", tiny_model_path, "-p", "Hello", "-n", 4)
    assert code == 0, err
    assert "dense: short_context" in err


def test_run_context_too_small(tiny_model_path: Path) -> None:
    code, _, err = call("run", tiny_model_path, "-p", "word " * 200, "-c", 64)
    assert_sentence(code, err, "64", "-c")


@pytest.mark.parametrize(
    ("option", "value"), [("--budget", 0), ("--budget", -5), ("--n-fc", 1000)], ids=str
)
def test_run_with_impossible_settings(tiny_model_path: Path, option: str, value: int) -> None:
    code, _, err = call("run", tiny_model_path, "-p", "Hello", "-n", 2, option, value)
    assert_sentence(code, err, str(value))


def test_numbers_as_people_read_them() -> None:
    assert [console.human_bytes(n) for n in (0, 1023, 1536, 5 * 2**30)] == [
        "0 B",
        "1023 B",
        "1.5 KiB",
        "5.0 GiB",
    ]
    assert [console.percent(p) for p in (1, 0.5, 0.0123, 0.0005)] == [
        "100 %",
        "50 %",
        "1.2 %",
        "0.05 %",
    ]


def test_share_of_the_cache_read() -> None:
    """Dense nodes count as having read everything; without attention nodes nothing was saved."""
    assert console.cells_read({}, 0, 0) == 1.0
    assert console.cells_read({"prefill": 6}, 0, 0) == 1.0
    assert console.cells_read({"sparse": 6}, 1000, 100) == pytest.approx(0.1)
    assert console.cells_read({"sparse": 3, "no_profile": 3}, 1000, 100) == pytest.approx(0.55)
