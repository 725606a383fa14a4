"""Interleaved timing: contenders run in turn in one process, and the best of many short repeats counts."""

from __future__ import annotations

import time
import timeit
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Case:
    """One contender: a statement and the names it uses."""

    stmt: str
    names: Mapping[str, Any]
    #: Statement whose time is taken off, for peers that do more than the work compared.
    minus: str | None = None


@dataclass
class Clock:
    """How long to measure.

    Attributes:
        repeats: Rounds over all contenders.
        seconds: Length of one repeat.
    """

    repeats: int = 300
    seconds: float = 0.0003
    _empty: float | None = field(default=None, repr=False)

    def empty_loop(self) -> float:
        """Nanoseconds of the loop around a statement."""
        if self._empty is None:
            timer = timeit.Timer("pass")
            self._empty = min(timer.repeat(20, 100_000)) / 100_000 * 1e9
        return self._empty

    def compare(self, cases: Mapping[str, Case]) -> dict[str, float]:
        """Nanoseconds per call of each contender; the minimum, or the difference of two minima."""
        timers: dict[str, list[timeit.Timer]] = {}
        for name, case in cases.items():
            stmts = [case.stmt] + ([case.minus] if case.minus else [])
            timers[name] = [timeit.Timer(s, globals=dict(case.names)) for s in stmts]
        loops = {name: self._loops(t[0]) for name, t in timers.items()}
        seen: dict[str, list[list[float]]] = {name: [] for name in cases}
        for _ in range(self.repeats):
            for name, pair in timers.items():
                n = loops[name]
                seen[name].append([t.timeit(n) / n * 1e9 - self.empty_loop() for t in pair])
        out = {}
        for name, rows in seen.items():
            if cases[name].minus:
                out[name] = min(a for a, _ in rows) - min(b for _, b in rows)
            else:
                out[name] = min(a for (a,) in rows)
        return out

    def _loops(self, timer: timeit.Timer) -> int:
        n = 1
        while (spent := timer.timeit(n)) < self.seconds / 4 and n < 10_000_000:
            n *= 4
        return max(1, round(n * self.seconds / max(spent, 1e-9)))


def best(f: Callable[[], float], repeats: int) -> float:
    """The smallest of several results."""
    return min(f() for _ in range(repeats))


def shortest(f: Callable[[], object], budget: float = 1.0, most: int = 200, *, once: bool = False) -> float:
    """Nanoseconds of the fastest of the calls that fit into a budget of seconds, after one to warm up.

    With `once` a single call, for what takes many seconds.
    """
    if not once:
        f()
    seen: list[float] = []
    while not seen or (not once and sum(seen) < budget * 1e9 and len(seen) < most):
        start = time.perf_counter_ns()
        f()
        seen.append(time.perf_counter_ns() - start)
    return min(seen)
