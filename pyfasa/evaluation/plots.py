"""Plots of an evaluation and of a benchmark, as PNG of 800 x 500 pixels or more. Needs matplotlib."""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pyfasa.evaluation.results import Row, Summary, summarize
from pyfasa.evaluation.teacher import TASKS as TEACHER_TASKS
from pyfasa.plotting import COLOURS, GREY, HEAT, MARKERS, check, grid_figure, legend
from pyfasa.plotting import save as save_png

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DEPTHS = 10  # rows of a needle grid
# Methods have a look of their own, whatever else is in the plot.
_METHODS = (
    "fasa",
    "allocation",
    "variance",
    "quest",
    "agreement",
    "sparq",
    "greedy",
    "double-sparsity",
)
_CONTROLS = {
    "oracle": "#000000",
    "random": "#9A9A9A",
    "streaming": "#555555",
    "lowfreq": "#BDB08C",
    "snapkv": "#7F7FBF",
    "h2o": "#BF7F7F",
}


def save_all(rows: Sequence[Row], folder: str | Path) -> list[Path]:
    """Every plot that the rows have data for; returns the files.

    <task>-depth-<b>.png      what was found at a budget, length x depth, a panel per setting
    accuracy-<task>-<n>.png   score against index bytes, a line per method, a panel per budget; with two sizes or more
    budget-<task>-<n>.png     score against budget, a line per setting; with two budgets or more
    kld-<n>.png               mean KLD against budget, a line per setting
    """
    check()
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    found: list[Path] = []

    def save(name: str, figure: Figure) -> None:
        path = folder / f"{name}.png"
        save_png(figure, path)
        found.append(path)

    summaries = summarize(rows)
    for task in dict.fromkeys(row.task for row in rows if row.depth is not None):
        own = [row for row in rows if row.task == task]
        budgets = sorted({row.budget for row in own if row.budget is not None})
        for budget in (*budgets,) or (None,):
            chosen = [row for row in own if row.budget in (None, budget)]
            save(f"{task}-depth-{budget}" if budget else f"{task}-depth", needle_grid(chosen))
    for task, n_tokens in dict.fromkeys((s.task, s.n_tokens) for s in summaries):
        group = [s for s in summaries if (s.task, s.n_tokens) == (task, n_tokens)]
        name = f"{task}-{n_tokens}" if n_tokens else task
        if task == "kld":
            save(name, kld_against_budget(group))
        if task in TEACHER_TASKS:
            continue
        if len({s.bytes_per_cell or 0 for s in group if s.name != "oracle"}) > 2:
            save(f"accuracy-{name}", accuracy_against_bytes(group))
        if len({s.budget for s in group if s.budget is not None}) > 1:
            save(f"budget-{name}", accuracy_against_budget(group))
    return found


def needle_grid(rows: Sequence[Row]) -> Figure:
    """Share found by length and depth of the fact, a panel per setting. rows: of one task, with depths."""
    settings = _ordered(rows)
    lengths = sorted({row.n_tokens for row in rows})
    n_columns = min(4, len(settings))
    n_lines = -(-len(settings) // n_columns)
    figure, axes = grid_figure(
        n_lines, n_columns, width=max(7.4, 2.3 * n_columns), height=2.5 * n_lines + 0.4
    )
    for axis, setting in zip(axes, settings, strict=False):
        grid = np.full((DEPTHS, len(lengths)), np.nan)
        for line, column in np.ndindex(grid.shape):
            scores = [
                row.score for row in rows
                if row.setting == setting and row.n_tokens == lengths[column]
                and min(int((row.depth or 0) * DEPTHS), DEPTHS - 1) == line
            ]  # fmt: skip
            if scores:
                grid[line, column] = np.mean(scores)
        image = axis.imshow(100 * grid, cmap=HEAT, vmin=0, vmax=100, aspect="auto")
        mean = np.mean([row.score for row in rows if row.setting == setting])
        axis.set_title(f"{setting}\n{100 * mean:.0f} %", fontsize=9)
        axis.set_xticks(range(len(lengths)), [f"{n:,}" for n in lengths])
        axis.set_yticks([-0.5, DEPTHS / 2 - 0.5, DEPTHS - 0.5], ["0", "50", "100"])
        axis.grid(visible=False)
        axis.spines[:].set_visible(False)
    for axis in axes[len(settings) :]:
        axis.set_visible(False)
    for i, axis in enumerate(axes[: len(settings)]):
        axis.set_ylabel("depth of the fact [%]" if i % n_columns == 0 else "")
        axis.set_xlabel("document [tokens]" if i + n_columns >= len(settings) else "")
    bar = figure.colorbar(image, ax=list(axes), shrink=0.9 / n_lines, aspect=18, pad=0.02)
    bar.set_label("found [%]")
    bar.outline.set_visible(False)
    return figure


def accuracy_against_bytes(summaries: Sequence[Summary]) -> Figure:
    """Score against index bytes, a line per method, a panel per budget. summaries: of one task and length."""
    budgets = sorted({s.budget for s in summaries if s.budget is not None})
    figure, axes = grid_figure(
        1, len(budgets), width=max(7.4, 3.6 * len(budgets) + 1.6), height=3.9
    )
    dense = [s for s in summaries if s.budget is None]
    for axis, budget in zip(axes, budgets, strict=True):
        own = [s for s in summaries if s.budget == budget]
        for s in dense:
            axis.axhline(100 * s.score, color=GREY, linewidth=1, linestyle="--", label="dense")
        for s in own:
            if s.name == "oracle":
                axis.axhline(
                    100 * s.score, color="black", linewidth=1, linestyle=":", label="oracle"
                )
        for method in dict.fromkeys(_method(s) for s in own if s.name != "oracle"):
            line = [(s.bytes_per_cell or 0.0, 100 * s.score) for s in own if _method(s) == method]
            axis.plot(*zip(*sorted(line), strict=True), label=method, **_style(method))
        axis.set_title(f"budget {budget:,} tokens")
        axis.set_xlabel("index [bytes per token and KV head]")
        axis.set_ylim(-3, 103)
        axis.set_xlim(left=-0.5)
    axes[0].set_ylabel("score [%]")
    legend(figure, axes)
    return figure


def kld_against_budget(summaries: Sequence[Summary]) -> Figure:
    """Mean KLD to dense against budget, a line per setting, both logarithmic. summaries: of one length."""
    figure, axis = _against_budget(summaries, lambda s: max(s.mean_kld, 1e-9))
    axis.set_yscale("log")
    axis.minorticks_off()
    axis.set_ylabel("mean KLD to dense [nats]")
    legend(figure, [axis])
    return figure


def accuracy_against_budget(summaries: Sequence[Summary]) -> Figure:
    """Score against budget, a line per setting, dense as a level. summaries: of one task and length."""
    figure, axis = _against_budget(summaries, lambda s: 100 * s.score)
    for s in summaries:
        if s.budget is None:
            axis.axhline(100 * s.score, color=GREY, linewidth=1, linestyle="--", label="dense")
    axis.minorticks_off()
    axis.set_ylim(-3, 103)
    axis.set_ylabel("score [%]")
    legend(figure, [axis])
    return figure


def _against_budget(
    summaries: Sequence[Summary], value: Callable[[Summary], float]
) -> tuple[Figure, Axes]:
    """Sizes of one method share its colour; the more bytes, the more solid the line."""
    figure, (axis,) = grid_figure(1, 1, width=7.4, height=4.2)
    sparse = [s for s in summaries if s.budget is not None]
    budgets = sorted({s.budget for s in sparse if s.budget is not None})
    for name in dict.fromkeys(s.name for s in sparse):
        own = [s for s in sparse if s.name == name]
        sizes = sorted({s.bytes_per_cell or 0.0 for s in sparse if _method(s) == _method(own[0])})
        rank = len(sizes) - 1 - sizes.index(own[0].bytes_per_cell or 0.0)
        style = _style(name) | (
            {"linestyle": ("-", "--", ":")[min(rank, 2)]} if len(sizes) > 1 else {}
        )
        line = [(s.budget, value(s)) for s in own]
        axis.plot(*zip(*sorted(line), strict=True), label=name, **style)
    axis.set_xscale("log", base=2)
    axis.set_xticks(budgets, [f"{b:,}" for b in budgets])
    axis.set_xlabel("budget [tokens per query head]")
    return figure, axis


def speed_against_depth(source: Sequence[Mapping[str, Any]] | str | Path) -> Figure:
    """Decoded tokens per second against tokens in the cache, a line per budget and K/V type.

    source: rows of ``pyfasa.benchmark.bench``, or a file that `pyfasa bench -o csv` wrote.

    Raises ValueError for a file or rows that are not such; HostError without matplotlib.
    """
    check()
    rows, name = source, "what is given"
    if isinstance(rows, (str, Path)):
        name = str(rows)
        with open(rows, newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
    # dense rows have no budget: None in rows, nothing between the commas in a file
    columns = ("attention", "n_depth", "avg_ts", "type_k", "type_v")
    if not rows or "budget" not in rows[0] or any(rows[0].get(c) is None for c in columns):
        raise ValueError(f"{name} is no table of speeds; make it with pyfasa bench -o csv")
    lines: dict[str, list[tuple[int, float]]] = {}
    several = len({(row["type_k"], row["type_v"]) for row in rows}) > 1
    for row in rows:
        name = f"FASA, {int(row['budget']):,} tokens" if row["budget"] else "llama.cpp (dense)"
        if several:
            name += f", {row['type_k']}/{row['type_v']}"
        lines.setdefault(name, []).append((int(row["n_depth"]), float(row["avg_ts"])))
    figure, (axis,) = grid_figure(1, 1, width=7.4, height=4.2)
    for i, (name, line) in enumerate(lines.items()):
        colour = COLOURS[i % len(COLOURS)]
        axis.plot(
            *zip(*sorted(line), strict=True),
            label=name,
            color=colour,
            marker=MARKERS[i % len(MARKERS)],
        )
    axis.set_ylim(bottom=0)
    axis.set_xlim(left=0)
    axis.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axis.set_xlabel("tokens in the cache")
    axis.set_ylabel("decoding [tokens per second]")
    legend(figure, [axis])
    return figure


# ---- look ---------------------------------------------------------------------------------------


def _style(name: str) -> dict[str, Any]:
    """Of a method: coloured and solid; of a control, or one of the user's own: dashed."""
    method = name.split(":")[0]
    names = (*_METHODS, *_CONTROLS)
    rank = names.index(method) if method in names else sum(method.encode())
    return {
        "color": _CONTROLS.get(method, COLOURS[rank % len(COLOURS)]),
        "marker": MARKERS[rank % len(MARKERS)],
        "markersize": 6,
        "linewidth": 2 if method == "fasa" else 1.5,
        "linestyle": "-" if method in _METHODS else "--",
        "clip_on": False,
    }


def _method(summary: Summary) -> str:
    return summary.name.split(":")[0]


def _ordered(rows: Sequence[Row]) -> list[str]:
    """Labels of the settings, as in the tables."""
    found = sorted(summarize(rows), key=lambda s: s.order)
    return list(dict.fromkeys(s.setting for s in found if not math.isnan(s.score)))
