"""Speed of score for index layouts at 30,000 cells, alone and inside decoding; CSV on stdout.

python docs/bench/layouts.py MODEL THREADS > docs/bench/layouts.csv
"""

from __future__ import annotations

import csv
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from pyfasa import benchmark, calibrate
from pyfasa.profile import Profile

DEPTH, BUDGET, KV = 30_000, 1024, "q8_0"


def layouts(model: str) -> Iterator[tuple[str, Profile]]:
    plain = calibrate(model, method="variance", progress=False)
    n_chunk = plain.n_ranked
    for bits in (1, 2, 4, 8):
        for n_fc in (n_chunk // 4, n_chunk // 2, n_chunk):
            yield f"{n_fc} x {bits}", plain.with_bits(bits).with_n_fc(n_fc)
    for size in (6, 10, 20):
        yield f"allocation {size}", calibrate(model, index_bytes=size, progress=False)


def main() -> None:
    model, threads = sys.argv[1], int(sys.argv[2])
    writer = csv.writer(sys.stdout, lineterminator="\n")
    writer.writerow(
        ["layout", "bytes_per_cell", "score_us", "gb_per_s", "dense_ts", "fasa_ts", "machine"]
    )
    with tempfile.TemporaryDirectory() as folder:
        for name, profile in layouts(model):
            path = Path(folder) / f"{name.replace(' ', '')}.gguf"
            profile.save(path)
            settings = benchmark.Settings(
                model=Path(model), depths=(DEPTH,), budgets=(BUDGET,), type_k=KV, type_v=KV,
                n_threads=threads, repetitions=3, profile=path,
            )  # fmt: skip
            dense, fasa = benchmark.bench(settings)
            n_bytes = float(profile.bytes_per_cell().sum()) * DEPTH
            writer.writerow([
                name, f"{profile.bytes_per_cell().mean():.4g}", f"{fasa['score_ns'] / 1e3:.0f}",
                f"{n_bytes / fasa['score_ns']:.3g}", f"{dense['avg_ts']:.1f}", f"{fasa['avg_ts']:.1f}",
                dense["machine"],
            ])  # fmt: skip
            sys.stdout.flush()


if __name__ == "__main__":
    main()
