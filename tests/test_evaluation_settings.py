"""Names of settings become profiles and selectors of the asked size."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pyfasa.evaluation import settings as module
from pyfasa.evaluation.selectors import DoubleSparsity, Oracle, Quest, SparQ
from pyfasa.evaluation.settings import Setting, low_frequencies, random_chunks, resolve
from pyfasa.identity import ModelIdentity
from pyfasa.profile import Profile

HEAD_DIM, N_LAYER, N_HEAD_KV = 64, 2, 2
IDENTITY = ModelIdentity(
    name="fake", architecture="llama", n_layer=N_LAYER, n_head=4, n_head_kv=N_HEAD_KV,
    head_dim=HEAD_DIM, n_rot=HEAD_DIM, rope="norm", rope_freq_base=10000.0,
    tensor_hash="a" * 64, sample_type="Q8_0", sample_hash="b" * 64,
)  # fmt: skip


def make_profile(n_ranked: int = 32, method: str = "variance", bits: int = 4) -> Profile:
    ids = np.broadcast_to(np.arange(n_ranked, dtype=np.uint16), (N_LAYER, N_HEAD_KV, n_ranked))
    return Profile(
        identity=IDENTITY, chunks=ids, bits=np.full(ids.shape, bits, np.uint8), center=None,
        scale=None, n_fc=n_ranked // 2, method=method, data_name="", data_sha256="", n_ctx=0,
        n_queries=0, seed=0, created_by="pyfasa 0.1.0",
    )  # fmt: skip


@pytest.fixture
def calibrations(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What calibration is asked to measure; it answers at once."""
    asked: list[dict[str, Any]] = []

    def measure(path: Path, **options: Any) -> None:
        asked.append(options)

    def profile_of(tally: None, path: Path, *, method: str, **_: Any) -> Profile:
        return make_profile(16, method)

    monkeypatch.setattr("pyfasa.calibration.measure", measure)
    monkeypatch.setattr("pyfasa.calibration.profile_of", profile_of)
    monkeypatch.setattr("pyfasa.embed.find_profile", lambda path: None)
    monkeypatch.setattr(module.ModelIdentity, "read", lambda path: IDENTITY)
    ranked = np.broadcast_to(np.arange(HEAD_DIM), (N_LAYER, N_HEAD_KV, HEAD_DIM))
    monkeypatch.setattr("pyfasa.evaluation.channels.rank_channels", lambda *_, **__: ranked)
    return asked


def test_dense_first_then_each_name_at_each_budget(calibrations: Any) -> None:
    found = resolve(["fasa", "dense", "quest:16"], "m.gguf", budgets=(64, 256))
    assert [s.label for s in found] == [
        "dense", "fasa @ 64", "fasa @ 256", "quest:16 @ 64", "quest:16 @ 256",
    ]  # fmt: skip
    assert found[0].dense
    assert (found[0].profile, found[0].selector, found[0].bytes_per_cell) == (None, None, None)
    assert found[1].profile == make_profile(16, "allocation"), "no profile: a fresh calibration"
    assert calibrations == [
        {"method": "allocation", "index_bytes": None, "seed": 0, "reuse": None, "progress": False}
    ]


def test_the_own_profile_is_taken_as_it_is(calibrations: Any) -> None:
    own = make_profile(8)
    (found,) = resolve(["fasa"], "m.gguf", profile=own)
    assert found.profile is own
    assert found.bytes_per_cell == own.bytes_per_cell().mean()
    assert not calibrations


def test_names_without_a_size_are_made_at_all_index_sizes(calibrations: Any) -> None:
    found = resolve(
        ["variance", "greedy:7.5", "random", "quest", "sparq", "double-sparsity"],
        "m.gguf", budgets=(64,), index_bytes=(6, 10), seed=3,
    )  # fmt: skip
    assert [s.name for s in found] == [
        "variance:6", "variance:10", "greedy:7.5", "random:6", "random:10",
        "quest:43", "quest:26", "sparq:3", "sparq:5", "double-sparsity:8", "double-sparsity:16",
    ]  # fmt: skip
    asked = [(c["method"], c["index_bytes"]) for c in calibrations]
    assert asked == [("variance", 6), ("variance", 10), ("greedy", 7.5)], "each is made once"
    assert {c["seed"] for c in calibrations} == {3}
    for setting in found[5:]:
        wanted = 6 if setting.name.endswith((":43", ":3", ":8")) else 10
        assert setting.bytes_per_cell is not None
        assert wanted - 1 < setting.bytes_per_cell <= wanted


def test_allocation_is_measured_once_for_all_sizes(calibrations: Any) -> None:
    found = resolve(["fasa", "allocation", "allocation:4"], "m.gguf", index_bytes=(6, 10))
    assert [s.name for s in found] == ["fasa", "allocation:6", "allocation:10", "allocation:4"]
    assert [(c["method"], c["index_bytes"]) for c in calibrations] == [("allocation", None)]


def test_runs_are_kept_beside_the_results(calibrations: Any, tmp_path: Path) -> None:
    names = ["allocation", "variance:7.5", "greedy"]
    resolve(names, "m.gguf", index_bytes=(6, 10), results=tmp_path / "rows.jsonl")
    assert [c["reuse"].relative_to(tmp_path).name for c in calibrations] == [
        "rows.allocation.npz", "rows.variance-7.5.npz", "rows.greedy-6.npz", "rows.greedy-10.npz",
    ]  # fmt: skip


def test_a_resumed_run_does_not_calibrate_again(
    one: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And has the profiles of `calibrate`, so that its rows are found again by their fingerprint."""
    from pyfasa import calibration
    from pyfasa.allocation import shapes

    monkeypatch.setattr("pyfasa.samples.FACTS", 4)  # a random model has a token per byte
    monkeypatch.setattr(calibration.allocation, "shapes", lambda: shapes()[::20])
    for function in (calibration.measure, calibration.profile_of, calibration.calibrate):
        monkeypatch.setitem(function.__kwdefaults__, "n_ctx", 640)
    runs: list[None] = []
    run = calibration._run
    monkeypatch.setattr(calibration, "_run", lambda *a: (runs.append(None), run(*a))[1])
    asked: dict[str, Any] = {"index_bytes": (8, 16), "seed": 5, "results": tmp_path / "rows.jsonl"}

    first = resolve(["allocation", "variance:9"], one, **asked)
    assert len(runs) == 2
    again = resolve(["allocation", "variance:9"], one, **asked)
    assert len(runs) == 2
    assert [s.fingerprint for s in again] == [s.fingerprint for s in first]
    for setting, size in zip(first, (8, 16, 9), strict=True):
        wanted = calibration.calibrate(
            one, method=setting.method, index_bytes=size, seed=5, progress=False
        )
        assert setting.profile == wanted
    runs.clear()
    resolve(["allocation"], one, **asked | {"seed": 6})
    assert len(runs) == 1, "another seed has other documents"


def test_sizes_of_rivals(calibrations: Any) -> None:
    names = ["oracle", "quest:16", "sparq:5", "double-sparsity:12"]
    oracle, quest, sparq, double = resolve(names, "m.gguf")
    assert isinstance(oracle.selector, Oracle)
    assert isinstance(quest.selector, Quest)
    assert quest.selector.page == 16
    assert isinstance(sparq.selector, SparQ)
    assert sparq.selector.channels == 5
    assert isinstance(double.selector, DoubleSparsity)
    assert double.selector.channels.shape == (N_LAYER, N_HEAD_KV, 12)
    assert [s.bytes_per_cell for s in (oracle, quest, sparq, double)] == [128, 16, 10, 8]


@pytest.mark.parametrize(
    ("names", "options", "sentence"),
    [
        ([], {}, "no setting is given"),
        (["walk"], {}, "'walk' is no setting; there are dense, oracle"),
        (["fasa:3"], {}, "'fasa:3' has a size, but fasa has none"),
        (["quest:many"], {}, "'quest:many' has the size 'many'; it must be a whole number"),
        (["quest:1.5"], {}, "'quest:1.5' has the size '1.5'; it must be a whole number"),
        (["variance:0"], {}, "'variance:0' has the size '0'; it must be a number of bytes above 0"),
        (["variance:nan"], {}, "'variance:nan' has the size 'nan'"),
        (["sparq:65"], {}, "sparq:65 asks for 65 channels; a head has 1 to 64"),
        (["oracle"], {"budgets": []}, "budgets are"),
        (["oracle"], {"budgets": [0]}, "budgets are"),
        (["oracle"], {"index_bytes": [-1]}, "index bytes are"),
    ],
)
def test_wrong_names(names: list[str], options: Any, sentence: str, calibrations: Any) -> None:
    with pytest.raises(ValueError, match=sentence):
        resolve(names, "m.gguf", **options)


def test_a_setting_is_dense_or_has_one_way_to_score() -> None:
    with pytest.raises(ValueError, match="'a' has no budget"):
        Setting("a", profile=make_profile())
    with pytest.raises(ValueError, match="'a' has a budget and 0 ways to score"):
        Setting("a", 256)
    with pytest.raises(ValueError, match="'a' has a budget and 2 ways to score"):
        Setting("a", 256, make_profile(), Oracle())
    with pytest.raises(ValueError, match="'a' has a budget of 0"):
        Setting("a", 0, make_profile())


def test_the_fingerprint_is_that_of_the_profile() -> None:
    one, same, other = (Setting("a", 64, make_profile(n)) for n in (8, 8, 16))
    assert one.fingerprint == same.fingerprint != other.fingerprint
    assert Setting("dense").fingerprint == Setting("o", 64, selector=Oracle()).fingerprint == ""


def test_random_chunks_draws_from_all_chunks() -> None:
    profile = make_profile(n_ranked=16)
    drawn = random_chunks(profile, 3)
    assert drawn.method == "random"
    assert drawn.chunks.shape == profile.chunks.shape
    assert drawn.chunks.max() >= 16  # chunks that the profile does not rank
    rows = drawn.chunks.reshape(-1, 16)
    assert len({tuple(row) for row in rows}) == len(rows)
    assert random_chunks(profile, 3) == drawn
    assert random_chunks(profile, 4) != drawn
    np.testing.assert_array_equal(drawn.bits, profile.bits)


def test_low_frequencies_are_the_highest_chunks() -> None:
    low = low_frequencies(make_profile(n_ranked=16))
    assert low.chunks[1, 1].tolist() == list(range(31, 15, -1))
    assert low.bytes_per_cell().tolist() == make_profile(16).bytes_per_cell().tolist()
