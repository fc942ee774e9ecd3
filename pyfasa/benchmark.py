"""Decode speed at chosen cache depths: dense and FASA in alternating repetitions on one context."""

from __future__ import annotations

import csv
import ctypes
import io
import json
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pyfasa import doctor
from pyfasa.console import cells_read, markdown
from pyfasa.synthetic import fill, read_state

if TYPE_CHECKING:
    from pyfasa.llama import Llama
    from pyfasa.native import Counters, Timings

STAGES = ("index", "score", "select", "attend", "wait", "plan")
REAL_CELLS = 512

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
    n_gen: int = 32
    repetitions: int = 5
    n_fc: int | None = None
    index_bits: int | None = None
    min_ctx: int | None = None
    profile: Path | None = None
    command: str = ""

    def __post_init__(self) -> None:
        if min(self.n_gen, self.repetitions) < 1:
            raise ValueError(f"n_gen is {self.n_gen}, repetitions {self.repetitions}; both need 1")
        if not self.depths or min(self.depths) < 0:
            raise ValueError(f"depths are {self.depths}; give one or more, none negative")
        if not self.budgets or min(self.budgets) < 1:
            raise ValueError(f"budgets are {self.budgets}; give one or more, all at least 1")


@dataclass(frozen=True)
class Repetition:
    """One timed run of decode calls, and what pyfasa counted in it."""

    ns: int
    counters: Counters
    timings: Timings


def repeat(llm: Llama, depth: int, tokens: Sequence[int], budget: int | None) -> Repetition:
    """Decodes `tokens` one by one after `depth` cells; budget None is dense. Ends where it began.

    The first token goes once untimed: it warms up, and the index catches up with dense runs.
    """
    import llama_cpp

    if budget is not None:
        llm.fasa.budget = budget
    with llm.dense() if budget is None else nullcontext():
        for warm_up in (True, False):
            llm.n_tokens = depth
            llm.fasa.reset()
            start = time.perf_counter_ns()
            for token in tokens[:1] if warm_up else tokens:
                llm.eval([token])
                llama_cpp.llama_synchronize(llm.ctx)
            ns = time.perf_counter_ns() - start
    llama_cpp.llama_memory_seq_rm(llama_cpp.llama_get_memory(llm.ctx), 0, depth, -1)
    llm.n_tokens = depth
    return Repetition(ns, llm.fasa.counters, llm.fasa.timings)


def bench(settings: Settings, progress: Callable[[str], None] = lambda _: None) -> Iterator[Row]:
    """Yields a row per depth and attention: dense first, then FASA with each budget."""
    from pyfasa.llama import Llama

    llm = Llama(
        str(settings.model),
        n_ctx=max(REAL_CELLS, *settings.depths) + settings.n_gen + 8,
        n_threads=settings.n_threads,
        n_threads_batch=settings.n_threads,
        type_k=settings.type_k,
        type_v=settings.type_v,
        profile=settings.profile,
        budget=settings.budgets[0],
        n_fc=settings.n_fc,
        index_bits=settings.index_bits,
        min_ctx=settings.min_ctx,
        verbose=False,
    )
    try:
        if not llm.fasa.active:
            raise RuntimeError(f"FASA is not active, there is nothing to time: {llm.fasa.reason}")
        progress(f"evaluating {REAL_CELLS} tokens")
        rng = np.random.default_rng(0)
        llm.eval(rng.integers(0, llm.n_vocab(), REAL_CELLS).tolist())
        state = read_state(llm)
        tokens = rng.integers(0, llm.n_vocab(), settings.n_gen).tolist()
        common = describe(llm, settings)
        runs: list[int | None] = [None, *settings.budgets]
        for depth in settings.depths:
            progress(f"filling {depth:,} cells")
            fill(llm, state, depth)
            results: list[list[Repetition]] = [[] for _ in runs]
            for i in range(settings.repetitions):
                progress(f"depth {depth:,}, repetition {i + 1} of {settings.repetitions}")
                for result, budget in zip(results, runs, strict=True):
                    result.append(repeat(llm, depth, tokens, budget))
            for result, budget in zip(results, runs, strict=True):
                yield row(common, settings, depth, budget, llm.fasa.n_fc, result)
    finally:
        llm.close()


def describe(llm: Llama, settings: Settings) -> Row:
    """The columns that are the same in every row."""
    import llama_cpp

    text = ctypes.create_string_buffer(128)
    llama_cpp.llama_model_desc(llm.model, text, len(text))
    cpu = doctor.cpu()
    return {
        "build_commit": doctor.ggml_string("ggml_commit"),
        "build_number": None,  # not exported by libllama
        "llama_cpp_python_version": llama_cpp.__version__,
        "pyfasa_version": doctor.pyfasa_version(),
        "cpu_info": cpu.model,
        "machine": f"{cpu.model}, {cpu.cores} cores",
        "backends": ", ".join(device.name for device in doctor.devices()),
        "model_filename": str(settings.model),
        "model_type": text.value.decode(),
        "model_size": llama_cpp.llama_model_size(llm.model),
        "model_n_params": llama_cpp.llama_model_n_params(llm.model),
        "n_batch": llm.n_batch,
        "n_ubatch": llm.context_params.n_ubatch,
        "n_threads": llm.n_threads,
        "flash_attn": True,
        **{name: getattr(settings, name) for name in ("type_k", "type_v", "command")},
    }


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
    """llama-bench's table with the ratio to dense; below it the stages in us per token."""

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
    build = "{machine}; pyfasa {pyfasa_version}, llama-cpp-python {llama_cpp_python_version}"
    parts.append(build.format_map(rows[0]))
    return "\n\n".join(parts)


Format = Callable[[Sequence[Row]], str]
to_json: Format = partial(json.dumps, indent=2)
FORMATS: dict[str, Format] = {"md": to_markdown, "json": to_json, "csv": to_csv}
