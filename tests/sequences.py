"""Contexts with several sequences through the low-level API, plain or decorated, and the same calls on four of them."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import llama_cpp
import numpy as np
from llama_cpp._logger import set_verbose

from pyfasa import Profile
from pyfasa.llama import kv_type
from pyfasa.native import Config, Counters, Session
from support import F32, MAX_NMSE, N_VOCAB, Shape, nmse, random_profile, write_model

ALL = -1  # every sequence, where llama.cpp takes that


class Row(NamedTuple):
    """A token of a batch."""

    token: int
    pos: int
    seq_ids: tuple[int, ...] = (0,)
    wants_logits: bool = True


class RefusedError(Exception):
    """llama.cpp did not do what it was asked for; the text is its code."""


@dataclass(frozen=True)
class Setup:
    """How a context is made. Streams (unified=False) have n_ctx / n_seq_max cells each."""

    n_seq_max: int = 1
    unified: bool = True
    type_k: str = "f16"
    type_v: str = "f16"
    n_ctx: int = 512
    n_batch: int = 512
    n_threads: int = 1

    def params(self) -> Any:
        """As llama_context_params; flash attention is what pyfasa replaces."""
        p = llama_cpp.llama_context_default_params()
        p.n_ctx = self.n_ctx
        p.n_batch = p.n_ubatch = self.n_batch
        p.n_seq_max = self.n_seq_max
        p.kv_unified = self.unified
        p.n_threads = p.n_threads_batch = self.n_threads
        p.type_k = kv_type(self.type_k, "type_k")
        p.type_v = kv_type(self.type_v, "type_v")
        p.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED
        return p


@dataclass
class Context:
    """A live context; a session is what decorates it. Free with close()."""

    model: Any
    setup: Setup
    session: Session | None = None
    _ctx: Any = field(init=False)
    _batch: Any = field(init=False)

    def __post_init__(self) -> None:
        with self.session.armed() if self.session else nullcontext():
            self._ctx = llama_cpp.llama_init_from_model(self.model, self.setup.params())
        assert self._ctx, "llama.cpp made no context"
        self._batch = llama_cpp.llama_batch_init(self.setup.n_batch, 0, self.setup.n_seq_max)

    def close(self) -> None:
        """Frees everything but the model."""
        llama_cpp.llama_batch_free(self._batch)
        llama_cpp.llama_free(self._ctx)
        if self.session is not None:
            self.session.close()

    # ---- decoding ----

    def decode(self, rows: Sequence[Row]) -> F32:
        """Logits of the rows that want them: (n, n_vocab)."""
        batch = self._batch
        batch.n_tokens = len(rows)
        for i, row in enumerate(rows):
            batch.token[i] = row.token
            batch.pos[i] = row.pos
            batch.n_seq_id[i] = len(row.seq_ids)
            for j, seq in enumerate(row.seq_ids):
                batch.seq_id[i][j] = seq
            batch.logits[i] = row.wants_logits
        code = llama_cpp.llama_decode(self._ctx, batch)
        if code != 0:
            raise RefusedError(f"decode {code}")
        found = [
            np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(self._ctx, i), (N_VOCAB,)).copy()
            for i, row in enumerate(rows)
            if row.wants_logits
        ]
        return np.array(found, np.float32).reshape(-1, N_VOCAB)

    def feed(self, seq: int, tokens: Sequence[int]) -> F32:
        """Appends tokens to a sequence in one batch; logits of the last: (1, n_vocab)."""
        first = self.end(seq)
        last = len(tokens) - 1
        return self.decode([Row(t, first + i, (seq,), i == last) for i, t in enumerate(tokens)])

    def step(self, tokens: dict[int, int]) -> F32:
        """Appends one token to each of the sequences, in one batch: (n, n_vocab)."""
        return self.decode([Row(t, self.end(seq), (seq,)) for seq, t in tokens.items()])

    # ---- the cache ----

    @property
    def _memory(self) -> Any:
        return llama_cpp.llama_get_memory(self._ctx)

    def end(self, seq: int) -> int:
        """The position after the last one of a sequence."""
        return int(llama_cpp.llama_memory_seq_pos_max(self._memory, seq)) + 1

    def spans(self) -> list[tuple[int, int]]:
        """First and last position of every sequence; -1 for none."""
        ask = (llama_cpp.llama_memory_seq_pos_min, llama_cpp.llama_memory_seq_pos_max)
        return [
            (int(ask[0](self._memory, seq)), int(ask[1](self._memory, seq)))
            for seq in range(self.setup.n_seq_max)
        ]

    def remove(self, seq: int, first: int = -1, last: int = -1) -> None:
        """Removes positions first <= p < last."""
        if not llama_cpp.llama_memory_seq_rm(self._memory, seq, first, last):
            raise RefusedError("seq_rm")

    def copy(self, source: int, target: int, first: int = -1, last: int = -1) -> None:
        """Positions of one sequence into another one; between streams all or nothing."""
        llama_cpp.llama_memory_seq_cp(self._memory, source, target, first, last)

    def keep(self, seq: int) -> None:
        """Only this sequence is left."""
        llama_cpp.llama_memory_seq_keep(self._memory, seq)

    def shift(self, seq: int, first: int, last: int, delta: int) -> None:
        """Moves positions by delta; K is rotated at the next decode."""
        llama_cpp.llama_memory_seq_add(self._memory, seq, first, last, delta)

    def divide(self, seq: int, first: int, last: int, divisor: int) -> None:
        """Divides positions; K is rotated at the next decode."""
        llama_cpp.llama_memory_seq_div(self._memory, seq, first, last, divisor)

    def clear(self, *, data: bool = False) -> None:
        """Forgets all sequences; with data the cells are zeroed as well."""
        llama_cpp.llama_memory_clear(self._memory, data)

    def saved(self, seq: int = ALL) -> bytes:
        """The state of one sequence or of all."""
        if seq == ALL:
            size = llama_cpp.llama_state_get_size(self._ctx)
            data = (ctypes.c_uint8 * size)()
            written = llama_cpp.llama_state_get_data(self._ctx, data, size)
        else:
            size = llama_cpp.llama_state_seq_get_size(self._ctx, seq)
            data = (ctypes.c_uint8 * size)()
            written = llama_cpp.llama_state_seq_get_data(self._ctx, data, size, seq)
        if written != size:
            raise RefusedError(f"state {written} of {size}")
        return bytes(data)

    def load(self, state: bytes, seq: int = ALL) -> None:
        """A state of one sequence into a sequence, or a state of all."""
        data = (ctypes.c_uint8 * len(state)).from_buffer_copy(state)
        if seq == ALL:
            read = llama_cpp.llama_state_set_data(self._ctx, data, len(state))
        else:
            read = llama_cpp.llama_state_seq_set_data(self._ctx, data, len(state), seq)
        if read != len(state):
            raise RefusedError(f"state read {read} of {len(state)}")

    # ---- pyfasa ----

    @property
    def counters(self) -> Counters:
        """Of the session, which must be there."""
        assert self.session is not None
        return self.session.counters()


class Model(NamedTuple):
    """A loaded random model and two profiles of it."""

    pointer: Any
    shape: Shape
    profile: Profile
    other_profile: Profile


@contextmanager
def loaded_file(path: Path, shape: Shape) -> Iterator[Model]:
    """A model file of that shape, with random profiles."""
    set_verbose(False)
    pointer = llama_cpp.llama_model_load_from_file(
        str(path).encode(), llama_cpp.llama_model_default_params()
    )
    assert pointer, f"llama.cpp cannot read {path}"
    try:
        yield Model(pointer, shape, random_profile(path), random_profile(path, seed=1))
    finally:
        llama_cpp.llama_model_free(pointer)


@contextmanager
def loaded(shape: Shape, folder: Path) -> Iterator[Model]:
    """A random model, written into the folder."""
    with loaded_file(write_model(folder / f"{shape}.gguf", shape), shape) as model:
        yield model


@contextmanager
def context(
    model: Model, config: Config | None = None, profile: Profile | None = None, **setup: Any
) -> Iterator[Context]:
    """A context: plain without a config, else decorated, with the model's first profile or another one."""
    session = None if config is None else Session(profile or model.profile, config)
    live = Context(model.pointer, Setup(**setup), session)
    try:
        yield live
    finally:
        live.close()


# ---- the same calls on several contexts ----

# More than any cell that these tests fill: the selection is everything.
FULL = Config(budget=8192, min_ctx=0, verify=True)
NARROW = Config(budget=48, min_ctx=0, sinks=2, recent=8, verify=True)


@dataclass
class Compared:
    """One call on four contexts: their logits agree as far as they must.

    plain is llama.cpp's own. full attends to every visible cell, so its logits are those of plain up to rounding.
    narrow leaves most cells out, so a stale or misplaced index entry changes its logits; rebuilt is like narrow, but
    its index is made anew for every graph: their bits are equal.
    """

    plain: Context
    full: Context
    narrow: Context
    rebuilt: Context
    bound: float
    worst: float = 0.0  # largest error of a row so far
    logits: list[F32] = field(default_factory=list)  # of all four, as they were last

    @property
    def dense(self) -> F32:
        """The last logits of plain."""
        return self.logits[0]

    def do(self, call: Callable[[Context], Any]) -> Any:
        """What the call returns of narrow; RefusedError when llama.cpp refuses it, by all alike."""
        assert self.rebuilt.session is not None
        self.rebuilt.session.invalidate()
        contexts = (self.plain, self.full, self.narrow, self.rebuilt)
        results, refusals = zip(*(_attempt(call, live) for live in contexts), strict=True)
        assert len(set(refusals)) == 1, refusals
        if refusals[0] is not None:
            raise RefusedError(refusals[0])
        if isinstance(results[0], np.ndarray):
            self._compare(*results)
        assert self.plain.spans() == self.full.spans() == self.narrow.spans()
        return results[2]

    def decode(self, rows: Sequence[Row]) -> F32:
        """As of a Context."""
        return self._logits(lambda live: live.decode(rows))

    def feed(self, seq: int, tokens: Sequence[int]) -> F32:
        """As of a Context."""
        return self._logits(lambda live: live.feed(seq, tokens))

    def step(self, tokens: dict[int, int]) -> F32:
        """As of a Context."""
        return self._logits(lambda live: live.step(tokens))

    def _logits(self, call: Callable[[Context], F32]) -> F32:
        found: F32 = self.do(call)
        return found

    def _compare(self, plain: F32, full: F32, narrow: F32, rebuilt: F32) -> None:
        self.logits = [plain, full, narrow, rebuilt]
        assert np.isfinite(plain).all()
        self.worst = max([self.worst, *row_errors(full, plain)])
        assert self.worst <= self.bound, f"an error of {self.worst:.1e}; {self.bound} is allowed"
        assert np.array_equal(narrow, rebuilt)
        for live in (self.full, self.narrow):
            assert live.counters.verify_failures == 0

    def reset(self) -> None:
        """Counters of all to zero."""
        for live in (self.full, self.narrow, self.rebuilt):
            assert live.session is not None
            live.session.reset()

    def configure(self, budget: int = NARROW.budget, **settings: Any) -> None:
        """Settings of all decorated contexts from the next graph on; the budget is that of the narrow ones."""
        narrow = replace(NARROW, budget=budget)
        for live, config in ((self.full, FULL), (self.narrow, narrow), (self.rebuilt, narrow)):
            assert live.session is not None
            live.session.configure(replace(config, **settings))

    def use(self, profile: Profile) -> None:
        """Another profile from the next graph on."""
        for live in (self.full, self.narrow, self.rebuilt):
            assert live.session is not None
            live.session.set_profile(profile)


def _attempt(call: Callable[[Context], Any], live: Context) -> tuple[Any, str | None]:
    """What a call returns, or the code with which it was refused."""
    try:
        return call(live), None
    except RefusedError as refusal:
        return None, str(refusal)


def rows_of(seq: int, first: int, tokens: Sequence[int]) -> list[Row]:
    """Rows of one sequence, all with logits."""
    return [Row(token, first + i, (seq,)) for i, token in enumerate(tokens)]


def used(live: Context) -> dict[str, int]:
    """Attention nodes by reason, without the reasons that did not occur."""
    return {name: n for name, n in live.counters.nodes.items() if n}


def row_errors(found: F32, wanted: F32) -> list[float]:
    """Squared error / squared size of every row."""
    return [nmse(a, b) for a, b in zip(found, wanted, strict=True)]


def bound_of(model: Model, setup: Setup) -> float:
    """The error of a row that rounding explains: some times the largest of 100,000 random rows.

    llama.cpp rounds q to blocks of 8 bits where K is quantized, pyfasa does not: up to 6e-4, all of it llama.cpp's.
    K and V of the next layer are rounded from what differs already; a step of 4 or 5 bits makes that larger, up to
    9e-3.
    """
    exact = ("f32", "f16", "bf16")
    fine = (*exact, "q8_0")
    if model.shape.n_layer == 1:
        return MAX_NMSE if setup.type_k in exact else 2e-3
    types = (setup.type_k, setup.type_v)
    if all(name in exact for name in types):
        return MAX_NMSE
    return 2e-3 if all(name in fine for name in types) else 2e-2


@contextmanager
def compared(model: Model, **setup: Any) -> Iterator[Compared]:
    """The four contexts on one model."""
    with ExitStack() as stack:
        configs = (None, FULL, NARROW, NARROW)
        live = [stack.enter_context(context(model, config, **setup)) for config in configs]
        yield Compared(*live, bound=bound_of(model, live[0].setup))


def alone(model: Model, tokens: Sequence[int], rest: Sequence[int], **setup: Any) -> F32:
    """Logits of the rest, one by one, by a narrow context that has seen nothing but these tokens."""
    with context(model, NARROW, **setup) as live:
        live.feed(0, tokens)
        return np.concatenate([live.step({0: token}) for token in rest])
