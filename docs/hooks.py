"""What mkdocs needs to show pages of the repository that are not in docs/, and their links.

Each page is in one place and its links are those of a code host: relative paths of files. Here README.md and others
become pages of the site, and links to files become links to pages.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]

# Files of the repository outside docs/ -> their pages.
PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "models/README.md": "bundled-model.md",
}
_SOURCES = {page: source for source, page in PAGES.items()}

FENCE = re.compile(r"^(```.*?^```$)", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"(\]\()([^)\s#]+)(#[^)\s]*)?(\))")


def linked(source: str, target: str) -> str:
    """The link of a page for one of a code host.

    source, target : path of the file in the repository that holds the link, and the link as it stands there, without
        an anchor.

    Raises PluginError for a file that is no page: the site cannot show it.
    """
    if re.match(r"\w+:", target):
        return target
    path = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
    if not (ROOT / path).exists():
        raise PluginError(f"{source} links to {target}, which does not exist.")
    page = PAGES.get(path) or (path.removeprefix("docs/") if path.startswith("docs/") else None)
    if page is None:
        raise PluginError(
            f"{source} links to {target}, which is no page of the site; name it without a link, "
            "or add it to PAGES in docs/hooks.py."
        )
    return page


def rewritten(source: str, markdown: str) -> str:
    """The text of a page with the links of the site. All pages are in one folder, so they are names."""

    def link(match: re.Match[str]) -> str:
        before, target, anchor, after = match.groups()
        return f"{before}{linked(source, target)}{anchor or ''}{after}"

    parts = FENCE.split(markdown)
    return "".join(part if part.startswith("```") else LINK.sub(link, part) for part in parts)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pages that are not in docs/."""
    for source, page in PAGES.items():
        text = (ROOT / source).read_text(encoding="utf-8")
        files.append(File.generated(config, page, content=text))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turns links to files into links to pages."""
    name = page.file.src_uri
    return rewritten(_SOURCES.get(name, f"docs/{name}"), markdown)


def on_serve(server: object, config: MkDocsConfig, builder: object) -> None:
    """Has `mkdocs serve` watch the pages that are not in docs/."""
    for source in PAGES:
        server.watch(str(ROOT / source))  # type: ignore[attr-defined]
