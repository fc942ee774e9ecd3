"""A KV cache of any depth without a prefill.

A few hundred real tokens are evaluated, their sequence state is taken (`llama_state_seq_get_data`;
llama-kv-cache.cpp, state_write), its cells are repeated in random order, and the longer state is
set.

What that means for measurements: the work of a dense node and of score and attend depends on
shapes only, so it is timed fairly. select depends on how scores are spread: copies of a cell would
tie, so the low bits of copied keys are random. They keep the rotation of the cell they come from,
so the text means nothing. While a state is set it takes the memory of the cache once more.
"""

from __future__ import annotations

import ctypes
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from gguf.constants import GGMLQuantizationType

if TYPE_CHECKING:
    import llama_cpp

Bytes = npt.NDArray[np.uint8]

# By K type: the bits of a block that may be flipped without making another key of it. Steps and
# minima stay; codes change by a few hundredths of their range, and -128 never comes up in q8_0.
_LOW_BITS = {
    "F32": [0xFF, 0xFF, 0x03, 0x00],
    "F16": [0x3F, 0x00],
    "BF16": [0x07, 0x00],
    "Q8_0": [0x00] * 2 + [0x06] * 32,
    "Q4_0": [0x00] * 2 + [0x11] * 16,
    "Q4_1": [0x00] * 4 + [0x11] * 16,
    "Q5_0": [0x00] * 6 + [0x33] * 16,
    "Q5_1": [0x00] * 8 + [0x33] * 16,
    "IQ4_NL": [0x00] * 2 + [0x11] * 16,
}
LOW_BITS = {
    int(GGMLQuantizationType[name]): np.array(mask, np.uint8) for name, mask in _LOW_BITS.items()
}

STATE_MAGIC = 0xAF143CD8  # llama-context.cpp, io_magic


@dataclass(frozen=True)
class CacheTensor:
    """K or V of one layer: rows u8 [row_bytes, n_cell] as they lie in the cache."""

    ggml_type: int
    rows: Bytes


@dataclass(frozen=True)
class SequenceState:
    """The cells of one sequence in a plain KV cache: K of all layers, then V of all layers."""

    tensors: tuple[CacheTensor, ...]

    @property
    def n_cell(self) -> int:
        return len(self.tensors[0].rows)

    @classmethod
    def parse(cls, blob: bytes) -> SequenceState:
        """From llama_state_seq_get_data; ValueError if the cache is of another kind."""
        at = 0

        def take(layout: str) -> tuple[Any, ...]:
            nonlocal at
            values = struct.unpack_from(layout, blob, at)
            at += struct.calcsize(layout)
            return values

        def tensor(n_cell: int) -> CacheTensor:
            nonlocal at
            ggml_type, row_bytes = take("<iQ")
            rows = np.frombuffer(blob, np.uint8, n_cell * row_bytes, at).reshape(n_cell, row_bytes)
            at += rows.size
            return CacheTensor(ggml_type, rows)

        try:
            magic, _, n_stream, n_cell = take("<IiII")
            sequences = {take("<iIi")[1] for _ in range(n_cell)}
            transposed, n_layer = take("<II")
            tensors = tuple(tensor(n_cell) for _ in range(2 * n_layer))
            plain = (magic, n_stream, transposed, sequences) == (STATE_MAGIC, 1, 0, {1})
        except (ValueError, struct.error):
            plain = False
        if not plain or at != len(blob):
            raise ValueError(
                "the cache of this model is not one plain KV cache (sliding-window, recurrent or "
                "M-RoPE layers), so bench cannot fill it; time a long prompt with `pyfasa run`"
            )
        return cls(tensors)

    def stretch(self, n_cell: int, seed: int = 0) -> Bytes:
        """A state of n_cell cells at positions 0 .. n_cell - 1 for llama_state_seq_set_data.

        The first cells are the real ones as they are; copies follow in random order, the low bits
        of their keys random.
        """
        rng = np.random.default_rng(seed)
        real = min(n_cell, self.n_cell)
        copies = [rng.permutation(real) for _ in range(-(-n_cell // real) - 1)]
        order = np.concatenate([np.arange(real), *copies])[:n_cell]

        cells = np.zeros((n_cell, 3), "<i4")  # position, number of sequences, sequence
        cells[:, 0] = np.arange(n_cell)
        cells[:, 1] = 1
        n_layer, at = len(self.tensors) // 2, 24 + cells.nbytes
        size = at + sum(12 + n_cell * t.rows.shape[1] for t in self.tensors)
        blob = np.empty(size, np.uint8)
        struct.pack_into("<IiII", blob.data, 0, STATE_MAGIC, 0, 1, n_cell)
        blob[16 : at - 8] = cells.view(np.uint8).ravel()
        struct.pack_into("<II", blob.data, at - 8, 0, n_layer)
        for i, tensor in enumerate(self.tensors):
            row_bytes = tensor.rows.shape[1]
            struct.pack_into("<iQ", blob.data, at, tensor.ggml_type, row_bytes)
            rows = blob[at + 12 :][: n_cell * row_bytes].reshape(n_cell, row_bytes)
            np.take(tensor.rows, order, axis=0, out=rows, mode="clip")
            if i < n_layer:
                _randomize(rows[real:], LOW_BITS[tensor.ggml_type], rng)
            at += 12 + rows.size
        return blob


def _randomize(rows: Bytes, mask: Bytes, rng: np.random.Generator) -> None:
    """Flips low bits of keys in place: the bits of `mask`, which repeats over a row."""
    masks = np.tile(mask, rows.shape[1] // len(mask))
    for part in np.array_split(rows, max(1, len(rows) // 8192)):
        part ^= rng.integers(0, 256, part.shape, np.uint8) & masks


def read_state(llm: llama_cpp.Llama) -> SequenceState:
    """The state of sequence 0 of a model that has evaluated something."""
    import llama_cpp

    size = llama_cpp.llama_state_seq_get_size(llm.ctx, 0)
    buffer = (ctypes.c_uint8 * size)()
    if size == 0 or llama_cpp.llama_state_seq_get_data(llm.ctx, buffer, size, 0) != size:
        raise RuntimeError("llama.cpp cannot write the state of this cache; bench needs it")
    return SequenceState.parse(bytes(buffer))


def fill(llm: llama_cpp.Llama, state: SequenceState, n_cell: int, seed: int = 0) -> None:
    """Makes the cache hold n_cell cells stretched from `state`, and llm.n_tokens say so."""
    import llama_cpp

    if n_cell >= llm.n_ctx():
        raise ValueError(f"a depth of {n_cell} does not fit a context of {llm.n_ctx()}")
    llama_cpp.llama_memory_seq_rm(llama_cpp.llama_get_memory(llm.ctx), -1, -1, -1)
    if n_cell > 0:
        blob = state.stretch(n_cell, seed)
        pointer = blob.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))
        if llama_cpp.llama_state_seq_set_data(llm.ctx, pointer, blob.size, 0) == 0:
            raise RuntimeError(f"llama.cpp refused a state of {n_cell} cells: not enough memory?")
    llm.input_ids[:n_cell] = 0
    llm.n_tokens = n_cell
