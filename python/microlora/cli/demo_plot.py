"""The demo's result as a picture."""

from __future__ import annotations

import contextlib
import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

__all__ = ["draw"]


def draw(result: dict[str, Any], path: Path) -> None:
    """Draw MRR@10 of each persona before, after 10 and after all clicks.

    Args:
        result: what `microlora.demo.report.run` gave.
        path: PNG, SVG or PDF by its ending; written through a temporary sibling and a rename.

    Raises:
        OSError: the file cannot be written.
    """
    rows, overall = result["personas"], result["overall"]
    figure = Figure(figsize=(8.0, 1.5 + 0.45 * len(rows)), layout="constrained")
    axes = figure.add_subplot()
    places = np.arange(len(rows))
    series = (
        ("before", "no adapter", "#9aa5b1"),
        ("after_10", "after 10 clicks", "#5b8def"),
        ("after_all", "after all clicks", "#1f4e9c"),
    )
    for offset, (key, label, colour) in zip((-0.26, 0.0, 0.26), series, strict=True):
        axes.barh(places + offset, [row[key] for row in rows], 0.24, label=label, color=colour)
    axes.set_yticks(places, [f"{row['persona']} ({row['clicks']})" for row in rows])
    axes.invert_yaxis()
    axes.set_xlabel("MRR@10 of held-out queries, whole corpus as candidates")
    axes.set_title(
        f"Rank {result['rank']}, seed {result['seed']}: mean {overall['before']:.3f} to "
        f"{overall['after_all']:.3f}, {overall['personas_up']} of {overall['personas']} up",
        fontsize="medium",
    )
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.absolute().parent)
    os.close(handle)
    try:
        figure.savefig(name, format=path.suffix.lower().lstrip("."), dpi=150)
        os.replace(name, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(name)
        raise
