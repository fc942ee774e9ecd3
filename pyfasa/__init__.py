"""Frequency-aware sparse attention (FASA, arXiv 2602.03152) for llama.cpp models.

``pyfasa.Llama`` is ``llama_cpp.Llama`` whose decoding speed hardly depends on the length of the context.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pyfasa.calibration import calibrate
    from pyfasa.llama import Llama
    from pyfasa.patching import patch, unpatch
    from pyfasa.profile import Profile

    __version__: str

__all__ = ["Llama", "Profile", "__version__", "calibrate", "patch", "unpatch"]

_HOMES = {
    "Llama": "pyfasa.llama", "Profile": "pyfasa.profile", "calibrate": "pyfasa.calibration",
    "patch": "pyfasa.patching", "unpatch": "pyfasa.patching",
}  # fmt: skip


def _load(name: str) -> Any:
    """Names are loaded when used: `pyfasa doctor` must run where llama-cpp-python is broken."""
    if name == "__version__":
        from importlib.metadata import PackageNotFoundError, version

        try:
            return version("pyfasa")
        except PackageNotFoundError:  # a source tree that was never installed
            return "0+unknown"
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'pyfasa' has no attribute {name!r}")


if not TYPE_CHECKING:  # type checkers have the imports above, and would believe any name
    __getattr__ = _load
