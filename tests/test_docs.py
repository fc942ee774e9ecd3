"""The documentation names tests that exist, and reasons that the core knows."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from pyfasa import native
from pyfasa.options import KvType

ROOT = Path(__file__).resolve().parents[1]
CACHE = (ROOT / "docs" / "cache.md").read_text(encoding="utf-8")


def rows() -> list[str]:
    """Rows of the feature tables, whose third column names tests."""
    features, _ = CACHE.split("## What was tried")
    lines = [
        line for line in features.splitlines() if line.startswith("| ") and line.count("|") == 4
    ]
    return [line for line in lines if not line.startswith(("| feature |", "| fault |"))]


def named(row: str) -> list[tuple[str, str]]:
    return re.findall(r"`([\w/.]+)::(\w+)`", row.split("|")[3])


def test_every_row_names_a_test() -> None:
    assert len(rows()) > 50
    assert not [row for row in rows() if not named(row)]


@pytest.mark.parametrize(("file", "test"), sorted({pair for row in rows() for pair in named(row)}))
def test_the_test_exists(file: str, test: str) -> None:
    if file.endswith(".cpp"):
        assert f"TEST({test})" in (ROOT / file).read_text(encoding="utf-8")
        return
    tree = ast.parse((ROOT / "tests" / f"{file}.py").read_text(encoding="utf-8"))
    assert test in {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}


def test_reasons_are_those_of_the_core() -> None:
    found = set(re.findall(r"dense, `(\w+)`", CACHE))
    assert len(found) >= 6
    assert found <= set(native.reasons())


def test_the_command_line_knows_every_type() -> None:
    assert [kind.value for kind in KvType] == list(native.KV_TYPES)
