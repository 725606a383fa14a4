"""A uniform draw of a stream's events (Vitter's algorithm R), for estimates at the end of a task."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

    from microlora._core import FeedbackBase

__all__ = ["Event", "Reservoir"]


@dataclass(frozen=True, eq=False)
class Event:
    """One sample as it came."""

    x: np.ndarray[Any, Any]
    feedback: FeedbackBase
    module: str | None
    base: np.ndarray[Any, Any] | None

    @classmethod
    def copy_of(
        cls, x: ArrayLike, feedback: FeedbackBase, module: str | None, base: ArrayLike | None
    ) -> Event:
        """The caller may write to its arrays afterwards."""
        kept = None if base is None else np.array(base, np.float32)
        return cls(np.array(x, np.float32), feedback, module, kept)


class Reservoir:
    """Keeps ``size`` of the events offered, each with the same probability; None keeps all."""

    def __init__(self, size: int | None, seed: int) -> None:
        self._size = size
        self._events: list[Event] = []
        self._offered = 0
        self._rng = np.random.default_rng(seed)

    def offer(self, make: Callable[[], Event]) -> None:
        """Calls ``make`` only for an event that is kept."""
        self._offered += 1
        if self._size is None or len(self._events) < self._size:
            self._events.append(make())
        elif self._size and (at := int(self._rng.integers(self._offered))) < self._size:
            self._events[at] = make()

    def drain(self) -> Iterator[Event]:
        """The events kept; afterwards it is empty."""
        events, self._events, self._offered = self._events, [], 0
        return iter(events)

    def __len__(self) -> int:
        return len(self._events)
