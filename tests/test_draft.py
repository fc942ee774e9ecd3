"""Speculative decoding: rows that verify drafted tokens are sparse, and drafts never change what is generated."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import pytest
from llama_cpp.llama_speculative import LlamaPromptLookupDecoding

from support import (
    NORM,
    NORM_ONE_LAYER,
    logits,
    opened,
    opened_plain,
    random_profile,
    random_tokens,
    write_model,
)

N = 40  # tokens generated
MAX_ROWS = 8  # pyfasa's default
# Lines that repeat, so that drafts are found, with numbers that change, so that some are wrong.
LINES = b"".join(b"def f%d(x):\n    return x + %d\n\n" % (i, i) for i in range(30))


@dataclass
class Run:
    """What was generated, and in how large batches."""

    tokens: list[int] = field(default_factory=list)
    batches: list[int] = field(default_factory=list)  # the first one is the prompt
    margin: float = np.inf  # least distance of the best logit to the second best, without drafts

    @property
    def n_rejected(self) -> int:
        """Drafted tokens that were evaluated in vain."""
        return sum(self.batches[1:]) - N + 1


def generated(llm: llama_cpp.Llama, prompt: list[int], monkeypatch: pytest.MonkeyPatch) -> Run:
    """The most likely tokens after the prompt."""
    run = Run()
    evaluate = llm.eval

    def counted(tokens: list[int]) -> None:
        run.batches.append(len(tokens))
        evaluate(tokens)

    monkeypatch.setattr(llm, "eval", counted)
    for token in llm.generate(prompt, top_k=1, temp=0.0):
        run.tokens.append(token)
        if llm.draft_model is None:
            best = np.sort(logits(llm))
            run.margin = min(run.margin, float(best[-1] - best[-2]))
        if len(run.tokens) == N:
            return run
    raise AssertionError("generate() ended early")


def drafting(n: int) -> dict[str, Any]:
    return {"draft_model": LlamaPromptLookupDecoding(num_pred_tokens=n)}


def assert_rows_were_sparse(llm: Any, run: Run, n_layer: int, max_rows: int = MAX_ROWS) -> None:
    """Every batch that fits was."""
    sparse = [n for n in run.batches[1:] if n <= max_rows]
    nodes = {name: n for name, n in llm.fasa.counters.nodes.items() if n}
    n_prefill = len(run.batches) - len(sparse)
    assert nodes == {"prefill": n_layer * n_prefill, "sparse": n_layer * len(sparse)}
    assert llm.fasa.counters.verify_failures == 0
    assert llm.fasa.counters.stale_events == 0


@pytest.mark.parametrize("n_draft", [3, 7, 10])
def test_bundled_model(
    n_draft: int, tiny_model_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """7 drafted tokens and the one before make 8 rows; 10 make a batch that is too long."""
    with opened_plain(tiny_model_path) as plain:
        prompt = plain.tokenize(LINES)[:350]
        wanted = generated(plain, prompt, monkeypatch)
    assert wanted.margin > 0.1  # so rounding decides nothing
    with opened(tiny_model_path, min_ctx=0) as llm:
        assert generated(llm, prompt, monkeypatch).tokens == wanted.tokens
    with opened(tiny_model_path, min_ctx=0, **drafting(n_draft)) as llm:
        llm.fasa.verify = True
        found = generated(llm, prompt, monkeypatch)
        assert_rows_were_sparse(llm, found, n_layer=6)
    assert found.tokens == wanted.tokens
    assert len(found.batches) < N  # drafts were accepted
    assert found.n_rejected > 0
    assert max(found.batches[1:]) == n_draft + 1


@pytest.mark.parametrize(
    ("shape", "seed", "types"),
    [
        (NORM_ONE_LAYER, 3, {}),
        (NORM, 8, {}),
        (NORM, 14, {"type_k": "q8_0"}),
    ],
    ids=str,
)
def test_random_model(
    shape: Any,
    seed: int,
    types: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Nearly every draft is wrong: the cache is cut back after each batch."""
    path = write_model(tmp_path / "model.gguf", shape)
    prompt = (random_tokens(60, seed=seed) * 5)[:300]
    settings = {"profile": random_profile(path), "min_ctx": 0, **types}
    with opened(path, **settings) as llm:
        without = generated(llm, prompt, monkeypatch)
        with llm.dense():
            llm.reset()
            wanted = generated(llm, prompt, monkeypatch)
    assert wanted.margin > 0.01
    with opened(path, **settings, **drafting(7)) as llm:
        llm.fasa.verify = True
        found = generated(llm, prompt, monkeypatch)
        assert_rows_were_sparse(llm, found, shape.n_layer)
    assert found.tokens == without.tokens == wanted.tokens
    assert found.n_rejected > N


def test_small_budget(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each row selects its own cells, so drafts change nothing where dense attention says other things either."""
    path = write_model(tmp_path / "model.gguf", NORM_ONE_LAYER)
    prompt = (random_tokens(60, seed=3) * 5)[:300]
    settings = {"budget": 48, "sinks": 2, "recent": 8, "min_ctx": 0}
    with opened(path, profile=random_profile(path), **settings) as llm:
        wanted = generated(llm, prompt, monkeypatch)
    with opened_plain(path) as plain:
        assert generated(plain, prompt, monkeypatch).tokens != wanted.tokens
    with opened(path, profile=random_profile(path), **settings, **drafting(7)) as llm:
        llm.fasa.verify = True
        found = generated(llm, prompt, monkeypatch)
        assert_rows_were_sparse(llm, found, n_layer=1)
        assert llm.fasa.counters.share_attended < 0.2
    assert found.tokens == wanted.tokens


def test_max_rows_is_a_setting(tiny_model_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = []
    for max_rows in (16, 5):
        arguments = {"min_ctx": 0, "max_rows": max_rows, **drafting(10)}
        with opened(tiny_model_path, **arguments) as llm:
            prompt = llm.tokenize(LINES)[:350]
            run = generated(llm, prompt, monkeypatch)
            assert_rows_were_sparse(llm, run, n_layer=6, max_rows=max_rows)
            tokens.append(run.tokens)
    assert tokens[0] == tokens[1]
