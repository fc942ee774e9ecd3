"""How much each frequency chunk matters to a KV head, from queries and keys of the running model.

Each method maps queries (n_q, group, head_dim) of one KV head's query heads and keys (n_kv, head_dim) to an importance
per chunk (n_chunk,), higher = more important. One set per KV head serves its whole group.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from pyfasa import reference
from pyfasa.recall import Attention

F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

AGREEMENT_TOP = 256  # cells compared; the paper finds that it hardly matters (3.3)
AGREEMENT_QUERIES = 24  # per document: each costs a partial sort per chunk
GREEDY_QUERIES = 8  # likewise, per chunk and chunk chosen before
GREEDY_CHUNKS = 24


def variance(queries: F32, keys: F32, dims: Ints) -> F64:
    """Variance over the cells of each chunk's contribution to the score, as a share of the chunks' sum.

    For chunk i it is q_i^T C_i q_i with C_i the 2 x 2 covariance of the keys' dims of the chunk, averaged over the
    queries. A chunk that moves all scores alike cannot decide between cells, and has no variance.
    """
    centered = keys.astype(np.float64) - keys.mean(axis=0, dtype=np.float64)
    pairs = centered[:, dims]  # (n_kv, n_chunk, 2)
    covariance = np.einsum("tia,tib->iab", pairs, pairs) / len(keys)
    q = queries.reshape(-1, queries.shape[-1]).astype(np.float64)[:, dims]  # (n, n_chunk, 2)
    per_query = np.einsum("nia,iab,nib->ni", q, covariance, q)
    total = per_query.sum(axis=1, keepdims=True)
    shares = np.divide(per_query, total, out=np.zeros_like(per_query), where=total > 0)
    result: F64 = shares.mean(axis=0)
    return result


def agreement(queries: F32, keys: F32, dims: Ints) -> F64:
    """The paper's contextual agreement (3.3), averaged over queries and the group's heads."""
    step = max(1, len(queries) // AGREEMENT_QUERIES)
    chosen = queries[::step].reshape(-1, queries.shape[-1])
    each = [
        reference.agreement(reference.contributions(q, keys, dims), AGREEMENT_TOP) for q in chosen
    ]
    result: F64 = np.mean(each, axis=0)
    return result


def greedy(queries: F32, keys: F32, dims: Ints) -> F64:
    """Joint choice: again and again the chunk that most raises the attention mass of the best cells.

    Importance is 1 / place in the order of the choice; after GREEDY_CHUNKS the variance decides.
    """
    step = max(1, len(queries) // GREEDY_QUERIES)
    chosen = queries[::step]
    attention = Attention.of(chosen, keys, np.full(len(chosen), len(keys)))
    q = chosen.reshape(-1, chosen.shape[-1])
    centered = keys - keys.mean(axis=0)
    budget = [max(1, len(keys) // 32)]
    by_variance = variance(queries, keys, dims)
    total = np.zeros((len(q), len(keys)), np.float32)
    order: list[int] = []
    for _ in range(min(GREEDY_CHUNKS, len(dims))):
        masses = {
            i: float(attention.mass(total + q[:, pair] @ centered[:, pair].T, budget).mean())
            for i, pair in enumerate(dims)
            if i not in order
        }
        order.append(max(masses, key=lambda i: (masses[i], by_variance[i])))
        total += q[:, dims[order[-1]]] @ centered[:, dims[order[-1]]].T
    rest = [i for i in np.argsort(-by_variance, kind="stable").tolist() if i not in order]
    importance: F64 = np.zeros(len(dims))
    importance[order + rest] = 1 / np.arange(1, len(dims) + 1)
    return importance


METHODS: dict[str, Callable[[F32, F32, Ints], F64]] = {
    "variance": variance,
    "agreement": agreement,
    "greedy": greedy,
}
