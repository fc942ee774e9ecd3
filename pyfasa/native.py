"""The only module that touches the compiled core: handles, array checks, and failures as exceptions.

The C interface and its shapes are documented in ``native/fasa.cdef.h``; functions here keep its names.
NumPy shapes are written outermost first, so ``[head_dim, n_q]`` there is ``(n_q, head_dim)`` here.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any

import llama_cpp  # noqa: F401  loads the ggml libraries that the core is linked against
import numpy as np
import numpy.typing as npt

from pyfasa._native import ffi, lib
from pyfasa.errors import HostError
from pyfasa.profile import Profile

F32 = npt.NDArray[np.float32]
U8 = npt.NDArray[np.uint8]
U16 = npt.NDArray[np.uint16]
U64 = npt.NDArray[np.uint64]
I32 = npt.NDArray[np.int32]
I64 = npt.NDArray[np.int64]

BLOCK_CELLS: int = lib.FASA_BLOCK_CELLS
PEAKS: int = lib.FASA_PEAKS
KV_F16: int = lib.FASA_KV_F16
KV_Q8_0: int = lib.FASA_KV_Q8_0
ISA_REFERENCE: int = lib.FASA_ISA_REFERENCE
ISA_PORTABLE: int = lib.FASA_ISA_PORTABLE
ISA_AVX2: int = lib.FASA_ISA_AVX2
ISA_AVX512: int = lib.FASA_ISA_AVX512
ISA_AUTO: int = lib.FASA_ISA_AUTO
ROPE_IDS: dict[str, int] = {"norm": lib.FASA_ROPE_NORM, "neox": lib.FASA_ROPE_NEOX}


def _text(pointer: Any) -> str:
    text: bytes = ffi.string(pointer)
    return text.decode()


def _check(status: int) -> None:
    if status == lib.FASA_STATUS_OK:
        return
    sentence = _text(lib.fasa_last_error())
    if status == lib.FASA_STATUS_ARGUMENT:
        raise ValueError(sentence)
    if status == lib.FASA_STATUS_HOST:
        raise HostError(sentence)
    if status == lib.FASA_STATUS_MEMORY:
        raise MemoryError(sentence)
    raise RuntimeError(sentence)


def _pointer(kind: str, array: npt.NDArray[Any], dtype: Any, size: int | None = None) -> Any:
    """A C pointer to an array that must be contiguous, of ``dtype``, and of ``size`` values."""
    if array.dtype != dtype or not array.flags.c_contiguous:
        raise ValueError(
            f"The array is {array.dtype}, contiguous {array.flags.c_contiguous}; "
            f"a contiguous array of {np.dtype(dtype)} is needed."
        )
    if size is not None and array.size != size:
        raise ValueError(f"The array has {array.size} values; {size} are needed.")
    return ffi.from_buffer(kind, array, require_writable=array.flags.writeable)


# ---- instruction sets and host -------------------------------------------------------------------


def isa_best() -> int:
    """Id of the best instruction set of this CPU."""
    best: int = lib.fasa_isa_best()
    return best


def isa_name(isa: int) -> str:
    """Name of an instruction set for printing."""
    return _text(lib.fasa_isa_name(isa))


def isa_usable(isa: int) -> bool:
    """Whether this CPU and build can run it."""
    return bool(lib.fasa_isa_usable(isa))


def isas() -> list[int]:
    """Ids of all instruction sets that this build knows, the reference first."""
    return list(range(lib.FASA_ISA_COUNT))


def ggml_versions() -> tuple[str, str]:
    """Version of ggml that the core was built against, and of the one that is loaded."""
    return _text(lib.fasa_ggml_built()), _text(lib.fasa_ggml_loaded())


def self_test() -> None:
    """Proves that llama.cpp's CPU backend can be decorated; raises HostError with the cause if not."""
    _check(lib.fasa_self_test())


def reasons() -> dict[str, str]:
    """Why attention nodes are replaced or left dense: name to sentence, in the order of the core."""
    return {
        _text(lib.fasa_reason_name(i)): _text(lib.fasa_reason_text(i))
        for i in range(lib.FASA_REASON_COUNT)
    }


# ---- the stages ------------------------------------------------------------------------------------


class Layout:
    """What the side index keeps of one KV head.

    Parameters
    ----------
    head_dim, n_rot : dims of a head, and how many of them RoPE rotates.
    rope : "norm" or "neox".
    chunks, bits : (n_fc,) ids of frequency chunks, and 2, 4 or 8 bits for each.
    center, scale : (head_dim,) or None; per-channel shift and scale taken out before quantization.
    """

    def __init__(
        self,
        head_dim: int,
        n_rot: int,
        rope: str,
        chunks: U16,
        bits: U8,
        center: F32 | None = None,
        scale: F32 | None = None,
    ) -> None:
        if rope not in ROPE_IDS:
            raise ValueError(f"rope is {rope!r}; it must be one of {', '.join(ROPE_IDS)}.")
        out = ffi.new("fasa_layout **")
        _check(
            lib.fasa_layout_create(
                head_dim,
                n_rot,
                ROPE_IDS[rope],
                len(chunks),
                _pointer("uint16_t[]", chunks, np.uint16),
                _pointer("uint8_t[]", bits, np.uint8, len(chunks)),
                ffi.NULL if center is None else _pointer("float[]", center, np.float32, head_dim),
                ffi.NULL if scale is None else _pointer("float[]", scale, np.float32, head_dim),
                out,
            )
        )
        self.head_dim = head_dim
        self.handle = ffi.gc(out[0], lib.fasa_layout_free)

    @property
    def block_bytes(self) -> int:
        """Bytes of a block of 64 cells."""
        size: int = lib.fasa_layout_block_bytes(self.handle)
        return size


def index_write(layout: Layout, rows: F32, cells: I64, index: U8) -> None:
    """Writes the entries of ``cells`` (n,) from keys ``rows`` (n, head_dim) into ``index`` (n_block, block_bytes)."""
    if len(cells) and int(cells.max()) // BLOCK_CELLS * layout.block_bytes >= index.size:
        raise ValueError(f"Cell {int(cells.max())} is outside an index of {index.size} bytes.")
    _check(
        lib.fasa_index_write(
            layout.handle,
            _pointer("float[]", rows, np.float32, len(cells) * layout.head_dim),
            _pointer("int64_t[]", cells, np.int64),
            len(cells),
            _pointer("uint8_t[]", index, np.uint8),
        )
    )


def score(
    isa: int,
    layout: Layout,
    q: F32,
    index: U8,
    visible: U64,
    scores: F32,
    peaks: F32,
    blocks: tuple[int, int] | None = None,
) -> None:
    """Scores of queries ``q`` (n_q, head_dim) into ``scores`` (n_q, 64 n_block) and ``peaks`` (n_q, 8 n_block)."""
    n_q, n_block = len(q), len(visible)
    first, last = blocks or (0, n_block)
    _check(
        lib.fasa_score(
            isa,
            layout.handle,
            _pointer("float[]", q, np.float32, n_q * layout.head_dim),
            n_q,
            _pointer("uint8_t[]", index, np.uint8, n_block * layout.block_bytes),
            _pointer("uint64_t[]", visible, np.uint64),
            n_block,
            first,
            last,
            _pointer("float[]", scores, np.float32, n_q * n_block * BLOCK_CELLS),
            _pointer("float[]", peaks, np.float32, n_q * n_block * PEAKS),
        )
    )


def select(isa: int, scores: F32, peaks: F32, budget: int) -> I32:
    """The ``budget`` best cells of ``scores`` (64 n_block,), ascending; ``peaks`` (8 n_block,) go with them."""
    n_block = len(scores) // BLOCK_CELLS
    scratch = np.empty(len(scores), np.float32)
    cells = np.empty(len(scores), np.int32)
    n = ffi.new("int64_t *")
    _check(
        lib.fasa_select(
            isa,
            _pointer("float[]", scores, np.float32, n_block * BLOCK_CELLS),
            _pointer("float[]", peaks, np.float32, n_block * PEAKS),
            n_block,
            budget,
            _pointer("float[]", scratch, np.float32),
            _pointer("int32_t[]", cells, np.int32),
            n,
        )
    )
    chosen: I32 = cells[: int(n[0])]
    return chosen


@dataclass(frozen=True)
class KV:
    """K and V of one KV head as they lie in a cache: raw rows ``k``, ``v`` (n_kv, row bytes), types, head sizes."""

    k: U8
    v: U8
    k_type: int
    v_type: int
    k_dim: int
    v_dim: int
    scale: float
    softcap: float = 0.0
    mask: npt.NDArray[np.float16] | None = None


def attend(
    isa: int, kv: KV, q: F32, cells: I32, state: tuple[float, float, F32] | None = None
) -> tuple[float, float, F32]:
    """Attention state (m, d, o) of query ``q`` (k_dim,) over ``cells``, continued from ``state``; result is o / d."""
    m, d, o = state if state is not None else (-np.inf, 0.0, np.zeros(kv.v_dim, np.float32))
    if len(cells) and not 0 <= int(cells.min()) <= int(cells.max()) < len(kv.k):
        raise ValueError(
            f"Cells go from {cells.min()} to {cells.max()}; the cache has {len(kv.k)}."
        )
    for rows, row_type, dim in ((kv.k, kv.k_type, kv.k_dim), (kv.v, kv.v_type, kv.v_dim)):
        needed = dim * 2 if row_type == KV_F16 else dim // 32 * 34
        if rows.ndim != 2 or (rows.shape[1] < needed and dim <= lib.FASA_MAX_HEAD_DIM):
            raise ValueError(
                f"Rows of K or V have shape {rows.shape}; {needed} bytes per cell are needed."
            )
    o = np.array(o, np.float32)
    c = ffi.new("fasa_kv *")
    c.k, c.v = _pointer("uint8_t[]", kv.k, np.uint8), _pointer("uint8_t[]", kv.v, np.uint8)
    c.k_stride, c.v_stride = kv.k.strides[0], kv.v.strides[0]
    c.k_type, c.v_type, c.k_dim, c.v_dim = kv.k_type, kv.v_type, kv.k_dim, kv.v_dim
    c.scale, c.softcap = kv.scale, kv.softcap
    mask = (
        ffi.NULL
        if kv.mask is None
        else _pointer("uint16_t[]", kv.mask.view(np.uint16), np.uint16, len(kv.k))
    )
    c.mask = mask
    m_out, d_out = ffi.new("float *", m), ffi.new("float *", d)
    _check(
        lib.fasa_attend(
            isa,
            c,
            _pointer("float[]", q, np.float32, kv.k_dim),
            _pointer("int32_t[]", cells, np.int32),
            len(cells),
            m_out,
            d_out,
            _pointer("float[]", o, np.float32, kv.v_dim),
        )
    )
    return m_out[0], d_out[0], o


def hadamard(x: F32) -> F32:
    """Normalized Walsh-Hadamard transform of the last axis, whose length is a power of two; own inverse."""
    out: F32 = np.array(x, np.float32, order="C")
    _check(
        lib.fasa_hadamard(
            _pointer("float[]", out, np.float32), out.size // out.shape[-1], out.shape[-1]
        )
    )
    return out


# ---- session ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Config:
    """Settings of a session; see ``fasa_config`` in the cdef for each."""

    enabled: bool = True
    budget: int = 1024
    n_fc: int = 0
    min_ctx: int = 2048
    sinks: int = 4
    recent: int = 32
    verify: bool = False
    capture: bool = False
    isa: int = ISA_AUTO


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
    _check(lib.fasa_config_check(_c_config(config)))


class Session:
    """The core's side of one llama_context."""

    def __init__(self, profile: Profile | None, config: Config) -> None:
        out = ffi.new("fasa_session **")
        c_profile, keep = _c_profile(profile)
        _check(lib.fasa_session_create(c_profile, _c_config(config), out))
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
        _check(lib.fasa_session_arm(self._live()))
        try:
            yield
        finally:
            _check(lib.fasa_session_disarm(self._live()))

    @property
    def n_backends(self) -> int:
        """Decorated backends that are alive."""
        n: int = lib.fasa_session_backends(self._live())
        return n

    def configure(self, config: Config) -> None:
        """Settings from the next graph on; ValueError names the value and its limit."""
        _check(lib.fasa_session_configure(self._live(), _c_config(config)))

    def set_profile(self, profile: Profile | None) -> None:
        """Another profile from the next graph on; side indexes are rebuilt from the K cache."""
        c_profile, keep = _c_profile(profile)
        _check(lib.fasa_session_set_profile(self._live(), c_profile))
        del keep

    def counters(self) -> Counters:
        """Counters since the last reset."""
        c = ffi.new("fasa_counters *")
        _check(lib.fasa_session_counters(self._live(), c))
        plain = {f.name: getattr(c, f.name) for f in fields(Counters) if f.name != "nodes"}
        return Counters(nodes={name: c.nodes[i] for i, name in enumerate(reasons())}, **plain)

    def timings(self) -> Timings:
        """Timings since the last reset."""
        c = ffi.new("fasa_timings *")
        _check(lib.fasa_session_timings(self._live(), c))
        return Timings(**{f.name: getattr(c, f.name) for f in fields(Timings)})

    def reset(self) -> None:
        """Counters and timings to zero."""
        _check(lib.fasa_session_reset(self._live()))

    def invalidate(self) -> None:
        """Drops the side indexes; they are rebuilt from the K cache at the next use."""
        _check(lib.fasa_session_invalidate(self._live()))

    def captured(self, layer: int) -> F32:
        """Queries of a layer since the last clear, RoPE basis, oldest first: (n_rows, n_head, head_dim)."""
        dim, heads, rows = ffi.new("int32_t *"), ffi.new("int32_t *"), ffi.new("int64_t *")
        _check(lib.fasa_session_captured(self._live(), layer, dim, heads, rows, ffi.NULL))
        out = np.empty((rows[0], heads[0], dim[0]), np.float32)
        _check(
            lib.fasa_session_captured(
                self._live(), layer, dim, heads, rows, _pointer("float[]", out, np.float32)
            )
        )
        return out

    def captured_clear(self) -> None:
        """Forgets the captured queries."""
        _check(lib.fasa_session_captured_clear(self._live()))

    def keys(self, layer: int, n_head_kv: int, head_dim: int, first: int, last: int) -> F32:
        """Keys of cells first <= c < last of a layer in the RoPE basis: (last - first, n_head_kv, head_dim)."""
        out = np.empty((max(0, last - first), n_head_kv, head_dim), np.float32)
        _check(
            lib.fasa_session_keys(
                self._live(), layer, first, last, _pointer("float[]", out, np.float32)
            )
        )
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
    c.chunks = chunks = _pointer("uint16_t[]", arrays[0], np.uint16)
    c.bits = bits = _pointer("uint8_t[]", arrays[1], np.uint8)
    keep: list[Any] = [chunks, bits, arrays]
    n_channel = profile.chunks.shape[0] * profile.chunks.shape[1] * profile.identity.head_dim
    for name in ("center", "scale"):
        values = getattr(profile, name)
        if values is not None:
            array = np.ascontiguousarray(values, np.float32)
            pointer = _pointer("float[]", array, np.float32, n_channel)
            setattr(c, name, pointer)
            keep += [array, pointer]
    return c, keep


def _c_config(config: Config) -> Any:
    c = ffi.new("fasa_config *")
    for field in fields(Config):
        value = int(getattr(config, field.name))
        if not -(2**31) <= value < 2**31:
            raise ValueError(f"{field.name} is {value}; it must fit into 32 bits.")
        setattr(c, field.name, value)
    return c
