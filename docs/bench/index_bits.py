"""Attention mass that the side index finds with 2, 4 and 8 bits per dim, on answers in long documents.

For each decoded row and query head: the share of the exact softmax weights that lies on the cells which the index
selects, and on as many cells chosen by exact scores (the oracle). Scores are those of pyfasa/reference.py.

    python docs/bench/index_bits.py MODEL > docs/bench/index-bits.csv
"""

from __future__ import annotations

import csv
import sys
from collections import defaultdict
from contextlib import closing

import numpy as np

from pyfasa import Llama, reference
from pyfasa.profile import Profile
from pyfasa.samples import make_samples

N_CTX, SEED, SINKS, RECENT = 8192, 77, 4, 32
BITS, BUDGETS = (2, 4, 8), (64, 256, 1024)
Shares = dict[tuple[int, int], list[float]]  # by bits (0: the oracle) and budget


def mass_found(weights: np.ndarray, scores: np.ndarray, budget: int) -> float:
    """Share of the weights of visible cells on the budget best ones, sinks and recent cells among them."""
    scores = scores.copy()
    scores[:SINKS] = scores[-RECENT:] = np.inf
    best = np.argpartition(-scores, budget)[:budget]
    return float(weights[best].sum())


def add_layer(
    shares: Shares, profile: Profile, layer: int, queries: np.ndarray, keys: np.ndarray
) -> None:
    """queries (n_rows, n_head, head_dim) of the last n_rows cells, keys (n_cell, n_head_kv, head_dim)."""
    model = profile.identity
    dims = reference.chunk_dims(model.head_dim, model.n_rot, model.rope)
    group = model.n_head // model.n_head_kv
    for h in range(model.n_head_kv):
        own = np.ascontiguousarray(keys[:, h])
        center = None if profile.center is None else profile.center[layer, h]
        scale = None if profile.scale is None else profile.scale[layer, h]
        chunks = profile.chunks[layer, h, : profile.n_fc]
        index = {
            bits: reference.index_rows(
                own, dims, chunks, np.full(len(chunks), bits, np.uint8), center, scale
            )
            for bits in BITS
        }
        for row in range(len(queries)):
            seen = len(own) - len(queries) + row + 1
            for q in queries[row, h * group : (h + 1) * group]:
                exact = own[:seen].astype(np.float64) @ q * model.head_dim**-0.5
                weights = np.exp(exact - exact.max())
                weights /= weights.sum()
                for budget in BUDGETS:
                    shares[0, budget].append(mass_found(weights, exact, budget))
                for bits, rows in index.items():
                    scores = reference.score(q, rows, scale)[:seen]
                    for budget in BUDGETS:
                        shares[bits, budget].append(mass_found(weights, scores, budget))


def main() -> None:
    path = sys.argv[1]
    profile = Profile.load(path)
    shares: Shares = defaultdict(list)
    sample = make_samples(path, None, N_CTX, SEED)[0]
    with closing(Llama(path, n_ctx=sample.n_tokens, verbose=False)) as llm:
        for tokens, wanted in sample.runs:
            if not wanted:
                llm.eval(tokens)
                continue
            with llm.fasa.capturing() as session:
                llm.eval(tokens)
                for layer in range(profile.identity.n_layer):
                    keys = session.keys(layer, 0, llm.n_tokens)
                    add_layer(shares, profile, layer, session.captured(layer), keys)
                session.captured_clear()
    out = csv.writer(sys.stdout, lineterminator="\n")
    out.writerow(
        ["bits", "n_fc", "budget", "bytes_per_cell", "n_heads_and_rows", "mass", "mass_worst_tenth"]
    )
    for (bits, budget), found in sorted(shares.items()):
        bytes_per_cell = 2 + profile.n_fc * 2 * bits // 8 if bits else ""
        worst = np.quantile(found, 0.1)
        n_fc = profile.n_fc if bits else ""
        out.writerow([bits, n_fc, budget, bytes_per_cell, len(found), np.mean(found), worst])


if __name__ == "__main__":
    main()
