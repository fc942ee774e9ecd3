"""Helpers of the tests that run models: random-weight GGUF files, profiles, logits.

A random model has 2 layers, 512 tokens (one per byte and fillers) and attention that is peaked, so
that leaving out the wrong cells shows in the logits.
"""

from __future__ import annotations

import argparse
import functools
import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import llama_cpp
import numpy as np
import numpy.typing as npt

from pyfasa import Llama, Profile, calibrate
from pyfasa.identity import ModelIdentity

F32 = npt.NDArray[np.float32]

N_VOCAB = 512
FIRST_BYTE = 3  # after <unk>, <s>, </s>
SMALL: dict[str, Any] = {"n_ctx": 640, "progress": False}  # a calibration of seconds
MAX_NMSE = 5e-4  # what llama.cpp allows between its own backends for flash attention


@dataclass(frozen=True)
class Shape:
    """What a random model looks like. stablelm and phi3 need n_head * head_dim wide layers."""

    arch: str = "llama"
    n_head: int = 4
    n_head_kv: int = 2
    head_dim: int = 64
    n_rot: int = 64
    n_layer: int = 2

    def __str__(self) -> str:
        heads = f"{self.n_head}q{self.n_head_kv}kv"
        return f"{self.arch}-{heads}-d{self.head_dim}-r{self.n_rot}-l{self.n_layer}"


NORM = Shape()
NORM_GROUP_3 = Shape(n_head=6, n_head_kv=2, head_dim=32, n_rot=32)
NORM_ONE_LAYER = Shape(n_layer=1)
NEOX_GROUP_1 = Shape("qwen2", n_head=2, n_head_kv=2)
NEOX_ONE_KV_HEAD = Shape("qwen3", n_head=4, n_head_kv=1, head_dim=128, n_rot=128)
NEOX_FUSED = Shape("phi3", n_head=4, n_head_kv=4, head_dim=96, n_rot=96)
NEOX_PARTIAL = Shape("stablelm", n_head=4, n_head_kv=1, n_rot=16)


def write_model(path: Path, shape: Shape = NORM, seed: int = 0) -> Path:
    """A GGUF model with random weights; equal arguments give an equal file."""
    rng = np.random.default_rng(seed)
    arch = shape.arch
    width = shape.n_head * shape.head_dim
    width_kv = shape.n_head_kv * shape.head_dim
    n_ff = 2 * width

    w = gguf.GGUFWriter(path, arch)
    w.add_name(f"random-{seed}")  # names like phi-3 change the tokenizer
    w.add_block_count(shape.n_layer)
    w.add_context_length(8192)
    w.add_embedding_length(width)
    w.add_feed_forward_length(n_ff)
    w.add_head_count(shape.n_head)
    w.add_head_count_kv(shape.n_head_kv)
    w.add_key_length(shape.head_dim)
    w.add_value_length(shape.head_dim)
    w.add_rope_dimension_count(shape.n_rot)
    w.add_rope_freq_base(10000.0)
    w.add_layer_norm_eps(1e-5)
    w.add_layer_norm_rms_eps(1e-5)
    w.add_vocab_size(N_VOCAB)
    _add_tokenizer(w)

    def matrix(name: str, rows: int, columns: int, gain: float = 1.0) -> None:
        values = rng.normal(size=(rows, columns)) * gain / math.sqrt(columns)
        w.add_tensor(name, values.astype(np.float32))

    def vector(name: str, size: int, mean: float, spread: float) -> None:
        w.add_tensor(name, (mean + spread * rng.normal(size=size)).astype(np.float32))

    def norm(name: str, size: int) -> None:
        vector(f"{name}.weight", size, 1.0, 0.1)
        if arch == "stablelm":
            vector(f"{name}.bias", size, 0.0, 0.1)

    matrix("token_embd.weight", N_VOCAB, width, gain=math.sqrt(width))
    norm("output_norm", width)
    matrix("output.weight", N_VOCAB, width)
    peaked = math.sqrt(2.0)  # of q and k each: scaled scores then have a deviation of 2
    for il in range(shape.n_layer):
        b = f"blk.{il}"
        norm(f"{b}.attn_norm", width)
        if arch == "phi3":
            values = rng.normal(size=(width + 2 * width_kv, width)) / math.sqrt(width)
            values[: width + width_kv] *= peaked
            w.add_tensor(f"{b}.attn_qkv.weight", values.astype(np.float32))
        else:
            matrix(f"{b}.attn_q.weight", width, width, peaked)
            matrix(f"{b}.attn_k.weight", width_kv, width, peaked)
            matrix(f"{b}.attn_v.weight", width_kv, width)
        if arch == "qwen2":
            vector(f"{b}.attn_q.bias", width, 0.0, 0.3)
            vector(f"{b}.attn_k.bias", width_kv, 0.0, 0.3)
            vector(f"{b}.attn_v.bias", width_kv, 0.0, 0.3)
        if arch == "qwen3":
            vector(f"{b}.attn_q_norm.weight", shape.head_dim, peaked, 0.1)
            vector(f"{b}.attn_k_norm.weight", shape.head_dim, peaked, 0.1)
        matrix(f"{b}.attn_output.weight", width, width, 4.0)  # attention outweighs the residual
        norm(f"{b}.ffn_norm", width)
        if arch == "phi3":
            matrix(f"{b}.ffn_up.weight", 2 * n_ff, width)
        else:
            matrix(f"{b}.ffn_gate.weight", n_ff, width)
            matrix(f"{b}.ffn_up.weight", n_ff, width)
        matrix(f"{b}.ffn_down.weight", width, n_ff)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    return path


def _add_tokenizer(w: gguf.GGUFWriter) -> None:
    """One token per byte, so that any text can be tokenized; the rest are fillers."""
    kinds = gguf.TokenType
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    types = [kinds.UNKNOWN, kinds.CONTROL, kinds.CONTROL] + [kinds.BYTE] * 256
    tokens += [f"filler{i}" for i in range(N_VOCAB - len(tokens))]
    types += [kinds.NORMAL] * (N_VOCAB - len(types))
    w.add_tokenizer_model("llama")
    w.add_token_list(tokens)
    w.add_token_scores([-1000.0] * N_VOCAB)
    w.add_token_types(types)
    w.add_bos_token_id(1)
    w.add_eos_token_id(2)
    w.add_unk_token_id(0)
    w.add_add_bos_token(False)


def random_tokens(n: int, seed: int = 0) -> list[int]:
    """Byte tokens of a random model."""
    rng = np.random.default_rng(seed)
    return [int(t) for t in rng.integers(FIRST_BYTE, FIRST_BYTE + 256, n)]


def random_profile(
    path: Path, seed: int = 0, bits: Sequence[int] = (8, 4, 2), n_fc: int | None = None
) -> Profile:
    """A profile with a random ranking and the bits in equal shares, the most bits first."""
    identity = ModelIdentity.read(path)
    rng = np.random.default_rng(seed)
    rows = (identity.n_layer, identity.n_head_kv)
    n_chunk = identity.head_dim // 2
    order = rng.permuted(np.broadcast_to(np.arange(n_chunk), (*rows, n_chunk)), axis=2)
    per_rank = np.repeat(bits, -(-n_chunk // len(bits)))[:n_chunk]
    return Profile(
        identity=identity,
        chunks=order.astype(np.uint16),
        bits=np.broadcast_to(per_rank, order.shape).astype(np.uint8),
        center=None,
        scale=None,
        n_fc=n_fc or n_chunk,
        method="random",
        data_name="",
        data_sha256="",
        n_ctx=0,
        n_queries=0,
        seed=seed,
        created_by="pyfasa tests",
    )


@functools.cache
def bundled_profile(path: Path) -> Profile:
    """A calibrated profile of the bundled model, made once per test run from one short text."""
    return calibrate(path, [argparse.__file__], n_ctx=768, progress=False)


@contextmanager
def opened(path: Path, **arguments: Any) -> Iterator[Any]:
    """A pyfasa.Llama for tests: 2 threads, quiet, closed at the end."""
    llm = Llama(str(path), **{"n_ctx": 1024, "n_threads": 2, "verbose": False, **arguments})
    try:
        yield llm
    finally:
        llm.close()


@contextmanager
def opened_plain(path: Path, **arguments: Any) -> Iterator[Any]:
    """llama_cpp.Llama with the same settings: what pyfasa is compared with."""
    settings = {"n_ctx": 1024, "n_threads": 2, "flash_attn": True, "verbose": False, **arguments}
    llm = llama_cpp.Llama(str(path), **settings)
    try:
        yield llm
    finally:
        llm.close()


@contextmanager
def verified(path: Path, **arguments: Any) -> Iterator[Any]:
    """A pyfasa.Llama that has to be sparse, and compares its index with the K cache before every use."""
    with opened(path, **arguments) as llm:
        llm.fasa.verify = True
        yield llm
        counters = llm.fasa.counters
        assert counters.nodes["sparse"] > 0
        assert counters.cells_verified > 0
        assert counters.verify_failures == 0


def logits(llm: llama_cpp.Llama) -> F32:
    """Logits of the last evaluated token: (n_vocab,)."""
    pointer = llama_cpp.llama_get_logits_ith(llm._ctx.ctx, -1)
    return np.array(np.ctypeslib.as_array(pointer, (llm.n_vocab(),)), np.float32)


def decode(llm: llama_cpp.Llama, tokens: Sequence[int]) -> F32:
    """Logits after each of the tokens, evaluated one by one: (n_tokens, n_vocab)."""
    rows = []
    for token in tokens:
        llm.eval([token])
        rows.append(logits(llm))
    return np.array(rows)


def nmse(found: npt.ArrayLike, wanted: npt.ArrayLike) -> float:
    """Squared error / squared size, over all values."""
    a, b = np.asarray(found, np.float64), np.asarray(wanted, np.float64)
    return float(np.square(a - b).sum() / np.square(b).sum())


@contextmanager
def warned() -> Iterator[list[str]]:
    """The sentences of the warnings given inside the block."""
    found: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield found
    found += [str(w.message) for w in caught]
