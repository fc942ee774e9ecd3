"""Tokens that begin before llama.cpp has set all of their inputs: the same bits, whatever happens between tokens.

    python tests/gpu/head_start.py [--quick]

Plays the same calls on two contexts of a random model on a CUDA device, with and without. Exits with 1 at the end when
logits or counters are not as they should be. Quick: small models, and each kind of cache with some of the scenes.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests" / "gpu")]

from check import expect, finish  # noqa: E402

import zoo  # noqa: E402
from pyfasa.native import Config  # noqa: E402
from sequences import Context, Model, Row, context, loaded_file  # noqa: E402
from support import F32, NORM, Shape, random_tokens, write_model  # noqa: E402

TOKENS = random_tokens(4000, seed=5)
CONFIG = Config(budget=64, min_ctx=128, sinks=2, recent=8)
SHAPES = (NORM, Shape(n_head=6), Shape("qwen3", n_head=4, n_head_kv=1, head_dim=128, n_rot=128))
SMALL = (Shape(n_head=1, n_head_kv=1),)


def steps(live: Context, n: int, seq: int = 0) -> Iterator[F32]:
    """Tokens one by one; what they are depends on their position only."""
    for _ in range(n):
        yield live.step({seq: TOKENS[live.end(seq)]})


# ---- what may happen between tokens: each yields logits ----


def plain(live: Context) -> Iterator[F32]:
    live.feed(0, TOKENS[:740])
    yield from steps(live, 60)  # n_kv grows once


def rewound(live: Context) -> Iterator[F32]:
    live.feed(0, TOKENS[:600])
    for n in (20, 25, 3, 12):
        yield from steps(live, n)
        live.remove(0, live.end(0) - 8)
    yield from steps(live, 8)


def next_cell_is_taken(live: Context) -> Iterator[F32]:
    """Cells of one sequence end where those of another begin: what is guessed to be the next cell holds its token."""
    live.feed(0, TOKENS[:300])
    live.feed(1, TOKENS[1000:1250])
    yield from steps(live, 3, seq=1)
    live.remove(0, 280)
    yield from steps(live, 30)  # twenty cells are free, then comes what the other sequence has
    yield from steps(live, 12, seq=1)


def in_turns(live: Context) -> Iterator[F32]:
    live.feed(0, TOKENS[:300])
    live.feed(1, TOKENS[1000:1310])
    for _ in range(12):
        yield from steps(live, 1, seq=0)
        yield from steps(live, 1, seq=1)
    yield from steps(live, 12, seq=1)


def shifted(live: Context) -> Iterator[F32]:
    live.feed(0, TOKENS[:500])
    yield from steps(live, 10)
    live.remove(0, 100, 150)
    live.shift(0, 150, -1, -50)
    yield from steps(live, 15)


def restored(live: Context) -> Iterator[F32]:
    live.feed(0, TOKENS[:400])
    yield from steps(live, 10)
    state = live.saved()
    yield from steps(live, 10)
    live.load(state)
    yield from steps(live, 10)
    live.clear()
    live.feed(0, TOKENS[:300])
    yield from steps(live, 10)


def without_logits(live: Context) -> Iterator[F32]:
    """Nobody waits for a token, so that the next one comes while it runs."""
    live.feed(0, TOKENS[:500])
    for _ in range(2):
        for _ in range(12):
            live.decode([Row(TOKENS[live.end(0)], live.end(0), (0,), False)])
        yield from steps(live, 8)


def configured(live: Context) -> Iterator[F32]:
    assert live.session is not None
    live.feed(0, TOKENS[:500])
    yield from steps(live, 7)
    now = replace(CONFIG, head_start=live.counters.head_starts > 0)
    for settings in (
        {"budget": 96},
        {"enabled": False},
        {"enabled": True},
        {"n_fc": 8},
        {"min_ctx": 4000},
        {},
    ):
        live.session.configure(replace(now, **settings))
        yield from steps(live, 7)
    live.session.invalidate()
    yield from steps(live, 7)


def batches(live: Context) -> Iterator[F32]:
    live.feed(0, TOKENS[:500])
    for n in (1, 3, 1, 8, 1):
        for _ in range(8):
            first = live.end(0)
            yield live.decode([Row(TOKENS[first + i], first + i) for i in range(n)])


Scene = Callable[[Context], Iterator[F32]]
SETUPS: tuple[dict[str, object], ...] = (
    {"type_k": "f16"},
    {"type_k": "q8_0", "type_v": "q8_0"},
    {"unified": False},
)
SCENES: tuple[Scene, ...] = (
    plain,
    rewound,
    next_cell_is_taken,
    in_turns,
    shifted,
    restored,
    without_logits,
    configured,
    batches,
)
# Where something that was begun must turn out wrong.
WRONG = {rewound, next_cell_is_taken}


def play(
    model: Model, scene: Scene, head_start: bool, **setup: object
) -> tuple[list[F32], dict[str, int]]:
    config = replace(CONFIG, head_start=head_start)
    with context(model, config, n_seq_max=2, n_ctx=2048, n_batch=1024, **setup) as live:
        found = [logits.copy() for logits in scene(live)]
        counters = live.counters
        assert live.session is not None
        live.session.configure(replace(config, verify=True))
        list(steps(live, 2))
        counted = {
            "begun": counters.head_starts,
            "undone": counters.head_starts_undone,
            "sparse": counters.nodes["sparse"],
            "cells attended": counters.cells_attended,
            "stale": live.counters.verify_failures,
        }
    return found, counted


def models(folder: Path, quick: bool) -> Iterator[tuple[Shape, Path, bool]]:
    """Shape, file, and whether tokens may begin early: a graph must be captured for that."""
    for shape in SMALL if quick else SHAPES:
        yield shape, write_model(folder / f"{shape}.gguf", shape), True
    heads = {"n_head": 2, "n_head_kv": 1} if quick else {}
    layer = zoo.BY_NAME["qwen3moe"].layer | zoo.quantized_experts(gguf.GGMLQuantizationType.Q8_0)
    path = zoo.write(folder / "q8.gguf", "qwen3moe", layer=layer, **heads)
    yield Shape("quantized experts", **heads), path, True
    path = zoo.write(folder / "f32.gguf", "qwen3moe", **heads)
    yield Shape("f32 experts", **heads), path, False


def compare(model: Model, scene: Scene, begins: bool, setup: dict[str, object]) -> None:
    name = f"{model.shape} {scene.__name__} {setup}:"
    without, counted = play(model, scene, False, **setup)
    found, early = play(model, scene, True, **setup)
    expect(f"{name} none begins early unasked", counted["begun"] == 0)
    same = len(found) == len(without) and all(map(np.array_equal, found, without))
    expect(f"{name} logits are the same bits", same)
    expect(f"{name} some begin early", (early["begun"] > 0) == begins, early)
    wrong = scene in WRONG and begins and (scene is rewound or setup != {"unified": False})
    expect(f"{name} wrong guesses", (early["undone"] > 0) == wrong, early["undone"])
    for what in ("sparse", "cells attended", "stale"):
        expect(f"{name} {what}", early[what] == counted[what], early[what])
    expect(f"{name} sparse nodes", early["sparse"] > 0)


def main() -> None:
    quick = "--quick" in sys.argv
    with tempfile.TemporaryDirectory() as folder:
        for i, (shape, path, begins) in enumerate(models(Path(folder), quick)):
            with loaded_file(path, shape) as model:
                for j, scene in enumerate(SCENES[1:2] if quick and i > 0 else SCENES):
                    for setup in SETUPS[j % 3 : j % 3 + 1] if quick else SETUPS:
                        compare(model, scene, begins, setup)
    finish()


if __name__ == "__main__":
    main()
