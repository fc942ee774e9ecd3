"""Sums up the results files of `make selection` into docs/bench/selection.csv and the plots of docs/selection.md.

    python docs/bench/selection.py RESULTS.jsonl..

A file whose name has "outliers" in it is of the model with outlier channels.
"""

from __future__ import annotations

import csv
import sys
from pathlib import Path

from pyfasa.evaluation import plots
from pyfasa.evaluation.results import Row, Summary, read_rows, summarize

HERE = Path(__file__).resolve().parent
IMAGES = HERE.parent / "images"
COLUMNS = (
    "task", "n_tokens", "name", "budget", "bytes_per_cell", "n", "score", "as_dense", "attended",
    "mean_kld", "median_kld", "p99_kld", "ppl_ratio",
)  # fmt: skip
PLOTTED = (
    "allocation",
    "variance",
    "greedy",
    "agreement",
    "quest",
    "sparq",
    "double-sparsity",
    "random",
    "oracle",
)


def write(models: dict[str, list[Summary]]) -> None:
    with open(HERE / "selection.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["model", *COLUMNS])
        for model, summaries in models.items():
            for one in summaries:
                values = [getattr(one, name) for name in COLUMNS]
                writer.writerow(
                    [model, *(f"{v:.6g}" if isinstance(v, float) else v for v in values)]
                )


def plot(summaries: list[Summary]) -> None:
    IMAGES.mkdir(exist_ok=True)
    wanted = [s for s in summaries if s.budget is None or s.name.split(":")[0] in PLOTTED]
    for task in ("needle", "mass"):
        for n_tokens in dict.fromkeys(s.n_tokens for s in wanted if s.task == task):
            own = [s for s in wanted if (s.task, s.n_tokens) == (task, n_tokens)]
            figure = plots.accuracy_against_bytes(own)
            figure.savefig(IMAGES / f"{task}-{n_tokens}.png", dpi=90, bbox_inches="tight")
    names = (
        "dense",
        "oracle",
        "allocation:6",
        "allocation:10",
        "allocation:20",
        "quest:26",
        "quest:13",
        "sparq:5",
        "double-sparsity:16",
    )
    own = [s for s in summaries if (s.task, s.n_tokens) == ("needle", 8000) and s.name in names]
    if own:
        plots.accuracy_against_budget(own).savefig(
            IMAGES / "budget.png", dpi=90, bbox_inches="tight"
        )
    texts = [s for s in summaries if s.task == "kld"]
    if texts:
        plots.kld_against_budget(texts).savefig(IMAGES / "kld.png", dpi=90, bbox_inches="tight")


def main() -> None:
    rows: dict[str, dict[tuple[object, ...], Row]] = {"bundled": {}, "outliers": {}}
    for path in sys.argv[1:]:
        model = "outliers" if "outliers" in Path(path).name else "bundled"
        rows[model] |= {row.key: row for row in read_rows(path)}
    models = {model: summarize(own.values()) for model, own in rows.items()}
    write(models)
    plot(models["bundled"])


if __name__ == "__main__":
    main()
