"""Results as Markdown or JSON: one table per task and length, so that equal budgets and equal bytes stand together."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from itertools import groupby
from typing import Any

from pyfasa.console import markdown, percent
from pyfasa.evaluation.results import Row, Summary, summarize


def to_markdown(rows: Sequence[Row]) -> str:
    """A heading and a table per task and length; dense, then per budget the oracle and all others by index bytes."""
    parts = []
    for (task, n_tokens), group in groupby(summarize(rows), lambda s: (s.task, s.n_tokens)):
        own = list(group)
        unit = _UNITS.get(task, "questions")
        length = f"{n_tokens:,} tokens, " if n_tokens else ""
        columns = _COLUMNS.get(task, _answers)
        table = [
            {**_setting(one), **columns(one), "cells attended": percent(one.attended)}
            for one in own
        ]
        parts.append(
            f"{task}: {length}{max(one.n for one in own):,} {unit}\n\n{markdown(table, left=('setting',))}"
        )
    return "\n\n".join(parts)


def to_json(rows: Sequence[Row]) -> str:
    """`summary` and `rows`, numbers as numbers, null where there is none."""
    found = {"summary": [asdict(s) for s in summarize(rows)], "rows": [asdict(row) for row in rows]}
    return json.dumps(_plain(found), indent=1, allow_nan=False)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _setting(one: Summary) -> dict[str, str]:
    return {
        "setting": one.name,
        "budget": "" if one.budget is None else str(one.budget),
        "index bytes": "" if one.bytes_per_cell is None else f"{one.bytes_per_cell:.4g}",
    }


def _answers(one: Summary) -> dict[str, str]:
    return {"score": _share(one.score), "as dense": _share(one.as_dense)}


def _kld(one: Summary) -> dict[str, str]:
    return {
        "mean KLD": f"{one.mean_kld:.5f}",
        "median": f"{one.median_kld:.5f}",
        "99th percentile": f"{one.p99_kld:.4f}",
        "same top token": _share(one.as_dense),
    }


def _ppl(one: Summary) -> dict[str, str]:
    return {"perplexity": f"{one.ppl:.3f}", "to dense": f"{one.ppl_ratio:.4f} x"}


def _mass(one: Summary) -> dict[str, str]:
    return {"attention found": _share(one.score)}


_COLUMNS = {"kld": _kld, "ppl": _ppl, "mass": _mass}
_UNITS = {"kld": "rows", "ppl": "rows", "mass": "documents"}


def _share(value: float) -> str:
    return "" if math.isnan(value) else f"{100 * value:.1f} %"
