"""What a merge did to every module: measured, printable, JSON both ways, and a picture."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

from microlora.merging.documents import Record, Table

__all__ = ["MergeReport", "ModuleReport", "aligned"]

WIDTH = 110


@dataclass(frozen=True)
class ModuleReport(Record):
    """One merged module. Norms are Frobenius norms of deltas; all numbers come from Gram matrices.

    Attributes:
        name: The module.
        method: How it was merged.
        parents: Names of the adapters that took part.
        rank_in: Their ranks.
        rank_out: Rank of the result.
        norm: Norm of the merged delta before truncation.
        norms: Norms of the parents' deltas.
        energy_kept: Share of the squared norm that truncation left, 0 to 1.
        error: Relative norm of what truncation dropped, ``sqrt(1 - energy_kept)``, and of what rounding to a
            16-bit dtype changed.
        cosines: Cosines between the parents' deltas; None where one of them is zero.
        interference: For every parent: how far the result is from its delta in the delta's own column and row
            space, relative to its norm. 0: all that it did is still done. None for a delta of zero.
        coefficients: What each delta was multiplied with, or None where there is no such number.
        sign_conflict: Share of entries on which parents disagree in sign, or None without ``report="full"``.
        seconds: Time of the module.
        peak_bytes: Most bytes alive at once beyond inputs and result.
        notes: What else there is to know.
    """

    name: str
    method: str
    parents: tuple[str, ...]
    rank_in: tuple[int, ...]
    rank_out: int
    norm: float
    norms: tuple[float, ...]
    energy_kept: float
    error: float
    cosines: tuple[tuple[float | None, ...], ...]
    interference: tuple[float | None, ...]
    coefficients: tuple[float, ...] | None
    sign_conflict: float | None
    seconds: float
    peak_bytes: int
    notes: tuple[str, ...] = ()

    @property
    def cosine_range(self) -> tuple[float, float] | None:
        """Lowest and highest cosine between two parents, or None where there is none."""
        return _ends(c for i, row in enumerate(self.cosines) for c in row[:i])


@dataclass(frozen=True)
class MergeReport(Table):
    """What a merge did. ``print(report)`` shows a table.

    Attributes:
        semantics: Whose definition of the methods it went by.
        seconds: Time of the whole merge in the core.
        peak_bytes: Most bytes alive at once beyond inputs and result.
        modules: One report per merged module, in order.
        notes: What concerns all modules.
    """

    _document: ClassVar[str] = "merge report"
    _rows: ClassVar[type[Record]] = ModuleReport

    semantics: str
    seconds: float
    peak_bytes: int
    modules: tuple[ModuleReport, ...]
    notes: tuple[str, ...] = ()

    @property
    def error(self) -> float:
        """Relative norm of all that truncation dropped, over all modules together."""
        total = math.fsum(m.norm**2 for m in self.modules)
        dropped = math.fsum((m.error * m.norm) ** 2 for m in self.modules)
        return math.sqrt(dropped / total) if total > 0 else 0.0

    def __str__(self) -> str:
        """A table that fits 110 columns, with totals and notes below it."""
        full = any(m.sign_conflict is not None for m in self.modules)
        head = ["module", "method", "rank", "energy", "error", "cosine", "interference"]
        head += (["signs"] if full else []) + ["ms", "KiB"]
        rows = []
        for m in self.modules:
            row = [m.name, m.method, f"{_ranks(m.rank_in)} -> {m.rank_out}", f"{m.energy_kept:.4f}"]
            row += [f"{m.error:.1e}", _range(m.cosine_range), _range(_ends(m.interference))]
            row += [("" if m.sign_conflict is None else f"{m.sign_conflict:.1%}")] if full else []
            rows.append([*row, f"{1e3 * m.seconds:.2f}", f"{m.peak_bytes / 1024:,.0f}"])
        lines = aligned(head, rows, text=2)
        count = f"{len(rows)} module{'' if len(rows) == 1 else 's'}"
        lines.append(
            f"{count}, {1e3 * self.seconds:.2f} ms, relative truncation error {self.error:.1e}, "
            f"peak {self.peak_bytes / 1024:,.0f} KiB"
        )
        said: dict[str, list[str]] = {note: [] for note in self.notes}
        for m in self.modules:
            for note in m.notes:
                said.setdefault(note, []).append(m.name)
        for note, where in said.items():
            more = f", ... ({len(where)} modules)" if len(where) > 2 else ""
            lines.append(f"note: {note}" + (f" [{', '.join(where[:2])}{more}]" if where else ""))
        return "\n".join(lines)

    def picture(self, path: str | os.PathLike[str]) -> None:
        """A heat map: a row per module, its truncation error, interference and cosines.

        Args:
            path: PNG, SVG or PDF by its ending; written through a temporary sibling and a rename.

        Raises:
            MissingExtraError: matplotlib is not installed.
            ConfigError: Another ending, or no module to draw.
            OSError: The file cannot be written.
        """
        from microlora.merging.plot import draw

        draw(self, path)


def aligned(head: list[str], rows: list[list[str]], *, text: int) -> list[str]:
    """Lines of a table, the first ``text`` columns on the left; the first gives way to the width."""
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    widths[0] = max(8, min(widths[0], WIDTH - sum(widths[1:]) - 2 * (len(head) - 1)))
    lines = []
    for row in [head, *rows]:
        cells = [_middle(row[0], widths[0]), *row[1:]]
        pairs = zip(cells, widths, strict=True)
        lines.append("  ".join(c.ljust(w) if i < text else c.rjust(w) for i, (c, w) in enumerate(pairs)))
    return [line.rstrip() for line in lines]


def _middle(name: str, width: int) -> str:
    """A name cut in its middle, because layers differ at the front and projections at the end."""
    if len(name) <= width:
        return name
    tail = (width - 1) * 2 // 3
    return f"{name[: width - 1 - tail]}…{name[-tail:]}"


def _ranks(ranks: tuple[int, ...]) -> str:
    if len(set(ranks)) == 1 and len(ranks) > 1:
        return f"{len(ranks)}x{ranks[0]}"
    return "+".join(map(str, ranks)) if len(ranks) <= 3 else f"{sum(ranks)} of {len(ranks)}"


def _ends(values: Iterable[float | None]) -> tuple[float, float] | None:
    known = [v for v in values if v is not None]
    return (min(known), max(known)) if known else None


def _range(ends: tuple[float, float] | None) -> str:
    if ends is None:
        return ""
    low, high = (f"{v:.2f}" for v in ends)
    return low if low == high else f"{low}..{high}"
