"""Runs llama.cpp's own tools, with the plugin and without it."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pyfasa.plugin import library_path

THREADS = "2"


def plugin(profile: Path | str | None, **settings: object) -> dict[str, str]:
    """Variables of the plugin; settings are named as in docs/plugin.md, without PYFASA_ and in lower case."""
    found = {"GGML_BACKEND_PATH": str(library_path())}
    if profile is not None:
        found["PYFASA_PROFILE"] = str(profile)
    return found | {f"PYFASA_{name.upper()}": str(value) for name, value in settings.items()}


@dataclass(frozen=True)
class Tools:
    """A folder with tools of llama.cpp."""

    folder: Path

    def command(self, name: str, arguments: Sequence[object]) -> list[str]:
        return [str(self.folder / name), *map(str, arguments)]

    def run(
        self,
        name: str,
        *arguments: object,
        env: Mapping[str, str] | None = None,
        check: bool = True,
    ) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            self.command(name, arguments),
            env=_clean() | dict(env or {}),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=900,
            check=False,
        )
        assert not check or done.returncode == 0, done.stderr[-2000:]
        return done

    @contextmanager
    def start(
        self,
        name: str,
        *arguments: object,
        port: int,
        log: Path,
        env: Mapping[str, str] | None = None,
    ) -> Iterator[subprocess.Popen[bytes]]:
        """A server until the end of the block; it has begun to listen."""
        with open(log, "wb") as output:
            process = subprocess.Popen(
                self.command(name, arguments),
                env=_clean() | dict(env or {}),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
            )
            try:
                _wait_for(port, process, log)
                yield process
            finally:
                process.send_signal(signal.SIGINT)
                try:
                    process.wait(30)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()


def _clean() -> dict[str, str]:
    """The environment without what other tests or the user have set."""
    return {k: v for k, v in os.environ.items() if not k.startswith(("PYFASA_", "GGML_", "LLAMA_"))}


def _wait_for(port: int, process: subprocess.Popen[bytes], log: Path) -> None:
    for _ in range(600):
        assert process.poll() is None, log.read_text()[-2000:]
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
        except OSError:
            time.sleep(0.1)
        else:
            return
    raise AssertionError(f"nothing listens on port {port}: {log.read_text()[-2000:]}")


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port


def statistics(process: subprocess.Popen[bytes], path: Path) -> dict[str, Any]:
    """What the plugin writes when it is asked by a signal."""
    path.unlink(missing_ok=True)
    process.send_signal(signal.SIGUSR1)
    for _ in range(300):
        if path.exists():
            found: dict[str, Any] = json.loads(path.read_text())
            return found
        time.sleep(0.1)
    raise AssertionError(f"{path} was not written")


@dataclass(frozen=True)
class Client:
    """Of a llama-server."""

    port: int

    def call(self, path: str, body: Mapping[str, Any] | None = None) -> Any:
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}{path}",
            None if body is None else json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        try:
            with urllib.request.urlopen(request, timeout=600) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as error:
            raise AssertionError(f"{path}: {error.read().decode()}") from error

    def chat(self, text: str, slot: int = -1, n: int = 48, **more: Any) -> str:
        """The likeliest answer to one message."""
        body = {"messages": [{"role": "user", "content": text}], "temperature": 0, "max_tokens": n}
        answer = self.call("/v1/chat/completions", body | {"id_slot": slot, **more})
        found: str = answer["choices"][0]["message"]["content"]
        return found


@contextmanager
def server(
    tools: Tools,
    model: Path,
    folder: Path,
    *arguments: object,
    env: Mapping[str, str] | None = None,
) -> Iterator[tuple[Client, subprocess.Popen[bytes]]]:
    """A llama-server that has loaded its model."""
    port = free_port()
    line = [
        "-m",
        model,
        "--port",
        port,
        "-t",
        THREADS,
        "-fa",
        "on",
        "--slot-save-path",
        folder,
        *arguments,
    ]
    with tools.start(
        "llama-server", *line, port=port, log=folder / "server.log", env=env
    ) as process:
        client = Client(port)
        for _ in range(600):
            try:
                client.call("/health")
                break
            except (AssertionError, OSError):
                time.sleep(0.1)
        yield client, process
