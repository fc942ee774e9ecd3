"""The core's side of one llama_context: settings, counters, captured queries."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import numpy.typing as npt

from pyfasa._native import ffi, lib
from pyfasa.native.call import F32, ISA_AUTO, ROPE_IDS, check, pointer
from pyfasa.native.host import reasons
from pyfasa.native.scoring import Scorer, c_scorer
from pyfasa.profile import Profile


@dataclass(frozen=True)
class Config:
    """Settings of a session; see ``fasa_config`` in the cdef for each."""

    enabled: bool = True
    budget: int = 1024
    n_fc: int = 0
    bits: int = 0
    min_ctx: int = 2048
    max_rows: int = 8
    sinks: int = 4
    recent: int = 32
    verify: bool = False
    capture: bool = False
    isa: int = ISA_AUTO
    n_threads: int = 0
    head_start: bool = True


@dataclass(frozen=True)
class Counters:
    """What a session has done; cells are counted once per query head, see ``fasa_counters``."""

    graphs: int
    nodes: dict[str, int]
    cells_visible: int
    cells_attended: int
    cells_indexed: int
    cells_verified: int
    verify_failures: int
    stale_events: int
    index_bytes: int
    kv_bytes: int
    bytes_scored: int
    bytes_attended: int
    head_starts: int
    head_starts_undone: int

    @property
    def share_attended(self) -> float:
        """Cells attended / cells visible over all replaced nodes; 1.0 when none was replaced."""
        return self.cells_attended / self.cells_visible if self.cells_visible else 1.0


@dataclass(frozen=True)
class Timings:
    """Nanoseconds on the first worker thread, summed over replaced nodes; see ``fasa_timings``."""

    index: int
    score: int
    select: int
    attend: int
    wait: int
    plan: int
    total: int


def check_config(config: Config) -> None:
    """ValueError with a sentence about the first setting that is out of its range."""
    check(lib.fasa_config_check(_c_config(config)))


class Session:
    """The core's side of one llama_context."""

    def __init__(self, profile: Profile | None, config: Config) -> None:
        out = ffi.new("fasa_session **")
        c_profile, keep = _c_profile(profile)
        check(lib.fasa_session_create(c_profile, _c_config(config), out))
        del keep
        self._handle = ffi.gc(out[0], lib.fasa_session_free)

    def close(self) -> None:
        """Undecorates what is left and frees the core's side; a second call does nothing."""
        handle, self._handle = self._handle, None
        if handle is not None:
            ffi.release(handle)

    @property
    def closed(self) -> bool:
        """Whether close() was called."""
        return self._handle is None

    def _live(self) -> Any:
        if self._handle is None:
            raise RuntimeError("This context is closed; create a new Llama.")
        return self._handle

    @contextmanager
    def armed(self) -> Iterator[None]:
        """Backends that this thread creates inside the block belong to the session."""
        check(lib.fasa_session_arm(self._live()))
        try:
            yield
        finally:
            check(lib.fasa_session_disarm(self._live()))

    @property
    def n_backends(self) -> int:
        """Decorated backends that are alive."""
        n: int = lib.fasa_session_backends(self._live())
        return n

    def configure(self, config: Config) -> None:
        """Settings from the next graph on; ValueError names the value and its limit."""
        check(lib.fasa_session_configure(self._live(), _c_config(config)))

    def set_profile(self, profile: Profile | None) -> None:
        """Another profile from the next graph on; side indexes are rebuilt from the K cache."""
        c_profile, keep = _c_profile(profile)
        check(lib.fasa_session_set_profile(self._live(), c_profile))
        del keep

    def counters(self) -> Counters:
        """Counters since the last reset."""
        c = ffi.new("fasa_counters *")
        check(lib.fasa_session_counters(self._live(), c))
        plain = {f.name: getattr(c, f.name) for f in fields(Counters) if f.name != "nodes"}
        return Counters(nodes={name: c.nodes[i] for i, name in enumerate(reasons())}, **plain)

    def timings(self) -> Timings:
        """Timings since the last reset."""
        c = ffi.new("fasa_timings *")
        check(lib.fasa_session_timings(self._live(), c))
        return Timings(**{f.name: getattr(c, f.name) for f in fields(Timings)})

    def reset(self) -> None:
        """Counters and timings to zero."""
        check(lib.fasa_session_reset(self._live()))

    def invalidate(self) -> None:
        """Drops the side indexes; they are rebuilt from the K cache at the next use."""
        check(lib.fasa_session_invalidate(self._live()))

    @contextmanager
    def scoring(self, scorer: Scorer) -> Iterator[None]:
        """Inside the block ``scorer`` scores cells in place of the side index; see ``Fasa.scoring``."""
        errors: list[BaseException] = []
        callback = c_scorer(scorer, errors)
        check(lib.fasa_session_set_scorer(self._live(), callback, ffi.NULL))
        try:
            yield
        finally:
            if not self.closed:
                check(lib.fasa_session_set_scorer(self._live(), ffi.NULL, ffi.NULL))
        if errors:
            raise errors[0]

    def captured(self, layer: int) -> F32:
        """Queries of a layer since the last clear, RoPE basis, oldest first: (n_rows, n_head, head_dim)."""
        dim, heads, rows = ffi.new("int32_t *"), ffi.new("int32_t *"), ffi.new("int64_t *")
        check(lib.fasa_session_captured(self._live(), layer, dim, heads, rows, ffi.NULL))
        out = np.empty((rows[0], heads[0], dim[0]), np.float32)
        check(
            lib.fasa_session_captured(
                self._live(), layer, dim, heads, rows, pointer("float[]", out, np.float32)
            )
        )
        return out

    def captured_clear(self) -> None:
        """Forgets the captured queries."""
        check(lib.fasa_session_captured_clear(self._live()))

    def keys(self, layer: int, first: int, last: int) -> F32:
        """Keys of cells first <= c < last of a layer in the RoPE basis: (last - first, n_head_kv, head_dim)."""
        dim, heads = ffi.new("int32_t *"), ffi.new("int32_t *")
        arguments = (self._live(), layer, first, last, dim, heads)
        check(lib.fasa_session_keys(*arguments, ffi.NULL))
        out = np.empty((last - first, heads[0], dim[0]), np.float32)
        check(lib.fasa_session_keys(*arguments, pointer("float[]", out, np.float32)))
        return out


def _c_profile(profile: Profile | None) -> tuple[Any, Any]:
    """A fasa_profile and the arrays it points into, to be kept alive during the call."""
    if profile is None:
        return ffi.NULL, None
    arrays: list[npt.NDArray[Any]] = [
        np.ascontiguousarray(profile.chunks, np.uint16),
        np.ascontiguousarray(profile.bits, np.uint8),
    ]
    c = ffi.new("fasa_profile *")
    c.n_layer, c.n_head_kv, c.n_ranked = profile.chunks.shape
    c.head_dim, c.n_rot = profile.identity.head_dim, profile.identity.n_rot
    c.rope = ROPE_IDS[profile.identity.rope]
    c.chunks = chunks = pointer("uint16_t[]", arrays[0], np.uint16)
    c.bits = bits = pointer("uint8_t[]", arrays[1], np.uint8)
    keep: list[Any] = [chunks, bits, arrays]
    n_channel = profile.chunks.shape[0] * profile.chunks.shape[1] * profile.identity.head_dim
    for name in ("center", "scale"):
        values = getattr(profile, name)
        if values is not None:
            array = np.ascontiguousarray(values, np.float32)
            values_c = pointer("float[]", array, np.float32, n_channel)
            setattr(c, name, values_c)
            keep += [array, values_c]
    return c, keep


def _c_config(config: Config) -> Any:
    c = ffi.new("fasa_config *")
    for field in fields(Config):
        value = int(getattr(config, field.name))
        if not -(2**31) <= value < 2**31:
            raise ValueError(f"{field.name} is {value}; it must fit into 32 bits.")
        setattr(c, field.name, value)
    return c
