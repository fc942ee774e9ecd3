"""Frequency-aware sparse attention (FASA, arXiv 2602.03152) for llama.cpp models.

``pyfasa.Llama`` is ``llama_cpp.Llama`` whose decoding speed hardly depends on the length of the context.
"""

from importlib.metadata import PackageNotFoundError, version

from pyfasa.calibrate import calibrate
from pyfasa.llama import Llama
from pyfasa.profile import Profile

try:
    __version__ = version("pyfasa")
except PackageNotFoundError:  # a source tree that was never installed
    __version__ = "0+unknown"

__all__ = ["Llama", "Profile", "__version__", "calibrate"]
