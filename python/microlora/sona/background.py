"""A thread that runs the consolidations of one loop, or of many in turn."""

from __future__ import annotations

import logging
import threading
import time
import weakref
from types import TracebackType
from typing import TYPE_CHECKING, Self

from microlora._checks import real, wrong
from microlora.exceptions import DTypeError
from microlora.sona import processes

if TYPE_CHECKING:
    from microlora.sona.loop import SonaLoop

__all__ = ["GOES_ON", "Background"]

#: The outcome of a call that left work for the next one.
GOES_ON = "goes_on"
_SHORTEST = 0.001
_LONGEST_PAUSE = 60.0

_log = logging.getLogger("microlora.sona.background")


class _State:
    """What the thread shares with its owner; it holds neither the owner nor the loops."""

    def __init__(self, refs: list[weakref.ref[SonaLoop]], interval_ms: float | None) -> None:
        self.refs = refs
        self.interval_ms = interval_ms
        self.wake = threading.Event()
        self.stopped = False

    def stop(self) -> None:
        """Asks the thread to end."""
        self.stopped = True
        self.wake.set()

    def loops(self) -> list[SonaLoop]:
        """The loops that are still there."""
        found = [ref() for ref in list(self.refs)]
        return [loop for loop in found if loop is not None]


class Background:
    """Consolidates the loops it was given, in turn, in one thread of its own.

    The thread holds no loop: one that nobody else holds is collected, and is not visited any more. The core
    works without the GIL. An error of a loop is logged, and that loop is left alone for a while that doubles
    with each failure in a row, up to a minute; its events wait.

    After a fork the child has no thread: `running` is False there, and `start` works again.

    Args:
        *loops: Loops to visit; see also `add`.
        interval_ms: Milliseconds between rounds, above 0; None visits each loop four times in its own
            interval. What is not due (``background_interval_ms``, ``background_min_samples``) waits all the
            same.

    Raises:
        DTypeError: Not a loop.
        ConfigError: An interval out of its range.

    Example:
        >>> with Background(*loops):  # doctest: +SKIP
        ...     serve()
    """

    def __init__(self, *loops: SonaLoop, interval_ms: float | None = None) -> None:
        if interval_ms is not None:
            want = "milliseconds above 0, or None"
            interval_ms = real("interval_ms", interval_ms, want)
            if interval_ms <= 0.0:
                raise wrong("interval_ms", interval_ms, want)
        self._refs: list[weakref.ref[SonaLoop]] = []
        self._interval_ms = interval_ms
        self._lock = threading.Lock()
        self._state: _State | None = None
        self._thread: threading.Thread | None = None
        self._end: weakref.finalize[[], Self] | None = None
        for loop in loops:
            self.add(loop)
        processes.on_fork(self)
        processes.on_exit(self)

    @property
    def loops(self) -> tuple[SonaLoop, ...]:
        """The loops that it visits."""
        return tuple(loop for ref in list(self._refs) if (loop := ref()) is not None)

    @property
    def running(self) -> bool:
        """Whether its thread runs."""
        thread = self._thread
        return thread is not None and thread.is_alive()

    def add(self, loop: SonaLoop) -> None:
        """Visits one more loop from the next round on; one that is there already stays once.

        Raises:
            DTypeError: Not a loop.
        """
        if not callable(getattr(loop, "maybe_background", None)):
            raise DTypeError(f"loop: got {type(loop).__name__}, expected a SonaLoop")
        if not any(known is loop for known in self.loops):
            self._refs.append(weakref.ref(loop, self._refs.remove))
            self._wake()

    def remove(self, loop: SonaLoop) -> None:
        """Visits a loop no more; a visit that has begun comes to its end. Nothing if it is not there."""
        for ref in list(self._refs):
            if ref() is loop:
                self._refs.remove(ref)

    def start(self) -> Self:
        """Starts the thread; nothing if it runs already."""
        with self._lock:
            if self.running:
                return self
            state = _State(self._refs, self._interval_ms)
            thread = threading.Thread(target=_serve, args=(state,), name="microlora-sona", daemon=True)
            thread.start()
            self._state, self._thread = state, thread
            # The thread must not hold its owner, so the owner's end is what stops it.
            self._end = weakref.finalize(self, state.stop)
        return self

    def stop(self) -> None:
        """Ends the thread and waits for it; a consolidation that is under way stops at its next budget.

        Work that it left is done by a later call of ``maybe_background``. Nothing if it does not run.
        """
        with self._lock:
            state, thread, end = self._state, self._thread, self._end
            self._state = self._thread = self._end = None
        if end is not None:
            end.detach()
        if state is not None:
            state.stop()
        if thread is not None and thread is not threading.current_thread():
            thread.join()

    def _wake(self) -> None:
        state = self._state
        if state is not None:
            state.wake.set()

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _before_fork(self) -> None:
        """Nothing: the loops pause by themselves."""

    def _after_fork(self, child: bool) -> None:
        if not child:
            return
        # The thread is gone, and whoever held the lock or the event with it; a flag needs neither.
        if self._state is not None:
            self._state.stopped = True
        self._lock = threading.Lock()
        self._state = self._thread = self._end = None

    def __repr__(self) -> str:
        """How many loops, and whether it runs."""
        count = len(self.loops)
        return f"Background({count} loop{'' if count == 1 else 's'}, {_running(self.running)})"


def _running(value: bool) -> str:
    return "running" if value else "not running"


def _serve(state: _State) -> None:
    failures: dict[int, tuple[int, float]] = {}
    while not state.stopped:
        state.wake.clear()
        pause = _round(state, failures)
        if not state.stopped:
            state.wake.wait(pause)


def _round(state: _State, failures: dict[int, tuple[int, float]]) -> float:
    """Visits every loop once; seconds until the next round. Locals hold loops only inside."""
    loops = state.loops()
    if not loops:
        failures.clear()
        return _LONGEST_PAUSE if state.interval_ms is None else state.interval_ms / 1000.0
    pause = min(_period(loop, state.interval_ms) for loop in loops)
    for loop in loops:
        if state.stopped:
            break
        count, until = failures.get(id(loop), (0, 0.0))
        if time.monotonic() < until:
            continue
        try:
            result = loop.maybe_background()
        except Exception:
            wait = min(_LONGEST_PAUSE, _period(loop, state.interval_ms) * 2.0 ** min(count + 1, 30))
            failures[id(loop)] = (count + 1, time.monotonic() + wait)
            _log.exception("%r: a consolidation failed; the next try is in %.1f s", loop, wait)
            continue
        failures.pop(id(loop), None)
        if result is not None and result.outcome == GOES_ON:
            pause = _SHORTEST
    return pause


def _period(loop: SonaLoop, interval_ms: float | None) -> float:
    # A quarter, because a look that comes just too early would cost a whole interval.
    milliseconds = loop.config.background_interval_ms / 4.0 if interval_ms is None else interval_ms
    return max(_SHORTEST, milliseconds / 1000.0)
