"""Writes the tables of README.md and docs/benchmarks.md from the CSV files in this folder.

`make bench` and `make retrieval` make the data and then call this script. A table stands between two comment lines,
`<!-- NAME:begin -->` and `<!-- NAME:end -->`; everything between them is replaced.
"""

from __future__ import annotations

import csv
import re
from collections import defaultdict
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
STAGES = ("index", "score", "select", "attend", "wait", "plan", "rest")


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


def bits_table() -> str:
    """One row per width of the index: memory, what it finds, speed."""
    found = {(r["bits"], r["budget"]): number(r["mass"]) for r in read("index-bits.csv")}
    size = {r["bits"]: r["bytes_per_cell"] for r in read("index-bits.csv")}
    table = [["exact scores", "", *(f"{found['0', b]:.3f}" for b in ("64", "256", "1024")), ""]]
    for bits in ("2", "4", "8"):
        runs = read(f"decode-bits-{bits}.csv")
        speeds = [number(r["avg_ts"]) for r in runs if r["attention"] == "fasa"]
        share = f"{size[bits]} ({100 * int(size[bits]) / 256:.1f} %)"
        mass = [f"{found[bits, b]:.3f}" for b in ("64", "256", "1024")]
        table.append([f"{bits} bits", share, *mass, f"{speeds[0]:.0f}" if speeds else ""])
    header = ["index", "bytes per token and KV head", "found by 64", "by 256", "by 1,024 cells"]
    return markdown([*header, "t/s at 30,000"], table)


def rows_table() -> str:
    rows = [
        [r["rows"], f"{number(r['dense_ms']):.1f}", f"{number(r['fasa_ms']):.1f}",
         f"**{number(r['dense_ms']) / number(r['fasa_ms']):.1f} x**"]
        for r in read("rows.csv")
    ]  # fmt: skip
    return markdown(["rows in the batch", "llama.cpp ms", "pyfasa ms", "ratio"], rows)


def retrieval_table(*, short: bool) -> str:
    """All settings, or those that a newcomer wants to see: dense and the profile as it comes."""
    answers: dict[str, list[dict[str, str]]] = defaultdict(list)
    for row in read("retrieval-8000.csv"):
        answers[row["setting"]].append(row)
    rows = []
    for setting, own in answers.items():
        if short and not setting.startswith(("dense", "bundled")):
            continue
        right = sum(row["right"] == "True" for row in own)
        attended = sum(number(row["attended"]) for row in own) / len(own)
        rows.append([setting, f"{right} of {len(own)}", f"{100 * attended:.1f} %"])
    return markdown(["setting", "right", "cells attended"], rows)


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
        "bits": bits_table(),
        "rows": rows_table(),
        "retrieval": retrieval_table(short=False),
        "retrieval-short": retrieval_table(short=True),
    }
    for path in (ROOT / "README.md", ROOT / "docs" / "benchmarks.md", ROOT / "docs" / "cache.md"):
        put(path, tables)


if __name__ == "__main__":
    main()
