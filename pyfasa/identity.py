"""Which model is this? Read from the head of a GGUF file, without loading it."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
from gguf.constants import GGMLQuantizationType

from pyfasa.errors import ModelFileError, ProfileError
from pyfasa.gguf_header import Header, Tensor, shard_names

Rope: TypeAlias = Literal["norm", "neox"]

# As llama_model_rope_type() has it; tests/test_identity.py compares the two.
_NORM = """
    arcee arctic baichuan bailingmoe bailingmoe3 chameleon chatglm cohere2 cohere2moe command-r
    deci deepseek deepseek2 deepseek2-ocr deepseek32 deepseek4 dots3note eagle3 ernie4_5
    ernie4_5-moe glm-dsa glm4 granite granite_swa granitehybrid granitemoe graniteswitch hy_v4
    internlm2 llada llama llama-embed llama4 maincoder minicpm mistral3 mistral4 muse-glimmer
    nanbeige neo-bert olmo plm pockettts smollm3 starcoder xverse
"""
_NEOX = """
    afmoe apertus bailingmoe2 bert bitnet codeshell cogvlm dbrx dots1 dream eurobert exaone
    exaone-moe exaone4 falcon falcon-h1 gemma gemma-embedding gemma2 gemma3 gemma3n gemma4
    gemma4-assistant glm4moe gpt-oss gptneox grok grovemoe hrm_text hunyuan-dense hunyuan-moe
    hunyuan_vl hy_v3 jais2 jina-bert-v3 laguna lfm2 lfm2moe llada-moe maple mellum mimo2 minicpm3
    minimax-01 minimax-m2 minimax-m3 modern-bert nemotron nomic-bert nomic-bert-moe olmo2 olmoe
    openelm orion pangu-embedded phi2 phi3 phimoe plamo plamo2 plamo3 qwen qwen2 qwen2moe qwen3
    qwen3moe qwen3next rnd1 seed_oss smallthinker spark2_5 stablelm starcoder2 step35 talkie
"""
_MROPE = "paddleocr qwen2vl qwen35 qwen35moe qwen3tts qwen3vl qwen3vlmoe qwen4exp"
_MROPE_IF_SECTIONS = {"bailingmoe3", "glm4", "glm4moe", "hunyuan_vl"}
_ROPE: dict[str, Rope] = dict.fromkeys(_NORM.split(), "norm")
_ROPE |= dict.fromkeys(_NEOX.split(), "neox")

# llama-quantize writes the same bytes of these types whatever importance matrix it is given.
_EXACT_TYPES = {"F32", "F16", "BF16", "Q8_0"}


def rope_of(architecture: str, sections: Iterable[int] = ()) -> Rope:
    """How llama.cpp pairs the dims that RoPE rotates.

    sections: the value of <architecture>.rope.dimension_sections
    Raises ProfileError for models without RoPE, with M-RoPE, and for unknown ones.
    """
    in_sections = architecture in _MROPE_IF_SECTIONS and min([*sections, 0, 0][:2]) > 0
    if in_sections or architecture in _MROPE.split():
        raise ProfileError(
            f"Models of architecture {architecture!r} use M-RoPE, whose chunks depend on several "
            "positions; pyfasa works with plain RoPE only, so run this model dense."
        )
    if architecture not in _ROPE:
        raise ProfileError(
            f"Architecture {architecture!r} has no RoPE, or is not known to this pyfasa; "
            "frequency chunks need RoPE, so run this model dense."
        )
    return _ROPE[architecture]


@dataclass(frozen=True)
class ModelIdentity:
    """What a profile depends on. Equal for all quantizations of one model but for the samples.

    n_head, n_head_kv: the largest over all layers
    rope:              "norm" pairs dims (2i, 2i+1), "neox" dims (i, i + n_rot/2)
    tensor_hash:       sha256 of the attention tensors' names, shapes and (kept f32) norms
    sample_type:       types of the sampled query and key weights
    sample_hash:       sha256 of the first 4 KiB of each
    """

    name: str
    architecture: str
    n_layer: int
    n_head: int
    n_head_kv: int
    head_dim: int
    n_rot: int
    rope: Rope
    rope_freq_base: float
    tensor_hash: str
    sample_type: str
    sample_hash: str

    @classmethod
    def read(cls, path: str | Path) -> ModelIdentity:
        """Of a GGUF model; of a split one, `path` is any of its files.

        Raises ModelFileError for damaged or missing files, ProfileError for models without RoPE.
        """
        names = shard_names(path)
        for shard in names:
            if len(names) > 1 and not shard.exists():
                raise ModelFileError(
                    f"{shard} is missing; the {len(names)} shards belong together."
                )
        headers = [Header.read(shard) for shard in names]
        first = headers[0]
        tensors = {name: tensor for head in headers for name, tensor in head.tensors.items()}
        if not any(_ATTENTION.match(name) for name in tensors):
            raise ModelFileError(
                f"{path} holds no attention weights (blk.*.attn_*), so it is not a whole model; "
                "give the file that llama.cpp generates text with."
            )
        architecture = str(first.values.get("general.architecture", ""))
        keys = _Keys(first, architecture)
        rope = rope_of(architecture, keys.array("rope.dimension_sections", []))
        n_head = keys.array("attention.head_count")
        head_dim = keys.number("attention.key_length", 0) or (
            keys.number("embedding_length") // max(n_head[0], 1)
        )
        sample_type, sample_hash = _sample(tensors)
        return cls(
            name=str(first.values.get("general.name", "")) or first.path.stem,
            architecture=architecture,
            n_layer=keys.number("block_count"),
            n_head=max(n_head),
            n_head_kv=max(keys.array("attention.head_count_kv", n_head)),
            head_dim=head_dim,
            n_rot=keys.number("rope.dimension_count", head_dim),
            rope=rope,
            rope_freq_base=float(keys.get("rope.freq_base", 10000.0, (np.floating,))),
            tensor_hash=_tensor_hash(tensors),
            sample_type=sample_type,
            sample_hash=sample_hash,
        )

    def differences(self, other: ModelIdentity) -> list[str]:
        """What sets two models apart, as "n_layer 6 / 8"; empty for the same model.

        The name never counts. The sampled bytes count only when both files hold them in the same
        type, and one that every quantizer writes alike: the same model may come in many types, and
        with or without an importance matrix.
        """
        exact = set(self.sample_type.split(",")) <= _EXACT_TYPES
        ignored = {"name", "sample_type"}
        if not exact or self.sample_type != other.sample_type:
            ignored.add("sample_hash")
        found = []
        for field in fields(self):
            mine, theirs = getattr(self, field.name), getattr(other, field.name)
            if field.name not in ignored and mine != theirs:
                short = slice(12 if field.name.endswith("_hash") else None)
                found.append(f"{field.name} {str(mine)[short]} / {str(theirs)[short]}")
        return found


_ATTENTION = re.compile(r"blk\.(\d+)\.attn_")
_NORMS = re.compile(r"blk\.\d+\.attn_(q_|k_)?norm\.weight")
_SAMPLED = re.compile(r"blk\.(\d+)\.attn_(q|k|qkv)\.weight")


@dataclass(frozen=True)
class _Keys:
    """Keys of one architecture, with a sentence for what is missing or of the wrong type."""

    header: Header
    architecture: str

    def get(self, name: str, default: list[int] | float | None, kinds: tuple[type, ...]) -> Any:
        key = f"{self.architecture}.{name}"
        value = self.header.values.get(key, default)
        real = isinstance(value, np.ndarray) and value.dtype.kind not in "iu"
        if value is None or real or (key in self.header.values and not isinstance(value, kinds)):
            raise ModelFileError(
                f"{self.header.path} does not give {key} as a number; it is damaged, or no "
                "language model."
            )
        return value

    def array(self, name: str, default: list[int] | None = None) -> list[int]:
        """Per layer, or one number for all."""
        found = np.atleast_1d(self.get(name, default, (np.integer, np.ndarray)))
        return [int(number) for number in found] or [0]

    def number(self, name: str, default: int | None = None) -> int:
        return max(self.array(name, None if default is None else [default]))


def _tensor_hash(tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(filter(_ATTENTION.match, tensors)):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.shape}\n".encode())
        if _NORMS.fullmatch(name) and tensor.type == GGMLQuantizationType.F32:
            digest.update(tensor.read())
    return digest.hexdigest()


def _sample(tensors: dict[str, Tensor]) -> tuple[str, str]:
    """Types and hash of the query and key weights of the first, middle and last layer."""
    layers: dict[int, list[str]] = {}
    for name in sorted(tensors):
        if match := _SAMPLED.fullmatch(name):
            layers.setdefault(int(match[1]), []).append(name)
    ids = sorted(layers)
    chosen = sorted({ids[0], ids[len(ids) // 2], ids[-1]}) if ids else []
    names = [name for layer in chosen for name in layers[layer]]
    types = [tensors[name].type.name for name in names]
    digest = hashlib.sha256()
    for name in names:
        digest.update(tensors[name].read(4096))
    return ",".join(types if len(set(types)) > 1 else types[:1]), digest.hexdigest()
