"""How near decoding is to what memory allows: the bytes of a token over the bandwidth are its floor.

A decoded token reads every weight once, the K and V that it attends to, and the side index of the
cells that it scores; on long contexts nothing else takes as long. The bandwidth is measured by
reading arrays far larger than the caches, so what fits into the caches can be faster than its floor.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from pyfasa.gguf_header import Header, Tensor, shard_names
from pyfasa.machine import available_memory

GIB = 2**30


@dataclass(frozen=True)
class Reads:
    """What a token reads, in bytes.

    weights: of the model, once per token
    cell:    K and V of one cell of the cache, all layers
    """

    weights: int
    cell: int

    def of_token(
        self, n_visible: float, dense: float = 1.0, scored: float = 0.0, attended: float = 0.0
    ) -> float:
        """Bytes that must move for one token.

        n_visible: cells that the token sees
        dense:     share of the attention nodes that read all of them, 0 to 1
        scored:    bytes of the side index read by the others, all layers
        attended:  bytes of K and V read by the others. Heads of one group that chose the same cell
                   read it once each; no more is counted than the whole cache.
        """
        whole = n_visible * self.cell
        return self.weights + dense * whole + scored + min(attended, (1 - dense) * whole)


def columns(n_bytes: float, bandwidth_gbs: float | None, token_ns: float) -> dict[str, Any]:
    """The columns of a result row.

    n_bytes:       bytes per token
    bandwidth_gbs: 10^9 bytes per second; None if unknown, then the columns that need it are None
    token_ns:      measured time of one token
    """
    floor = None if bandwidth_gbs is None else n_bytes / bandwidth_gbs
    return {
        "bytes_token": round(n_bytes),
        "bandwidth_gbs": bandwidth_gbs,
        "floor_ns": floor,
        "floor_share": None if floor is None else floor / token_ns,
    }


def weight_bytes(path: str | Path) -> int:
    """Bytes of weights that one token reads, of all files of a model.

    Not read are the embeddings of other tokens, unless the output layer shares them, and the experts
    that are not chosen. Raises ModelFileError for damaged or missing files.
    """
    headers = [Header.read(shard) for shard in shard_names(path)]
    used, count = (headers[0].number(name) for name in ("expert_used_count", "expert_count"))
    tensors = (tensor for header in headers for tensor in header.tensors.values())
    return tensor_bytes(tensors, used / count if 0 < used <= count else 1.0)


def tensor_bytes(tensors: Iterable[Tensor], share_of_experts: float) -> int:
    """Bytes of these tensors that one token reads; see weight_bytes."""
    sizes = {tensor.name: tensor.n_bytes for tensor in tensors}
    if "output.weight" in sizes:
        sizes.pop("token_embd.weight", None)
    sizes.pop("per_layer_token_embd.weight", None)
    return round(sum(n * share_of_experts if "_exps." in name else n for name, n in sizes.items()))


@cache
def read_bandwidth(n_threads: int, n_bytes: int | None = None, passes: int = 8) -> float:
    """Read bandwidth in 10^9 bytes per second with n_threads, the best of some passes.

    Each thread takes the maximum of a float32 array of its own, which NumPy does with vector
    instructions and without the interpreter's lock.

    n_bytes: of all arrays together; None: 1 GiB, less where less than 8 GiB are available
    Raises ValueError for no threads or no bytes.
    """
    if n_bytes is None:
        available = available_memory()
        n_bytes = GIB if available is None else min(GIB, available // 8)
    n_each = n_bytes // 4 // max(n_threads, 1)
    if n_threads < 1 or n_each < 1:
        raise ValueError(
            f"{n_threads} threads cannot read {n_bytes} bytes; give bench --bandwidth in GB/s"
        )
    # ones and not zeros: pages of zeros that nobody wrote are one page of memory
    arrays = [np.ones(n_each, np.float32) for _ in range(n_threads)]
    best = float("inf")
    with ThreadPoolExecutor(n_threads) as pool:
        for _ in range(passes):
            start = time.perf_counter()
            list(pool.map(np.max, arrays))
            best = min(best, time.perf_counter() - start)
    return n_threads * n_each * 4 / best / 1e9
