"""How a row becomes an adapter: by `microlora.merge`, by PEFT, or by the average of factors."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

import microlora as ml
from peers import PeftMerge

from .rows import FULL, PEFT, STATISTICS, WRONG, Row


@dataclass(frozen=True)
class Merged:
    """A merged adapter and what its report says.

    Attributes:
        adapter: The adapter.
        ranks: Of its modules.
        error: Relative norm of what truncation dropped, None where nobody says.
        notes: What the report remarks.
    """

    adapter: ml.Adapter
    ranks: list[int]
    error: float | None = None
    notes: tuple[str, ...] = ()


def have_peft() -> bool:
    """Whether PEFT's rows can be run here."""
    return all(importlib.util.find_spec(name) is not None for name in ("torch", "peft"))


def narrow(adapter: ml.Adapter, rank: int | str) -> dict[str, dict[str, int]]:
    """Overrides for modules that cannot have a rank as high as this."""
    widths = {module: min(dims) for module, dims in adapter.dims.items()}
    return {m: {"rank": width} for m, width in widths.items() if rank == FULL or width < int(rank)}


def native(row: Row, adapters: Mapping[str, ml.Adapter], statistics: Any, seed: int) -> Merged:
    """A row of `microlora.merge`."""
    options = dict(row.options)
    if "weight" in options:
        options["weights"] = dict.fromkeys(adapters, options.pop("weight"))
    if "rank" in options:
        options["overrides"] = narrow(next(iter(adapters.values())), options["rank"])
        options["rank"] = None if options["rank"] == FULL else options["rank"]
    if row.method in STATISTICS:
        options["statistics"] = statistics
    if row.random:
        options["seed"] = seed
    adapter, report = ml.merge(adapters, method=row.method, **options)
    notes = {note for module in report.modules for note in module.notes}
    return Merged(adapter, ranks(adapter), report.error, tuple(sorted({*report.notes, *notes})))


@functools.lru_cache(maxsize=1)
def _peft(adapters: tuple[tuple[str, ml.Adapter], ...]) -> PeftMerge:
    return PeftMerge(dict(adapters))


def peft(row: Row, adapters: Mapping[str, ml.Adapter], seed: int) -> Merged:
    """A row of PEFT, on the same factors."""
    options = dict(row.options)
    weights = [options.pop("weight")] * len(adapters)
    found, _ = _peft(tuple(adapters.items())).merge(row.method, weights, seed=seed, **options)
    # PEFT sets alpha to the rank for all, so that the scaling is 1; alpha says what it was.
    alpha = {module: scaling * len(a) for module, (a, _, scaling) in found.items()}
    made = ml.Adapter.from_factors({m: (a, b) for m, (a, b, _) in found.items()}, alpha=alpha)
    return Merged(made, ranks(made))


def reproduced(row: Row, adapters: Mapping[str, ml.Adapter]) -> ml.Adapter:
    """A row of PEFT by `microlora.merge` with PEFT's semantics, defects and all."""
    options = dict(row.options)
    weights = dict.fromkeys(adapters, options.pop("weight"))
    return ml.merge(adapters, method=row.method, semantics="peft", weights=weights, **options).adapter


def factor_average(adapters: Mapping[str, ml.Adapter]) -> Merged:
    """The mean of the A times the mean of the B, which is no mean of anything."""
    first, *_ = adapters.values()
    alpha = {module: first.info(module).alpha for module in first.modules()}
    means = {}
    for module in first.modules():
        a, b = zip(*(adapter.factors(module) for adapter in adapters.values()), strict=True)
        means[module] = (np.mean(a, axis=0, dtype=np.float32), np.mean(b, axis=0, dtype=np.float32))
    made = ml.Adapter.from_factors(means, alpha=alpha)
    return Merged(made, ranks(made))


def ranks(adapter: ml.Adapter) -> list[int]:
    """Rank of every module."""
    return [adapter.info(module).rank for module in adapter.modules()]


def merge(row: Row, adapters: Mapping[str, ml.Adapter], statistics: Any, seed: int) -> Merged:
    """By whatever engine the row belongs to."""
    if row.group == WRONG:
        return factor_average(adapters)
    if row.group == PEFT:
        return peft(row, adapters, seed)
    return native(row, adapters, statistics, seed)
