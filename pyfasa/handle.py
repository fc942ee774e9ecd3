"""``llm.fasa``: what sparse attention does in one model, and its settings."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from typing import Any

from pyfasa.attach import Attachment
from pyfasa.errors import ProfileError
from pyfasa.native import (
    PAYS_FROM,
    Config,
    Counters,
    Scorer,
    Session,
    Timings,
    check_config,
)
from pyfasa.profile import Profile


def make_config(
    budget: int = 1024,
    n_fc: int | None = None,
    index_bits: int | None = None,
    min_ctx: int | None = None,
    max_rows: int = 8,
    sinks: int = 4,
    recent: int = 32,
    pays_from: int = PAYS_FROM,
) -> Config:
    """Settings as users give them: None is the profile's own n_fc and index_bits; min_ctx is pays_from budgets."""
    if index_bits is not None and _whole("index_bits", index_bits) == 0:
        raise ValueError(
            "index_bits is 0; 1, 2, 4 or 8 bits exist, or None for those of the profile."
        )
    if n_fc is not None and _whole("n_fc", n_fc) < 1:
        raise ValueError(
            f"n_fc is {n_fc}; at least 1 chunk is needed, or None for the profile's own number."
        )
    config = Config(
        budget=_whole("budget", budget),
        n_fc=0 if n_fc is None else _whole("n_fc", n_fc),
        bits=0 if index_bits is None else _whole("index_bits", index_bits),
        min_ctx=pays_from * _whole("budget", budget)
        if min_ctx is None
        else _whole("min_ctx", min_ctx),
        max_rows=_whole("max_rows", max_rows),
        sinks=_whole("sinks", sinks),
        recent=_whole("recent", recent),
    )
    check_config(config)
    return config


def _whole(name: str, value: Any) -> int:
    """A whole number, also of NumPy's types; True is none."""
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        optional = " or None" if name in ("n_fc", "index_bits", "min_ctx") else ""
        raise ValueError(f"{name} is {value!r}; a whole number{optional} is needed.")
    return operator.index(value)


class Fasa:
    """State and settings of FASA in one ``pyfasa.Llama``; reach it as ``llm.fasa``.

    Settings take effect with the next decoded token: ``budget`` (cells attended per query head), ``n_fc`` (chunks
    scored; None: the profile's own number), ``index_bits`` (1, 2, 4 or 8 for all chunks; None: the profile's own),
    ``min_ctx`` (visible cells below which a token is dense), ``max_rows`` (query rows up to which a batch is decoding),
    ``sinks`` and ``recent`` (first and last visible tokens, always attended), ``enabled``, ``verify`` (recompute the
    side index before each use and compare; slow), ``head_start`` (on a GPU, a token may begin before llama.cpp has set
    all of its inputs; the results are the same). A value out of range raises ValueError and changes nothing.
    """

    def __init__(
        self,
        config: Config,
        attachment: Attachment,
        *,
        follow_budget: bool,
        pays_from: int = PAYS_FROM,
    ) -> None:
        self._pays_from = pays_from
        self._config = config
        self._n_fc: int | None = config.n_fc or None
        self._session = attachment.session
        self._identity = attachment.identity
        self._profile = attachment.profile
        self._reason = attachment.reason
        self._min_ctx_follows = follow_budget
        self.switched = False  # by use()
        self._passing: dict[str, object] = {}  # settings of the core for the time of a block
        self._apply(replace(config, min_ctx=pays_from * config.budget) if follow_budget else config)

    # ---- state ----

    @property
    def active(self) -> bool:
        """Whether long contexts are decoded sparsely."""
        return self.reason is None

    @property
    def reason(self) -> str | None:
        """Why everything is dense, as a sentence; None when FASA is active."""
        if self._session is not None and self._session.closed:
            return "The model is closed."
        if self._reason is None and not self._config.enabled:
            return "FASA is switched off; set llm.fasa.enabled = True."
        return self._reason

    @property
    def profile(self) -> Profile | None:
        """The profile in use."""
        return self._profile

    @property
    def counters(self) -> Counters:
        """What was replaced, what stayed dense and why, and how much was read, since the last ``reset()``."""
        return self._live().counters()

    @property
    def timings(self) -> Timings:
        """Nanoseconds per stage since the last ``reset()``."""
        return self._live().timings()

    def reset(self) -> None:
        """Sets counters and timings to zero."""
        self._live().reset()

    def use(self, profile: Profile | None) -> None:
        """Switches the live context to another profile, or to dense decoding with None.

        The side index is rebuilt from the K cache at the next token. Raises ProfileError when the profile belongs to
        another model, RuntimeError when this context cannot be sparse at all (see ``reason``).
        """
        session = self._live()
        if profile is not None:
            if self._identity is None:
                raise ProfileError(
                    "The model could not be identified, so no profile can be checked against it."
                )
            profile.check_model(self._identity)
        session.set_profile(profile)
        self._profile = profile
        self.switched = True
        self._reason = None if profile is not None else "The context has no profile."
        self._apply(self._config)

    # ---- settings ----

    @property
    def budget(self) -> int:
        """Cells attended per query head and token."""
        return self._config.budget

    @budget.setter
    def budget(self, value: int) -> None:
        checked = make_config(
            budget=value, sinks=self.sinks, recent=self.recent, pays_from=self._pays_from
        )
        min_ctx = checked.min_ctx if self._min_ctx_follows else self._config.min_ctx
        self._apply(replace(self._config, budget=checked.budget, min_ctx=min_ctx))

    @property
    def n_fc(self) -> int:
        """Chunks scored per KV head."""
        if self._profile is None:
            return self._n_fc or 0
        return self._profile.n_fc if self._n_fc is None else min(self._n_fc, self._profile.n_ranked)

    @n_fc.setter
    def n_fc(self, value: int | None) -> None:
        checked = make_config(n_fc=value).n_fc or None
        ranked = checked if self._profile is None else self._profile.n_ranked
        if checked is not None and ranked is not None and checked > ranked:
            raise ValueError(f"n_fc is {checked}; the profile ranks {ranked} chunks.")
        self._n_fc = checked
        self._apply(self._config)

    @property
    def index_bits(self) -> int | None:
        """Bits per scored dim; None: those of the profile."""
        return self._config.bits or None

    @index_bits.setter
    def index_bits(self, value: int | None) -> None:
        self._apply(replace(self._config, bits=make_config(index_bits=value).bits))

    @property
    def max_rows(self) -> int:
        """Query rows up to which a batch is decoding; above it is prefill and dense."""
        return self._config.max_rows

    @max_rows.setter
    def max_rows(self, value: int) -> None:
        self._apply(replace(self._config, max_rows=_whole("max_rows", value)))

    @property
    def min_ctx(self) -> int:
        """Visible cells below which a token is decoded densely, bit-identical to llama.cpp."""
        return self._config.min_ctx

    @min_ctx.setter
    def min_ctx(self, value: int | None) -> None:
        checked = make_config(
            budget=self.budget, min_ctx=value, sinks=0, recent=0, pays_from=self._pays_from
        )
        self._apply(replace(self._config, min_ctx=checked.min_ctx))
        self._min_ctx_follows = value is None

    @property
    def sinks(self) -> int:
        """First visible tokens, always attended."""
        return self._config.sinks

    @sinks.setter
    def sinks(self, value: int) -> None:
        self._apply(replace(self._config, sinks=_whole("sinks", value)))

    @property
    def recent(self) -> int:
        """Last visible tokens, always attended."""
        return self._config.recent

    @recent.setter
    def recent(self, value: int) -> None:
        self._apply(replace(self._config, recent=_whole("recent", value)))

    @property
    def enabled(self) -> bool:
        """False: dense, as if pyfasa were not there."""
        return self._config.enabled

    @enabled.setter
    def enabled(self, value: bool) -> None:
        self._apply(replace(self._config, enabled=bool(value)))

    @property
    def verify(self) -> bool:
        """Recompute the side index before each use and count what differs; for debugging."""
        return self._config.verify

    @verify.setter
    def verify(self, value: bool) -> None:
        self._apply(replace(self._config, verify=bool(value)))

    @property
    def head_start(self) -> bool:
        """Whether a token on a GPU may begin before llama.cpp has set all of its inputs; the results are the same."""
        return self._config.head_start

    @head_start.setter
    def head_start(self, value: bool) -> None:
        self._apply(replace(self._config, head_start=bool(value)))

    # ---- for the rest of the package ----

    def arguments(self) -> dict[str, object]:
        """The settings as arguments of ``pyfasa.Llama``, as they are now."""
        return {
            "budget": self.budget,
            "n_fc": self._n_fc,
            "index_bits": self.index_bits,
            "min_ctx": None if self._min_ctx_follows else self.min_ctx,
            "max_rows": self.max_rows,
            "sinks": self.sinks,
            "recent": self.recent,
        }

    @contextmanager
    def capturing(self) -> Iterator[Session]:
        """Inside the block the queries of every graph are kept, in ``session.captured``, until it is cleared."""
        session = self._live()
        with self._for_now(capture=True):
            yield session

    def scoring(self, scorer: Scorer) -> AbstractContextManager[None]:
        """Inside the block ``scorer`` scores the cells in place of the side index; for evaluation, slow.

        It is called once per layer and decoded row, on the same K cache, and select and attend go on from its scores.
        An exception in it is raised at the end of the block; until then rows attend to everything they see.
        """
        return self._live().scoring(scorer)

    def prefilling(self) -> AbstractContextManager[None]:
        """Inside the block every batch is a part of a prompt, also a last one of few rows: dense."""
        return self._for_now(max_rows=0)

    @contextmanager
    def _for_now(self, **settings: object) -> Iterator[None]:
        before, self._passing = self._passing, self._passing | settings
        try:
            self._apply(self._config)
            yield
        finally:
            self._passing = before
            self._apply(self._config)

    def _native_config(self, config: Config) -> Config:
        return replace(config, n_fc=self.n_fc, **self._passing)  # type: ignore[arg-type]

    def _apply(self, config: Config) -> None:
        check_config(config)
        if self._session is not None and not self._session.closed:
            self._session.configure(self._native_config(config))
        self._config = config

    def _live(self) -> Session:
        if self._session is None or self._session.closed:
            raise RuntimeError(f"FASA is not attached to this context: {self.reason}")
        return self._session
