"""Second moments of a layer's inputs: what merging weighs weight changes by."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

import microlora._core as _core
from microlora._checks import integer, real, wrong
from microlora.exceptions import DTypeError, FormatError, NonFiniteError, ShapeError

__all__ = ["Gram", "collect_gram"]

Floats = NDArray[np.float32]
Wide = NDArray[np.float64]

#: Widest input whose Gram is kept whole: 16 MiB.
DENSE_UP_TO = 2048
#: Rows taken into the low-rank part at a time.
BLOCK = 256


@dataclass(frozen=True, eq=False, repr=False)
class Gram:
    """``E[x^T x]`` of a layer's inputs, whole or as a diagonal with a low-rank part.

    Up to 2,048 features it is the matrix itself: ``4 d^2`` bytes. Above, ``low.T @ low`` plus what the exact
    diagonal has beyond it: ``4 d (q + 1)`` bytes, collected by an incremental SVD (Brand 2006) that only ever
    drops positive semi-definite parts. So ``G - low.T @ low`` is positive semi-definite, and its largest
    eigenvalue is at most ``error_bound``. Sums are made in float64, kept in float32.

    Attributes:
        n: Rows it is the mean of.
        diag: float32 (d,): the exact diagonal.
        dense: float32 (d, d), or None above 2,048 features.
        low: float32 (q, d), or None where there is the whole matrix.
        error_bound: Bound of the spectral norm of ``G - low.T @ low``; 0 where the matrix is whole.
    """

    n: int
    diag: Floats
    dense: Floats | None = None
    low: Floats | None = None
    error_bound: float = 0.0

    @property
    def features(self) -> int:
        """Width d of the inputs."""
        return int(self.diag.shape[0])

    @property
    def memory_bytes(self) -> int:
        """Bytes of the numbers: ``4 d^2 + 4 d`` whole, ``4 d (q + 1)`` with a low-rank part."""
        return sum(a.nbytes for a in (self.diag, self.dense, self.low) if a is not None)

    def matrix(self) -> Floats:
        """The (d, d) matrix it stands for, a new array."""
        if self.dense is not None:
            return self.dense.copy()
        low = self._low()
        full = low.T @ low
        np.fill_diagonal(full, self.diag)
        return full.astype(np.float32)

    def apply(self, v: ArrayLike) -> Floats:
        """``v @ G`` without the matrix where it is not there.

        Args:
            v: Floating point (d,) or (k, d).

        Raises:
            ShapeError: Another width.
        """
        rows = np.asarray(v, np.float64)
        if rows.ndim not in (1, 2) or rows.shape[-1] != self.features:
            raise ShapeError(
                f"v: got shape {rows.shape}, expected ({self.features},) or (k, {self.features})"
            )
        if self.dense is not None:
            return np.asarray(rows @ self.dense, np.float32)
        low = self._low()
        rest = self.diag.astype(np.float64) - (low**2).sum(0)
        return np.asarray((rows @ low.T) @ low + rows * rest, np.float32)

    def _low(self) -> Wide:
        assert self.low is not None
        return self.low.astype(np.float64)

    def __add__(self, other: Gram) -> Gram:
        """The Gram of both sets of rows together."""
        if not isinstance(other, Gram):
            return NotImplemented
        if other.features != self.features or (self.dense is None) != (other.dense is None):
            raise ShapeError(f"other: got {other!r}, expected one like {self!r}")
        n = self.n + other.n
        a, b = self.n / n, other.n / n
        diag = (a * self.diag.astype(np.float64) + b * other.diag).astype(np.float32)
        if self.dense is not None and other.dense is not None:
            dense = a * self.dense.astype(np.float64) + b * other.dense
            return Gram(n, diag, dense=dense.astype(np.float32))
        mine, theirs = self._low(), other._low()
        q = max(len(mine), len(theirs))
        low, dropped = _shrink(np.vstack([math.sqrt(a) * mine, math.sqrt(b) * theirs]), q)
        bound = a * self.error_bound + b * other.error_bound + dropped
        return Gram(n, diag, low=low.astype(np.float32), error_bound=bound)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Gram) and self.to_bytes() == other.to_bytes()

    def __hash__(self) -> int:
        return hash(self.to_bytes())

    def __repr__(self) -> str:
        shape = "dense" if self.low is None else f"diagonal + rank {len(self.low)}"
        return f"Gram({self.features} features, {shape}, n={self.n})"

    def arrays(self) -> dict[str, Floats]:
        """The arrays by name: ``diag`` and ``dense`` or ``low``."""
        named = {"diag": self.diag, "dense": self.dense, "low": self.low}
        return {name: value for name, value in named.items() if value is not None}

    def facts(self) -> dict[str, float]:
        """What is not an array, fit for JSON."""
        return {"n": self.n, "error_bound": self.error_bound}

    @classmethod
    def of(cls, arrays: Mapping[str, NDArray[Any]], facts: Mapping[str, Any]) -> Gram:
        """A Gram from :meth:`arrays` and :meth:`facts`.

        Raises:
            FormatError: Arrays that do not fit one another, or numbers that cannot be.
        """
        diag, dense, low = (arrays.get(name) for name in ("diag", "dense", "low"))
        try:
            n = integer("n", facts.get("n"), 1, 2**53)
            bound = real("error_bound", facts.get("error_bound"), "a number, 0 or above")
        except ValueError as e:
            raise FormatError(f"gram: {e}") from e
        if diag is None or diag.ndim != 1 or set(arrays) - {"diag", "dense", "low"}:
            raise FormatError(f"gram: got arrays {sorted(arrays)}, expected diag and dense or low")
        d = len(diag)
        whole = dense is not None and dense.shape == (d, d) and low is None
        part = low is not None and low.ndim == 2 and low.shape[1] == d and dense is None
        finite = all(np.isfinite(a).all() for a in arrays.values()) and (diag >= 0).all()
        if not (whole or part) or not finite or bound < 0:
            shapes = {name: a.shape for name, a in arrays.items()}
            raise FormatError(f"gram: got arrays {shapes}, expected finite ones that fit one another")
        frozen = {name: _frozen(a) for name, a in arrays.items()}
        return cls(n, frozen["diag"], frozen.get("dense"), frozen.get("low"), bound)

    def to_bytes(self) -> bytes:
        """Safetensors bytes; the same Gram gives the same bytes."""
        entries: dict[str, Any] = {"__metadata__": {"gram": json.dumps(self.facts())}}
        at, body = 0, b""
        for name, array in self.arrays().items():
            raw = np.ascontiguousarray(array, "<f4").tobytes()
            entries[name] = {"dtype": "F32", "shape": array.shape, "data_offsets": [at, at + len(raw)]}
            at, body = at + len(raw), body + raw
        text = json.dumps(entries).encode()
        text += b" " * (-len(text) % 8)
        return struct.pack("<Q", len(text)) + text + body

    @classmethod
    def from_bytes(cls, data: bytes) -> Gram:
        """Reads what :meth:`to_bytes` wrote.

        Raises:
            FormatError: Bytes of anything else.
        """
        if not isinstance(data, bytes):
            raise DTypeError(f"data: got {type(data).__name__}, expected bytes")
        try:
            (size,) = struct.unpack_from("<Q", data)
            entries = json.loads(data[8 : 8 + size])
            facts = json.loads(entries.pop("__metadata__")["gram"])
            body, arrays = data[8 + size :], {}
            for name, entry in entries.items():
                begin, end = entry["data_offsets"]
                raw = body[begin:end]
                if entry["dtype"] != "F32" or not 0 <= begin <= end <= len(body):
                    raise ValueError(f"tensor {name!r} is not float32 inside the file")
                arrays[name] = np.frombuffer(raw, "<f4").reshape(entry["shape"])
        except (ValueError, KeyError, TypeError, AttributeError, struct.error) as e:
            raise FormatError(f"gram: not bytes of a Gram: {e}") from e
        return cls.of(arrays, facts)


def _frozen(array: NDArray[Any]) -> Floats:
    copy = np.array(array, np.float32)
    copy.setflags(write=False)
    return copy


def _shrink(rows: Wide, q: int) -> tuple[Wide, float]:
    """At most ``q`` rows with nearly the same ``rows.T @ rows``, and the largest eigenvalue dropped."""
    if len(rows) <= q:
        return rows, 0.0
    values, vectors = np.linalg.eigh(rows @ rows.T)
    kept = vectors[:, -q:].T @ rows
    return kept[::-1], float(max(values[-q - 1], 0.0))


def collect_gram(lora: _core.MicroLora, x: ArrayLike, module: str | None = None, *, q: int = 64) -> Gram:
    """Second moments of the inputs of a module, ``X.T @ X / n``.

    The same for every adapter of a layer, so that merging can weigh their changes by what the layer reads
    (RegMean, arXiv 2212.09849). More data: ``gram + collect_gram(lora, more)``.

    Args:
        lora: The learner whose module reads ``x``.
        x: Floating point (n, in_features).
        module: Name of the module; None where there is only one.
        q: Rank of the part beside the diagonal, above 2,048 features.

    Returns:
        The matrix up to 2,048 features (16 MiB there); above, the exact diagonal and a rank-``q`` part
        (1 MiB at 4,096 features and rank 64). See :class:`Gram` for the error.

    Raises:
        ShapeError: Another width, or no rows.
        DTypeError: Not floating point.
        NonFiniteError: NaN or infinity.
        UnknownModuleError: No module of that name.
    """
    if not isinstance(lora, _core.MicroLora):
        raise DTypeError(f"lora: got {type(lora).__name__}, expected a MicroLoRA")
    names = lora.modules()
    if module is None and len(names) != 1:
        raise wrong("module", None, f"one of {', '.join(names)}")
    width = lora[names[0] if module is None else module].in_features
    rank = integer("q", q, 1, 65_536)
    rows = np.asarray(x)
    if rows.dtype.kind != "f":
        raise DTypeError(f"X: got dtype {rows.dtype}, expected floating point")
    if rows.ndim != 2 or rows.shape[1] != width or not len(rows):
        raise ShapeError(f"X: got shape {rows.shape}, expected (n, {width}) with n at least 1")
    dense = np.zeros((width, width)) if width <= DENSE_UP_TO else None
    diag, low, bound = np.zeros(width), np.zeros((0, width)), 0.0
    for start in range(0, len(rows), BLOCK):
        block = rows[start : start + BLOCK].astype(np.float64)
        if not np.isfinite(block).all():
            raise NonFiniteError(f"X: contains NaN or infinity in rows {start} to {start + len(block) - 1}")
        diag += (block**2).sum(0)
        if dense is not None:
            dense += block.T @ block
        else:
            low, dropped = _shrink(np.vstack([low, block]), rank)
            bound += dropped
    n = len(rows)
    with np.errstate(over="ignore"):
        mean = _frozen(diag / n)
        whole = None if dense is None else _frozen(dense / n)
    if not np.isfinite(mean).all():
        raise NonFiniteError("X: its squares leave float32")
    if whole is not None:
        return Gram(n, mean, dense=whole)
    return Gram(n, mean, low=_frozen(low / math.sqrt(n)), error_bound=bound / n)
