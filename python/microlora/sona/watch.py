"""Who is told of what a loop did: a hook, the log, and subscribers of the manager."""

from __future__ import annotations

import logging
from collections.abc import Callable
from types import MethodType
from typing import TYPE_CHECKING, Any

import microlora._core as _core
from microlora._core import AdaptationResult
from microlora.exceptions import DTypeError
from microlora.hot_swap import HotSwapManager
from microlora.sona import telemetry
from microlora.sona.background import GOES_ON

if TYPE_CHECKING:
    from microlora.sona.deep import DeepResult

__all__ = ["EventHook", "Watched"]

EventHook = Callable[["AdaptationResult | DeepResult"], object]

_log = logging.getLogger("microlora.sona")


class Watched(_core.Sona):
    """The compiled loop with those who listen to it."""

    _manager: HotSwapManager
    _on_event: EventHook | None
    _told: int
    _outcomes: dict[str, str]

    @property
    def on_event(self) -> EventHook | None:
        """Called with every result; None tells nobody."""
        return self._on_event

    @on_event.setter
    def on_event(self, hook: EventHook | None) -> None:
        if not (hook is None or callable(hook)):
            raise DTypeError(f"on_event: got {type(hook).__name__}, expected a function or None")
        self._on_event = hook
        self.observe()

    def observe(self) -> bool:
        """Looks again whether anyone wants to hear of single events, and returns it.

        `instant_adapt` is the core's own, and costs nothing more, unless there is a hook or the logger
        ``microlora.sona.instant`` is enabled for DEBUG; that is looked at when the loop is made, when the
        hook changes, and here.
        """
        wanted = self._on_event is not None or telemetry.logger("instant").isEnabledFor(logging.DEBUG)
        if wanted:
            self.__dict__["instant_adapt"] = MethodType(_observed, self)
        else:
            self.__dict__.pop("instant_adapt", None)
        return wanted

    def _done(self, result: AdaptationResult | DeepResult) -> None:
        generation = self._manager.generation
        if generation != self._told:
            before, self._told = self._told, generation
            self._manager._tell((before, generation))
        if result.outcome != GOES_ON:
            self._tell(result)

    def _tell(self, result: AdaptationResult | DeepResult) -> None:
        again = self._outcomes.get(result.loop_type) == result.outcome
        self._outcomes[result.loop_type] = result.outcome
        telemetry.report(result, again)
        if self._on_event is not None:
            try:
                self._on_event(result)
            except Exception:
                _log.exception("on_event failed after an event of the %s loop", result.loop_type)


def _observed(self: Watched, *args: Any, **kwargs: Any) -> AdaptationResult:
    """`instant_adapt` with somebody who listens."""
    result = _core.Sona.instant_adapt(self, *args, **kwargs)
    self._tell(result)
    return result
