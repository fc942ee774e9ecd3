"""Random-weight GGUF models of many architectures, as a table: what each one's layers are made of.

As in support.write_model attention is peaked, so that leaving out the wrong cells shows in the
logits, and it outweighs the rest of a layer.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from support import N_VOCAB, _add_tokenizer

WIDTH = 128
N_FF = 128
N_EXPERT = 4
WINDOW = 64  # of sliding-window layers


@dataclass(frozen=True)
class Weight:
    """A tensor of normal numbers. Sizes are named, outermost first; a matrix of gain 1 keeps the
    size of what it multiplies."""

    sizes: tuple[str, ...]
    gain: float = 1.0
    mean: float = 0.0
    type: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32


def _matrix(*sizes: str, gain: float = 1.0) -> Weight:
    return Weight(sizes, gain)


def _vector(size: str, mean: float = 1.0, gain: float = 0.1) -> Weight:
    return Weight((size,), gain, mean)


PEAKED = math.sqrt(2.0)  # of q and k each: scaled scores then have a deviation of 2
OUTWEIGHS = 4.0  # of what attention adds to the residual

Weights = dict[str, Weight]

EMBEDDED: Weights = {
    "token_embd.weight": _matrix("vocab", "width", gain=math.sqrt(WIDTH)),
    "output_norm.weight": _vector("width"),
}
UNTIED: Weights = {**EMBEDDED, "output.weight": _matrix("vocab", "width")}
# Multiplied by sqrt(width) when read, and used for the output too.
TIED: Weights = {**EMBEDDED, "token_embd.weight": _matrix("vocab", "width")}

ATTENTION: Weights = {
    "attn_norm.weight": _vector("width"),
    "attn_q.weight": _matrix("q", "width", gain=PEAKED),
    "attn_k.weight": _matrix("k", "width", gain=PEAKED),
    "attn_v.weight": _matrix("v", "width"),
    "attn_output.weight": _matrix("width", "o", gain=OUTWEIGHS),
}
FUSED: Weights = {
    "attn_norm.weight": _vector("width"),
    "attn_qkv.weight": _matrix("qkv", "width", gain=PEAKED),
    "attn_output.weight": _matrix("width", "o", gain=OUTWEIGHS),
}
BIASES: Weights = {f"attn_{x}.bias": _vector(x, mean=0.0, gain=0.3) for x in "qkv"}
QK_NORM: Weights = {f"attn_{x}_norm.weight": _vector("head", mean=PEAKED) for x in "qk"}
POST_NORMS: Weights = {
    "post_attention_norm.weight": _vector("width", mean=OUTWEIGHS),
    "post_ffw_norm.weight": _vector("width"),
}
FFN: Weights = {
    "ffn_norm.weight": _vector("width"),
    "ffn_gate.weight": _matrix("ff", "width"),
    "ffn_up.weight": _matrix("ff", "width"),
    "ffn_down.weight": _matrix("width", "ff"),
}
FFN_FUSED: Weights = {
    "ffn_norm.weight": _vector("width"),
    "ffn_up.weight": _matrix("2 ff", "width"),
    "ffn_down.weight": _matrix("width", "ff"),
}
# What experts add is small: rounding may swap two that are nearly as good.
EXPERTS: Weights = {
    "ffn_gate_inp.weight": _matrix("experts", "width"),
    "ffn_gate_exps.weight": _matrix("experts", "ff", "width"),
    "ffn_up_exps.weight": _matrix("experts", "ff", "width"),
    "ffn_down_exps.weight": _matrix("experts", "width", "ff", gain=0.1),
}
EXPERT_BIASES: Weights = {
    "ffn_gate_inp.bias": _vector("experts", mean=0.0),
    "ffn_gate_exps.bias": Weight(("experts", "ff")),
    "ffn_up_exps.bias": Weight(("experts", "ff")),
    "ffn_down_exps.bias": Weight(("experts", "width"), gain=0.1),
}


def quantized_experts(kind: gguf.GGMLQuantizationType) -> Weights:
    """The experts' own matrices in another type."""
    return {name: replace(w, type=kind) for name, w in EXPERTS.items() if "exps" in name}


MXFP4_EXPERTS = quantized_experts(gguf.GGMLQuantizationType.MXFP4)


@dataclass(frozen=True)
class Arch:
    """A model of the zoo. full: its layers that see the whole context, which FASA replaces; the
    others have a sliding window. Keys are those of the GGUF file without the architecture.
    """

    name: str
    arch: str
    layer: Weights
    full: tuple[int, ...] = (0, 1)
    n_layer: int = 2
    n_head: int = 4
    n_head_kv: int = 2
    k_dim: int = 64
    v_dim: int = 0  # 0: k_dim
    n_rot: int = 0  # 0: k_dim
    rope_base: float = 10000.0
    top: Weights = field(default_factory=lambda: UNTIED)
    keys: dict[str, Any] = field(default_factory=dict)
    sinks: float | None = None  # mean of the sinks of full layers

    def __str__(self) -> str:
        return self.name

    @property
    def nodes(self) -> dict[str, int]:
        """Golden: attention nodes per decoded token, by reason."""
        found = {"sparse": len(self.full), "swa": self.n_layer - len(self.full)}
        return {reason: n for reason, n in found.items() if n}


SINKS = 7.0  # about the log of the sum of 500 peaked cells
MOE = {"expert_count": N_EXPERT, "expert_used_count": 2, "expert_feed_forward_length": N_FF}
SLIDING = {"attention.sliding_window": WINDOW}

ZOO = [
    Arch("llama", "llama", ATTENTION | FFN),
    Arch("qwen2", "qwen2", ATTENTION | BIASES | FFN, n_head=2, n_head_kv=1),
    Arch("qwen3", "qwen3", ATTENTION | QK_NORM | FFN, n_head_kv=1, rope_base=1e6),
    Arch("phi3", "phi3", FUSED | FFN_FUSED, n_head_kv=4, k_dim=32),
    Arch(
        "stablelm",
        "stablelm",
        ATTENTION
        | FFN
        | {f"{norm}.bias": _vector("width", mean=0.0) for norm in ("attn_norm", "ffn_norm")},
        n_head=2,
        n_head_kv=1,
        n_rot=16,
        top=UNTIED | {"output_norm.bias": _vector("width", mean=0.0)},
    ),
    Arch("glm4", "glm4", ATTENTION | BIASES | POST_NORMS | FFN_FUSED, n_rot=32),
    Arch(
        "gemma2",
        "gemma2",
        ATTENTION | POST_NORMS | FFN,
        n_layer=4,
        full=(1, 3),
        top=TIED,
        keys={**SLIDING, "attn_logit_softcapping": 5.0, "final_logit_softcapping": 3.0},
    ),
    Arch(
        "gemma3",
        "gemma3",
        ATTENTION | QK_NORM | POST_NORMS | FFN,
        n_layer=7,
        full=(5,),
        n_head_kv=1,
        rope_base=1e6,
        top=TIED,
        keys={**SLIDING, "rope.freq_base_swa": 10000.0},
    ),
    Arch(
        "gpt-oss",
        "gpt-oss",
        ATTENTION
        | BIASES
        | {"attn_output.bias": _vector("width", mean=0.0)}
        | {"post_attention_norm.weight": _vector("width")}
        | EXPERTS
        | MXFP4_EXPERTS
        | EXPERT_BIASES,
        n_layer=4,
        full=(1, 3),
        n_head=8,
        n_head_kv=1,
        keys={**SLIDING, **MOE},
        sinks=SINKS,
    ),
    Arch(
        "qwen3moe",
        "qwen3moe",
        ATTENTION | QK_NORM | {"ffn_norm.weight": _vector("width")} | EXPERTS,
        rope_base=1e6,
        keys=MOE,
    ),
    Arch(
        "mixtral",
        "llama",
        ATTENTION | {"ffn_norm.weight": _vector("width")} | EXPERTS,
        keys=MOE,
    ),
    Arch(
        "mimo2",
        "mimo2",
        ATTENTION | FFN,
        n_layer=3,
        full=(0, 2),
        k_dim=96,
        v_dim=64,
        n_rot=32,
        keys={
            **SLIDING,
            "attention.sliding_window_pattern": [False, True, False],
            "expert_feed_forward_length": 0,
        },
        sinks=SINKS,
    ),
]
BY_NAME = {arch.name: arch for arch in ZOO}


def write(path: Path, name: str, keys: dict[str, Any] | None = None, **variation: Any) -> Path:
    """Writes a model of the zoo with other keys or other fields of Arch; weights depend on their
    sizes only."""
    arch = replace(BY_NAME[name], **variation)
    v_dim = arch.v_dim or arch.k_dim
    q, k, v = arch.n_head * arch.k_dim, arch.n_head_kv * arch.k_dim, arch.n_head_kv * v_dim
    sizes = {"vocab": N_VOCAB, "width": WIDTH, "ff": N_FF, "2 ff": 2 * N_FF, "experts": N_EXPERT}
    sizes |= {"q": q, "k": k, "v": v, "qkv": q + k + v, "o": arch.n_head * v_dim}
    sizes |= {"head": arch.k_dim, "heads": arch.n_head}

    writer = gguf.GGUFWriter(path, arch.arch)
    writer.add_name("random")  # names like phi-3 change the tokenizer
    header = {
        "block_count": arch.n_layer,
        "context_length": 8192,
        "embedding_length": WIDTH,
        "feed_forward_length": N_FF,
        "vocab_size": N_VOCAB,
        "attention.head_count": arch.n_head,
        "attention.head_count_kv": arch.n_head_kv,
        "attention.key_length": arch.k_dim,
        "attention.value_length": v_dim,
        "attention.layer_norm_epsilon": 1e-5,
        "attention.layer_norm_rms_epsilon": 1e-5,
        "rope.freq_base": arch.rope_base,
    }
    header |= {"rope.dimension_count": arch.n_rot} if arch.n_rot else {}
    kinds: dict[type, Any] = {int: writer.add_uint32, float: writer.add_float32}
    for key, value in (header | arch.keys | (keys or {})).items():
        kinds.get(type(value), writer.add_array)(f"{arch.arch}.{key}", value)
    _add_tokenizer(writer)

    rng = np.random.default_rng(0)
    tensors = dict(arch.top)
    for il in range(arch.n_layer):
        layer = dict(arch.layer)
        if arch.sinks is not None:
            mean = arch.sinks if il in arch.full else SINKS
            layer["attn_sinks.weight"] = _vector("heads", mean, gain=1.0)
        tensors |= {f"blk.{il}.{name}": weight for name, weight in layer.items()}
    for tensor, weight in tensors.items():
        shape = [sizes[size] for size in weight.sizes]
        spread = weight.gain / (math.sqrt(shape[-1]) if len(shape) > 1 else 1.0)
        values = (weight.mean + spread * rng.normal(size=shape)).astype(np.float32)
        data = gguf.quants.quantize(values, weight.type)
        writer.add_tensor(tensor, data, raw_dtype=weight.type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
