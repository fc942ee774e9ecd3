"""The models of a server: one at a time is loaded, as a ``pyfasa.Llama`` that counts and can be stopped."""

from __future__ import annotations

import time
from collections.abc import Generator, Sequence
from contextlib import nullcontext
from types import FunctionType
from typing import Any, cast

import llama_cpp
from llama_cpp.llama_grammar import LlamaGrammar
from llama_cpp.server.model import LlamaProxy

from pyfasa.llama import Llama
from pyfasa.native import Counters
from pyfasa.server.clients import check_client
from pyfasa.server.errors import ModelUnusableError
from pyfasa.server.metrics import Metrics, State
from pyfasa.server.settings import ModelSettings

OURS = ("profile", "budget", "n_fc", "index_bits", "min_ctx", "max_rows", "sinks", "recent")


class ServedLlama(Llama):
    """A ``pyfasa.Llama`` that adds to metrics, and stops at the next batch once its client is gone."""

    def __init__(self, model_path: str, *, metrics: Metrics, **arguments: Any) -> None:
        self._metrics = metrics
        self._reading: bool | None = None  # while generating: its prompt; what follows is decoding
        self.counted: Counters | None = None  # as of the latest evaluation; None without FASA
        self._countable = False
        super().__init__(model_path, **arguments)
        self._countable = self.fasa.active
        self._count()

    def eval(self, tokens: Sequence[int]) -> None:
        many = len(tokens) > self.fasa.max_rows
        prompt = many if self._reading is None else self._reading
        if self._reading:
            self._reading = False
        # split here to look for the client in between; a last short part is still of a prompt
        with self.fasa.prefilling() if many else nullcontext():
            for i in range(0, len(tokens), self.n_batch):
                check_client()
                part = tokens[i : i + self.n_batch]
                start = time.perf_counter()
                super().eval(part)
                self._metrics.evaluated(len(part), time.perf_counter() - start, prompt)
                self._count()

    def generate(
        self, tokens: Sequence[int], *arguments: Any, **settings: Any
    ) -> Generator[int, Sequence[int] | None, None]:
        if settings.get("grammar") is not None:
            self._check_grammar(settings["grammar"])
        self._metrics.begin()
        self._reading = True
        made = super().generate(tokens, *arguments, **settings)
        more: Sequence[int] | None = None
        try:
            while True:
                token = made.send(more)
                self._metrics.generated += 1
                more = yield token
        except StopIteration:
            return
        finally:
            self._reading = None
            made.close()

    def close(self) -> None:
        counters, self.counted = self.counted, None
        if counters is not None:
            self._metrics.retire(counters)
        super().close()

    def _check_grammar(self, grammar: LlamaGrammar) -> None:
        """ValueError for a grammar that cannot be parsed, of which the parent's sampler would die."""
        text, root = grammar._grammar.encode(), grammar._root.encode()
        sampler = llama_cpp.llama_sampler_init_grammar(self._model.vocab, text, root)
        if not sampler:
            raise ValueError("The grammar cannot be parsed; it must be GBNF with a rule `root`.")
        llama_cpp.llama_sampler_free(sampler)

    def _count(self) -> None:
        # kept, because the core tells only between two graphs, and /metrics waits for nothing
        if self._countable:
            self.counted = self.fasa.counters


class _Maker:
    """Stands for the class ``llama_cpp.Llama`` where a model is made from settings."""

    def __init__(self, metrics: Metrics, ours: dict[str, Any]) -> None:
        self._ours = {"metrics": metrics} | ours

    def __call__(self, **arguments: Any) -> ServedLlama:
        return ServedLlama(**self._known(arguments))

    def from_pretrained(self, **arguments: Any) -> ServedLlama:
        return cast("ServedLlama", ServedLlama.from_pretrained(**self._known(arguments)))

    def _known(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """Without two arguments of older versions, which llama_cpp.Llama would ignore and ours would refuse."""
        del arguments["mul_mat_q"]
        if arguments["rpc_servers"] is None:
            del arguments["rpc_servers"]
        return arguments | self._ours


class _LlamaCpp:
    """The module ``llama_cpp`` with another ``Llama``."""

    def __init__(self, maker: _Maker) -> None:
        self.Llama = maker

    def __getattr__(self, name: str) -> Any:
        return getattr(llama_cpp, name)


class Models(LlamaProxy):
    """llama-cpp-python's own choice of models by alias, with ``pyfasa.Llama`` for each."""

    def __init__(self, models: list[ModelSettings], metrics: Metrics) -> None:
        self._metrics = metrics
        super().__init__(models=list(models))

    def load_llama_from_model_settings(self, settings: Any) -> ServedLlama:  # type: ignore[override]
        """The model of these settings; ModelUnusableError where there is none."""
        ours = {name: getattr(settings, name) for name in OURS}
        # The parent names llama_cpp.Llama. Its code runs here with another meaning of that name, so that nothing
        # is patched for the rest of the process.
        parent = LlamaProxy.load_llama_from_model_settings
        names = parent.__globals__ | {"llama_cpp": _LlamaCpp(_Maker(self._metrics, ours))}
        load = FunctionType(parent.__code__, names, parent.__name__)
        try:
            return cast("ServedLlama", load(settings))
        except (ValueError, AssertionError) as error:  # not the fault of a request
            raise ModelUnusableError(f"{settings.model} cannot be served: {error}") from error

    @property
    def loaded(self) -> ServedLlama | None:
        """The model in memory, if any."""
        return cast("ServedLlama | None", getattr(self, "_current_model", None))

    @property
    def loaded_alias(self) -> str | None:
        """Its name for clients."""
        return self._current_model_alias if self.loaded is not None else None

    def state(self) -> State:
        """What metrics tell about the loaded model."""
        llm = self.loaded
        if llm is None:
            return State()
        return State(llm.counted, llm.fasa.active, llm.n_tokens, llm.n_ctx())
