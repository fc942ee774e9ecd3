"""The training recipe: what PyTorch computes is what llama.cpp computes from the exported file."""

from __future__ import annotations

import os
import random
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

torch = pytest.importorskip("torch", reason="the training recipe needs PyTorch")
pytest.importorskip("tokenizers", reason="the training recipe needs tokenizers")
llama_cpp = pytest.importorskip("llama_cpp")

# The recipe is no part of the wheel. Appended, so that an installed pyfasa still comes first.
sys.path.append(str(Path(__file__).parents[1]))

from tokenizers import Tokenizer  # noqa: E402

from models.recipe import text, train  # noqa: E402
from models.recipe.checkpoint import Checkpoint, Stage  # noqa: E402
from models.recipe.export import export, read_gguf  # noqa: E402
from models.recipe.model import VARIANTS, Config, Model, rope_tables  # noqa: E402
from models.recipe.samples import (  # noqa: E402
    ASSISTANT,
    END,
    USER,
    Samples,
    document_with_facts,
)
from pyfasa.documents import make_document  # noqa: E402

BUNDLED = Path(__file__).parents[1] / "models" / "pyfasa-tiny-12m-Q8_0.gguf"
PROMPT = (
    "<|im_start|>user\nimport os\n\nThe secret code for amber falcon is 48213.\n\ndef main():\n"
    "    return 0\n\n\nWhat is the secret code for amber falcon?<|im_end|>\n"
    "<|im_start|>assistant\n"
)

# NMSE of logits. F32 differs by the order of sums; F16 and Q8_0 also round activations.
LIMIT = {"f32": 1e-9, "f16": 1e-4, "q8_0": 2e-3}

Logits = npt.NDArray[np.float32]


def nmse(values: Logits, reference: Logits) -> float:
    return float(np.mean((values - reference) ** 2) / np.mean(reference**2))


def llama_cpp_logits(path: Path, tokens: list[int]) -> Logits:
    """Logits [n_tokens, n_vocab] from llama.cpp with an F32 KV cache."""
    f32 = llama_cpp.GGML_TYPE_F32
    llm = llama_cpp.Llama(
        str(path),
        n_ctx=512,
        n_threads=1,
        n_threads_batch=1,
        n_gpu_layers=0,
        logits_all=True,
        type_k=f32,
        type_v=f32,
        verbose=False,
    )
    llm.eval(tokens)
    logits = np.array(llm.scores[: len(tokens)])
    llm.close()
    return logits


def torch_logits(model: Model, tokens: list[int]) -> Logits:
    with torch.no_grad():
        logits = model(torch.tensor([tokens]), rope_tables(model.config, len(tokens)))
    return np.asarray(logits[0])


def toy_config(variant: str) -> Config:
    return replace(
        VARIANTS[variant], n_layer=2, n_embd=64, n_head=4, n_head_kv=2, head_dim=32, n_ff=96
    )


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Threads of these small products would only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    """A folder of made-up text, large enough for documents of 128 tokens."""
    folder = tmp_path / "texts"
    folder.mkdir()
    words = ("for", "name", "in", "list", "of", "open", "files", "read", "line", "return", "number")
    rng = random.Random(1)
    for i in range(3):
        (folder / f"{i}.txt").write_text(" ".join(rng.choices(words, k=2000)))
    return folder


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> None:
    for variant in VARIANTS:
        monkeypatch.setitem(VARIANTS, variant, toy_config(variant))


def run(out: Path, texts: Path, *options: str, stage: str = "128x4x6") -> int:
    fixed = ["--out", str(out), "--text", str(texts), "--stage", stage, "--device", "cpu"]
    return train.main([*fixed, "--workers", "0", "--log-every", "1", *options])


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("weight_type", LIMIT)
def test_llama_cpp_computes_the_exported_model(
    variant: str, weight_type: str, tmp_path: Path
) -> None:
    torch.manual_seed(3)
    model = Model(toy_config(variant))
    with torch.no_grad():
        for weight in model.parameters():
            # Untrained weights attend evenly, and a wrong rotation would hardly show.
            weight.mul_(8) if weight.ndim > 1 else weight.mul_(torch.rand_like(weight) + 0.5)
    path = tmp_path / "toy.gguf"
    export(model, path, name="toy", n_ctx=256, weight_type=weight_type)
    stored = read_gguf(path)
    assert stored.config == replace(model.config, norm_eps=stored.config.norm_eps)

    tokens = np.random.default_rng(5).integers(3, 4096, 100).tolist()
    reference = torch_logits(stored, tokens)
    assert nmse(llama_cpp_logits(path, tokens), reference) < LIMIT[weight_type]

    other = Model(replace(stored.config, rope_freq_base=1000.0))
    other.load_state_dict(stored.state_dict())
    assert nmse(torch_logits(other, tokens), reference) > 10 * LIMIT[weight_type]


def test_bundled_model_is_the_recipes_model(tmp_path: Path) -> None:
    model = read_gguf(BUNDLED)
    config = VARIANTS["tiny-12m"]
    assert model.config == replace(config, norm_eps=model.config.norm_eps)
    encoder = Tokenizer.from_file(str(text.TOKENIZER))
    document = make_document(lambda part: encoder.encode(part).ids, 400, 2, seed=3)
    fact = document.facts[1]
    prompt = f"{USER}{document.text}\n\n{fact.question}{END}{ASSISTANT}"
    answer = encoder.encode(fact.answer + END).ids
    tokens = [*encoder.encode(prompt).ids, *answer]
    reference = torch_logits(model, tokens)
    q8_0 = llama_cpp_logits(BUNDLED, tokens)
    assert nmse(q8_0, reference) < LIMIT["q8_0"]
    for logits in (reference, q8_0):
        assert logits[-len(answer) - 1 : -1].argmax(-1).tolist() == answer

    exact = tmp_path / "f32.gguf"
    export(model, exact, name="tiny", n_ctx=32768, weight_type="f32")
    assert nmse(llama_cpp_logits(exact, tokens), reference) < LIMIT["f32"]


def test_llama_cpp_tokenizes_and_templates_as_training_did(tmp_path: Path) -> None:
    path = tmp_path / "toy.gguf"
    export(Model(toy_config("tiny-12m")), path, name="toy", n_ctx=256, weight_type="f16")
    llm = llama_cpp.Llama(str(path), vocab_only=True, verbose=False)
    tokens = llm.tokenize(PROMPT.encode(), add_bos=True, special=True)
    assert tokens == Tokenizer.from_file(str(text.TOKENIZER)).encode(PROMPT).ids
    bundled = llama_cpp.Llama(str(BUNDLED), vocab_only=True, verbose=False)
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    rendered = [
        llama_cpp.llama_chat_format.Jinja2ChatFormatter(
            template=one.metadata["tokenizer.chat_template"], eos_token="", bos_token=""
        )(messages=messages).prompt
        for one in (llm, bundled)
    ]
    assert rendered[0] == rendered[1]


def test_training_learns_and_exports(
    toy: None, texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert run(out, texts, "--learning-rate", "0.1", stage="128x4x12") == 0
    losses = [
        float(line.split("loss ")[1].split(",")[0])
        for line in capsys.readouterr().out.splitlines()
        if line.startswith("step")
    ]
    assert len(losses) == 12
    assert losses[-1] < losses[0] - 0.5
    path = out / "pyfasa-tiny-12m-Q8_0.gguf"
    saved = Checkpoint.load(out / train.CHECKPOINT)
    assert saved.step == 12
    trained = Model(saved.config)
    trained.load_state_dict(saved.model)
    tokens = list(range(10, 60))
    reference = torch_logits(trained.eval(), tokens)
    assert nmse(llama_cpp_logits(path, tokens), reference) < 10 * LIMIT["q8_0"]
    assert not list(out.glob("*.partial*"))


def test_resumed_run_ends_as_an_unbroken_one(
    toy: None, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert run(whole, texts, "--save-every", "2") == 0

    step = train.Run.train_step

    def interrupted(self: train.Run, *args: Any) -> Any:
        if self.step == 5:
            raise KeyboardInterrupt
        return step(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(train.Run, "train_step", interrupted)
        assert run(broken, texts, "--save-every", "2") == 130
    assert Checkpoint.load(broken / train.CHECKPOINT).step == 4
    assert run(broken, texts, "--resume") == 0

    ends = [Checkpoint.load(out / train.CHECKPOINT).model for out in (whole, broken)]
    for name, weight in ends[0].items():
        torch.testing.assert_close(weight, ends[1][name], msg=name)


def test_document_holds_its_facts_and_asks_for_them(texts: Path, tmp_path: Path) -> None:
    text.prepare([texts], tmp_path)
    encoder = Tokenizer.from_file(str(text.TOKENIZER))
    tokens = text.load(tmp_path / text.TRAIN, 1)
    for seed in range(20):
        sample = document_with_facts(
            random.Random(seed), tokens, 512, lambda t: encoder.encode(t).ids
        )
        assert len(sample.tokens) == 513
        assert len(sample.weight) == len(sample.answer) == 512
        whole = encoder.decode(sample.tokens.tolist(), skip_special_tokens=False)
        document, *turns = whole.split("<|im_start|>assistant\n")
        answers = [turn.split("<|im_end|>")[0] for turn in turns]
        marked = encoder.decode(sample.tokens[1:][sample.answer].tolist())
        assert marked == "".join(answers)
        for answer in answers:
            value = "".join(c for c in answer if c.isdigit())
            assert value in document
        assert text.END_OF_TEXT not in sample.tokens


def test_samples_depend_on_seed_and_index_alone(texts: Path, tmp_path: Path) -> None:
    text.prepare([texts], tmp_path)
    path = tmp_path / text.TRAIN
    one, again, other = (Samples(path, 128, seed) for seed in (1, 1, 2))
    third, seventh = one[3], one[7]
    assert again[7].tokens.equal(seventh.tokens)
    assert again[3].tokens.equal(third.tokens)
    assert not other[7].tokens.equal(seventh.tokens)


@pytest.mark.parametrize(
    ("option", "value", "sentence"),
    [
        ("--text", "nowhere", "nowhere is not a folder"),
        ("--suffix", ".none", "no text found: no file ending in .none"),
        ("--stage", "2048", "stage '2048' is not CONTEXTxBATCHxSTEPS"),
        ("--stage", "32768x1x1", "tokens of text and one document takes 32769"),
        ("--device", "tpu9", "device 'tpu9' is not known; choose cpu"),
        ("--stage", "16x1x1", "a context of 16 tokens is too short"),
    ],
)
def test_mistakes_are_answered_with_a_sentence(
    option: str,
    value: str,
    sentence: str,
    toy: None,
    texts: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = {"--out": str(tmp_path / "run"), "--text": str(texts), "--stage": "128x1x1"}
    arguments |= {"--device": "cpu", "--workers": "0", option: value}
    assert train.main([word for pair in arguments.items() for word in pair]) == 1
    assert sentence in capsys.readouterr().err


def test_folder_of_another_run_is_left_alone(
    texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(os.listdir(texts))
    assert run(texts, texts) == 1
    assert "exists already; add --resume" in capsys.readouterr().err
    assert run(texts, texts, "--resume") == 1
    assert "is not there; train first" in capsys.readouterr().err
    (texts / train.CHECKPOINT).write_bytes(b"not a checkpoint")
    assert run(texts, texts, "--resume") == 1
    assert "is not a checkpoint of this recipe" in capsys.readouterr().err
    assert sorted(os.listdir(texts)) == sorted([*before, train.CHECKPOINT])


def test_stage_is_read_as_it_is_written() -> None:
    assert Stage.parse("2048x64x3000") == Stage(2048, 64, 3000)
    assert str(Stage(2048, 64, 3000)) == "2048x64x3000"
