"""Decode speed on a CUDA device at several depths, dense and FASA in turns on one context, as CSV of `pyfasa bench`.

    python tests/gpu/bench.py MODEL --kv q8_0 --depths 4096,32768,131072 --bits 4,2 --budget 2048

The cache is filled by evaluating random tokens, each depth going on from the one before. When the model has no
profile, its chunks are random, and its channels are centered and scaled by what some of the model's keys are, as
`pyfasa calibrate` does: select is faster when scores of following tokens are spread alike.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from pathlib import Path

import numpy as np

from pyfasa import benchmark, machine, roofline, tally
from pyfasa.llama import Llama
from pyfasa.profile import Profile
from pyfasa.synthetic import fill, read_state

sys.path.insert(0, str(Path(__file__).resolve().parent))
from check import profile_of


def device_name() -> str:
    return next(d.description for d in machine.devices() if d.type == "GPU")


def with_channels(profile: Profile, path: Path, n_token: int = 8192) -> Profile:
    llm = Llama(
        str(path),
        n_ctx=n_token,
        n_ubatch=2048,
        n_batch=2048,
        n_gpu_layers=-1,
        profile=False,
        verbose=False,
    )
    llm.eval(np.random.default_rng(1).integers(3, 250, n_token).tolist())
    shape = (n_token, profile.identity.n_head_kv, profile.identity.head_dim)
    layers = read_state(llm).tensors[: profile.identity.n_layer]  # K, then V
    llm.close()
    total = np.empty((2, len(layers), *shape[1:]))
    for layer, tensor in enumerate(layers):
        keys = tensor.rows.view(np.float16).reshape(shape).astype(np.float64)
        total[:, layer] = keys.sum(axis=0), np.square(keys).sum(axis=0)
    center, scale = tally.channels(np.full(len(layers), float(n_token)), *total)
    return dataclasses.replace(profile, center=center, scale=scale)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model", type=Path)
    parser.add_argument("--kv", default="q8_0")
    parser.add_argument("--depths", default="4096,32768,131072")
    parser.add_argument("--bits", default="4")
    parser.add_argument("--budget", type=int, default=2048)
    parser.add_argument("--min-ctx", type=int, default=None, help="default: pyfasa's")
    parser.add_argument("--n-gen", type=int, default=64)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument(
        "--kv-on-host", action="store_true", help="offload_kqv=False: K and V in system memory"
    )
    parser.add_argument("--threads", type=int, default=None)
    args = parser.parse_args()
    depths = [int(d) for d in args.depths.split(",")]
    settings = benchmark.Settings(
        model=args.model,
        depths=tuple(depths),
        budgets=(args.budget,),
        min_ctx=args.min_ctx,
        type_k=args.kv,
        type_v=args.kv,
        n_gen=args.n_gen,
        repetitions=args.repetitions,
        n_threads=args.threads,
        n_gpu_layers=-1,
        offload_kqv=not args.kv_on_host,
        command="python tests/gpu/bench.py " + " ".join([args.model.name, *sys.argv[2:]]),
    )
    profile = profile_of(args.model)
    if profile.center is None:
        profile = with_channels(profile, args.model)

    def open_model(profile: Profile | bool) -> Llama:
        # A short piece of the deepest context must fit after the last repetition.
        return Llama(
            str(args.model),
            n_ctx=max(depths) + args.n_gen + 64,
            n_batch=2048,
            n_ubatch=2048,
            n_gpu_layers=settings.n_gpu_layers,
            offload_kqv=settings.offload_kqv,
            n_threads=args.threads,
            type_k=args.kv,
            type_v=args.kv,
            profile=profile,
            budget=args.budget,
            min_ctx=args.min_ctx,
            verbose=False,
        )

    llm = open_model(profile)
    rng = np.random.default_rng(0)
    where = f", K and V in system memory, {llm.n_threads} threads" if args.kv_on_host else ""
    common = benchmark.describe(llm, settings) | {
        "machine": device_name() + where,
        "model_filename": args.model.name,
    }
    tokens = rng.integers(3, 250, args.n_gen).tolist()
    plain: dict[int, list[benchmark.Repetition]] = {}
    if args.kv_on_host:
        # With a profile the CPU computes decode attention, also inside dense(): the baseline is a context without one.
        llm.close()
        llm = open_model(False)
        llm.eval(rng.integers(3, 250, benchmark.REAL_CELLS).tolist())
        state = read_state(llm)
        for depth in depths:
            fill(llm, state, depth)
            plain[depth] = [
                benchmark.repeat(llm, depth, tokens, None) for _ in range(args.repetitions)
            ]
        llm.close()
        llm = open_model(profile)
    at = 0
    header = True
    for depth in depths:
        start = time.perf_counter()
        if args.kv_on_host:
            fill(llm, state, depth)
        else:
            with llm.dense():
                llm.eval(rng.integers(3, 250, depth - at).tolist())
        at = depth
        print(
            f"{args.kv} depth {depth}: filled in {time.perf_counter() - start:.1f} s",
            file=sys.stderr,
            flush=True,
        )
        for bits in (int(b) for b in args.bits.split(",")):
            llm.fasa.index_bits = bits
            dense, fasa = list(plain.get(depth, [])), []
            for _ in range(args.repetitions):
                if not plain:
                    dense.append(benchmark.repeat(llm, depth, tokens, None))
                fasa.append(benchmark.repeat(llm, depth, tokens, args.budget))
            pair = [
                benchmark.row(common, settings, depth, budget, llm.fasa.n_fc, result)
                for budget, result in ((None, dense), (args.budget, fasa))
            ]
            for row in pair:
                row["index_bits"] = bits if row["attention"] == "fasa" else None
                row["median_ts"] = float(np.median(row["samples_ts"]))
            # At once: a run that is cut short keeps what it has measured.
            text = benchmark.to_csv(pair)
            print(text if header else text.partition("\n")[2], flush=True)
            header = False
            d, f = (row["median_ts"] for row in pair)
            begun = sum(r.counters.head_starts for r in fasa)
            undone = sum(r.counters.head_starts_undone for r in fasa)
            print(
                f"{args.kv} depth {depth} bits {bits}: dense {d:.1f} t/s, fasa {f:.1f} t/s, {f / d:.2f} x "
                f"({1e3 / d:.3f} and {1e3 / f:.3f} ms) {pair[1]['nodes']}, "
                f"{begun} tokens began early, {undone} of them in vain",
                file=sys.stderr,
                flush=True,
            )
            if args.kv_on_host:
                scored = sum(r.counters.bytes_scored for r in fasa)
                print(
                    f"score reads {scored / sum(r.timings.score for r in fasa):.0f} GB/s of index, "
                    f"memory gives {roofline.read_bandwidth(llm.n_threads):.0f} GB/s to as many threads",
                    file=sys.stderr,
                    flush=True,
                )
    llm.close()


if __name__ == "__main__":
    main()
