"""pyfasa.patch(): code that constructs its own llama_cpp.Llama gets pyfasa.Llama, and frameworks do."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import llama_cpp
import pytest

import pyfasa
from pyfasa.documents import Document, ask, is_right, make_document
from support import decode, random_tokens

PLAIN = llama_cpp.Llama
SETTINGS = {"budget": 256, "min_ctx": 512}


@pytest.fixture(autouse=True)
def unpatched() -> Iterator[None]:
    yield
    if llama_cpp.Llama is not PLAIN:
        pyfasa.unpatch()
    assert llama_cpp.Llama is PLAIN


@pytest.fixture(scope="module")
def document(tiny_model_path: Path) -> Document:
    llm = PLAIN(str(tiny_model_path), vocab_only=True, verbose=False)
    made = make_document(lambda t: llm.tokenize(t.encode(), add_bos=False), 2000, 10, seed=5)
    llm.close()
    return made


def test_the_name_means_pyfasa_until_it_is_undone() -> None:
    pyfasa.patch()
    assert llama_cpp.Llama is pyfasa.Llama
    assert llama_cpp.llama.Llama is pyfasa.Llama
    pyfasa.unpatch()
    assert llama_cpp.Llama is PLAIN
    assert llama_cpp.llama.Llama is PLAIN


def test_modules_that_imported_the_name_before() -> None:
    module = ModuleType("took_it_before")
    module.Llama = module.Model = PLAIN  # type: ignore[attr-defined]
    module.ours = pyfasa.Llama  # type: ignore[attr-defined]
    sys.modules[module.__name__] = module
    try:
        with pyfasa.patch():
            assert module.Llama is module.Model is pyfasa.Llama
        assert module.Llama is module.Model is PLAIN
        assert module.ours is pyfasa.Llama
    finally:
        del sys.modules[module.__name__]


def test_an_error_in_the_block_undoes_it() -> None:
    with pytest.raises(KeyError), pyfasa.patch():
        raise KeyError
    assert llama_cpp.Llama is PLAIN


def test_once_only() -> None:
    with pyfasa.patch() as patch:
        with pytest.raises(RuntimeError, match="already; call"):
            pyfasa.patch()
        patch.undo()
        patch.undo()
        assert llama_cpp.Llama is PLAIN
    with pytest.raises(RuntimeError, match="nothing to undo"):
        pyfasa.unpatch()


def test_a_model_made_while_patched(path: Path, profile: pyfasa.Profile) -> None:
    tokens = random_tokens(12)
    with pyfasa.patch():
        arguments: dict[str, Any] = {"profile": profile, "budget": 36, "min_ctx": 1}
        llm = llama_cpp.Llama(str(path), n_ctx=256, verbose=False, **arguments)
        llama_cpp.Llama(str(path), n_parts=-1, f16_kv=True, vocab_only=True, verbose=False).close()
        with pytest.raises(TypeError, match="Unknown argument n_contex"):
            llama_cpp.Llama(str(path), n_contex=256)  # type: ignore[call-arg]
    decode(llm, tokens)
    assert isinstance(llm, pyfasa.Llama)
    assert llm.fasa.counters.nodes["sparse"] > 0
    llm.close()


# ---- frameworks, where they are installed --------------------------------------------------------------------------


def check(llm: object, answer: str, document: Document) -> None:
    assert isinstance(llm, pyfasa.Llama)
    assert is_right(answer, document.facts[3]), answer
    assert llm.fasa.counters.nodes["sparse"] > 0


def test_langchain(tiny_model_path: Path, document: Document) -> None:
    community = pytest.importorskip("langchain_community.chat_models")
    with pyfasa.patch():
        chat = community.ChatLlamaCpp(
            model_path=str(tiny_model_path), n_ctx=2500, n_batch=512, temperature=0.0, max_tokens=24, verbose=False,
            repeat_penalty=1.0, rope_freq_base=0.0, rope_freq_scale=0.0, model_kwargs=SETTINGS,
        )  # fmt: skip
    question = ask(document.facts[3].question, document.text)[0]["content"]
    check(chat.client, str(chat.invoke(question).content), document)


def test_llama_index(tiny_model_path: Path, document: Document) -> None:
    integration = pytest.importorskip("llama_index.llms.llama_cpp")
    with pyfasa.patch():
        llm = integration.LlamaCPP(
            model_path=str(tiny_model_path), context_window=2500, max_new_tokens=24, temperature=0.0, verbose=False,
            model_kwargs=SETTINGS,
        )  # fmt: skip
    question = ask(document.facts[3].question, document.text)[0]["content"]
    prompt = f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
    check(llm._model, llm.complete(prompt, formatted=True).text, document)


def test_guidance_takes_an_instance(tiny_model_path: Path, document: Document) -> None:
    guidance = pytest.importorskip("guidance")
    llm = pyfasa.Llama(str(tiny_model_path), n_ctx=2500, verbose=False, logits_all=True, **SETTINGS)  # type: ignore[arg-type]
    model = guidance.models.LlamaCpp(llm, echo=False)
    text = ask(document.facts[3].question, document.text)[0]["content"]
    with guidance.user():
        model += text
    with guidance.assistant():
        model += guidance.gen("answer", max_tokens=24, temperature=0)
    check(llm, str(model["answer"]), document)


def test_outlines_takes_an_instance(tiny_model_path: Path, document: Document) -> None:
    outlines = pytest.importorskip("outlines")
    llm = pyfasa.Llama(str(tiny_model_path), n_ctx=2500, verbose=False, **SETTINGS)  # type: ignore[arg-type]
    model = outlines.from_llamacpp(llm)
    text = ask(document.facts[3].question, document.text)[0]["content"]
    reply = model(
        outlines.inputs.Chat([{"role": "user", "content": text}]), max_tokens=24, temperature=0
    )
    check(llm, str(reply), document)
