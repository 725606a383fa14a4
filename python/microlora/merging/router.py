"""Weights of members by the input: whatever has `weights`, and nearness to centroids."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, runtime_checkable

import numpy as np
from numpy.typing import ArrayLike, NDArray

from microlora._checks import SCHEMA_KEY, check_document, flag, real, wrong
from microlora._document import Document
from microlora.exceptions import FormatError, NonFiniteError, ShapeError

__all__ = ["CentroidRouter", "Router"]

Floats = NDArray[np.float32]

SCHEMA_VERSION = 1


@runtime_checkable
class Router(Protocol):
    """Whatever gives every row of inputs a weight for every member."""

    def weights(self, x: Floats) -> ArrayLike:
        """Weights (n, K) of the rows x (n, in_features)."""
        ...


@dataclass(frozen=True, eq=False)
class CentroidRouter(Document):
    """Weights by nearness: ``pi_k(x) = softmax_k(cos(x, mu_k) / T)``, or all to the nearest.

    Attributes:
        centroids: float32 (K, d), read-only: a direction for each member, none of them zero.
        temperature: T above 0: the smaller, the more goes to the nearest.
        hard: One weight of 1 for the nearest (the first of equals), exact 0 for all others.

    Raises:
        ShapeError: Centroids that are no matrix.
        NonFiniteError: NaN or infinity in a centroid.
        ConfigError: A centroid of zero, a temperature that is not above 0.
    """

    _document: ClassVar[str] = "router"

    centroids: Any
    temperature: float = 0.1
    hard: bool = False

    def __post_init__(self) -> None:
        put = object.__setattr__
        rows = np.array(self.centroids, np.float32)
        if rows.ndim != 2 or 0 in rows.shape:
            raise ShapeError(f"centroids: got shape {rows.shape}, expected (members, features)")
        if not np.isfinite(rows).all():
            raise NonFiniteError("centroids: contains NaN or infinity")
        lengths = np.linalg.norm(rows.astype(np.float64), axis=1)
        if not lengths.all():
            raise wrong(f"centroids[{int(np.argmin(lengths))}]", 0.0, "a direction, not all zeros")
        rows.setflags(write=False)
        put(self, "centroids", rows)
        want = "a number above 0"
        put(self, "temperature", real("temperature", self.temperature, want))
        if self.temperature <= 0.0:
            raise wrong("temperature", self.temperature, want)
        put(self, "hard", flag("hard", self.hard))
        put(self, "_units", (rows / lengths[:, None]).astype(np.float32))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, CentroidRouter) and self.to_json() == other.to_json()

    def __hash__(self) -> int:
        return hash((self.centroids.tobytes(), self.temperature, self.hard))

    def __repr__(self) -> str:
        k, d = self.centroids.shape
        return (
            f"CentroidRouter({k} centroids of {d} features, temperature={self.temperature}, hard={self.hard})"
        )

    def weights(self, x: ArrayLike) -> Floats:
        """Weights float32 (n, K) of rows (n, d), or (K,) of one row (d,); they sum to 1.

        A row of zeros is equally near to all.

        Raises:
            ShapeError: Another width.
        """
        rows = np.asarray(x, np.float32)
        k, d = self.centroids.shape
        if rows.ndim not in (1, 2) or rows.shape[-1] != d:
            raise ShapeError(f"x: got shape {rows.shape}, expected ({d},) or (n, {d})")
        many = np.atleast_2d(rows)
        lengths = np.linalg.norm(many, axis=1, keepdims=True)
        units: Floats = self._units  # type: ignore[attr-defined]
        z = (many @ units.T) / np.where(lengths > 0, lengths, 1)
        if self.hard:
            pi = np.zeros((len(many), k), np.float32)
            pi[np.arange(len(many)), z.argmax(1)] = 1.0
        else:
            e = np.exp((z - z.max(1, keepdims=True)).astype(np.float64) / self.temperature)
            pi = (e / e.sum(1, keepdims=True)).astype(np.float32)
        return pi[0] if rows.ndim == 1 else pi

    def to_dict(self) -> dict[str, Any]:
        """A plain dict that JSON can hold; float32 numbers come back bit for bit."""
        rows = [[float(v) for v in row] for row in self.centroids]
        named = {"centroids": rows, "temperature": self.temperature, "hard": self.hard}
        return {SCHEMA_KEY: SCHEMA_VERSION, **named}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> CentroidRouter:
        """The router of a dict.

        Raises:
            ConfigError: An unknown key, or a wrong value.
            FormatError: Centroids that are no rows of numbers, or a newer version.
        """
        values = check_document("router", data, ("centroids", "temperature", "hard"), SCHEMA_VERSION)
        try:
            rows = np.array(values.pop("centroids"), np.float32)
        except (KeyError, TypeError, ValueError) as e:
            raise FormatError(f"router: centroids: expected rows of numbers: {e}") from e
        return cls(rows, **values)
