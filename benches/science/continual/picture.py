"""Draws the summary: accuracy of every method, one dot per seed.

PYTHONPATH=benches/science python -m continual.picture docs/data/continual.jsonl docs/continual.svg
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure

from .methods import METHODS
from .run import read

PANELS = {"rot": "rotated MNIST-5k", "perm": "permuted digits"}
PLAIN, PENALTY, REPLAY = "#9aa5b1", "#1f4e9c", "#d97f30"


def colour(name: str) -> str:
    """Of a bar, by what the method keeps."""
    if METHODS[name].memory:
        return REPLAY
    return PENALTY if METHODS[name].native is not None else PLAIN


def draw(lines: list[dict[str, Any]], path: Path) -> None:
    """One panel per benchmark; native runs alone."""
    mpl.rcParams.update({"svg.hashsalt": "microlora", "font.size": 9})
    names = [m.name for m in METHODS.values()]
    figure = Figure(figsize=(9.0, 4.2), layout="constrained")
    for axes, (data, title) in zip(figure.subplots(1, 2, sharey=True), PANELS.items(), strict=True):
        for place, name in enumerate(names):
            runs = {
                line["seed"]: line["ACC"]
                for line in lines
                if (line["data"], line["method"], line["engine"]) == (data, name, "native")
            }
            if not runs:
                continue
            seen = np.array([runs[seed] for seed in sorted(runs)])
            axes.barh(place, seen.mean(), 0.7, color=colour(name), alpha=0.75)
            axes.plot(seen, np.full(len(seen), place), "o", ms=2.5, color="black", alpha=0.5)
        axes.set_title(title, fontsize="medium")
        axes.set_xlabel("mean accuracy on all five tasks after the last")
        axes.set_yticks(range(len(names)), [METHODS[name].title for name in names])
        axes.set_xlim(0.0, 1.0)
        axes.spines[["top", "right"]].set_visible(False)
    axes.invert_yaxis()
    figure.savefig(path, format="svg", metadata={"Date": None})


def main() -> int:
    """Reads lines, writes the picture."""
    parser = argparse.ArgumentParser(prog="continual.picture", description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path)
    parser.add_argument("picture", type=Path)
    args = parser.parse_args()
    draw(read(args.file), args.picture)
    return 0


if __name__ == "__main__":
    sys.exit(main())
