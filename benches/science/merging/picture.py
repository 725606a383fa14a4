"""Draws the summary: what every method retains, one dot per seed.

PYTHONPATH=benches:benches/science python -m merging.picture docs/data/merging.jsonl docs/merging.svg
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import matplotlib as mpl
import numpy as np
from continual.run import read
from matplotlib.figure import Figure

from .rows import BOUNDS, ELEMENT, FACTOR, PEFT, ROWS, WRONG
from .table import Lines, latest

COLOURS = {BOUNDS: "#9aa5b1", WRONG: "#b03a48", PEFT: "#d97f30", FACTOR: "#1f4e9c", ELEMENT: "#3f8f6b"}
LABELS = {
    BOUNDS: "no merge",
    WRONG: "factors averaged",
    PEFT: "PEFT 0.21.2",
    FACTOR: "factor space",
    ELEMENT: "element-wise",
}


def draw(found: Lines, path: Path) -> None:
    """One bar per row, longest first inside each group."""
    mpl.rcParams.update({"svg.hashsalt": "microlora", "font.size": 8})
    kept = {name: np.array([line["retained"] for line in runs.values()]) for name, runs in found.items()}
    order = [n for g in COLOURS for n in sorted(kept, key=lambda n: -kept[n].mean()) if ROWS[n].group == g]
    figure = Figure(figsize=(8.0, 0.17 * len(order) + 0.8), layout="constrained")
    axes = figure.subplots()
    named: set[str] = set()
    for place, name in enumerate(order):
        group = ROWS[name].group
        label = None if group in named else LABELS[group]
        named.add(group)
        axes.barh(place, kept[name].mean(), 0.75, color=COLOURS[group], alpha=0.75, label=label)
        axes.plot(kept[name], np.full(len(kept[name]), place), "o", ms=2, color="black", alpha=0.5)
    texts = [f"{ROWS[n].title} {ROWS[n].setting}".replace("`", "").replace(" default", "") for n in order]
    axes.set_yticks(range(len(order)), texts, fontsize=6.5)
    axes.set_ylim(len(order) - 0.4, -0.6)
    axes.set_xlim(0.0, 1.02)
    axes.set_xlabel("retained: accuracy of one network on both domains, as a share of the two adapters' own")
    figure.legend(loc="outside upper center", ncols=len(COLOURS), frameon=False, fontsize=7)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, format="svg", metadata={"Date": None})


def main() -> int:
    """Reads lines, writes the picture."""
    parser = argparse.ArgumentParser(prog="merging.picture", description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path)
    parser.add_argument("picture", type=Path)
    args = parser.parse_args()
    draw(latest(read(args.file)), args.picture)
    return 0


if __name__ == "__main__":
    sys.exit(main())
