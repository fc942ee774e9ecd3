"""Profiles and model files: where the profile of a model is, and how to put it inside the model.

The head of the model is spliced byte by byte and the tensor data streamed after it, so that every
other key, the tensors and their alignment stay as they were, and remove() undoes embed() exactly.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO, TypeAlias

import numpy as np

from pyfasa.errors import ModelFileError, ProfileError
from pyfasa.gguf_header import Header, shard_names
from pyfasa.identity import ModelIdentity
from pyfasa.profile import KEY_PREFIX, VERSION_KEY, Profile, replacing

Progress: TypeAlias = Callable[[int, int], None]

_CHUNK_BYTES = 4 << 20


def sidecar_path(model_path: str | Path) -> Path:
    """The name of a model's own profile file: `<model>-fasa.gguf`, beside it."""
    path = Path(model_path)
    stem = path.stem
    if len(shard_names(path)) > 1:
        stem = stem.rsplit("-", 3)[0]
    return path.with_name(f"{stem}-fasa.gguf")


def find_profile(model_path: str | Path) -> Path | None:
    """The file to load a model's profile from.

    The model file (of a split one, the first) if it has a profile; else the sidecar beside it if
    there is one; else None.
    """
    first = shard_names(model_path)[0]
    if VERSION_KEY in Header.read(first).values:
        return first
    beside = sidecar_path(model_path)
    return beside if beside.exists() else None


def embed(
    model_path: str | Path,
    profile: Profile,
    out_path: str | Path,
    *,
    force: bool = False,
    progress: Progress | None = None,
) -> None:
    """Writes a copy of a model that carries `profile`, in place of any that it carries already.

    force     replace `out_path` if it exists; it may then be `model_path`
    progress  called with the bytes written and the bytes in all, every few MiB

    An error or interruption leaves `out_path` as it was. Raises ProfileError if the profile is for
    another model or `out_path` exists, ModelFileError for damaged and split models, WriteError if
    the disk is full.
    """
    header = _whole_model(model_path, "Embed the profile before splitting the model, or")
    profile.check_model(ModelIdentity.read(model_path))
    added = (profile.to_bytes(), len(profile.to_fields()))
    _rewrite(header, added, out_path, force, progress)


def extract(model_path: str | Path) -> Profile:
    """The profile that a model file carries. Raises ProfileError if there is none."""
    return Profile.load(model_path)


def remove(
    model_path: str | Path,
    out_path: str | Path,
    *,
    force: bool = False,
    progress: Progress | None = None,
) -> None:
    """Writes a copy of a model without its profile: the file that embed() was given.

    Arguments and errors as for embed().
    """
    header = _whole_model(model_path, "Merge it with gguf-split --merge first, or")
    if VERSION_KEY not in header.values:
        raise ProfileError(f"{model_path} carries no pyfasa profile, so there is none to remove.")
    _rewrite(header, (b"", 0), out_path, force, progress)


def _whole_model(path: str | Path, way_out: str) -> Header:
    header = Header.read(path)
    count = header.values.get("split.count")
    if len(shard_names(path)) > 1 or (isinstance(count, np.integer) and count > 1):
        raise ModelFileError(
            f"{path} is part of a split model, and only whole model files are rewritten. {way_out} "
            f"keep the profile in {sidecar_path(path).name} beside the model, where it is found."
        )
    return header


def _rewrite(
    header: Header,
    added: tuple[bytes, int],
    out_path: str | Path,
    force: bool,
    progress: Progress | None,
) -> None:
    """Copies a model with its pyfasa keys replaced by `added`: key-value pairs and their number."""
    kept = [span for key, span in header.extents.items() if not key.startswith(KEY_PREFIX)]
    with replacing(out_path, force) as target, open(header.path, "rb") as source:
        n_kv_start = 16  # after magic, version and number of tensors
        head = source.read(n_kv_start) + struct.pack("<Q", len(kept) + added[1])
        head += b"".join(_read(source, start, end) for start, end in kept) + added[0]
        head += _read(source, header.kv_end, header.info_end)
        head += bytes(-len(head) % header.alignment)
        target.write(head)
        done = len(head)
        total = done + max(source.seek(0, 2) - header.data_start, 0)
        source.seek(header.data_start)
        while chunk := source.read(_CHUNK_BYTES):
            target.write(chunk)
            done += len(chunk)
            if progress is not None:
                progress(done, total)


def _read(source: BinaryIO, start: int, end: int) -> bytes:
    source.seek(start)
    return source.read(end - start)
