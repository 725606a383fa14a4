"""The best that can be learned from synthetic data, kept beside it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from microlora._checks import real
from microlora.data.arrays import Floats, matrix, not_finite
from microlora.exceptions import NonFiniteError, ShapeError

__all__ = ["Optimum"]


@dataclass(frozen=True, eq=False)
class Optimum:
    """The map that synthetic targets were made with, as an adapter of scaling 1, and what it costs.

    Attributes:
        lora_a: float32 (rank, in_features), read-only.
        lora_b: float32 (out_features, rank), read-only; the map is ``y = lora_b lora_a x``.
        sigma: Standard deviation of the noise in each output feature.
        best_loss: Expected ``1/2 |y - t|^2`` of a sample under this map: ``1/2 sigma^2 out_features``. No
            adapter does better on data it has not seen.
        zero_loss: The same for ``y = 0``, an adapter that has learned nothing.

    Raises:
        ShapeError: factors that do not fit together.
        NonFiniteError: NaN or infinity in a factor.
        ConfigError: a loss or sigma below 0.
    """

    lora_a: Floats
    lora_b: Floats
    sigma: float
    best_loss: float
    zero_loss: float

    def __post_init__(self) -> None:
        for name in ("lora_a", "lora_b"):
            factor = matrix(f"optimum: {name}", getattr(self, name))
            if not_finite(factor) is not None:
                raise NonFiniteError(f"optimum: {name}: NaN or infinity")
            object.__setattr__(self, name, factor)
        if self.lora_a.shape[0] != self.lora_b.shape[1]:
            raise ShapeError(f"optimum: lora_b: got {self.lora_b.shape}, expected (out, {len(self.lora_a)})")
        for name in ("sigma", "best_loss", "zero_loss"):
            object.__setattr__(self, name, real(f"optimum: {name}", getattr(self, name), "a number"))

    @property
    def rank(self) -> int:
        """Rank of the map."""
        return len(self.lora_a)

    @property
    def scaling(self) -> float:
        """1: the factors carry the whole map."""
        return 1.0

    def delta_weight(self) -> Floats:
        """float32 (out_features, in_features): the map as a matrix."""
        out: Floats = self.lora_b @ self.lora_a
        return out

    def loss(self, x: npt.ArrayLike, t: npt.ArrayLike) -> float:
        """Mean ``1/2 |y - t|^2`` of this map on x (n, in_features) and t (n, out_features), in float64."""
        y = np.asarray(x, np.float64) @ self.lora_a.T.astype(np.float64) @ self.lora_b.T.astype(np.float64)
        return float(0.5 * ((y - np.asarray(t, np.float64)) ** 2).sum(axis=1).mean())

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Optimum):
            return NotImplemented
        mine = (self.sigma, self.best_loss, self.zero_loss)
        return (
            mine == (other.sigma, other.best_loss, other.zero_loss)
            and np.array_equal(self.lora_a, other.lora_a)
            and np.array_equal(self.lora_b, other.lora_b)
        )

    def __hash__(self) -> int:
        return hash((self.sigma, self.best_loss, self.zero_loss, self.lora_a.shape))
