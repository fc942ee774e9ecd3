"""Property tests: after any operations on a cache, FASA with everything attended is llama.cpp.

The normal run tries a few examples. ``PYFASA_STRESS=600 pytest tests/test_random_operations.py -k long`` tries fresh
ones for that many seconds and prints what it did as a line of JSON; a failure names its seed for PYFASA_STRESS_SEED.
"""

from __future__ import annotations

import json
import os
import random
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack

import pytest
from hypothesis import HealthCheck, Phase, given, note, settings
from hypothesis import strategies as st

from operations import Case, World, run
from sequences import NARROW, Model, compared, loaded
from support import (
    NEOX_GROUP_1,
    NEOX_PARTIAL,
    NORM,
    NORM_GROUP_3,
    NORM_ONE_LAYER,
    Shape,
    random_tokens,
)

ONE_LAYER_GROUP_1 = Shape("qwen2", n_head=2, n_head_kv=2, n_layer=1)
SHAPES = [NORM_ONE_LAYER, ONE_LAYER_GROUP_1, NORM, NEOX_GROUP_1, NEOX_PARTIAL, NORM_GROUP_3]
STRESS = float(os.environ.get("PYFASA_STRESS", "0"))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Model]]:
    folder = tmp_path_factory.mktemp("models")
    with ExitStack() as stack:
        yield [stack.enter_context(loaded(shape, folder)) for shape in SHAPES]


@settings(
    max_examples=50,
    deadline=None,
    phases=[phase for phase in Phase if phase != Phase.explain],
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(data=st.data())
def test_random_operations(data: st.DataObject, models: list[Model]) -> None:
    def choose(n: int) -> int:
        return data.draw(st.integers(0, n - 1))

    case = Case.drawn(models, choose)
    world = run(case, 4 + choose(16), choose)
    note("\n".join([str(case), *world.log]))


def seeded(seed: str, models: list[Model]) -> World:
    """A sequence of operations that the seed decides."""
    choose = random.Random(seed).randrange
    return run(Case.drawn(models, choose), 4 + choose(20), choose)


def test_every_operation_happens_and_is_sparse(models: list[Model]) -> None:
    """These properties would hold for contexts in which nothing happens."""
    counts: Counter[str] = Counter()
    for seed in range(30):
        counts += seeded(f"coverage {seed}", models).counts
    names = "prefill decode remove copy keep shift divide clear save load set_up invalidate"
    assert [name for name in names.split() if not counts[name]] == []
    assert counts["refused"] > 0
    assert counts["graphs all sparse"] > counts["operations"] / 8


@pytest.mark.parametrize("which", ["full", "narrow"])
def test_a_difference_is_noticed(which: str, models: list[Model]) -> None:
    """One context that selects otherwise than it should."""
    with compared(models[0], n_seq_max=2) as live:
        live.feed(0, random_tokens(100))
        live.feed(1, random_tokens(90, seed=1))
        live.step({0: 5, 1: 6})
        if which == "full":
            live.full.session.configure(NARROW)
        else:
            live.narrow.session.set_profile(models[0].other_profile)
        with pytest.raises(AssertionError):
            live.step({0: 7, 1: 8})


def test_plain_contexts_repeat_themselves(models: list[Model]) -> None:
    """So a difference is pyfasa's: the same operations on llama.cpp's own context give the same bits."""
    for seed in range(3):
        first, second = (seeded(f"repeated {seed}", models) for _ in range(2))
        assert first.log == second.log
        assert first.digests == second.digests
        assert len(first.digests) > 0


@pytest.mark.skipif(not STRESS, reason="PYFASA_STRESS=<seconds> runs it")
def test_for_a_long_time(models: list[Model], capsys: pytest.CaptureFixture[str]) -> None:
    base = os.environ.get("PYFASA_STRESS_SEED") or str(random.SystemRandom().randrange(2**32))
    counts: Counter[str] = Counter()
    worst: dict[str, float] = {}  # by the error that is allowed
    start = time.monotonic()
    while time.monotonic() - start < STRESS:
        seed = f"{base} {counts['sequences']}"
        try:
            world = seeded(seed, models)
        except AssertionError as error:
            raise AssertionError(f"seed {seed}\n{error}") from error
        counts += world.counts
        bound = f"of {world.live.bound}"
        worst[bound] = max(worst.get(bound, 0.0), world.live.worst)
    with capsys.disabled():
        seconds = round(time.monotonic() - start)
        print(json.dumps({"seconds": seconds, "seed": base, "worst": worst, **counts}))
