"""Calibration: which frequency chunks of a model predict its attention.

Queries and keys come from the running graph: llama.cpp evaluates the text, and the core keeps the queries of the
tokens that look far back (answers to questions about the document) and reads the keys from the KV cache.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import replace

import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

import pyfasa
from pyfasa import allocation, estimate
from pyfasa.calibration_plan import (
    Plan,
    budget_of,
    candidates,
    check_arguments,
    check_output,
    context_of,
    make_plan,
    ranking_of,
    text_name,
    trained_context,
)
from pyfasa.errors import ProfileError
from pyfasa.identity import ModelIdentity
from pyfasa.llama import Llama
from pyfasa.native import reasons
from pyfasa.profile import Profile
from pyfasa.samples import Sample, captured_layer, evaluate_sample
from pyfasa.tally import CHOICE, HELD_BACK, Tally, joined

Tell = Callable[[str], None]


def calibrate(
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
    keep: str | os.PathLike[str] | None = None,
    progress: bool = True,
    tell: Tell | None = None,
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
    n_ctx : tokens of a document, at least 512 and at most what the model was trained on. None: 4096, or what the
        model was trained on if that is less.
    seed : of the documents; equal seeds give equal profiles.
    add : saved runs whose results are added to this one's.
    keep : file in which the results are saved for a later `add`, before allocation.
    progress : show a progress bar on stderr.
    tell : is called with a sentence about the memory before the model is opened, and one about the time after that.

    Raises
    ------
    ValueError : an argument out of its range, or a text that is too short.
    ProfileError, ModelFileError (both ValueError) : a model without frequency chunks, no model, or a saved run that
        does not fit.
    HostError : llama.cpp cannot be decorated.
    WriteError : `keep` cannot be written.
    All of them come before the text is evaluated.
    """
    if keep is not None:
        check_output(keep)
    tally = measure(
        model_path, texts, method=method, index_bytes=index_bytes, n_fc=n_fc, bits=bits, n_ctx=n_ctx,
        seed=seed, add=add, progress=progress, tell=tell,
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
    n_ctx: int | None = None,
    seed: int = 0,
    add: Sequence[str | os.PathLike[str]] = (),
    reuse: str | os.PathLike[str] | None = None,
    progress: bool = True,
    tell: Tell | None = None,
) -> Tally:
    """The slow part of ``calibrate``, with its arguments and errors: runs the model and adds up what it sees.

    With method "allocation" the result does not depend on index_bytes: ``profile_of`` makes profiles of all sizes
    from it. With the other methods it is of the chunks and bits that n_fc, bits and index_bytes give.

    reuse : file in which the fresh run is saved; it is read instead of running the model if it holds a run of the
        same model, method, texts, n_ctx and seed. Anything else in it is replaced.
    """
    plan = make_plan(
        model_path, texts, method=method, index_bytes=index_bytes, n_fc=n_fc, bits=bits, n_ctx=n_ctx,
        seed=seed, add=add,
    )  # fmt: skip
    fresh = None if reuse is None else _saved(reuse, plan.empty, plan.samples)
    if fresh is None:
        fresh = _run(plan, progress, tell)
        if reuse is not None:
            fresh.save(reuse)
    return joined([fresh, *plan.before])


def profile_of(
    tally: Tally,
    model_path: str | os.PathLike[str],
    *,
    method: str = "allocation",
    index_bytes: float | None = None,
    texts: Sequence[str | os.PathLike[str]] | None = None,
    n_ctx: int | None = None,
    seed: int = 0,
) -> Profile:
    """The profile that ``calibrate`` returns for what ``measure`` has added up, or ``Tally.load`` has read.

    method, texts, n_ctx, seed : as they were measured; the last three are only noted in the profile.
    index_bytes : as for ``calibrate``; with methods other than "allocation" the measured chunks and bits stay.

    Raises ValueError for an index_bytes out of range, ProfileError for a tally of another model or method.
    """
    check_arguments(method, index_bytes, None, None, n_ctx, seed)
    identity = ModelIdentity.read(os.fspath(model_path))
    listed = tally.candidates
    if method == "allocation":
        listed = candidates(method, identity.head_dim // 2, None, None, None)
    one = len(tally.candidates) == 1
    if one == (method == "allocation") or not tally.is_like(
        Tally.zeros(identity, ranking_of(method), listed)
    ):
        raise ProfileError(
            f"The calibration run is not of the model {identity.name!r} and the method {method!r}; make one of them "
            "with `pyfasa calibrate --keep`."
        )
    n_ctx = context_of(n_ctx, trained_context(model_path))
    return _profile(tally, identity, method, index_bytes, texts, n_ctx, seed)


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


def _run(plan: Plan, progress: bool, tell: Tell | None) -> Tally:
    """The sums with all samples added."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total} steps"),
        TimeElapsedColumn(),
    )
    if tell is not None:
        tell(f"memory: {estimate.memory(plan)}")
    identity, samples = plan.identity, plan.samples
    tally = Tally.zeros(identity, plan.empty.method, plan.empty.candidates)
    with closing(open_model(plan)) as llm:
        if tell is not None:
            tell(f"time: {estimate.duration(estimate.seconds(llm, plan))}")
        with Progress(
            *columns, disable=not progress, transient=True, console=Console(stderr=True)
        ) as bar:
            task = bar.add_task("calibrating", total=len(samples) * (identity.n_layer + 1))
            for sample in samples:
                for _ in _add_sample(tally, llm, identity, sample):
                    bar.advance(task)
    return replace(tally, data=_digest(samples), n_query=plan.n_query)


def open_model(plan: Plan) -> Llama:
    """The model in a context of the longest sample.

    Raises ProfileError for a model of which no layer can be calibrated, which the first tokens show.
    """
    n_ctx = plan.longest.n_tokens
    llm = Llama(
        plan.model_path, profile=False, n_ctx=n_ctx, n_threads=os.cpu_count(), verbose=False
    )
    try:
        with llm.fasa.capturing():
            llm.eval(plan.longest.runs[0][0][:8])
        nodes = llm.fasa.counters.nodes
        # Which layers have windows is learned from longer texts.
        if nodes["capture"] == nodes["swa"] == 0:
            found = [f"{name} ({text})" for name, text in reasons().items() if nodes[name] > 0]
            raise ProfileError(
                f"No layer of {plan.identity.name!r} can be calibrated: {', '.join(found) or 'no attention was seen'}; "
                "run this model dense."
            )
    except BaseException:
        llm.close()
        raise
    return llm


def _profile(
    tally: Tally,
    identity: ModelIdentity,
    method: str,
    index_bytes: float | None,
    texts: Sequence[str | os.PathLike[str]] | None,
    n_ctx: int,
    seed: int,
) -> Profile:
    chosen = _choose(tally, budget_of(identity, index_bytes))
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
        data_name=text_name(texts),
        data_sha256=tally.data,
        n_ctx=n_ctx,
        n_queries=tally.n_query,
        seed=seed,
        created_by=f"pyfasa {pyfasa.__version__}",
    )


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
