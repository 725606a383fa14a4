"""Breakthroughs: a lasting drop of a noisy loss, told from luck by a one-sided CUSUM (Page 1954)."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from microlora._checks import integer, real, wrong
from microlora.exceptions import NonFiniteError

__all__ = ["BreakthroughDetector", "check_breakthrough"]


class BreakthroughDetector:
    """Says when the losses have dropped below where they were.

    The first ``warmup`` losses give a mean m and a standard deviation s. From then on
    ``S <- max(0, S - (loss - m) / s - drift)``, and S above ``threshold`` is a breakthrough, after which the
    losses that follow give a new reference.

    With the defaults, on independent normal noise: fewer than 2 in 100 runs of 1,000 losses have a false
    alarm (1.1 measured in 4,000 runs, the error of m and s included), and a drop by one s is found after 26
    losses on average, within 55 in 95 of 100 runs. A loss that trends downwards is a drop too.

    Args:
        warmup: Losses of the reference, 10 or more.
        drift: Drop that is not worth an alarm, in standard deviations; half the drop that is looked for.
        threshold: Height of the alarm, above 0.

    Raises:
        ConfigError: A value out of its range.
    """

    def __init__(self, warmup: int = 100, drift: float = 0.5, threshold: float = 12.0) -> None:
        self.warmup = integer("warmup", warmup, 10, 2**31)
        self.drift = _above("drift", drift)
        self.threshold = _above("threshold", threshold)
        self.reset()

    def reset(self) -> None:
        """Forgets the reference and the sum."""
        self.seen = 0
        self.score = 0.0
        self._mean = 0.0
        self._squares = 0.0

    @property
    def ready(self) -> bool:
        """Whether there is a reference."""
        return self.seen >= self.warmup

    @property
    def average_run_length(self) -> float:
        """Losses until a false alarm, on average, were m and s known exactly (Siegmund 1985)."""
        b = self.threshold + 1.166
        return (math.expm1(2.0 * self.drift * b) - 2.0 * self.drift * b) / (2.0 * self.drift**2)

    def update(self, loss: float) -> bool:
        """Takes one loss; returns whether it completes a breakthrough.

        Raises:
            NonFiniteError: NaN or infinity; nothing changes then.
        """
        value = float(loss)
        if not math.isfinite(value):
            raise NonFiniteError(f"loss: got {value}, expected a finite number")
        if not self.ready:
            # Welford's running mean and sum of squares.
            self.seen += 1
            delta = value - self._mean
            self._mean += delta / self.seen
            self._squares += delta * (value - self._mean)
            return False
        spread = math.sqrt(self._squares / (self.warmup - 1))
        # A reference without any spread: the smallest drop that floating point can hold is one.
        spread = max(spread, 1e-12 * abs(self._mean), 1e-300)
        self.score = max(0.0, self.score - (value - self._mean) / spread - self.drift)
        if self.score <= self.threshold:
            return False
        self.reset()
        return True


def check_breakthrough(losses: Iterable[float], **settings: Any) -> int | None:
    """Where a series of losses first completes a breakthrough.

    Args:
        losses: In the order in which they came.
        **settings: Those of `BreakthroughDetector`.

    Returns:
        Index of the loss that raised the alarm; None where none did.

    Raises:
        NonFiniteError: NaN or infinity among the losses.
        ConfigError: A setting out of its range.
    """
    detector = BreakthroughDetector(**settings)
    return next((i for i, loss in enumerate(losses) if detector.update(loss)), None)


def _above(name: str, value: object) -> float:
    want = "a number above 0, at most 1e6"
    number = real(name, value, want)
    if not 0.0 < number <= 1e6:
        raise wrong(name, value, want)
    return number
