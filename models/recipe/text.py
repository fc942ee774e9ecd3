"""Local text as arrays of tokens: the filler of every training document.

No text is shipped. By default it is the source of the running Python's standard library.
"""

from __future__ import annotations

import os
import sysconfig
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from . import RecipeError

Tokens = npt.NDArray[np.uint16]

TOKENIZER = Path(__file__).with_name("tokenizer.json")
END_OF_TEXT = 0
SUFFIXES = (".py", ".md", ".rst", ".txt")
TRAIN, HELD_OUT = "text-train.npy", "text-held-out.npy"

# Installed packages lie inside some Pythons' library folder; their text is not Python's.
SKIPPED_FOLDERS = {"site-packages", "dist-packages", "__pycache__", ".git"}
HOLD_OUT_EVERY = 50


def standard_library() -> Path:
    """Folder of the running Python's own modules."""
    return Path(sysconfig.get_path("stdlib"))


def find_files(folders: Iterable[Path], suffixes: Sequence[str] = SUFFIXES) -> list[Path]:
    """All files under `folders` with one of `suffixes`, in a fixed order.

    Raises FileNotFoundError for a folder that is not there, RecipeError if no file is found.
    """
    folders = list(folders)
    found: list[Path] = []
    for folder in folders:
        if not folder.is_dir():
            raise FileNotFoundError(f"{folder} is not a folder; --text takes folders of text.")
        for here, below, names in os.walk(folder):
            below[:] = sorted(set(below) - SKIPPED_FOLDERS)
            found += [Path(here, name) for name in sorted(names) if name.endswith(tuple(suffixes))]
    if not found:
        raise RecipeError(
            f"no text found: no file ending in {', '.join(suffixes)} under "
            f"{', '.join(map(str, folders))}; name another folder or add --suffix."
        )
    return found


def _read(file: Path) -> str:
    """Content of a UTF-8 file, nothing of any other; the standard library tests some of those."""
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return ""


def encode_files(files: Iterable[Path], tokenizer: Tokenizer) -> Tokens:
    """Tokens of all files, one END_OF_TEXT after each: uint16 [n_tokens]."""
    # Otherwise "<|im_end|>" spelled out in a source file would end a turn in mid-document.
    tokenizer.encode_special_tokens = True
    parts = [
        np.array([*tokenizer.encode(content).ids, END_OF_TEXT], dtype=np.uint16)
        for content in map(_read, files)
        if content
    ]
    tokenizer.encode_special_tokens = False
    return np.concatenate(parts) if parts else np.empty(0, np.uint16)


def prepare(
    folders: Iterable[Path],
    out: Path,
    *,
    suffixes: Sequence[str] = SUFFIXES,
    tokenizer: Path = TOKENIZER,
) -> tuple[int, int]:
    """Write `TRAIN` and `HELD_OUT` (every 50th file) into `out`; returns their token counts."""
    encoder = Tokenizer.from_file(str(tokenizer))
    if encoder.get_vocab_size() > np.iinfo(np.uint16).max + 1:
        raise RecipeError(
            f"{tokenizer} has {encoder.get_vocab_size()} tokens; the arrays hold at most 65536."
        )
    files = find_files(folders, suffixes)
    held_out = files[HOLD_OUT_EVERY // 2 :: HOLD_OUT_EVERY] or files[-1:]
    kept = sorted(set(files) - set(held_out)) or files
    train, test = encode_files(kept, encoder), encode_files(held_out, encoder)
    for name, array in ((TRAIN, train), (HELD_OUT, test)):
        np.save(out / name, array)
    return len(train), len(test)


def load(path: Path, n_least: int) -> Tokens:
    """The array at `path`, mapped and not read, uint16 [n_tokens].

    Raises RecipeError if it holds fewer than `n_least` tokens, FileNotFoundError if it is gone.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} is gone; start a new run, which reads the text again.")
    tokens: Tokens = np.load(path, mmap_mode="r")
    if len(tokens) < n_least:
        raise RecipeError(
            f"{path} holds {len(tokens)} tokens of text and one document takes {n_least}; "
            "name more folders of text or train at a shorter context."
        )
    return tokens
