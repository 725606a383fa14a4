"""What a run tells its callbacks: an object with ``on_...`` methods, or any callable that takes an event.

| method | when |
|---|---|
| ``on_step(event)`` | after every optimiser step: the run then comes back to Python each time, which costs |
| ``on_steps(event)`` | after every stretch of steps between looks at the validation set and checkpoints |
| ``on_validation(event)`` | after every look at the validation set |
| ``on_epoch_end(event)`` | after every epoch |

A plain callable gets all but the first. An exception in a callback ends the run and reaches the caller.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from microlora.exceptions import DTypeError
from microlora.training.result import EpochRecord, ValidationRecord

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["Callbacks", "EpochEvent", "StepsEvent", "ValidationEvent"]

METHODS = ("on_step", "on_steps", "on_validation", "on_epoch_end")


@dataclass(frozen=True, eq=False)
class StepsEvent:
    """A stretch of steps.

    Attributes:
        epoch: Counted from 0.
        step: Steps made so far.
        losses: float32: mean loss of each step's samples before it.
        grad_norms: float32: norm of each step's gradient before clipping.
        learning_rates: float64: rate of each step.
    """

    epoch: int
    step: int
    losses: NDArray[np.float32]
    grad_norms: NDArray[np.float32]
    learning_rates: NDArray[np.float64]


@dataclass(frozen=True)
class ValidationEvent:
    """A look at the validation set."""

    record: ValidationRecord


@dataclass(frozen=True)
class EpochEvent:
    """The end of an epoch."""

    record: EpochRecord


class Callbacks:
    """Checks callbacks once and calls them.

    Raises:
        DTypeError: One that is neither callable nor has any of the methods.
    """

    def __init__(self, callbacks: Sequence[Any] | Callable[..., Any]) -> None:
        items = list(callbacks) if isinstance(callbacks, list | tuple) else [callbacks]
        self._table: dict[str, list[Callable[[Any], object]]] = {name: [] for name in METHODS}
        for i, item in enumerate(items):
            found = [name for name in METHODS if callable(getattr(item, name, None))]
            for name in found:
                self._table[name].append(getattr(item, name))
            if not found:
                if not callable(item):
                    raise DTypeError(
                        f"callbacks[{i}]: got {type(item).__name__}, expected a callable or an object with "
                        f"one of {', '.join(METHODS)}"
                    )
                for name in METHODS[1:]:
                    self._table[name].append(item)

    @property
    def every_step(self) -> bool:
        """Whether one wants every single step."""
        return bool(self._table["on_step"])

    def steps(self, event: StepsEvent) -> None:
        """After a stretch of steps."""
        for name in ("on_step", "on_steps"):
            for call in self._table[name]:
                call(event)

    def validation(self, record: ValidationRecord) -> None:
        """After a look at the validation set."""
        for call in self._table["on_validation"]:
            call(ValidationEvent(record))

    def epoch_end(self, record: EpochRecord) -> None:
        """After an epoch."""
        for call in self._table["on_epoch_end"]:
            call(EpochEvent(record))
