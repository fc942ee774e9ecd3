"""`pyfasa eval`: one sentence per error, tables on stdout, files where they were asked for."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from pyfasa.cli import app


def call(*arguments: object) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, ["eval", *(str(a) for a in arguments)])
    return result.exit_code, result.stdout, result.stderr


def test_help_names_every_task_and_setting() -> None:
    from pyfasa.evaluation.plan import TASKS
    from pyfasa.evaluation.settings import NAMES

    code, out, _ = call("--help")
    assert code == 0
    assert not [name for name in (*TASKS, *NAMES) if name not in " ".join(out.split())]


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["m.gguf", "--tokens", "many"],
        ["m.gguf", "--budget", "64,x"],
        ["m.gguf", "--index-bytes", "six"],
        ["m.gguf", "-o", "sql"],
        ["m.gguf", "-ctk", "q3_0"],
    ],
    ids=" ".join,
)
def test_wrong_usage_is_exit_code_2(arguments: list[str]) -> None:
    code, _, err = call(*arguments)
    assert code == 2
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--task", "walk"], "'walk' is no task"),
        (["--setting", "walk"], "'walk' is no setting"),
        (["--setting", "quest:x"], "'quest:x' has the size"),
        (["--setting", ""], "no setting is given"),
        (["--questions", "0"], "questions is 0"),
        (["--tokens", "10"], "documents of [10] tokens"),
        (["--budget", "0"], "budgets are [0]"),
        (["--budget", "8"], "exceed the budget 8"),
        (["--index-bytes", "-1"], "index bytes are [-1.0]"),
        (["--task", "custom"], "--custom FILE.jsonl"),
        (["--task", "custom", "--custom", "none.jsonl"], "none.jsonl"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_errors_are_sentences(arguments: list[str], words: str, tiny_model_path: Path) -> None:
    code, out, err = call(tiny_model_path, *arguments)
    assert code == 1
    assert err.count("error: ") == 1
    assert words in err
    assert "Traceback" not in err
    assert out == ""


def test_missing_or_damaged_model(tmp_path: Path) -> None:
    code, _, err = call(tmp_path / "none.gguf")
    assert code == 1
    assert "none.gguf" in err
    (tmp_path / "bad.gguf").write_bytes(b"this is no GGUF file" * 10)
    code, _, err = call(tmp_path / "bad.gguf")
    assert code == 1
    assert "bad.gguf is not a GGUF file" in err


def test_a_run_writes_tables_results_and_plots(tiny_model_path: Path, tmp_path: Path) -> None:
    results, folder = tmp_path / "rows.jsonl", tmp_path / "plots"
    arguments = [
        tiny_model_path, "--task", "needle,kld", "--tokens", "500", "--questions", "2", "--budget",
        "64", "--setting", "dense,streaming,quest", "--index-bytes", "8,16", "--rows", "8", "-t", "1",
        "--results", results,
    ]  # fmt: skip
    code, out, err = call(*arguments, "--plot", folder)
    assert code == 0, err
    assert out.startswith("needle: 500 tokens, 2 questions\n\n| setting")
    assert [line.split("|")[1].strip() for line in out.splitlines() if line.startswith("| ")][1:5] == [
        "dense", "streaming", "quest:32", "quest:16",
    ]  # fmt: skip
    assert "kld: 500 tokens, 8 rows" in out
    assert len(results.read_text().splitlines()) == 4 * 3
    assert {path.name for path in folder.iterdir()} == {
        "needle-depth-64.png", "accuracy-needle-500.png", "kld-500.png",
    }  # fmt: skip
    code, again, _ = call(*arguments, "-o", "json")
    assert code == 0
    assert len(json.loads(again)["summary"]) == 8
    assert len(results.read_text().splitlines()) == 4 * 3


def test_lengths_are_cut_to_what_the_model_was_trained_for(
    tiny_model_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pyfasa.evaluation.plan import Plan, clipped

    told: list[str] = []
    monkeypatch.setattr("pyfasa.evaluation.plan.note", told.append)
    assert clipped(Plan(tokens=(4096, 8192)), tiny_model_path).tokens == (4096, 8192)
    assert not told
    plan = clipped(Plan(tokens=(4096, 40000, 50000)), tiny_model_path)
    assert plan.tokens == (4096, 32768 - plan.room)
    assert "trained for 32,768 tokens" in told[0]


def test_plots_are_checked_before_the_work(
    tiny_model_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pyfasa.plotting.find_spec", lambda name: None)
    monkeypatch.setattr("pyfasa.evaluation.run.run", lambda *_: pytest.fail("it ran"))
    code, _, err = call(tiny_model_path, "--plot", tmp_path)
    assert code == 1
    assert "pip install 'pyfasa[plot]'" in err
