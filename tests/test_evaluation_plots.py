"""Plots are written as PNG files that are large enough to read."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import pytest

from pyfasa import plotting
from pyfasa.errors import HostError
from pyfasa.evaluation import plots
from test_evaluation_results import FORCED, ROW, sparse


def size(path: Path) -> tuple[int, int]:
    head = path.read_bytes()[:24]
    assert head.startswith(b"\x89PNG")
    return struct.unpack(">II", head[16:24])  # type: ignore[return-value]


def rows() -> list[Any]:
    found = []
    for i in range(10):
        known = {"case": f"2000/0/{i}", "depth": (i + 0.5) / 10}
        found.append(sparse("oracle", 256, 128.0, **known))
        found += [sparse(f"quest:{p}", 256, 256 / p, **known) for p in (16, 32)]
        found.append(sparse("fasa", 64, 17.0, score=0.0, **known))
    for budget in (64, 256):
        found.append(
            sparse("fasa", budget, 17.0, task="kld", kld=(1 / budget,), n_steps=1, nll=1.0,
                   nll_dense=1.0, same_top=1.0, depth=None)
        )  # fmt: skip
    return [ROW, FORCED, *found]


def test_every_plot_that_there_is_data_for(tmp_path: Path) -> None:
    found = plots.save_all(rows(), tmp_path / "new")
    assert [path.name for path in found] == [
        "needle-depth-64.png", "needle-depth-256.png", "accuracy-needle-2000.png",
        "budget-needle-2000.png", "kld-2000.png",
    ]  # fmt: skip
    for path in found:
        width, height = size(path)
        assert width >= 780, path
        assert height >= 250, path


def test_no_accuracy_plot_of_a_single_size(tmp_path: Path) -> None:
    found = plots.save_all([ROW, sparse("fasa", 64, 17.0)], tmp_path)
    assert [path.name for path in found] == ["needle-depth-64.png"]


def test_lines_hold_the_figures_of_the_rows() -> None:
    from pyfasa.evaluation.results import summarize

    summaries = [s for s in summarize(rows()) if s.task == "needle"]
    figure = plots.accuracy_against_bytes(summaries)
    right = figure.axes[1]
    lines = {line.get_label(): line.get_xydata().tolist() for line in right.get_lines()}
    assert lines["quest"] == [[8.0, 100.0], [16.0, 100.0]]
    left = {line.get_label(): line.get_xydata().tolist() for line in figure.axes[0].get_lines()}
    assert left["fasa"] == [[17.0, 0.0]]


def test_accuracy_against_budget_holds_the_figures_of_the_rows() -> None:
    from pyfasa.evaluation.results import summarize

    more = [sparse("fasa", 256, 17.0, score=1.0, case="2000/0/0", depth=0.05)]
    figure = plots.accuracy_against_budget(
        [s for s in summarize(rows() + more) if s.task == "needle"]
    )
    lines = {line.get_label(): line.get_xydata().tolist() for line in figure.axes[0].get_lines()}
    assert lines["fasa"] == [[64.0, 0.0], [256.0, 100.0]]
    assert "dense" in lines


def test_speed_against_depth(tmp_path: Path) -> None:
    csv = tmp_path / "speed.csv"
    csv.write_text(
        "attention,budget,n_depth,avg_ts,type_k,type_v\n"
        "dense,,1000,614.3,f16,f16\nfasa,1024,1000,600,f16,f16\n"
        "dense,,8192,99,f16,f16\nfasa,1024,8192,503,f16,f16\n"
    )
    axis = plots.speed_against_depth(csv).axes[0]
    lines = {line.get_label(): line.get_xydata().tolist() for line in axis.get_lines()}
    assert lines == {
        "llama.cpp (dense)": [[1000.0, 614.3], [8192.0, 99.0]],
        "FASA, 1,024 tokens": [[1000.0, 600.0], [8192.0, 503.0]],
    }
    rows: list[dict[str, Any]] = [
        {"attention": "dense", "budget": None, "n_depth": 1000, "avg_ts": 614.3},
        {"attention": "fasa", "budget": 1024, "n_depth": 1000, "avg_ts": 600.0},
        {"attention": "dense", "budget": None, "n_depth": 8192, "avg_ts": 99.0},
        {"attention": "fasa", "budget": 1024, "n_depth": 8192, "avg_ts": 503.0},
    ]
    axis = plots.speed_against_depth(
        [row | {"type_k": "f16", "type_v": "f16"} for row in rows]
    ).axes[0]
    again = {line.get_label(): line.get_xydata().tolist() for line in axis.get_lines()}
    assert again == lines, "rows of pyfasa.benchmark are drawn as the file of them is"
    with pytest.raises(ValueError, match="what is given is no table of speeds"):
        plots.speed_against_depth([])
    csv.write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match=r"speed.csv is no table of speeds"):
        plots.speed_against_depth(csv)


def test_without_matplotlib_a_sentence(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(plotting, "find_spec", lambda name: None)
    for plot in (lambda: plots.save_all(rows(), tmp_path), lambda: plots.speed_against_depth("x")):
        with pytest.raises(HostError, match=r"pip install 'pyfasa\[plot\]'"):
            plot()
    assert not list(tmp_path.iterdir())
