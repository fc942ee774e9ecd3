"""Around every request: the API key, a client that goes away, and errors that nobody else has answered."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Collection, MutableMapping
from contextvars import ContextVar
from hmac import compare_digest
from typing import Any

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pyfasa.server.errors import ClientGoneError, explain, payload
from pyfasa.server.metrics import Metrics

OPEN_PATHS = frozenset({"/health"})  # for load balancers, which have no key


class Client:
    """Who waits for the answer to one request, and what it has sent."""

    def __init__(self, body: bytes) -> None:
        self.gone = False
        self.answered = False
        self._body: bytes | None = body
        self._left = asyncio.Event()

    async def watch(self, receive: Receive) -> None:
        """Waits until the connection is closed."""
        while (await receive())["type"] != "http.disconnect":
            pass
        self.gone = not self.answered  # a whole answer also ends what is received
        self._left.set()

    async def receive(self) -> Message:
        """To the application: the body, then that the client is gone once it is."""
        if self._body is not None:
            body, self._body = self._body, None
            return {"type": "http.request", "body": body, "more_body": False}
        if not self._left.is_set():  # else at once: who only looks gives no time to wait
            await self._left.wait()
        return {"type": "http.disconnect"}


_client: ContextVar[Client | None] = ContextVar("pyfasa_client", default=None)


def check_client() -> None:
    """ClientGoneError when the client of this request is gone. Worker threads inherit whose request it is."""
    client = _client.get()
    if client is not None and client.gone:
        raise ClientGoneError


class _Sender:
    """Sends an answer, its status only together with its first bytes: until then an error can replace it.

    An event stream starts before its prompt is read, and reading may find that the prompt is too long.
    """

    def __init__(self, send: Send, client: Client, metrics: Metrics) -> None:
        self._send = send
        self._client = client
        self._metrics = metrics
        self._held: list[Message] = []
        self._events = False
        self.started = False

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._events = Headers(raw=message["headers"])["content-type"].startswith(
                "text/event-stream"
            )
        bare = message["type"] == "http.response.start" or not message.get("body")
        # the end of an event stream is held too, so that an error can still be its last event
        if bare and (not self.started or (self._events and not message.get("more_body"))):
            self._held.append(message)
            return
        await self.flush()
        await self._pass(message)

    async def flush(self) -> None:
        """Sends what is held."""
        held, self._held = self._held, []
        for message in held:
            await self._pass(message)

    async def _pass(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.started = True
            self._metrics.requests[message["status"]] += 1
        elif not message.get("more_body"):
            self._client.answered = not self._client.gone
        await self._send(message)

    async def fail(self, error: Exception, scope: Scope, receive: Receive) -> None:
        """Answers with an error instead; as the last event where a stream has begun."""
        status, body = explain(error)
        self._held = []
        if not self.started:
            await JSONResponse(body, status)(scope, receive, self._pass)
        elif self._events:
            last = f"data: {json.dumps(body)}\n\n".encode()
            await self._pass({"type": "http.response.body", "body": last, "more_body": False})
        else:
            raise error


class Gate:
    """ASGI middleware. `api_key` guards every path that is not open."""

    def __init__(
        self,
        app: ASGIApp,
        api_key: str | None,
        metrics: Metrics,
        open_paths: Collection[str] = OPEN_PATHS,
    ) -> None:
        self._app = app
        self._key = None if api_key is None else f"Bearer {api_key}".encode()
        self._metrics = metrics
        self._open_paths = open_paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
        elif not self._may_pass(scope):
            message = "The API key is missing or wrong; send it as `Authorization: Bearer KEY`."
            headers = {"WWW-Authenticate": "Bearer"}
            refusal = JSONResponse(payload(401, message, "invalid_api_key"), 401, headers)
            await refusal(scope, receive, send)
        elif scope["method"] != "POST":
            await self._app(scope, receive, send)
        else:
            self._metrics.in_flight += 1
            try:
                await self._answer(scope, receive, send)
            finally:
                self._metrics.in_flight -= 1

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        body = await _whole_body(receive)
        if body is None:
            self._metrics.clients_gone += 1
            return
        client = Client(body)
        sender = _Sender(send, client, self._metrics)
        before = _client.set(client)
        watcher = asyncio.create_task(client.watch(receive))
        try:
            await self._app(scope, client.receive, sender)
            await sender.flush()
        except Exception as error:
            if not client.gone:
                await sender.fail(error, scope, client.receive)
        finally:
            watcher.cancel()
            _client.reset(before)
            self._metrics.clients_gone += client.gone

    def _may_pass(self, scope: Scope) -> bool:
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        if self._key is None or path in self._open_paths:
            return True
        return compare_digest(Headers(scope=scope).get("authorization", "").encode(), self._key)


async def _whole_body(receive: Receive) -> bytes | None:
    """The body of a request; None where the client went away before its end."""
    parts = []
    message: MutableMapping[str, Any] = {"more_body": True}
    while message.get("more_body"):
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        parts.append(message.get("body", b""))
    return b"".join(parts)
