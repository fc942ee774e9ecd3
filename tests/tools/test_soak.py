"""Four clients at once through the openai package for PYFASA_SOAK_MINUTES (10): right answers, and never another's."""

from __future__ import annotations

import os
import random
import re
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import openai

from pyfasa import Llama
from pyfasa.documents import Document, ask, is_right, make_document
from tools import Tools, plugin, server, statistics

MINUTES = float(os.environ.get("PYFASA_SOAK_MINUTES", "10"))
CLIENTS = 4
DOCUMENTS = 2  # of each client, which takes them in turns of some questions
QUESTIONS = 5


@dataclass
class Tally:
    asked: int = 0
    right: int = 0
    mixed: list[str] = field(default_factory=list)


def test_four_clients(
    tools: Tools, tiny_model_path: Path, tokenizer: Llama, tmp_path: Path
) -> None:
    def document(seed: int) -> Document:
        return make_document(
            lambda text: tokenizer.tokenize(text.encode(), add_bos=False), 4000, 20, seed=seed
        )

    documents = [[document(10 * c + d) for d in range(DOCUMENTS)] for c in range(CLIENTS)]
    values = [{f.value for d in own for f in d.facts} for own in documents]
    end = time.monotonic() + 60 * MINUTES

    def client(number: int, port: int) -> Tally:
        api = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", timeout=600)
        rng, tally = random.Random(number), Tally()
        others = set().union(*(v for i, v in enumerate(values) if i != number))
        while time.monotonic() < end:
            chosen = rng.choice(documents[number])
            for fact in rng.sample(chosen.facts, QUESTIONS):
                stream = api.chat.completions.create(
                    model="any",
                    messages=ask(fact.question, chosen.text),
                    temperature=0,
                    max_tokens=40,
                    stream=True,
                )
                parts = [c.choices[0].delta.content or "" for c in stream if c.choices]
                answer = "".join(parts)
                tally.asked += 1
                tally.right += is_right(answer, fact)
                if others & set(re.findall(r"\d+", answer)):
                    tally.mixed.append(answer)
        return tally

    stats = tmp_path / "stats.json"
    env = plugin(tiny_model_path, budget=512, stats=stats)
    line = ["-np", CLIENTS, "-c", CLIENTS * 5120, "--no-kv-unified"]
    with server(tools, tiny_model_path, tmp_path, *line, env=env) as (served, process):
        with ThreadPoolExecutor(CLIENTS) as pool:
            tallies = list(pool.map(lambda number: client(number, served.port), range(CLIENTS)))
        counters = statistics(process, stats)["counters"]
    asked, right = sum(t.asked for t in tallies), sum(t.right for t in tallies)
    share = counters["cells_attended"] / counters["cells_visible"]
    print(
        f"\n{MINUTES:g} minutes: {right} of {asked} right, {sum(len(t.mixed) for t in tallies)} mixed up; "
        f"sparse nodes {counters['nodes']['sparse']}, cells attended {100 * share:.1f} %"
    )
    assert [t.mixed for t in tallies] == [[]] * CLIENTS
    assert all(t.asked >= QUESTIONS for t in tallies)
    assert right >= 0.85 * asked  # the model itself errs on some
    assert counters["nodes"]["sparse"] > 0
