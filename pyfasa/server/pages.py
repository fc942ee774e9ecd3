"""The page at /: a chat, with speed and depth beside it. All of it is in the folder `page`."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path

from fastapi import FastAPI
from fastapi.responses import FileResponse

FOLDER = Path(__file__).parent / "page"
# What a browser may load, under which path and as what. It has no key yet, so these need none.
FILES = {
    "/": ("index.html", "text/html"),
    "/page/style.css": ("style.css", "text/css"),
    "/page/page.js": ("page.js", "text/javascript"),
    "/page/requests.js": ("requests.js", "text/javascript"),
    "/page/figures.js": ("figures.js", "text/javascript"),
    "/page/chart.js": ("chart.js", "text/javascript"),
    "/page/text.js": ("text.js", "text/javascript"),
    "/page/icon.svg": ("icon.svg", "image/svg+xml"),
}
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",  # another version of pyfasa may serve the next one
}


def add_page(app: FastAPI) -> None:
    """Adds a route for each file."""
    for path, (name, kind) in FILES.items():
        app.add_api_route(
            path, _sender(name, kind), methods=["GET", "HEAD"], include_in_schema=False
        )


def _sender(name: str, kind: str) -> Callable[[], Awaitable[FileResponse]]:
    async def send() -> FileResponse:
        return FileResponse(FOLDER / name, media_type=kind, headers=HEADERS)

    return send
