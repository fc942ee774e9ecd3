"""The demo: one prefill, the same questions twice, and a table that tells the truth."""

from __future__ import annotations

import io
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

import pyfasa
from pyfasa import demo
from pyfasa.console import Answer
from pyfasa.demo import Asked
from pyfasa.documents import Fact, make_document

FACT = Fact(
    form="code",
    name="amber falcon",
    value="48213",
    sentence="The secret code for amber falcon is 48213.",
    question="What is the secret code for amber falcon?",
    answer="The secret code for amber falcon is 48213.",
    position=0,
)
DENSE = Answer(FACT.answer, n_steps=10, decode_s=1.0, cells_read=1.0, dense={"disabled": 60})
FASA = Answer(FACT.answer, n_steps=10, decode_s=0.1, cells_read=0.05, dense={})


def test_right_counts_values_only() -> None:
    wrong = replace(FASA, text="The secret code for amber falcon is 482135.")
    asked = [Asked(FACT, DENSE, FASA), Asked(FACT, DENSE, wrong)]
    assert demo.right(asked, "dense") == 2
    assert demo.right(asked, "fasa") == 1


def test_table_and_totals() -> None:
    asked = [Asked(FACT, DENSE, FASA), Asked(FACT, DENSE, replace(FASA, text="no idea"))]
    screen = Console(width=140, file=io.StringIO(), record=True)
    screen.print(demo.table(asked))
    text = screen.export_text()
    for word in ("amber falcon", "48213", "right", "wrong", "10.0 x", "5 %"):
        assert word in text
    assert demo.totals(asked) == (
        "right: dense 2 of 2, FASA 1 of 2; decode: 10 against 100 tokens/s, 10.0 x; cache read: 5 %"
    )


def test_speed_weighs_by_tokens() -> None:
    slow = replace(DENSE, n_steps=1, decode_s=1.0)
    fast = replace(DENSE, n_steps=99, decode_s=1.0)
    assert demo.speed([slow, fast]) == pytest.approx(50)
    assert demo.speed([replace(DENSE, n_steps=0, decode_s=0.0)]) == 0


def test_common_prefix() -> None:
    assert demo._common_prefix([[1, 2, 3, 4], [1, 2, 5]], 9) == 2
    assert demo._common_prefix([[1, 2], [1, 2]], 9) == 1
    assert demo._common_prefix([[1, 2, 3, 4]], 2) == 2


@pytest.mark.parametrize(
    ("field", "value"), [("n_tokens", 10), ("n_tokens", 50_000), ("n_questions", 0)]
)
def test_impossible_settings(field: str, value: int) -> None:
    with pytest.raises(ValueError, match=f"{value:,}|{value}"):
        demo.Settings(model=Path("m.gguf"), **{field: value})


def test_bundled_model_is_found(tiny_model_path: Path) -> None:
    assert demo.bundled_model().samefile(tiny_model_path)


def test_without_the_bundled_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As from a wheel, which does not hold it: the sentence says where it is and what else will do."""
    monkeypatch.setattr(demo, "__file__", str(tmp_path / "pyfasa" / "demo.py"))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        ValueError, match=r"neither .* repository, not in its wheels\. .* --model\.$"
    ):
        demo.bundled_model()


def test_document_is_read_once(tiny_model_path: Path) -> None:
    """Behind the prefill each question evaluates its own few tokens only; dense stays dense."""
    with closing(pyfasa.Llama(str(tiny_model_path), n_ctx=1600, min_ctx=512, budget=128)) as llm:
        document = make_document(
            lambda text: llm.tokenize(text.encode(), add_bos=False), 1200, n_facts=6, seed=3
        )
        evaluated: list[int] = []
        inner = llm.eval

        def counting(tokens: list[int]) -> None:
            evaluated.append(len(tokens))
            inner(tokens)

        llm.eval = counting  # type: ignore[method-assign]
        written: list[str] = []
        asked = list(demo.interview(llm, document, 2, written.append))
    assert len(asked) == 2
    long = [n for n in evaluated if n > 1]
    n_questions = 2 * 2
    assert sum(long[:-n_questions]) == pytest.approx(document.n_tokens, abs=20)
    assert all(n < 40 for n in long[-n_questions:])
    for one in asked:
        assert one.dense.cells_read == 1.0
        assert set(one.dense.dense) == {"disabled"}
        assert one.fasa.dense == {}
        assert one.fasa.cells_read == pytest.approx(128 / 1250, rel=0.1)
        assert one.dense.text in "".join(written)


@pytest.mark.slow
def test_demo_from_the_command_line(tiny_model_path: Path) -> None:
    from typer.testing import CliRunner

    from pyfasa.cli import app

    arguments = ["demo", "--model", str(tiny_model_path), "--tokens", "4000", "--questions", "3"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.stdout + result.stderr
    for word in ("dense against FASA", "ratio", "right: dense", "tokens/s"):
        assert word in result.stdout
