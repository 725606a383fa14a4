"""Adapters of another rank: the best approximation of every delta, out of its factors."""

from __future__ import annotations

import json
from typing import Any, NamedTuple

import microlora._core as _core
from microlora._checks import choice, flag, integer, real, wrong
from microlora.adapter import Adapter
from microlora.config import DTYPE_BYTES, MAX_RANK
from microlora.exceptions import ConfigError
from microlora.merging.parents import Parents, Source, as_adapter, described
from microlora.merging.report import MergeReport
from microlora.metadata import utc_now
from microlora.progress import CancelToken, Progress

__all__ = ["Resized", "keep_plan", "resize"]


class Resized(NamedTuple):
    """An adapter of another rank and what it lost."""

    adapter: Adapter
    report: MergeReport


def resize(
    adapter: Source,
    *,
    rank: int | None = None,
    energy: float | None = None,
    max_error: float | None = None,
    per_module: bool = True,
    dtype: str | None = None,
    progress: Progress | None = None,
    cancel: CancelToken | None = None,
) -> Resized:
    """The adapter's deltas at a lower rank: the best approximation there is (Eckart and Young 1936).

    Out of the factors, in ``O((in + out) r^2)``. Saved to PEFT, ranks that differ become patterns.

    Args:
        adapter: An :class:`Adapter`, a :class:`MicroLoRA` or the path of a file.
        rank: Rank of every module; modules of a lower one stay as they are.
        energy: Or the least rank that keeps this share of the squared norm, above 0 and up to 1.
        max_error: Or the least rank whose relative error (Frobenius) is no larger, 0 up to 1. Rounding to
            float16 or bfloat16 comes on top; the report's error counts both.
        per_module: Every module gets its own rank; False gives all of them the largest of these.
        dtype: How the result is stored; None keeps the adapter's.
        progress: Called with ``(done, total, what)`` between modules.
        cancel: A token looked at between modules.

    Returns:
        The adapter and a :class:`MergeReport`, with the adapter as its one parent. The metadata name the
        parent and keep what still holds: name, version and metrics were the parent's. Tensors that are no
        factors are left out, with a note in the report.

    Raises:
        ConfigError: None or several of rank, energy and max_error, or values out of range.
        CancelledError: The token was set.
    """
    value = as_adapter("adapter", adapter)
    plan = keep_plan(rank, energy, max_error, dtype)
    plan["per_module"] = flag("per_module", per_module)
    if not per_module and rank is not None:
        raise wrong("per_module", False, "True with a rank, which is the same for all modules anyway")
    core, report = _core.resize(value, json.dumps(plan), progress, cancel)
    said = value.metadata
    # What was measured, numbered and named is the parent, not this one.
    data = said.replace(name="", version="", metrics=(), created=utc_now(), parents=(said.name or "adapter",))
    made = described(core, data, value.config.description)
    notes = Parents.of({"adapter": value}).notes()
    return Resized(made, MergeReport.from_dict({**json.loads(report), "notes": notes}))


def keep_plan(
    rank: int | None, energy: float | None, max_error: float | None, dtype: str | None
) -> dict[str, Any]:
    """The core's way to say how much is kept, from exactly one of three arguments.

    Raises:
        ConfigError: None or several, or a value out of range.
    """
    given = {"rank": rank, "energy": energy, "max_error": max_error}
    named = [name for name, value in given.items() if value is not None]
    if len(named) != 1:
        raise ConfigError(
            f"rank, energy, max_error: got {' and '.join(named) or 'none'}, expected one of them"
        )
    if dtype is not None:
        choice("dtype", dtype, tuple(DTYPE_BYTES))
    value: float
    if rank is not None:
        value = integer("rank", rank, 1, MAX_RANK)
    elif energy is not None:
        want = "a number above 0 and up to 1"
        value = real("energy", energy, want)
        if not 0.0 < value <= 1.0:
            raise wrong("energy", energy, want)
    else:
        want = "a number from 0 up to, but not including, 1"
        value = real("max_error", max_error, want)
        if not 0.0 <= value < 1.0:
            raise wrong("max_error", max_error, want)
    return {"keep": named[0], "value": value, "dtype": dtype}
