"""Every head size, ratio of heads and kind of RoPE: the dense result where everything is attended."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import zoo
from pyfasa.llama import kv_type
from support import (
    MAX_NMSE,
    Shape,
    decode,
    nmse,
    opened,
    opened_plain,
    random_profile,
    random_tokens,
    write_model,
)

N = 400
TOKENS = random_tokens(N + 5)
PROMPT, REST = TOKENS[:N], TOKENS[N:]


def shape(arch: str, group: int, n_head_kv: int, head_dim: int, n_rot: int = 0) -> Shape:
    return Shape(arch, group * n_head_kv, n_head_kv, head_dim, n_rot or head_dim, n_layer=1)


SHAPES = [
    *(shape("llama", 1, 2, size) for size in (32, 96, 160, 224)),
    *(shape("llama", 3, 1, size) for size in (64, 128, 192, 256)),
    *(shape("qwen2", 3, 1, size) for size in (32, 96, 160, 224)),
    *(shape("qwen2", 1, 2, size) for size in (64, 128, 192, 256)),
    *(shape(arch, group, 2, 32) for arch in ("llama", "qwen3") for group in (3, 8)),
    *(shape(arch, 8, 1, 64) for arch in ("llama", "qwen3")),
    *(shape("stablelm", 2, 1, size, rot) for size, rot in ((64, 2), (96, 32), (256, 64))),
]
# Keys as wide as, narrower and wider than values; sizes are rotated in blocks, or not, each alone.
K_AND_V = [(64, 32), (32, 64), (96, 160), (128, 256), (192, 128), (256, 32)]


def agrees(path: Path, n_sparse: int) -> None:
    """All cells attended: as dense. Few cells: near it, nearer than those that fewer chunks find,
    and these are the same ones whatever the cache's type: a quantized K was rotated first."""
    found_by_few_chunks = []
    for kv in ("f16", "q8_0"):
        arguments = {"type_k": kv_type(kv, "type_k"), "type_v": kv_type(kv, "type_v"), "n_ctx": 512}
        with opened_plain(path, **arguments) as plain:
            plain.eval(PROMPT)
            wanted = decode(plain, REST)
        profile = random_profile(path, bits=(8,))
        with opened(path, profile=profile, min_ctx=0, **arguments) as llm:
            llm.fasa.verify = True
            llm.eval(PROMPT)
            rows = []
            for budget, n_fc in ((512, None), (64, None), (64, profile.n_fc // 4)):
                llm.fasa.budget, llm.fasa.n_fc = budget, n_fc
                llm.n_tokens = N
                rows.append(decode(llm, REST))
            counters = llm.fasa.counters
        errors = [nmse(found, wanted) for found in rows]
        assert errors[0] <= MAX_NMSE < errors[1] < errors[2] / 2
        assert counters.nodes["sparse"] == 3 * n_sparse * len(REST)
        assert counters.verify_failures == 0 < counters.cells_verified
        found_by_few_chunks.append(rows[2])
    assert nmse(*found_by_few_chunks) < 0.1


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_head_size(shape: Shape, tmp_path: Path) -> None:
    agrees(write_model(tmp_path / "model.gguf", shape), 1)


@pytest.mark.parametrize(("k_dim", "v_dim"), K_AND_V)
def test_keys_and_values_of_different_size(k_dim: int, v_dim: int, tmp_path: Path) -> None:
    path = zoo.write(tmp_path / "model.gguf", "mimo2", k_dim=k_dim, v_dim=v_dim)
    agrees(path, len(zoo.BY_NAME["mimo2"].full))


def test_partial_rotary_of_neighbouring_dims(tmp_path: Path) -> None:
    path = zoo.write(tmp_path / "model.gguf", "glm4", k_dim=96, n_rot=32)
    agrees(path, 2)


@pytest.mark.parametrize("head_dim", [40, 80, 112])
def test_other_head_sizes_are_dense(head_dim: int, tmp_path: Path) -> None:
    path = write_model(tmp_path / "model.gguf", shape("llama", 2, 1, head_dim))
    with opened_plain(path) as plain:
        plain.eval(PROMPT)
        wanted = decode(plain, REST)
    with opened(path, profile=random_profile(path), budget=48, min_ctx=0) as llm:
        llm.eval(PROMPT)
        llm.fasa.reset()
        found = decode(llm, REST)
        nodes = {reason: n for reason, n in llm.fasa.counters.nodes.items() if n}
    assert np.array_equal(found, wanted)
    assert nodes == {"kv_type": len(REST)}
