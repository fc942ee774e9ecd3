"""bench compare: what is joined with what, the noise, and files that are no results."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from pyfasa.bench_compare import Speed, beyond_noise, compare, key_of, read_rows, speeds
from pyfasa.benchmark import to_csv, to_json
from pyfasa.cli import app

HERE = Path(__file__).resolve().parent
BENCH = HERE.parent / "docs" / "bench"


def row(avg: float, stddev: float = 1.0, **other: Any) -> dict[str, Any]:
    return {
        "model": "m",
        "n_threads": 2,
        "type_k": "f16",
        "type_v": "q8_0",
        "n_depth": 4096,
        "attention": "fasa",
        "budget": 1024,
        "n_fc": 16,
        "index_bits": None,
        "avg_ts": avg,
        "stddev_ts": stddev,
        **other,
    }


DENSE = {"attention": "dense", "budget": None, "n_fc": None}


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    """In the format that the name says."""
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    else:
        path.write_text({".csv": to_csv, ".json": to_json}[path.suffix](rows) + "\n")
    return path


@pytest.mark.parametrize("first", ["a.csv", "a.json", "a.jsonl"])
@pytest.mark.parametrize("second", ["b.csv", "b.json", "b.jsonl"])
def test_formats_are_joined(first: str, second: str, tmp_path: Path) -> None:
    """The same measurement is found again, whatever the files are and in whatever order."""
    a = write(tmp_path / first, [row(100, 2, **DENSE), row(400, 3)])
    b = write(tmp_path / second, [row(500, 4), row(101, 2, **DENSE)])
    table = compare(a, b).split("\n\n")[0].splitlines()
    cells = [[c.strip() for c in line.split("|")[1:-1]] for line in table[2:]]
    assert [c[-4:] for c in cells] == [
        ["100.00 ± 2.00", "101.00 ± 2.00", "1.010", "no"],
        ["400.00 ± 3.00", "500.00 ± 4.00", "1.250", "yes"],
    ]


@pytest.mark.parametrize(
    "field",
    ["model", "n_threads", "type_k", "type_v", "n_depth", "attention", "budget", "n_fc",
     "index_bits"],
)  # fmt: skip
def test_what_differs_is_not_joined(field: str) -> None:
    assert key_of(row(1)) == key_of(row(2, 3))
    assert key_of(row(1)) != key_of(row(1, **{field: "8"}))


def test_noise() -> None:
    """Three and four combine to five."""
    assert beyond_noise(Speed(100, 3), Speed(105, 4)) == "no"
    assert beyond_noise(Speed(100, 3), Speed(105.1, 4)) == "yes"
    assert beyond_noise(Speed(105.1, 4), Speed(100, 3)) == "yes"
    assert beyond_noise(Speed(100, 0), Speed(200, 4)) == ""


def test_rows_that_measured_the_same_are_taken_together() -> None:
    (found,) = speeds([row(100, 3), row(108, 3)], "x").values()
    assert found == Speed(104, 5)


def test_rows_of_one_file_only_are_told(tmp_path: Path) -> None:
    a = write(tmp_path / "a.csv", [row(1), row(2, n_depth=111)])
    b = write(tmp_path / "b.csv", [row(1), row(2, n_depth=222), row(3, n_depth=333)])
    both, only = compare(a, b).split("Only in A:")
    only_a, only_b = only.split("Only in B:")
    assert "111" not in both
    assert "n_depth 111" in only_a
    assert "222" not in only_a
    assert "n_depth 222" in only_b
    assert "n_depth 333" in only_b
    assert "Only in" not in compare(a, a)


def test_a_cut_off_line_is_left_out(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [row(1), row(2, n_depth=8)])
    path.write_text(path.read_text()[:-30])
    assert [r["avg_ts"] for r in read_rows(path)] == [1]


@pytest.mark.parametrize("name", ["decode-f16.csv", "cuda-q8_0.csv"])
def test_published_results_are_equal_to_themselves(name: str) -> None:
    """Files of before there was a column `model`; one repeats its dense rows."""
    text = compare(BENCH / name, BENCH / name)
    table = text.split("\n\n")[0].splitlines()[2:]
    assert len(table) >= 6
    assert {line.split("|")[-3].strip() for line in table} == {"1.000"}
    assert {line.split("|")[-2].strip() for line in table} == {"no"}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", ["holds no rows"]),
        ("some text\nwithout columns\n", ["lacks the columns", "avg_ts"]),
        ("[1, 2]", ["holds no rows"]),
        ('[{"n_depth": 1}]', ["lacks the columns", "budget"]),
        ("[{", ["is no result"]),
        ("{not json}", ["is no result"]),
    ],
)
def test_other_files_are_one_sentence(content: str, words: list[str], tmp_path: Path) -> None:
    good, bad = write(tmp_path / "good.csv", [row(1)]), tmp_path / "bad.csv"
    bad.write_text(content)
    result = CliRunner().invoke(app, ["bench", "compare", str(good), str(bad)])
    assert result.exit_code == 1
    assert result.stdout == ""
    for word in ["error: ", "bad.csv", *words]:
        assert word in result.stderr


def test_nothing_in_common_and_no_file(tmp_path: Path) -> None:
    a, b = write(tmp_path / "a.csv", [row(1)]), write(tmp_path / "b.csv", [row(1, n_depth=9)])
    with pytest.raises(ValueError, match=r"nothing in common.*n_depth 4096.*n_depth 9"):
        compare(a, b)
    with pytest.raises(ValueError, match="is no number"):
        compare(a, write(tmp_path / "c.csv", [row(1, avg_ts="fast")]))
    result = CliRunner().invoke(app, ["bench", "compare", str(a), str(tmp_path / "none.csv")])
    assert result.exit_code == 1
    assert "none.csv" in result.stderr
    assert CliRunner().invoke(app, ["bench", "compare", str(a)]).exit_code == 2
