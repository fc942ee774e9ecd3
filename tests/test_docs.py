"""The documentation names tests and reasons that exist, explains the messages, and has the tables of the data."""

from __future__ import annotations

import ast
import re
import runpy
import shutil
from pathlib import Path

import pytest

from pyfasa import Profile, native
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


# ---- messages ----


def sentences(file: str) -> list[list[str]]:
    """Messages in a source file of four words or more, as the texts between what they name."""
    found = []

    def look(node: ast.AST) -> None:
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            return  # a docstring
        if isinstance(node, (ast.JoinedStr, ast.Constant)):
            values = node.values if isinstance(node, ast.JoinedStr) else [node]
            texts = [v.value for v in values if isinstance(v, ast.Constant)]
            parts = [text for text in texts if isinstance(text, str)]
            if len(re.findall(r"[A-Za-z_]+", " ".join(parts))) >= 4:
                found.append(parts)
            return
        for child in ast.iter_child_nodes(node):
            look(child)

    look(ast.parse((Path(native.__file__).parents[1] / file).read_text(encoding="utf-8")))
    return found


def plain(text: str) -> str:
    return re.sub(r"\s+", " ", text.replace("`", ""))


MESSAGES = plain((ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", list(native.reasons()))
def test_every_reason_is_explained(name: str) -> None:
    assert f"| {name} | {native.reasons()[name]} |" in MESSAGES


@pytest.mark.parametrize("file", ["attach.py", "llama.py", "handle.py"])
def test_every_sentence_is_explained(file: str) -> None:
    found = sentences(file)
    assert len(found) >= 4
    parts = [part for message in found for part in message]
    missing = [
        part for part in parts if len(part.strip()) > 3 and plain(part).strip() not in MESSAGES
    ]
    assert not missing


def test_the_keys_of_a_profile_are_listed(tiny_model_path: Path) -> None:
    page = (ROOT / "docs" / "publishing.md").read_text(encoding="utf-8")
    keys = Profile.load(tiny_model_path).to_fields()
    assert len(keys) > 20
    assert not [key for key in keys if f"`{key}`" not in page]


# ---- tables ----


def test_tables_are_those_of_the_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`docs/bench/tables.py` and `memory.py` would change nothing."""
    scripts = tmp_path / "docs" / "bench"
    shutil.copytree(ROOT / "docs" / "bench", scripts)
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    for page in pages:
        shutil.copy(page, tmp_path / page.relative_to(ROOT))
    monkeypatch.syspath_prepend(str(scripts))
    for script in ("tables", "memory"):
        runpy.run_path(str(scripts / f"{script}.py"), run_name="__main__")
    changed = [
        p.name for p in pages if (tmp_path / p.relative_to(ROOT)).read_text() != p.read_text()
    ]
    assert not changed


def test_memory_is_counted_as_the_core_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bytes of K and V of one token, by the core's own row sizes."""
    monkeypatch.syspath_prepend(str(ROOT / "docs" / "bench"))
    script = runpy.run_path(str(ROOT / "docs" / "bench" / "memory.py"))
    for shape in script["shapes"]():
        for name in script["TYPES"]:
            row = native.kv_row_bytes(native.KV_TYPES[name], shape.head_dim)
            assert shape.kv_bytes(name) == 2 * shape.n_layer * shape.n_head_kv * row
        assert shape.on_gpu(0.5, "f16") is None
        assert shape.on_gpu(1000, "f16") == shape.n_ctx
