"""The look of every plot, and whether plots can be drawn. Needs matplotlib, which is loaded when it is used.

The colours are those of Okabe and Ito, which colour-blind readers can tell apart; lines also differ in their markers.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pyfasa.errors import HostError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#6B6B6B", "#8C5E2A")
MARKERS = "osD^vPX*<>"
GREY = "#444444"
HEAT = "cividis"  # the colour map of every heat map
DPI = 110


def check() -> None:
    """Raises HostError with the way out where matplotlib is missing."""
    if find_spec("matplotlib") is None:
        raise HostError(
            "Plots need matplotlib, which is not installed; run: pip install 'pyfasa[plot]'"
        )


def check_output(path: Path) -> None:
    """Before the work: HostError without matplotlib, ValueError where no PNG can be written."""
    check()
    if path.suffix.lower() != ".png":  # also keeps a model from being replaced by its plot
        raise ValueError(f"the plot {path} is a PNG file; give a name that ends in .png")
    if not path.parent.is_dir():
        raise ValueError(
            f"the plot {path} needs the folder {path.parent}, which does not exist; make it, or "
            "name another"
        )


def empty_figure(width: float, height: float) -> Figure:
    """A figure of so many inches, without a window."""
    check()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def grid_figure(
    n_lines: int, n_columns: int, width: float, height: float
) -> tuple[Figure, list[Axes]]:
    """A figure of so many inches, and its panels line by line."""
    figure = empty_figure(width, height)
    axes = list(figure.subplots(n_lines, n_columns, squeeze=False).flat)
    for axis in axes:
        dress(axis)
    return figure, axes


def dress(axis: Axes) -> None:
    """Gives a panel the look."""
    axis.spines[["top", "right"]].set_visible(False)
    axis.tick_params(length=3, labelsize=9)
    axis.title.set_fontsize(10)
    axis.xaxis.label.set_fontsize(10)
    axis.yaxis.label.set_fontsize(10)
    axis.grid(axis="y", color="#e6e6e6", linewidth=0.8)
    axis.set_axisbelow(True)


def legend(figure: Figure, axes: Sequence[Axes]) -> None:
    """One legend to the right of all panels."""
    entries: dict[str, Any] = {}
    for axis in axes:
        handles, labels = axis.get_legend_handles_labels()
        entries |= dict(zip(labels, handles, strict=True))
    figure.legend(
        list(entries.values()), list(entries), loc="outside right center", frameon=False, fontsize=9
    )


def save(figure: Figure, path: Path) -> None:
    """As PNG; a plot that is there is replaced."""
    figure.savefig(path, dpi=DPI, bbox_inches="tight", facecolor="white")
