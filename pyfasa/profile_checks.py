"""What a profile must be: each check raises ProfileError with the value, the limit and the place."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from pyfasa.errors import ProfileError
from pyfasa.identity import ModelIdentity

BITS = (8, 4, 2, 1)  # the order of the segments of an index row
MAX_HEAD_DIM = 256


def frozen(name: str, value: npt.ArrayLike, dtype: np.dtype[Any]) -> npt.NDArray[Any]:
    """A read-only copy in C order; ProfileError when the values do not fit the type."""
    array = np.asarray(value)
    if array.dtype.kind not in ("ui" if dtype.kind == "u" else "uif"):
        raise ProfileError(f"{name} holds {array.dtype} values; it must hold {dtype} values.")
    if dtype.kind == "u" and array.size:
        low, high, most = int(array.min()), int(array.max()), int(np.iinfo(dtype).max)
        if low < 0 or high > most:
            raise ProfileError(f"{name} holds {low} to {high}; its values are 0 to {most}.")
    with np.errstate(over="ignore"):
        copy = array.astype(dtype, order="C", copy=True)
    copy.setflags(write=False)
    return copy


def whole(name: str, value: object, low: int, high: int) -> None:
    if not isinstance(value, int) or not low <= value <= high:
        raise ProfileError(f"{name} is {value!r}; it must be a whole number, {low} to {high}.")


def text(name: str, value: object) -> None:
    if not isinstance(value, str) or not value.encode(errors="ignore").decode() == value:
        raise ProfileError(f"{name} is {value!r}; it must be a text that UTF-8 can hold.")


def validate_identity(model: ModelIdentity) -> None:
    """Raises ProfileError for a model that no profile can describe."""
    for name in ("name", "architecture", "tensor_hash", "sample_type", "sample_hash"):
        text(f"model.{name}", getattr(model, name))
    for name in ("n_layer", "n_head", "n_head_kv"):
        whole(f"model.{name}", getattr(model, name), 1, 2**16 - 1)
    whole("model.head_dim", model.head_dim, 2, MAX_HEAD_DIM)
    whole("model.n_rot", model.n_rot, 2, model.head_dim)
    for name in ("head_dim", "n_rot"):
        if getattr(model, name) % 2:
            raise ProfileError(f"model.{name} is {getattr(model, name)}; it must be even.")
    if model.rope not in ("norm", "neox"):
        raise ProfileError(f"model.rope is {model.rope!r}; it must be 'norm' or 'neox'.")
    base = model.rope_freq_base
    if not (isinstance(base, float) and math.isfinite(base) and base > 0):
        raise ProfileError(f"model.rope_freq_base is {base!r}; it must be a number above 0.")


def validate_report(name: str, array: npt.NDArray[Any], shape: tuple[int, ...]) -> None:
    if array.shape != shape:
        raise ProfileError(f"{name} has the shape {array.shape}; it must be {shape}.")
    if not np.isfinite(array).all():
        raise ProfileError(f"{name} holds values that are no numbers.")


def validate_channels(name: str, array: npt.NDArray[np.float32], model: ModelIdentity) -> None:
    wanted = (model.n_layer, model.n_head_kv, model.head_dim)
    if array.shape != wanted:
        raise ProfileError(
            f"{name} has the shape {array.shape}; [n_layer, n_head_kv, head_dim] is {wanted}."
        )
    wrong = ~np.isfinite(array) | (array <= 0 if name == "scale" else False)
    if wrong.any():
        layer, head, dim = (int(i) for i in np.argwhere(wrong)[0])
        raise ProfileError(
            f"{name} of layer {layer}, KV head {head}, dim {dim} is {array[layer, head, dim]}; "
            f"it must be finite{' and above 0' if name == 'scale' else ''}."
        )


def validate_chunks(
    chunks: npt.NDArray[np.uint16], bits: npt.NDArray[np.uint8], model: ModelIdentity
) -> None:
    rows = (model.n_layer, model.n_head_kv)
    if chunks.ndim != 3 or chunks.shape[:2] != rows or chunks.shape[2] < 1:
        raise ProfileError(
            f"chunks has the shape {chunks.shape}; [n_layer, n_head_kv, n_ranked] begins with "
            f"{rows} for this model, and n_ranked is at least 1."
        )
    if bits.shape != chunks.shape:
        raise ProfileError(f"bits has the shape {bits.shape}, chunks has {chunks.shape}.")
    limit, used = model.head_dim // 2, bits > 0
    # Unused ranks get ids that nothing else has, so that equal neighbours are real duplicates.
    ids = np.sort(np.where(used, chunks, np.arange(chunks.shape[2]) + 2**16), axis=2)
    for wrong, text in (
        (~np.isin(bits, (0, *BITS)), "{bits} bits; 1, 2, 4 and 8 exist, and 0 for unused"),
        (used[:, :, 1:] & ~used[:, :, :-1], "a chunk in use after an unused rank"),
        (used & (chunks >= limit), f"chunk {{chunk}}; head_dim {2 * limit} has 0 to {limit - 1}"),
        (ids[:, :, 1:] == ids[:, :, :-1], "the same chunk twice"),
    ):
        if wrong.any():
            here = tuple(int(i) for i in np.argwhere(wrong)[0])
            found = text.format(bits=bits[here], chunk=chunks[here])
            raise ProfileError(f"Layer {here[0]}, KV head {here[1]} has {found}.")
