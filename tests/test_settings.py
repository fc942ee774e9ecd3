"""Settings: what is refused and with which sentence, and that changes at run time take effect."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pyfasa import Llama, Profile
from pyfasa.errors import ProfileError
from support import decode, nmse, opened, random_profile, random_tokens

TOKENS = random_tokens(303)


BAD_SETTINGS = [
    ({"budget": 0}, "budget is 0; it must be at least 1 cell"),
    ({"budget": -5}, "budget is -5; it must be at least 1 cell"),
    ({"budget": 64.0}, r"budget is 64\.0; a whole number is needed"),
    ({"budget": "64"}, "budget is '64'; a whole number is needed"),
    ({"budget": True}, "budget is True; a whole number is needed"),
    ({"budget": None}, "budget is None; a whole number is needed"),
    ({"budget": 2**40}, "budget is 1099511627776; it must fit into 32 bits"),
    ({"budget": 35}, "sinks 4 and recent 32 together exceed the budget 35"),
    ({"sinks": -1}, "sinks -1, recent 32; none may be negative"),
    ({"recent": 2000}, "sinks 4 and recent 2000 together exceed the budget 1024"),
    ({"min_ctx": -1}, "min_ctx is -1"),
    ({"min_ctx": "8"}, "min_ctx is '8'; a whole number or None is needed"),
    ({"n_fc": 0}, "n_fc is 0; at least 1 chunk is needed"),
    ({"n_fc": 1.5}, r"n_fc is 1\.5; a whole number or None is needed"),
    ({"n_fc": 33}, "n_fc is 33; the profile ranks 32 chunks"),
    ({"index_bits": 0}, "index_bits is 0; 1, 2, 4 or 8 bits exist, or None"),
    ({"index_bits": 3}, "1, 2, 4 or 8"),
    ({"index_bits": "4"}, "index_bits is '4'; a whole number or None is needed"),
    ({"max_rows": -1}, "max_rows is -1; it must be from 0 to 64"),
    ({"max_rows": 65}, "max_rows is 65; it must be from 0 to 64"),
    ({"max_rows": None}, "max_rows is None; a whole number is needed"),
]


@pytest.mark.parametrize(("arguments", "sentence"), BAD_SETTINGS, ids=lambda x: str(x)[:30])
def test_bad_arguments(
    arguments: dict[str, Any], sentence: str, path: Path, profile: Profile
) -> None:
    with pytest.raises(ValueError, match=sentence):
        Llama(str(path), profile=profile, verbose=False, **arguments)


@pytest.mark.parametrize(("arguments", "sentence"), BAD_SETTINGS, ids=lambda x: str(x)[:30])
def test_a_failing_set_changes_nothing(
    arguments: dict[str, Any], sentence: str, path: Path, profile: Profile
) -> None:
    names = ("budget", "n_fc", "index_bits", "min_ctx", "max_rows", "sinks", "recent")
    ((name, value),) = arguments.items()
    with opened(path, profile=profile, n_fc=7) as x:
        before = [getattr(x.fasa, name) for name in names]
        with pytest.raises(ValueError, match=sentence):
            setattr(x.fasa, name, value)
        after = [getattr(x.fasa, name) for name in names]
    assert before == after == [1024, 7, None, 2048, 8, 4, 32]


def test_settings_take_effect(llm: Any) -> None:
    llm.eval(TOKENS[:300])
    heads = 2 * 4
    for name, value, attended in (("budget", 50, 50), ("sinks", 0, 50), ("recent", 1, 50)):
        setattr(llm.fasa, name, value)
        assert getattr(llm.fasa, name) == value
        llm.fasa.reset()
        llm.eval(TOKENS[300:301])
        assert llm.fasa.counters.cells_attended == heads * attended
    llm.fasa.enabled = False
    assert not llm.fasa.active
    assert llm.fasa.reason == "FASA is switched off; set llm.fasa.enabled = True."
    llm.fasa.reset()
    llm.eval(TOKENS[301:302])
    assert llm.fasa.counters.cells_attended == 0
    llm.fasa.enabled = True
    assert llm.fasa.active
    llm.fasa.n_fc = 5
    assert llm.fasa.n_fc == 5
    llm.fasa.n_fc = None
    assert llm.fasa.n_fc == 32


def test_bits_of_the_index(llm: Any) -> None:
    """The profile has 8, 4 and 2 bits for 11, 11 and 10 of the 32 chunks."""
    llm.fasa.verify = True
    llm.eval(TOKENS[:300])
    rows, index_bytes = [], []
    for bits in (None, 8, 4, 2, None):
        llm.fasa.index_bits = bits
        assert llm.fasa.index_bits == bits
        llm.n_tokens = 300
        rows.append(decode(llm, TOKENS[300:302]))
        index_bytes.append(llm.fasa.counters.index_bytes)
    assert np.array_equal(rows[0], rows[-1])
    assert nmse(rows[3], rows[1]) > 1e-4
    assert index_bytes[1] > index_bytes[0] > index_bytes[2] > index_bytes[3]
    assert llm.fasa.counters.verify_failures == 0


def test_rows_of_a_decode_step(llm: Any) -> None:
    llm.eval(TOKENS[:290])
    for max_rows, reason in ((2, "prefill"), (3, "sparse")):
        llm.fasa.max_rows = max_rows
        llm.fasa.reset()
        llm.n_tokens = 290
        llm.eval(TOKENS[290:293])
        assert {name: n for name, n in llm.fasa.counters.nodes.items() if n} == {reason: 2}


def test_min_ctx_follows_the_budget_unless_given(path: Path, profile: Profile) -> None:
    with opened(path, profile=profile) as x:
        assert (x.fasa.budget, x.fasa.min_ctx) == (1024, 2048)
        x.fasa.budget = 100
        assert x.fasa.min_ctx == 200
        x.fasa.min_ctx = 1000
        x.fasa.budget = 300
        assert x.fasa.min_ctx == 1000
        x.fasa.min_ctx = None
        assert x.fasa.min_ctx == 600


def test_dense_blocks(llm: Any) -> None:
    llm.eval(TOKENS[:300])
    with llm.dense() as same:
        assert same is llm
        with llm.dense():
            llm.eval(TOKENS[300:301])
        llm.eval(TOKENS[301:302])
    with pytest.raises(KeyError), llm.dense():
        raise KeyError
    llm.eval(TOKENS[302:303])
    nodes = llm.fasa.counters.nodes
    assert (nodes["disabled"], nodes["sparse"]) == (2 * 2, 2)


def test_another_profile_at_run_time(
    llm: Any, path: Path, profile: Profile, other_profile: Profile
) -> None:
    llm.fasa.verify = True
    llm.eval(TOKENS[:300])
    first = decode(llm, TOKENS[300:302])
    with pytest.raises(ProfileError, match="'random-7' and does not fit 'random-0'"):
        llm.fasa.use(other_profile)
    assert llm.fasa.profile is profile
    llm.n_tokens = 300
    llm.fasa.use(random_profile(path, seed=5, bits=(2,)))
    assert nmse(decode(llm, TOKENS[300:302]), first) > 1e-4
    llm.fasa.use(None)
    assert not llm.fasa.active
    llm.n_tokens = 300
    assert llm.fasa.counters.nodes["no_profile"] == 0
    decode(llm, TOKENS[300:302])
    assert llm.fasa.counters.nodes["no_profile"] == 2 * 2
    llm.fasa.use(profile)
    llm.n_tokens = 300
    assert np.array_equal(decode(llm, TOKENS[300:302]), first)
    assert llm.fasa.counters.verify_failures == 0


def test_a_profile_that_ranks_fewer_chunks_lowers_n_fc(llm: Any, profile: Profile) -> None:
    llm.fasa.n_fc = 20
    few = replace(profile, chunks=profile.chunks[:, :, :8], bits=profile.bits[:, :, :8], n_fc=8)
    llm.fasa.use(few)
    assert llm.fasa.n_fc <= 8
