"""Forks and the end of the process: loops pause around the one, threads stop before the other."""

from __future__ import annotations

import atexit
import os
import weakref
from typing import Protocol

__all__ = ["Forks", "Stops", "on_exit", "on_fork"]


class Forks(Protocol):
    """What must be told of a fork."""

    def _before_fork(self) -> None: ...

    def _after_fork(self, child: bool) -> None: ...


class Stops(Protocol):
    """What must end before the interpreter does."""

    def stop(self) -> None:
        """Ends it and waits; nothing if it has ended."""


# By id and not in a WeakSet: a list of a dict's values is made in one step, whatever other threads add.
_forks: dict[int, weakref.ref[Forks]] = {}
_stops: dict[int, weakref.ref[Stops]] = {}
_paused: list[Forks] = []


def on_fork(item: Forks) -> None:
    """Tells ``item`` of forks for as long as it lives."""
    key = id(item)
    _forks[key] = weakref.ref(item, lambda _: _forks.pop(key, None))


def on_exit(item: Stops) -> None:
    """Stops ``item`` at the end of the process, if it still lives then."""
    key = id(item)
    _stops[key] = weakref.ref(item, lambda _: _stops.pop(key, None))


def _before() -> None:
    for ref in list(_forks.values()):
        item = ref()
        if item is not None:
            _paused.append(item)
            item._before_fork()


def _after(child: bool) -> None:
    while _paused:
        _paused.pop()._after_fork(child)


def _exit() -> None:
    for ref in list(_stops.values()):
        item = ref()
        if item is not None:
            item.stop()


atexit.register(_exit)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=_before,
        after_in_parent=lambda: _after(child=False),
        after_in_child=lambda: _after(child=True),
    )
