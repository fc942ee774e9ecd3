"""Attention mass that a setting's cells carry, offline: finer than answers, and as cheap as scoring.

Queries and keys are captured once from the running model, of answer tokens and of running text as in calibration; each
setting then scores the same cells for the same rows. The mass of a selection is the sum of the exact softmax weights on
it (see ``pyfasa.recall``); the oracle's is the most that a budget allows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from pyfasa import reference
from pyfasa.evaluation.settings import Setting
from pyfasa.recall import Attention
from pyfasa.samples import Sample, captured_layer, evaluate_sample
from pyfasa.tally import Entries

if TYPE_CHECKING:
    from pyfasa.llama import Llama
    from pyfasa.profile import Profile

F32 = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]

TASK = "mass"
ROOM = 1024  # tokens of questions and answers after a document
ROWS = 96  # of a document


@dataclass(frozen=True)
class Captured:
    """queries (n_row, n_head, head_dim), keys (n_cell, n_head_kv, head_dim) of a layer; visible (n_row,)."""

    layer: int
    queries: F32
    keys: F32
    visible: Ints

    def attention(self) -> list[Attention]:
        """Of each KV head."""
        n_head_kv = self.keys.shape[1]
        group = self.queries.shape[1] // n_head_kv
        return [
            Attention.of(
                self.queries[:, h * group : (h + 1) * group],
                np.ascontiguousarray(self.keys[:, h]),
                self.visible,
            )
            for h in range(n_head_kv)
        ]


def capture(llm: Llama, sample: Sample, n_layer: int) -> list[Captured]:
    """Evaluates a sample; every so many of its captured rows, ROWS in all."""
    session = evaluate_sample(llm, sample)
    visible = sample.visible()
    rows = np.arange(len(visible))[:: max(1, len(visible) // ROWS)]
    layers = ((i, captured_layer(session, i, sample.n_tokens)) for i in range(n_layer))
    found = [
        Captured(i, own[0][rows], own[1], visible[rows]) for i, own in layers if own is not None
    ]
    session.captured_clear()
    return found


def masses(layers: Sequence[Captured], settings: Sequence[Setting]) -> Iterator[tuple[str, float]]:
    """(label, mean attention mass over layers, rows and heads); settings that observe prompts are left out."""
    exact = [(layer, layer.attention()) for layer in layers]
    by_name: dict[str, list[Setting]] = {}
    for setting in settings:
        by_name.setdefault(setting.name, []).append(setting)
    for own in by_name.values():
        first = own[0]
        if first.dense:
            yield first.label, 1.0
            continue
        if first.selector is not None and first.selector.observes:
            continue
        budgets = [one.budget or 1 for one in own]
        found = []
        if first.selector is not None:
            first.selector.start(max(budgets))
        for layer, heads in exact:
            scores = _by_profile(first.profile, layer, heads) if first.profile else None
            if scores is None:
                scores = _by_selector(first.selector, layer, heads)
            found += [head.mass(one, budgets) for head, one in zip(heads, scores, strict=True)]
        means = np.concatenate(found, axis=1).mean(axis=1)
        yield from zip((one.label for one in own), means.tolist(), strict=True)


def _by_profile(profile: Profile, layer: Captured, heads: Sequence[Attention]) -> list[F32]:
    model = profile.identity
    dims = reference.chunk_dims(model.head_dim, model.n_rot, model.rope)
    found = []
    for h, head in enumerate(heads):
        at = layer.layer, h
        center = np.zeros(model.head_dim) if profile.center is None else profile.center[at]
        scale = np.ones(model.head_dim) if profile.scale is None else profile.scale[at]
        ranked = dims[profile.chunks[at][: profile.n_fc].astype(np.int64)]
        entries = Entries(head.keys, ranked, center.astype(np.float32), scale.astype(np.float32))
        found.append(head.scores(entries.of(profile.bits[at][: profile.n_fc])))
    return found


def _by_selector(selector: Any, layer: Captured, heads: Sequence[Attention]) -> list[F32]:
    from pyfasa.native import Scoring

    n_row, n_head, _ = layer.queries.shape
    keys = np.ascontiguousarray(layer.keys.transpose(1, 0, 2))
    n_cell = keys.shape[1]
    scores = np.zeros((n_row, n_head, n_cell), np.float32)
    cell = np.arange(n_cell)
    for row in range(n_row):
        seen = cell < layer.visible[row]
        changed = 0 if row == 0 else n_cell
        selector(Scoring(layer.layer, layer.queries[row], keys, changed, seen, scores[row]))
    group = n_head // len(heads)
    return [scores[:, h * group : (h + 1) * group].reshape(-1, n_cell) for h in range(len(heads))]
