"""Scores from Python in place of the side index: same cache, same select and attend."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pyfasa import Profile, reference
from pyfasa.native import Scoring
from support import decode, nmse, opened, random_profile, random_tokens

SPARSE = {"budget": 64, "min_ctx": 0, "sinks": 4, "recent": 16}


def by_the_index(profile: Profile) -> Any:
    """The side index's own scores, by the NumPy reference."""
    model = profile.identity
    dims = reference.chunk_dims(model.head_dim, model.n_rot, model.rope)

    def scorer(s: Scoring) -> None:
        group = len(s.q) // len(s.keys)
        for h, q in enumerate(s.q):
            kv = h // group
            rows = reference.index_rows(
                s.keys[kv], dims, profile.chunks[s.layer, kv], profile.bits[s.layer, kv]
            )
            s.scores[h] = reference.score(q, rows)

    return scorer


@pytest.mark.parametrize("kv_type", ["f16", "q8_0", "f32"])
def test_the_same_scores_give_the_same_logits(path: Path, kv_type: str) -> None:
    """A near tie may go the other way; a scorer that is not used, or other keys, would not come near."""
    profile = random_profile(path, bits=(4,))
    tokens = random_tokens(400)
    with opened(path, profile=profile, type_k=kv_type, type_v=kv_type, **SPARSE) as llm:
        llm.eval(tokens)
        native = decode(llm, random_tokens(6, 1))
        llm.n_tokens = len(tokens)
        with llm.fasa.scoring(by_the_index(profile)):
            scored = decode(llm, random_tokens(6, 1))
        llm.n_tokens = len(tokens)
        with llm.fasa.scoring(
            lambda s: s.scores.__setitem__(slice(None), np.arange(0, -s.scores.shape[1], -1))
        ):
            first_cells = decode(llm, random_tokens(6, 1))
        llm.n_tokens = len(tokens)
        again = decode(llm, random_tokens(6, 1))
    assert nmse(scored, native) < 2e-2
    assert nmse(first_cells, native) > 10 * max(nmse(scored, native), 1e-3)
    np.testing.assert_array_equal(again, native)


def test_what_a_scorer_sees(path: Path) -> None:
    """Keys are those of the cache, only the visible cells are visible, changes are told from where they begin."""
    seen: list[tuple[int, int, int, int]] = []

    def scorer(s: Scoring) -> None:
        n = int(s.visible.sum())
        assert s.visible[:n].all()
        assert s.scores.shape == (len(s.q), len(s.visible))
        assert not s.keys.flags.writeable
        seen.append((s.layer, s.first_changed, n, s.keys.shape[1]))
        keys[s.layer] = s.keys.copy()
        s.scores[:] = 0

    keys: dict[int, Any] = {}
    profile = random_profile(path)
    with opened(path, profile=profile, **SPARSE) as llm:
        llm.eval(random_tokens(300))
        with llm.fasa.scoring(scorer):
            decode(llm, random_tokens(3, 1))
            llm.n_tokens = 250
            decode(llm, random_tokens(1, 2))
        with llm.fasa.capturing() as session:
            of_cache = [session.keys(layer, 0, 251) for layer in range(2)]
    of_layer_0 = [entry[1:] for entry in seen if entry[0] == 0]
    assert [entry[:2] for entry in of_layer_0] == [(0, 301), (301, 302), (302, 303), (250, 251)]
    for layer in range(2):
        np.testing.assert_array_equal(keys[layer][:, :251].transpose(1, 0, 2), of_cache[layer])


def test_an_error_in_a_scorer_is_raised_and_the_rows_are_exact(path: Path) -> None:
    def scorer(s: Scoring) -> None:
        calls.append(s.layer)
        raise KeyError("no such selector")

    calls: list[int] = []
    tokens = random_tokens(400)
    with opened(path, profile=random_profile(path), **SPARSE) as llm:
        llm.eval(tokens)
        with llm.dense():
            dense = decode(llm, random_tokens(2, 1))
        llm.n_tokens = len(tokens)
        with pytest.raises(KeyError, match="no such selector"), llm.fasa.scoring(scorer):
            found = decode(llm, random_tokens(2, 1))
        assert len(calls) == 1
        assert nmse(found, dense) < 5e-4
        llm.n_tokens = len(tokens)
        decode(llm, random_tokens(2, 1))
        assert llm.fasa.counters.nodes["sparse"] == 8


def test_several_rows_at_once(path: Path) -> None:
    """Each row of a batch is scored with its own query and sees its own cells."""
    seen: list[int] = []

    def scorer(s: Scoring) -> None:
        seen.append(int(s.visible.sum()))
        s.scores[:] = np.arange(s.scores.shape[1])

    with opened(path, profile=random_profile(path), **SPARSE) as llm:
        llm.eval(random_tokens(300))
        with llm.fasa.scoring(scorer):
            llm.eval(random_tokens(4, 1))
    assert seen == 2 * [301, 302, 303, 304]
