"""Runs of a calibration: saved, added, used again, interrupted."""

from __future__ import annotations

import importlib
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import pytest

from pyfasa import Llama, calibrate
from pyfasa.errors import ProfileError
from support import (
    NORM,
    SMALL,
    opened_plain,
    random_tokens,
    write_model,
)

module = importlib.import_module("pyfasa.calibration")
pytestmark = pytest.mark.usefixtures("few_facts")


def test_runs_are_kept_and_added(path: Path, text: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.txt"
    other.write_bytes(text.read_bytes()[::-1])
    both = calibrate(path, [text, other], **SMALL)
    kept = tmp_path / "run.npz"
    first = calibrate(path, [text], keep=kept, **SMALL)
    added = calibrate(path, [other], add=[kept], keep=kept, **SMALL)
    assert added.n_queries == both.n_queries == 2 * first.n_queries
    np.testing.assert_array_equal(added.chunks, both.chunks)
    for name in ("center", "scale", "importance"):
        np.testing.assert_allclose(getattr(added, name), getattr(both, name), rtol=1e-5, atol=1e-6)
    assert not np.array_equal(added.chunks, first.chunks)
    assert added.data_sha256 not in (first.data_sha256, both.data_sha256)

    with pytest.raises(ProfileError, match="different models, methods or index settings"):
        calibrate(path, [text], add=[kept], method="greedy", index_bytes=6, **SMALL)
    text.with_name("bad.npz").write_bytes(b"PK nonsense")
    with pytest.raises(ProfileError, match=r"bad\.npz is no saved calibration run"):
        calibrate(path, [text], add=[text.with_name("bad.npz")], **SMALL)
    with pytest.raises(ProfileError, match=r"none\.npz is no saved calibration run"):
        calibrate(path, [text], add=[tmp_path / "none.npz"], **SMALL)


def test_a_measured_run_gives_profiles_of_all_sizes(path: Path, text: Path, tmp_path: Path) -> None:
    kept = tmp_path / "run.npz"
    tally = module.measure(path, [text], reuse=kept, **SMALL)
    noted: dict[str, Any] = {"texts": [text], "n_ctx": SMALL["n_ctx"]}
    for size in (None, 4, 12):
        wanted = calibrate(path, [text], index_bytes=size, **SMALL)
        assert module.profile_of(tally, path, index_bytes=size, **noted) == wanted
        loaded = module.Tally.load(kept)
        assert module.profile_of(loaded, path, index_bytes=size, **noted) == wanted
    with pytest.raises(ProfileError, match=r"not of the model .* and the method 'greedy'"):
        module.profile_of(tally, path, method="greedy", **noted)
    with pytest.raises(ValueError, match=r"index_bytes is 1\.5, and the smallest index"):
        module.profile_of(tally, path, index_bytes=1.5, **noted)
    other = write_model(tmp_path / "other.gguf", NORM, seed=9)
    with pytest.raises(ProfileError, match="not of the model"):
        module.profile_of(tally, other, **noted)
    one = module.measure(path, [text], method="variance", index_bytes=6, **SMALL)
    wanted = calibrate(path, [text], method="variance", index_bytes=6, **SMALL)
    assert module.profile_of(one, path, method="variance", **noted) == wanted
    with pytest.raises(ProfileError, match="the method 'allocation'"):
        module.profile_of(one, path, **noted)


def test_a_saved_run_is_reused_only_for_the_same_question(
    path: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept, run, runs = tmp_path / "run.npz", module._run, []
    monkeypatch.setattr(module, "_run", lambda *a: (runs.append(1), run(*a))[1])
    asked: dict[str, Any] = {"method": "variance", "reuse": kept, **SMALL}
    for texts, options, fresh in (
        ([text], {}, 1),
        ([text], {}, 0),
        ([text], {"n_fc": 3}, 1),
        ([text, text], {"n_fc": 3}, 1),
        ([text, text], {"n_fc": 3}, 0),
    ):
        runs.clear()
        module.measure(path, texts, **asked, **options)
        assert len(runs) == fresh, (texts, options)
    for damage in (b"nonsense", kept.read_bytes()[:-200]):
        kept.write_bytes(damage)
        with pytest.raises(ProfileError, match=r"run\.npz is no saved calibration run"):
            module.Tally.load(kept)
        runs.clear()
        module.measure(path, [text], **asked)
        assert len(runs) == 1


@pytest.mark.parametrize("calls_before", [0, 1, 5])
def test_an_interruption_leaves_nothing_behind(
    calls_before: int, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Llama] = []
    eval_of: Callable[..., None] = llama_cpp.Llama.eval
    calls = 0

    class Watched(Llama):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            made.append(self)
            super().__init__(*args, **kwargs)

    def interrupted(self: Any, tokens: Any) -> None:
        nonlocal calls
        calls += 1
        if calls > calls_before:
            raise KeyboardInterrupt
        eval_of(self, tokens)

    monkeypatch.setattr(module, "Llama", Watched)
    monkeypatch.setattr(llama_cpp.Llama, "eval", interrupted)
    files, threads = sorted(path.parent.iterdir()), threading.active_count()
    with pytest.raises(KeyboardInterrupt):
        calibrate(path, n_ctx=640, progress=True)
    monkeypatch.undo()
    (llm,) = made
    assert llm.fasa.reason == "The model is closed."
    assert llm._fasa.session.closed
    assert sorted(path.parent.iterdir()) == files
    deadline = time.monotonic() + 5  # the progress bar's thread ends at its next tick
    while threading.active_count() > threads and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threading.active_count() == threads
    with opened_plain(path) as plain:  # and the next model works
        plain.eval(random_tokens(10))


def test_progress_goes_to_stderr_only_when_wanted(
    path: Path, text: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    calibrate(path, [text], **SMALL)
    captured = capfd.readouterr()
    assert (captured.out, captured.err) == ("", "")
    calibrate(path, [text], n_ctx=640, progress=True)
    assert capfd.readouterr().out == ""
