"""What is compared: dense, FASA with any profile, and the rivals, each with a budget; and their names.

A name is a method and, after a colon, its size. Where the size is left out, the methods that have one take it from the
list of index sizes, so that all of them read about as many bytes.

    dense  oracle  streaming  snapkv  h2o     no size
    fasa                                      the model's own profile
    variance:N  agreement:N  greedy:N  allocation:N  random:N  lowfreq:N      N index bytes per token and KV head
    quest:PAGE  sparq:R  double-sparsity:R    pages of PAGE tokens, R channels
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pyfasa.evaluation.selectors import (
    H2O,
    DoubleSparsity,
    Oracle,
    Quest,
    Selector,
    SnapKV,
    SparQ,
    Streaming,
)
from pyfasa.identity import ModelIdentity

if TYPE_CHECKING:
    from pyfasa.profile import Profile
    from pyfasa.tally import Tally

PLAIN = ("dense", "oracle", "fasa", "streaming", "snapkv", "h2o")
CALIBRATED = ("variance", "agreement", "greedy", "allocation")
DERIVED = ("random", "lowfreq")  # from a profile by variance
RIVALS = ("quest", "sparq", "double-sparsity")
NAMES = (*PLAIN, *CALIBRATED, *DERIVED, *RIVALS)
DEFAULTS = ("dense", "oracle", "fasa", "streaming")
INDEX_BYTES = (10.0,)
BUDGETS = (1024,)


@dataclass(frozen=True)
class Setting:
    """One way to decode: dense, or `budget` cells per query head, scored natively or by a selector.

    name            "dense", "fasa", "variance:10", "quest:16", ... or one of your own
    budget          cells that a query head attends to; None: dense
    profile         scores by its side index
    selector        scores in its place (see ``selectors``)
    bytes_per_cell  bytes read to score one cached token of one KV head, mean over the model; None: dense
    """

    name: str
    budget: int | None = None
    profile: Profile | None = None
    selector: Selector | None = None
    bytes_per_cell: float | None = None

    def __post_init__(self) -> None:
        given = (self.profile is not None) + (self.selector is not None)
        if self.budget is None and given:
            raise ValueError(
                f"the setting {self.name!r} has no budget: give one, or neither profile nor "
                "selector for dense attention"
            )
        if self.budget is not None and given != 1:
            raise ValueError(
                f"the setting {self.name!r} has a budget and {given} ways to score: give a "
                "profile or a selector"
            )
        if self.budget is not None and self.budget < 1:
            raise ValueError(f"the setting {self.name!r} has a budget of {self.budget}: at least 1")
        if self.profile is not None and self.bytes_per_cell is None:
            size = float(self.profile.bytes_per_cell().mean())
            object.__setattr__(self, "bytes_per_cell", size)

    @property
    def dense(self) -> bool:
        return self.budget is None

    @property
    def method(self) -> str:
        """The name without its size."""
        return self.name.split(":")[0]

    @property
    def label(self) -> str:
        """What tells settings apart."""
        return self.name if self.dense else f"{self.name} @ {self.budget}"

    @cached_property
    def fingerprint(self) -> str:
        """Of the profile, so that results of another profile are not taken for this one's; else empty."""
        if self.profile is None:
            return ""
        return hashlib.sha256(self.profile.to_bytes()).hexdigest()[:12]


def check_names(names: Sequence[str], *, empty: bool = False) -> None:
    """ValueError for a name that no setting has, a size that is no number, or no names unless `empty`."""
    if not names and not empty:
        raise ValueError("no setting is given; the usual ones are " + ",".join(DEFAULTS))
    for name in names:
        _parse(name)


def resolve(
    names: Sequence[str],
    model_path: str | os.PathLike[str],
    *,
    budgets: Sequence[int] = BUDGETS,
    index_bytes: Sequence[float] = INDEX_BYTES,
    profile: Profile | None = None,
    seed: int = 0,
    n_threads: int | None = None,
    results: str | os.PathLike[str] | None = None,
    progress: Callable[[str], None] = lambda _: None,
) -> list[Setting]:
    """Settings by name: dense first, then each name at each of its sizes and at each budget.

    model_path   calibrated where a name asks for it; `progress` is told before
    budgets      cells per query head
    index_bytes  sizes for names without one, in bytes per token and KV head
    profile      of "fasa"; None: the model's own, else a fresh calibration
    seed         of calibrations and of random chunks
    results      FILE.jsonl, beside which calibration runs are kept: FILE.allocation.npz, FILE.variance-10.npz, ...;
                 a run of the same model, method and seed that is there is not made again. None: nothing is kept

    Raises ValueError for a wrong name, size or budget; the errors of ``pyfasa.calibrate``.
    """
    from pyfasa.handle import make_config

    check_names(names)
    if not budgets or min(budgets) < 1:
        raise ValueError(f"budgets are {list(budgets)}; give one or more, all at least 1")
    make_config(budget=min(budgets))  # sinks and recent cells must fit
    if index_bytes and min(index_bytes) <= 0:
        raise ValueError(f"index bytes are {list(index_bytes)}; all must be above 0")
    beside = None if results is None else Path(results)
    maker = _Maker(Path(model_path), profile, seed, n_threads, progress, beside)
    found: dict[str, Setting] = {}
    for name in names:
        method, size = _parse(name)
        sizes: Sequence[float | None] = [size]
        if size is None and method not in PLAIN:
            sizes = index_bytes or INDEX_BYTES
        for one in sizes:
            setting = maker.make(method, one, given=size is not None)
            if setting is not None:
                at_budgets = [replace(setting, budget=budget) for budget in budgets]
                found |= {placed.label: placed for placed in at_budgets}
    dense = [Setting("dense")] if "dense" in names else []
    return [*dense, *found.values()]


def _parse(name: str) -> tuple[str, float | None]:
    """`quest:16` -> ("quest", 16.0)"""
    method, colon, text = name.partition(":")
    if method not in NAMES:
        raise ValueError(f"{name!r} is no setting; there are {', '.join(NAMES)}")
    if not colon:
        return method, None
    if method in PLAIN:
        raise ValueError(f"{name!r} has a size, but {method} has none; write {method!r}")
    try:
        size = float(text)
    except ValueError:
        size = -1.0
    if not 0 < size < 2**16 or (method in RIVALS and size != int(size)):
        kind = "a whole number, 1 or more" if method in RIVALS else "a number of bytes above 0"
        raise ValueError(f"{name!r} has the size {text!r}; it must be {kind}, like {method}:16")
    return method, size


_WITHOUT_SIZE: dict[str, Callable[[], Selector]] = {
    "oracle": Oracle,
    "streaming": Streaming,
    "snapkv": SnapKV,
    "h2o": H2O,
}


@dataclass
class _Maker:
    """Makes settings, whose budget is 1 until it is known. Calibrates once per method, or once per size."""

    path: Path
    own: Profile | None
    seed: int
    n_threads: int | None
    progress: Callable[[str], None]
    results: Path | None = None

    def __post_init__(self) -> None:
        self._profiles: dict[tuple[str, float | None], Profile] = {}
        self._tallies: dict[str, Tally] = {}
        self._ranked: Any = None

    @cached_property
    def identity(self) -> ModelIdentity:
        return ModelIdentity.read(self.path)

    def make(self, method: str, size: float | None, *, given: bool) -> Setting | None:
        """size: as after the colon if `given`, else index bytes. None for dense."""
        if method == "dense":
            return None
        if method == "fasa":
            return Setting("fasa", 1, self._own())
        if size is None:
            return self._selected(method, _WITHOUT_SIZE[method]())
        if method in RIVALS:
            count = int(size) if given else self._count(method, size)
            return self._selected(f"{method}:{count}", self._rival(method, count))
        if method in CALIBRATED:
            return Setting(f"{method}:{size:g}", 1, self._calibrated(method, size))
        reorder = random_chunks if method == "random" else low_frequencies
        base = self._calibrated("variance", size)
        return Setting(f"{method}:{size:g}", 1, reorder(base, self.seed))

    def _count(self, method: str, index_bytes: float) -> int:
        """Tokens of a page, or channels, that cost as many bytes or a little less."""
        dim = self.identity.head_dim
        if method == "quest":
            return max(1, int(-(-4 * dim // index_bytes)))
        channels = index_bytes / 2 if method == "sparq" else 2 * (index_bytes - 2)
        return min(max(1, int(channels)), dim)

    def _rival(self, method: str, count: int) -> Selector:
        if method == "quest":
            return Quest(count)
        dim = self.identity.head_dim
        if count > dim:
            raise ValueError(f"{method}:{count} asks for {count} channels; a head has 1 to {dim}")
        if method == "sparq":
            return SparQ(count)
        if self._ranked is None:
            from pyfasa.evaluation.channels import rank_channels

            self.progress("ranking channels for double-sparsity")
            self._ranked = rank_channels(self.path, seed=self.seed, n_threads=self.n_threads)
        return DoubleSparsity(self._ranked[:, :, :count])

    def _selected(self, name: str, selector: Selector) -> Setting:
        size = selector.bytes_per_cell(self.identity.head_dim)
        return Setting(name, 1, selector=selector, bytes_per_cell=size)

    def _own(self) -> Profile:
        from pyfasa.embed import find_profile
        from pyfasa.profile import Profile

        if self.own is None:
            source = find_profile(self.path)
            self.own = Profile.load(source) if source else self._calibrated("allocation", None)
        return self.own

    def _calibrated(self, method: str, size: float | None) -> Profile:
        """As ``pyfasa.calibrate`` makes it."""
        from pyfasa.calibration import profile_of

        key = method, size
        if key not in self._profiles:
            tally = self._measured(method, size)
            self._profiles[key] = profile_of(
                tally, self.path, method=method, index_bytes=size, seed=self.seed
            )
        return self._profiles[key]

    def _measured(self, method: str, size: float | None) -> Tally:
        """What calibration adds up, once for all sizes of "allocation"."""
        from pyfasa.calibration import measure

        size = None if method == "allocation" else size
        name = method if size is None else f"{method}-{size:g}"
        if name not in self._tallies:
            self.progress(f"calibrating {method}" + (f", {size:g} bytes" if size else ""))
            kept = self.results and self.results.with_name(f"{self.results.stem}.{name}.npz")
            self._tallies[name] = measure(
                self.path,
                method=method,
                index_bytes=size,
                seed=self.seed,
                reuse=kept,
                progress=False,
            )
        return self._tallies[name]


def random_chunks(profile: Profile, seed: int = 0) -> Profile:
    """The profile with as many chunks of as many bits, drawn at random from all of each KV head."""
    ids = np.arange(profile.identity.head_dim // 2, dtype=np.uint16)
    rows = np.broadcast_to(ids, (*profile.chunks.shape[:2], ids.size))
    drawn = np.random.default_rng(seed).permuted(rows, axis=2)[:, :, : profile.n_ranked]
    return replace(profile, chunks=drawn, method="random", seed=seed)


def low_frequencies(profile: Profile, seed: int = 0) -> Profile:
    """The profile with as many chunks of as many bits, the lowest frequencies (highest ids) first."""
    ids = np.arange(profile.identity.head_dim // 2, dtype=np.uint16)[::-1][: profile.n_ranked]
    return replace(
        profile, chunks=np.broadcast_to(ids, profile.chunks.shape), method="lowfreq", seed=seed
    )
