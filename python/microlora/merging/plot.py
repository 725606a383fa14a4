"""The report of a merge as a picture."""

from __future__ import annotations

import contextlib
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from microlora._checks import wrong
from microlora.cli.extras import require

if TYPE_CHECKING:
    from microlora.merging.report import MergeReport, ModuleReport

__all__ = ["columns", "draw"]

ENDINGS = ("png", "svg", "pdf")


def columns(report: MergeReport) -> tuple[list[str], list[list[float]]]:
    """Names of columns, and a row of numbers per module (NaN where a module has none).

    Truncation error, interference with each parent, and the cosine of each pair of parents.
    """
    parents = list(dict.fromkeys(name for m in report.modules for name in m.parents))
    pairs = [(a, b) for i, a in enumerate(parents) for b in parents[i + 1 :]]
    head = ["error", *(f"interference {p}" for p in parents), *(f"cos {a}, {b}" for a, b in pairs)]
    return head, [_row(m, parents, pairs) for m in report.modules]


def _row(m: ModuleReport, parents: list[str], pairs: list[tuple[str, str]]) -> list[float]:
    at = {name: i for i, name in enumerate(m.parents)}
    apart = [m.interference[at[p]] if p in at else None for p in parents]
    between = [m.cosines[at[a]][at[b]] if a in at and b in at else None for a, b in pairs]
    return [m.error, *(np.nan if v is None else v for v in [*apart, *between])]


def draw(report: MergeReport, path: str | os.PathLike[str]) -> None:
    """See :meth:`MergeReport.picture`."""
    target = Path(path)
    ending = target.suffix.lower().lstrip(".")
    if ending not in ENDINGS:
        raise wrong("path", os.fspath(path), f"a name that ends in .{', .'.join(ENDINGS)}")
    if not report.modules:
        raise wrong("report", "no modules", "at least one")
    require("matplotlib", "plot", "picture()")
    from matplotlib.figure import Figure

    head, rows = columns(report)
    values = np.array(rows)
    shown = np.nan_to_num(values)
    size = (3.0 + 0.75 * len(head), 1.6 + 0.28 * len(rows))
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.add_subplot()
    # Cosines keep their sign; error and interference are at least 0 and saturate at 1.
    image = axes.imshow(
        np.ma.masked_invalid(values),
        cmap="RdBu_r",
        vmin=-1.0,
        vmax=1.0,
        aspect="auto",
    )
    axes.set_xticks(range(len(head)), head, rotation=45, ha="right")
    axes.set_yticks(range(len(rows)), [m.name for m in report.modules])
    for (i, j), value in np.ndenumerate(values):
        if np.isfinite(value):
            colour = "white" if abs(shown[i, j]) > 0.6 else "black"
            axes.text(j, i, f"{value:.2g}", ha="center", va="center", fontsize="x-small", color=colour)
    methods = ", ".join(dict.fromkeys(m.method for m in report.modules))
    axes.set_title(f"{methods}: truncation error {report.error:.1e}", fontsize="medium")
    figure.colorbar(image, ax=axes, shrink=0.8)
    handle, name = tempfile.mkstemp(prefix=f".{target.name}.", suffix=".tmp", dir=target.absolute().parent)
    os.close(handle)
    try:
        figure.savefig(name, format=ending, dpi=150)
        os.replace(name, target)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(name)
        raise
