"""Decode speed of stock llama-bench: as it is, with the plugin loaded and no profile, and with FASA.

python docs/bench/plugin.py TOOLS MODEL > docs/bench/plugin.csv

The three take turns, so that what else the machine does meets all of them; docs/bench/tables.py takes medians.
"""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys

from pyfasa.machine import cpu
from pyfasa.plugin import library_path

# K/V type, depth, rounds, repetitions in each, tokens of a repetition. llama-bench restores the cache before each
# repetition, so each pays for the index of the whole depth, as a prompt does once: that many tokens share it.
RUNS = (
    ("f16", 0, 9, 3, 512),
    ("q8_0", 0, 9, 3, 512),
    ("f16", 4096, 5, 3, 128),
    ("q8_0", 4096, 5, 3, 128),
    ("f16", 30_000, 1, 3, 256),
)


def speeds(
    tools: str, model: str, kv_type: str, depth: int, mode: str, n: int, n_gen: int
) -> list[float]:
    """Tokens per second of each repetition."""
    env = {k: v for k, v in os.environ.items() if not k.startswith(("PYFASA_", "GGML_"))}
    if mode != "stock":
        env["GGML_BACKEND_PATH"] = str(library_path())
    if mode == "fasa":
        env["PYFASA_PROFILE"] = model
    line = [f"{tools}/llama-bench", "-m", model, "-p", 0, "-n", n_gen, "-d", depth, "-r", n]
    line += ["-fa", 1, "-ctk", kv_type, "-ctv", kv_type, "-t", cpu().cores, "-o", "json"]
    done = subprocess.run(list(map(str, line)), env=env, capture_output=True, check=True)
    (row,) = json.loads(done.stdout)
    found: list[float] = row["samples_ts"]
    return found


def main() -> None:
    tools, model = sys.argv[1:]
    out = csv.writer(sys.stdout, lineterminator="\n")
    out.writerow(["n_depth", "kv_type", "mode", "round", "tokens_per_s", "n_threads", "machine"])
    machine = f"{cpu().model}, {cpu().cores} cores"
    for kv_type, depth, rounds, n, n_gen in RUNS:
        for i in range(rounds):
            for mode in ("stock", "idle", "fasa"):
                for speed in speeds(tools, model, kv_type, depth, mode, n, n_gen):
                    row = [depth, kv_type, mode, i, f"{speed:.2f}", cpu().cores, machine]
                    out.writerow(row)
                sys.stdout.flush()


if __name__ == "__main__":
    main()
