"""Columns from arrays, and the checks of what callers pass beside them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from microlora._checks import FrozenMap, text, write_json, wrong
from microlora.data.arrays import Array, Floats, Integers, frozen, matrix, not_finite
from microlora.data.columns import SCALARS, Columns, MemoryTexts, first_repeat
from microlora.data.hashing import array_digest
from microlora.data.sample import MAX_LABEL
from microlora.encoders.protocol import TextEncoder, encode_checked
from microlora.exceptions import ConfigError, DTypeError, NonFiniteError, ShapeError

if TYPE_CHECKING:
    from microlora.data.dataset import AdapterDataset

__all__ = ["checked_metadata", "columns_of_arrays", "encode_texts", "row_numbers"]

_ENCODE = 256


def columns_of_arrays(
    x: npt.ArrayLike,
    y: npt.ArrayLike | None,
    quality: npt.ArrayLike | float,
    weights: npt.ArrayLike | float,
    ids: Sequence[str] | None,
    domains: Sequence[str] | str,
    sessions: Sequence[str] | str,
    queries: Sequence[str | None] | None,
    responses: Sequence[str | None] | None,
    *,
    copy: bool,
) -> Columns:
    """What `AdapterDataset.from_arrays` holds; arguments and errors are those of it."""
    inputs = matrix("x", x, copy=copy)
    n = len(inputs)
    targets, labels = _outputs(y, n, copy)
    if ids is None:
        digest = array_digest([inputs, targets, labels], 4)
        ids = [f"{digest}-{row}" for row in range(n)]
    fields: dict[str, list[str | None]] = {"id": _strings("ids", ids, n)}
    for name, given in (("domain", domains), ("session_id", sessions)):
        if given != "":
            column = [given] * n if isinstance(given, str) else given
            fields[name] = _strings(name, column, n)
    for name, texts in (("query", queries), ("response", responses)):
        if texts is not None:
            fields[name] = _strings(name, texts, n, missing=True)
    repeated = first_repeat(fields["id"])
    if repeated is not None:
        raise ConfigError(f"ids: {repeated!r} appears twice, expected every id once")
    for name, array in (("x", inputs), ("y", targets)):
        row = None if array is None else not_finite(array)
        if row is not None:
            raise NonFiniteError(f"sample {fields['id'][row]!r}: {name}: NaN or infinity in row {row}")
    scalars = {name: np.full(n, none, dtype) for name, (dtype, none) in SCALARS.items()}
    scalars["quality"] = _scalars("quality", quality, n, 0.0, 1.0)
    scalars["weight"] = _scalars("weights", weights, n, 1e-30, 1e30)
    for column_of in scalars.values():
        frozen(column_of)
    arrays: dict[str, Any] = {"inputs": inputs, "targets": targets, "labels": labels, **scalars}
    return Columns(MemoryTexts(fields, n), **arrays)


def _outputs(y: object, n: int, copy: bool) -> tuple[Floats | None, Integers | None]:
    if y is None:
        return None, None
    array: Array = np.asarray(y)
    if array.ndim == 1 and (array.dtype.kind in "iu" or not array.size):
        if len(array) != n:
            raise ShapeError(f"y: got {len(array)} labels, expected {n} as in x")
        if n and (array.min() < 0 or array.max() > MAX_LABEL):
            raise ConfigError(f"y: got labels {array.min()} to {array.max()}, expected 0 to {MAX_LABEL}")
        return None, frozen(array.astype(np.int64))
    if array.ndim == 1 and array.dtype.kind != "f":
        raise DTypeError(f"y: got dtype {array.dtype}, expected integer labels or float targets")
    targets = matrix("y", array, copy=copy)
    if len(targets) != n:
        raise ShapeError(f"y: got shape {targets.shape}, expected ({n}, out_features) as in x")
    return targets, None


def _strings(name: str, given: object, n: int, missing: bool = False) -> list[str | None]:
    if isinstance(given, str | bytes) or not isinstance(given, Sequence | np.ndarray) or len(given) != n:
        raise ConfigError(f"{name}: got {type(given).__name__}, expected {n} strings")
    if not missing:
        return [text(f"{name}[{i}]", item, empty=name != "ids") for i, item in enumerate(given)]
    return [None if item is None else text(f"{name}[{i}]", item) for i, item in enumerate(given)]


def _scalars(name: str, given: object, n: int, low: float, high: float) -> npt.NDArray[np.float64]:
    try:
        out = np.broadcast_to(np.asarray(given, np.float64), (n,)).copy()
    except (TypeError, ValueError):
        raise ConfigError(f"{name}: got {given!r}"[:80] + f", expected a number or {n} of them") from None
    wrong_rows = np.flatnonzero(~((out >= low) & (out <= high)))  # NaN compares false
    if len(wrong_rows):
        row = int(wrong_rows[0])
        raise ConfigError(f"{name}[{row}]: got {out[row]}, expected a number from {low:g} to {high:g}")
    return out


def row_numbers(name: str, rows: object, n: int) -> Integers:
    """int64 rows from 0 of integers that may count from the end, or of bool (n,).

    Raises:
        ShapeError: rows that are not there, or no vector.
    """
    array: Array = np.asarray(rows)
    if array.dtype == np.bool_ and array.shape == (n,):
        return np.flatnonzero(array)
    if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
        came = f"shape {array.shape} of {array.dtype}"
        raise ShapeError(f"{name}: got {came}, expected integers or bool ({n},)")
    out = array.astype(np.int64)
    if len(out) and not -n <= out.min() <= out.max() < n:
        raise ShapeError(f"{name}: got rows {out.min()} to {out.max()}, expected {-n} to {n - 1}")
    return np.where(out < 0, out + n, out)


def encode_texts(encoder: TextEncoder, dataset: AdapterDataset, field: str) -> Floats:
    """float32 (n, encoder.dim) of one text field, a part at a time.

    Raises:
        ConfigError: a sample without that text.
    """
    texts = dataset.texts(field)
    if None in texts:
        name = dataset.texts("id")[texts.index(None)]
        raise ConfigError(f"sample {name!r}: has no {field}, expected one to encode")
    parts = [np.zeros((0, encoder.dim), np.float32)]
    for start in range(0, len(texts), _ENCODE):
        parts.append(encode_checked(encoder, texts[start : start + _ENCODE]))  # type: ignore[arg-type]
    out = np.concatenate(parts)
    frozen(out)
    return out


def checked_metadata(value: Mapping[str, Any] | None) -> FrozenMap[Any]:
    """A read-only copy of metadata.

    Raises:
        ConfigError: no mapping, or something in it that JSON cannot hold.
    """
    if value is None:
        return FrozenMap()
    if not isinstance(value, Mapping):
        raise wrong("metadata", value, "a mapping that JSON can hold")
    try:
        write_json(dict(value))
    except (TypeError, ValueError) as err:
        raise ConfigError(f"metadata: got {err}, expected only what JSON can hold") from None
    return FrozenMap(value)
