"""The command line: exit codes, one sentence per error, nothing overwritten."""

from __future__ import annotations

import struct
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from pyfasa import console
from pyfasa.cli import app
from pyfasa.profile import Profile
from support import bundled_profile, random_profile

COMMANDS = [
    "run",
    "chat",
    "calibrate",
    "embed",
    "extract",
    "remove",
    "inspect",
    "bench",
    "eval",
    "env",
    "exec",
    "serve",
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


def png_size(path: Path) -> tuple[int, int]:
    head = path.read_bytes()[:24]
    assert head.startswith(b"\x89PNG")
    width, height = struct.unpack(">II", head[16:24])
    return width, height


def test_help_lists_the_commands_in_their_order() -> None:
    code, out, _ = call("--help")
    assert code == 0
    words = [line.strip("\u2502| ").split(" ")[0] for line in out.splitlines()]
    assert [word for word in words if word in COMMANDS] == COMMANDS


def test_starting_loads_nothing_heavy() -> None:
    heavy = ("numpy", "llama_cpp", "gguf", "matplotlib", "pyfasa._native")
    script = f"import sys, pyfasa.cli; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    "arguments",
    [
        ["walk"],
        ["run"],
        ["run", "m.gguf", "--frobnicate"],
        ["run", "m.gguf"],
        ["run", "m.gguf", "-p", "x", "-ctk", "q3_0"],
        ["run", "m.gguf", "-p", "x", "-n", "0"],
        ["chat"],
        ["chat", "m.gguf", "--cache-size", "-1"],
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
        ["chat", "{}"],
        ["calibrate", "{}"],
        ["embed", "{}", "out.gguf", "--profile", "{}"],
        ["extract", "{}", "-o", "out.gguf"],
        ["remove", "{}", "out.gguf"],
        ["inspect", "{}"],
        ["bench", "-m", "{}"],
        ["eval", "{}"],
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
    def interrupted(*_: str) -> None:
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
    options = ("--method", "variance", "--ctx", 512, "--n-fc", 8, "--bits", 2, "--seed", 3)
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
    assert_sentence(code, err, str(value), option.strip("-").replace("-", "_")[-3:])
    assert not target.exists()


def test_calibrate_with_more_chunks_than_a_head_has(tiny_model_path: Path, tmp_path: Path) -> None:
    options = ("-o", tmp_path / "mine.gguf", "--method", "variance", "--n-fc", 99)
    assert_sentence(*call("calibrate", tiny_model_path, *options)[::2], "n_fc is 99", "1 to 32")


def test_calibration_runs_add_up(one: Path, tmp_path: Path) -> None:
    """--keep saves a run, --add adds it to another: as many queries as both have."""
    first, second, kept = (tmp_path / name for name in ("a.gguf", "b.gguf", "run.npz"))
    texts = [tmp_path / "a.txt", tmp_path / "b.txt"]
    for file, word in zip(texts, ("amber ", "birch and "), strict=True):
        file.write_text("".join(f"{word}{i} " for i in range(80)))
    options = ("--method", "variance", "--ctx", 512)
    code, _, err = call("calibrate", one, "-o", first, "--text", texts[0], "--keep", kept, *options)
    assert code == 0, err
    code, _, err = call("calibrate", one, "-o", second, "--text", texts[1], "--add", kept, *options)
    assert code == 0, err
    assert Profile.load(second).n_queries == 2 * Profile.load(first).n_queries > 0

    third = tmp_path / "c.gguf"
    for bad, words in ((kept, "different models, methods"), (tmp_path / "none.npz", "none.npz")):
        options = ("--text", texts[1], "--ctx", 512, "--method", "greedy", "--add", bad)
        assert_sentence(*call("calibrate", one, "-o", third, *options)[::2], words)
    assert not third.exists()


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


def test_inspect_draws_a_profile(tiny_model_path: Path, tmp_path: Path) -> None:
    plot = tmp_path / "plot.png"
    code, out, err = call("inspect", tiny_model_path, "--plot", plot)
    assert code == 0, err
    assert "KV head" in out
    assert "wrote" in err
    assert "plot.png" in err
    width, height = png_size(plot)
    assert 1000 < width < 2000
    assert 500 < height < 2000


def test_inspect_draws_what_a_profile_has(tiny_model_path: Path, one: Path, tmp_path: Path) -> None:
    """Without reports, with unranked chunks, with a layer that stays dense."""
    full = bundled_profile(tiny_model_path)
    bare = replace(full, importance=None, recall=None, oracle=None)
    bits = full.bits.copy()
    bits[0] = 0
    profiles = [bare, replace(full, bits=bits), replace(full, bits=0 * bits), random_profile(one)]
    for i, profile in enumerate(profiles):
        file, plot = tmp_path / f"{i}.gguf", tmp_path / f"{i}.png"
        profile.save(file)
        code, _, err = call("inspect", file, "--plot", plot)
        assert code == 0, err
        assert min(png_size(plot)) > 500


def test_importance_stands_at_the_chunk(tiny_model_path: Path) -> None:
    from pyfasa.profile_plot import bits_by_chunk, importance_by_chunk

    full = bundled_profile(tiny_model_path)
    profile = replace(
        full.with_n_fc(3),
        chunks=full.chunks[..., :5], bits=full.bits[..., :5], importance=full.importance[..., :5],
    )  # fmt: skip
    share, bits = importance_by_chunk(profile), bits_by_chunk(profile)
    assert share is not None
    assert profile.importance is not None
    for layer in range(profile.identity.n_layer):
        own = dict(zip(profile.chunks[layer, 1].tolist(), range(5), strict=True))
        best = profile.importance[layer, 1].max()
        for chunk in range(profile.identity.head_dim // 2):
            rank = own.get(chunk)
            if rank is None:
                assert str(share[layer, 1, chunk]) == "nan"
                assert bits[layer, 1, chunk] == 0
                continue
            wanted = profile.importance[layer, 1, rank] / best
            assert share[layer, 1, chunk] == pytest.approx(wanted)
            assert bits[layer, 1, chunk] == (profile.bits[layer, 1, rank] if rank < 3 else 0)


@pytest.mark.parametrize("command", ["inspect", "bench"])
def test_plots_that_cannot_be_written(
    command: str, tiny_model_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Are told before the work."""
    monkeypatch.setattr("pyfasa.benchmark.bench", lambda *_: pytest.fail("it ran"))
    model = ["-m", tiny_model_path] if command == "bench" else [tiny_model_path]
    for name, words in (
        ("plot.jpg", "ends in .png"),
        ("model.gguf", "ends in .png"),
        ("none/plot.png", "does not exist"),
    ):
        code, out, err = call(command, *model, "--plot", tmp_path / name)
        assert_sentence(code, err, Path(name).name, words)
        assert out == ""
    monkeypatch.setattr("pyfasa.plotting.find_spec", lambda name: None)
    code, _, err = call(command, *model, "--plot", tmp_path / "plot.png")
    assert_sentence(code, err, "matplotlib", "pip install 'pyfasa[plot]'")
    assert not list(tmp_path.iterdir())


def test_no_profile_to_plot(plain_model_path: Path, tmp_path: Path) -> None:
    code, _, err = call("inspect", plain_model_path, "--plot", tmp_path / "plot.png")
    assert_sentence(code, err, "no profile to plot", "pyfasa calibrate")


def test_bench_draws_speed_against_depth(tiny_model_path: Path, tmp_path: Path) -> None:
    plot = tmp_path / "speed.png"
    options = ("-d", "600,700", "-n", 2, "-r", 1, "--budget", 64, "-o", "csv", "--plot", plot)
    code, out, err = call("bench", "-m", tiny_model_path, *options)
    assert code == 0, err
    assert len(out.splitlines()) == 1 + 4
    assert "speed.png" in err
    width, height = png_size(plot)
    assert width > 700
    assert height > 350


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


def test_a_document_that_is_not_there(tiny_model_path: Path) -> None:
    code, out, err = call("run", tiny_model_path, "--file", "none.txt", "-p", "hi")
    assert (code, out) == (1, "")
    assert err == "error: The document none.txt cannot be read: No such file or directory.\n"
