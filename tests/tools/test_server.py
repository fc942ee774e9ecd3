"""llama-server with the plugin: slots at once, prompt caching, save and restore, context shift."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from pyfasa.documents import Document, ask, is_right
from tools import Client, Tools, plugin, server, statistics

CACHES = {"unified": "--kv-unified", "per slot": "--no-kv-unified"}
BUDGET = 512


@contextmanager
def sparse(
    tools: Tools, model: Path, folder: Path, *arguments: object, **settings: object
) -> Iterator[tuple[Client, subprocess.Popen[bytes]]]:
    """A server that compares its index with the K cache before every use, and is sparse by the end."""
    stats = folder / "stats.json"
    env = plugin(model, **({"budget": BUDGET, "verify": 1, "stats": stats} | settings))
    with server(tools, model, folder, *arguments, env=env) as (client, process):
        yield client, process
        found = statistics(process, stats)["counters"]
        assert found["nodes"]["sparse"] > 0
        assert found["cells_attended"] < found["cells_visible"]
        assert found["cells_verified"] > 0
        assert found["verify_failures"] == 0


def question(document: Document, number: int) -> tuple[str, Any]:
    fact = document.facts[number]
    return ask(fact.question, document.text)[0]["content"], fact


@pytest.mark.parametrize("cache", CACHES)
def test_four_slots_at_once(
    cache: str, tools: Tools, tiny_model_path: Path, documents: list[Document], tmp_path: Path
) -> None:
    """Every answer is that of the dense server; each slot knows its own document only."""
    line = ["-np", 4, CACHES[cache], "-c", 4 * 6144]

    def interview(client: Client, slot: int) -> list[str]:
        return [client.chat(question(documents[slot], n)[0], slot) for n in range(0, 25, 6)]

    answers = []
    for served in (server, sparse):
        started = served(tools, tiny_model_path, tmp_path, *line)
        with started as (client, _), ThreadPoolExecutor(4) as pool:
            answers.append(list(pool.map(lambda s, c=client: interview(c, s), range(4))))
    dense, found = ([a for slot in run for a in slot] for run in answers)
    facts = [documents[s].facts[n] for s in range(4) for n in range(0, 25, 6)]
    n_dense = sum(map(is_right, dense, facts))
    assert n_dense >= 18  # of 20: the model errs now and then
    assert sum(map(is_right, found, facts)) >= n_dense - 1
    assert sum(a == b for a, b in zip(dense, found, strict=True)) >= 18


def test_prompt_caching(
    tools: Tools, tiny_model_path: Path, documents: list[Document], tmp_path: Path
) -> None:
    """A second question reuses the document of the first."""
    with sparse(tools, tiny_model_path, tmp_path, "-np", 1, "-c", 6144) as (client, _):
        cached = []
        for number in (3, 14, 3):
            text, fact = question(documents[1], number)
            body = {"messages": [{"role": "user", "content": text}], "temperature": 0}
            answer = client.call("/v1/chat/completions", body | {"max_tokens": 48})
            assert is_right(answer["choices"][0]["message"]["content"], fact)
            cached.append(answer["timings"]["cache_n"])
        assert cached[0] < 100
        assert min(cached[1:]) > 4800


@pytest.mark.parametrize("cache", CACHES)
def test_a_slot_is_saved_and_restored(
    cache: str, tools: Tools, tiny_model_path: Path, documents: list[Document], tmp_path: Path
) -> None:
    """Into another slot, after the first has read another document."""
    line = ["-np", 2, CACHES[cache], "-c", 3 * 6144, "--cache-ram", 0]
    text, fact = question(documents[2], 11)
    other, _ = question(documents[3], 5)
    with sparse(tools, tiny_model_path, tmp_path, *line) as (client, _process):
        first = client.chat(text, 0)
        assert is_right(first, fact)
        saved = client.call("/slots/0?action=save", {"filename": "slot.bin"})
        client.chat(other, 0)
        restored = client.call("/slots/1?action=restore", {"filename": "slot.bin"})
        assert restored["n_restored"] == saved["n_saved"] > 5000
        body = {"messages": [{"role": "user", "content": text}], "temperature": 0, "max_tokens": 48}
        answer = client.call("/v1/chat/completions", body | {"id_slot": 1})
        assert answer["timings"]["cache_n"] > 5000
        assert answer["choices"][0]["message"]["content"] == first


def test_context_shift(
    tools: Tools, tiny_model_path: Path, documents: list[Document], tmp_path: Path
) -> None:
    """Generation goes on past the end of the context; keys that were moved are indexed again."""
    line = ["-np", 1, "-c", 1024, "--context-shift"]
    body = {"prompt": documents[0].text[:1500], "temperature": 0, "n_predict": 2000}
    with sparse(tools, tiny_model_path, tmp_path, *line, budget=256, min_ctx=0) as (
        client,
        process,
    ):
        answer = client.call("/completion", body | {"ignore_eos": True})
        assert answer["tokens_predicted"] == 2000
        assert answer["truncated"]
        found = statistics(process, tmp_path / "stats.json")["counters"]
        assert found["stale_events"] >= 6 * 2  # layers and shifts
