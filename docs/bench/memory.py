"""Memory of common models, computed from their shapes, into docs/memory.md. Nothing is measured.

python docs/bench/memory.py

docs/bench/shapes.csv has layers, KV heads, head size, the context that a model was trained for (tokens, without scaling
of RoPE by options), and the size of a Q4_K_M file (GB, about).
"""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path

from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from tables import markdown, put

from pyfasa.calibration_plan import DEFAULT_BYTES

HERE = Path(__file__).resolve().parent
TYPES = ("f16", "q8_0", "q4_0")
GPUS = (8, 12, 16, 24)  # GiB
OTHER = 1.0  # GiB of a GPU for what is neither weights nor cache: buffers of the graph, the driver
STEP = 1024  # tokens; contexts are rounded down to it
SYSTEM = (32768, 131072)  # tokens, where the cache is in system memory
GIB = 2**30


@dataclass(frozen=True)
class Shape:
    """A model; file_gb is in units of 10^9 bytes, n_ctx in tokens."""

    model: str
    n_layer: int
    n_head_kv: int
    head_dim: int
    n_ctx: int
    file_gb: float

    def kv_bytes(self, kv_type: str) -> float:
        """K and V of one token, in all layers, both of this type."""
        block, size = GGML_QUANT_SIZES[GGMLQuantizationType[kv_type.upper()]]
        return self.n_layer * self.n_head_kv * 2 * self.head_dim / block * size

    def index_bytes(self) -> float:
        """The side index of one token with a profile of the default size."""
        return self.n_layer * self.n_head_kv * self.head_dim * DEFAULT_BYTES

    def on_gpu(self, gpu: float, kv_type: str) -> int | None:
        """The largest context with weights, cache and index on a GPU of so many GiB; None: not even the weights."""
        room = (gpu - OTHER) * GIB - self.file_gb * 1e9
        if room < 0:
            return None
        tokens = int(room / (self.kv_bytes(kv_type) + self.index_bytes()))
        return min(self.n_ctx, tokens // STEP * STEP)


def shapes() -> list[Shape]:
    with open(HERE / "shapes.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    return [
        Shape(
            model=row["model"],
            n_layer=int(row["n_layer"]),
            n_head_kv=int(row["n_head_kv"]),
            head_dim=int(row["head_dim"]),
            n_ctx=int(row["n_ctx"]),
            file_gb=float(row["file_gb"]),
        )
        for row in rows
    ]


def bytes_table() -> str:
    """KiB per token."""
    rows = [
        [
            shape.model,
            f"{shape.n_layer} x {shape.n_head_kv} x {shape.head_dim}",
            f"{shape.n_ctx:,}",
            f"{shape.file_gb:.2f}",
            *(f"{shape.kv_bytes(kind) / 1024:.1f}" for kind in TYPES),
            f"{shape.index_bytes() / 1024:.2f}",
        ]
        for shape in shapes()
    ]
    header = ["model", "layers x KV heads x head size", "trained for", "Q4_K_M, GB"]
    return markdown([*header, *(f"{kind}, KiB" for kind in TYPES), "side index, KiB"], rows)


def context(shape: Shape, gpu: float, kv_type: str) -> str:
    found = shape.on_gpu(gpu, kv_type)
    if not found:
        return "-"
    return "all" if found == shape.n_ctx else f"{found // STEP}k"


def gpu_table() -> str:
    """The largest context on each GPU."""
    rows = [
        [
            shape.model,
            f"{shape.n_ctx // STEP}k",
            *(" / ".join(context(shape, gpu, kind) for kind in TYPES) for gpu in GPUS),
        ]
        for shape in shapes()
    ]
    return markdown(["model", "trained for", *(f"{gpu} GB" for gpu in GPUS)], rows)


def system_table() -> str:
    """GiB of system memory for cache and index, and the smallest GPU for the weights."""
    rows = []
    for shape in shapes():
        fits = [gpu for gpu in GPUS if shape.file_gb * 1e9 <= (gpu - OTHER) * GIB]
        cells = []
        for n_ctx in SYSTEM:
            sizes = ((shape.kv_bytes(kind) + shape.index_bytes()) * n_ctx / GIB for kind in TYPES)
            cells.append(
                " / ".join(f"{size:.1f}" for size in sizes) if n_ctx <= shape.n_ctx else "-"
            )
        rows.append([shape.model, f"{fits[0]} GB" if fits else "-", *cells])
    header = ["model", "smallest GPU of these", *(f"{n:,} tokens, GiB" for n in SYSTEM)]
    return markdown(header, rows)


def tables() -> dict[str, str]:
    return {
        "memory-bytes": bytes_table(),
        "memory-gpu": gpu_table(),
        "memory-system": system_table(),
    }


def main() -> None:
    put(HERE.parent / "memory.md", tables())


if __name__ == "__main__":
    main()
