"""The smallest types that keep an error: best steps first, then whatever still fits is given back."""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass

from microlora.exceptions import ConfigError
from microlora.progress import CancelToken, Progress
from microlora.quantizing.measure import Measured, relative
from microlora.quantizing.types import Pair, candidates, size_of

__all__ = ["Found", "smallest"]


@dataclass(frozen=True)
class Option:
    """Types of one module, their bytes, and their share of the squared error of the whole."""

    types: Pair
    bytes: int
    cost: float


@dataclass(frozen=True)
class Found:
    """Types of all modules, the error that was reached, and what it is an error of."""

    types: dict[str, Pair]
    error: float
    measure: str


def weights(modules: Sequence[Measured]) -> tuple[list[float], str]:
    """Share of every module in the squared error, and what the error is of.

    Outputs where every module has inputs; weight changes where none has. Where only some have, a module's
    relative error is that of its outputs if it has inputs, and modules are weighed by their weight changes.
    """
    known = [m.moment is not None for m in modules]
    own = [m.dtypes for m in modules]
    if all(known):
        sizes, measure = [(m.output(t) or (0.0, 0.0))[1] for m, t in zip(modules, own, strict=True)], "output"
    else:
        sizes = [m.delta(t)[1] for m, t in zip(modules, own, strict=True)]
        measure = "output and delta" if any(known) else "delta"
    total = math.fsum(s * s for s in sizes)
    return [s * s / total if total > 0 else 0.0 for s in sizes], measure


def options(module: Measured, weight: float) -> list[Option]:
    """Every pair of types that nothing beats in both size and error, smallest first."""
    found = []
    shape_a, shape_b = module.shapes
    for kind_a in candidates(shape_a[1], module.dtypes.lora_a):
        for kind_b in candidates(shape_b[1], module.dtypes.lora_b):
            types = Pair(kind_a, kind_b)
            error = relative(module.output(types) or module.delta(types))
            size = size_of(kind_a, shape_a) + size_of(kind_b, shape_b)
            found.append(Option(types, size, weight * error * error))
    found.sort(key=lambda o: (o.bytes, o.cost))
    kept: list[Option] = []
    for option in found:
        if not kept or option.cost < kept[-1].cost:
            kept.append(option)
    return kept


def smallest(
    modules: Sequence[Measured], target: float, progress: Progress | None, cancel: CancelToken | None
) -> Found:
    """Types that keep the relative error of the whole at or below ``target`` in few bytes.

    From the smallest types of every module, the step that takes off most squared error per byte is taken
    until the target holds; then modules go back to smaller types where it still does.

    Raises:
        ConfigError: No types reach the target.
        CancelledError: The token was set.
    """
    shares, measure = weights(modules)
    tables = []
    for i, (module, share) in enumerate(zip(modules, shares, strict=True)):
        if cancel is not None:
            cancel.raise_if_cancelled("quantize")
        tables.append(options(module, share))
        if progress is not None:
            progress(i + 1, len(modules), f"measured {module.name}")
    limit = target * target
    at = [0] * len(tables)

    def total() -> float:
        return math.fsum(table[i].cost for table, i in zip(tables, at, strict=True))

    def step(m: int) -> tuple[float, int, int] | None:
        """The best next option of a module: error taken off per byte (negative, for the heap)."""
        here = tables[m][at[m]]
        ahead = range(at[m] + 1, len(tables[m]))
        gains = [((tables[m][i].cost - here.cost) / (tables[m][i].bytes - here.bytes), m, i) for i in ahead]
        return min(gains, default=None)

    heap = [s for s in map(step, range(len(tables))) if s is not None]
    heapq.heapify(heap)
    while total() > limit and heap:
        _, m, i = heapq.heappop(heap)
        at[m] = i
        following = step(m)
        if following is not None:
            heapq.heappush(heap, following)
    if total() > limit:
        best = math.sqrt(total())
        raise ConfigError(
            f"target_error: got {target:g}, expected at least {best:.3g}, the {measure} error of the best "
            "types that these widths permit"
        )
    _give_back(tables, at, limit)
    types = {m.name: table[i].types for m, table, i in zip(modules, tables, at, strict=True)}
    return Found(types, math.sqrt(total()), measure)


def _give_back(tables: Sequence[Sequence[Option]], at: list[int], limit: float) -> None:
    """Moves modules to smaller options while the limit holds, the most bytes first."""
    while True:
        spent = math.fsum(table[i].cost for table, i in zip(tables, at, strict=True))
        moves = [
            (table[i].bytes - table[j].bytes, m, j)
            for m, (table, i) in enumerate(zip(tables, at, strict=True))
            for j in range(i)
            if spent - table[i].cost + table[j].cost <= limit
        ]
        if not moves:
            return
        _, m, j = max(moves)
        at[m] = j
