"""Two result files of `pyfasa bench` side by side: what is faster, and by more than the noise?"""

from __future__ import annotations

import csv
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pyfasa.console import markdown

# What was measured. Files of before `model` was a column have the path of the model only.
KEYS = (
    "model",
    "n_threads",
    "type_k",
    "type_v",
    "n_depth",
    "attention",
    "budget",
    "n_fc",
    "index_bits",
)
NEEDED = ("n_depth", "attention", "budget", "type_k", "type_v", "avg_ts", "stddev_ts")

Key = tuple[str, ...]


@dataclass(frozen=True)
class Speed:
    """Tokens per second and their standard deviation; 0 where there was one repetition."""

    mean: float
    stddev: float


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Rows that `pyfasa bench -o csv|json|jsonl` wrote, told apart by what the file begins with.

    A last line of jsonl that was cut off is left out. Raises ValueError for other files.
    """
    rows: list[dict[str, Any]]
    try:
        text = path.read_text(encoding="utf-8").strip()
        if text.startswith("["):
            rows = json.loads(text)
        elif text.startswith("{"):
            rows = _lines(text)
        else:
            rows = list(csv.DictReader(text.splitlines()))
    except ValueError as error:
        raise ValueError(f"{path} {_NO_RESULT}: {error}") from error
    if not rows or not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"{path} {_NO_RESULT}: it holds no rows")
    if missing := [name for name in NEEDED if any(name not in row for row in rows)]:
        raise ValueError(f"{path} {_NO_RESULT}: it lacks the columns {', '.join(missing)}")
    return rows


_NO_RESULT = "is no result of pyfasa bench -o csv, json or jsonl"


def _lines(text: str) -> list[Any]:
    """One JSON value per line; the last line is left out if the run was cut off in it."""
    *lines, last = text.splitlines()
    rows = [json.loads(line) for line in lines]
    try:
        rows.append(json.loads(last))
    except ValueError:
        if not rows:
            raise
    return rows


def key_of(row: Mapping[str, Any]) -> Key:
    """What a row measured, as texts; "" for what does not apply or was not written."""
    model = row.get("model") or Path(str(row.get("model_filename") or "")).stem
    values = {**row, "model": model}
    return tuple("" if values.get(name) is None else str(values[name]) for name in KEYS)


def speeds(rows: Sequence[Mapping[str, Any]], name: str) -> dict[Key, Speed]:
    """Speeds by what was measured; rows that measured the same are taken together.

    Raises ValueError where a speed is no number.
    """
    groups: dict[Key, list[Speed]] = {}
    for row in rows:
        try:
            speed = Speed(float(row["avg_ts"]), float(row["stddev_ts"]))
        except (TypeError, ValueError):
            raise ValueError(
                f"{name} has a row at depth {row['n_depth']} whose avg_ts or stddev_ts is no number"
            ) from None
        groups.setdefault(key_of(row), []).append(speed)
    return {key: _together(found) for key, found in groups.items()}


def _together(found: Sequence[Speed]) -> Speed:
    """One speed of several; its variance is that within them and that between them."""
    mean = statistics.fmean(s.mean for s in found)
    variance = statistics.fmean(s.stddev**2 + (s.mean - mean) ** 2 for s in found)
    return Speed(mean, math.sqrt(variance))


def beyond_noise(a: Speed, b: Speed) -> str:
    """ "yes" when the difference is more than the combined standard deviation; "" if that is unknown."""
    if a.stddev == 0 or b.stddev == 0:
        return ""
    return "yes" if abs(a.mean - b.mean) > math.hypot(a.stddev, b.stddev) else "no"


def compare(a: Path, b: Path) -> str:
    """A Markdown table of what both files measured, and what only one did.

    Raises ValueError for files that are no results or have nothing in common, OSError for others.
    """
    first, second = (speeds(read_rows(path), str(path)) for path in (a, b))
    both = [key for key in first if key in second]
    if not both:
        raise ValueError(
            f"{a} and {b} have nothing in common: no row of one measured what a row of the other did "
            f"({', '.join(KEYS)}). {a} has {_told(next(iter(first)))}; {b} has "
            f"{_told(next(iter(second)))}"
        )
    table = [
        {
            **dict(zip(KEYS, key, strict=True)),
            "t/s A": _text(first[key]),
            "t/s B": _text(second[key]),
            "B / A": f"{second[key].mean / first[key].mean:.3f}" if first[key].mean else "",
            "beyond noise": beyond_noise(first[key], second[key]),
        }
        for key in both
    ]
    parts = [markdown(table, left=("model", "attention")), f"A: {a}\nB: {b}"]
    for name, own, other in (("A", first, second), ("B", second, first)):
        lines = [f"- {_told(key)}: {_text(own[key])} t/s" for key in own if key not in other]
        if lines:
            parts.append("\n".join([f"Only in {name}:", "", *lines]))
    return "\n\n".join(parts)


def _text(speed: Speed) -> str:
    return f"{speed.mean:.2f} \u00b1 {speed.stddev:.2f}"


def _told(key: Key) -> str:
    """`model m, n_threads 2, type_k f16, ..`: without what does not apply."""
    return ", ".join(f"{name} {value}" for name, value in zip(KEYS, key, strict=True) if value)
