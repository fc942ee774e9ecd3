"""pyfasa serve over HTTP, with the official openai client and with what no client would send."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from support import opened

if TYPE_CHECKING:
    from serving import Running

for package in ("fastapi", "uvicorn", "sse_starlette", "starlette_context", "pydantic_settings"):
    pytest.importorskip(package, reason="the extra `server` is not installed")
openai = pytest.importorskip("openai", reason="the package openai is not installed")

KEY = "correct horse"
SPARSE: dict[str, Any] = {"n_ctx": 4000, "budget": 64, "min_ctx": 128}
GREEDY: dict[str, Any] = {"temperature": 0}
SHORT = [{"role": "user", "content": "Tell me about the harbour."}]
ENDLESS = 3000


@pytest.fixture(scope="module")
def server(tiny_model_path: Path) -> Iterator[Running]:
    """One server for all tests: the bundled model twice, sparse and dense, and an API key."""
    from pyfasa.server.settings import ModelSettings, ServerSettings
    from serving import serving

    sparse, dense = (
        ModelSettings(
            model=str(tiny_model_path), model_alias=alias, profile=profile, n_threads=2, **SPARSE
        )
        for alias, profile in (("sparse", None), ("dense", False))
    )
    with serving(ServerSettings(api_key=KEY), [sparse, dense]) as running:
        yield running


@pytest.fixture
def client(server: Running) -> Iterator[Any]:
    with server.client() as opened_client:
        yield opened_client


@pytest.fixture(scope="module")
def long_chat() -> list[dict[str, str]]:
    """Some 1,000 tokens."""
    source = Path(json.__file__).read_text(encoding="utf-8")[:3500]
    return [{"role": "user", "content": source + "\n\nWhat does this module do?"}]


def endless(server: Running) -> dict[str, Any]:
    """Arguments of an answer that does not end by itself: no token ends it."""
    return {"max_tokens": ENDLESS, "logit_bias": {str(server.llm.token_eos()): -100}}


def post(server: Running, path: str, body: bytes) -> tuple[int, dict[str, Any]]:
    """Status and error of a request that no client would send."""
    headers = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"}
    request = urllib.request.Request(server.url + path, body, headers)
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(request, timeout=60)
    with refused.value as answer:
        return answer.code, json.loads(answer.read())["error"]


# ---- answers ----


def test_the_answer_is_that_of_the_class(
    server: Running, client: Any, long_chat: list[dict[str, str]], tiny_model_path: Path
) -> None:
    before = server.metrics()
    answer = client.chat.completions.create(
        model="sparse", messages=long_chat, max_tokens=24, **GREEDY
    )
    with opened(tiny_model_path, **SPARSE) as llm:
        # the server's default
        wanted = llm.create_chat_completion(long_chat, max_tokens=24, repeat_penalty=1.1, **GREEDY)
    assert answer.choices[0].message.content == wanted["choices"][0]["message"]["content"]
    assert answer.usage.prompt_tokens == wanted["usage"]["prompt_tokens"] > 800
    after = server.metrics()
    assert after['nodes_total{reason="sparse"}'] > before['nodes_total{reason="sparse"}']


def test_stream(client: Any, long_chat: list[dict[str, str]]) -> None:
    asked: dict[str, Any] = {"model": "sparse", "messages": long_chat, "max_tokens": 16, **GREEDY}
    whole = client.chat.completions.create(**asked)
    chunks = list(client.chat.completions.create(stream=True, **asked))
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == (
        whole.choices[0].message.content
    )
    assert chunks[-1].choices[0].finish_reason == whole.choices[0].finish_reason


def test_stop(client: Any) -> None:
    asked: dict[str, Any] = {"model": "sparse", "messages": SHORT, "max_tokens": 24, **GREEDY}
    whole = client.chat.completions.create(**asked).choices[0].message.content
    word = whole.split()[2]
    stopped = client.chat.completions.create(stop=[word], **asked).choices[0]
    assert stopped.message.content == whole[: whole.index(word)]
    assert stopped.finish_reason == "stop"


def test_completions_and_models(client: Any) -> None:
    answer = client.completions.create(model="sparse", prompt="The", max_tokens=4, **GREEDY)
    assert answer.choices[0].text
    assert [model.id for model in client.models.list()] == ["sparse", "dense"]


def test_another_model_of_the_file(server: Running, client: Any) -> None:
    before = server.metrics()
    for alias in ("dense", "sparse"):
        client.chat.completions.create(model=alias, messages=SHORT, max_tokens=2)
        health = json.loads(server.get("/health"))
        assert health["model"] == alias
        assert health["fasa"]["active"] == (alias == "sparse")
        assert (health["fasa"]["reason"] is None) == (alias == "sparse")
    after = server.metrics()
    falling = [name for name in before if "_total" in name and after[name] < before[name]]
    assert falling == []  # though both models were closed in between


# ---- the queue ----


@dataclass
class Held:
    """Questions in the order of their turns; the first one is held until it may end."""

    order: list[str] = field(default_factory=list)
    first_may_end: threading.Event = field(default_factory=threading.Event)


@pytest.fixture
def held(server: Running, monkeypatch: pytest.MonkeyPatch) -> Held:
    record = Held()
    real = server.llm.create_chat_completion

    def recorded(**arguments: Any) -> Any:
        record.order.append(arguments["messages"][0]["content"])
        if len(record.order) == 1:
            assert record.first_may_end.wait(60)
        return real(**arguments)

    monkeypatch.setattr(server.llm, "create_chat_completion", recorded)
    return record


def test_requests_are_answered_in_their_order(server: Running, held: Held) -> None:
    answers: list[str] = []

    def ask(text: str) -> None:
        with server.client() as client:
            message = {"role": "user", "content": text}
            done = client.chat.completions.create(model="sparse", messages=[message], max_tokens=2)
            answers.append(done.id)

    texts = ["first", "second", "third", "fourth"]
    threads = [threading.Thread(target=ask, args=(text,)) for text in texts]
    for i, thread in enumerate(threads):
        thread.start()
        server.wait_until(lambda: bool(held.order))
        server.wait_until(lambda i=i: server.metrics()["requests_queued"] == i)
    assert server.metrics()["requests_in_flight"] == 4
    assert json.loads(server.get("/health"))["status"] == "ok"  # these do not wait
    assert json.loads(server.get("/v1/models"))["data"]
    held.first_may_end.set()
    for thread in threads:
        thread.join(60)
    assert held.order == texts
    assert len(set(answers)) == 4


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_away_while_it_waits_is_skipped(
    server: Running, held: Held, stream: bool
) -> None:
    before = server.metrics()
    used: list[int] = []

    def ask() -> None:
        with server.client() as client:
            done = client.chat.completions.create(model="sparse", messages=SHORT, max_tokens=2)
            used.append(done.usage.completion_tokens)

    first = threading.Thread(target=ask)
    first.start()
    server.wait_until(lambda: bool(held.order))
    waiting = raw_request(server, stream=stream)
    server.wait_until(lambda: server.metrics()["requests_queued"] == 1)
    waiting.close()
    server.metrics()  # once this is answered, the server has seen the end of the connection too
    held.first_may_end.set()
    first.join(60)
    ask()
    server.wait_until(lambda: server.metrics()["requests_in_flight"] == 0)
    after = server.metrics()
    assert after["clients_gone_total"] == before["clients_gone_total"] + 1
    assert after["generated_tokens_total"] - before["generated_tokens_total"] == sum(used)
    assert len(used) == len(held.order) == 2


def raw_request(server: Running, stream: bool) -> socket.socket:
    """The connection of a request for an endless answer, of which nothing is read yet."""
    asked = {"model": "sparse", "messages": SHORT, "stream": stream, **endless(server)}
    body = json.dumps(asked).encode()
    host, port = server.url.removeprefix("http://").split(":")
    head = (
        f"POST /v1/chat/completions HTTP/1.1\r\nHost: {host}\r\nAuthorization: Bearer {KEY}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    connection = socket.create_connection((host, int(port)), timeout=60)
    connection.sendall(head.encode() + body)
    return connection


def test_a_streamed_answer_is_not_cut_by_the_next_request(server: Running) -> None:
    with server.client() as one, server.client() as other:
        stream = one.chat.completions.create(
            model="sparse", messages=SHORT, stream=True, **{**endless(server), "max_tokens": 200}
        )
        next(stream)
        done = []

        def ask() -> None:
            done.append(other.chat.completions.create(model="sparse", messages=SHORT, max_tokens=2))

        thread = threading.Thread(target=ask)
        thread.start()
        assert list(stream)[-1].choices[0].finish_reason == "length"
        thread.join(60)
        assert done[0].choices[0].message.content


def test_a_stream_whose_client_goes_away_makes_room(server: Running, client: Any) -> None:
    before = server.metrics()
    stream = client.chat.completions.create(
        model="sparse", messages=SHORT, stream=True, **endless(server)
    )
    next(stream)
    stream.close()
    client.chat.completions.create(model="sparse", messages=SHORT, max_tokens=2)
    assert_given_up(server, before)


def test_an_answer_whose_client_goes_away_makes_room(server: Running, client: Any) -> None:
    before = server.metrics()
    raw = raw_request(server, stream=False)
    server.wait_until(
        lambda: server.metrics()["generated_tokens_total"] > before["generated_tokens_total"]
    )
    raw.close()
    client.chat.completions.create(model="sparse", messages=SHORT, max_tokens=2)
    assert_given_up(server, before)


def assert_given_up(server: Running, before: dict[str, float]) -> None:
    server.wait_until(lambda: server.metrics()["requests_in_flight"] == 0)
    after = server.metrics()
    assert after["clients_gone_total"] == before["clients_gone_total"] + 1
    assert after["generated_tokens_total"] - before["generated_tokens_total"] < ENDLESS


def test_a_prompt_is_given_up_between_two_batches(tiny_model_path: Path) -> None:
    from pyfasa.server import clients
    from pyfasa.server.metrics import Metrics
    from pyfasa.server.models import ServedLlama

    gone = clients.Client(b"")

    class Leaving(Metrics):
        def evaluated(self, tokens: int, seconds: float, prompt: bool) -> None:
            super().evaluated(tokens, seconds, prompt)
            gone.gone = True

    metrics = Leaving()
    llm = ServedLlama(str(tiny_model_path), metrics=metrics, n_ctx=512, n_batch=64, verbose=False)
    token = clients._client.set(gone)
    try:
        with pytest.raises(clients.ClientGoneError):
            llm.eval(range(100, 300))
        assert llm.n_tokens == metrics.prompt.tokens == 64
    finally:
        clients._client.reset(token)
        llm.close()


# ---- refusals ----


def test_an_error_after_the_begin_of_a_stream_is_its_last_event() -> None:
    from pyfasa.server.clients import Gate
    from pyfasa.server.metrics import Metrics

    async def app(scope: Any, receive: Any, send: Any) -> None:
        headers = [(b"content-type", b"text/event-stream")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": b": ping\n\n", "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})
        raise ValueError("Requested tokens (9) exceed context window of 8")

    sent: list[dict[str, Any]] = []
    asked = [{"type": "http.request", "body": b"{}"}]

    async def receive() -> dict[str, Any]:
        return asked.pop() if asked else await asyncio.get_running_loop().create_future()

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    metrics = Metrics()
    scope = {"type": "http", "method": "POST", "path": "/", "headers": []}
    asyncio.run(Gate(app, None, metrics)(scope, receive, send))
    assert [message.get("more_body") for message in sent] == [None, True, False]
    event = sent[-1]["body"].decode()
    assert event.endswith("\n\n")
    error = json.loads(event.removeprefix("data: "))["error"]
    assert error["message"].startswith("The prompt has 9 tokens and the context 8; ")
    assert metrics.requests == {200: 1}
    assert metrics.in_flight == 0


@pytest.mark.parametrize("stream", [False, True])
def test_an_oversize_prompt(client: Any, stream: bool) -> None:
    messages = [{"role": "user", "content": "word " * 9000}]
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(model="sparse", messages=messages, stream=stream)
    assert refused.value.code == "context_length_exceeded"
    assert re.search(r"has 9\d+ tokens and the context \d+; shorten", refused.value.message)
    assert client.chat.completions.create(model="sparse", messages=SHORT, max_tokens=2).choices


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b'{"messages":', "is not JSON"),
        (b"", "is not JSON"),
        (b"[]", "body"),
        (b"\xff\xfe{", "body"),
        (b'{"messages": 3}', "messages is 3"),
        (b'{"messages": [], "top_p": 3}', "top_p is 3"),
        (b'{"messages": [{"role": "user", "content": "a"}], "grammar": "("}', "root"),
    ],
)
def test_a_bad_body_is_the_fault_of_the_request(server: Running, body: bytes, words: str) -> None:
    status, error = post(server, "/v1/chat/completions", body)
    assert status == 400
    assert error["type"] == "invalid_request_error"
    assert words in error["message"]


def test_several_prompts_and_logprobs_are_refused(server: Running) -> None:
    for body, words in (({"prompt": ["a", "b"]}, "list of 2"), ({"logprobs": 2}, "--logits_all")):
        status, error = post(server, "/v1/completions", json.dumps({"prompt": "a"} | body).encode())
        assert status == 400
        assert words in error["message"]


def test_no_such_route(server: Running) -> None:
    status, error = post(server, "/v1/nothing", b"{}")
    assert status == 404
    assert error["message"]


@pytest.mark.parametrize("key", ["wrong", f"{KEY}s", "käse"])
def test_a_wrong_key(server: Running, key: str) -> None:
    for path in ("/v1/models", "/metrics", "/docs", "/nothing"):
        request = urllib.request.Request(server.url + path)
        request.add_unredirected_header("Authorization", f"Bearer {key}")
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(request, timeout=60)
        with refused.value as answer:
            assert answer.code == 401
            assert json.loads(answer.read())["error"]["code"] == "invalid_api_key"
    if key.isascii():
        with server.client(key) as client, pytest.raises(openai.AuthenticationError, match="key"):
            client.chat.completions.create(model="sparse", messages=SHORT)


def test_health_needs_no_key(server: Running) -> None:
    assert json.loads(server.get("/health", with_key=False))["status"] == "ok"
    with pytest.raises(urllib.error.HTTPError, match="401"):
        server.get("/metrics", with_key=False)


# ---- metrics ----


def test_metrics_have_help_and_type(server: Running) -> None:
    text = server.get("/metrics")
    names = set(re.findall(r"^(pyfasa_\w+)", text, re.MULTILINE))
    kinds = dict(re.findall(r"^# TYPE (\w+) (counter|gauge)$", text, re.MULTILINE))
    assert set(kinds) == set(re.findall(r"^# HELP (\w+) \S", text, re.MULTILINE)) >= names
    assert all((kind == "counter") == name.endswith("_total") for name, kind in kinds.items())
    assert all(
        line.startswith("# ") or re.fullmatch(r"pyfasa_\w+(\{\w+=\"\w+\"\})? [\d.e+-]+", line)
        for line in text.splitlines()
    )


def test_metrics_count_one_answer(server: Running, client: Any) -> None:
    server.llm.reset()
    before = server.metrics()
    answer = client.chat.completions.create(
        model="sparse", messages=SHORT, stream=False, **{**endless(server), "max_tokens": 8}
    )
    after = server.metrics()
    grown = {name: after[name] - before[name] for name in before}
    assert grown["prompt_tokens_total"] == answer.usage.prompt_tokens
    assert grown["generated_tokens_total"] == answer.usage.completion_tokens == 8
    assert grown["decode_tokens_total"] == 7
    assert grown["prompt_seconds_total"] > 0
    assert grown["decode_seconds_total"] > 0
    assert after["cache_tokens"] == answer.usage.prompt_tokens + 7
    assert after["cache_size_tokens"] == server.llm.n_ctx()
    assert after["decode_tokens_per_second"] > 0
    assert grown['requests_total{status="200"}'] == 1


def test_drafts_are_decoding(tiny_model_path: Path) -> None:
    import numpy as np

    from pyfasa.server.metrics import Metrics
    from pyfasa.server.models import ServedLlama

    metrics = Metrics()

    def twelve(_: Any, **__: Any) -> Any:  # more than max_rows
        return np.full(12, 300, np.intc)

    llm = ServedLlama(
        str(tiny_model_path), metrics=metrics, draft_model=twelve, n_ctx=256, verbose=False
    )
    try:
        done = llm.create_completion("one two three", max_tokens=4, **GREEDY)
    finally:
        llm.close()
    assert metrics.prompt.tokens == done["usage"]["prompt_tokens"]
    assert metrics.decode.tokens >= 13


def test_the_docs_name_every_metric(server: Running) -> None:
    page = (Path(__file__).resolve().parents[1] / "docs" / "serve.md").read_text(encoding="utf-8")
    assert set(re.findall(r"^# TYPE (\w+)", server.get("/metrics"), re.MULTILINE)) <= set(
        re.findall(r"`(pyfasa_\w+)", page)
    )


# ---- the command ----


def test_the_command_serves_until_interrupted(tiny_model_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    environment = os.environ | {"PORT": str(port), "HOST": "127.0.0.1", "MODEL_ALIAS": "tiny"}
    command = [sys.executable, "-m", "pyfasa", "serve", str(tiny_model_path), "--n-ctx", "512"]
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stderr is not None
            lines = iter(process.stderr.readline, "")
            assert any(f"running on http://127.0.0.1:{port}" in line for line in lines)
            url = f"http://127.0.0.1:{port}/v1"
            with openai.OpenAI(base_url=url, api_key="none", max_retries=0) as client:
                answer = client.chat.completions.create(model="tiny", messages=SHORT, max_tokens=2)
                assert [model.id for model in client.models.list()] == ["tiny"]
            assert answer.choices[0].message.content
            process.send_signal(signal.SIGINT)
            rest = process.stderr.read()
            assert process.wait(60) in (0, 130)
            assert "Traceback" not in rest
        finally:
            process.kill()
