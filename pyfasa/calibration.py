"""Calibration: which frequency chunks of a model predict its attention.

Queries and keys come from the running graph: llama.cpp evaluates the text, and the core keeps the queries of the
tokens that look far back (answers to questions about the document) and reads the keys from the KV cache.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from contextlib import closing, nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

import pyfasa
from pyfasa import reference
from pyfasa.attach import check_host
from pyfasa.identity import ModelIdentity
from pyfasa.llama import Llama
from pyfasa.profile import Profile
from pyfasa.ranking import METHODS
from pyfasa.samples import Sample, make_samples

F64 = npt.NDArray[np.float64]


def calibrate(
    model_path: str | os.PathLike[str],
    texts: Sequence[str | os.PathLike[str]] | None = None,
    *,
    method: str = "variance",
    n_fc: int | None = None,
    bits: int = 4,
    n_ctx: int = 4096,
    seed: int = 0,
    progress: bool = True,
) -> Profile:
    """Ranks the chunks of every layer and KV head of a model.

    Parameters
    ----------
    model_path : a GGUF model of an architecture with NORM or NEOX rope.
    texts : files to calibrate on, each cut to n_ctx tokens; its last 128 tokens give the queries. None: two documents
        of standard-library text with hidden facts, and the model's chat template around questions about them.
    method : "variance" (of each chunk's contribution to the score) or "agreement" (the paper's ranking).
    n_fc : chunks in use by default; None is half of them. All are ranked and stored, so it can change at run time.
    bits : 2, 4 or 8 per dim of the side index.
    n_ctx : tokens of a document, at least 512.
    seed : of the documents; equal seeds give equal profiles.
    progress : show a progress bar on stderr.

    Raises
    ------
    ValueError : an argument out of its range, or a text that is too short.
    ProfileError, ModelFileError (both ValueError) : a model without frequency chunks, or no model.
    HostError : llama.cpp cannot be decorated.
    """
    if method not in METHODS:
        raise ValueError(f"method is {method!r}; it must be one of {', '.join(METHODS)}.")
    if n_ctx < 512:
        raise ValueError(
            f"n_ctx is {n_ctx}; fewer than 512 tokens say nothing about long contexts."
        )
    if seed < 0:
        raise ValueError(f"seed is {seed}; it must not be negative.")
    if bits not in (2, 4, 8):
        raise ValueError(f"bits is {bits}; it must be 2, 4 or 8.")
    check_host()
    identity = ModelIdentity.read(os.fspath(model_path))
    n_chunk = identity.head_dim // 2
    if n_fc is not None and not 1 <= n_fc <= n_chunk:
        raise ValueError(
            f"n_fc is {n_fc}; a head of {identity.head_dim} dims has 1 to {n_chunk} chunks."
        )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total} steps"),
        TimeElapsedColumn(),
    )
    statistics = _Statistics.zeros(identity)
    digest = hashlib.sha256()
    n_queries = 0
    samples = make_samples(model_path, texts, n_ctx, seed)
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
            digest.update(np.array([t for run, _ in sample.runs for t in run], np.int32).tobytes())
            for _ in _add_sample(statistics, llm, identity, sample, method):
                bar.advance(task)
            n_queries += sum(len(tokens) for tokens, wanted in sample.runs if wanted)

    order = np.argsort(-statistics.importance, axis=2, kind="stable").astype(np.uint16)
    known = statistics.n_keys[:, None, None] > 0  # a layer that was never seen stays dense
    center, scale = statistics.channels()
    return Profile(
        identity=identity,
        chunks=order,
        bits=np.where(known, bits, 0).astype(np.uint8) * np.ones_like(order, np.uint8),
        center=center,
        scale=scale,
        n_fc=n_chunk // 2 if n_fc is None else n_fc,
        method=method,
        data_name="Python standard library with hidden facts" if texts is None else _names(texts),
        data_sha256=digest.hexdigest(),
        n_ctx=n_ctx,
        n_queries=n_queries,
        seed=seed,
        created_by=f"pyfasa {pyfasa.__version__}",
    )


@dataclass
class _Statistics:
    """Sums over samples: of importance per chunk, and of keys and their squares per channel."""

    importance: F64  # (n_layer, n_head_kv, n_chunk)
    n_keys: F64  # (n_layer,)
    sum: F64  # (n_layer, n_head_kv, head_dim)
    square: F64

    @classmethod
    def zeros(cls, identity: ModelIdentity) -> _Statistics:
        heads = (identity.n_layer, identity.n_head_kv)
        dim = identity.head_dim
        return cls(
            np.zeros((*heads, dim // 2)),
            np.zeros(identity.n_layer),
            np.zeros((*heads, dim)),
            np.zeros((*heads, dim)),
        )

    def channels(self) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
        """Mean of each channel of the keys, and its deviation relative to the head's mean deviation.

        With both taken out no channel outgrows the few levels of the index, and scores keep their order.
        """
        n = np.maximum(self.n_keys, 1)[:, None, None]
        center = self.sum / n
        deviation = np.sqrt(np.maximum(self.square / n - center**2, 0))
        mean = deviation.mean(axis=2, keepdims=True)
        # A channel that hardly moves must not be blown up to the size of the others.
        scale = np.where(mean > 0, np.maximum(deviation / np.where(mean > 0, mean, 1), 0.05), 1.0)
        return center.astype(np.float32), scale.astype(np.float32)


def _add_sample(
    statistics: _Statistics, llm: Llama, identity: ModelIdentity, sample: Sample, method: str
) -> Iterator[None]:
    """Evaluates a sample and adds it up; yields after the evaluation and after each layer."""
    dims = reference.chunk_dims(identity.head_dim, identity.n_rot, identity.rope)
    llm.n_tokens = 0  # the next eval removes the cells of the sample before
    with llm.fasa.capturing() as session:
        session.captured_clear()
    for tokens, wanted in sample.runs:
        with llm.fasa.capturing() if wanted else nullcontext():
            llm.eval(tokens)
    yield
    for layer in range(identity.n_layer):
        try:
            queries = session.captured(layer)
        except RuntimeError:  # a layer without a replaceable attention node
            yield
            continue
        keys = session.keys(layer, 0, sample.n_tokens)
        n_head_kv = keys.shape[1]  # of this layer; identity has the largest of all
        group = queries.shape[1] // n_head_kv
        statistics.n_keys[layer] += len(keys)
        statistics.sum[layer, :n_head_kv] += keys.sum(axis=0, dtype=np.float64)
        statistics.square[layer, :n_head_kv] += np.square(keys, dtype=np.float64).sum(axis=0)
        for h in range(n_head_kv):
            own = queries[:, h * group : (h + 1) * group]
            statistics.importance[layer, h] += METHODS[method](
                own, np.ascontiguousarray(keys[:, h]), dims
            )
        yield


def _names(texts: Sequence[str | os.PathLike[str]]) -> str:
    return ", ".join(Path(text).name for text in texts)
