"""Time of one batch of 1 to 8 decode rows at a cache depth, dense and sparse: what a verified draft costs.

python docs/bench/rows.py MODEL > docs/bench/rows.csv
"""

from __future__ import annotations

import csv
import statistics
import sys
import time
from contextlib import closing

import llama_cpp
import numpy as np

from pyfasa import Llama
from pyfasa.benchmark import REAL_CELLS
from pyfasa.machine import cpu
from pyfasa.synthetic import fill, read_state

DEPTH, REPETITIONS, KV_TYPE = 30_000, 15, "q8_0"


def seconds(llm: Llama, tokens: list[int]) -> float:
    """One batch after DEPTH cells; ends where it began."""
    llm.n_tokens = DEPTH
    start = time.perf_counter()
    llm.eval(tokens)
    llama_cpp.llama_synchronize(llm.ctx)
    return time.perf_counter() - start


def main() -> None:
    rng = np.random.default_rng(0)
    threads = cpu().cores
    settings = {
        "n_threads": threads,
        "n_threads_batch": threads,
        "type_k": KV_TYPE,
        "type_v": KV_TYPE,
    }
    out = csv.writer(sys.stdout, lineterminator="\n")
    out.writerow(["rows", "dense_ms", "fasa_ms", "type_k", "n_depth", "n_threads", "machine"])
    with closing(Llama(sys.argv[1], n_ctx=DEPTH + 64, verbose=False, **settings)) as llm:
        llm.eval(rng.integers(0, llm.n_vocab(), REAL_CELLS).tolist())
        fill(llm, read_state(llm), DEPTH)
        for n_rows in (1, 2, 3, 4, 6, 8):
            tokens = rng.integers(0, llm.n_vocab(), n_rows).tolist()
            times: dict[int, list[float]] = {0: [], 8: []}  # by max_rows
            for _ in range(REPETITIONS + 1):
                for max_rows, found in times.items():
                    llm.fasa.max_rows = max_rows
                    found.append(seconds(llm, tokens))
            dense, fasa = (1e3 * statistics.median(found[1:]) for found in times.values())
            machine = f"{cpu().model}, {cpu().cores} cores"
            row = [n_rows, f"{dense:.2f}", f"{fasa:.2f}", KV_TYPE, DEPTH, threads, machine]
            out.writerow(row)


if __name__ == "__main__":
    main()
