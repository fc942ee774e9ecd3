"""What the server has done, for Prometheus."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from pyfasa.native import Counters

Sample = tuple[str, float]  # labels in braces, or nothing; value


@dataclass
class Work:
    """Tokens that were evaluated, and the seconds it took."""

    tokens: int = 0
    seconds: float = 0.0

    def add(self, tokens: int, seconds: float) -> None:
        self.tokens += tokens
        self.seconds += seconds

    @property
    def speed(self) -> float:
        """Tokens per second; 0 before the first."""
        return self.tokens / self.seconds if self.seconds > 0 else 0.0


@dataclass(frozen=True)
class State:
    """How the loaded model is now; zeros without one."""

    counters: Counters | None = None
    active: bool = False
    n_tokens: int = 0
    n_ctx: int = 0


@dataclass
class Metrics:
    """Sums since the server started, over all models that it had loaded.

    prompt, decode:           what was evaluated as a prompt, and after it
    last_prompt, last_decode: the same of the latest answer
    generated:                tokens sampled
    requests:                 answered POST requests by status
    in_flight:                POST requests that wait or are being answered
    """

    prompt: Work = field(default_factory=Work)
    decode: Work = field(default_factory=Work)
    last_prompt: Work = field(default_factory=Work)
    last_decode: Work = field(default_factory=Work)
    generated: int = 0
    requests: Counter[int] = field(default_factory=Counter)
    in_flight: int = 0
    clients_gone: int = 0
    _nodes: Counter[str] = field(default_factory=Counter)
    _cells: Counter[str] = field(default_factory=Counter)

    def begin(self) -> None:
        """A new answer."""
        self.last_prompt, self.last_decode = Work(), Work()

    def evaluated(self, tokens: int, seconds: float, prompt: bool) -> None:
        """Counts one evaluation."""
        works = (self.prompt, self.last_prompt) if prompt else (self.decode, self.last_decode)
        for work in works:
            work.add(tokens, seconds)

    def retire(self, counters: Counters) -> None:
        """Keeps what a model counted that is about to be closed."""
        self._nodes.update(counters.nodes)
        self._cells.update(_cells(counters))

    def text(self, state: State, n_queued: int) -> str:
        """All metrics in Prometheus' text format."""
        nodes, cells = self._nodes.copy(), self._cells.copy()
        if state.counters is not None:
            nodes.update(state.counters.nodes)
            cells.update(_cells(state.counters))
        index_bytes = state.counters.index_bytes if state.counters is not None else 0
        lines = [
            *_total("prompt_tokens", "Prompt tokens evaluated.", self.prompt.tokens),
            *_total("prompt_seconds", "Seconds of evaluating prompts.", self.prompt.seconds),
            *_total("decode_tokens", "Tokens decoded after prompts.", self.decode.tokens),
            *_total("decode_seconds", "Seconds of decoding.", self.decode.seconds),
            *_total("generated_tokens", "Tokens sampled.", self.generated),
            *_gauge(
                "prompt_tokens_per_second", "Speed of the latest prompt.", self.last_prompt.speed
            ),
            *_gauge(
                "decode_tokens_per_second", "Speed of the latest answer.", self.last_decode.speed
            ),
            *_metric(
                "nodes_total",
                "counter",
                "Attention nodes: replaced (sparse), or dense by reason.",
                _labelled("reason", nodes),
            ),
            *_total("cells_visible", "Cells that replaced nodes saw.", cells["visible"]),
            *_total("cells_attended", "Cells that replaced nodes attended to.", cells["attended"]),
            *_gauge("active", "1 when FASA is active, 0 when all is dense.", int(state.active)),
            *_gauge("index_bytes", "Bytes of the side index.", index_bytes),
            *_gauge("cache_tokens", "Tokens in the KV cache.", state.n_tokens),
            *_gauge("cache_size_tokens", "Tokens that the KV cache can hold.", state.n_ctx),
            *_metric(
                "requests_total",
                "counter",
                "Answered POST requests by status.",
                _labelled("status", {str(k): n for k, n in sorted(self.requests.items())}),
            ),
            *_gauge("requests_in_flight", "POST requests waiting or running.", self.in_flight),
            *_gauge("requests_queued", "Requests that wait for their turn.", n_queued),
            *_total("clients_gone", "Requests whose client went away.", self.clients_gone),
        ]
        return "\n".join(lines) + "\n"


def _cells(counters: Counters) -> dict[str, int]:
    return {"visible": counters.cells_visible, "attended": counters.cells_attended}


def _labelled(label: str, values: Mapping[str, float]) -> list[Sample]:
    return [(f'{{{label}="{name}"}}', value) for name, value in values.items()]


def _total(name: str, text: str, value: float) -> list[str]:
    return _metric(f"{name}_total", "counter", text, [("", value)])


def _gauge(name: str, text: str, value: float) -> list[str]:
    return _metric(name, "gauge", text, [("", value)])


def _metric(name: str, kind: str, text: str, samples: Iterable[Sample]) -> list[str]:
    head = [f"# HELP pyfasa_{name} {text}", f"# TYPE pyfasa_{name} {kind}"]
    return head + [f"pyfasa_{name}{labels} {value}" for labels, value in samples]
