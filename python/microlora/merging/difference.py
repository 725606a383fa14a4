"""How two adapters differ: cosine, norms and angles between subspaces, module by module."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import ClassVar

import microlora._core as _core
from microlora.merging.documents import Record, Table
from microlora.merging.parents import Parents, Source
from microlora.merging.report import aligned

__all__ = ["DiffReport", "ModuleDiff", "diff"]


@dataclass(frozen=True)
class ModuleDiff(Record):
    """One module of two adapters. Norms are Frobenius norms of deltas.

    Attributes:
        name: The module.
        cosine: Between the deltas, -1 to 1; None where one is zero.
        norm_a: Norm of the first.
        norm_b: Norm of the second.
        norm_diff: Norm of their difference.
        angles_in: Principal angles between what they read (rows of A), radians, ascending (Bjorck and Golub
            1973).
        angles_out: Principal angles between what they write (columns of B), radians, ascending.
    """

    name: str
    cosine: float | None
    norm_a: float
    norm_b: float
    norm_diff: float
    angles_in: tuple[float, ...]
    angles_out: tuple[float, ...]


@dataclass(frozen=True)
class DiffReport(Table):
    """How two adapters differ. ``print(report)`` shows a table.

    Attributes:
        modules: Modules that both have.
        only_a: Modules of the first alone.
        only_b: Modules of the second alone.
    """

    _document: ClassVar[str] = "diff report"
    _rows: ClassVar[type[Record]] = ModuleDiff

    modules: tuple[ModuleDiff, ...]
    only_a: tuple[str, ...] = ()
    only_b: tuple[str, ...] = ()

    def __str__(self) -> str:
        """A table that fits 110 columns; angles in degrees, smallest and largest."""
        rows = []
        for m in self.modules:
            cosine = "" if m.cosine is None else f"{m.cosine:.4f}"
            norms = [f"{v:.4g}" for v in (m.norm_a, m.norm_b, m.norm_diff)]
            rows.append([m.name, cosine, *norms, _degrees(m.angles_in), _degrees(m.angles_out)])
        head = ["module", "cosine", "|a|", "|b|", "|a - b|", "angles in", "angles out"]
        lines = aligned(head, rows, text=1)
        for side, names in (("a", self.only_a), ("b", self.only_b)):
            if names:
                more = "" if len(names) <= 3 else f", ... ({len(names)} modules)"
                lines.append(f"only in {side}: {', '.join(names[:3])}{more}")
        return "\n".join(lines)


def _degrees(angles: tuple[float, ...]) -> str:
    if not angles:
        return ""
    low, high = (f"{math.degrees(v):.0f}°" for v in (angles[0], angles[-1]))
    return low if low == high else f"{low}..{high}"


def diff(a: Source, b: Source) -> DiffReport:
    """Compares two adapters by their deltas, out of their factors.

    Args:
        a: An :class:`Adapter`, a :class:`MicroLoRA` or the path of a file.
        b: Another.

    Raises:
        ShapeError: A module of both with different widths.
        ConfigError: They are relative to different base weights.
    """
    pair = Parents.of({"a": a, "b": b}).adapters
    return DiffReport.from_dict(json.loads(_core.diff(pair["a"], pair["b"])))
