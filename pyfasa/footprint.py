"""Memory that a model needs at a context: weights, KV cache, side index."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from pyfasa.gguf_header import Header, shard_names
from pyfasa.identity import ModelIdentity
from pyfasa.profile import Profile

CELLS_STEP = 256  # llama.cpp rounds a context up to it


@dataclass(frozen=True)
class Footprint:
    """Bytes: of the weights, and of one cell of the cache and of the side index in all layers.

    The buffers of a graph, some hundred MiB for large models, come on top.
    """

    weights: int
    cell: int
    index: int

    def cache(self, n_ctx: int) -> int:
        """Bytes of K and V for a context of n_ctx tokens."""
        return self.cell * whole_cells(n_ctx)

    def total(self, n_ctx: int) -> int:
        """All bytes for a context of n_ctx tokens."""
        return self.weights + (self.cell + self.index) * whole_cells(n_ctx)

    def largest_context(self, available: int) -> int:
        """Tokens of the largest context that fits into so many bytes; 0 if none does."""
        cells = (available - self.weights) // (self.cell + self.index)
        return max(0, cells // CELLS_STEP * CELLS_STEP)


def whole_cells(n_ctx: int) -> int:
    """Cells that llama.cpp makes for a context of n_ctx tokens."""
    return -(-n_ctx // CELLS_STEP) * CELLS_STEP


def footprint(
    path: Path, model: ModelIdentity, profile: Profile | None, type_k: str, type_v: str
) -> Footprint:
    """Of a model file, of a split one any of its files; without a profile there is no side index.

    Sliding-window layers count like the others, although llama.cpp keeps fewer cells for them.
    Raises ModelFileError for damaged or missing files.
    """
    headers = [Header.read(shard) for shard in shard_names(path)]
    return Footprint(
        weights=sum(t.n_bytes for header in headers for t in header.tensors.values()),
        cell=cell_bytes(model, type_k, type_v),
        index=0 if profile is None else round(float(profile.bytes_per_cell().sum())),
    )


def cell_bytes(model: ModelIdentity, type_k: str, type_v: str) -> int:
    """K and V of one cell, in all layers."""
    n_value = model.n_layer * model.n_head_kv * model.head_dim
    return type_bytes(type_k, n_value) + type_bytes(type_v, n_value)


def type_bytes(name: str, n: int) -> int:
    """Bytes of n values of a type of the KV cache, n a multiple of its block."""
    block, size = GGML_QUANT_SIZES[GGMLQuantizationType[name.upper()]]
    return n // block * size
