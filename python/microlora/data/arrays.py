"""Arrays of samples: checked, turned into float32 and made read-only."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from microlora.exceptions import DTypeError, NonFiniteError, ShapeError

__all__ = ["Array", "Floats", "Integers", "frozen", "matrix", "not_finite", "vector"]

Array = npt.NDArray[Any]
Floats = npt.NDArray[np.float32]
Integers = npt.NDArray[np.int64]

_CHUNK = 4096


def frozen(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """The array itself, read-only from now on."""
    array.flags.writeable = False
    return array


def _numbers(name: str, value: object) -> Array:
    try:
        array = np.asarray(value)
    except (TypeError, ValueError) as err:  # rows of different lengths, or an object that refuses
        raise ShapeError(f"{name}: got {type(value).__name__} that is no array ({err})") from None
    if array.dtype.kind not in "fiu":
        raise DTypeError(f"{name}: got dtype {array.dtype}, expected real numbers")
    return array


def vector(name: str, value: object) -> Floats:
    """A read-only float32 copy of a vector.

    Raises:
        DTypeError: no real numbers.
        ShapeError: no vector, or an empty one.
        NonFiniteError: NaN or infinity, or a number beyond float32; the message has its index.
    """
    array = _numbers(name, value)
    if array.ndim != 1 or not array.size:
        raise ShapeError(f"{name}: got shape {array.shape}, expected (width,) with a width of 1 or more")
    with np.errstate(over="ignore"):
        out = np.array(array, np.float32, order="C")
    if not np.isfinite(out).all():
        at = int(np.flatnonzero(~np.isfinite(out))[0])
        raise NonFiniteError(f"{name}: got {array[at]!s} at index {at}, expected finite float32 numbers")
    frozen(out)
    return out


def matrix(name: str, value: object, *, copy: bool = True) -> Floats:
    """A read-only, C-contiguous float32 matrix; ``copy=False`` keeps a view where the array is one already.

    Raises:
        DTypeError: no real numbers.
        ShapeError: no matrix, or one without columns.
    """
    array = _numbers(name, value)
    if array.ndim != 2 or not array.shape[1]:
        raise ShapeError(f"{name}: got shape {array.shape}, expected (rows, width)")
    if not copy and array.dtype == np.float32 and array.flags.c_contiguous and array.dtype.isnative:
        out: Floats = array.view()
    else:
        with np.errstate(over="ignore"):
            out = np.array(array, np.float32, order="C")
    frozen(out)
    return out


def not_finite(array: Array) -> int | None:
    """The first row that holds NaN or infinity, or None; reads a part at a time, so a mapped file will do."""
    for start in range(0, len(array), _CHUNK):
        part = np.isfinite(array[start : start + _CHUNK])
        if not part.all():
            return start + int(np.flatnonzero(~part.reshape(len(part), -1).all(axis=1))[0])
    return None
