"""Dark experience replay: settings of what training remembers of earlier tasks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import microlora._core as _core
from microlora._checks import integer, real, wrong
from microlora.training.settings import MAX_COUNT, Settings

if TYPE_CHECKING:
    from microlora._core import ReplayMemory

__all__ = ["ReplayConfig"]

MAX_WEIGHT = 1e6


@dataclass(frozen=True)
class ReplayConfig(Settings):
    """How many rows of earlier tasks are remembered, and how strongly they act (DER++).

    When a task ends, a uniform draw of all rows so far (algorithm R, Vitter 1985) is kept, each with its
    target or label and with what the adapter answered then. In later tasks every batch of n rows is joined by
    n kept rows, drawn with replacement, and the loss is::

        mean(batch loss) + label_weight * mean(loss of the kept rows)
                         + logit_weight * mean(1/2 |y - stored|^2)

    This is DER++ of Buzzega et al. 2020 (arXiv 2004.07211) with ``beta = label_weight`` and
    ``alpha = logit_weight / 2``: there the distance is ``|y - stored|^2`` without the half. Code that takes
    a mean over the outputs as well, as ``mse_loss`` does, has ``alpha = logit_weight * outputs / 2``. Both
    terms share their rows, and outputs are stored at a task's end; the paper draws twice and stores as it
    goes. ``logit_weight=0`` is plain experience replay.

    The distance is that of logits for a chain with the ``cross_entropy`` head, of outputs for the ``mse``
    head, and of dY for modules on their own. A row's own weight scales its loss, not the distance.

    Attributes:
        capacity: Rows that are kept at most; 0 keeps none, which is the same as no replay, bit for bit.
        logit_weight: Weight of the distance to the stored outputs, 0 to 1e6.
        label_weight: Weight of the kept rows' own loss, 0 to 1e6. With both weights 0 nothing is replayed.
        seed: Seed of what is kept and of what is drawn.

    Raises:
        ConfigError: Names the field, the value that came and what was wanted.
    """

    capacity: int = 200
    logit_weight: float = 0.5
    label_weight: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        put = object.__setattr__
        put(self, "capacity", integer("capacity", self.capacity, 0, MAX_COUNT))
        for name in ("logit_weight", "label_weight"):
            want = f"a number from 0 to {MAX_WEIGHT:g}"
            value = real(name, getattr(self, name), want)
            if not 0.0 <= value <= MAX_WEIGHT:
                raise wrong(name, getattr(self, name), want)
            put(self, name, value + 0.0)
        put(self, "seed", integer("seed", self.seed, 0, 2**63 - 1))

    @property
    def acts(self) -> bool:
        """Whether anything is kept that has a say."""
        return self.capacity > 0 and (self.logit_weight > 0.0 or self.label_weight > 0.0)

    def memory(self) -> ReplayMemory:
        """An empty memory with these settings."""
        return _core.ReplayMemory(
            capacity=self.capacity,
            label_weight=self.label_weight,
            logit_weight=self.logit_weight,
            seed=self.seed,
        )
