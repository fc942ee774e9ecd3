"""Decode speed at chosen cache depths: dense and FASA in alternating repetitions on one context.

With layers on a GPU and the cache in system memory, dense has a context of its own, see `bench`.
"""

from __future__ import annotations

import csv
import ctypes
import io
import json
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from pyfasa import machine, roofline
from pyfasa.console import cells_read, markdown, percent
from pyfasa.synthetic import SequenceState, fill, read_state

if TYPE_CHECKING:
    from pyfasa.llama import Llama
    from pyfasa.native import Counters, Timings

STAGES = ("index", "score", "select", "attend", "wait", "plan")
REAL_CELLS = 512
WARM_UP = 4  # tokens

Row = dict[str, Any]


# ---- measuring ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Settings:
    """What to measure; names as in llama-bench. None: the default of pyfasa.Llama."""

    model: Path
    depths: tuple[int, ...] = (8192,)
    budgets: tuple[int, ...] = (1024,)
    type_k: str = "f16"
    type_v: str = "f16"
    n_threads: int | None = None
    n_gpu_layers: int = 0
    offload_kqv: bool = True
    n_gen: int = 32
    repetitions: int = 5
    n_fc: int | None = None
    index_bits: int | None = None
    min_ctx: int | None = None
    profile: Path | None = None
    bandwidth_gbs: float | None = None  # None: measured, where the CPU does all the work
    command: str = ""

    def __post_init__(self) -> None:
        if min(self.n_gen, self.repetitions) < 1:
            raise ValueError(f"n_gen is {self.n_gen}, repetitions {self.repetitions}; both need 1")
        if not self.depths or min(self.depths) < 0:
            raise ValueError(f"depths are {self.depths}; give one or more, none negative")
        if not self.budgets or min(self.budgets) < 1:
            raise ValueError(f"budgets are {self.budgets}; give one or more, all at least 1")
        if self.bandwidth_gbs is not None and not self.bandwidth_gbs > 0:
            raise ValueError(f"the bandwidth is {self.bandwidth_gbs} GB/s; it must be above 0")


@dataclass(frozen=True)
class Repetition:
    """One timed run of decode calls, and what pyfasa counted in it."""

    ns: int
    counters: Counters
    timings: Timings


def repeat(llm: Llama, depth: int, tokens: Sequence[int], budget: int | None) -> Repetition:
    """Decodes `tokens` one by one after `depth` cells; budget None is dense. Ends where it began.

    The last cells are decoded anew before, untimed: the index catches up with dense runs, and on a GPU llama.cpp and
    pyfasa capture their graphs, which takes as long as several tokens.
    """
    import llama_cpp

    if budget is not None:
        llm.fasa.budget = budget
    with llm.dense() if budget is None else nullcontext():
        warm_up = [tokens[i % len(tokens)] for i in range(WARM_UP)]
        for first, run in ((max(depth - WARM_UP, 0), warm_up), (depth, tokens)):
            llm.n_tokens = first
            llm.fasa.reset()
            start = time.perf_counter_ns()
            for token in run:
                llm.eval([token])
                llama_cpp.llama_synchronize(llm.ctx)
            ns = time.perf_counter_ns() - start
    llama_cpp.llama_memory_seq_rm(llama_cpp.llama_get_memory(llm.ctx), 0, depth, -1)
    llm.n_tokens = depth
    return Repetition(ns, llm.fasa.counters, llm.fasa.timings)


def bench(settings: Settings, progress: Callable[[str], None] = lambda _: None) -> Iterator[Row]:
    """Yields a row per depth and attention: dense first, then FASA with each budget.

    ValueError or RuntimeError when the model cannot be loaded, filled or decoded sparsely.
    """
    runs: list[int | None] = [None, *settings.budgets]
    plain: dict[int, list[Repetition]] = {}
    if settings.n_gpu_layers != 0 and not settings.offload_kqv:
        # With a profile the CPU computes decode attention, also inside dense().
        with _opened(settings, False, progress) as (llm, state, tokens):
            for depth in settings.depths:
                fill(llm, state, depth)
                progress(f"depth {depth:,}, dense")
                plain[depth] = [
                    repeat(llm, depth, tokens, None) for _ in range(settings.repetitions)
                ]
    with _opened(settings, settings.profile, progress) as (llm, state, tokens):
        if not llm.fasa.active:
            raise RuntimeError(f"FASA is not active, there is nothing to time: {llm.fasa.reason}")
        common = describe(llm, settings)
        reads = roofline.Reads(
            roofline.weight_bytes(settings.model), sum(t.rows.shape[1] for t in state.tensors)
        )
        bandwidth = settings.bandwidth_gbs
        if bandwidth is None and common["backend"] == "CPU":
            progress("measuring the memory")
            bandwidth = roofline.read_bandwidth(llm.n_threads)
        for depth in settings.depths:
            progress(f"filling {depth:,} cells")
            fill(llm, state, depth)
            results = [plain.get(depth, []), *(list[Repetition]() for _ in settings.budgets)]
            pairs = list(zip(results, runs, strict=True))
            for i in range(settings.repetitions):
                progress(f"depth {depth:,}, repetition {i + 1} of {settings.repetitions}")
                for result, budget in pairs[1:] if plain else pairs:
                    result.append(repeat(llm, depth, tokens, budget))
            for result, budget in pairs:
                measured = row(common, settings, depth, budget, llm.fasa.n_fc, result)
                n_bytes = bytes_token(reads, depth, settings.n_gen, result)
                token_ns = measured["avg_ns"] / settings.n_gen
                yield measured | roofline.columns(n_bytes, bandwidth, token_ns)


@contextmanager
def _opened(
    settings: Settings, profile: Path | Literal[False] | None, progress: Callable[[str], None]
) -> Iterator[tuple[Llama, SequenceState, list[int]]]:
    """A model, the state of some real cells of it, and the tokens to decode."""
    from pyfasa.llama import Llama

    llm = Llama(
        str(settings.model),
        n_ctx=max(REAL_CELLS, *settings.depths) + settings.n_gen + 8,
        n_threads=settings.n_threads,
        n_threads_batch=settings.n_threads,
        n_gpu_layers=settings.n_gpu_layers,
        offload_kqv=settings.offload_kqv,
        type_k=settings.type_k,
        type_v=settings.type_v,
        profile=profile,
        budget=settings.budgets[0],
        n_fc=settings.n_fc,
        index_bits=settings.index_bits,
        min_ctx=settings.min_ctx,
        verbose=False,
    )
    with closing(llm):
        progress(f"evaluating {REAL_CELLS} tokens")
        rng = np.random.default_rng(0)
        llm.eval(rng.integers(0, llm.n_vocab(), REAL_CELLS).tolist())
        state = read_state(llm)
        yield llm, state, rng.integers(0, llm.n_vocab(), settings.n_gen).tolist()


def describe(llm: Llama, settings: Settings) -> Row:
    """The columns that are the same in every row."""
    import llama_cpp

    text = ctypes.create_string_buffer(128)
    llama_cpp.llama_model_desc(llm.model, text, len(text))
    cpu = machine.cpu()
    devices = machine.devices()
    gpus = [d.name for d in devices if d.is_gpu and settings.n_gpu_layers != 0]
    return {
        "build_commit": machine.ggml_string("ggml_commit"),
        "build_number": None,  # not exported by libllama
        "llama_cpp_python_version": llama_cpp.__version__,
        "pyfasa_version": machine.pyfasa_version(),
        "cpu_info": cpu.model,
        "machine": f"{cpu.model}, {cpu.cores} cores",
        "backends": ", ".join(device.name for device in devices),
        "backend": gpus[0].rstrip("0123456789") if gpus else "CPU",
        "model": settings.model.stem,
        "model_filename": str(settings.model),
        "model_type": text.value.decode(),
        "model_size": llama_cpp.llama_model_size(llm.model),
        "model_n_params": llama_cpp.llama_model_n_params(llm.model),
        "n_batch": llm.n_batch,
        "n_ubatch": llm.context_params.n_ubatch,
        "n_threads": llm.n_threads,
        "n_gpu_layers": settings.n_gpu_layers,
        "no_kv_offload": not settings.offload_kqv,
        "flash_attn": True,
        **{name: getattr(settings, name) for name in ("type_k", "type_v", "command")},
    }


def bytes_token(
    reads: roofline.Reads, depth: int, n_gen: int, results: Sequence[Repetition]
) -> float:
    """Bytes that a token of these repetitions reads on average; each sees one cell more."""
    counted = [r.counters for r in results]
    n_token = n_gen * len(counted)
    nodes = sum(sum(c.nodes.values()) for c in counted)
    sparse = sum(c.nodes.get("sparse", 0) for c in counted)
    return reads.of_token(
        depth + (n_gen + 1) / 2,
        dense=1 - sparse / nodes if nodes else 1.0,
        scored=sum(c.bytes_scored for c in counted) / n_token,
        attended=sum(c.bytes_attended for c in counted) / n_token,
    )


def row(
    common: Row,
    settings: Settings,
    depth: int,
    budget: int | None,
    n_fc: int,
    results: Sequence[Repetition],
) -> Row:
    """One row; avg_ns and samples_ns are per repetition, the stage columns per token."""
    n_token = settings.n_gen * len(results)
    speeds = [settings.n_gen * 1e9 / r.ns for r in results]
    times = [r.ns for r in results]
    stages = {f"{s}_ns": sum(getattr(r.timings, s) for r in results) / n_token for s in STAGES}
    nodes = sum((Counter(r.counters.nodes) for r in results), Counter[str]())
    visible = sum(r.counters.cells_visible for r in results)
    attended = sum(r.counters.cells_attended for r in results)
    sparse = budget is not None
    return common | {
        "attention": "fasa" if sparse else "dense",
        "budget": budget,
        "n_fc": n_fc if sparse else None,
        "index_bits": settings.index_bits if sparse else None,
        "n_prompt": 0,
        "n_gen": settings.n_gen,
        "n_depth": depth,
        "test_time": datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "avg_ns": round(statistics.fmean(times)),
        "stddev_ns": round(statistics.stdev(times)) if len(times) > 1 else 0,
        "avg_ts": statistics.fmean(speeds),
        "stddev_ts": statistics.stdev(speeds) if len(speeds) > 1 else 0.0,
        "samples_ns": times,
        "samples_ts": speeds,
        **(stages if sparse else dict.fromkeys(stages)),
        "rest_ns": sum(times) / n_token - sum(stages.values()) if sparse else None,
        "cells_read": cells_read(nodes, visible, attended),
        "nodes": dict(nodes),
    }


# ---- output -------------------------------------------------------------------------------------


def to_csv(rows: Sequence[Row]) -> str:
    """The same columns; lists and objects as JSON text."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    nested = (list, dict)
    for r in rows:
        writer.writerow({k: json.dumps(v) if isinstance(v, nested) else v for k, v in r.items()})
    return text.getvalue().rstrip("\n")


def to_markdown(rows: Sequence[Row]) -> str:
    """llama-bench's table with the ratio to dense, the stages in us per token, and the roofline."""

    def of_run(r: Row) -> tuple[Any, ...]:
        return r["type_k"], r["type_v"], r["n_depth"]

    dense = {of_run(r): r["avg_ts"] for r in rows if r["attention"] == "dense"}
    speed = [
        {
            "model": r["model_type"],
            "size": f"{r['model_size'] / 2**20:.2f} MiB",
            "params": f"{r['model_n_params'] / 1e6:.2f} M",
            "threads": str(r["n_threads"]),
            **{name: r[name] for name in ("type_k", "type_v", "attention")},
            "budget": "" if r["budget"] is None else str(r["budget"]),
            "test": f"tg{r['n_gen']} @ d{r['n_depth']}",
            "t/s": f"{r['avg_ts']:.2f} \u00b1 {r['stddev_ts']:.2f}",
            "ratio": f"{r['avg_ts'] / dense[of_run(r)]:.2f}",
        }
        for r in rows
    ]
    parts = [markdown(speed, left=("model", "attention"))]
    stages = [
        {
            "us per token @ depth": f"d{r['n_depth']}",
            **{name: r[name] for name in ("type_k", "type_v")},
            "budget": str(r["budget"]),
            **{stage: f"{r[f'{stage}_ns'] / 1e3:.0f}" for stage in (*STAGES, "rest")},
            "total": f"{r['avg_ns'] / r['n_gen'] / 1e3:.0f}",
            "cells read": f"{100 * r['cells_read']:.2f} %",
        }
        for r in rows
        if r["attention"] == "fasa"
    ]
    if stages:
        parts.append(markdown(stages))
    floors = [
        {
            "roofline": f"d{r['n_depth']}",
            **{name: r[name] for name in ("type_k", "type_v", "attention")},
            "budget": "" if r["budget"] is None else str(r["budget"]),
            "MB per token": f"{r['bytes_token'] / 1e6:.2f}",
            "GB/s": f"{r['bandwidth_gbs']:.1f}",
            "floor us": f"{r['floor_ns'] / 1e3:.0f}",
            "measured us": f"{r['avg_ns'] / r['n_gen'] / 1e3:.0f}",
            "floor / measured": percent(r["floor_share"]),
        }
        for r in rows
        if r.get("bandwidth_gbs") is not None
    ]
    if floors:
        parts.append(markdown(floors, left=("attention",)))
    build = "{machine}; pyfasa {pyfasa_version}, llama-cpp-python {llama_cpp_python_version}"
    parts.append(build.format_map(rows[0]))
    return "\n\n".join(parts)


Format = Callable[[Sequence[Row]], str]
to_json: Format = partial(json.dumps, indent=2)
FORMATS: dict[str, Format] = {"md": to_markdown, "json": to_json, "csv": to_csv}
