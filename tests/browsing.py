"""Helpers of the page's tests: a tab of a browser, and answers that are others than the model's own."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from serving import Running

ENDLESS = 3000
MINUTE = 60_000  # milliseconds, after which waiting is a failure
CHAT = "**/v1/chat/completions"


class Tab:
    """The page in a window of its own, and what it says outside of it."""

    def __init__(self, chromium: Any, url: str, **settings: Any) -> None:
        self.context = chromium.new_context(**settings)
        self.page = self.context.new_page()
        self.page.set_default_timeout(MINUTE)
        self.errors: list[str] = []
        self.urls: list[str] = []
        self.page.on("console", lambda m: m.type == "error" and self.errors.append(m.text))
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("request", lambda request: self.urls.append(request.url))
        self.page.goto(url)
        self.question = self.page.get_by_role("textbox", name="Question")

    def __enter__(self) -> Tab:
        return self

    def __exit__(self, *_: object) -> None:
        self.context.close()

    def text(self, selector: str) -> str:
        return str(self.page.locator(selector).text_content())

    def width(self) -> int:
        """Of all that is in the page, in pixels; more than the window's means that it scrolls sideways."""
        return int(self.page.evaluate("document.documentElement.scrollWidth"))

    def type(self, question: str) -> None:
        self.question.fill(question)

    def wait(self, expression: str) -> None:
        """Until it is true; playwright's own function for it is refused by the page's security policy."""
        for _ in range(MINUTE // 20):
            if self.page.evaluate(f"Boolean({expression})"):
                return
            self.page.wait_for_timeout(20)
        raise AssertionError(f"within a minute this did not become true: {expression}")

    def ask(self, question: str) -> str:
        """The answer, once it is complete and its figures stand below it."""
        n = self.page.locator(".note").count()
        self.type(question)
        self.page.keyboard.press("Enter")
        self.wait(f"document.querySelectorAll('.note').length > {n}")
        return str(self.page.locator(".assistant > div").last.inner_text())


def never_ending(route: Any, server: Running) -> None:
    """Sends what the page sends, with the token that ends an answer made impossible."""
    asked = json.loads(route.request.post_data)
    asked |= {"max_tokens": ENDLESS, "logit_bias": {str(server.llm.token_eos()): -100}}
    route.continue_(post_data=json.dumps(asked))


def says(route: Any, text: str) -> None:
    """Answers in the place of the model."""
    chunk = {"choices": [{"index": 0, "delta": {"content": text}, "finish_reason": "stop"}]}
    body = f"data: {json.dumps(chunk)}\n\ndata: [DONE]\n\n"
    route.fulfill(status=200, content_type="text/event-stream", body=body)


def sent(tab: Tab, act: Callable[[], object]) -> dict[str, Any]:
    """The request for an answer that the act leads to."""
    with tab.page.expect_request(CHAT) as asked:
        act()
    found: dict[str, Any] = json.loads(asked.value.post_data)
    return found


def fetched(url: str, path: str) -> tuple[int, Any, bytes]:
    try:
        with urllib.request.urlopen(url + path, timeout=60) as answer:
            return answer.status, answer.headers, answer.read()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.headers, error.read()
