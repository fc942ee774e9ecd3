"""Prefilled documents on disk, so that a second start does not read them again.

A file is llama.cpp's own state of one sequence and a footer with two digests: of the key, and of all
before it. They are compared first, because llama.cpp ends the process over a state that is cut off.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import secrets
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from pyfasa.errors import WriteError
from pyfasa.gguf_header import shard_names

if TYPE_CHECKING:
    from pyfasa.llama import Llama

_MAGIC = b"pyfasa state 1\0\0"
_DIGEST_BYTES = 32
_FOOTER_BYTES = len(_MAGIC) + 2 * _DIGEST_BYTES
_READ_BYTES = 4 << 20
_STALE_S = 24 * 3600  # age from which an unfinished file is of a process that ended


def default_folder() -> Path:
    """`pyfasa/states` in the user's cache folder: XDG_CACHE_HOME, else ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pyfasa" / "states"


class States:
    """A folder of states of one model, opened with given K/V types; other models may share the folder.

    max_bytes: size of all files together; those that were not used for longest are removed first.
    """

    def __init__(self, folder: Path, model: Path, type_k: str, type_v: str, max_bytes: int) -> None:
        self.folder = folder
        self.max_bytes = max_bytes
        self._settings = [*_model_parts(model), type_k, type_v]

    def path(self, llm: Llama, tokens: Sequence[int]) -> Path:
        """Where the state of these tokens is, or would be."""
        return self.folder / f"{self._key(llm, tokens).hex()}.state"

    def load(self, llm: Llama, tokens: Sequence[int]) -> bool:
        """Replaces the cache by the state of these tokens, and says whether there is one.

        A damaged or foreign file is removed.
        """
        path = self.path(llm, tokens)
        try:
            if not path.exists():
                return False
            whole = _footer(path, self._key(llm, tokens)) == _read_footer(path)
            if whole and _into_cache(llm, path, tokens):
                os.utime(path)
                return True
            path.unlink()
        except OSError:
            pass  # a cache that cannot be read is as good as none
        return False

    def save(self, llm: Llama, tokens: Sequence[int]) -> None:
        """Writes the cache of llm, which holds these tokens and no others.

        Raises WriteError if that is not possible; then nothing is left on the disk.
        """
        import llama_cpp

        size = llama_cpp.llama_state_seq_get_size(llm._ctx.ctx, 0) + 4 * len(tokens)
        if size > self.max_bytes:
            raise WriteError(
                f"The state of {len(tokens):,} tokens takes {size / 2**30:.1f} GiB and the cache on "
                f"disk may have {self.max_bytes / 2**30:.1f}: raise --cache-size, or choose smaller "
                "types with -ctk and -ctv."
            )
        path = self.path(llm, tokens)
        temporary = path.with_name(f".pyfasa-{secrets.token_hex(8)}.tmp")
        try:
            # documents are nobody else's business
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._make_room(size)
            array = (llama_cpp.llama_token * len(tokens))(*tokens)
            written = llama_cpp.llama_state_seq_save_file(
                llm._ctx.ctx, os.fsencode(temporary), 0, array, len(tokens)
            )
            if written == 0:
                raise OSError(0, "llama.cpp could not write it; is the disk full?")
            footer = _footer(temporary, self._key(llm, tokens), whole_file=True)
            with open(temporary, "ab") as file:
                file.write(footer)
            os.replace(temporary, path)
        except OSError as error:
            raise WriteError(
                f"{path} could not be written: {error.strerror}. Give another folder with "
                "XDG_CACHE_HOME, or leave the cache out with --no-cache."
            ) from error
        finally:
            with suppress(OSError):
                temporary.unlink()

    def _key(self, llm: Llama, tokens: Sequence[int]) -> bytes:
        """All that the cached K and V depend on."""
        import llama_cpp

        parts = [
            *self._settings,
            llama_cpp.__version__,
            # rotated keys have another basis
            os.environ.get("LLAMA_ATTN_ROT_DISABLE", ""),
            str(_beyond_original(llm)),
        ]
        digest = hashlib.blake2b("\0".join(parts).encode(), digest_size=_DIGEST_BYTES)
        digest.update(np.asarray(tokens, np.int32).tobytes())
        return digest.digest()

    def _make_room(self, size: int) -> None:
        """Removes files, longest unused first, until `size` bytes more are within the bound."""
        for left in self.folder.glob(".pyfasa-*.tmp"):
            if left.stat().st_mtime < time.time() - _STALE_S:
                left.unlink(missing_ok=True)
        files = sorted(self.folder.glob("*.state"), key=lambda file: file.stat().st_mtime)
        total = sum(file.stat().st_size for file in files)
        for file in files:
            if total + size + _FOOTER_BYTES <= self.max_bytes:
                break
            total -= file.stat().st_size
            file.unlink(missing_ok=True)


def _model_parts(model: Path) -> list[str]:
    """What tells a model's files from others, without reading all of them."""
    parts = []
    for path in shard_names(model):
        stat = path.stat()
        ends = hashlib.blake2b(digest_size=_DIGEST_BYTES)
        with open(path, "rb") as file:
            ends.update(file.read(_READ_BYTES))
            file.seek(max(0, stat.st_size - _READ_BYTES))
            ends.update(file.read())
        parts += [str(stat.st_size), str(stat.st_mtime_ns), ends.hexdigest()]
    return parts


def _beyond_original(llm: Llama) -> bool:
    """Whether the context is longer than before a RoPE extension: some models then turn keys otherwise."""
    architecture = llm.metadata.get("general.architecture")
    original = llm.metadata.get(f"{architecture}.rope.scaling.original_context_length")
    return original is not None and llm.n_ctx() > int(original)


def _footer(path: Path, key: bytes, *, whole_file: bool = False) -> bytes:
    """The footer that belongs to a state file; whole_file: it has none yet."""
    digest = hashlib.blake2b(digest_size=_DIGEST_BYTES)
    left = path.stat().st_size - (0 if whole_file else _FOOTER_BYTES)
    with open(path, "rb") as file:
        while left > 0 and (data := file.read(min(left, _READ_BYTES))):
            digest.update(data)
            left -= len(data)
    return _MAGIC + key + digest.digest()


def _read_footer(path: Path) -> bytes:
    with open(path, "rb") as file:
        file.seek(max(0, path.stat().st_size - _FOOTER_BYTES))
        return file.read()


def _into_cache(llm: Llama, path: Path, tokens: Sequence[int]) -> bool:
    """Whether llama.cpp took the state; if not, the cache is empty."""
    import llama_cpp

    found = (llama_cpp.llama_token * llm.n_ctx())()
    n_found = ctypes.c_size_t()
    llm.n_tokens = 0
    llama_cpp.llama_memory_clear(llm._ctx.memory, True)
    size = llama_cpp.llama_state_seq_load_file(
        llm._ctx.ctx, os.fsencode(path), 0, found, len(found), ctypes.byref(n_found)
    )
    if size == 0 or found[: n_found.value] != list(tokens):
        llama_cpp.llama_memory_clear(llm._ctx.memory, True)
        return False
    llm.input_ids[: len(tokens)] = tokens
    llm.n_tokens = len(tokens)
    llm._requires_eval = True  # the state has no logits
    return True
