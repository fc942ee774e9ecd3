"""A llama-architecture GGUF with random weights, Q4_0: for measuring speed, not for text.

    python tests/gpu/random_gguf.py OUT [8b | a3b]

8b has the shape of an 8B model; a3b that of half of a mixture of experts with 30B weights, 3B of them active.
"""

from __future__ import annotations

import sys
from typing import NamedTuple

import gguf
import numpy as np

VOCAB, CONTEXT, HEAD = 32000, 262144, 128


class Shape(NamedTuple):
    """Experts 0: none. used: of them, for a token."""

    layers: int
    width: int
    heads: int
    kv_heads: int
    ffn: int
    experts: int = 0
    used: int = 0


SHAPES = {"8b": Shape(32, 4096, 32, 8, 14336), "a3b": Shape(24, 2048, 32, 4, 768, 128, 8)}
QUANT = gguf.GGMLQuantizationType.Q4_0


def main() -> None:
    shape = SHAPES[sys.argv[2] if len(sys.argv) > 2 else "8b"]
    out = gguf.GGUFWriter(sys.argv[1], "llama")
    out.add_block_count(shape.layers)
    out.add_context_length(CONTEXT)
    out.add_embedding_length(shape.width)
    out.add_feed_forward_length(shape.ffn)
    out.add_head_count(shape.heads)
    out.add_head_count_kv(shape.kv_heads)
    out.add_key_length(HEAD)
    out.add_value_length(HEAD)
    out.add_rope_dimension_count(HEAD)
    out.add_rope_freq_base(500000.0)
    out.add_layer_norm_rms_eps(1e-5)
    out.add_vocab_size(VOCAB)
    if shape.experts:
        out.add_expert_count(shape.experts)
        out.add_expert_used_count(shape.used)
    out.add_tokenizer_model("llama")
    special = [b"<unk>", b"<s>", b"</s>"]
    byte = [b"<0x%02X>" % i for i in range(256)]
    words = [b"\xe2\x96\x81w%d" % i for i in range(VOCAB - 259)]
    out.add_token_list(special + byte + words)
    out.add_token_scores([0.0] * 259 + [-float(i) for i in range(len(words))])
    out.add_token_types([2, 3, 3] + [6] * 256 + [1] * len(words))
    out.add_bos_token_id(1)
    out.add_eos_token_id(2)
    rng = np.random.default_rng(0)

    def matrix(name: str, rows: int, columns: int, n: int = 1) -> None:
        # 256 random rows, repeated: quantizing them all would take minutes.
        block = gguf.quants.quantize(
            (rng.standard_normal((256, columns)) * 0.02).astype(np.float32), QUANT
        )
        full = np.tile(block, (-(-rows // 256), 1))[:rows]
        full = np.broadcast_to(full, (n, *full.shape)) if n > 1 else full
        out.add_tensor(name, np.ascontiguousarray(full), raw_dtype=QUANT)

    def ones(name: str) -> None:
        out.add_tensor(name, np.ones(shape.width, np.float32))

    matrix("token_embd.weight", VOCAB, shape.width)
    ones("output_norm.weight")
    for i in range(shape.layers):
        ones(f"blk.{i}.attn_norm.weight")
        ones(f"blk.{i}.ffn_norm.weight")
        matrix(f"blk.{i}.attn_q.weight", shape.heads * HEAD, shape.width)
        matrix(f"blk.{i}.attn_k.weight", shape.kv_heads * HEAD, shape.width)
        matrix(f"blk.{i}.attn_v.weight", shape.kv_heads * HEAD, shape.width)
        matrix(f"blk.{i}.attn_output.weight", shape.width, shape.heads * HEAD)
        kind, n = ("_exps", shape.experts) if shape.experts else ("", 1)
        if shape.experts:
            router = rng.standard_normal((shape.experts, shape.width)) * 0.02
            out.add_tensor(f"blk.{i}.ffn_gate_inp.weight", router.astype(np.float32))
        matrix(f"blk.{i}.ffn_gate{kind}.weight", shape.ffn, shape.width, n)
        matrix(f"blk.{i}.ffn_up{kind}.weight", shape.ffn, shape.width, n)
        matrix(f"blk.{i}.ffn_down{kind}.weight", shape.width, shape.ffn, n)
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()


if __name__ == "__main__":
    main()
