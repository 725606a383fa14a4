"""Early stopping on a held-out loss (Prechelt 1998), with a state that a checkpoint can hold."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from microlora._checks import check_keys, integer, real, wrong

__all__ = ["EarlyStopping"]


class EarlyStopping:
    """Says after each check whether the loss improved, and when to stop.

    A check improves where ``best - loss > min_delta * |best|``; the first finite one always does. After
    ``patience`` checks in a row that do not, `stop` is True. A loss that is not finite stops at once. The
    caller keeps the weights of `best` and restores them.

    Args:
        patience: Checks without improvement before it stops; 0 never stops for that reason.
        min_delta: Smallest improvement that counts, relative to the best loss, 0 up to 1.

    Raises:
        ConfigError: A value out of its range.
    """

    def __init__(self, patience: int = 3, min_delta: float = 1e-4) -> None:
        self.patience = integer("patience", patience, 0, 2**31)
        want = "a number from 0 up to, but not including, 1"
        self.min_delta = real("min_delta", min_delta, want)
        if not 0.0 <= self.min_delta < 1.0:
            raise wrong("min_delta", min_delta, want)
        self.best: float | None = None
        self.checks = 0
        self.waited = 0
        self.diverged = False

    @property
    def stop(self) -> bool:
        """Whether to stop now."""
        return self.diverged or 0 < self.patience <= self.waited

    def update(self, loss: float) -> bool:
        """Takes one check.

        Args:
            loss: The held-out loss; NaN and infinities stop at once.

        Returns:
            Whether it is a new best.
        """
        self.checks += 1
        value = float(loss)
        if not math.isfinite(value):
            self.diverged = True
            return False
        if self.best is None or self.best - value > self.min_delta * abs(self.best):
            self.best, self.waited = value, 0
            return True
        self.waited += 1
        return False

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {
            "best": self.best,
            "checks": self.checks,
            "waited": self.waited,
            "diverged": self.diverged,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Goes on from `state`.

        Raises:
            ConfigError: Not such a state. Nothing changes then.
        """
        check_keys("early_stopping", state, self.state())
        if set(state) != set(self.state()):
            raise wrong("early_stopping", dict(state), f"all of {', '.join(self.state())}")
        best = state["best"]
        checked = None if best is None else real("early_stopping.best", best, "a finite number or None")
        checks = integer("early_stopping.checks", state["checks"], 0, 2**53)
        waited = integer("early_stopping.waited", state["waited"], 0, 2**53)
        self.best, self.checks, self.waited = checked, checks, waited
        self.diverged = bool(state["diverged"])
