"""Calibration: which frequency chunks of a model predict its attention.

Queries and keys come from the running graph: llama.cpp evaluates the text, and the core keeps the queries of the
tokens that look far back (answers to questions about the document) and reads the keys from the KV cache.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

import pyfasa
from pyfasa import allocation
from pyfasa.attach import check_host
from pyfasa.errors import ProfileError
from pyfasa.identity import ModelIdentity
from pyfasa.llama import Llama
from pyfasa.profile import Profile
from pyfasa.ranking import METHODS
from pyfasa.samples import Sample, captured_layer, evaluate_sample, make_samples
from pyfasa.tally import CHOICE, HELD_BACK, Tally, joined

DEFAULT_BYTES = 0.16  # of an index entry, per dim of the head: docs/method.md tells why
N_CTX = 4096  # tokens of a calibration document


def calibrate(
    model_path: str | os.PathLike[str],
    texts: Sequence[str | os.PathLike[str]] | None = None,
    *,
    method: str = "allocation",
    index_bytes: float | None = None,
    n_fc: int | None = None,
    bits: int | None = None,
    n_ctx: int = N_CTX,
    seed: int = 0,
    add: Sequence[str | os.PathLike[str]] = (),
    keep: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> Profile:
    """Finds which frequency chunks of each layer and KV head predict attention, and how many bits each is worth.

    Memory depends on n_ctx and on the model, not on the length of the texts.

    Parameters
    ----------
    model_path : a GGUF model of an architecture with NORM or NEOX rope.
    texts : files to calibrate on, in up to eight windows of n_ctx tokens each; the last 128 tokens of a window give
        the queries. None: two documents of standard-library text with hidden facts, and the model's chat template
        around questions about them.
    method : "allocation": chunks by variance, and 0, 1, 2 or 4 bits for each where they buy attention mass
        (pyfasa/allocation.py). With equal bits for all chunks: "variance" (of each chunk's contribution to the
        score), "greedy" (joint choice by attention mass), "agreement" (the paper's ranking).
    index_bytes : bytes of the side index per token and KV head, on average over the model. None: a sixth of head_dim
        with allocation; else what n_fc and bits give.
    n_fc, bits : chunks in use, and bits for each; not with allocation. None is half of them, and 4 bits, or 2 where
        index_bytes is given. All chunks are ranked and stored, so n_fc can change at run time.
    n_ctx : tokens of a document, at least 512.
    seed : of the documents; equal seeds give equal profiles.
    add : saved runs whose results are added to this one's.
    keep : file in which the results are saved for a later `add`, before allocation.
    progress : show a progress bar on stderr.

    Raises
    ------
    ValueError : an argument out of its range, or a text that is too short.
    ProfileError, ModelFileError (both ValueError) : a model without frequency chunks, no model, or a saved run that
        does not fit.
    HostError : llama.cpp cannot be decorated.
    """
    tally = measure(
        model_path, texts, method=method, index_bytes=index_bytes, n_fc=n_fc, bits=bits, n_ctx=n_ctx,
        seed=seed, add=add, progress=progress,
    )  # fmt: skip
    if keep is not None:
        tally.save(keep)
    return profile_of(
        tally,
        model_path,
        method=method,
        index_bytes=index_bytes,
        texts=texts,
        n_ctx=n_ctx,
        seed=seed,
    )


def measure(
    model_path: str | os.PathLike[str],
    texts: Sequence[str | os.PathLike[str]] | None = None,
    *,
    method: str = "allocation",
    index_bytes: float | None = None,
    n_fc: int | None = None,
    bits: int | None = None,
    n_ctx: int = N_CTX,
    seed: int = 0,
    add: Sequence[str | os.PathLike[str]] = (),
    reuse: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> Tally:
    """The slow part of ``calibrate``, with its arguments and errors: runs the model and adds up what it sees.

    With method "allocation" the result does not depend on index_bytes: ``profile_of`` makes profiles of all sizes
    from it. With the other methods it is of the chunks and bits that n_fc, bits and index_bytes give.

    reuse : file in which the fresh run is saved; it is read instead of running the model if it holds a run of the
        same model, method, texts, n_ctx and seed. Anything else in it is replaced.
    """
    _check(method, index_bytes, n_fc, bits, n_ctx, seed)
    check_host()
    identity = ModelIdentity.read(os.fspath(model_path))
    n_chunk = identity.head_dim // 2
    if n_fc is not None and not 1 <= n_fc <= n_chunk:
        raise ValueError(
            f"n_fc is {n_fc}; a head of {identity.head_dim} dims has 1 to {n_chunk} chunks."
        )
    candidates = _candidates(method, n_chunk, n_fc, bits, index_bytes)
    empty = Tally.zeros(identity, _ranking(method), candidates)
    before = [
        empty,
        *map(Tally.load, add),
    ]  # the first checks that the others fit, and adds nothing
    joined(before)
    samples = make_samples(model_path, texts, n_ctx, seed)
    fresh = None if reuse is None else _saved(reuse, empty, samples)
    if fresh is None:
        fresh = _run(model_path, identity, samples, empty, progress)
        if reuse is not None:
            fresh.save(reuse)
    return joined([fresh, *before[1:]])


def profile_of(
    tally: Tally,
    model_path: str | os.PathLike[str],
    *,
    method: str = "allocation",
    index_bytes: float | None = None,
    texts: Sequence[str | os.PathLike[str]] | None = None,
    n_ctx: int = N_CTX,
    seed: int = 0,
) -> Profile:
    """The profile that ``calibrate`` returns for what ``measure`` has added up, or ``Tally.load`` has read.

    method, texts, n_ctx, seed : as they were measured; the last three are only noted in the profile.
    index_bytes : as for ``calibrate``; with methods other than "allocation" the measured chunks and bits stay.

    Raises ValueError for an index_bytes out of range, ProfileError for a tally of another model or method.
    """
    _check(method, index_bytes, None, None, n_ctx, seed)
    identity = ModelIdentity.read(os.fspath(model_path))
    candidates = tally.candidates
    if method == "allocation":
        candidates = _candidates(method, identity.head_dim // 2, None, None, None)
    one = len(tally.candidates) == 1
    if one == (method == "allocation") or not tally.is_like(
        Tally.zeros(identity, _ranking(method), candidates)
    ):
        raise ProfileError(
            f"The calibration run is not of the model {identity.name!r} and the method {method!r}; make one of them "
            "with `pyfasa calibrate --keep`."
        )
    return _profile(tally, identity, method, index_bytes, texts, n_ctx, seed)


def _ranking(method: str) -> str:
    """How chunks are ranked."""
    return "variance" if method == "allocation" else method


def _saved(path: str | os.PathLike[str], like: Tally, samples: Sequence[Sample]) -> Tally | None:
    """The run in a file, if it is of these samples and fits `like`."""
    try:
        tally = Tally.load(path)
    except ProfileError:  # none yet, or of a version of pyfasa that sums up something else
        return None
    return tally if tally.is_like(like) and tally.data == _digest(samples) else None


def _digest(samples: Sequence[Sample]) -> str:
    """sha256 of all tokens."""
    digest = hashlib.sha256()
    for sample in samples:
        digest.update(np.array([t for run, _ in sample.runs for t in run], np.int32).tobytes())
    return digest.hexdigest()


def _check(
    method: str,
    index_bytes: float | None,
    n_fc: int | None,
    bits: int | None,
    n_ctx: int,
    seed: int,
) -> None:
    names = ("allocation", *METHODS)
    if method not in names:
        raise ValueError(f"method is {method!r}; it must be one of {', '.join(names)}.")
    if n_ctx < 512:
        raise ValueError(
            f"n_ctx is {n_ctx}; fewer than 512 tokens say nothing about long contexts."
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


def _run(
    model_path: str | os.PathLike[str],
    identity: ModelIdentity,
    samples: Sequence[Sample],
    tally: Tally,
    progress: bool,
) -> Tally:
    """The tally with all samples added."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total} steps"),
        TimeElapsedColumn(),
    )
    room = max(sample.n_tokens for sample in samples)
    with (
        closing(
            Llama(model_path, profile=False, n_ctx=room, n_threads=os.cpu_count(), verbose=False)
        ) as llm,
        Progress(
            *columns, disable=not progress, transient=True, console=Console(stderr=True)
        ) as bar,
    ):
        task = bar.add_task("calibrating", total=len(samples) * (identity.n_layer + 1))
        for sample in samples:
            for _ in _add_sample(tally, llm, identity, sample):
                bar.advance(task)
    n_query = sum(len(sample.visible()) for sample in samples)
    return replace(tally, data=_digest(samples), n_query=n_query)


def _profile(
    tally: Tally,
    identity: ModelIdentity,
    method: str,
    index_bytes: float | None,
    texts: Sequence[str | os.PathLike[str]] | None,
    n_ctx: int,
    seed: int,
) -> Profile:
    budget = DEFAULT_BYTES * identity.head_dim if index_bytes is None else index_bytes
    chosen = _choose(tally, budget)
    order = tally.order()
    known = tally.n_key[:, None, None] > 0  # a layer that was never seen stays dense
    used = np.where(known, tally.candidates[chosen], 0).astype(np.uint8)
    n_fc = max(1, int((used > 0).sum(axis=2).max()))
    bits = used
    if method != "allocation":  # all are ranked, so that n_fc can be raised
        width = int(tally.candidates.max())
        bits = np.where(known, width, 0).astype(np.uint8) * np.ones_like(used)
    center, scale = tally.channels()
    picked = np.take_along_axis(tally.found(HELD_BACK)[..., -1], chosen[..., None], 2)[..., 0]
    importance = np.take_along_axis(tally.importance, order.astype(np.int64), 2)
    return Profile(
        identity=identity,
        chunks=order,
        bits=bits,
        center=center,
        scale=scale,
        importance=(importance / np.maximum(tally.n_sample, 1)[:, None, None]).astype(np.float32),
        recall=picked.astype(np.float32),
        oracle=tally.possible(HELD_BACK)[..., -1].astype(np.float32),
        n_fc=n_fc,
        method=method,
        data_name="Python standard library with hidden facts" if texts is None else _names(texts),
        data_sha256=tally.data,
        n_ctx=n_ctx,
        n_queries=tally.n_query,
        seed=seed,
        created_by=f"pyfasa {pyfasa.__version__}",
    )


def _candidates(
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


def _choose(tally: Tally, index_bytes: float) -> npt.NDArray[np.int64]:
    """Candidate of every layer and KV head: [n_layer, n_head_kv]."""
    chosen = np.zeros(tally.importance.shape[:2], np.int64)
    known = tally.key_square.any(axis=2)  # heads that a layer has
    if len(tally.candidates) > 1:
        gains = tally.found(CHOICE)[known].mean(axis=2)
        sizes = [allocation.bytes_of(bits) for bits in tally.candidates]
        chosen[known] = allocation.spend(sizes, gains, index_bytes)
    return chosen


def _add_sample(
    tally: Tally, llm: Llama, identity: ModelIdentity, sample: Sample
) -> Iterator[None]:
    """Evaluates a sample and adds it up; yields after the evaluation and after each layer."""
    session = evaluate_sample(llm, sample)
    yield
    for layer in range(identity.n_layer):
        found = captured_layer(session, layer, sample.n_tokens)
        if found is not None:
            tally.add_layer(identity, layer, *found, sample.visible())
        yield


def _names(texts: Sequence[str | os.PathLike[str]]) -> str:
    return ", ".join(Path(text).name for text in texts)
