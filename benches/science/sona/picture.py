"""Draws three curves: a switch of personas, wrong clicks, and a poisoned stretch.

PYTHONPATH=benches/science python -m sona.picture docs/data/sona.jsonl docs/sona.svg
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from continual.run import read
from matplotlib.figure import Figure

from .measure import EVERY
from .rows import POISONED, ROWS
from .table import Found

COLOURS = {"instant": "#9aa5b1", "three loops": "#1f4e9c", "three loops, no gate": "#b03a48"}
PANELS: dict[str, dict[str, tuple[str, str, str]]] = {
    "second persona after a switch": {
        "switch RLS, phi = 1, instant": ("RLS, instant", "#9aa5b1", "-"),
        "switch RLS, phi = 1, three loops": ("RLS, three loops", "#1f4e9c", "-"),
        "switch NLMS, instant": ("NLMS, instant", "#d97f30", "-"),
        "switch NLMS, three loops": ("NLMS, three loops", "#b03a48", "-"),
    },
    "30 % of the clicks wrong": {
        f"noise 0.3 {quality}, {title}": (f"{title}{label}", COLOURS[title], style)
        for title in COLOURS
        for quality, label, style in (("none", "", "-"), ("rating", ", rated", "--"))
    },
    "targets turned round (grey)": {
        f"poison {name}": (name, colour, "-")
        for name, colour in {
            "three loops": "#1f4e9c",
            "three loops, no gate": "#b03a48",
            "NLMS, instant": "#d97f30",
            "NLMS, three loops": "#3f8f6b",
        }.items()
    },
}
STEPS = (EVERY // 2, EVERY)


def draw(found: Found, path: Path) -> None:
    """One panel for each stream, means over splits."""
    mpl.rcParams.update({"svg.hashsalt": "microlora", "font.size": 8})
    figure = Figure(figsize=(10.0, 3.2), layout="constrained")
    panels: Any = figure.subplots(1, len(PANELS))
    for number, (axes, (title, rows)) in enumerate(zip(panels, PANELS.items(), strict=True)):
        for name, (label, colour, style) in rows.items():
            lines = found.of(name)
            if not lines:
                continue
            assert name in ROWS
            curve = np.mean([line["curve"] for line in lines], axis=0)
            x = curve[:, 0] if curve.ndim == 2 else STEPS[number] * np.arange(len(curve))
            y = curve[:, 1] if curve.ndim == 2 else curve
            axes.plot(x, y, style, color=colour, label=label, lw=1.2)
        if number == len(PANELS) - 1:
            axes.axvspan(*POISONED, color="#cccccc", alpha=0.5, lw=0)
        axes.axhline(0.0, color="black", lw=0.5)
        axes.set_title(title, fontsize=8)
        axes.set_xlabel("events")
        axes.legend(frameon=False, fontsize=6)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("gain in MRR@10 of held-out queries")
    figure.savefig(path, format="svg", metadata={"Date": None})


def main() -> int:
    """Reads lines, writes the picture."""
    parser = argparse.ArgumentParser(prog="sona.picture", description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path)
    parser.add_argument("picture", type=Path)
    args = parser.parse_args()
    draw(Found(read(args.file)), args.picture)
    return 0


if __name__ == "__main__":
    sys.exit(main())
