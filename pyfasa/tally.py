"""What calibration adds up over its samples, of fixed size whatever the length of the texts; can be saved and added."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import numpy.typing as npt
from threadpoolctl import threadpool_limits

from pyfasa import reference
from pyfasa.errors import ProfileError
from pyfasa.identity import ModelIdentity
from pyfasa.profile import replacing
from pyfasa.ranking import METHODS
from pyfasa.recall import Attention

F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
U8 = npt.NDArray[np.uint8]

SHARES = (1 / 64, 1 / 16)  # of the context: budgets for which the attention mass is measured
ROWS = 160  # per sample and KV head, of all its query heads, on which candidates are measured
CHOICE, HELD_BACK = 0, 1  # parts of the rows: to choose between candidates, to report on the choice


def channels(n_key: F64, key_sum: F64, key_square: F64) -> tuple[F32, F32]:
    """Mean and deviation of channels [n_layer, n_head_kv, head_dim] from the sums over n_key [n_layer] keys.

    With both taken out no channel outgrows the few levels of the index, and scores keep their order.
    """
    n = np.maximum(n_key, 1)[:, None, None]
    center = key_sum / n
    deviation = np.sqrt(np.maximum(key_square / n - center**2, 0))
    mean = deviation.mean(axis=2, keepdims=True)
    # A channel that hardly moves must not be blown up to the size of the others.
    scale = np.where(mean > 0, np.maximum(deviation, 0.05 * mean), 1.0)
    return center.astype(np.float32), np.maximum(scale, 1e-20).astype(np.float32)


@dataclass(frozen=True)
class Tally:
    """Sums over samples. candidates u8 [n_candidate, n_chunk]: bits per rank, best chunk first.

    importance [n_layer, n_head_kv, n_chunk]   sum over samples, see ranking.py
    n_sample   [n_layer]
    n_key      [n_layer];  key_sum, key_square [n_layer, n_head_kv, head_dim]
    mass       [2, n_layer, n_head_kv, n_candidate, n_share]  attention mass found, summed over rows; first axis: part
    most       [2, n_layer, n_head_kv, n_share]               the same by exact scores
    n_row      [2, n_layer]
    """

    model: str  # sha256 of the model's identity
    method: str
    data: str  # sha256 of all tokens so far
    n_query: int
    candidates: U8
    importance: F64
    n_sample: F64
    n_key: F64
    key_sum: F64
    key_square: F64
    mass: F64
    most: F64
    n_row: F64

    @classmethod
    def zeros(cls, identity: ModelIdentity, method: str, candidates: U8) -> Tally:
        heads = (identity.n_layer, identity.n_head_kv)
        n_chunk, n_share = identity.head_dim // 2, len(SHARES)
        return cls(
            model=hashlib.sha256(repr(identity).encode()).hexdigest(),
            method=method,
            data="",
            n_query=0,
            candidates=candidates,
            importance=np.zeros((*heads, n_chunk)),
            n_sample=np.zeros(heads[0]),
            n_key=np.zeros(heads[0]),
            key_sum=np.zeros((*heads, identity.head_dim)),
            key_square=np.zeros((*heads, identity.head_dim)),
            mass=np.zeros((2, *heads, len(candidates), n_share)),
            most=np.zeros((2, *heads, n_share)),
            n_row=np.zeros((2, heads[0])),
        )

    def is_like(self, other: Tally) -> bool:
        """Whether both are of one model, method and list of candidates."""
        same = (self.model, self.method) == (other.model, other.method)
        return same and np.array_equal(self.candidates, other.candidates)

    def __add__(self, other: Tally) -> Tally:
        """Raises ProfileError when they are of different models, methods or candidates."""
        if not self.is_like(other):
            raise ProfileError(
                "The calibration runs are of different models, methods or index settings and cannot be added; "
                "calibrate each text with the same ones."
            )
        sums = {
            f.name: getattr(self, f.name) + getattr(other, f.name)
            for f in fields(self)
            if f.name not in ("model", "method", "data", "candidates")
        }
        data = hashlib.sha256("".join(sorted((self.data, other.data))).encode()).hexdigest()
        return replace(
            self, **sums, data=data if self.data and other.data else self.data or other.data
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Replaces the file once it is complete."""
        with replacing(Path(path), force=True) as file:
            values: dict[str, Any] = {
                f.name: np.asarray(getattr(self, f.name)) for f in fields(self)
            }
            np.savez(file, **values)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Tally:
        """Raises ProfileError for anything that `save` did not write."""
        try:
            with np.load(path, allow_pickle=False) as stored:
                values: dict[str, Any] = {f.name: stored[f.name] for f in fields(cls)}
        except (OSError, ValueError, KeyError, EOFError, BadZipFile) as error:
            raise ProfileError(
                f"{path} is no saved calibration run ({error}); make one with `pyfasa calibrate --keep`."
            ) from error
        for name in ("model", "method", "data"):
            values[name] = str(values[name])
        return cls(**values | {"n_query": int(values["n_query"])})

    # ---- what it says ----

    def order(self) -> npt.NDArray[np.uint16]:
        """Chunks, best first: [n_layer, n_head_kv, n_chunk]."""
        return np.argsort(-self.importance, axis=2, kind="stable").astype(np.uint16)

    def channels(self) -> tuple[F32, F32]:
        """Mean and deviation of each channel of the keys: [n_layer, n_head_kv, head_dim]."""
        return channels(self.n_key, self.key_sum, self.key_square)

    def found(self, part: int) -> F64:
        """Mean attention mass of each candidate: [n_layer, n_head_kv, n_candidate, n_share]; 0 without rows."""
        mean: F64 = self.mass[part] / np.maximum(self.n_row[part], 1)[:, None, None, None]
        return mean

    def possible(self, part: int) -> F64:
        """The same by exact scores: [n_layer, n_head_kv, n_share]."""
        mean: F64 = self.most[part] / np.maximum(self.n_row[part], 1)[:, None, None]
        return mean

    # ---- adding up ----

    def add_layer(
        self, identity: ModelIdentity, layer: int, queries: F32, keys: F32, visible: Ints
    ) -> None:
        """In place. queries (n_row, n_head, head_dim), keys (n_cell, n_head_kv, head_dim), visible (n_row,).

        A third of the rows ranks the chunks, a third chooses, a third is held back.
        """
        n_head_kv = keys.shape[1]  # of this layer; identity has the largest of all
        group = queries.shape[1] // n_head_kv
        dims = reference.chunk_dims(identity.head_dim, identity.n_rot, identity.rope)
        self.n_sample[layer] += 1
        self.n_key[layer] += len(keys)
        self.key_sum[layer, :n_head_kv] += keys.sum(axis=0, dtype=np.float64)
        self.key_square[layer, :n_head_kv] += np.square(keys, dtype=np.float64).sum(axis=0)
        center, scale = self.channels()
        row = np.arange(len(queries))
        step = max(1, -(-len(row) * group // (3 * ROWS)))
        parts = [row[row % 3 == 1][::step], row[row % 3 == 2][::step]]

        def one(head: int) -> None:
            own = queries[:, head * group : (head + 1) * group]
            head_keys = np.ascontiguousarray(keys[:, head])
            self.importance[layer, head] += METHODS[self.method](own[row % 3 == 0], head_keys, dims)
            ranked = np.argsort(-self.importance[layer, head], kind="stable")
            entries = Entries(head_keys, dims[ranked], center[layer, head], scale[layer, head])
            for part, rows in enumerate(parts):
                attention = Attention.of(own[rows], head_keys, visible[rows])
                budgets = [max(1, int(len(keys) * share)) for share in SHARES]
                self.most[part, layer, head] += attention.most(budgets).sum(axis=1)
                for i, bits in enumerate(self.candidates):
                    scores = attention.scores(entries.of(bits))
                    self.mass[part, layer, head, i] += attention.mass(scores, budgets).sum(axis=1)

        # Threads of BLAS under threads of ours wait for each other: five times slower, measured.
        limits = threadpool_limits(1, user_api="blas")  # type: ignore[no-untyped-call]
        with limits, ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(one, range(n_head_kv)))
        for part, rows in enumerate(parts):
            self.n_row[part, layer] += len(rows) * group


class Entries:
    """What index entries say about the keys of a head, segments made once for all candidates that have them."""

    def __init__(self, keys: F32, ranked: Ints, center: F32, scale: F32) -> None:
        self._keys = (keys - center) / scale
        self._ranked = ranked  # dims (n_chunk, 2), best chunk first
        self._scale = scale
        self._known: dict[tuple[int, bytes], F32] = {}

    def of(self, bits: U8) -> F32:
        """(n_cell, head_dim), 0 in the dims that are not kept."""
        entries = np.zeros_like(self._keys)
        for width in set(bits.tolist()) - {0}:
            dims = self._ranked[: len(bits)][bits == width].reshape(-1)
            key = width, dims.tobytes()
            if key not in self._known:
                kept = np.ascontiguousarray(self._keys[:, dims])
                values = reference.quantize(kept, dims, width).values()
                self._known[key] = values.astype(np.float32) * self._scale[dims]
            entries[:, dims] = self._known[key]
        return entries


def joined(tallies: Sequence[Tally]) -> Tally:
    """The sum of one or more."""
    total = tallies[0]
    for tally in tallies[1:]:
        total = total + tally
    return total
