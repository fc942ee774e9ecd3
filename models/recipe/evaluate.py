"""Scores of a model in training: facts recalled when the right answers so far are given, text."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import groupby

import torch

from .model import Model, rope_tables
from .samples import Sample


@dataclass(frozen=True)
class Scores:
    """Facts asked about and recalled with every token right; perplexity per token of text."""

    context: int
    asked: int
    right: int
    perplexity: float

    def __str__(self) -> str:
        return (
            f"{self.context} tokens: {self.right} of {self.asked} facts recalled, "
            f"text perplexity {self.perplexity:.2f}"
        )


@torch.no_grad()
def evaluate(
    model: Model, facts: Iterable[Sample], texts: Iterable[Sample], context: int
) -> Scores:
    """Score documents of `context` tokens, one at a time, on the model's own device.

    facts  documents with answers; their weights are not used
    texts  plain documents, for the perplexity alone
    """
    device = model.token_embd.weight.device
    tables = rope_tables(model.config, context, device)
    even = torch.ones(1, context, device=device)
    asked = right = 0
    nats = []
    was_training = model.training
    model.eval()
    with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
        for sample in facts:
            tokens = sample.tokens.to(device)[None]
            _, hit = model.loss(tokens[:, :-1], tokens[:, 1:], even, tables)
            pairs = zip(sample.answer.tolist(), hit[0].tolist(), strict=True)
            for is_answer, run in groupby(pairs, key=lambda pair: pair[0]):
                if is_answer:
                    asked += 1
                    right += all(was_hit for _, was_hit in run)
        for sample in texts:
            tokens = sample.tokens.to(device)[None]
            loss, _ = model.loss(tokens[:, :-1], tokens[:, 1:], even, tables)
            nats.append(loss.item())
    model.train(was_training)
    return Scores(context, asked, right, math.exp(sum(nats) / len(nats)) if nats else math.nan)
