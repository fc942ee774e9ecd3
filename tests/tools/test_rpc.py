"""rpc-server with the plugin: index and selection live in the servers, and the wire carries what it did before."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from pyfasa.documents import Document, ask, is_right
from tools import THREADS, Tools, free_port, plugin, server, statistics

BUDGET = 512


class Meter:
    """Passes connections on to a port and counts their bytes."""

    def __init__(self, target: int) -> None:
        self.target = target
        self.sent = self.received = 0
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._socket.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                here, _ = self._socket.accept()
            except OSError:
                return
            there = socket.create_connection(("127.0.0.1", self.target))
            for source, sink, up in ((here, there, True), (there, here, False)):
                threading.Thread(target=self._pass, args=(source, sink, up), daemon=True).start()

    def _pass(self, source: socket.socket, sink: socket.socket, up: bool) -> None:
        while data := source.recv(1 << 16):
            if up:
                self.sent += len(data)
            else:
                self.received += len(data)
            sink.sendall(data)
        sink.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        self._socket.close()


@contextmanager
def servers(
    tools: Tools, folder: Path, model: Path | None
) -> Iterator[list[tuple[int, subprocess.Popen[bytes], Path]]]:
    """Two rpc-servers, sparse if there is a model: port, process, statistics."""
    with ExitStack() as stack:
        found = []
        for number in range(2):
            port, stats = free_port(), folder / f"rpc{number}.json"
            env = plugin(model, budget=BUDGET, verify=1, stats=stats) if model is not None else None
            log = folder / f"rpc{number}.log"
            line = ["-p", port, "-t", 1]
            process = stack.enter_context(
                tools.start("ggml-rpc-server", *line, port=port, log=log, env=env)
            )
            found.append((port, process, stats))
        yield found


def assert_sparse(process: subprocess.Popen[bytes], stats: Path) -> dict[str, Any]:
    found: dict[str, Any] = statistics(process, stats)["counters"]
    assert found["nodes"]["sparse"] > 0
    assert found["cells_attended"] < found["cells_visible"]
    assert found["cells_verified"] > 0
    assert found["verify_failures"] == 0
    return found


def test_layers_split_over_two_servers(
    tools: Tools, tiny_model_path: Path, documents: list[Document], tmp_path: Path
) -> None:
    """A stock llama-server as client; slots saved and restored go through the servers' buffers."""
    answers = []
    facts = documents[0].facts[4:25:5]
    for model in (None, tiny_model_path):
        with servers(tools, tmp_path, model) as running:
            where = ",".join(f"127.0.0.1:{port}" for port, _, _ in running)
            line = ["--rpc", where, "-ngl", 99, "-np", 2, "-c", 2 * 6144, "--cache-ram", 0]
            with server(tools, tiny_model_path, tmp_path, *line) as (client, _):
                texts = [ask(f.question, documents[0].text)[0]["content"] for f in facts]
                answers.append([client.chat(text, 0) for text in texts])
                if model is not None:
                    client.call("/slots/0?action=save", {"filename": "slot.bin"})
                    other = ask(documents[1].facts[0].question, documents[1].text)[0]["content"]
                    client.chat(other, 0)
                    client.call("/slots/1?action=restore", {"filename": "slot.bin"})
                    assert client.chat(texts[-1], 1) == answers[-1][-1]
            if model is not None:
                layers = [assert_sparse(process, stats) for _, process, stats in running]
                assert all(found["stale_events"] > 0 for found in layers)
    dense, sparse = answers
    assert sum(map(is_right, dense, facts)) >= len(facts) - 1
    assert sum(map(is_right, sparse, facts)) >= sum(map(is_right, dense, facts))


def test_clients_come_one_after_the_other(
    tools: Tools, tiny_model_path: Path, tmp_path: Path
) -> None:
    from support import write_model

    other = write_model(tmp_path / "other.gguf")  # not the profile's model
    with servers(tools, tmp_path, tiny_model_path) as running:
        where = ",".join(f"127.0.0.1:{port}" for port, _, _ in running)
        before = 0
        for model, is_ours in ((tiny_model_path, True), (other, False), (tiny_model_path, True)):
            line = ["-m", model, "-d", 1500, "-p", 0, "-n", 4, "-r", 1, "-fa", 1]
            tools.run("llama-bench", *line, "-ngl", 99, "--rpc", where)
            _, process, stats = running[0]
            now = statistics(process, stats)["counters"]
            assert now["verify_failures"] == 0
            assert (now["nodes"]["sparse"] > before) == is_ours
            before = now["nodes"]["sparse"]
        log = (tmp_path / "rpc0.log").read_text()
        assert log.count("pyfasa:") == 1
        assert "a model here is not 'pyfasa-tiny-12m'" in log


def test_the_wire_carries_what_it_did_before(
    tools: Tools, tiny_model_path: Path, tmp_path: Path
) -> None:
    carried = []
    for model in (None, tiny_model_path):
        with servers(tools, tmp_path, model) as running:
            meters = [Meter(port) for port, _, _ in running]
            where = ",".join(f"127.0.0.1:{meter.port}" for meter in meters)
            line = ["-m", tiny_model_path, "-d", 2048, "-p", 0, "-n", 32, "-r", 1, "-fa", 1]
            tools.run("llama-bench", *line, "-ngl", 99, "--rpc", where)
            carried.append([(meter.sent, meter.received) for meter in meters])
            for meter in meters:
                meter.close()
            if model is not None:
                for _, process, stats in running:
                    assert_sparse(process, stats)
    assert carried[0] == carried[1]


CLIENT = """
import ctypes, json, sys
from pathlib import Path
import llama_cpp
from pyfasa import Llama
ggml = ctypes.CDLL(str(Path(llama_cpp.__file__).parent / "lib" / "libggml.so.0"))
base = ctypes.CDLL(str(Path(llama_cpp.__file__).parent / "lib" / "libggml-base.so.0"))
library, where, model, threads, prompt = sys.argv[1:]
ggml.ggml_backend_load.restype = ctypes.c_void_p
rpc = ctypes.c_void_p(ggml.ggml_backend_load(library.encode()))
base.ggml_backend_reg_get_proc_address.restype = ctypes.c_void_p
address = base.ggml_backend_reg_get_proc_address(rpc, b"ggml_backend_rpc_add_server")
add = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_char_p)(address)
for one in where.split(","):
    ggml.ggml_backend_register(ctypes.c_void_p(add(one.encode())))
llm = Llama(model, n_ctx=6144, n_gpu_layers=99, n_threads=int(threads), verbose=False)
message = {"role": "user", "content": Path(prompt).read_text()}
answer = llm.create_chat_completion([message], temperature=0, max_tokens=48)
print(json.dumps([answer["choices"][0]["message"]["content"], llm.fasa.counters.nodes]))
llm.close()
"""


def test_pyfasa_as_client(
    tools: Tools, tiny_model_path: Path, documents: list[Document], tmp_path: Path
) -> None:
    """llama-cpp-python is built without RPC, so the client borrows the backend of the tools."""
    fact = documents[2].facts[7]
    prompt = tmp_path / "prompt.txt"
    prompt.write_text(ask(fact.question, documents[2].text)[0]["content"])
    with servers(tools, tmp_path, tiny_model_path) as running:
        where = ",".join(f"127.0.0.1:{port}" for port, _, _ in running)
        line = [tools.folder / "libggml-rpc.so", where, tiny_model_path, THREADS, prompt]
        done = subprocess.run(
            [sys.executable, "-c", CLIENT, *map(str, line)],
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        answer, nodes = json.loads(done.stdout.splitlines()[-1])
        assert is_right(answer, fact)
        assert nodes["sparse"] == 0  # attention is not computed here
        for _, process, stats in running:
            assert_sparse(process, stats)
