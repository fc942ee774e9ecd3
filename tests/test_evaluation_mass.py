"""The task mass: attention mass of settings on captured rows, against the oracle and each other."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from pyfasa import Profile
from pyfasa.embed import find_profile
from pyfasa.evaluation import evaluate, mass
from pyfasa.evaluation.mass import Captured
from pyfasa.evaluation.selectors import Oracle, SnapKV, Streaming
from pyfasa.evaluation.settings import Setting
from pyfasa.reference import index_rows, score
from test_profile import make_identity, make_profile

BUDGET = 60


@pytest.fixture
def layer() -> Captured:
    rng = np.random.default_rng(3)
    queries = rng.normal(size=(5, 4, 64)).astype(np.float32)
    keys = 2 * rng.normal(size=(300, 2, 64)).astype(np.float32)
    return Captured(0, queries, keys, np.array([200, 220, 240, 260, 300]))


def test_the_order_of_methods(layer: Captured) -> None:
    """The oracle's selector finds what exact scores find; all of dense; less is found by less."""
    settings = [
        Setting("dense"),
        Setting("oracle", BUDGET, selector=Oracle()),
        Setting("streaming", BUDGET, selector=Streaming()),
        Setting("fine", BUDGET, make_profile(make_identity(head_dim=64, n_rot=64), 8, n_fc=32)),
        Setting("coarse", BUDGET, make_profile(make_identity(head_dim=64, n_rot=64), 1, n_fc=4)),
        Setting("snapkv", BUDGET, selector=SnapKV()),
    ]
    found = dict(mass.masses([layer], settings))
    most = np.concatenate([head.most([BUDGET])[0] for head in layer.attention()]).mean()
    assert found["dense"] == 1
    assert found[f"oracle @ {BUDGET}"] == pytest.approx(most, rel=1e-6)
    assert f"snapkv @ {BUDGET}" not in found  # observes prompts, of which there is none
    values = [found[f"{name} @ {BUDGET}"] for name in ("oracle", "fine", "coarse", "streaming")]
    assert values == sorted(values, reverse=True)
    assert values[1] > 0.99 * values[0]


def test_a_profile_scores_as_the_reference_does(layer: Captured) -> None:
    profile = make_profile(make_identity(head_dim=64, n_rot=64), 2, n_fc=9)
    dims = np.arange(64).reshape(32, 2)  # norm rope
    (setting,) = [Setting("mine", BUDGET, profile)]
    total = []
    for h, head in enumerate(layer.attention()):
        at = 0, h
        rows = index_rows(
            head.keys, dims, profile.chunks[at][:9], profile.bits[at][:9],
            None if profile.center is None else profile.center[at],
            None if profile.scale is None else profile.scale[at],
        )  # fmt: skip
        scale = None if profile.scale is None else profile.scale[at]
        scores = np.array([score(q, rows, scale) for q in head.queries.reshape(-1, 64)])
        total.append(head.mass(scores.astype(np.float32), [BUDGET])[0])
    found = dict(mass.masses([layer], [setting]))
    assert found[setting.label] == pytest.approx(np.concatenate(total).mean(), rel=1e-4)


def test_on_the_bundled_model(tiny_model_path: Path) -> None:
    source = find_profile(tiny_model_path)
    assert source is not None
    rows = evaluate(
        tiny_model_path, ["oracle", Setting("fasa", 64, Profile.load(source)), "streaming"],
        tasks=("mass",), tokens=(1500,), budgets=(64,), n_threads=2, progress=False,
    )  # fmt: skip
    found = {row.name: row.score for row in rows}
    assert set(found) == {"oracle", "fasa", "streaming"}
    assert found["streaming"] < found["fasa"] < found["oracle"] <= 1
    assert found["fasa"] > 0.85 * found["oracle"]
