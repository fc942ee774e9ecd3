"""Evaluation: what a model answers under dense attention, FASA and its rivals, on one cache; ``pyfasa eval``."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pyfasa.evaluation.results import Row, Summary, read_rows, summarize
    from pyfasa.evaluation.run import evaluate
    from pyfasa.evaluation.settings import Setting

__all__ = ["Row", "Setting", "Summary", "evaluate", "read_rows", "summarize"]

_HOMES = {
    "Row": "results", "Summary": "results", "read_rows": "results", "summarize": "results",
    "evaluate": "run", "Setting": "settings",
}  # fmt: skip


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"pyfasa.evaluation.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'pyfasa.evaluation' has no attribute {name!r}")
