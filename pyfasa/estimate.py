"""What a calibration will take: memory, counted before the model is opened, and time, measured on the opened model."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from pyfasa import synthetic
from pyfasa.console import human_bytes
from pyfasa.footprint import whole_cells
from pyfasa.gguf_header import Header, shard_names
from pyfasa.tally import ROWS, Tally

if TYPE_CHECKING:
    from pyfasa.calibration_plan import Plan
    from pyfasa.llama import Llama

N_BATCH = 512  # tokens that pyfasa.Llama evaluates at once
PROBE_TOKENS = 128  # of a prompt
PROBE_QUERIES = 16  # of an answer
PROBE_CELLS = 1024  # keys of the layer that is added up


@dataclass(frozen=True)
class Memory:
    """Bytes that a calibration holds at its peak, by what they are for.

    weights  the model file, of a split model all files
    cache    K and V in f16, as if every layer had as many KV heads as the widest
    graph    llama.cpp's logits and mask of one batch, twice the logits; its other buffers are small beside them
    held     the captured queries, and what it takes to add up one layer; at least what the probe of the time holds
    """

    weights: int
    cache: int
    graph: int
    held: int

    @property
    def total(self) -> int:
        return self.weights + self.cache + self.graph + self.held

    def __str__(self) -> str:
        parts = {
            "weights": self.weights,
            "K/V cache": self.cache,
            "llama.cpp's buffers": self.graph,
            "calibration": self.held,
        }
        listed = ", ".join(f"{name} {human_bytes(size)}" for name, size in parts.items())
        return f"about {human_bytes(self.total)}: {listed}"


def memory(plan: Plan) -> Memory:
    """Counted from the file and the plan; reads the file's head only."""
    shards = shard_names(plan.model_path)
    header = Header.read(shards[0])
    model = plan.identity
    n_cells = whole_cells(plan.longest.n_tokens)
    v_dim = header.values.get(f"{model.architecture}.attention.value_length", model.head_dim)
    row = model.n_head_kv * (model.head_dim + int(np.max(v_dim)))
    embedding = header.tensors.get("token_embd.weight")
    n_vocab = 0 if embedding is None else embedding.shape[-1]
    cache = 2 * model.n_layer * n_cells * row
    held = queries_bytes(plan) + layer_bytes(plan) + sums_bytes(plan.empty)
    return Memory(
        weights=sum(Path(shard).stat().st_size for shard in shards),
        cache=cache,
        graph=N_BATCH * (2 * 4 * n_vocab + 2 * n_cells),
        held=max(held, cache // 2),  # the probe copies half of a cache before the rest is held
    )


def queries_bytes(plan: Plan) -> int:
    """f32 queries of all layers of the sample that asks most, and of one layer once more."""
    model = plan.identity
    n_row = max(len(sample.visible()) for sample in plan.samples)
    return 4 * n_row * model.n_head * model.head_dim * (model.n_layer + 1)


def sums_bytes(tally: Tally) -> int:
    return sum(value.nbytes for value in vars(tally).values() if isinstance(value, np.ndarray))


def layer_bytes(plan: Plan) -> int:
    """The keys of one layer in f32, and either their squares or what is held of the heads in work at once."""
    model = plan.identity
    n_cells = plan.longest.n_tokens
    keys = 4 * n_cells * model.head_dim
    # Of a head: its keys, centered keys and entries; softmax weights, scores, two copies of them and a mask.
    scores = n_cells * ROWS * (4 * 4 + 1)
    head = 3 * keys + 4 * n_cells * segment_dims(plan.empty.candidates) + scores
    squares = 2 * keys * model.n_head_kv
    return keys * model.n_head_kv + max(squares, _heads_at_once(plan) * head)


def segment_dims(candidates: npt.NDArray[np.uint8]) -> int:
    """Dims of all segments that ``tally.Entries`` keeps for candidates (n_candidate, n_chunk): equal ones once."""
    segments = {
        (int(width), np.flatnonzero(bits == width).tobytes()): int((bits == width).sum())
        for bits in candidates
        for width in set(bits.tolist()) - {0}
    }
    return 2 * sum(segments.values())


def _heads_at_once(plan: Plan) -> int:
    return min(os.cpu_count() or 1, plan.identity.n_head_kv)


# ---- time ----------------------------------------------------------------------------------------


def seconds(llm: Llama, plan: Plan) -> float:
    """Seconds for the whole calibration, from a probe on the opened model that takes a few hundredths of it.

    Three rates are measured: of a prompt and of captured queries, both in the middle of a document, and of adding up
    a layer, on random keys. Accurate to a factor of two or so: other work on the machine counts, and the rates are
    taken to grow evenly with the depth. Leaves the cache in disorder.
    """
    tokens = plan.longest.runs[0][0]
    middle = plan.n_tokens // len(plan.samples) // 2
    llm.n_tokens = 0
    with llm.dense():
        llm.eval(tokens[:PROBE_TOKENS])
    try:
        state = synthetic.read_state(llm)
        synthetic.fill(llm, state, middle)
    except (
        ValueError,
        RuntimeError,
    ):  # layers of other kinds: then the rates are those of a short context
        state, middle = None, PROBE_TOKENS

    def timed(n: int, capture: bool) -> float:
        """Per token."""
        if state is None:
            llm.n_tokens = middle
        else:
            synthetic.fill(llm, state, middle)
        with llm.fasa.capturing() if capture else llm.dense():
            return _took(lambda: llm.eval(tokens[:n])) / n

    prompt = timed(PROBE_TOKENS, capture=False) * (plan.n_tokens - plan.n_query)
    queries = timed(PROBE_QUERIES, capture=True) * plan.n_query
    return prompt + queries + _adding(plan)


def _adding(plan: Plan) -> float:
    """Seconds to add up all layers of all samples, from some heads of one layer and its first cells."""
    model = plan.identity
    n_head_kv = _heads_at_once(plan)
    n_head = n_head_kv * (model.n_head // model.n_head_kv)
    part = replace(model, n_layer=1, n_head=n_head, n_head_kv=n_head_kv)
    tally = Tally.zeros(part, plan.empty.method, plan.empty.candidates)
    visible = plan.longest.visible()
    n_cell = min(PROBE_CELLS, plan.longest.n_tokens)
    rng = np.random.default_rng(0)
    queries = rng.standard_normal((len(visible), n_head, model.head_dim), np.float32)
    keys = rng.standard_normal((n_cell, n_head_kv, model.head_dim), np.float32)
    seen = np.minimum(visible, n_cell)
    took = _took(lambda: tally.add_layer(part, 0, queries, keys, seen))
    n_layers = model.n_layer * model.n_head_kv / n_head_kv
    return took * n_layers * plan.n_tokens / n_cell


def _took(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def duration(n: float) -> str:
    """`100.4` -> `about 1.7 minutes, give or take a factor of two, from a short probe`"""
    size = f"{n:.1f} s" if n < 10 else f"{n:.0f} s" if n < 90 else f"{n / 60:.1f} minutes"
    return f"about {size}, give or take a factor of two, from a short probe"
