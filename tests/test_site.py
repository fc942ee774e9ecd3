"""What mkdocs is given: links of a code host as links of the site, docstrings as Markdown."""

from __future__ import annotations

import re
import runpy
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "models" / "README.md"]
PAGES += sorted((ROOT / "docs").glob("*.md"))
LINK = re.compile(r"\]\(([^)\s#]+)(?:#[^)\s]*)?\)")


@pytest.fixture(scope="module")
def hooks() -> dict[str, Any]:
    pytest.importorskip("mkdocs")  # the extra docs
    return runpy.run_path(str(ROOT / "docs" / "hooks.py"))


@pytest.fixture(scope="module")
def docstrings() -> dict[str, Any]:
    pytest.importorskip("griffe")
    return runpy.run_path(str(ROOT / "docs" / "docstrings.py"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_work_where_files_are_shown(page: Path) -> None:
    """Relative links name files that exist."""
    targets = LINK.findall(page.read_text(encoding="utf-8"))
    files = [t for t in targets if not re.match(r"\w+:", t)]
    assert not [t for t in files if not (page.parent / t).exists()]


@pytest.mark.parametrize(
    ("source", "target", "link"),
    [
        ("README.md", "docs/method.md", "method.md"),
        ("README.md", "CONTRIBUTING.md", "contributing.md"),
        ("docs/plugin.md", "../README.md", "index.md"),
        ("docs/plugin.md", "cuda.md", "cuda.md"),
        ("docs/method.md", "images/profile.png", "images/profile.png"),
        ("models/README.md", "../docs/selection.md", "selection.md"),
        ("README.md", "https://arxiv.org/abs/2602.03152", "https://arxiv.org/abs/2602.03152"),
    ],
)
def test_links_of_the_site(hooks: dict[str, Any], source: str, target: str, link: str) -> None:
    assert hooks["linked"](source, target) == link


@pytest.mark.parametrize("target", ["docs/none.md", "pyfasa/reference.py"])
def test_a_link_that_the_site_does_not_have_stops_the_build(
    hooks: dict[str, Any], target: str
) -> None:
    from mkdocs.exceptions import PluginError

    with pytest.raises(PluginError, match=r"README\.md links to"):
        hooks["linked"]("README.md", target)


def test_code_keeps_its_brackets(hooks: dict[str, Any]) -> None:
    text = "[a](docs/method.md#x)\n\n```python\nf[0](no.md)\n```\n"
    assert hooks["rewritten"]("README.md", text) == text.replace("docs/method.md", "method.md")


def test_docstrings(docstrings: dict[str, Any]) -> None:
    text = (
        "One line, see :func:`f`.\n\nParameters\n----------\na, b : whole numbers,\n    or None\n"
        "E, F (both X) : errors\n\nx  f32   aligned\nyy u8    columns"
    )
    assert docstrings["to_markdown"](text) == (
        "One line, see `f`.\n\n**Parameters**\n\n- `a`, `b`: whole numbers,\n    or None\n"
        "- `E`, `F (both X)`: errors\n\n```text\nx  f32   aligned\nyy u8    columns\n```"
    )
