"""A llama-architecture GGUF with random weights in the shape of an 8B model, Q4_0: for measuring speed, not for text.

python tests/gpu/random_gguf.py OUT
"""

from __future__ import annotations

import sys

import gguf
import numpy as np

LAYERS, WIDTH, HEADS, KV_HEADS, HEAD, FFN, VOCAB, CONTEXT = (
    32,
    4096,
    32,
    8,
    128,
    14336,
    32000,
    262144,
)
QUANT = gguf.GGMLQuantizationType.Q4_0


def main() -> None:
    out = gguf.GGUFWriter(sys.argv[1], "llama")
    out.add_block_count(LAYERS)
    out.add_context_length(CONTEXT)
    out.add_embedding_length(WIDTH)
    out.add_feed_forward_length(FFN)
    out.add_head_count(HEADS)
    out.add_head_count_kv(KV_HEADS)
    out.add_key_length(HEAD)
    out.add_value_length(HEAD)
    out.add_rope_dimension_count(HEAD)
    out.add_rope_freq_base(500000.0)
    out.add_layer_norm_rms_eps(1e-5)
    out.add_vocab_size(VOCAB)
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

    def matrix(name: str, rows: int, columns: int) -> None:
        # 256 random rows, repeated: quantizing them all would take minutes.
        block = gguf.quants.quantize(
            (rng.standard_normal((256, columns)) * 0.02).astype(np.float32), QUANT
        )
        full = np.tile(block, (-(-rows // 256), 1))[:rows]
        out.add_tensor(name, np.ascontiguousarray(full), raw_dtype=QUANT)

    def ones(name: str) -> None:
        out.add_tensor(name, np.ones(WIDTH, np.float32))

    matrix("token_embd.weight", VOCAB, WIDTH)
    ones("output_norm.weight")
    for i in range(LAYERS):
        ones(f"blk.{i}.attn_norm.weight")
        ones(f"blk.{i}.ffn_norm.weight")
        matrix(f"blk.{i}.attn_q.weight", HEADS * HEAD, WIDTH)
        matrix(f"blk.{i}.attn_k.weight", KV_HEADS * HEAD, WIDTH)
        matrix(f"blk.{i}.attn_v.weight", KV_HEADS * HEAD, WIDTH)
        matrix(f"blk.{i}.attn_output.weight", WIDTH, HEADS * HEAD)
        matrix(f"blk.{i}.ffn_gate.weight", FFN, WIDTH)
        matrix(f"blk.{i}.ffn_up.weight", FFN, WIDTH)
        matrix(f"blk.{i}.ffn_down.weight", WIDTH, FFN)
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()


if __name__ == "__main__":
    main()
