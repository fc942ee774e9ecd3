"""The exceptions of pyfasa. Every message is a sentence: the value, the limit, the way out."""

from __future__ import annotations


class FasaError(Exception):
    """Base of all exceptions that pyfasa raises on purpose."""


class ProfileError(FasaError, ValueError):
    """A profile is damaged, does not fit the model, or cannot exist for it."""


class ModelFileError(FasaError, ValueError):
    """A GGUF file is missing, incomplete, or of a kind that pyfasa cannot work with."""


class HostError(FasaError, RuntimeError):
    """This build of llama.cpp, or this machine, cannot do what was asked."""


class WriteError(FasaError, RuntimeError):
    """A file could not be written; what was there before is untouched."""


class DenseWarning(UserWarning):
    """Decoding is dense, or sparse with less certainty than usual; the message says why."""
