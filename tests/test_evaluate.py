"""The evaluation asks the same questions under every setting, on one prefill per document."""

from __future__ import annotations

import csv
import json
import math
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from pyfasa.errors import HostError
from pyfasa.evaluate import (
    Results,
    Row,
    Setting,
    evaluate_retrieval,
    random_chunks,
    standard_settings,
)
from pyfasa.identity import ModelIdentity
from pyfasa.profile import Profile

HEAD_DIM, N_LAYER, N_HEAD_KV = 64, 2, 2


def make_profile(n_ranked: int = 32, method: str = "variance") -> Profile:
    ids = np.broadcast_to(np.arange(n_ranked, dtype=np.uint16), (N_LAYER, N_HEAD_KV, n_ranked))
    return Profile(
        identity=ModelIdentity(
            name="fake", architecture="llama", n_layer=N_LAYER, n_head=4, n_head_kv=N_HEAD_KV,
            head_dim=HEAD_DIM, n_rot=HEAD_DIM, rope="norm", rope_freq_base=10000.0,
            tensor_hash="a" * 64, sample_type="Q8_0", sample_hash="b" * 64,
        ),
        chunks=ids, bits=np.full(ids.shape, 4, np.uint8), center=None, scale=None,
        n_fc=n_ranked // 2, method=method, data_name="", data_sha256="", n_ctx=0, n_queries=0,
        seed=0, created_by="pyfasa 0.1.0",
    )  # fmt: skip


class FakeFasa:
    """A handle whose context cannot use profiles of the method "broken"."""

    def __init__(self) -> None:
        self.enabled = True
        self.budget = 77
        self.profile: Profile | None = None
        self.given: dict[str, int | None] = {"n_fc": None, "min_ctx": None}
        self.nodes = {"sparse": 0, "prefill": 0, "disabled": 0}
        self.visible = self.attended = 0

    @property
    def n_fc(self) -> int:
        return self.given["n_fc"] or (0 if self.profile is None else self.profile.n_fc)

    @n_fc.setter
    def n_fc(self, value: int | None) -> None:
        self.given["n_fc"] = value

    @property
    def min_ctx(self) -> int:
        return self.given["min_ctx"] or 2 * self.budget

    @min_ctx.setter
    def min_ctx(self, value: int | None) -> None:
        self.given["min_ctx"] = value

    @property
    def active(self) -> bool:
        return self.reason is None

    @property
    def reason(self) -> str | None:
        broken = self.profile is not None and self.profile.method == "broken"
        return "The cache is on another planet." if broken else None

    @property
    def counters(self) -> Any:
        return SimpleNamespace(
            nodes=dict(self.nodes), cells_visible=self.visible, cells_attended=self.attended
        )

    def use(self, profile: Profile | None) -> None:
        self.profile = profile


class FakeModel:
    """Finds every fact when dense; with FASA only those whose value is below budget * 10,000."""

    def __init__(self, n_ctx: int = 4096) -> None:
        self.fasa = FakeFasa()
        self.n_tokens = 0
        self.size = n_ctx
        self.cache: list[int] = []
        self.calls: list[SimpleNamespace] = []

    def n_ctx(self) -> int:
        return self.size

    def tokenize(self, text: bytes, add_bos: bool = True, special: bool = False) -> list[int]:
        return [hash(piece) for piece in re.findall(r"\w{1,4}|\n\s*|\S| +", text.decode())]

    def create_chat_completion(
        self, messages: Any, temperature: float, repeat_penalty: float, max_tokens: int
    ) -> Any:
        assert (temperature, repeat_penalty) == (0, 1)
        text = messages[0]["content"]
        document, question = text.rsplit("\n\n", 1)
        prompt = self.tokenize(b"<user> " + text.encode() + b" </user>")
        reused = 0
        for a, b in zip(self.cache[: self.n_tokens], prompt, strict=False):
            if a != b:
                break
            reused += 1
        evaluated = len(prompt) - reused
        fasa = self.fasa
        self.calls.append(
            SimpleNamespace(
                question=question,
                evaluated=evaluated,
                enabled=fasa.enabled,
                profile=fasa.profile,
                budget=fasa.budget,
                min_ctx=fasa.min_ctx,
                n_fc=fasa.n_fc,
                max_tokens=max_tokens,
            )
        )
        sparse = fasa.enabled and fasa.profile is not None
        steps = min(max_tokens, 7)
        fasa.nodes["prefill"] += 1
        fasa.nodes["sparse" if sparse else "disabled"] += steps
        if sparse:
            fasa.visible += steps * 1000
            fasa.attended += steps * fasa.budget
        name = re.findall(r"\w+ \w+", question.rstrip("?").removesuffix(" live"))[-1]
        found = re.search(rf"{name}\D* (\d{{7}})", document)
        assert found is not None
        lost = sparse and int(found[1]) >= fasa.budget * 10_000
        answer = "0000000" if lost else found[1]
        self.cache = [*prompt, *range(steps)]
        self.n_tokens = len(self.cache)
        return {"choices": [{"message": {"content": answer}}]}


SETTINGS = (
    Setting("dense"),
    Setting("small", make_profile(), 300),
    Setting("large", make_profile().with_n_fc(8).with_bits(8), 1000),
)


def run(llm: Any, settings: Any = SETTINGS, **changes: Any) -> Results:
    chosen: dict[str, Any] = {"n_tokens": 2000, "n_questions": 8, "questions_per_document": 5}
    return evaluate_retrieval(llm, settings=settings, progress=False, **(chosen | changes))


def test_every_question_is_asked_under_every_setting() -> None:
    results = run(FakeModel())
    asked = [
        [(row.document, row.name, row.value) for row in results.rows if row.setting == s.label]
        for s in SETTINGS
    ]
    assert asked[0] == asked[1] == asked[2]
    assert len(set(asked[0])) == 8
    assert [document for document, _, _ in asked[0]] == [0] * 5 + [1] * 3


def test_scores_are_those_of_the_answers() -> None:
    results = run(FakeModel())
    values = [int(row.value) for row in results.rows if row.setting == "dense"]
    n_small = sum(value < 3_000_000 for value in values)
    assert 0 < n_small < 8  # of these seeds: both kinds occur
    assert [results.right(setting) for setting in SETTINGS] == [(8, 8), (n_small, 8), (8, 8)]


def test_each_document_is_prefilled_once_and_dense() -> None:
    llm = FakeModel()
    run(llm)
    prefills = [i for i, call in enumerate(llm.calls) if call.evaluated > 1000]
    assert prefills == [0, 1 + 5 * 3]
    assert not any(llm.calls[i].enabled for i in prefills)


def test_the_same_question_again_is_a_batch_and_no_decode_step() -> None:
    llm = FakeModel()
    run(llm, n_questions=3, questions_per_document=1)
    assert all(call.evaluated > 8 for call in llm.calls)


def test_settings_are_applied_to_the_handle() -> None:
    llm = FakeModel()
    llm.fasa.n_fc = 3  # of the user; a setting's profile brings its own
    run(llm, n_questions=1, max_tokens=5)
    dense, small, large = llm.calls[1:]
    assert not dense.enabled
    assert (small.enabled, small.profile, small.budget) == (True, SETTINGS[1].profile, 300)
    assert (large.enabled, large.profile, large.budget) == (True, SETTINGS[2].profile, 1000)
    assert small.min_ctx <= 300
    assert (small.n_fc, large.n_fc) == (16, 8)
    assert {call.max_tokens for call in llm.calls[1:]} == {5}


def test_attended_share_counts_decode_steps_only() -> None:
    results = run(FakeModel())
    assert results.attended(SETTINGS[0]) == 1.0
    assert results.attended(SETTINGS[1]) == pytest.approx(0.3)
    assert math.isnan(results.attended(Setting("never asked")))


@pytest.mark.parametrize("given", [{"n_fc": None, "min_ctx": None}, {"n_fc": 3, "min_ctx": 500}])
def test_the_handle_is_restored_even_after_an_error(given: dict[str, int | None]) -> None:
    broken = Setting("bad", make_profile(method="broken"), 256)
    for settings in (SETTINGS, (SETTINGS[1], broken)):
        llm = FakeModel()
        before = make_profile(16)
        llm.fasa.profile, llm.fasa.given = before, dict(given)
        if broken in settings:
            with pytest.raises(HostError, match=r"'bad: 16 chunks, 4 bits, 256 cells' .*planet"):
                run(llm, settings)
        else:
            run(llm, settings)
        fasa = llm.fasa
        assert (fasa.profile, fasa.enabled, fasa.budget, fasa.given) == (before, True, 77, given)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"n_tokens": 4000}, "4000 tokens need a context of 4256, but n_ctx is 4096"),
        ({"n_questions": 0}, "n_questions is 0"),
        ({"questions_per_document": 0}, "questions_per_document is 0"),
        ({"n_facts": 3}, "5 questions per document need as many facts, but n_facts is 3"),
        ({"settings": (SETTINGS[1], SETTINGS[1])}, "'small: 16 chunks.*' is given twice"),
    ],
)
def test_wrong_arguments(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        run(FakeModel(), **changes)


def test_a_setting_has_both_profile_and_budget_or_neither() -> None:
    with pytest.raises(ValueError, match="'a' has no budget"):
        Setting("a", make_profile())
    with pytest.raises(ValueError, match="'a' has no profile"):
        Setting("a", budget=256)


def test_mixed_bits_are_named_and_unused_ranks_are_not() -> None:
    profile = make_profile()
    bits = profile.bits.copy()
    bits[:, :, :2], bits[0, :, 5:] = 8, 0
    mixed = Profile(**{**vars(profile), "bits": bits})
    assert Setting("mixed", mixed, 256).bits == "4/8"


ROWS = (
    Row("dense", 0, "key", "solar piano", "9031755", 12, '9031755, "said" she', True, 1.0),
    Row(SETTINGS[1].label, 0, "key", "solar piano", "9031755", 12, "90\n", False, 0.0375),
)
RESULTS = Results(SETTINGS[:2], ROWS, 2000, 7)


def test_markdown_has_a_line_for_each_setting() -> None:
    lines = RESULTS.to_markdown().splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert cells[0] == [
        "setting", "n_fc", "bits", "bytes per cell", "budget", "right", "cells attended",
    ]  # fmt: skip
    assert cells[2] == ["dense", "", "", "", "", "1 of 1", "100 %"]
    # 16 chunks of 2 dims in 4 bits and one f16 step
    assert cells[3][:6] == ["small", "16", "4", "18", "300", "0 of 1"]
    assert len(lines) == 4


def test_csv_keeps_every_answer(tmp_path: Path) -> None:
    RESULTS.save_csv(tmp_path / "rows.csv")
    with open(tmp_path / "rows.csv", newline="", encoding="utf-8") as file:
        found = list(csv.DictReader(file))
    assert [row["answer"] for row in found] == [row.answer for row in ROWS]
    assert [row["right"] for row in found] == ["True", "False"]


def test_dict_goes_through_json() -> None:
    found = json.loads(json.dumps(RESULTS.to_dict()))
    assert found["rows"][1]["attended"] == 0.0375
    assert found["summary"][0]["n_fc"] is None
    assert (found["n_tokens"], found["seed"]) == (2000, 7)


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


def test_standard_settings_are_the_asked_grid() -> None:
    settings = standard_settings(make_profile(), make_profile(), make_profile(method="agreement"))
    assert len({setting.label for setting in settings}) == len(settings) == 1 + 12 * 2
    grid = {(s.n_fc, s.bits, s.budget) for s in settings if s.name == "variance"}
    assert grid == {(n, b, c) for n in (8, 16, 32) for b in "248" for c in (256, 1024)}
    paper = [s for s in settings if s.profile is not None and s.profile.method == "agreement"]
    assert [(s.n_fc, s.bits, s.budget) for s in paper] == [(8, "8", 256), (8, "8", 1024)]


def test_the_bundled_model_finds_what_is_hidden(tiny_model_path: Path) -> None:
    llama = pytest.importorskip("pyfasa.llama")
    # Threads of one model wait for each other, which takes long on a machine that is busy.
    llm = llama.Llama(
        tiny_model_path,
        n_ctx=2304,
        profile=False,
        n_threads=1,
        n_threads_batch=1,
        verbose=False,
    )
    identity = ModelIdentity.read(tiny_model_path)
    shape = (identity.n_layer, identity.n_head_kv, identity.head_dim // 2)
    every_chunk = replace(
        make_profile(),
        identity=identity,
        chunks=np.broadcast_to(np.arange(shape[2]), shape),
        bits=np.full(shape, 8),
        n_fc=shape[2],
    )
    dense, fasa = Setting("dense"), Setting("all chunks", every_chunk, 512)
    results = run(llm, [dense, fasa], n_questions=6, questions_per_document=6)
    for setting in (dense, fasa):
        right, n = results.right(setting)
        assert n == 6
        assert right >= 5, [row for row in results.rows if not row.right]
    assert results.attended(dense) == 1.0
    assert 0.2 < results.attended(fasa) < 0.3
    assert llm.fasa.profile is None
