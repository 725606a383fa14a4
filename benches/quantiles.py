"""Times of single calls while other threads work: which cores there are, and quantiles of what was seen."""

from __future__ import annotations

import os
import time
from array import array
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np


def usable_cores() -> list[int]:
    """Every core that the system would give this process, whatever it is pinned to now."""
    now = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, range(os.cpu_count() or 1))
        return sorted(os.sched_getaffinity(0))
    finally:
        os.sched_setaffinity(0, now)


@contextmanager
def pinned(core: int) -> Iterator[None]:
    """Holds the calling thread, and the threads that it starts, on one core."""
    now = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {core})
    try:
        yield
    finally:
        os.sched_setaffinity(0, now)


def times_of(f: Callable[..., object], args: tuple[Any, ...], calls: int) -> list[int]:
    """Nanoseconds of each of so many calls, clock included."""
    clock, seen = time.perf_counter_ns, []
    put = seen.append
    for _ in range(calls):
        start = clock()
        f(*args)
        put(clock() - start)
    return seen


def quantiles(seen: Any) -> dict[str, float]:
    """p50, p99 and p99.9 of nanoseconds."""
    p50, p99, p999 = np.percentile(np.asarray(seen), (50, 99, 99.9))
    return {"p50": float(p50), "p99": float(p99), "p99.9": float(p999)}


class Histogram:
    """Times of calls in memory that does not grow: steps of 16 ns up to 1 ms, then of 16 us up to 1 s."""

    FINE, COARSE = 4, 14
    SIZE = 1 << 16

    def __init__(self) -> None:
        self.fine, self.coarse = array("Q", bytes(8 * self.SIZE)), array("Q", bytes(8 * self.SIZE))

    def add(self, ns: int) -> None:
        """Counts one call."""
        at = ns >> self.FINE
        if at < self.SIZE:
            self.fine[at] += 1
        else:
            self.coarse[min(ns >> self.COARSE, self.SIZE - 1)] += 1

    def merge(self, other: Histogram) -> None:
        """Counts what another one counted."""
        for mine, its in ((self.fine, other.fine), (self.coarse, other.coarse)):
            np.frombuffer(mine, np.uint64)[:] += np.frombuffer(its, np.uint64)

    def summary(self) -> dict[str, float]:
        """How many, and p50, p99 and p99.9 in nanoseconds."""
        counts = np.concatenate([np.frombuffer(self.fine, np.uint64), np.frombuffer(self.coarse, np.uint64)])
        steps = np.arange(self.SIZE) + 0.5
        times = np.concatenate([steps * 2**self.FINE, steps * 2**self.COARSE])
        total = np.cumsum(counts)
        calls = int(total[-1])
        at = {"p50": 0.5, "p99": 0.99, "p99.9": 0.999}
        found = {
            name: float(times[min(np.searchsorted(total, q * calls), len(times) - 1)])
            for name, q in at.items()
        }
        return {"calls": calls, **found}
