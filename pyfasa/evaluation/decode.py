"""One model under one setting after another: documents read once, questions once, answers under each setting."""

from __future__ import annotations

import codecs
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from pyfasa.console import cells_read, chat_tokens
from pyfasa.errors import HostError
from pyfasa.evaluation.selectors import WINDOW, Selector
from pyfasa.evaluation.settings import Setting
from pyfasa.evaluation.tasks import Case
from pyfasa.identity import ModelIdentity
from pyfasa.profile import Profile
from pyfasa.samples import captured_layer

if TYPE_CHECKING:
    from pyfasa.handle import Fasa
    from pyfasa.llama import Llama

QUESTION = WINDOW + 8  # tokens that are read per question at least: more than a batch of decoding

Observed = dict[int, tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]]


@dataclass(frozen=True)
class Answer:
    """text; n_steps: decode steps; attended: share of the visible cells that they read, 1 when dense."""

    text: str
    n_steps: int
    attended: float


def prompt_of(llm: Llama, case: Case) -> list[int]:
    """Tokens of a case in the model's chat template; as question and answer if it has none."""
    text = f"{case.document}\n\n{case.question}" if case.document else case.question
    if "tokenizer.chat_template" not in llm.metadata:
        start = f"{case.document}\n\n" if case.document else ""
        text = f"{start}Question: {case.question}\nAnswer:"
    return list(chat_tokens(llm, text))


def shared_prefix(prompts: Sequence[Sequence[int]]) -> int:
    """Tokens that all prompts begin with, but for the last ones, which are read with the question."""
    short = min(map(len, prompts))
    first = prompts[0]
    unequal = (i for i in range(short) if any(prompt[i] != first[i] for prompt in prompts))
    return max(0, min(next(unequal, short), short - 1 - QUESTION))


def read(llm: Llama, tokens: Sequence[int], start: int) -> None:
    """Evaluates tokens after the first `start` cells, dense, and drops what was behind them."""
    llm.n_tokens = start
    with llm.dense():
        llm.eval(tokens)


def read_observed(llm: Llama, tokens: Sequence[int], start: int) -> Observed:
    """Likewise; returns the queries of `tokens` and all keys of each layer, for selectors that observe."""
    llm.n_tokens = start
    with llm.dense(), llm.fasa.capturing() as session:
        session.captured_clear()
        llm.eval(tokens)
    found: Observed = {}
    for layer in range(n_layer(llm)):
        if (own := captured_layer(session, layer, llm.n_tokens)) is not None:
            found[layer] = own
    session.captured_clear()
    return found


def n_layer(llm: Llama) -> int:
    import llama_cpp

    return int(llama_cpp.llama_model_n_layer(llm.model))


def logits(llm: Llama, row: int = -1) -> npt.NDArray[np.float32]:
    """Logits of a row of the last batch; a view that the next batch overwrites."""
    import llama_cpp

    pointer = llama_cpp.llama_get_logits_ith(llm.ctx, row)
    found: npt.NDArray[np.float32] = np.ctypeslib.as_array(pointer, shape=(llm.n_vocab(),))
    return found


def answer(llm: Llama, prompt: Sequence[int], max_tokens: int, one_line: bool) -> Answer:
    """Greedy, from the prompt's last token on, which is a decode step too; the cells before it must be there."""
    import llama_cpp

    vocabulary = llama_cpp.llama_model_get_vocab(llm.model)
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    old = llm.fasa.counters
    llm.n_tokens = len(prompt) - 1
    token, text = prompt[-1], ""
    made: list[int] = []
    while len(made) < max_tokens and llm.n_tokens < llm.n_ctx():
        llm.eval([token])
        token = int(np.argmax(logits(llm)))
        made.append(token)
        if llama_cpp.llama_vocab_is_eog(vocabulary, token):
            break
        text += decoder.decode(llm.detokenize([token], prev_tokens=[prompt[-1], *made[:-1]]))
        if one_line and "\n" in text.lstrip():
            text = text.lstrip().split("\n")[0]
            break
    return Answer(text.strip(), len(made), attended(old, llm.fasa.counters))


def attended(old: Any, new: Any) -> float:
    """Share of the visible cells that attention read between two states of the counters."""
    nodes = {k: n - old.nodes.get(k, 0) for k, n in new.nodes.items() if k != "prefill"}
    visible = new.cells_visible - old.cells_visible
    return cells_read(nodes, visible, new.cells_attended - old.cells_attended)


@contextmanager
def applied(llm: Llama, setting: Setting, observed: Observed | None) -> Iterator[None]:
    """Inside the block decoding is that of a setting.

    Raises HostError if attention would stay dense, ProfileError if a profile is not for this model.
    """
    fasa = llm.fasa
    fasa.enabled = False
    if setting.budget is None:
        yield
        return
    profile = setting.profile or carrier(llm.model_path)
    fasa.n_fc = fasa.index_bits = None
    if fasa.profile is not profile:
        fasa.use(profile)
    fasa.budget = setting.budget
    fasa.min_ctx = setting.budget
    fasa.enabled = True
    if not fasa.active:
        raise HostError(
            f"the setting {setting.label!r} cannot be measured, because attention stays dense: "
            f"{fasa.reason}"
        )
    selector = setting.selector
    if selector is not None:
        begin(selector, setting.budget, observed)
    with nullcontext() if selector is None else fasa.scoring(selector):
        yield


def begin(selector: Selector, budget: int, observed: Observed | None) -> None:
    """What a selector gets before an answer."""
    selector.start(budget)
    if selector.observes:
        for layer, (queries, keys) in (observed or {}).items():
            selector.observe(layer, queries, keys)


@lru_cache(maxsize=4)
def carrier(model_path: str) -> Profile:
    """The profile under a selector: the native path wants one, though its index is not read.

    One chunk of 2 bits per KV head, the least that makes every layer sparse.
    """
    import pyfasa

    identity = ModelIdentity.read(model_path)
    chunks = np.zeros((identity.n_layer, identity.n_head_kv, 1), np.uint16)
    return Profile(
        identity=identity, chunks=chunks, bits=np.full(chunks.shape, 2, np.uint8), center=None,
        scale=None, n_fc=1, method="none", data_name="", data_sha256="", n_ctx=0, n_queries=0,
        seed=0, created_by=f"pyfasa {pyfasa.__version__}",
    )  # fmt: skip


@contextmanager
def restored(fasa: Fasa) -> Iterator[None]:
    """Gives llm.fasa its profile and settings back after the block, also after an error."""
    profile, enabled, given = fasa.profile, fasa.enabled, fasa.arguments()
    try:
        yield
    finally:
        if fasa.profile is not profile:
            fasa.n_fc = None
            fasa.use(profile)
        for name in ("budget", "n_fc", "index_bits", "min_ctx"):
            setattr(fasa, name, given[name])
        fasa.enabled = enabled
