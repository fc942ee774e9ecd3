"""Writes the tables of README.md and docs/benchmarks.md from the CSV files in this folder.

`make bench`, `make layouts` and `make selection` make the data and then call this script. A table stands between two
comment lines,
`<!-- NAME:begin -->` and `<!-- NAME:end -->`; everything between them is replaced.
"""

from __future__ import annotations

import csv
import re
import statistics
import textwrap
from collections.abc import Iterator
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
STAGES = ("index", "score", "select", "attend", "wait", "plan", "rest")
RANDOM_8B_LAYERS = 32  # of the model that tests/gpu/random_gguf.py makes


def read(name: str) -> list[dict[str, str]]:
    path = HERE / name
    if not path.exists():
        return []
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def markdown(header: list[str], rows: list[list[str]]) -> str:
    rule = "|" + "|".join("---" if i == 0 else "---:" for i in range(len(header))) + "|"
    return "\n".join("| " + " | ".join(row) + " |" if row else rule for row in [header, [], *rows])


def number(text: str) -> float:
    return float(text or 0)


def pairs() -> list[tuple[dict[str, str], dict[str, str]]]:
    """(dense, fasa) rows of the same run and depth."""
    found = []
    for kv_type in ("f16", "q8_0"):
        rows = read(f"decode-{kv_type}.csv")
        dense = {row["n_depth"]: row for row in rows if row["attention"] == "dense"}
        found += [(dense[r["n_depth"]], r) for r in rows if r["attention"] == "fasa"]
    return found


def decode_table() -> str:
    rows = [
        [
            f"{int(fasa['n_depth']):,}",
            fasa["type_k"],
            f"{number(dense['avg_ts']):.1f}",
            f"{number(fasa['avg_ts']):.1f}",
            f"**{number(fasa['avg_ts']) / number(dense['avg_ts']):.1f} x**",
            f"{100 * number(fasa['cells_read']):.1f} %",
        ]
        for dense, fasa in pairs()
    ]
    header = [
        "tokens in the cache",
        "K/V",
        "llama.cpp t/s",
        "pyfasa t/s",
        "ratio",
        "cells attended",
    ]
    machine = {fasa["machine"] + f", {fasa['n_threads']} threads" for _, fasa in pairs()}
    return markdown(header, rows) + f"\n\n{'; '.join(sorted(machine))}; `make bench`."


def stage_table() -> str:
    rows = []
    for dense, fasa in pairs():
        if not number(fasa["score_ns"]):
            continue
        stages = [f"{number(fasa[f'{stage}_ns']) / 1e3:.0f}" for stage in STAGES]
        depth, kv_type = f"{int(fasa['n_depth']):,}", fasa["type_k"]
        dense_us, fasa_us = (f"{1e6 / number(row['avg_ts']):.0f}" for row in (dense, fasa))
        rows.append([depth, kv_type, dense_us, fasa_us, *stages])
    return markdown(["depth", "K/V", "dense us", "pyfasa us", *STAGES], rows)


def types_table() -> str:
    """K types as rows, V types as columns: FASA t/s and the ratio to dense of the same run."""
    rows = read("decode-types.csv")
    speed = {(r["type_k"], r["type_v"], r["attention"]): number(r["avg_ts"]) for r in rows}
    types = list(dict.fromkeys(r["type_k"] for r in rows))
    table = []
    for k in types:
        cells = [
            f"{speed[k, v, 'fasa']:.0f} ({speed[k, v, 'fasa'] / speed[k, v, 'dense']:.1f} x)"
            for v in types
        ]
        table.append([f"**{k}**", *cells])
    return markdown(["K \\ V", *types], table)


def layouts_table() -> str:
    """One row per layout of the index: memory, speed of score, tokens per second."""
    rows = [
        [r["layout"], f"{number(r['bytes_per_cell']):.3g}", r["score_us"], r["gb_per_s"],
         f"{number(r['fasa_ts']):.0f}", f"{number(r['fasa_ts']) / number(r['dense_ts']):.1f} x"]
        for r in read("layouts.csv")
    ]  # fmt: skip
    header = [
        "layout",
        "bytes per token and KV head",
        "score us per token",
        "GB/s",
        "t/s",
        "to dense",
    ]
    return markdown(header, rows)


def rows_table() -> str:
    rows = [
        [r["rows"], f"{number(r['dense_ms']):.1f}", f"{number(r['fasa_ms']):.1f}",
         f"**{number(r['dense_ms']) / number(r['fasa_ms']):.1f} x**"]
        for r in read("rows.csv")
    ]  # fmt: skip
    return markdown(["rows in the batch", "llama.cpp ms", "pyfasa ms", "ratio"], rows)


SIZES = ("2", "3", "4", "6", "10", "20")
METHODS = (
    "allocation",
    "variance",
    "greedy",
    "agreement",
    "lowfreq",
    "random",
    "quest",
    "sparq",
    "double-sparsity",
)


def summaries(task: str, n_tokens: int, model: str = "bundled") -> list[dict[str, str]]:
    wanted = model, task, str(n_tokens)
    return [r for r in read("selection.csv") if (r["model"], r["task"], r["n_tokens"]) == wanted]


def curve_table(task: str, n_tokens: int) -> str:
    """A row per method, a column per size; a cell has the scores at all budgets."""
    rows = summaries(task, n_tokens)
    budgets = sorted({int(r["budget"]) for r in rows if r["budget"]})
    digits = 1 if task == "mass" else 0

    def cell(own: list[dict[str, str]]) -> str:
        found = {int(r["budget"]): number(r["score"]) for r in own if r["budget"]}
        return " / ".join(f"{100 * found[b]:.{digits}f}" for b in budgets if b in found)

    table = []
    for method in METHODS:
        own = [r for r in rows if r["name"].split(":")[0] == method]
        cells = [
            cell([r for r in own if abs(number(r["bytes_per_cell"]) / float(size) - 1) < 0.2])
            for size in SIZES
        ]
        if any(cells):
            table.append([method, *cells])
    for name in ("oracle", "streaming", "snapkv", "h2o"):
        own = [r for r in rows if r["name"] == name]
        if own:
            blank = [""] * (len(SIZES) - 1)
            table.append([f"{name}, {number(own[0]['bytes_per_cell']):g} bytes", *blank, cell(own)])
    dense = [r for r in rows if r["name"] == "dense"]
    if dense:
        table.append(
            ["dense", *[""] * (len(SIZES) - 1), f"{100 * number(dense[0]['score']):.{digits}f}"]
        )
    return markdown(["method", *(f"{size} bytes" for size in SIZES)], table)


def kld_table() -> str:
    rows = [
        [r["name"], r["budget"], *(f"{number(r[c]):.5f}" for c in ("median_kld", "mean_kld")),
         f"{number(r['p99_kld']):.4f}", f"{100 * number(r['as_dense']):.1f} %", f"{number(r['ppl_ratio']):.4f} x"]
        for r in summaries("kld", 8000) if r["budget"]
    ]  # fmt: skip
    return markdown(
        [
            "setting",
            "budget",
            "median KLD",
            "mean",
            "99th percentile",
            "same top token",
            "perplexity",
        ],
        rows,
    )


def outliers_table() -> str:
    both = [
        {
            (r["name"], r["budget"]): f"{100 * number(r['score']):.0f} %"
            for r in summaries("needle", 8000, model)
        }
        for model in ("bundled", "outliers")
    ]
    rows = [
        [name, budget, both[0].get((name, budget), ""), score]
        for (name, budget), score in both[1].items()
    ]
    return markdown(["setting", "budget", "bundled model", "with outlier channels"], rows)


def answers_table() -> str:
    """What a newcomer wants to see: dense, the oracle and the profile's layout."""
    rows = []
    for n_tokens in (8000, 16000):
        for r in summaries("needle", n_tokens):
            if r["name"] in ("dense", "allocation:10") and r["budget"] != "64":
                name = (
                    "llama.cpp"
                    if r["name"] == "dense"
                    else f"pyfasa, {int(r['budget']):,} tokens per head"
                )
                attended = f"{100 * number(r['attended']):.1f} %"
                rows.append(
                    [f"{n_tokens:,}", name, f"{100 * number(r['score']):.0f} of {r['n']}", attended]
                )
    return markdown(["document", "attention", "right", "cells attended"], rows)


CUDA_HEADER = ["tokens in the cache", "K/V", "cache in", "llama.cpp t/s", "pyfasa t/s", "ratio"]
CUDA_RUNS = [("q8_0", "GPU"), ("f16", "GPU"), ("host-f16", "system memory")]


def cuda_pairs(name: str) -> Iterator[tuple[int, dict[str, str], float, float]]:
    """Depth, row of FASA, and the medians of dense and FASA, which follow each other in the data."""
    data = read(f"cuda-{name}.csv")
    for dense, fasa in zip(data[::2], data[1::2], strict=True):
        yield int(fasa["n_depth"]), fasa, number(dense["median_ts"]), number(fasa["median_ts"])


def cuda_table(runs: list[tuple[str, str]]) -> str:
    """Dense and FASA on a GPU, medians of one run; and with K and V in system memory."""
    rows = []
    for name, place in runs:
        for depth, fasa, d, f in cuda_pairs(name):
            where = [f"{depth:,}", fasa["type_k"], place, fasa["index_bits"]]
            read_share = f"{100 * number(fasa['cells_read']):.1f} %"
            rows.append([*where, f"{d:.1f}", f"{f:.1f}", f"**{f / d:.2f} x**", read_share])
    header = [*CUDA_HEADER[:3], "index bits", *CUDA_HEADER[3:], "cells attended"]
    return markdown(header, rows)


def cuda_short_table() -> str:
    """The same for newcomers: the index of default size, and the depths between which something happens."""
    rows = []
    for name, place in CUDA_RUNS:
        for depth, fasa, d, f in cuda_pairs(name):
            if fasa["index_bits"] == "4" and depth in (4096, 32768, 131072):
                speeds = [f"{d:.1f}", f"{f:.1f}", f"**{f / d:.1f} x**"]
                rows.append([f"{depth:,}", fasa["type_k"], place, *speeds])
    return markdown(CUDA_HEADER, rows)


def cuda_stage_table() -> str:
    """Time of each stage of one layer against the time its bytes take at the speed of a copy."""
    rows = [
        [
            f"{int(r['n_depth']):,}",
            r["type"],
            r["bits"],
            r["stage"],
            f"{int(r['bytes']) / 1e6:.2f}",
            r["floor_us"],
            r["time_us"],
            f"{number(r['ratio']):.1f}" if r["stage"] not in ("prepare", "encode") else "",
        ]
        for r in read("cuda-stages.csv")
    ]
    return markdown(["depth", "K/V", "bits", "stage", "MB", "floor us", "us", "ratio"], rows)


def cuda_bus_table() -> str:
    """What fetching the selected rows of one layer takes over the bus, and the CPU's attend, which reads as much."""
    names = {"rows": "a kernel reads the rows", "one piece": "as many bytes copied in one piece"}
    rows = [
        [names[r["how"]], r["type"], f"{number(r['bytes_per_node']) / 1e6:.1f}", r["time_us"], r["gb_per_s"]]
        for r in read("cuda-bus.csv")
    ]  # fmt: skip
    n_bytes = {r["type"]: number(r["bytes_per_node"]) for r in read("cuda-bus.csv")}
    for r in read("cuda-host-f16.csv"):
        if r["attention"] == "fasa" and r["n_depth"] == "16384":
            us = number(r["attend_ns"]) / 1e3 / RANDOM_8B_LAYERS
            kv = r["type_k"]
            speed = f"{n_bytes[kv] / us / 1e3:.1f}"
            what = f"attend on the CPU, {r['n_threads']} threads"
            rows.append([what, kv, f"{n_bytes[kv] / 1e6:.1f}", f"{us:.1f}", speed])
    return markdown(["how", "K/V", "MB per layer", "us", "GB/s"], rows)


def plugin_table() -> str:
    """Medians of stock llama-bench, with the plugin idle, and with FASA."""
    speed: dict[tuple[str, str], dict[str, list[float]]] = {}
    for r in read("plugin.csv"):
        modes = speed.setdefault((r["n_depth"], r["kv_type"]), {})
        modes.setdefault(r["mode"], []).append(number(r["tokens_per_s"]))
    rows = []
    for (depth, kv_type), modes in sorted(speed.items(), key=lambda item: int(item[0][0])):
        stock, idle, fasa = (statistics.median(modes[mode]) for mode in ("stock", "idle", "fasa"))
        speeds = [f"{found:.1f}" for found in (stock, idle, fasa)]
        ratios = [f"{idle / stock:.3f}", f"**{fasa / stock:.2f} x**"]
        rows.append([f"{int(depth):,}", kv_type, *speeds, *ratios])
    header = ["depth", "K/V", "stock t/s", "idle t/s", "FASA t/s", "idle / stock", "FASA / stock"]
    machines = {f"{r['machine']}, {r['n_threads']} threads" for r in read("plugin.csv")}
    return markdown(header, rows) + f"\n\n{'; '.join(sorted(machines))}; `make bench-plugin`."


def plugin_kld_table() -> str:
    rows = [
        [f"{int(r['budget']):,}" if r["budget"] else "dense", r["mean_kld"], r["median_kld"], r["p99_kld"],
         f"{number(r['same_top']):.1f} %"]
        for r in read("plugin-kld.csv")
    ]  # fmt: skip
    return markdown(["budget", "mean KLD", "median", "99th percentile", "same top token"], rows)


def budget_table() -> str:
    """What a budget finds with profiles of 6, 10 and 20 bytes; dense last."""

    def cell(task: str, n_tokens: int, budget: str, column: str, form: str) -> str:
        rows = {(r["name"], r["budget"]): r for r in summaries(task, n_tokens)}
        own = [rows.get((f"allocation:{size}", budget)) for size in (6, 10, 20)]
        scale = 100 if column == "score" else 1
        found = [format(scale * number(r[column]), form) for r in own if r]
        return " / ".join(found) if len(found) == len(own) else ""

    attended = {
        r["budget"]: f"{100 * number(r['attended']):.1f} %"
        for r in summaries("needle", 8000)
        if r["name"] == "allocation:10"
    }
    rows = [
        [
            f"{int(budget):,}",
            attended.get(budget, ""),
            cell("needle", 8000, budget, "score", ".0f"),
            cell("needle", 16000, budget, "score", ".0f"),
            cell("mass", 16000, budget, "score", ".0f"),
            cell("kld", 8000, budget, "median_kld", ".4f"),
        ]
        for budget in ("64", "256", "1024", "2048")
    ]
    dense = [
        f"{100 * number(r['score']):.0f}"
        for n_tokens in (8000, 16000)
        for r in summaries("needle", n_tokens)
        if r["name"] == "dense"
    ]
    header = ["budget", "of 8,000 tokens", "answers, 8,000 [%]", "answers, 16,000 [%]"]
    return markdown(
        [*header, "attention mass, 16,000 [%]", "median KLD, 8,000"],
        [*rows, ["dense", "100 %", *dense, "100", "0"]],
    )


def n_fc_table() -> str:
    """Answers and attention mass at each number of chunks of 2 bits, in all heads alike."""
    found: dict[float, dict[tuple[str, str], float]] = {}
    for task in ("needle", "mass"):
        for r in summaries(task, 8000):
            if r["name"].startswith("variance:"):
                own = found.setdefault(number(r["bytes_per_cell"]), {})
                own[task, r["budget"]] = 100 * number(r["score"])
    rows = []
    for size, own in sorted(found.items()):
        n_fc = round((size - 1) * 2)  # a step of one byte, and half a byte for two dims of 2 bits
        cells = [
            " / ".join(f"{own[task, budget]:.0f}" for budget in ("64", "256", "1024"))
            for task in ("needle", "mass")
        ]
        rows.append([str(n_fc), f"{size:g}", *cells])
    return markdown(["n_fc", "bytes", "answers [%]", "attention mass [%]"], rows)


def one_token_text() -> str:
    """What the pictures of one token show, in numbers."""
    rows = read("one-token.csv")
    shown = next(r for r in rows if r["shown"] == "1")
    found, possible = (
        100 * statistics.mean(number(r[n]) for r in rows) for n in ("found", "possible")
    )
    least = min(rows, key=lambda r: number(r["found"]))
    n_cell, budget = int(shown["n_cell"]), int(shown["budget"])
    text = (
        f"The picture is of query head {shown['head']} of layer {shown['layer']}, which puts "
        f"{100 * number(shown['asked']):.1f} % of its attention on the digits asked for; the {budget:,} of "
        f"{n_cell:,} tokens that it selects carry {100 * number(shown['found']):.2f} %. Over all {len(rows)} query "
        f"heads, the selected tokens carry {found:.1f} % on average, and those with the best exact scores would carry "
        f"{possible:.1f} %. The head that finds least, {least['head']} of layer {least['layer']}, finds "
        f"{100 * number(least['found']):.0f} % where exact scores would find {100 * number(least['possible']):.0f} %: "
        "it looks at a little of everything, and no selection of this size holds that."
    )
    return textwrap.fill(text, 120)


def put(path: Path, tables: dict[str, str]) -> None:
    text = path.read_text(encoding="utf-8")
    for name, table in tables.items():
        pattern = re.compile(rf"(<!-- {name}:begin -->\n).*?(<!-- {name}:end -->)", re.DOTALL)
        text = pattern.sub(rf"\g<1>{table}\n\g<2>", text)
    path.write_text(text, encoding="utf-8")


def main() -> None:
    tables = {
        "decode": decode_table(),
        "stages": stage_table(),
        "types": types_table(),
        "layouts": layouts_table(),
        "rows": rows_table(),
        "cuda": cuda_table(CUDA_RUNS),
        "cuda-early": cuda_table([("early-q8_0", "GPU"), ("early-f16", "GPU")]),
        "cuda-moe": cuda_table([("moe-q8_0", "GPU"), ("moe-f16", "GPU")]),
        "cuda-short": cuda_short_table(),
        "cuda-stages": cuda_stage_table(),
        "cuda-bus": cuda_bus_table(),
        "plugin": plugin_table(),
        "plugin-kld": plugin_kld_table(),
        "answers": answers_table(),
        "kld": kld_table(),
        "budgets": budget_table(),
        "n-fc": n_fc_table(),
        "one-token": one_token_text(),
        "outliers": outliers_table(),
        **{
            f"{task}-{n}": curve_table(task, n)
            for task in ("needle", "mass")
            for n in (8000, 16000)
        },
    }
    for path in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        put(path, tables)


if __name__ == "__main__":
    main()
