"""`pyfasa inspect --plot`: what a profile says, drawn: importance of chunks, attention found, bytes of the index."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from pyfasa.console import human_bytes, percent
from pyfasa.plotting import COLOURS, GREY, HEAT, dress, empty_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from pyfasa.profile import Profile

F64 = npt.NDArray[np.float64]

LABELLED = 48  # rows of the heat map up to which each has its label; more: only the layers
LAYERS = 40  # of which so many have a label
MARK = "#D55E00"  # of chunks in use; stands out from all of the heat map
NOWHERE = "#e9e9e9"  # chunks without a rank, heads that were never seen
AREAS = {1: 0.06, 2: 0.14, 4: 0.3, 8: 0.6}  # bits -> area of the mark, in parts of its cell
N_CELLS = 32768  # for which the memory is told


def profile_figure(profile: Profile) -> Figure:
    """Importance of chunks left; attention found, and bytes per token, right. Raises HostError without matplotlib."""
    n_row = profile.identity.n_layer * profile.identity.n_head_kv
    height = min(max(5.6, 0.2 * n_row), 12.0)
    figure = empty_figure(13.0, height)
    grid = figure.add_gridspec(2, 2, width_ratios=(1.25, 1))
    heat, found, cost = (figure.add_subplot(part) for part in (grid[:, 0], grid[0, 1], grid[1, 1]))
    _draw_importance(heat, profile, height)
    _draw_recall(found, profile)
    _draw_cost(cost, profile)
    for axis in (heat, found, cost):
        dress(axis)
    heat.grid(visible=False)
    title = (
        f"{profile.identity.name}: {profile.n_fc} of {profile.n_ranked} chunks, by {profile.method}"
    )
    figure.suptitle(title, fontsize=11)
    return figure


def importance_by_chunk(profile: Profile) -> F64 | None:
    """Importance [n_layer, n_head_kv, head_dim / 2], by chunk id, of the best chunk of the head; None if not known.

    NaN: a chunk without a rank, or a head without importance.
    """
    if profile.importance is None:
        return None
    best = profile.importance.max(axis=2, keepdims=True).astype(np.float64)
    known = best > 0
    share = np.where(known, profile.importance / np.where(known, best, 1), np.nan)
    return _by_chunk(profile, share)


def bits_by_chunk(profile: Profile) -> F64:
    """Bits in use [n_layer, n_head_kv, head_dim / 2], by chunk id; 0: not in use."""
    used = np.where(np.arange(profile.n_ranked) < profile.n_fc, profile.bits, 0)
    return np.nan_to_num(_by_chunk(profile, used))


def _by_chunk(profile: Profile, values: npt.NDArray[np.floating | np.integer]) -> F64:
    """Values of ranks [n_layer, n_head_kv, n_ranked] at the ids of their chunks; NaN: a chunk without a rank."""
    n_chunk = profile.identity.head_dim // 2
    # Ranks that are not in use may hold any id: one more column takes those that no head has.
    found = np.full((*values.shape[:2], n_chunk + 1), np.nan)
    ids = np.minimum(profile.chunks, n_chunk).astype(np.int64)
    # from the worst to the best, so that the first of equal ids stays
    np.put_along_axis(found, ids[..., ::-1], values[..., ::-1].astype(np.float64), axis=2)
    return found[..., :n_chunk]


def _draw_importance(axis: Axes, profile: Profile, height: float) -> None:
    """A row per layer and KV head, a column per chunk."""
    model = profile.identity
    n_chunk = model.head_dim // 2
    n_row = model.n_layer * model.n_head_kv
    share = importance_by_chunk(profile)
    axis.set_title("chunk importance" + ("" if share is not None else ": not in this profile"))
    axis.set_xlabel("frequency chunk, from high to low frequency")
    axis.set_facecolor(NOWHERE)
    axis.set_xlim(-0.5, n_chunk - 0.5)
    axis.set_ylim(n_row - 0.5, -0.5)
    if share is not None:
        image = axis.imshow(
            100 * share.reshape(n_row, n_chunk),
            cmap=HEAT, vmin=0, vmax=100, aspect="auto", interpolation="nearest",
        )  # fmt: skip
        bar = axis.figure.colorbar(image, ax=axis, aspect=40, pad=0.02, location="left")
        bar.set_label("importance, of the best chunk of the row [%]", fontsize=9)
        bar.ax.tick_params(labelsize=8)
        bar.outline.set_visible(False)
    bits = bits_by_chunk(profile).reshape(n_row, n_chunk)
    cell = min(5.2 * 72 / n_chunk, 0.8 * height * 72 / n_row)  # points, about
    for width in (1, 2, 4, 8):
        rows, columns = np.nonzero(bits == width)
        if len(rows):
            size = max(AREAS[width] * cell**2, 0.25)
            axis.scatter(
                columns, rows, s=size, c=MARK, marker="s", linewidths=0,
                label=f"in use, {width} bit{'s' if width > 1 else ''} per dim",
            )  # fmt: skip
    if bits.any():
        axis.legend(
            loc="upper center", bbox_to_anchor=(0.5, -0.5 / height - 0.01), ncols=4, frameon=False,
            fontsize=8, markerscale=max(1.0, 9 / cell), handletextpad=0.2,
        )  # fmt: skip
    if model.n_rot < model.head_dim:  # chunks that RoPE does not turn have no frequency
        axis.axvline(model.n_rot / 2 - 0.5, color="white", linewidth=1.5, linestyle="--")
    _label_rows(axis, model.n_layer, model.n_head_kv)


def _label_rows(axis: Axes, n_layer: int, n_head_kv: int) -> None:
    for layer in range(1, n_layer) if n_head_kv > 1 else ():
        axis.axhline(layer * n_head_kv - 0.5, color="white", linewidth=0.6)
    if n_layer * n_head_kv <= LABELLED:
        names = [f"{layer}.{head}" for layer in range(n_layer) for head in range(n_head_kv)]
        axis.set_yticks(range(len(names)), names)
        axis.set_ylabel("layer.KV head")
    else:
        layers = np.arange(0, n_layer, -(-n_layer // LAYERS))
        middle = layers * n_head_kv + (n_head_kv - 1) / 2
        axis.set_yticks(list(middle), [str(layer) for layer in layers])
        axis.set_ylabel(f"layer, with {n_head_kv} KV heads each" if n_head_kv > 1 else "layer")


def _draw_recall(axis: Axes, profile: Profile) -> None:
    """Attention mass that the index finds, and that exact scores find."""
    axis.set_title("attention found on 1/16 of the tokens, held-back rows")
    axis.set_xlabel("layer")
    if profile.recall is None or profile.oracle is None:
        axis.text(
            0.5, 0.5,
            "This profile does not say what it finds;\n`pyfasa calibrate` makes one that does.",
            ha="center", va="center", transform=axis.transAxes, fontsize=9, color=GREY,
        )  # fmt: skip
        axis.set_xticks([])
        axis.set_yticks([])
        return
    n_layer, n_head = profile.recall.shape
    offsets = (np.arange(n_head) - (n_head - 1) / 2) / max(n_head, 4) * 0.85
    x = np.arange(n_layer)[:, None] + offsets
    known = profile.oracle > 0  # else the head was never seen
    found, most = 100 * profile.recall[known], 100 * profile.oracle[known]
    axis.vlines(x[known], found, most, color="#bbbbbb", linewidth=1)
    size = float(np.clip(1200 / max(x.size, 1), 5, 28))
    axis.scatter(
        x[known], most, s=size, c="black", marker="_", linewidths=1.2, label="exact scores"
    )
    axis.scatter(x[known], found, s=size, c=COLOURS[0], linewidths=0, label="this index")
    low = min(found.min(initial=100), most.min(initial=100))
    axis.set_ylim(max(0.0, low - 5) // 10 * 10, 101.5)
    axis.set_xlim(-0.6, n_layer - 0.4)
    step = -(-n_layer // 16)
    axis.set_xticks(range(0, n_layer, step))
    for edge in np.arange(n_layer - 1) + 0.5 if n_head > 1 else ():
        axis.axvline(edge, color="#f0f0f0", linewidth=0.8, zorder=0)
    axis.set_xlabel("layer" if n_head == 1 else f"layer, with {n_head} KV heads each")
    axis.set_ylabel("attention mass [%]")
    axis.legend(loc="lower right", fontsize=8, framealpha=0.9, edgecolor="none", ncols=2)
    if found.size:
        axis.set_title(
            f"attention found on 1/16 of the tokens: {found.mean():.0f} % "
            f"(exact scores {most.mean():.0f} %)"
        )


def _draw_cost(axis: Axes, profile: Profile) -> None:
    """Bytes of one cached token, which are both kept and read, at each n_fc."""
    from matplotlib.ticker import MaxNLocator

    model = profile.identity
    kv = model.n_layer * model.n_head_kv * model.head_dim * 2 * 2  # K and V in f16
    n_used = int((profile.bits > 0).sum(axis=2).max())
    sizes = [int(profile.bytes_per_cell(n).sum()) for n in range(1, n_used + 1)]
    axis.set_title("index: no layer has one")
    axis.set_xlabel("n_fc [chunks]; kept and read, over all layers and KV heads")
    axis.set_ylabel("index [bytes per token]")
    if not sizes:
        return
    own = int(profile.bytes_per_cell().sum())
    axis.plot(range(1, n_used + 1), sizes, color=COLOURS[0], marker="o", markersize=3.5)
    n_fc = min(profile.n_fc, n_used)
    axis.plot([n_fc], [own], color=MARK, marker="s", markersize=8, label=f"this profile: {own:,}")
    axis.set_title(
        f"index: {percent(own / kv)} of f16 K and V, {human_bytes(own * N_CELLS)} for {N_CELLS:,} tokens"
    )
    axis.set_ylim(0, 1.08 * max(sizes))
    axis.set_xlim(0, n_used + 0.5)
    axis.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    share = axis.twinx()
    share.set_ylim(*(100 * size / kv for size in axis.get_ylim()))
    share.set_ylabel("of f16 K and V [%]", fontsize=10)
    share.tick_params(length=3, labelsize=9)
    share.spines[["top", "right"]].set_visible(False)
    axis.legend(loc="lower right", frameon=False, fontsize=8)
