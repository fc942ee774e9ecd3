"""Random operations on a cache, the same ones on plain and decorated contexts: the model behind the property tests."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from pyfasa.llama import KV_TYPES
from pyfasa.native import Counters
from sequences import ALL, NARROW, Compared, Context, Model, RefusedError, Row, compared
from support import random_tokens

Choose = Callable[[int], int]  # a whole number from 0 to below its argument

N_CTX = (256, 512)  # of a unified cache, or of each stream
MAX_SAVED = 3


class Cell(NamedTuple):
    """One cell in use."""

    pos: int
    seqs: frozenset[int]


class Cells:
    """What a cache holds, without its data: which positions of which sequences."""

    def __init__(self, n_seq: int, *, unified: bool) -> None:
        self.n_seq, self.unified = n_seq, unified
        self._streams: list[list[Cell]] = [[] for _ in range(1 if unified else n_seq)]

    def of(self, seq: int) -> list[int]:
        """Positions of a sequence."""
        return sorted(cell.pos for cell in self._stream(seq) if seq in cell.seqs)

    def spans(self) -> list[tuple[int, int]]:
        """First and last position of every sequence; -1 for none."""
        return [(p[0], p[-1]) if (p := self.of(seq)) else (-1, -1) for seq in range(self.n_seq)]

    def visible(self, seq: int, pos: int) -> int:
        """Cells that a row at a position sees."""
        return sum(p <= pos for p in self.of(seq))

    def add(self, seq: int, positions: Iterable[int]) -> None:
        self._stream(seq).extend(Cell(pos, frozenset([seq])) for pos in positions)

    def remove(self, seq: int, first: int, last: int) -> None:
        gone = frozenset(range(self.n_seq) if seq == ALL else [seq])
        self._change(
            lambda cell: (
                cell._replace(seqs=cell.seqs - gone)
                if first <= cell.pos and (last < 0 or cell.pos < last)
                else cell
            )
        )

    def copy(self, source: int, target: int, first: int, last: int) -> None:
        if self.unified:
            self._change(
                lambda cell: (
                    cell._replace(seqs=cell.seqs | {target})
                    if source in cell.seqs and first <= cell.pos and (last < 0 or cell.pos < last)
                    else cell
                )
            )
        elif source != target:
            self._streams[target] = [Cell(p, frozenset([target])) for p in self.of(source)]

    def keep(self, seq: int) -> None:
        self._stream(seq)[:] = [
            Cell(cell.pos, frozenset([seq])) for cell in self._stream(seq) if seq in cell.seqs
        ]

    def move(self, seq: int, first: int, to: Callable[[int], int]) -> None:
        """Of all positions from the first on; a cell that is shared moves for all its sequences."""
        self._change(
            lambda cell: (
                cell._replace(pos=to(cell.pos)) if seq in cell.seqs and cell.pos >= first else cell
            )
        )

    def replace(self, other: Cells) -> None:
        self._streams = [list(stream) for stream in other._streams]

    def snapshot(self) -> Cells:
        found = Cells(self.n_seq, unified=self.unified)
        found.replace(self)
        return found

    def _stream(self, seq: int) -> list[Cell]:
        return self._streams[0 if self.unified else seq]

    def _change(self, change: Callable[[Cell], Cell]) -> None:
        for stream in self._streams:
            stream[:] = [cell for cell in map(change, stream) if cell.seqs]


@dataclass(frozen=True)
class Case:
    """What the operations work on."""

    model: Model
    n_seq: int
    unified: bool
    n_ctx: int
    type_k: str
    type_v: str

    @classmethod
    def drawn(cls, models: Sequence[Model], choose: Choose) -> Case:
        """Any of them."""
        types = list(KV_TYPES)
        return cls(
            models[choose(len(models))],
            n_seq=1 + choose(3),
            unified=bool(choose(2)),
            n_ctx=N_CTX[choose(len(N_CTX))],
            type_k=types[choose(len(types))],
            type_v=types[choose(len(types))],
        )

    @property
    def can_shift(self) -> bool:
        """Where it cannot, llama.cpp ends the process: bf16, parts of quantized heads, and those it does not rotate."""
        shape = self.model.shape
        quantized = shape.n_rot == shape.head_dim and shape.head_dim % 64 == 0
        return self.type_k in ("f32", "f16") or (self.type_k != "bf16" and quantized)

    def __str__(self) -> str:
        layout = "unified" if self.unified else "streams"
        types = f"{self.type_k}/{self.type_v}"
        return f"{self.model.shape} {self.n_seq} {layout} of {self.n_ctx} {types}"


@dataclass
class World:
    """The contexts of one case, and what was done to them."""

    case: Case
    choose: Choose
    live: Compared
    log: list[str] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    saved: list[tuple[int, bytes, Cells]] = field(default_factory=list)
    digests: list[int] = field(default_factory=list)  # of plain's logits

    def __post_init__(self) -> None:
        self.cells = Cells(self.case.n_seq, unified=self.case.unified)
        operations = [
            (6, self.prefill),
            (12, self.decode),
            (3, self.remove),
            (3, self.copy),
            (1, self.keep),
            (3 if self.case.can_shift else 0, self.shift),
            (1 if self.case.can_shift else 0, self.divide),
            (1, self.clear),
            (2, self.save),
            (3, self.load),
            (4, self.set_up),
            (1, self.invalidate),
        ]
        self._operations = [operation for n, operation in operations for _ in range(n)]

    def step(self) -> None:
        """One operation. What llama.cpp refuses, it refuses in all contexts alike."""
        operation = self._operations[self.choose(len(self._operations))]
        self.counts["operations"] += 1
        self.counts[operation.__name__] += 1
        try:
            operation()
        except RefusedError as refusal:
            self.log.append(f"-> {refusal}")
            self.counts["refused"] += 1
        assert self.live.plain.spans() == self.cells.spans()

    # ---- tokens ----

    def prefill(self) -> None:
        seq, n = self._seq(), 16 + self.choose(105)
        self._evaluate([seq] * n, only_last=True)

    def decode(self) -> None:
        """Up to 8 rows, as they are sparse by default, or one or two more."""
        self._evaluate([self._seq() for _ in range(1 + self.choose(10))], only_last=False)

    def _evaluate(self, seqs: list[int], *, only_last: bool) -> None:
        """The next token of each of the sequences, in one batch."""
        ends = [last + 1 for _, last in self.cells.spans()]
        gap = int(self.choose(25) == 0)  # which is refused, but at the start of a sequence
        tokens = random_tokens(len(seqs), seed=self.choose(1000))
        rows = []
        for i, seq in enumerate(seqs):
            wanted = not only_last or i == len(seqs) - 1
            rows.append(Row(tokens[i], ends[seq] + gap, (seq,), wanted))
            ends[seq] += 1
        self.log.append(f"evaluate {dict(Counter(seqs))} gap {gap}")
        before = [live.counters for live in (self.live.full, self.live.narrow)]
        self.live.decode(rows)
        for row in rows:
            self.cells.add(row.seq_ids[0], [row.pos])
        self._check(rows, before)
        self.counts["rows"] += len(rows)
        self.counts["decoded rows"] += 0 if only_last else len(rows)
        self.digests.append(hash(self.live.dense.tobytes()))

    def _check(self, rows: list[Row], before: list[Counters]) -> None:
        """Where every node was sparse, all rows saw their cells; where none was, the bits are llama.cpp's."""
        shape = self.case.model.shape
        visible = sum(self.cells.visible(row.seq_ids[0], row.pos) for row in rows)
        contexts = (self.live.full, self.live.narrow)
        for live, logits, old in zip(contexts, self.live.logits[1:3], before, strict=True):
            new = live.counters
            n_nodes = sum(new.nodes.values()) - sum(old.nodes.values())
            n_sparse = new.nodes["sparse"] - old.nodes["sparse"]
            if n_sparse == n_nodes:
                n_seen = new.cells_visible - old.cells_visible
                assert n_seen == shape.n_layer * shape.n_head * visible
                self.counts["graphs all sparse"] += live is self.live.full
            if n_sparse == 0 and shape.n_layer == 1:  # K and V hang on no older difference
                assert np.array_equal(logits, self.live.dense)
            self.counts["sparse nodes"] += n_sparse
        assert self.live.full.counters.cells_attended == self.live.full.counters.cells_visible

    # ---- the cache ----

    def remove(self) -> None:
        seq = self._seq() if self.choose(8) else ALL
        first, last = self._range(max(seq, 0))
        self._remove(seq, first, last if self.choose(2) else -1)

    def copy(self) -> None:
        source, target = self._seq(), self._seq()
        first, last = self._range(source) if self.case.unified and not self.choose(3) else (0, -1)
        if self.choose(2) and source != target:
            self._remove(target, 0, -1)
        self._do(
            f"copy {source} {target} {first} {last}",
            lambda c: c.copy(source, target, first, last),
        )
        self.cells.copy(source, target, first, last)

    def keep(self) -> None:
        seq = self._seq()
        self._do(f"keep {seq}", lambda c: c.keep(seq))
        self.cells.keep(seq)

    def shift(self) -> None:
        """Closes a gap that it makes, or makes room."""
        seq = self._seq()
        first, last = self._range(seq)
        delta = 7
        if self.choose(4):
            self._remove(seq, first, last)
            first, delta = last, first - last
        self._do(f"shift {seq} {first} {delta}", lambda c: c.shift(seq, first, -1, delta))
        self.cells.move(seq, first, lambda pos: pos + delta)

    def divide(self) -> None:
        seq, divisor = self._seq(), 2 + self.choose(3)
        first, _ = self._range(seq)
        self._do(f"divide {seq} {first} {divisor}", lambda c: c.divide(seq, first, -1, divisor))
        self.cells.move(seq, first, lambda pos: pos // divisor)

    def clear(self) -> None:
        data = bool(self.choose(2))
        self._do(f"clear {data}", lambda c: c.clear(data=data))
        self.cells.remove(ALL, 0, -1)

    def save(self) -> None:
        """States are plain's; with one layer K and V are nobody's own."""
        seq = self._seq() if self.choose(3) else ALL
        self.log.append(f"save {seq}")
        state = self.live.plain.saved(seq)
        if self.case.model.shape.n_layer == 1:
            assert self.live.full.saved(seq) == self.live.narrow.saved(seq) == state
        self.saved = [*self.saved, (seq, state, self.cells.snapshot())][-MAX_SAVED:]

    def load(self) -> None:
        if not self.saved:
            self.save()
        seq, state, cells = self.saved[self.choose(len(self.saved))]
        if seq == ALL:
            self._do("load all", lambda c: c.load(state))
            self.cells.replace(cells)
        elif cells.of(seq):  # llama.cpp leaves the target as it is when there is nothing to load
            target = self._seq()
            self.cells.remove(target, 0, -1)  # also when the cells do not suffice
            self._do(f"load {seq} into {target}", lambda c: c.load(state, target))
            self.cells.add(target, cells.of(seq))

    # ---- pyfasa ----

    def set_up(self) -> None:
        """Settings, and which profile."""
        model = self.case.model
        settings = {
            "n_fc": self.choose(model.profile.n_ranked + 1),
            "enabled": bool(self.choose(6)),
            "min_ctx": (0, 0, 40, 150)[self.choose(4)],
            "max_rows": (8, 8, 1, 10)[self.choose(4)],
        }
        budget = NARROW.budget + self.choose(60)
        other = self.choose(2)
        self.log.append(f"set up {settings} budget {budget} profile {other}")
        self.live.use((model.profile, model.other_profile)[other])
        self.live.configure(budget, **settings)

    def invalidate(self) -> None:
        self.log.append("invalidate")
        for live in (self.live.full, self.live.narrow):
            assert live.session is not None
            live.session.invalidate()

    # ---- choices ----

    def _remove(self, seq: int, first: int, last: int) -> None:
        self._do(f"remove {seq} {first} {last}", lambda c: c.remove(seq, first, last))
        self.cells.remove(seq, first, last)

    def _do(self, what: str, call: Callable[[Context], None]) -> None:
        self.log.append(what)
        self.live.do(call)

    def _seq(self) -> int:
        return self.choose(self.case.n_seq)

    def _range(self, seq: int) -> tuple[int, int]:
        """Positions of a sequence, first < last."""
        end = max(1, self.cells.spans()[seq][1] + 1)
        first = self.choose(end)
        return first, first + 1 + self.choose(end - first)


def run(case: Case, n_steps: int, choose: Choose) -> World:
    """So many operations; an AssertionError says what was done before it."""
    n_ctx = case.n_ctx if case.unified else case.n_ctx * case.n_seq
    setup = {"n_seq_max": case.n_seq, "unified": case.unified, "n_ctx": n_ctx}
    types = {"type_k": case.type_k, "type_v": case.type_v}
    with compared(case.model, **setup, **types) as live:
        world = World(case, choose, live)
        try:
            world.prefill()
            for _ in range(n_steps):
                world.step()
        except AssertionError as error:
            raise AssertionError("\n".join([str(case), *world.log, str(error)])) from error
    world.counts["sequences"] += 1
    return world
