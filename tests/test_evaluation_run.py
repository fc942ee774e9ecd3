"""The harness on the bundled model: what is read once, what differs between settings, what is restored."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from pyfasa import Llama, Profile
from pyfasa.embed import find_profile
from pyfasa.errors import HostError
from pyfasa.evaluation import Row, Setting, evaluate, read_rows
from pyfasa.evaluation.decode import QUESTION, applied, read, read_observed
from pyfasa.evaluation.selectors import Oracle, Selector, Streaming
from pyfasa.evaluation.teacher import compare, decode_rows, log_probabilities

DENSE = Setting("dense")
ORACLE = Setting("oracle", 128, selector=Oracle(), bytes_per_cell=128.0)
STREAMING = Setting("streaming", 64, selector=Streaming(), bytes_per_cell=0.0)


@pytest.fixture(scope="module")
def profile(tiny_model_path: Path) -> Profile:
    source = find_profile(tiny_model_path)
    assert source is not None
    return Profile.load(source)


@pytest.fixture(scope="module")
def model(tiny_model_path: Path) -> Iterator[Llama]:
    # Threads of one model wait for each other, which takes long on a machine that is busy.
    llm = Llama(
        tiny_model_path, n_ctx=2048, profile=False, n_threads=1, n_threads_batch=1, verbose=False
    )
    yield llm
    llm.close()


def run(llm: Llama, settings: Any = (DENSE, ORACLE, STREAMING), **changes: Any) -> list[Row]:
    chosen: dict[str, Any] = {"tokens": [500], "questions": 2, "progress": False}
    return evaluate(llm, settings, **(chosen | changes))


@pytest.fixture
def calls(model: Llama, monkeypatch: pytest.MonkeyPatch) -> list[SimpleNamespace]:
    """What the model evaluates: from which cell on, how much, and whether sparsely."""
    found: list[SimpleNamespace] = []
    plain = Llama.eval

    def spy(self: Llama, tokens: Any) -> None:
        fasa = self.fasa
        found.append(
            SimpleNamespace(
                start=self.n_tokens, n=len(tokens), enabled=fasa.enabled, budget=fasa.budget,
                min_ctx=fasa.min_ctx, profile=fasa.profile,
            )
        )  # fmt: skip
        plain(self, tokens)

    monkeypatch.setattr(Llama, "eval", spy)
    return found


def score(rows: list[Row], setting: Setting) -> float:
    return sum(row.score for row in rows if row.setting == setting.label)


def test_selection_decides_what_is_found(model: Llama, profile: Profile) -> None:
    """Facts lie behind the 64 most recent cells, so streaming cannot know them; the oracle finds what dense finds."""
    fasa = Setting("fasa", 256, profile)
    settings = (DENSE, ORACLE, STREAMING, fasa)
    rows = run(model, settings, tokens=[1500], questions=6)
    assert len(rows) == 24
    assert score(rows, DENSE) >= 4, [row for row in rows if row.score < 1]
    assert score(rows, ORACLE) >= score(rows, DENSE) - 1
    assert score(rows, fasa) >= score(rows, DENSE) - 1
    assert score(rows, STREAMING) <= 1
    for row in rows:
        wanted = 1.0 if row.budget is None else row.budget / 1550
        assert row.attended == pytest.approx(wanted, rel=0.05)
        assert (
            row.bytes_per_cell == next(s for s in settings if s.label == row.setting).bytes_per_cell
        )


def test_documents_and_questions_are_read_once_and_dense(model: Llama, calls: Any) -> None:
    rows = run(model, questions=12, tokens=[1000])
    assert len(rows) == 12 * 3
    documents = [call for call in calls if call.start == 0]
    assert [call.n > 900 for call in documents] == [True, True]
    batches = [call for call in calls if call.n > 1]
    assert len(batches) == 2 + 12
    assert not any(call.enabled for call in batches)
    assert min(call.n for call in batches) >= QUESTION, "a smaller batch would be decoding"
    steps = [call for call in calls if call.n == 1]
    assert {(call.enabled, call.budget if call.enabled else 0) for call in steps} == {
        (False, 0), (True, 128), (True, 64),
    }  # fmt: skip
    assert all(call.min_ctx == call.budget for call in steps if call.enabled)


def test_the_first_token_of_an_answer_is_decoded_under_the_setting(
    model: Llama, calls: Any
) -> None:
    run(model, questions=1, max_tokens=1)
    steps = [call for call in calls if call.n == 1]
    assert [call.enabled for call in steps] == [False, True, True]
    assert len({call.start for call in steps}) == 1


def test_settings_bring_their_own_profile(model: Llama, profile: Profile, calls: Any) -> None:
    small = profile.with_n_fc(3)
    run(model, (Setting("a", 64, profile), Setting("b", 64, small)), questions=1)
    used = [call.profile for call in calls if call.n == 1]
    assert used[0] is profile
    assert used[-1] is small


@pytest.mark.parametrize("given", [{"n_fc": None, "min_ctx": None}, {"n_fc": 3, "min_ctx": 500}])
def test_the_handle_is_restored_even_after_an_error(
    tiny_model_path: Path, profile: Profile, given: dict[str, int | None]
) -> None:
    class Broken(Selector):
        def bytes_per_cell(self, head_dim: int) -> float:
            return 0.0

        def __call__(self, row: Any) -> None:
            raise ArithmeticError("from the selector")

    broken = Setting("broken", 64, selector=Broken())
    with opened(tiny_model_path, profile=profile, budget=77, **given) as llm:
        before = llm.fasa.arguments()
        for settings in ((STREAMING,), (STREAMING, broken)):
            if broken in settings:
                with pytest.raises(ArithmeticError, match="from the selector"):
                    run(llm, settings, questions=1)
            else:
                run(llm, settings, questions=1)
            assert llm.fasa.arguments() == before
            assert llm.fasa.profile is profile
            assert llm.fasa.enabled


@contextmanager
def opened(path: Path, **options: Any) -> Iterator[Llama]:
    llm = Llama(path, n_ctx=1024, n_threads=1, n_threads_batch=1, verbose=False, **options)
    try:
        yield llm
    finally:
        llm.close()


def test_results_are_not_run_again(model: Llama, calls: Any, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    first = run(model, results=path, tasks=["needle", "kld"], rows=8)
    assert read_rows(path) == first
    assert len(first) == 3 * 2 + 3
    calls.clear()
    again = run(model, results=path, tasks=["needle", "kld"], rows=8)
    assert again == first
    assert calls == []

    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:4]) + lines[4][:20])
    more = run(model, results=path, tasks=["needle", "kld"], rows=8)
    assert [row.key for row in more] == [row.key for row in first]
    assert [row.answer for row in more] == [row.answer for row in first]
    assert len([call for call in calls if call.start == 0]) == 2, "a document and a text"
    assert len(read_rows(path)) == len(first)
    calls.clear()
    run(model, results=path, seed=1)
    assert calls, "another seed is another question"


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"tokens": [1800]}, "1800 tokens need a context of 2120, but n_ctx is 2048"),
        ({"tokens": []}, r"documents of \[\] tokens"),
        ({"tokens": [100]}, r"documents of \[100\] tokens"),
        ({"questions": 0}, "questions is 0"),
        ({"tasks": ["walk"]}, "'walk' is no task"),
        ({"tasks": []}, "no task is given"),
        ({"tasks": ["custom"]}, "custom and a file of prompts go together"),
        ({"custom": "x.jsonl"}, "custom and a file of prompts go together"),
        ({"rows": 0, "tasks": ["kld"]}, "rows is 0"),
        ({"max_tokens": 0}, "max_tokens is 0"),
        ({"seed": -1}, "seed is -1"),
        ({"settings": (DENSE, DENSE)}, "'dense' is given twice"),
        ({"settings": ()}, "no setting is given"),
        ({"settings": ("walk",)}, "'walk' is no setting"),
    ],
)
def test_wrong_arguments(model: Llama, changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        run(model, **changes)


def test_a_context_that_stays_dense_is_an_error(tiny_model_path: Path) -> None:
    small = opened(tiny_model_path, flash_attn=False, profile=False)
    with small as llm, pytest.raises((HostError, RuntimeError), match="flash_attn"):
        run(llm, questions=1)


def test_custom_prompts(model: Llama, tmp_path: Path) -> None:
    path = tmp_path / "own.jsonl"
    fact = "The secret code for amber falcon is 4821377."
    text = " ".join(
        ["Nothing of interest happens here."] * 40 + [f"\n{fact}\n"] + ["Nor here."] * 40
    )
    path.write_text(
        f'{{"document": {text!r}, "prompt": "What is the secret code for amber falcon?", '
        '"expected": "4821377"}'.replace("'", '"').replace("\\n", "\\n")
    )
    rows = run(model, tasks=["custom"], custom=path, max_tokens=24)
    assert [row.setting for row in rows] == ["dense", "oracle @ 128", "streaming @ 64"]
    assert rows[0].score == 1.0, rows[0].answer
    assert (rows[0].task, rows[0].case, rows[0].n_tokens) == ("custom", "line 1", 0)


# ---- what selectors see -------------------------------------------------------------------------


class Probe(Selector):
    """Keeps what it is given."""

    observes = True

    def __init__(self) -> None:
        self.seen: dict[int, tuple[Any, Any]] = {}
        self.rows: list[Any] = []
        self.budget = 0

    def bytes_per_cell(self, head_dim: int) -> float:
        return 0.0

    def start(self, budget: int) -> None:
        self.budget = budget

    def observe(self, layer: int, queries: Any, keys: Any) -> None:
        self.seen[layer] = queries, keys

    def __call__(self, row: Any) -> None:
        self.rows.append((row.layer, row.q.copy(), row.keys.copy(), row.visible.copy()))
        row.scores[:] = 0


def test_observed_queries_and_keys_are_those_of_the_cache(model: Llama) -> None:
    rng = np.random.default_rng(0)
    tokens = rng.integers(10, model.n_vocab() - 10, 340).tolist()
    probe = Probe()
    model.n_tokens = 0
    read(model, tokens[:300], 0)
    observed = read_observed(model, tokens[300:], 300)
    with applied(model, Setting("probe", 64, selector=probe), observed):
        model.n_tokens = 339
        model.eval(tokens[339:])
    assert probe.budget == 64
    assert len(probe.rows) == len(probe.seen) == 6
    for layer, q, keys, visible in probe.rows:
        seen_queries, seen_keys = probe.seen[layer]
        assert seen_queries.shape == (40, 8, 64)
        assert seen_keys.shape == (340, 2, 64)
        assert visible[:340].all()
        assert not visible[340:].any()
        np.testing.assert_array_equal(keys[:, :339], seen_keys[:339].transpose(1, 0, 2))
        if layer == 0:  # later ones have seen a selection
            np.testing.assert_allclose(q, seen_queries[-1], atol=0.05)


# ---- text ---------------------------------------------------------------------------------------


def test_rows_of_a_batch_are_those_of_single_steps(model: Llama) -> None:
    tokens = list(model.tokenize(b"def add(a, b):\n    return a + b\n\n\nclass Stack:\n    pass\n"))
    read(model, tokens[:4], 0)
    with model.dense():
        together = decode_rows(model, tokens[4:12])
        assert model.n_tokens == 12
        for i in range(8):
            model.n_tokens = 4 + i
            alone = decode_rows(model, tokens[4 + i : 5 + i])[0]
            assert together[i].argmax() == alone.argmax()
            np.testing.assert_allclose(together[i], alone, atol=0.2)


def test_dense_is_at_no_distance_from_itself_and_a_wide_selection_near(model: Llama) -> None:
    from pyfasa.evaluation.teacher import make_text

    text = make_text(lambda t: list(model.tokenize(t.encode(), add_bos=False)), 660, 0)
    tokens = list(model.tokenize(text.encode()))[:640]
    read(model, tokens[:600], 0)
    with model.dense():
        dense = np.concatenate(list(log_probabilities(model, tokens[600:], 600)))
        assert dense.shape == (39, model.n_vocab())
        np.testing.assert_allclose(np.exp(dense, dtype=np.float64).sum(axis=1), 1, atol=1e-5)
        itself = compare(model, tokens[600:], 600, dense)
    assert len(itself.kld) == 39
    assert max(map(abs, itself.kld)) < 1e-12
    assert (itself.same_top, itself.attended) == (1.0, 1.0)
    assert itself.nll == pytest.approx(itself.nll_dense)
    targets = np.asarray(tokens[601:])
    assert itself.nll == pytest.approx(-dense[np.arange(39), targets].mean(), rel=1e-5)

    distances = {}
    for name, budget in (("wide", 590), ("narrow", 64)):
        setting = Setting(name, budget, selector=Oracle())
        with applied(model, setting, None):
            found = compare(model, tokens[600:], 600, dense)
        assert found.attended == pytest.approx(budget / 620, rel=0.05)
        assert min(found.kld) > -1e-6
        distances[name] = float(np.mean(found.kld))
    # Rounding differs between both attentions, and quantized weights make it larger.
    assert distances["wide"] < 0.005
    assert distances["narrow"] > 5 * distances["wide"]


def test_kld_and_ppl_are_rows_of_one_run(model: Llama) -> None:
    rows = run(model, tasks=["ppl", "kld"], rows=16, texts=2)
    assert len(rows) == 2 * 3 * 2
    by_task = {task: [row for row in rows if row.task == task] for task in ("ppl", "kld")}
    assert [row.kld for row in by_task["ppl"]] == [row.kld for row in by_task["kld"]]
    assert len({row.case for row in rows}) == 2
    for row in rows:
        assert len(row.kld) == row.n_steps == 16
        assert row.score == pytest.approx(np.mean(row.kld))
        if row.name == "dense":
            assert row.score == pytest.approx(0, abs=1e-12)
            assert row.nll == row.nll_dense
        else:
            assert row.score > 1e-5
