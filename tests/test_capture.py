"""Captured queries and keys of the running model."""

from __future__ import annotations

from pathlib import Path

import pytest

from support import (
    decode,
    nmse,
    opened,
    opened_plain,
    random_tokens,
)


def test_capturing_does_not_change_what_the_model_says(path: Path) -> None:
    tokens = random_tokens(120)
    with opened_plain(path) as plain:
        plain.eval(tokens[:100])
        wanted = decode(plain, tokens[100:])
    with opened(path, profile=False) as llm:
        llm.eval(tokens[:100])
        with llm.fasa.capturing() as session:
            found = decode(llm, tokens[100:])
        assert session.captured(1).shape == (20, 4, 64)
        llm.eval(tokens[:1])
        assert session.captured(1).shape == (20, 4, 64)  # not any more
        session.captured_clear()
        with pytest.raises(RuntimeError, match="Layer 1 has no captured queries"):
            session.captured(1)
        with pytest.raises(RuntimeError, match="Layer 9 has not computed attention"):
            session.keys(9, 0, 10)
        with pytest.raises(ValueError, match="Cells 0 to 100000 are asked for"):
            session.keys(1, 0, 100_000)
    assert nmse(found, wanted) < 5e-4


@pytest.mark.parametrize("kv", ["f16", "q8_0"])
def test_keys_come_back_in_the_basis_of_rope(kv: str, path: Path) -> None:
    """The Hadamard rotation of a quantized cache is undone, up to the cache's own rounding."""
    keys, queries = {}, {}
    tokens = random_tokens(64)
    for name in ("f16", kv):
        with opened(path, profile=False, type_k=name) as llm:
            with llm.fasa.capturing() as session:
                llm.eval(tokens)
            keys[name] = session.keys(0, 0, 64)
            queries[name] = session.captured(0)
    assert nmse(keys[kv], keys["f16"]) < 1e-4
    assert nmse(queries[kv], queries["f16"]) < 1e-6
