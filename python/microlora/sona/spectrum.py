"""How much of a linear stream a rank can hold: leave-one-out errors within the bottleneck and without it."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Doubles = NDArray[np.float64]

__all__ = ["Fit", "fit_of"]

_RIDGES = (1e-4, 1e-2, 1e-1, 1.0, 10.0)


class Fit(NamedTuple):
    """Mean squared errors of samples that were left out, and the share of ``|x|^2`` that A holds."""

    rank: int
    energy: float
    held: float
    whole: float
    nothing: float


def fit_of(x: Doubles, t: Doubles, a: Doubles) -> Fit:
    """Ridge regressions of targets on inputs, as A lets them through and as they are.

    Errors are those of leave-one-out prediction (Allen's PRESS, 1974), each at its best ridge, so that more
    dimensions do not win by fitting noise.

    Args:
        x: Inputs (n, in_features).
        t: Targets (n, out_features).
        a: A, (rank, in_features).
    """
    basis = np.linalg.svd(a, full_matrices=False)[2] if a.any() else a[:0]
    u = x @ basis.T
    total = float((x**2).sum())
    return Fit(
        rank=len(a),
        energy=float((u**2).sum()) / total if total > 0.0 else 0.0,
        held=_left_out_error(u, t),
        whole=_left_out_error(x, t),
        nothing=float((t**2).sum(1).mean()),
    )


def _left_out_error(x: Doubles, t: Doubles) -> float:
    """Smallest leave-one-out error over the ridges, from one decomposition."""
    left, s, _ = np.linalg.svd(x, full_matrices=False)
    scale = float((s**2).mean()) if len(s) else 0.0
    if scale == 0.0:
        return float((t**2).sum(1).mean())
    along = left.T @ t
    errors = []
    for ridge in _RIDGES:
        shrink = s**2 / (s**2 + ridge * scale)
        leverage = np.minimum((left**2) @ shrink, 1.0 - 1e-9)
        residual = t - left @ (shrink[:, None] * along)
        errors.append(float(((residual / (1.0 - leverage)[:, None]) ** 2).sum(1).mean()))
    return min(errors)
