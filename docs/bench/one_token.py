"""One decoded token of the bundled model, drawn: the scores of all cells, what is selected, the attention found.

python docs/bench/one_token.py MODEL

It asks for a fact in a document, takes the token after which the model says the first digit of the answer, and of all
heads the one that looks most at that digit. Writes docs/images/one-token.png and one-token-heads.png, and
docs/bench/one-token.csv with the attention mass of every head. A minute on two cores.
"""

from __future__ import annotations

import csv
import sys
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from pyfasa import Llama, reference
from pyfasa.console import chat_tokens
from pyfasa.documents import ask, make_document
from pyfasa.identity import ModelIdentity
from pyfasa.machine import cpu
from pyfasa.plotting import COLOURS, DPI, GREY, dress, empty_figure, legend
from pyfasa.recall import Attention

if TYPE_CHECKING:
    from matplotlib.figure import Figure

HERE = Path(__file__).resolve().parent
IMAGES = HERE.parent / "images"
TOKENS, FACTS, SEED, BUDGET = 16_000, 40, 1, 1024
SINKS, RECENT = 4, 32

F64 = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Head:
    """One query head at the token: scores by the side index and exact ones, in the units of exact scores.

    scored, exact, weights (n_cell,)
    chosen, oracle (n_cell,) cells that are selected, and those of equal number with the best exact scores
    """

    layer: int
    head: int
    scored: F64
    exact: F64
    weights: F64
    chosen: Bools
    oracle: Bools
    threshold: float

    @property
    def found(self) -> float:
        return float(self.weights[self.chosen].sum())

    @property
    def possible(self) -> float:
        return float(self.weights[self.oracle].sum())


def where(tokens: list[int], part: list[int]) -> list[int]:
    """Where a run of tokens begins."""
    return [i for i in range(len(tokens)) if tokens[i : i + len(part)] == part]


def save(figure: Figure, path: Path) -> None:
    """As PNG of 64 colours, a third of the size."""
    from PIL import Image

    figure.savefig(path, dpi=DPI, bbox_inches="tight", facecolor="white")
    with Image.open(path) as image:
        small = image.convert("RGB").quantize(64, dither=Image.Dither.NONE)
    small.save(path, optimize=True)


def best(scores: F64, forced: Bools) -> tuple[Bools, float]:
    """BUDGET cells, the forced ones first; and the score of the last that was taken for its score."""
    ranked = np.where(forced, np.inf, scores)
    chosen = np.zeros(len(scores), bool)
    chosen[reference.select(ranked, BUDGET)] = True
    return chosen, float(scores[chosen & ~forced].min())


def heads(llm: Llama, queries: list[np.ndarray], keys: list[np.ndarray]) -> list[Head]:
    """Every query head of every layer; queries (n_head, head_dim), keys (n_cell, n_head_kv, head_dim)."""
    profile = llm.fasa.profile
    assert profile is not None
    assert profile.center is not None
    assert profile.scale is not None
    model = profile.identity
    dims = reference.chunk_dims(model.head_dim, model.n_rot, model.rope)
    group, unit = model.n_head // model.n_head_kv, model.head_dim**-0.5
    found = []
    for layer, (q, k) in enumerate(zip(queries, keys, strict=True)):
        n_cell = len(k)
        cell = np.arange(n_cell)
        forced = (cell < SINKS) | (cell >= n_cell - RECENT)
        for kv in range(model.n_head_kv):
            center, scale = profile.center[layer, kv], profile.scale[layer, kv]
            chunks = profile.chunks[layer, kv, : profile.n_fc]
            bits = profile.bits[layer, kv, : profile.n_fc]
            own = np.ascontiguousarray(k[:, kv])
            rows = reference.index_rows(own, dims, chunks, bits, center, scale)
            exact = Attention.of(
                q[None, kv * group : (kv + 1) * group], own, np.array([n_cell])
            ).weights
            for g in range(group):
                query = q[kv * group + g]
                # the center shifts all scores alike; with it they are in the units of exact ones
                scored = (reference.score(query, rows, scale) + query @ center) * unit
                logits = (own @ query).astype(np.float64) * unit
                chosen, threshold = best(scored, forced)
                oracle, _ = best(logits, forced)
                weights = exact[g].astype(np.float64)
                found.append(
                    Head(layer, kv * group + g, scored, logits, weights, chosen, oracle, threshold)
                )
    return found


def draw(head: Head, fact: range, path: Path) -> None:
    """Three steps of one head, one above the other; `fact` are the cells of the digits asked for."""
    n_cell = len(head.scored)
    figure = empty_figure(9.0, 8.4)
    score, select, attend = figure.subplots(3, 1, height_ratios=(1, 1.15, 1))
    cell = np.arange(n_cell)
    rest = ~head.chosen
    dots = {"s": 2.5, "linewidths": 0, "rasterized": True}
    share = f"{int(head.chosen.sum()):,} of {n_cell:,} tokens"

    score.scatter(cell[rest], head.scored[rest], c="#b5b5b5", label="other tokens", **dots)
    score.scatter(
        cell[head.chosen], head.scored[head.chosen], c=COLOURS[0], label="selected", **dots
    )
    score.axhline(head.threshold, color=COLOURS[1], linewidth=1.2, label="threshold")
    score.set_title("1. score: every token in the cache, from its entry in the side index")
    score.set_xlabel("token")
    score.set_ylabel("score by the index")

    select.scatter(head.scored[rest], head.exact[rest], c="#b5b5b5", **dots)
    select.scatter(head.scored[head.chosen], head.exact[head.chosen], c=COLOURS[0], **dots)
    select.axvline(head.threshold, color=COLOURS[1], linewidth=1.2)
    select.set_title(f"2. select: {share}, all above the threshold, and the first and last ones")
    select.set_xlabel("score by the index")
    select.set_ylabel("exact score")

    for mask, colour in ((rest, "#b5b5b5"), (head.chosen, COLOURS[0])):
        attend.vlines(
            cell[mask], 1e-9, head.weights[mask], color=colour, linewidth=0.7, rasterized=True
        )
    attend.set_yscale("log")
    attend.set_ylim(1e-7, 8)
    attend.set_title(
        f"3. attend: to the selected alone; they carry {100 * head.found:.2f} % of the attention"
    )
    attend.set_xlabel("token")
    attend.set_ylabel("exact attention weight")

    star = {"c": COLOURS[4], "marker": "*", "s": 90, "edgecolors": "black", "linewidths": 0.6}
    at = [i for i in fact if head.chosen[i]]
    score.scatter(at, head.scored[at], label="the digits asked for", zorder=5, **star)
    select.scatter(head.scored[at], head.exact[at], zorder=5, **star)
    attend.scatter(at, head.weights[at], zorder=5, **star)
    for axis in (score, attend):
        axis.set_xlim(-n_cell * 0.01, n_cell * 1.01)
        axis.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    for axis in (score, select, attend):
        dress(axis)
    entries = score.legend(
        loc="lower center", bbox_to_anchor=(0.5, 1.12), ncols=4, frameon=False, fontsize=9
    )
    for handle in entries.legend_handles[:2]:
        handle.set_sizes([30])
    save(figure, path)


def draw_heads(found: list[Head], path: Path) -> None:
    """Attention found by every head, beside the most that the budget allows."""
    figure = empty_figure(9.0, 3.2)
    axis = figure.subplots()
    n_head = max(head.head for head in found) + 1
    x = np.array([head.layer + (head.head - (n_head - 1) / 2) / n_head * 0.8 for head in found])
    mass, most = (100 * np.array([getattr(h, n) for h in found]) for n in ("found", "possible"))
    axis.vlines(x, mass, most, color="#bbbbbb", linewidth=1)
    axis.scatter(x, most, c="black", marker="_", s=32, linewidths=1.2, label="exact scores")
    axis.scatter(x, mass, c=COLOURS[0], s=14, linewidths=0, label="the side index")
    axis.set_xticks(range(found[-1].layer + 1))
    axis.set_xlabel(f"layer, with {n_head} query heads each")
    axis.set_ylabel("attention found [%]")
    axis.set_ylim(min(mass.min(), most.min()) // 10 * 10, 101.5)
    for edge in range(found[-1].layer):
        axis.axvline(edge + 0.5, color="#eeeeee", linewidth=0.8, zorder=0)
    share = f"{BUDGET:,} of {len(found[0].scored):,} tokens"
    axis.set_title(f"the same token in all heads: attention on {share}")
    dress(axis)
    axis.title.set_color(GREY)
    legend(figure, [axis])
    save(figure, path)


def main() -> None:
    threads = cpu().cores
    llm = Llama(
        sys.argv[1], n_ctx=TOKENS + 512, n_threads=threads, n_threads_batch=threads, verbose=False
    )
    with closing(llm):
        document = make_document(
            lambda text: llm.tokenize(text.encode(), add_bos=False), TOKENS, FACTS, seed=SEED
        )
        middle = [f for f in document.facts if f.form == "code" and f.position > TOKENS // 4]
        fact = middle[0]
        tokens = chat_tokens(llm, ask(fact.question, document.text)[0]["content"])
        digits = llm.tokenize(fact.value.encode(), add_bos=False)
        (start,) = where(tokens, digits)
        answer = llm.tokenize(fact.answer.encode(), add_bos=False)
        (said,) = where(answer, digits)
        tokens += answer[:said]
        llm.eval(tokens[:-1])
        with llm.fasa.capturing() as session:
            session.captured_clear()
            llm.eval(tokens[-1:])
            layers = range(ModelIdentity.read(sys.argv[1]).n_layer)
            queries = [session.captured(layer)[-1] for layer in layers]
            keys = [session.keys(layer, 0, len(tokens)) for layer in layers]
        assert llm.sample(temp=0.0, repeat_penalty=1.0) == digits[0]  # it knows
        found = heads(llm, queries, keys)
    asked = range(start, start + len(digits))
    shown = max(found, key=lambda head: head.weights[list(asked)].sum())
    IMAGES.mkdir(exist_ok=True)
    draw(shown, asked, IMAGES / "one-token.png")
    draw_heads(found, IMAGES / "one-token-heads.png")
    with open(HERE / "one-token.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(
            ["n_cell", "budget", "layer", "head", "shown", "found", "possible", "asked"]
        )
        for head in found:
            values = (head.found, head.possible, head.weights[list(asked)].sum())
            writer.writerow(
                [
                    len(tokens),
                    BUDGET,
                    head.layer,
                    head.head,
                    int(head is shown),
                    *(f"{v:.4f}" for v in values),
                ]
            )


if __name__ == "__main__":
    main()
