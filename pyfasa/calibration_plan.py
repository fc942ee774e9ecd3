"""What a calibration will do: everything that can be known, and refused, before the model is opened."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from pyfasa import allocation
from pyfasa.attach import check_host
from pyfasa.errors import ProfileError, WriteError
from pyfasa.gguf_header import Header, shard_names
from pyfasa.identity import ModelIdentity
from pyfasa.profile_checks import validate_identity
from pyfasa.ranking import METHODS
from pyfasa.samples import MIN_TEXT, Sample, make_samples
from pyfasa.tally import Tally, joined

DEFAULT_BYTES = 0.16  # of an index entry, per dim of the head: docs/method.md tells why
N_CTX = 4096  # tokens of a calibration document, where the model was trained on as many
BUILT_IN = "Python standard library with hidden facts"


@dataclass(frozen=True)
class Plan:
    """A calibration whose arguments are checked and whose text is tokenized.

    index_bytes  of the side index per token and KV head: with allocation at most so many, on average over the model
    n_ctx        tokens of a document
    n_ctx_train  tokens of the contexts that the model was trained on; 0: the file does not say
    samples      what is evaluated
    empty        the sums, all zero
    before       saved runs that are added to this one's
    """

    model_path: str
    identity: ModelIdentity
    text: str
    method: str
    index_bytes: float
    n_ctx: int
    n_ctx_train: int
    samples: list[Sample]
    empty: Tally
    before: list[Tally]

    @property
    def n_tokens(self) -> int:
        return sum(sample.n_tokens for sample in self.samples)

    @property
    def n_query(self) -> int:
        return sum(len(sample.visible()) for sample in self.samples)

    @property
    def longest(self) -> Sample:
        """The sample that decides about the context's size."""
        return max(self.samples, key=lambda sample: sample.n_tokens)


def make_plan(
    model_path: str | os.PathLike[str],
    texts: Sequence[str | os.PathLike[str]] | None = None,
    *,
    method: str = "allocation",
    index_bytes: float | None = None,
    n_fc: int | None = None,
    bits: int | None = None,
    n_ctx: int | None = None,
    seed: int = 0,
    add: Sequence[str | os.PathLike[str]] = (),
) -> Plan:
    """Arguments and errors are those of ``pyfasa.calibrate``. Takes a second or two: it reads no weights."""
    check_arguments(method, index_bytes, n_fc, bits, n_ctx, seed)
    check_host()
    identity = ModelIdentity.read(os.fspath(model_path))
    n_ctx_train = _checked_model(model_path, identity)
    n_chunk = identity.head_dim // 2
    if n_fc is not None and not 1 <= n_fc <= n_chunk:
        raise ValueError(
            f"n_fc is {n_fc}; a head of {identity.head_dim} dims has 1 to {n_chunk} chunks."
        )
    bits_per_rank = candidates(method, n_chunk, n_fc, bits, index_bytes)
    sizes = [allocation.bytes_of(row) for row in bits_per_rank]
    budget: float = sizes[0]
    if method == "allocation":
        budget = budget_of(identity, index_bytes)
        allocation.check_least(min(sizes), budget)
    empty = Tally.zeros(identity, ranking_of(method), bits_per_rank)
    before = [Tally.load(path) for path in add]
    joined([empty, *before])  # checks that they fit
    n_ctx = context_of(n_ctx, n_ctx_train)
    return Plan(
        model_path=os.fspath(model_path),
        identity=identity,
        text=text_name(texts),
        method=method,
        index_bytes=budget,
        n_ctx=n_ctx,
        n_ctx_train=n_ctx_train,
        samples=make_samples(model_path, texts, n_ctx, seed, most=n_ctx_train),
        empty=empty,
        before=before,
    )


def check_output(path: str | os.PathLike[str]) -> None:
    """Raises WriteError, before the work, where a file could not be written; leaves nothing behind."""
    path = Path(path)
    way_out = "Name a file in a folder that you can write to."
    if path.is_dir():
        raise WriteError(f"{path} is a folder, and a file is to be written there. {way_out}")
    try:
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise WriteError(
            f"{path} cannot be written: the folder {path.parent} takes no file ({error.strerror}). {way_out}"
        ) from error


def check_arguments(
    method: str,
    index_bytes: float | None,
    n_fc: int | None,
    bits: int | None,
    n_ctx: int | None,
    seed: int,
) -> None:
    """Raises ValueError for what no model can be calibrated with."""
    names = ("allocation", *METHODS)
    if method not in names:
        raise ValueError(f"method is {method!r}; it must be one of {', '.join(names)}.")
    if n_ctx is not None and n_ctx < MIN_TEXT:
        raise ValueError(
            f"n_ctx is {n_ctx}; fewer than {MIN_TEXT} tokens say nothing about long contexts."
        )
    if seed < 0:
        raise ValueError(f"seed is {seed}; it must not be negative.")
    if bits is not None and bits not in (1, 2, 4, 8):
        raise ValueError(f"bits is {bits}; it must be 1, 2, 4 or 8.")
    numbers = {"n_fc": n_fc, "bits": bits}
    given = [f"{name} is {value}" for name, value in numbers.items() if value is not None]
    if method == "allocation" and given:
        raise ValueError(
            f"{' and '.join(given)}, but n_fc and bits are what allocation finds; give index_bytes, or "
            "method='variance' with them."
        )
    if index_bytes is not None and n_fc is not None:
        raise ValueError("index_bytes and n_fc are both given; one follows from the other.")
    if index_bytes is not None and not 0 < index_bytes < 1e6:
        raise ValueError(f"index_bytes is {index_bytes}; it must be above 0.")


def ranking_of(method: str) -> str:
    """How chunks are ranked."""
    return "variance" if method == "allocation" else method


def budget_of(identity: ModelIdentity, index_bytes: float | None) -> float:
    """Bytes per token and KV head that allocation may spend, on average."""
    return DEFAULT_BYTES * identity.head_dim if index_bytes is None else index_bytes


def text_name(texts: Sequence[str | os.PathLike[str]] | None) -> str:
    """What a profile says about its text."""
    return BUILT_IN if texts is None else ", ".join(Path(text).name for text in texts)


def candidates(
    method: str, n_chunk: int, n_fc: int | None, bits: int | None, index_bytes: float | None
) -> npt.NDArray[np.uint8]:
    """Bits per rank that calibration chooses between: (n_candidate, n_chunk)."""
    if method == "allocation":
        return np.array([allocation.bits_of(shape, n_chunk) for shape in allocation.shapes()])
    width = bits or (4 if index_bytes is None else 2)
    n = n_fc or n_chunk // 2
    if index_bytes is not None:
        sizes = [allocation.bytes_of(np.full(k, width)) for k in range(n_chunk + 1)]
        n = max(k for k, size in enumerate(sizes) if size <= max(index_bytes, 0))
        if n == 0:
            raise ValueError(
                f"index_bytes is {index_bytes:g}; a chunk of {width} bits has {sizes[1]} bytes, so give that or more."
            )
    return np.where(np.arange(n_chunk) < n, width, 0).astype(np.uint8)[None]


def context_of(n_ctx: int | None, n_ctx_train: int) -> int:
    """Tokens of a document: as asked for, else N_CTX or what the model was trained on, if that is less.

    Raises ValueError where the model was trained on fewer. n_ctx_train 0: unknown, so without a limit.
    """
    if n_ctx is not None and n_ctx > n_ctx_train > 0:
        raise ValueError(
            f"n_ctx is {n_ctx}; the model was trained on contexts of {n_ctx_train} tokens, and attention beyond them "
            f"is not what it will be in use: give {n_ctx_train} or fewer, or leave it out."
        )
    if 0 < n_ctx_train < MIN_TEXT:
        raise ValueError(
            f"The model was trained on contexts of {n_ctx_train} tokens; fewer than {MIN_TEXT} say nothing about long "
            "contexts, and decoding in them is fast without pyfasa: run it dense."
        )
    return n_ctx or min(N_CTX, n_ctx_train or N_CTX)


def trained_context(model_path: str | os.PathLike[str]) -> int:
    """Tokens of the contexts that a GGUF model was trained on; 0: it does not say."""
    return Header.read(shard_names(os.fspath(model_path))[0]).number("context_length")


def _checked_model(model_path: str | os.PathLike[str], identity: ModelIdentity) -> int:
    """The trained context of a model; ProfileError for attention that has no frequency chunks to rank.

    Models without RoPE are refused by ModelIdentity; what no key tells is seen once the graph runs.
    """
    header = Header.read(shard_names(os.fspath(model_path))[0])
    found = {
        "attention.key_length_mla": "latent attention (MLA), whose keys are shared by all heads and mostly not rotated",
        "attention.max_alibi_bias": "a position bias (ALiBi) on its attention",
    }
    for name, what in found.items():
        if header.number(name) > 0:
            raise ProfileError(
                f"{identity.name!r} has {what} ({identity.architecture}.{name} is {header.number(name)}); "
                "frequency chunks need plain RoPE attention, so run this model dense."
            )
    validate_identity(identity)
    return header.number("context_length")
