"""The page of pyfasa serve in a real browser: Debian's chromium, driven by playwright."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from browsing import CHAT, ENDLESS, Tab, fetched, never_ending, says, sent

if TYPE_CHECKING:
    from serving import Running

for package in ("fastapi", "uvicorn", "sse_starlette", "starlette_context", "pydantic_settings"):
    pytest.importorskip(package, reason="the extra `server` is not installed")
pytest.importorskip("openai", reason="the package openai is not installed")

KEY = "correct horse"


@pytest.fixture(scope="module")
def server(tiny_model_path: Path) -> Iterator[Running]:
    """A server without a key; decoding is sparse from 128 tokens on."""
    from pyfasa.server.settings import ModelSettings, ServerSettings
    from serving import serving

    settings: dict[str, Any] = {"n_ctx": 4000, "budget": 64, "min_ctx": 128, "n_threads": 2}
    model = ModelSettings(model=str(tiny_model_path), model_alias="tiny", **settings)
    with serving(ServerSettings(), [model]) as running:
        yield running


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    playwright = pytest.importorskip(
        "playwright.sync_api", reason="playwright is not installed; the extra `browser` has it"
    )
    path = shutil.which("chromium") or shutil.which("chromium-browser")
    if path is None:
        pytest.skip("chromium is not installed; get it with `apt-get install chromium`")
    with playwright.sync_playwright() as driver:
        # a sandbox is refused to root
        try:
            browser = driver.chromium.launch(executable_path=path, args=["--no-sandbox"])
        except playwright.Error as error:  # such as Ubuntu's, which only names a snap
            pytest.skip(f"{path} does not start: {str(error).splitlines()[0]}")
        yield browser
        browser.close()


@pytest.fixture
def tab(chromium: Any, server: Running) -> Iterator[Tab]:
    with Tab(chromium, server.url) as opened:
        opened.wait("document.getElementById('model').value === 'tiny'")
        yield opened
    server.wait_until(lambda: server.metrics()["requests_in_flight"] == 0)


@pytest.fixture
def slow(server: Running, monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Every token takes its time until this is called, so that an answer lasts until it is stopped."""
    llm, may_hurry = server.llm, threading.Event()
    inner = llm.eval

    def waiting(tokens: Sequence[int]) -> None:
        may_hurry.wait(0.05)
        inner(tokens)

    monkeypatch.setattr(llm, "eval", waiting)
    return may_hurry.set


# ---- without a browser ----


def test_every_file_is_there_and_guarded_by_headers(server: Running) -> None:
    from pyfasa.server import pages

    assert {name for name, _ in pages.FILES.values()} == {p.name for p in pages.FOLDER.iterdir()}
    for path, (name, kind) in pages.FILES.items():
        status, headers, body = fetched(server.url, path)
        assert (status, headers["content-type"].split(";")[0]) == (200, kind)
        assert body == (pages.FOLDER / name).read_bytes()
        assert headers["content-security-policy"].startswith("default-src 'none'; ")
        assert headers["x-content-type-options"] == "nosniff"
        assert not re.findall(rb"https?://(?!www\.w3\.org/2000/svg)", body)


@pytest.mark.parametrize("page", [True, False])
def test_only_the_page_needs_no_key_and_it_can_be_switched_off(
    one: Path, monkeypatch: pytest.MonkeyPatch, page: bool
) -> None:
    import llama_cpp.server.app as upstream
    from fastapi.testclient import TestClient

    from pyfasa.server.app import create_app
    from pyfasa.server.settings import ModelSettings, ServerSettings

    for name in ("_server_settings", "_llama_proxy", "_ping_message_factory"):
        monkeypatch.setattr(upstream, name, getattr(upstream, name))
    app = create_app(
        ServerSettings(api_key=KEY, page=page),
        [ModelSettings(model=str(one), n_ctx=64, profile=False)],
    )
    with TestClient(app) as client:
        assert client.get("/").status_code == (200 if page else 401)
        assert client.get("/page/page.js").status_code == (200 if page else 401)
        key = {"Authorization": f"Bearer {KEY}"}
        assert client.get("/", headers=key).status_code == (200 if page else 404)
        for path in ("/v1/models", "/metrics", "/page/", "/page/other.js", "/docs"):
            assert client.get(path).status_code == 401
        assert client.post("/v1/chat/completions", json={"messages": []}).status_code == 401


# ---- in a browser ----


def test_it_loads_quietly_and_from_nowhere_else(tab: Tab, server: Running) -> None:
    tab.wait("/\\d/.test(document.getElementById('depth').textContent)")
    assert tab.errors == []
    assert all(url.startswith(server.url + "/") for url in tab.urls)
    assert {url.removeprefix(server.url) for url in tab.urls} >= {"/", "/v1/models", "/metrics"}
    assert tab.page.evaluate("document.activeElement.id") == "question"
    assert tab.page.get_by_label("API key", exact=True).is_hidden()


def test_a_question_is_streamed_with_figures(
    tab: Tab, server: Running, slow: Callable[[], None]
) -> None:
    tab.page.route(CHAT, lambda route: never_ending(route, server))
    tab.type("Tell me about the harbour.")
    tab.page.get_by_role("button", name="Send").click()
    tab.wait("document.querySelector('.assistant div').textContent.length > 20")
    some = tab.text(".assistant div")
    tab.wait(f"document.querySelector('.assistant div').textContent.length > {len(some) + 20}")
    assert tab.page.get_by_role("button", name="Stop").is_visible()  # so it came in pieces
    assert tab.text("#status") == "Answering"
    tab.wait("Number(document.getElementById('speed').textContent) > 0")
    depth = tab.text("#depth")
    tab.wait(f"document.getElementById('depth').textContent !== '{depth}'")
    assert tab.page.locator("#chart polyline.speed").count()
    assert "tokens per second at a depth of" in tab.page.locator("#chart").get_attribute(
        "aria-label"
    )
    tab.page.get_by_role("button", name="Stop").click()
    slow()
    assert tab.errors == []


def test_stop_makes_room_for_the_next_question(
    tab: Tab, server: Running, slow: Callable[[], None]
) -> None:
    before = server.metrics()
    tab.page.route(CHAT, lambda route: never_ending(route, server))
    for stop in (lambda: tab.page.click("#stop"), lambda: tab.page.keyboard.press("Escape")):
        tab.type("Tell me about the harbour.")
        tab.page.keyboard.press("Enter")
        tab.wait("[...document.querySelectorAll('.assistant div')].at(-1)?.textContent.length > 5")
        stop()
        tab.page.wait_for_selector("#send", state="visible")
        tab.wait("document.querySelector('.assistant:last-child .note')")
        assert tab.page.locator(".note").last.inner_text().startswith("Stopped.")
        server.wait_until(lambda: server.metrics()["requests_in_flight"] == 0)
    after = server.metrics()
    assert after["clients_gone_total"] == before["clients_gone_total"] + 2
    assert after["generated_tokens_total"] - before["generated_tokens_total"] < ENDLESS
    slow()
    tab.page.unroute(CHAT)
    tab.page.get_by_text("Settings").click()
    tab.page.get_by_label("Tokens of an answer at most").fill("8")
    assert tab.ask("And the weather?")


def test_enter_sends_and_shift_enter_does_not(tab: Tab) -> None:
    tab.page.route(CHAT, lambda route: says(route, "Yes."))
    tab.type("one")
    tab.page.keyboard.press("Shift+Enter")
    tab.page.keyboard.type("two")
    assert tab.page.locator("#turns article").count() == 0
    asked = sent(tab, lambda: tab.page.keyboard.press("Enter"))
    assert asked["messages"] == [{"role": "user", "content": "one\ntwo"}]
    assert asked["model"] == "tiny"
    assert tab.question.input_value() == ""
    tab.page.keyboard.press("Enter")  # there is nothing to send
    assert tab.page.locator("#turns .user").count() == 1


def test_a_document_stands_before_the_question_and_the_turns_follow(
    tab: Tab, server: Running, tiny_model_path: Path, tmp_path: Path
) -> None:
    from chats import hidden

    document = hidden(tiny_model_path, 1500, 8)
    path = tmp_path / "report.txt"
    path.write_text(document.text, encoding="utf-8")
    tab.page.set_input_files("#files", path)
    tab.page.get_by_role("button", name="Remove report.txt").click()
    assert tab.page.locator("#documents li").count() == 0
    tab.page.set_input_files("#files", path)
    tab.page.get_by_text("report.txt").wait_for()
    first, second = document.facts[2], document.facts[5]
    answers: list[str] = []
    asked = sent(tab, lambda: answers.append(tab.ask(first.question)))
    assert asked["messages"][0]["content"] == f"{document.text}\n\n{first.question}"
    assert document.text[:50] not in tab.text("#turns")
    assert "report.txt" in tab.text("#turns .user")
    before = server.metrics()
    asked = sent(tab, lambda: answers.append(tab.ask(second.question)))
    roles = [message["role"] for message in asked["messages"]]
    assert roles == ["user", "assistant", "user"]
    assert asked["messages"][1]["content"] == answers[0]
    assert asked["messages"][2]["content"] == second.question
    # the document was read once
    assert server.metrics()["prompt_tokens_total"] - before["prompt_tokens_total"] < 100
    assert sum(f.answer in a for f, a in zip((first, second), answers, strict=True)) >= 1
    assert 0 < float(tab.text("#share").removesuffix(" %")) < 50
    assert int(tab.text("#sparse")) > 0
    assert int(tab.text("#depth").replace(",", "")) > 1400


def test_nothing_is_asked_for_while_the_page_is_hidden(tab: Tab) -> None:
    tab.page.route(CHAT, lambda route: says(route, "Yes."))
    change = "document.dispatchEvent(new Event('visibilitychange'))"
    tab.wait("/\\d/.test(document.getElementById('depth').textContent)")
    tab.page.evaluate(
        f"Object.defineProperty(document, 'hidden', {{value: true, configurable: true}}); {change}"
    )
    before = len(tab.urls)
    tab.type("Are you there?")
    tab.page.keyboard.press("Enter")
    tab.page.get_by_text("Yes.").wait_for()
    tab.page.wait_for_selector("#send", state="visible")
    assert [url.rsplit("/", 1)[-1] for url in tab.urls[before:]] == ["completions"]
    with tab.page.expect_request("**/metrics"):
        tab.page.evaluate(f"delete document.hidden; {change}")


def test_what_is_no_text_is_refused(tab: Tab, tmp_path: Path) -> None:
    for name, content in (("model.gguf", b"GGUF\0\0"), ("empty.txt", b"\n")):
        (tmp_path / name).write_bytes(content)
        tab.page.set_input_files("#files", tmp_path / name)
        tab.page.get_by_role("alert").get_by_text(name).wait_for()
    assert tab.text("#error") == "empty.txt is empty."
    assert tab.page.locator("#documents li").count() == 0


def test_an_oversize_prompt_is_told_and_can_be_changed(tab: Tab, tmp_path: Path) -> None:
    (tmp_path / "long.txt").write_text("word " * 9000)
    tab.page.set_input_files("#files", tmp_path / "long.txt")
    tab.page.get_by_text("long.txt").wait_for()
    tab.type("What is this?")
    tab.page.keyboard.press("Enter")
    tab.page.get_by_role("alert").wait_for()
    assert re.fullmatch(r"The prompt has 9\d+ tokens and the context \d+; .*\.", tab.text("#error"))
    assert tab.question.input_value() == "What is this?"
    assert tab.page.locator("#turns article").count() == 0
    tab.page.get_by_role("button", name="Remove long.txt").click()
    tab.question.focus()
    asked = sent(tab, lambda: tab.page.keyboard.press("Enter"))
    assert asked["messages"] == [{"role": "user", "content": "What is this?"}]
    tab.page.wait_for_selector(".note")
    assert tab.page.get_by_role("alert").is_hidden()


EVIL = (
    "<img src=x onerror='window.hit = 1'><script>window.hit = 1</script> **<b>bold</b>** "
    "`<i>code</i>`\n\n```html\n<u onclick='hit'>\n```\n<a href='javascript:1'>[x](javascript:1)"
)


def test_html_stays_text(tab: Tab) -> None:
    tab.page.route(CHAT, lambda route: says(route, EVIL))
    tab.type(EVIL)
    tab.page.keyboard.press("Enter")
    tab.wait("document.querySelector('.assistant pre')")
    found = tab.page.evaluate(
        "[...document.querySelectorAll('#turns *')].map(e => e.localName).sort()"
    )
    assert set(found) <= {"article", "span", "p", "div", "strong", "code", "pre"}
    assert tab.page.evaluate("window.hit") is None
    assert tab.text(".user p") == EVIL
    assert tab.text(".assistant strong") == "<b>bold</b>"
    assert tab.text(".assistant p code") == "<i>code</i>"
    assert tab.text(".assistant pre") == "<u onclick='hit'>"
    assert "[x](javascript:1)" in tab.text(".assistant")
    assert tab.errors == []


def test_an_inline_script_would_not_run(tab: Tab) -> None:
    script = "const s = document.createElement('script'); s.text = 'window.hit = 1'; document.body.append(s)"
    tab.page.evaluate(script)
    assert tab.page.evaluate("window.hit") is None
    assert any("Content Security Policy" in error for error in tab.errors)


@pytest.mark.parametrize("scheme", ["dark", "light"])
def test_a_narrow_window(chromium: Any, server: Running, scheme: str, tmp_path: Path) -> None:
    settings: dict[str, Any] = {
        "viewport": {"width": 375, "height": 667},
        "color_scheme": scheme,
    }
    with Tab(chromium, server.url, **settings) as narrow:
        narrow.page.route(CHAT, lambda route: says(route, f"{'x' * 300}\n```\n{'y' * 300}\n```"))
        name = f"{'long' * 20}.txt"
        (tmp_path / name).write_text("text")
        narrow.page.set_input_files("#files", tmp_path / name)
        narrow.page.get_by_text(name).wait_for()
        assert narrow.width() == 375
        narrow.type("z" * 300)
        narrow.page.keyboard.press("Enter")
        narrow.wait("document.querySelector('.assistant pre')")
        assert narrow.width() == 375
        for selector in ("#send", "#attach", "#model", "#speed", "#chart", "#new"):
            box = narrow.page.locator(selector).bounding_box()
            assert 0 <= box["x"] <= box["x"] + box["width"] <= 375
            assert 0 <= box["y"] <= box["y"] + box["height"] <= 667
        back = narrow.page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (max(map(int, re.findall(r"\d+", back)[:3])) < 60) == (scheme == "dark")


@pytest.fixture
def process(tiny_model_path: Path, tmp_path: Path) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """A server with a key in a process of its own, which a test may kill."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    environment = os.environ | {"PORT": str(port), "HOST": "127.0.0.1", "API_KEY": KEY}
    command = [sys.executable, "-m", "pyfasa", "serve", str(tiny_model_path), "--n-ctx", "512"]
    with (
        (tmp_path / "access.log").open("w") as log,
        subprocess.Popen(
            command, env=environment, stdout=log, stderr=subprocess.PIPE, text=True
        ) as running,
    ):
        assert running.stderr is not None
        lines = iter(running.stderr.readline, "")
        assert any("running on" in line for line in lines)
        threading.Thread(target=running.stderr.read, daemon=True).start()
        yield f"http://127.0.0.1:{port}", running
        running.kill()


def test_a_wrong_key_the_right_key_and_the_end_of_the_server(
    chromium: Any, process: tuple[str, subprocess.Popen[str]], tmp_path: Path
) -> None:
    url, running = process
    with Tab(chromium, url) as tab:
        key, hint = tab.page.get_by_label("API key", exact=True), tab.page.locator("#key-hint")
        key.wait_for()
        assert "wants an API key" in hint.inner_text()
        key.fill("wrong")
        tab.page.keyboard.press("Enter")
        hint.get_by_text("This key is wrong.").wait_for()
        key.fill(KEY)
        tab.page.get_by_role("button", name="Use this key").click()
        key.wait_for(state="hidden")
        assert tab.page.locator("#model option").count() == 1
        assert tab.page.evaluate("[localStorage.length, sessionStorage.length]") == [0, 1]
        tab.page.get_by_text("Settings").click()
        tab.page.get_by_label("Tokens of an answer at most").fill("8")
        assert tab.ask("Who are you?")
        tab.page.reload()
        tab.wait("document.getElementById('model').value")
        assert key.is_hidden()

        running.kill()
        running.wait(60)
        log = (tmp_path / "access.log").read_text()
        assert '"GET /v1/models ' in log
        assert "/metrics" not in log  # the page asks for it all the time
        tab.type("Are you there?")
        tab.page.keyboard.press("Enter")
        tab.page.get_by_role("alert").wait_for()
        assert tab.text("#error") == "The server does not answer; is pyfasa serve still running?"
        assert tab.question.input_value() == "Are you there?"


def test_the_server_ends_in_the_middle_of_an_answer(chromium: Any, server: Running) -> None:
    with Tab(chromium, server.url) as tab:
        chunk = {"choices": [{"index": 0, "delta": {"content": "Half of "}, "finish_reason": None}]}
        tab.page.route(
            CHAT,
            lambda route: route.fulfill(
                content_type="text/event-stream", body=f"data: {json.dumps(chunk)}\n\n"
            ),
        )
        tab.type("Tell me everything.")
        tab.page.keyboard.press("Enter")
        tab.page.get_by_role("alert").wait_for()
        assert tab.text("#error") == "The server went away before the answer was complete."
        assert tab.text(".assistant div") == "Half of "
