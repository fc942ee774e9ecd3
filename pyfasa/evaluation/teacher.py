"""Teacher-forced text: how far the next-token distributions under a setting are from those of dense attention.

Standard-library text is prefilled dense; its continuation is then decoded in small batches, once dense and once under
each setting, from the same cells. Rows are compared one by one.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from pyfasa.documents import Tokenize, hide
from pyfasa.evaluation.decode import attended, logits

if TYPE_CHECKING:
    from pyfasa.llama import Llama

F32 = npt.NDArray[np.float32]

TASKS = ("ppl", "kld")
ROWS = 256
BATCH = 8  # rows in a batch of decoding
SEEDS = 1_000_000


@dataclass(frozen=True)
class Comparison:
    """Rows under a setting against the same rows under dense attention.

    kld        per row: sum of p log(p / q), p dense, q the setting, in nats
    same_top   share of the rows with the same likeliest token
    nll        mean negative log-likelihood of the text, in nats; nll_dense: that of dense
    attended   share of the visible cells that was read
    """

    kld: tuple[float, ...]
    same_top: float
    nll: float
    nll_dense: float
    attended: float


def make_text(tokenize: Tokenize, n_tokens: int, seed: int, number: int = 0) -> str:
    """Text of the standard library, of n_tokens or a few more; equal arguments give equal text."""
    rng = random.Random(f"text {SEEDS * (seed + 1) + number}")
    return hide(tokenize, n_tokens + max(8, n_tokens // 50), [], [], rng).text


def decode_rows(llm: Llama, tokens: Sequence[int]) -> F32:
    """Evaluates one batch after the cells that are there: logits of all its rows, (n, n_vocab)."""
    llm._ctx.kv_cache_seq_rm(-1, llm.n_tokens, -1)
    llm._batch.set_batch(batch=tokens, n_past=llm.n_tokens, logits_all=True)
    llm._ctx.decode(llm._batch)
    llm.input_ids[llm.n_tokens : llm.n_tokens + len(tokens)] = tokens
    llm.n_tokens += len(tokens)
    return np.stack([logits(llm, i) for i in range(len(tokens))])


def log_probabilities(llm: Llama, tokens: Sequence[int], start: int) -> Iterator[F32]:
    """Decodes all but the last of `tokens` after `start` cells; log-softmax, batch by batch."""
    llm.n_tokens = start
    n_batch = max(1, min(BATCH, llm.fasa.max_rows))
    inputs = tokens[:-1]
    for i in range(0, len(inputs), n_batch):
        x = decode_rows(llm, inputs[i : i + n_batch])
        x -= x.max(axis=1, keepdims=True)
        x -= np.log(np.exp(x, dtype=np.float64).sum(axis=1, keepdims=True)).astype(np.float32)
        yield x


def compare(llm: Llama, tokens: Sequence[int], start: int, dense: F32) -> Comparison:
    """Decodes all but the last of `tokens` as the model is set now, against `dense` (n - 1, n_vocab)."""
    old = llm.fasa.counters
    kld: list[float] = []
    same = 0
    likelihood = 0.0
    for q in log_probabilities(llm, tokens, start):
        first = len(kld)
        p = dense[first : first + len(q)].astype(np.float64)
        kld += (np.exp(p) * (p - q)).sum(axis=1).tolist()
        same += int((p.argmax(axis=1) == q.argmax(axis=1)).sum())
        targets = np.asarray(tokens[first + 1 : first + 1 + len(q)])
        likelihood += float(q[np.arange(len(q)), targets].sum(dtype=np.float64))
    n = len(kld)
    targets = np.asarray(tokens[1:])
    likelihood_dense = float(dense[np.arange(n), targets].sum(dtype=np.float64))
    return Comparison(
        tuple(kld), same / n, -likelihood / n, -likelihood_dense / n,
        attended(old, llm.fasa.counters),
    )  # fmt: skip
