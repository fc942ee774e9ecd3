"""pyfasa.Llama is llama_cpp.Llama with more arguments, and says plainly what it will not do."""

from __future__ import annotations

import copy
import inspect
import pickle
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import gguf
import llama_cpp
import numpy as np
import pytest
from llama_cpp.llama_cache import LlamaRAMCache

import pyfasa
from pyfasa import Llama, Profile
from pyfasa.documents import ask, is_right, make_document
from pyfasa.embed import embed, sidecar_path
from pyfasa.errors import DenseWarning, HostError, ModelFileError, ProfileError
from pyfasa.llama import KV_TYPES
from support import (
    NEOX_PARTIAL,
    NORM,
    bundled_profile,
    decode,
    nmse,
    opened,
    opened_plain,
    random_profile,
    random_tokens,
    warned,
    write_model,
)

TOKENS = random_tokens(310)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model") / "random.gguf")


@pytest.fixture(scope="module")
def profile(path: Path) -> Profile:
    return random_profile(path)


@pytest.fixture
def copied(path: Path, tmp_path: Path) -> Path:
    """The model alone in a folder, for files beside it."""
    target = tmp_path / "copy.gguf"
    target.write_bytes(path.read_bytes())
    return target


@pytest.fixture(scope="module")
def other_profile(tmp_path_factory: pytest.TempPathFactory) -> Profile:
    folder = tmp_path_factory.mktemp("other")
    return random_profile(write_model(folder / "other.gguf", NEOX_PARTIAL, seed=7))


@pytest.fixture
def llm(path: Path, profile: Profile) -> Iterator[Any]:
    with opened(path, profile=profile, budget=64, min_ctx=0) as opened_llm:
        yield opened_llm


# ---- arguments of the parent ---------------------------------------------------------------------


def test_every_argument_of_the_parent_is_accepted(path: Path, profile: Profile) -> None:
    parameters = inspect.signature(llama_cpp.Llama.__init__).parameters
    defaults = {
        name: p.default
        for name, p in parameters.items()
        if p.default is not inspect.Parameter.empty and name != "flash_attn"
    }
    assert len(defaults) > 40
    with (
        warned() as sentences,
        opened(path, **{**defaults, "verbose": False}, profile=profile) as x,
    ):
        assert x.fasa.active
        assert isinstance(x, llama_cpp.Llama)
    assert sentences == []


def test_own_arguments_are_not_those_of_the_parent() -> None:
    own = set(inspect.signature(Llama.__init__).parameters)
    of_parent = set(inspect.signature(llama_cpp.Llama.__init__).parameters)
    assert own - of_parent == {"profile", "budget", "n_fc", "min_ctx", "sinks", "recent"}


def test_unknown_arguments_are_refused(path: Path) -> None:
    with pytest.raises(TypeError, match=r"bugdet, n_cxt: neither pyfasa\.Llama nor llama_cpp"):
        Llama(str(path), n_cxt=512, bugdet=64)


def test_paths_of_pathlib(path: Path, profile: Profile) -> None:
    x = Llama(path, profile=profile, verbose=False)
    assert x.fasa.active
    x.close()


# ---- where the profile comes from ----------------------------------------------------------------


def test_without_a_profile_one_warning_and_dense(copied: Path) -> None:
    with warned() as sentences, opened(copied) as x:
        assert not x.fasa.active
        assert x.fasa.profile is None
        reason = x.fasa.reason
        x.eval(TOKENS[:9])
        x.eval(TOKENS[9:10])
        assert x.fasa.counters.nodes["sparse"] == 0
    assert sentences == [f"Decoding is dense: {reason}"]
    assert reason == f"copy.gguf has no FASA profile; make one with: pyfasa calibrate {copied}"


def test_the_warning_points_at_the_caller(copied: Path) -> None:
    with pytest.warns(DenseWarning) as caught:
        Llama(str(copied), verbose=False).close()
    assert caught[0].filename == __file__


def test_profile_false_is_dense_without_a_warning(copied: Path, profile: Profile) -> None:
    profile.save(sidecar_path(copied))
    with warned() as sentences, opened(copied, profile=False) as x:
        assert not x.fasa.active
        assert x.fasa.reason == "FASA is switched off: profile is False."
    assert sentences == []


def test_profile_true_is_refused(path: Path) -> None:
    with pytest.raises(ValueError, match="give a path, a Profile, None to look for one, or False"):
        Llama(str(path), profile=True)


@pytest.mark.parametrize("kind", ["profile", "path", "str", "sidecar", "embedded"])
def test_sources_of_a_profile(kind: str, copied: Path, profile: Profile, tmp_path: Path) -> None:
    file = tmp_path / "elsewhere.gguf"
    profile.save(file)
    given: Any = {"profile": profile, "path": file, "str": str(file)}.get(kind)
    model = copied
    if kind == "sidecar":
        profile.save(sidecar_path(copied))
    if kind == "embedded":
        replace(profile, n_fc=3).save(sidecar_path(copied))  # the model's own goes first
        model = tmp_path / "model.gguf"
        embed(copied, profile, model)
    with warned() as sentences, opened(model, profile=given) as x:
        assert x.fasa.active
        assert x.fasa.reason is None
        assert x.fasa.profile == profile
        assert x.fasa.n_fc == profile.n_fc
    assert sentences == []


def test_a_profile_of_another_model(copied: Path, other_profile: Profile) -> None:
    both = r"the model 'random-7' and does not fit 'random-0': .*architecture stablelm / llama"
    with pytest.raises(ProfileError, match=both):
        Llama(str(copied), profile=other_profile)
    other_profile.save(sidecar_path(copied))
    with pytest.raises(ProfileError, match=both):
        Llama(str(copied), profile=sidecar_path(copied))
    with pytest.warns(DenseWarning, match=both) as caught, opened(copied) as x:
        assert not x.fasa.active
    assert len(caught) == 1


def test_a_damaged_profile(copied: Path, profile: Profile) -> None:
    beside = sidecar_path(copied)
    profile.save(beside)
    content = beside.read_bytes()
    beside.write_bytes(content[: len(content) // 2])
    with pytest.raises(ProfileError, match=beside.name):
        Llama(str(copied), profile=beside)
    with pytest.warns(DenseWarning, match=beside.name) as caught, opened(copied) as x:
        assert not x.fasa.active
    assert len(caught) == 1
    assert beside.read_bytes() == content[: len(content) // 2]


def test_a_missing_profile(path: Path, tmp_path: Path) -> None:
    with pytest.raises(ProfileError, match=r"none\.gguf"):
        Llama(str(path), profile=tmp_path / "none.gguf")


@pytest.mark.parametrize("given", [None, False, "profile"])
def test_a_missing_model(given: Any, profile: Profile, tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match=r"none\.gguf does not exist; check the path\.$"):
        Llama(str(tmp_path / "none.gguf"), profile=profile if given == "profile" else given)


@pytest.mark.parametrize("given", [None, False, "profile"])
def test_a_file_that_is_no_model(given: Any, profile: Profile, tmp_path: Path) -> None:
    file = tmp_path / "text.gguf"
    file.write_text("This is no model.")
    with pytest.raises(ModelFileError, match=r"text\.gguf"):
        Llama(str(file), profile=profile if given == "profile" else given, verbose=False)


# ---- what makes decoding dense -------------------------------------------------------------------


def test_without_flash_attention(copied: Path, profile: Profile) -> None:
    profile.save(sidecar_path(copied))
    with pytest.raises(HostError, match="flash_attn is False, so there are no attention nodes"):
        Llama(str(copied), flash_attn=False, profile=profile)
    with pytest.warns(DenseWarning, match="flash_attn is False") as caught:
        x = Llama(str(copied), flash_attn=False, verbose=False, n_threads=2)
    assert len(caught) == 1
    with pytest.raises(RuntimeError, match="not attached to this context: flash_attn is False"):
        _ = x.fasa.counters
    x.eval(TOKENS[:9])
    with x.dense():
        found = decode(x, TOKENS[9:12])
    x.close()
    with opened_plain(copied, flash_attn=False) as plain:
        plain.eval(TOKENS[:9])
        assert np.array_equal(found, decode(plain, TOKENS[9:12]))


def test_settings_are_checked_without_flash_attention_too(copied: Path) -> None:
    with warned(), pytest.raises(ValueError, match="together exceed the budget 16"):
        Llama(str(copied), flash_attn=False, budget=16, verbose=False)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (
            {"rope_freq_base": 5000.0},
            "rope_freq_base is 5000.0, which changes the frequencies that the profile was calibrated with",
        ),
        ({"rope_freq_scale": 0.5}, r"rope_freq_scale is 0\.5, which changes the frequencies"),
        ({"kv_overrides": {"llama.rope.freq_base": 5000.0}}, r"rope\.?_?freq_base"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_other_frequencies(
    arguments: dict[str, Any], sentence: str, copied: Path, profile: Profile
) -> None:
    with pytest.raises(ProfileError, match=sentence):
        Llama(str(copied), profile=profile, verbose=False, **arguments)
    profile.save(sidecar_path(copied))
    with pytest.warns(DenseWarning, match=sentence) as caught, opened(copied, **arguments) as x:
        assert not x.fasa.active
    assert len(caught) == 1


def test_the_model_s_own_frequencies_may_be_named(path: Path, profile: Profile) -> None:
    arguments = {"rope_freq_base": 10000.0, "rope_freq_scale": 1.0}
    with opened(path, profile=profile, **arguments) as x:
        assert x.fasa.active


def test_vocab_only(copied: Path, profile: Profile) -> None:
    """There is nothing to decode, so nothing to warn about."""
    profile.save(sidecar_path(copied))
    with warned() as sentences, opened(copied, vocab_only=True) as x:
        assert x.tokenize(b"ab", add_bos=False)[-2:] == [3 + 97, 3 + 98]
        assert not x.fasa.active
    assert sentences == []


def test_a_lora_adapter_is_used_with_a_warning(
    path: Path, profile: Profile, tmp_path: Path
) -> None:
    adapter = tmp_path / "lora.gguf"
    w = gguf.GGUFWriter(adapter, "llama")
    w.add_type(gguf.GGUFType.ADAPTER)
    w.add_string(gguf.Keys.Adapter.TYPE, "lora")
    w.add_float32(gguf.Keys.Adapter.LORA_ALPHA, 4.0)
    rng = np.random.default_rng(0)
    width = NORM.n_head * NORM.head_dim
    for part, shape in (("a", (4, width)), ("b", (width, 4))):
        w.add_tensor(f"blk.0.attn_q.weight.lora_{part}", rng.normal(size=shape).astype(np.float32))
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    with pytest.warns(DenseWarning, match="calibrated without this LoRA adapter") as caught:
        x = Llama(str(path), profile=profile, lora_path=str(adapter), verbose=False)
    assert len(caught) == 1
    assert x.fasa.active
    x.close()


# ---- types of K and V ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["f16", "q8_0", "Q8_0"])
def test_type_names(name: str, path: Path, profile: Profile) -> None:
    with opened(path, profile=profile, type_k=name, type_v=KV_TYPES[name.lower()]) as x:
        assert x.context_params.type_k == x.context_params.type_v == KV_TYPES[name.lower()]


@pytest.mark.parametrize("value", ["q9_0", "", 2.5, b"f16"])
def test_unknown_type_names(value: Any, path: Path) -> None:
    with pytest.raises(ValueError, match=r"type_v is .* one of f32, f16, bf16, q8_0"):
        Llama(str(path), profile=False, type_v=value)


@pytest.mark.parametrize("value", [4, 9999, -1])
def test_type_ids_that_do_not_exist(value: int, path: Path) -> None:
    """In a process of its own: llama.cpp aborts on them."""
    code = (
        "import pyfasa, sys\n"
        f"try: pyfasa.Llama({str(path)!r}, profile=False, type_k={value}, verbose=False)\n"
        "except ValueError as error: sys.exit(str(error))\n"
    )
    root = Path(pyfasa.__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1, f"the process died with {done.returncode}"
    assert f"type_k is {value}" in done.stderr


@pytest.mark.parametrize("types", [("q4_0", "f16"), ("f16", "q4_0"), ("bf16", "bf16")], ids=str)
def test_types_without_a_kernel_are_dense(
    types: tuple[str, str], path: Path, profile: Profile
) -> None:
    arguments = {"type_k": KV_TYPES[types[0]], "type_v": KV_TYPES[types[1]]}
    with opened(path, profile=profile, budget=64, min_ctx=0, **arguments) as x:
        x.eval(TOKENS[:300])
        found = decode(x, TOKENS[300:])
        nodes = x.fasa.counters.nodes
    assert {name: n for name, n in nodes.items() if n} == {"prefill": 2, "kv_type": 2 * 10}
    with opened_plain(path, **arguments) as plain:
        plain.eval(TOKENS[:300])
        assert np.array_equal(found, decode(plain, TOKENS[300:]))


# ---- settings ------------------------------------------------------------------------------------


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
    ((name, value),) = arguments.items()
    with opened(path, profile=profile, n_fc=7) as x:
        before = [
            getattr(x.fasa, name) for name in ("budget", "n_fc", "min_ctx", "sinks", "recent")
        ]
        with pytest.raises(ValueError, match=sentence):
            setattr(x.fasa, name, value)
        after = [getattr(x.fasa, name) for name in ("budget", "n_fc", "min_ctx", "sinks", "recent")]
    assert before == after == [1024, 7, 2048, 4, 32]


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


# ---- the parent's own features -------------------------------------------------------------------


def check_equal_settings(one: Llama, two: Llama) -> None:
    assert type(one) is type(two) is Llama
    for name in ("budget", "n_fc", "min_ctx", "sinks", "recent", "enabled", "profile", "active"):
        assert getattr(one.fasa, name) == getattr(two.fasa, name), name
    assert one.context_params.type_k == two.context_params.type_k


@pytest.mark.parametrize("how", ["pickle", "deepcopy"])
def test_copies(how: str, path: Path, profile: Profile) -> None:
    def copy_of(x: Llama) -> Llama:
        return copy.deepcopy(x) if how == "deepcopy" else pickle.loads(pickle.dumps(x))

    settings = {"budget": 96, "n_fc": 9, "min_ctx": 11, "sinks": 1, "recent": 5, "type_k": "q8_0"}
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
        twin = copy.deepcopy(x)
        check_equal_settings(x, twin)
        twin.close()


def test_copies_of_dense_models(path: Path) -> None:
    with opened(path, profile=False) as x:
        twin = copy.deepcopy(x)
        assert twin.fasa.reason == "FASA is switched off: profile is False."
        twin.close()


def test_from_pretrained(path: Path, profile: Profile, monkeypatch: pytest.MonkeyPatch) -> None:
    hub, utils = ModuleType("huggingface_hub"), ModuleType("huggingface_hub.utils")

    class FileSystem:
        def ls(self, repo: str, recursive: bool) -> list[str]:
            return [f"{repo}/README.md", f"{repo}/random.gguf"]

    hub.HfFileSystem = FileSystem  # type: ignore[attr-defined]
    hub.hf_hub_download = lambda **_: str(path)  # type: ignore[attr-defined]
    utils.validate_repo_id = lambda _: None  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    monkeypatch.setitem(sys.modules, "huggingface_hub.utils", utils)
    x = Llama.from_pretrained(
        "someone/random", "*.gguf", profile=profile, budget=70, n_ctx=512, verbose=False
    )
    assert type(x) is Llama
    assert x.fasa.active
    assert x.fasa.budget == 70
    x.close()


def test_completion_and_streaming_below_min_ctx_are_those_of_the_parent(
    path: Path, profile: Profile
) -> None:
    prompt = TOKENS[:40]
    arguments: dict[str, Any] = {"max_tokens": 12, "temperature": 0.0}
    with opened_plain(path) as plain:
        wanted = plain.create_completion(prompt, **arguments)["choices"]
    with opened(path, profile=profile) as x:
        assert x.create_completion(prompt, **arguments)["choices"] == wanted
        parts = [c["choices"][0]["text"] for c in x(prompt, stream=True, **arguments)]
        assert x.fasa.counters.nodes["short_context"] > 0
    assert len(parts) > 1
    assert "".join(parts) == wanted[0]["text"]


def test_sparse_completion_goes_through_every_entry(llm: Any) -> None:
    prompt = TOKENS[:300]
    texts = []
    for stream in (False, True):
        llm.reset()
        llm.fasa.reset()
        answer = llm.create_completion(prompt, max_tokens=8, temperature=0.0, stream=stream)
        chunks = answer if stream else [answer]
        texts.append("".join(chunk["choices"][0]["text"] for chunk in chunks))
        # The first token comes from the prefill; broken UTF-8 at the end may cost some more.
        assert llm.fasa.counters.nodes["sparse"] >= 2 * 7
    assert texts[0] == texts[1]


def test_chat_finds_a_fact_sparsely(tiny_model_path: Path) -> None:
    """The bundled model, 600 tokens of text, 96 cells attended per head."""
    profile = bundled_profile(tiny_model_path)
    with opened(tiny_model_path, profile=profile, budget=96, min_ctx=0) as x:
        document = make_document(
            lambda text: x.tokenize(text.encode(), add_bos=False), 600, n_facts=1, seed=3
        )
        (fact,) = document.facts
        messages = ask(fact.question, document.text)
        answer = x.create_chat_completion(messages, max_tokens=24, temperature=0.0)
        text = answer["choices"][0]["message"]["content"]
        chunks = x.create_chat_completion(messages, max_tokens=24, temperature=0.0, stream=True)
        deltas = [chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks]
        counters = x.fasa.counters
    assert is_right(text, fact)
    assert "".join(deltas) == text
    assert counters.nodes["sparse"] > 6 * 10
    assert counters.share_attended < 0.17


def test_embeddings(path: Path, profile: Profile) -> None:
    with opened_plain(path, embedding=True) as plain:
        wanted = plain.embed("some text")
    with opened(path, profile=profile, embedding=True, budget=64, min_ctx=0) as x:
        assert np.array_equal(x.embed("some text"), wanted)
        assert x.create_embedding("some text")["data"][0]["embedding"] == wanted


def test_logits_of_all_tokens(path: Path, profile: Profile) -> None:
    with opened_plain(path, logits_all=True) as plain:
        plain.eval(TOKENS[:50])
        wanted = plain.scores[:50].copy()
    with opened(path, profile=profile, logits_all=True, budget=64, min_ctx=0) as x:
        x.eval(TOKENS[:50])
        assert np.array_equal(x.scores[:50], wanted)
        for token in TOKENS[50:53]:
            x.eval([token])
        assert np.isfinite(x.scores[50:53]).all()
        assert x.fasa.counters.nodes["sparse"] == 2 * 3


def test_a_draft_model_is_served_densely_when_it_asks_for_several_rows(
    path: Path, profile: Profile
) -> None:
    class Draft:
        def __call__(self, input_ids: Any, /, **_: Any) -> Any:
            return np.array([9, 9, 9], np.intc)

    with opened(path, profile=profile, draft_model=Draft(), budget=64, min_ctx=0) as x:
        stream = x.generate(TOKENS[:100], top_k=1, temp=0.0)
        assert len([token for token, _ in zip(stream, range(3), strict=False)]) == 3
        nodes = x.fasa.counters.nodes
        assert nodes["prefill"] > 2
        assert nodes["sparse"] == 0


def test_a_ram_cache(llm: Any) -> None:
    llm.set_cache(LlamaRAMCache())
    llm.fasa.verify = True
    texts = [
        llm.create_completion(prompt, max_tokens=4, temperature=0.0)["choices"][0]["text"]
        for prompt in (TOKENS[:200], TOKENS[100:300], TOKENS[:200])
    ]
    assert texts[0] == texts[2]
    assert llm.fasa.counters.verify_failures == 0
