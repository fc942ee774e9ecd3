"""The head of a GGUF file, without its tensors: values, and where everything is.

gguf.GGUFReader makes NumPy views of every token of the vocabulary: 14 s for 152,000 tokens, and a
damaged array length keeps it busy for ever. So the head is walked here, with every length checked.
Format: ggml/docs/gguf.md.
"""

from __future__ import annotations

import mmap
import re
import struct
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any, TypeAlias, cast

import numpy as np
import numpy.typing as npt
from gguf.constants import (
    GGML_QUANT_SIZES,
    GGUF_DEFAULT_ALIGNMENT,
    GGMLQuantizationType,
    GGUFValueType,
)

from pyfasa.errors import ModelFileError

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


_SHARD = re.compile(r"(?P<stem>.+)-\d{5}-of-(?P<count>\d{5})\.gguf")


def shard_names(path: str | Path) -> list[Path]:
    """Where all files of the model that `path` belongs to should be; [path] if it is not split."""
    path = Path(path)
    match = _SHARD.fullmatch(path.name)
    if match is None or int(match["count"]) < 2:
        return [path]
    ids = range(1, int(match["count"]) + 1)
    return [path.with_name(f"{match['stem']}-{i:05d}-of-{match['count']}.gguf") for i in ids]
