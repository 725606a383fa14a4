"""One constructor of `MergeConfig` for each method, with what matters most as its argument."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Self

from microlora._checks import check_keys

__all__ = ["Constructors"]

Weights = Mapping[str, float] | str | None


class Constructors:
    """``MergeConfig.ties(0.2)`` for ``MergeConfig(method="ties", density=0.2)``.

    Every one takes the other settings of :class:`MergeConfig` by name.
    """

    @classmethod
    def _of(cls, method: str, settings: Mapping[str, Any], **own: Any) -> Self:
        names = [item.name for item in dataclasses.fields(cls)]  # type: ignore[arg-type]
        check_keys(f"MergeConfig.{method}", settings, [n for n in names if n != "method"])
        return cls(method=method, **own, **settings)  # type: ignore[call-arg]

    @classmethod
    def average(cls, **settings: Any) -> Self:
        """The mean of the deltas."""
        return cls._of("average", settings)

    @classmethod
    def weighted(cls, weights: Weights = None, **settings: Any) -> Self:
        """The mean by weights."""
        return cls._of("weighted", settings, weights=weights)

    @classmethod
    def linear(cls, weights: Weights = None, **settings: Any) -> Self:
        """The sum by weights as they are (arXiv 2203.05482)."""
        return cls._of("linear", settings, weights=weights)

    @classmethod
    def task_arithmetic(cls, weights: Weights = None, **settings: Any) -> Self:
        """``lam`` times the sum by weights; a negative one unlearns (arXiv 2212.04089)."""
        return cls._of("task_arithmetic", settings, weights=weights)

    @classmethod
    def cat(cls, weights: Weights = None, **settings: Any) -> Self:
        """The sum by weights, never truncated."""
        return cls._of("cat", settings, weights=weights)

    @classmethod
    def slerp(cls, t: float | None = None, **settings: Any) -> Self:
        """Between two along the great circle (Shoemake 1985)."""
        return cls._of("slerp", settings, t=t)

    @classmethod
    def nuslerp(cls, weights: Weights = None, **settings: Any) -> Self:
        """Between two: directions along the great circle, lengths along the line."""
        return cls._of("nuslerp", settings, weights=weights)

    @classmethod
    def multislerp(cls, weights: Weights = None, **settings: Any) -> Self:
        """Directions of several in the tangent space at their mean."""
        return cls._of("multislerp", settings, weights=weights)

    @classmethod
    def karcher(cls, **settings: Any) -> Self:
        """The Riemannian mean of directions (arXiv 2603.04972)."""
        return cls._of("karcher", settings)

    @classmethod
    def model_stock(cls, **settings: Any) -> Self:
        """The mean, the shorter the less the parents agree (arXiv 2403.19522)."""
        return cls._of("model_stock", settings)

    @classmethod
    def regmean(cls, rho: float | None = None, **settings: Any) -> Self:
        """Least squares over the parents' inputs, from their Grams (arXiv 2212.09849)."""
        return cls._of("regmean", settings, rho=rho)

    @classmethod
    def ties(cls, density: float | None = None, **settings: Any) -> Self:
        """Trim, elect signs, mean of those that agree (arXiv 2306.01708)."""
        return cls._of("ties", settings, density=density)

    @classmethod
    def dare(cls, density: float | None = None, **settings: Any) -> Self:
        """Drop at random and rescale, then sum (arXiv 2311.03099)."""
        return cls._of("dare_linear", settings, density=density)

    dare_linear = dare

    @classmethod
    def dare_ties(cls, density: float | None = None, **settings: Any) -> Self:
        """Drop at random and rescale, then TIES' election and mean."""
        return cls._of("dare_ties", settings, density=density)

    @classmethod
    def della(cls, density: float | None = None, **settings: Any) -> Self:
        """Drop at random by magnitude, then election and mean (arXiv 2406.11617)."""
        return cls._of("della", settings, density=density)

    @classmethod
    def della_linear(cls, density: float | None = None, **settings: Any) -> Self:
        """Drop at random by magnitude, then sum."""
        return cls._of("della_linear", settings, density=density)

    @classmethod
    def breadcrumbs(cls, density: float | None = None, **settings: Any) -> Self:
        """Without the largest and the smallest entries, then sum (arXiv 2312.06795)."""
        return cls._of("breadcrumbs", settings, density=density)

    @classmethod
    def breadcrumbs_ties(cls, density: float | None = None, **settings: Any) -> Self:
        """Without the largest and the smallest entries, then election and mean."""
        return cls._of("breadcrumbs_ties", settings, density=density)

    @classmethod
    def magnitude_prune(cls, density: float | None = None, **settings: Any) -> Self:
        """The largest entries of each, summed."""
        return cls._of("magnitude_prune", settings, density=density)

    @classmethod
    def sce(cls, density: float | None = None, **settings: Any) -> Self:
        """Where parents differ most, by their squares, without minorities (arXiv 2408.07990)."""
        return cls._of("sce", settings, density=density)

    @classmethod
    def fisher(cls, weights: Weights = None, **settings: Any) -> Self:
        """The mean by importance of every entry (arXiv 2111.09832)."""
        return cls._of("fisher", settings, weights=weights)
