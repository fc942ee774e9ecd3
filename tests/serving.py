"""A server in a thread of the test process, and what its /metrics say."""

from __future__ import annotations

import re
import socket
import threading
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import openai
import uvicorn

from pyfasa.server.app import create_app
from pyfasa.server.models import Models, ServedLlama
from pyfasa.server.settings import ModelSettings, ServerSettings

SAMPLE = re.compile(r"^(pyfasa_\w+)(\{[a-z]+=\"[^\"]*\"\})? (\S+)$", re.MULTILINE)


@dataclass(frozen=True)
class Running:
    """A server that listens, and its models."""

    url: str
    key: str
    models: Models

    @property
    def llm(self) -> ServedLlama:
        assert self.models.loaded is not None
        return self.models.loaded

    def client(self, key: str | None = None) -> openai.OpenAI:
        """The official client; it does not try again."""
        return openai.OpenAI(
            base_url=f"{self.url}/v1", api_key=key or self.key, max_retries=0, timeout=120
        )

    def get(self, path: str, with_key: bool = True) -> str:
        headers = {"Authorization": f"Bearer {self.key}"} if with_key else {}
        request = urllib.request.Request(self.url + path, headers=headers)
        with urllib.request.urlopen(request, timeout=60) as answer:
            return str(answer.read().decode())

    @staticmethod
    def wait_until(condition: Callable[[], bool]) -> None:
        """Asks again until it is so; a minute is a failure."""
        pause = threading.Event()
        for _ in range(6000):
            if condition():
                return
            pause.wait(0.01)
        raise AssertionError("it did not happen within a minute")

    def metrics(self) -> dict[str, float]:
        """Values by name and labels: `pyfasa_nodes_total{reason="sparse"}`."""
        found = SAMPLE.findall(self.get("/metrics"))
        return {name.removeprefix("pyfasa_") + labels: float(v) for name, labels, v in found}


@contextmanager
def serving(server: ServerSettings, models: list[ModelSettings]) -> Iterator[Running]:
    """Serves on a free port inside the block. One at a time: llama-cpp-python's routes are per process."""
    app = create_app(server, models)
    runner = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
    with socket.create_server(("127.0.0.1", 0)) as listening:
        host, port = listening.getsockname()
        arguments: dict[str, Any] = {"sockets": [listening]}
        thread = threading.Thread(target=runner.run, kwargs=arguments, daemon=True)
        thread.start()
        try:
            Running.wait_until(lambda: runner.started or not thread.is_alive())
            assert runner.started
            yield Running(f"http://{host}:{port}", server.api_key or "none", app.state.models)
        finally:
            runner.should_exit = True
            thread.join(60)
            assert not thread.is_alive()
