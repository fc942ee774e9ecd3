"""A griffe extension: docstrings of this project as Markdown, for the API page.

Sections ("Parameters" and a line of dashes) become a bold word and a list, aligned columns a block of text.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from griffe import Extension, Object

ENTRY = re.compile(r"^([\w*][\w*., ]*?(?: \([\w ]+\))?) : (.*)$")
ROLE = re.compile(r":(?:func|class|meth|mod):`([^`]+)`")


def to_markdown(text: str) -> str:
    """The docstring as Markdown."""
    lines = ROLE.sub(r"`\1`", text).splitlines()
    return "\n\n".join(_paragraphs(lines))


def _paragraphs(lines: list[str]) -> Iterator[str]:
    block: list[str] = []
    entries = False
    for line, after in zip([*lines, ""], [*lines[1:], "", ""], strict=True):
        if line.strip() and re.fullmatch(r"-{3,}", after.strip()):
            yield from _block(block, entries)
            block, entries = [], True
            yield f"**{line.strip()}**"
        elif re.fullmatch(r"-{3,}", line.strip()):
            continue
        elif line.strip():
            block.append(line.rstrip())
        else:
            yield from _block(block, entries)
            block, entries = [], False


def _block(block: list[str], entries: bool) -> Iterator[str]:
    """One paragraph, list, or block of text."""
    if not block:
        return
    if entries or ENTRY.match(block[0]):
        yield "\n".join(_items(block))
    elif any(re.search(r"\S {2,}\S", line) for line in block):
        yield "\n".join(["```text", *block, "```"])
    else:
        yield "\n".join(block)


def _items(block: list[str]) -> Iterator[str]:
    for line, after in zip(block, [*block[1:], ""], strict=True):
        match = ENTRY.match(line)
        text = match[2] if match else line.strip()
        # "name : its type", and what it means on the next line
        if match and not ENTRY.match(after) and re.match(r"[A-Z]", after.strip()):
            text += "" if re.search(r"[.,;:]$", text) else "."
        names = ", ".join(f"`{name}`" for name in match[1].split(", ")) if match else ""
        yield f"- {names}: {text}" if match else f"    {text}"


class Docstrings(Extension):
    """Applies :func:`to_markdown` to everything that has a docstring."""

    def on_object(self, *, obj: Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = to_markdown(obj.docstring.value)
