"""Screenshots of the page of `pyfasa serve` during a chat about a long document, for docs/serve.md.

python docs/images/page.py MODEL

Needs chromium and the extra `browser`. Writes serve-page.png and serve-page-narrow.png beside this script.
"""

from __future__ import annotations

import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import llama_cpp
from playwright.sync_api import Page, sync_playwright

from pyfasa.documents import Document, Fact, make_document

FOLDER = Path(__file__).parent
TOKENS = 16_000


@contextmanager
def serving(model: str) -> Iterator[str]:
    """The address of a server, once it listens."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "pyfasa", "serve", model, "--n_ctx", str(TOKENS + 4000)]
    command += ["--host", "127.0.0.1", "--port", str(port)]
    quiet: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(command, **quiet) as server:
        try:
            while server.poll() is None:
                with socket.socket() as asked:
                    if asked.connect_ex(("127.0.0.1", port)) == 0:
                        break
                time.sleep(0.1)
            yield f"http://127.0.0.1:{port}"
        finally:
            server.terminate()


def document_of(model: str) -> Document:
    """A document with facts in it."""
    with closing(llama_cpp.Llama(model, vocab_only=True, verbose=False)) as vocabulary:
        return make_document(
            lambda text: vocabulary.tokenize(text.encode(), add_bos=False), TOKENS, 40, seed=4
        )


def ask(page: Page, question: str) -> None:
    """Asks, and waits for the answer and its figures."""
    notes = page.locator(".note")
    n = notes.count()
    page.fill("#question", question)
    page.keyboard.press("Enter")
    notes.nth(n).wait_for(timeout=300_000)


def chat(page: Page, url: str, report: Path, facts: list[Fact], target: Path) -> None:
    page.goto(url)
    page.set_input_files("#files", report)
    for fact in facts:
        ask(page, fact.question)
    page.screenshot(path=target)


def main() -> None:
    (model,) = sys.argv[1:]
    document = document_of(model)
    facts = [document.facts[i] for i in (3, 5, 6, 7)]
    with (
        tempfile.TemporaryDirectory() as folder,
        serving(model) as url,
        sync_playwright() as driver,
    ):
        report = Path(folder) / "report.txt"
        report.write_text(document.text, encoding="utf-8")
        browser = driver.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--no-sandbox"]
        )
        wide = browser.new_page(viewport={"width": 1120, "height": 760}, color_scheme="light")
        chat(wide, url, report, facts, FOLDER / "serve-page.png")
        wide.close()
        small: Any = {"viewport": {"width": 375, "height": 720}, "device_scale_factor": 2}
        narrow = browser.new_page(color_scheme="dark", **small)
        chat(narrow, url, report, facts[:2], FOLDER / "serve-page-narrow.png")
        browser.close()


if __name__ == "__main__":
    main()
