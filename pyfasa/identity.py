"""Which model is this? Read from the head of a GGUF file, without loading it.

gguf.GGUFReader makes NumPy views of every token of the vocabulary: 14 s for 152,000 tokens, and a
damaged array length keeps it busy for ever. So the head is walked here, with every length checked.
Format: ggml/docs/gguf.md.
"""

from __future__ import annotations

import hashlib
import mmap
import re
import struct
from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from math import prod
from pathlib import Path
from typing import Any, Literal, TypeAlias, cast

import numpy as np
import numpy.typing as npt
from gguf.constants import (
    GGML_QUANT_SIZES,
    GGUF_DEFAULT_ALIGNMENT,
    GGMLQuantizationType,
    GGUFValueType,
)

from pyfasa.errors import ModelFileError, ProfileError

Value: TypeAlias = str | np.generic | npt.NDArray[np.generic]

_DTYPES = {
    "<u1": GGUFValueType.UINT8, "<i1": GGUFValueType.INT8, "<u2": GGUFValueType.UINT16,
    "<i2": GGUFValueType.INT16, "<u4": GGUFValueType.UINT32, "<i4": GGUFValueType.INT32,
    "<f4": GGUFValueType.FLOAT32, "?": GGUFValueType.BOOL, "<u8": GGUFValueType.UINT64,
    "<i8": GGUFValueType.INT64, "<f8": GGUFValueType.FLOAT64,
}  # fmt: skip
NUMBER_TYPES = {np.dtype(code): kind for code, kind in _DTYPES.items()}
NUMBER_DTYPES = {kind: dtype for dtype, kind in NUMBER_TYPES.items()}


@dataclass(frozen=True)
class Tensor:
    """A tensor of a GGUF file. shape is innermost first; start is a byte offset in the file."""

    path: Path
    name: str
    shape: tuple[int, ...]
    type: GGMLQuantizationType
    start: int
    n_bytes: int

    def read(self, limit: int | None = None) -> bytes:
        """The raw bytes of the tensor, at most `limit` of them."""
        with open(self.path, "rb") as file:
            file.seek(self.start)
            return file.read(self.n_bytes if limit is None else min(limit, self.n_bytes))


@dataclass(frozen=True)
class Header:
    """The head of a GGUF file: what comes before the tensor data.

    values:  key -> value, without arrays of strings
    extents: key -> first and last + 1 byte of the key-value pair in the file
    """

    path: Path
    values: dict[str, Value]
    extents: dict[str, tuple[int, int]]
    tensors: dict[str, Tensor]
    kv_end: int
    info_end: int
    data_start: int
    alignment: int

    def number(self, name: str) -> int:
        """A number of the model's architecture, such as "context_length"; 0: the file does not say."""
        value = self.values.get(f"{self.values.get('general.architecture')}.{name}")
        return int(value) if isinstance(value, (np.integer, np.floating)) else 0

    @classmethod
    def read(cls, path: str | Path) -> Header:
        """Raises ModelFileError when the file is missing, not a GGUF file, damaged or cut off."""
        path = Path(path)
        try:
            with open(path, "rb") as file:
                if file.seek(0, 2) < 24:
                    raise ModelFileError(f"{path} is not a GGUF file: it is shorter than a header.")
                with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as view:
                    return _Walk(path, view).header()
        except OSError as error:
            raise ModelFileError(f"{path} cannot be read: {error.strerror}.") from error
        except ModelFileError:
            raise
        except (struct.error, ValueError, TypeError) as error:
            raise ModelFileError(
                f"{path} is damaged or cut off: its GGUF header cannot be followed to the end. "
                "Download or convert it again."
            ) from error


class _Walk:
    """One pass over the mapped bytes. struct.error, ValueError or TypeError: damaged."""

    def __init__(self, path: Path, view: mmap.mmap) -> None:
        self.path = path
        self.view = view
        self.at = 0

    def header(self) -> Header:
        magic, version = self.take("<4sI")
        if magic != b"GGUF":
            raise ModelFileError(f"{self.path} is not a GGUF file: it begins with {magic!r}.")
        if version & 0xFFFF == 0:
            raise ModelFileError(
                f"{self.path} is a big-endian GGUF file; pyfasa reads little-endian ones. "
                "Convert it with gguf-convert-endian."
            )
        if version not in (2, 3):
            raise ModelFileError(f"{self.path} has GGUF version {version}; pyfasa reads 2 and 3.")
        n_tensors, n_kv = self.take("<QQ")
        values: dict[str, Value] = {}
        extents: dict[str, tuple[int, int]] = {}
        for _ in range(n_kv):
            start, key = self.at, self.text()
            if key in extents:
                raise ValueError(key)
            value = self.value(GGUFValueType(self.take("<I")[0]))
            extents[key] = (start, self.at)
            if value is not None:
                values[key] = value
        kv_end = self.at
        loose = [self.tensor() for _ in range(n_tensors)]
        given = values.get("general.alignment", np.uint32(GGUF_DEFAULT_ALIGNMENT))
        if not isinstance(given, np.integer) or given <= 0 or int(given).bit_count() != 1:
            raise ValueError(given)
        alignment = int(given)
        info_end = self.at
        data_start = -(-info_end // alignment) * alignment
        tensors = {t.name: replace(t, start=data_start + t.start) for t in loose}
        if len(tensors) != n_tensors:
            raise ValueError(n_tensors)
        end = max((t.start + t.n_bytes for t in tensors.values()), default=0)
        if end > len(self.view):
            raise ModelFileError(
                f"{self.path} is cut off: its tensors end at byte {end}, the file at byte "
                f"{len(self.view)}. Download or convert it again."
            )
        return Header(self.path, values, extents, tensors, kv_end, info_end, data_start, alignment)

    def take(self, layout: str) -> tuple[Any, ...]:
        found = struct.unpack_from(layout, self.view, self.at)
        self.at += struct.calcsize(layout)
        return found

    def skip(self, n_bytes: int) -> int:
        """Moves on and returns where it was."""
        start = self.at
        if n_bytes > len(self.view) - start:
            raise ValueError(n_bytes)
        self.at = start + n_bytes
        return start

    def text(self) -> str:
        start = self.skip(self.take("<Q")[0])
        return self.view[start : self.at].decode("utf-8", "replace")

    def numbers(self, kind: GGUFValueType, count: int) -> npt.NDArray[np.generic]:
        dtype = NUMBER_DTYPES[kind]
        start = self.skip(count * dtype.itemsize)
        return np.frombuffer(self.view[start : self.at], dtype)

    def value(self, kind: GGUFValueType) -> Value | None:
        if kind == GGUFValueType.STRING:
            return self.text()
        if kind != GGUFValueType.ARRAY:
            return cast(np.generic, self.numbers(kind, 1)[0])
        item, count = self.take("<IQ")
        if item != GGUFValueType.STRING:
            return self.numbers(GGUFValueType(item), count)
        for _ in range(count):
            self.skip(self.take("<Q")[0])
        return None

    def tensor(self) -> Tensor:
        """With a start that counts from the first tensor."""
        name = self.text()
        (n_dims,) = self.take("<I")
        if n_dims > 4:
            raise ValueError(n_dims)
        shape = self.take(f"<{n_dims}Q")
        kind, start = self.take("<IQ")
        if kind not in GGMLQuantizationType.__members__.values():
            raise ModelFileError(
                f"{self.path}: tensor {name} has the unknown type {kind}. Update the gguf package, "
                "or download the file again if it is damaged."
            )
        block, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
        n_bytes = prod(shape) // block * block_bytes
        return Tensor(self.path, name, shape, GGMLQuantizationType(kind), start, n_bytes)


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

_SHARD = re.compile(r"(?P<stem>.+)-\d{5}-of-(?P<count>\d{5})\.gguf")


def shard_names(path: str | Path) -> list[Path]:
    """Where all files of the model that `path` belongs to should be; [path] if it is not split."""
    path = Path(path)
    match = _SHARD.fullmatch(path.name)
    if match is None or int(match["count"]) < 2:
        return [path]
    ids = range(1, int(match["count"]) + 1)
    return [path.with_name(f"{match['stem']}-{i:05d}-of-{match['count']}.gguf") for i in ids]


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
