"""Which channels of the keys matter most, for the rival Double Sparsity: the mean of |q_d k_d|."""

from __future__ import annotations

import os
from contextlib import closing
from pathlib import Path

import numpy as np
import numpy.typing as npt

from pyfasa.identity import ModelIdentity

N_CTX = 2048  # tokens of each of the two calibration documents


def rank_channels(
    model_path: str | os.PathLike[str], *, seed: int = 0, n_threads: int | None = None
) -> npt.NDArray[np.int64]:
    """Channels of every layer and KV head, best first: (n_layer, n_head_kv, head_dim).

    Queries are those of answers to questions, in all heads of the group, keys those of the document. Over all pairs
    of them the mean of |q_d k_d| is the mean of |q_d| times the mean of |k_d|.

    Raises ModelFileError or ProfileError for a model that has no frequency chunks, HostError if llama.cpp cannot be
    decorated.
    """
    from pyfasa.llama import Llama
    from pyfasa.samples import captured_layer, evaluate_sample, make_samples

    identity = ModelIdentity.read(Path(model_path))
    importance = np.zeros((identity.n_layer, identity.n_head_kv, identity.head_dim))
    samples = make_samples(model_path, None, N_CTX, seed)
    room = max(sample.n_tokens for sample in samples)
    threads = n_threads or os.cpu_count()
    llm = Llama(
        model_path, profile=False, n_ctx=room, n_threads=threads, n_threads_batch=threads,
        verbose=False,
    )  # fmt: skip
    with closing(llm):
        for sample in samples:
            session = evaluate_sample(llm, sample)
            for layer in range(identity.n_layer):
                found = captured_layer(session, layer, sample.n_tokens)
                if found is None:
                    continue
                queries, keys = found[0], np.abs(found[1]).mean(axis=0)
                n_head_kv, head_dim = keys.shape
                size = np.abs(queries).mean(axis=0).reshape(n_head_kv, -1, head_dim).mean(axis=1)
                importance[layer, :n_head_kv] += size * keys
    return np.argsort(-importance, axis=2, kind="stable").astype(np.int64)
