"""Methods that rank chunks, against their definitions in loops and on planted chunks."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyfasa import ranking, reference


def arrays(
    seed: int, n_q: int = 5, group: int = 2, n_kv: int = 40, dim: int = 8
) -> tuple[Any, Any]:
    rng = np.random.default_rng(seed)
    queries = rng.normal(size=(n_q, group, dim)).astype(np.float32)
    return queries, (rng.normal(size=(n_kv, dim)) + rng.normal(size=dim)).astype(np.float32)


@given(st.integers(0, 10_000), st.sampled_from(["norm", "neox"]), st.sampled_from([8, 4]))
@settings(deadline=None)
def test_variance_against_brute_force(seed: int, rope: str, n_rot: int) -> None:
    queries, keys = arrays(seed)
    dims = reference.chunk_dims(8, n_rot, rope)
    wanted = np.zeros(4)
    for q in queries.reshape(-1, 8).astype(np.float64):
        own = [np.var([sum(q[d] * float(k[d]) for d in pair) for k in keys]) for pair in dims]
        wanted += np.array(own) / sum(own) / 10
    found = ranking.variance(queries, keys, dims)
    assert np.allclose(found, wanted, rtol=1e-6)
    assert found.sum() == pytest.approx(1)


@given(st.integers(0, 10_000), st.sampled_from(["norm", "neox"]))
@settings(deadline=None)
def test_agreement_against_brute_force(seed: int, rope: str) -> None:
    queries, keys = arrays(seed, n_q=3, n_kv=300)
    dims = reference.chunk_dims(8, 8, rope)
    wanted = np.zeros(4)
    for q in queries.reshape(-1, 8).astype(np.float64):
        exact = keys.astype(np.float64) @ q
        best = set(np.argsort(-exact)[:256])
        for i, pair in enumerate(dims):
            own = keys[:, pair].astype(np.float64) @ q[pair]
            wanted[i] += len(best & set(np.argsort(-own)[:256])) / 256 / 6
    assert np.allclose(ranking.agreement(queries, keys, dims), wanted)


@pytest.mark.parametrize("method", ranking.METHODS)
@pytest.mark.parametrize("planted", [0, 3, 13])
@pytest.mark.parametrize("rope", ["norm", "neox"])
def test_a_planted_chunk_is_found(method: str, planted: int, rope: str) -> None:
    """One chunk decides; another only shifts all scores alike, however large it is."""
    rng = np.random.default_rng(planted)
    dims = reference.chunk_dims(64, 64, rope)
    queries = rng.normal(size=(20, 2, 64)).astype(np.float32)
    keys = 0.1 * rng.normal(size=(1000, 64)).astype(np.float32)
    keys[:, dims[planted]] *= 50
    keys[:, dims[20]] += 100
    importance = ranking.METHODS[method](queries, keys, dims)
    assert np.argmax(importance) == planted
    # All that greedy tells is a place, and the second is half of the first.
    assert importance[20] <= importance[planted] / 2


@pytest.mark.parametrize("method", ranking.METHODS)
def test_keys_that_are_all_alike(method: str) -> None:
    queries, keys = arrays(0)
    found = ranking.METHODS[method](queries, np.ones_like(keys), reference.chunk_dims(8, 8, "norm"))
    assert np.isfinite(found).all()
    if method == "variance":
        assert found.tolist() == [0, 0, 0, 0]
