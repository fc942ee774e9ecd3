"""Copies of a model, by pickle or deepcopy, have its settings of now."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import numpy as np
import pytest

from pyfasa import Llama, Profile
from support import decode, opened, random_tokens

TOKENS = random_tokens(304)


def check_equal_settings(one: Llama, two: Llama) -> None:
    assert type(one) is type(two) is Llama
    numbers = ("budget", "n_fc", "index_bits", "min_ctx", "max_rows", "sinks", "recent")
    for name in (*numbers, "enabled", "profile", "active"):
        assert getattr(one.fasa, name) == getattr(two.fasa, name), name
    assert one.context_params.type_k == two.context_params.type_k


@pytest.mark.parametrize("how", ["pickle", "deepcopy"])
def test_copies(how: str, path: Path, profile: Profile) -> None:
    def copy_of(x: Llama) -> Llama:
        return copy.deepcopy(x) if how == "deepcopy" else pickle.loads(pickle.dumps(x))

    settings = {"budget": 96, "n_fc": 9, "min_ctx": 11, "sinks": 1, "recent": 5, "type_k": "q8_0"}
    settings |= {"index_bits": 4, "max_rows": 3}
    with opened(path, profile=profile, **settings) as x:
        twin = copy_of(x)
        check_equal_settings(x, twin)
        for llm in (x, twin):
            llm.eval(TOKENS[:300])
        assert np.array_equal(decode(x, TOKENS[300:304]), decode(twin, TOKENS[300:304]))
        twin.close()


def test_copies_have_the_settings_of_now(path: Path, profile: Profile) -> None:
    with opened(path, profile=profile) as x:
        x.fasa.budget, x.fasa.n_fc, x.fasa.min_ctx, x.fasa.sinks = 96, 9, 11, 1
        x.fasa.index_bits, x.fasa.max_rows = 2, 5
        twin = copy.deepcopy(x)
        check_equal_settings(x, twin)
        twin.close()


def test_copies_of_dense_models(path: Path) -> None:
    with opened(path, profile=False) as x:
        twin = copy.deepcopy(x)
        assert twin.fasa.reason == "FASA is switched off: profile is False."
        twin.close()
