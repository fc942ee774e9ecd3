"""Shared by the tests of what a cache lives through: models, tokens, and a context that checks its index."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import llama_cpp

import support
from pyfasa.llama import kv_type
from support import (
    F32,
    NEOX_PARTIAL,
    NORM,
    Shape,
    decode,
    opened_plain,
    random_profile,
    random_tokens,
    write_model,
)

N = 400
A, B = random_tokens(N + 8, seed=1), random_tokens(N + 8, seed=2)
SHAPES = [NORM, NEOX_PARTIAL]
TINY = Shape(n_head=2, n_head_kv=1, head_dim=32, n_rot=32, n_layer=1)
TYPES = ["f16", "q8_0"]
SPARSE: dict[str, Any] = {"budget": 64, "min_ctx": 0, "sinks": 2, "recent": 8}
EVERYTHING: dict[str, Any] = {**SPARSE, "budget": 4096}  # attended: the result is that of llama.cpp
# Far below what a stale index does, far above rounding that depends on how tokens are batched.
SAME = 1e-5


def written(folder: Path, shape: Shape) -> Path:
    """The random model of a shape, in a folder."""
    return write_model(folder / f"{shape}.gguf", shape)


def both(name: str) -> dict[str, str]:
    """K and V of one type, as arguments of pyfasa.Llama."""
    return {"type_k": name, "type_v": name}


@contextmanager
def verified(path: Path, **arguments: Any) -> Iterator[Any]:
    """A sparse Llama that compares its index with the K cache before every use."""
    settings = {"profile": random_profile(path), **SPARSE, **arguments}
    with support.verified(path, **settings) as llm:
        yield llm


@contextmanager
def plain(path: Path, **arguments: Any) -> Iterator[Any]:
    """llama_cpp.Llama with types by name, as pyfasa takes them."""
    for name in ("type_k", "type_v"):
        if name in arguments:
            arguments[name] = kv_type(arguments[name], name)
    with opened_plain(path, **arguments) as llm:
        yield llm


def after(path: Path, prompt: Sequence[int], rest: Sequence[int], **arguments: Any) -> F32:
    """Logits of the rest in a context that has seen nothing but the prompt."""
    with verified(path, **arguments) as fresh:
        fresh.eval(prompt)
        return decode(fresh, rest)


def memory(llm: llama_cpp.Llama) -> Any:
    """What llama_memory_* functions take."""
    return llama_cpp.llama_get_memory(llm._ctx.ctx)


def generated(llm: llama_cpp.Llama, prompt: Sequence[int], n: int = 6) -> list[int]:
    """The most likely next tokens, from generate()."""
    stream = llm.generate(prompt, top_k=1, temp=0.0)
    return [token for token, _ in zip(stream, range(n), strict=False)]


def sequence_state(llm: llama_cpp.Llama) -> Any:
    """The cells of sequence 0 as bytes."""
    context = llm._ctx.ctx
    size = llama_cpp.llama_state_seq_get_size(context, 0)
    data = (ctypes.c_uint8 * size)()
    assert llama_cpp.llama_state_seq_get_data(context, data, size, 0) == size
    return data


def set_sequence_state(llm: llama_cpp.Llama, state: Any, n_tokens: int) -> None:
    """Sequence 0 becomes what another context saved."""
    done = llama_cpp.llama_state_seq_set_data(llm._ctx.ctx, state, len(state), 0)
    assert done == len(state)
    llm.n_tokens = n_tokens
