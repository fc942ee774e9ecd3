"""Rows survive a crash and are not run again; summaries and tables say what the rows say."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pyfasa.errors import WriteError
from pyfasa.evaluation.results import ResultsFile, Row, read_rows, summarize
from pyfasa.evaluation.tables import to_json, to_markdown

ROW = Row(
    task="needle", case="2000/0/1", setting="dense", model="m 1", seed=0, cache="1/1", profile="",
    prompt="ab", name="dense", budget=None, bytes_per_cell=None, n_tokens=2000, depth=0.15,
    expected=("9031755",), answer='9031755, "said" she', score=1.0, n_steps=7, attended=1.0,
)  # fmt: skip


def sparse(name: str, budget: int, size: float, **known: Any) -> Row:
    return replace(
        ROW, setting=f"{name} @ {budget}", name=name, budget=budget, bytes_per_cell=size, **known
    )


FORCED = replace(
    ROW, task="kld", case="2000/0/4", score=0.25, expected=(), answer="", depth=None, n_steps=4,
    kld=(0.1, 0.2, 0.3, 0.4), same_top=0.75, nll=1.5, nll_dense=1.0,
)  # fmt: skip


def test_rows_come_back_as_they_were(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "rows.jsonl"
    with ResultsFile(path) as file:
        for row in (ROW, FORCED):
            file.add(row)
            assert json.loads(path.read_text().splitlines()[-1])["task"] == row.task, "at once"
    assert read_rows(path) == [ROW, FORCED]
    with ResultsFile(path) as file:
        assert file.get(ROW.key) == ROW
        file.add(sparse("fasa", 64, 17))
    assert len(read_rows(path)) == 3


@pytest.mark.parametrize(
    "change",
    [
        {"task": "multikey"}, {"case": "2000/0/2"}, {"setting": "x"}, {"model": "m 2"}, {"seed": 1},
        {"cache": "8/8"}, {"profile": "cd"}, {"prompt": "cd"},
    ],
    ids=str,
)  # fmt: skip
def test_what_makes_a_row_another_one(change: Any, tmp_path: Path) -> None:
    with ResultsFile(tmp_path / "rows.jsonl") as file:
        file.add(ROW)
        assert file.get(replace(ROW, **change).key) is None
        assert file.get(replace(ROW, answer="other").key) == ROW


@pytest.mark.parametrize("cut", [1, 40, -1])
def test_a_half_written_line_is_dropped(cut: int, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    with ResultsFile(path) as file:
        file.add(ROW)
        whole = path.read_bytes()
        file.add(FORCED)
    half = path.read_bytes()[len(whole) : cut if cut < 0 else len(whole) + cut]
    path.write_bytes(whole + half)
    with ResultsFile(path) as file:
        assert file.get(ROW.key) == ROW
        assert file.get(FORCED.key) is None
        assert path.read_bytes() == whole
        file.add(FORCED)
    assert read_rows(path) == [ROW, FORCED]
    assert [p.name for p in tmp_path.iterdir()] == ["rows.jsonl"]


@pytest.mark.parametrize("line", ["{", "[]", '{"task": "needle"}', "", "null"])
def test_a_file_of_something_else_is_left_alone(line: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    with ResultsFile(path) as file:
        file.add(ROW)
    content = path.read_text() + line + "\nhalf"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"line 2 of .*rows.jsonl is no result of pyfasa eval"):
        ResultsFile(path)
    assert path.read_text() == content


def test_files_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(WriteError, match="cannot be written"), ResultsFile(tmp_path / "file" / "x"):
        pass
    with pytest.raises(ValueError, match=r"none.jsonl does not exist"):
        read_rows(tmp_path / "none.jsonl")


def test_without_a_path_rows_are_kept_in_memory() -> None:
    with ResultsFile() as file:
        file.add(ROW)
        assert file.get(ROW.key) == ROW


def answers(
    name: str, budget: int | None, size: float | None, texts: str, score: float
) -> list[Row]:
    base = ROW if budget is None else sparse(name, budget, size or 0.0)
    return [
        replace(base, case=f"2000/0/{i}", answer=text, score=score, attended=0.25)
        for i, text in enumerate(texts)
    ]


def test_summary_of_answers_and_its_order() -> None:
    rows = [
        *answers("fasa", 256, 17.0, "abxd", 0.75), *answers("quest:16", 64, 16.0, "xxxx", 0.0),
        *answers("oracle", 256, 128.0, "abcd", 1.0), *answers("sparq:3", 256, 6.0, "axxx", 0.25),
        *answers("dense", None, None, "abcd", 1.0), *answers("oracle", 64, 128.0, "abcd", 1.0),
    ]  # fmt: skip
    found = summarize(rows)
    assert [s.setting for s in found] == [
        "dense", "oracle @ 64", "quest:16 @ 64", "oracle @ 256", "sparq:3 @ 256", "fasa @ 256",
    ]  # fmt: skip
    fasa = found[-1]
    assert (fasa.n, fasa.score, fasa.as_dense, fasa.attended) == (4, 0.75, 0.75, 0.25)
    assert math.isnan(fasa.mean_kld)
    alone = summarize(answers("fasa", 256, 17.0, "ab", 1.0))
    assert math.isnan(alone[0].as_dense), "nothing to compare with"


def test_summary_of_text_is_over_rows() -> None:
    other = replace(
        FORCED, case="2000/1/4", n_steps=1, kld=(9.0,), same_top=0.0, nll=3.5, nll_dense=3.0
    )
    (found,) = summarize([FORCED, other])
    assert (found.n, found.mean_kld, found.median_kld) == (
        5,
        pytest.approx(2.0),
        pytest.approx(0.3),
    )
    assert found.p99_kld == pytest.approx(9.0, rel=0.05)
    assert found.as_dense == pytest.approx(0.6)
    assert found.ppl == pytest.approx(math.exp((4 * 1.5 + 3.5) / 5))
    assert found.ppl_ratio == pytest.approx(math.exp(0.5))


def test_tables() -> None:
    rows = [ROW, sparse("fasa", 256, 17.0, attended=0.032), FORCED, replace(FORCED, task="ppl")]
    text = to_markdown(rows)
    needle, kld, ppl = (part.splitlines() for part in text.split("\n\n")[1::2])
    assert text.splitlines()[0] == "needle: 2,000 tokens, 1 questions"

    def cells(line: str) -> list[str]:
        return [cell.strip() for cell in line.strip("|").split("|")]

    assert cells(needle[0]) == [
        "setting", "budget", "index bytes", "score", "as dense", "cells attended",
    ]  # fmt: skip
    assert cells(needle[2]) == ["dense", "", "", "100.0 %", "100.0 %", "100 %"]
    assert cells(needle[3]) == ["fasa", "256", "17", "100.0 %", "100.0 %", "3.2 %"]
    assert cells(kld[2])[3:7] == ["0.25000", "0.25000", "0.3970", "75.0 %"]
    assert cells(ppl[2])[3:5] == ["4.482", "1.6487 x"]


def test_json_has_null_where_there_is_no_number() -> None:
    found = json.loads(to_json([ROW, FORCED]))
    assert found["summary"][0]["mean_kld"] is None
    assert found["summary"][1]["score"] is None
    assert found["rows"][0]["expected"] == ["9031755"]
    assert found["rows"][1]["kld"] == [0.1, 0.2, 0.3, 0.4]
