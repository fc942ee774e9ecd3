"""A profile: which frequency chunks of each KV head the side index keeps, and in how many bits.

The GGUF keys of a profile are named here and nowhere else. The same keys stand in a file of their
own (a sidecar, `<model>-fasa.gguf`) or inside a model file (pyfasa.embed).
"""

from __future__ import annotations

import math
import os
import secrets
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
from gguf.constants import GGUF_DEFAULT_ALIGNMENT, GGUF_VERSION, GGUFValueType

from pyfasa.errors import ModelFileError, ProfileError, WriteError
from pyfasa.gguf_header import NUMBER_TYPES, Header, Value, shard_names
from pyfasa.identity import ModelIdentity
from pyfasa.profile_checks import (
    BITS,
    frozen,
    text,
    validate_channels,
    validate_chunks,
    validate_identity,
    validate_report,
    whole,
)

VERSION = 1
KEY_PREFIX = "pyfasa."
VERSION_KEY = "pyfasa.version"
SIDECAR_TYPE = "fasa-profile"

# Field -> key. What a reader of a metadata dump wants to know first comes first.
_SCALARS = {
    "created_by": "pyfasa.created_by",
    "method": "pyfasa.method",
    "n_fc": "pyfasa.n_fc",
    "n_ctx": "pyfasa.calibration.n_ctx",
    "n_queries": "pyfasa.calibration.n_queries",
    "seed": "pyfasa.calibration.seed",
    "data_name": "pyfasa.data.name",
    "data_sha256": "pyfasa.data.sha256",
}
_ARRAYS = {
    "chunks": "u2",
    "bits": "u1",
    "center": "f4",
    "scale": "f4",
    "importance": "f4",
    "recall": "f4",
    "oracle": "f4",
}
_CHANNELS = ("center", "scale")
_REPORTS = ("importance", "recall", "oracle")  # for readers; the side index does not need them
_OPTIONAL = {*_CHANNELS, *_REPORTS}
_WHOLE = {"n_fc": 2**16 - 1, "n_ctx": 2**32 - 1, "n_queries": 2**63 - 1, "seed": 2**64 - 1}


def entry_bytes(bits: npt.NDArray[np.integer]) -> npt.NDArray[np.int64]:
    """Bytes of index entries whose chunks have these bits: [.., n_chunk] -> [..]; see ``Profile.bytes_per_cell``."""
    total = np.zeros(bits.shape[:-1], np.int64)
    for width in BITS:
        count = (bits == width).sum(axis=-1, dtype=np.int64)
        padded = count + -count % (4 if width == 1 else 2)
        total += np.where(count > 0, 1 + padded * 2 * width // 8, 0)
    return total


@dataclass(frozen=True, eq=False, repr=False)
class Profile:
    """Calibrated chunks of one model. Immutable and always valid; equal when all keys are equal.

    chunks u16 [n_layer, n_head_kv, n_ranked]  chunk ids, best first
    bits   u8  [n_layer, n_head_kv, n_ranked]  1, 2, 4 or 8; 0: this and all later ranks are unused
    center f32 [n_layer, n_head_kv, head_dim]  mean of the keys per channel, in the RoPE basis
    scale  f32 [n_layer, n_head_kv, head_dim]  size of a channel, > 0
    importance f32 [n_layer, n_head_kv, n_ranked]  of each ranked chunk, by its method
    recall, oracle f32 [n_layer, n_head_kv]  attention mass on a sixteenth of the cells, on rows that calibration
                   held back: chosen by this index, and by exact scores
    n_fc           chunks in use by default, at most n_ranked
    method         how the chunks were ranked: "variance", "agreement", ...
    data_sha256    of the calibration text; "" when there was none
    n_ctx, n_queries, seed   of the calibration

    Chunk i is dims (2i, 2i+1) with norm rope and (i, i + n_rot/2) with neox rope; dims past n_rot
    pair up as (2i, 2i+1) in both. A row of zero bits keeps its layer dense.
    """

    identity: ModelIdentity
    chunks: npt.NDArray[np.uint16]
    bits: npt.NDArray[np.uint8]
    center: npt.NDArray[np.float32] | None
    scale: npt.NDArray[np.float32] | None
    n_fc: int
    method: str
    data_name: str
    data_sha256: str
    n_ctx: int
    n_queries: int
    seed: int
    created_by: str
    importance: npt.NDArray[np.float32] | None = None
    recall: npt.NDArray[np.float32] | None = None
    oracle: npt.NDArray[np.float32] | None = None

    def __post_init__(self) -> None:
        for name in _WHOLE:
            if isinstance(number := getattr(self, name), np.integer):
                object.__setattr__(self, name, int(number))
        for name, dtype in _ARRAYS.items():
            value = getattr(self, name)
            if value is not None or name not in _OPTIONAL:
                object.__setattr__(self, name, frozen(name, value, np.dtype(dtype)))
        self.validate()

    @property
    def n_ranked(self) -> int:
        return int(self.chunks.shape[2])

    def validate(self) -> None:
        """Raises ProfileError with the first invariant that does not hold."""
        validate_identity(self.identity)
        for name, most in _WHOLE.items():
            whole(name, getattr(self, name), 0, most)
        for name in ("method", "data_name", "data_sha256", "created_by"):
            text(name, getattr(self, name))
        model = self.identity
        validate_chunks(self.chunks, self.bits, model)
        if not 1 <= self.n_fc <= self.n_ranked:
            raise ProfileError(
                f"n_fc is {self.n_fc}; {self.n_ranked} chunks are ranked, so 1 to that many."
            )
        for name in _CHANNELS:
            if (array := getattr(self, name)) is not None:
                validate_channels(name, array, model)
        shapes = _shapes(model, self.n_ranked)
        for name in _REPORTS:
            if (array := getattr(self, name)) is not None:
                validate_report(name, array, shapes[name])

    def with_bits(self, bits: int) -> Profile:
        """The same chunks with `bits` bits each: 1, 2, 4 or 8."""
        if bits not in BITS:
            raise ProfileError(f"bits is {bits}; the side index has 1, 2, 4 and 8 bits per dim.")
        return replace(self, bits=np.where(self.bits > 0, np.uint8(bits), np.uint8(0)))

    def with_n_fc(self, n_fc: int) -> Profile:
        """The same ranking with another number of chunks in use, 1 to n_ranked."""
        return replace(self, n_fc=n_fc)

    def bytes_per_cell(self, n_fc: int | None = None) -> npt.NDArray[np.int64]:
        """Bytes of the side index for one cell, [n_layer, n_head_kv].

        Each number of bits in use costs a segment: a step of one byte, and its chunks padded to an
        even number, with 1 bit to four. n_fc: the first so many ranks count; None: the profile's.
        """
        n_fc = self.n_fc if n_fc is None else n_fc
        used = self.with_n_fc(n_fc).bits[:, :, :n_fc]
        return entry_bytes(used)

    def check_model(self, model: ModelIdentity) -> None:
        """Raises ProfileError naming both models when the profile is not for `model`.

        Other quantizations of the calibrated model are accepted.
        """
        found = self.identity.differences(model)
        if found:
            raise ProfileError(
                f"This profile is for the model {self.identity.name!r} and does not fit "
                f"{model.name!r}: {', '.join(found)} (profile / model). Make one for "
                f"{model.name!r} with `pyfasa calibrate`."
            )

    def to_fields(self) -> dict[str, Value]:
        """GGUF keys and values, in the order in which they are written."""
        found: dict[str, Value] = {VERSION_KEY: np.uint32(VERSION)}
        for name, key in _SCALARS.items():
            found[key] = _value(getattr(self, name))
        for field in fields(self.identity):
            found[f"pyfasa.model.{field.name}"] = _value(getattr(self.identity, field.name))
        found["pyfasa.n_ranked"] = np.uint32(self.n_ranked)
        for name in _ARRAYS:
            array = getattr(self, name)
            if array is not None:
                found[KEY_PREFIX + name] = array.ravel()
        return found

    def to_bytes(self) -> bytes:
        """The key-value pairs as they stand in a GGUF file."""
        return b"".join(_pack(key, value) for key, value in self.to_fields().items())

    @classmethod
    def from_fields(cls, values: Mapping[str, Value]) -> Profile:
        """From the values of a GGUF file. Raises ProfileError when keys are missing or wrong."""
        take = _Fields(values)
        version = take.number(VERSION_KEY)
        if not 1 <= version <= VERSION:
            raise ProfileError(
                f"The profile has version {version}, and this pyfasa knows 1 to {VERSION}; "
                "update pyfasa, or calibrate again."
            )
        model = {
            field.name: take.scalar(f"pyfasa.model.{field.name}", str(field.type))
            for field in fields(ModelIdentity)
        }
        types = {field.name: str(field.type) for field in fields(cls)}
        scalars = {name: take.scalar(key, types[name]) for name, key in _SCALARS.items()}
        identity = ModelIdentity(**model)
        validate_identity(identity)
        arrays = {
            name: take.array(KEY_PREFIX + name, shape, name in _OPTIONAL)
            for name, shape in _shapes(identity, take.number("pyfasa.n_ranked")).items()
        }
        return cls(identity=identity, **scalars, **arrays)

    @classmethod
    def load(cls, path: str | Path) -> Profile:
        """From a sidecar or from a model file with an embedded profile.

        Raises ProfileError, with the file name, for anything that is no valid profile.
        """
        path = shard_names(path)[0]
        try:
            values = Header.read(path).values
        except ModelFileError as error:
            raise ProfileError(str(error)) from error
        if VERSION_KEY not in values:
            raise ProfileError(
                f"{path} holds no pyfasa profile. Make one with `pyfasa calibrate`, or download "
                "the model's -fasa.gguf file."
            )
        try:
            return cls.from_fields(values)
        except ProfileError as error:
            raise ProfileError(f"{path}: {error}") from error

    def save(self, path: str | Path, *, force: bool = False) -> None:
        """Writes a sidecar. Raises ProfileError if `path` exists and force is False."""
        pairs = {"general.type": SIDECAR_TYPE, **self.to_fields()}
        head = struct.pack("<4sIQQ", b"GGUF", GGUF_VERSION, 0, len(pairs))
        data = head + b"".join(_pack(key, value) for key, value in pairs.items())
        with replacing(path, force) as file:
            file.write(data + bytes(-len(data) % GGUF_DEFAULT_ALIGNMENT))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Profile) and self.to_bytes() == other.to_bytes()

    def __hash__(self) -> int:
        return hash(self.to_bytes())

    def __repr__(self) -> str:
        return f"<Profile of {self.identity.name!r}: {self.n_fc} of {self.n_ranked} chunks>"


@contextmanager
def replacing(path: str | Path, force: bool) -> Iterator[BinaryIO]:
    """A file that stands at `path` once the block has ended well, and leaves no trace otherwise.

    Raises ProfileError if `path` exists and force is False, WriteError if writing fails.
    """
    path = Path(path)
    if path.exists() and not force:
        raise ProfileError(f"{path} exists; choose another name, or replace it with force.")
    temporary = path.with_name(f".pyfasa-{secrets.token_hex(8)}.tmp")
    try:
        try:
            with open(temporary, "xb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except OSError as error:
            raise WriteError(
                f"{path} could not be written: {error.strerror}. Nothing was changed."
            ) from error
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _pack(key: str, value: Value) -> bytes:
    """One key-value pair of a GGUF file."""
    head = _string(key)
    if isinstance(value, str):
        return head + struct.pack("<I", GGUFValueType.STRING) + _string(value)
    kind = NUMBER_TYPES[value.dtype.newbyteorder("<")]
    data = value.astype(value.dtype.newbyteorder("<")).tobytes()
    if isinstance(value, np.ndarray):
        return head + struct.pack("<IIQ", GGUFValueType.ARRAY, kind, value.size) + data
    return head + struct.pack("<I", kind) + data


def _string(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def _value(value: str | int | float) -> Value:
    if isinstance(value, float):
        real: np.generic = np.float64(value)
        return real
    return np.uint64(value) if isinstance(value, int) else value


@dataclass(frozen=True)
class _Fields:
    """Typed access to the keys of a GGUF file, with sentences for missing and wrong ones."""

    values: Mapping[str, Value]

    def _get(self, key: str, kinds: tuple[type, ...], wanted: str) -> Any:
        value = self.values.get(key)
        if not isinstance(value, kinds):
            found = "missing" if value is None else f"a {type(value).__name__}"
            raise ProfileError(f"{key} is {found} where {wanted} should be; the file is damaged.")
        return value

    def number(self, key: str) -> int:
        return int(self._get(key, (np.integer,), "a whole number"))

    def scalar(self, key: str, kind: str) -> Any:
        """kind: the annotation of the dataclass field."""
        if kind == "int":
            return self.number(key)
        if kind == "float":
            return float(self._get(key, (np.floating,), "a number"))
        return self._get(key, (str,), "a text")

    def array(self, key: str, shape: tuple[int, ...], optional: bool) -> Any:
        if optional and key not in self.values:
            return None
        flat = self._get(key, (np.ndarray,), "an array")
        if flat.size != math.prod(shape):
            raise ProfileError(
                f"{key} has {flat.size} values where {' x '.join(map(str, shape))} should be; "
                "the file is damaged."
            )
        return flat.reshape(shape)


def _shapes(model: ModelIdentity, n_ranked: int) -> dict[str, tuple[int, ...]]:
    """Of each array."""
    rows = (model.n_layer, model.n_head_kv)
    ranks = dict.fromkeys(("chunks", "bits", "importance"), (*rows, n_ranked))
    channels = dict.fromkeys(_CHANNELS, (*rows, model.head_dim))
    found = ranks | channels | dict.fromkeys(("recall", "oracle"), rows)
    return {name: found[name] for name in _ARRAYS}
