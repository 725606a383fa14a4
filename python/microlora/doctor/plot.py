"""The norms of an adapter's layers as a picture."""

from __future__ import annotations

import contextlib
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from microlora._checks import wrong
from microlora._destinations import check_folder
from microlora._file_checks import path_text
from microlora.cli.extras import require
from microlora.doctor.names import template

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from microlora.doctor.report import Report

__all__ = ["check_picture", "draw", "grid"]

ENDINGS = ("png", "svg", "pdf")


def grid(report: Report) -> tuple[list[str], list[int], NDArray[np.float64], NDArray[np.bool_]]:
    """Kinds of layers, layer numbers, ``|delta|``, and where numbers are not finite.

    ``|delta|`` is NaN where there is none.
    """
    placed = [(*template(m.path), m) for m in report.modules]
    kinds = list(dict.fromkeys(kind for kind, _, _ in placed))
    layers = sorted({layer or 0 for _, layer, _ in placed})
    values = np.full((len(kinds), len(layers)), np.nan)
    bad = np.zeros(values.shape, bool)
    for kind, layer, m in placed:
        at = kinds.index(kind), layers.index(layer or 0)
        values[at] = np.nan if m.norm_delta is None else m.norm_delta
        bad[at] = m.nonfinite > 0
    return kinds, layers, values, bad


def check_picture(arg: str, path: object) -> Path:
    """Where a picture can be written.

    Raises:
        DTypeError: No path.
        ConfigError: Another ending.
        MissingPathError: Its folder is not there.
    """
    target = Path(path_text(arg, path))
    if target.suffix.lower().lstrip(".") not in ENDINGS:
        raise wrong(arg, os.fspath(target), f"a name that ends in .{', .'.join(ENDINGS)}")
    check_folder(arg, target)
    return target


def draw(report: Report, path: str | os.PathLike[str]) -> None:
    """See :meth:`Report.plot`."""
    target = check_picture("path", path)
    ending = target.suffix.lower().lstrip(".")
    if not report.modules:
        raise wrong("report", "no modules", "at least one")
    require("matplotlib", "plot", "plot()")
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure

    kinds, layers, values, bad = grid(report)
    figure = Figure(
        figsize=(4.5 + 0.28 * len(layers), 1.8 + 0.34 * len(kinds)),
        layout="constrained",
    )
    axes = figure.add_subplot()
    seen = values[np.isfinite(values) & (values > 0)]
    scale = LogNorm(seen.min(), seen.max()) if len(seen) and seen.min() < seen.max() else None
    shown = np.ma.masked_where(~(values > 0), values)
    image = axes.imshow(shown, cmap="viridis", norm=scale, aspect="auto")
    for (i, j), value in np.ndenumerate(values):
        mark = "NaN" if bad[i, j] else "0" if value == 0 else ""
        axes.text(j, i, mark, ha="center", va="center", fontsize="x-small", color="crimson")
    step = max(1, len(layers) // 24)
    axes.set_xticks(range(0, len(layers), step), [str(n) for n in layers[::step]])
    axes.set_yticks(range(len(kinds)), kinds)
    axes.set_xlabel("layer")
    axes.set_title(f"|delta| of {Path(report.path).name}, {len(report.modules)} modules", fontsize="medium")
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
