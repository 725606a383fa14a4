"""Merges the adapters of each seed in every way and appends one JSON line per seed and row.

Lines of other code or other settings do not count: their rows are made again, and the later line wins.

PYTHONPATH=benches:benches/science python -m merging.run --out docs/data/merging.jsonl
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import importlib
import json
import sys
from collections.abc import Iterable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
from continual import run as continual
from continual.plan import Plan, Setup

import microlora as ml

from . import engines
from .parents import Pair, delta
from .rows import BOUNDS, PEFT, ROWS, SEEDS, Row


@functools.cache
def code() -> str:
    """Digest of what computes: these sources, those of the plan, and the extension."""
    here = Path(__file__).parent
    files = [here / f"{name}.py" for name in ("rows", "parents", "engines")]
    files += [here.parent / "continual" / f"{name}.py" for name in ("domains", "network", "plan")]
    files.append(Path(importlib.import_module("microlora._core").__file__ or ""))
    sha = hashlib.sha256()
    for file in files:
        sha.update(file.read_bytes())
    return sha.hexdigest()[:12]


def environment() -> dict[str, str]:
    """Versions and the processor, torch and PEFT among them."""
    out = dict(continual.environment()) | {"microlora": ml.__version__}
    for name in ("torch", "peft"):
        try:
            out[name] = version(name)
        except PackageNotFoundError:
            out[name] = "absent"
    return out


def relative(ours: ml.Adapter, theirs: ml.Adapter) -> float:
    """Largest relative Frobenius difference of two adapters' weight changes over the modules."""
    pairs = [(delta(ours, m), delta(theirs, m)) for m in theirs.modules()]
    return max(float(np.linalg.norm(a - b) / np.linalg.norm(b)) for a, b in pairs)


def retained(scores: Iterable[float], own: Iterable[float]) -> float:
    """Mean over domains of accuracy, as a share of the own adapter's."""
    return float(np.mean([s / o for s, o in zip(scores, own, strict=True)]))


class Bench:
    """The rows of one seed; adapters are trained when the first row wants them."""

    def __init__(self, plan: Plan, domains: tuple[int, int] | None = None) -> None:
        self.plan = plan
        self.pair = Pair.train(plan) if domains is None else Pair.train(plan, domains)
        self.own = self.pair.scores(self.pair.both())
        self._made: dict[str, engines.Merged] = {}

    def merged(self, row: Row) -> engines.Merged:
        """The adapter of a row, once."""
        if row.name not in self._made:
            self._made[row.name] = engines.merge(
                row, self.pair.adapters, self.pair.statistics, self.plan.seed
            )
        return self._made[row.name]

    def bound(self, name: str) -> tuple[float, float]:
        """Accuracies of a row that merges nothing."""
        pair = self.pair
        if name == "ensemble":
            return pair.ensemble()
        if name == "joint":
            return pair.scores((pair.joint, pair.joint))
        both = pair.both()
        adapters: Mapping[str, tuple[Any, Any]] = {"none": (None, None), "own": both, "other": both[::-1]}
        return pair.scores(adapters[name])

    def line(self, row: Row) -> dict[str, Any]:
        """What the file says of a row."""
        facts: dict[str, Any] = {}
        if row.group == BOUNDS:
            scores = self.bound(row.name)
        else:
            made = self.merged(row)
            scores = self.pair.scores((made.adapter, made.adapter))
            facts = {"ranks": made.ranks, "error": made.error, "notes": list(made.notes)}
            if row.like:
                facts["difference"] = relative(self.merged(ROWS[row.like]).adapter, made.adapter)
            if row.group == PEFT and not row.random:
                facts["reproduced"] = relative(engines.reproduced(row, self.pair.adapters), made.adapter)
        return {
            "row": row.name,
            "seed": self.plan.seed,
            "accuracy": scores,
            "retained": retained(scores, self.own),
            **facts,
            "settings": row.options,
            "plan": self.plan.digest,
            "code": code(),
            "environment": environment(),
        }


def missing(rows: Iterable[Row], seed: int, lines: Iterable[dict[str, Any]]) -> list[Row]:
    """Rows of a seed that no line of today's code and settings answers."""
    have = {(line["row"], line["seed"]): (line["code"], line["settings"]) for line in lines}
    return [row for row in rows if have.get((row.name, seed)) != (code(), row.options)]


def main() -> int:
    """Runs what is missing."""
    runnable = [row for row in ROWS.values() if row.group != PEFT or engines.have_peft()]
    parser = argparse.ArgumentParser(prog="merging.run", description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=continual.seeds, default=list(SEEDS), help="such as 20-24 or 20,22")
    parser.add_argument("--rows", nargs="+", choices=[row.name for row in runnable], metavar="ROW")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE")
    args = parser.parse_args()
    rows = [row for row in runnable if not args.rows or row.name in args.rows]
    if len(runnable) < len(ROWS):
        print("PEFT is not installed: its rows are left out", file=sys.stderr)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    before = continual.read(args.out)
    for seed in args.seeds:
        todo = missing(rows, seed, before)
        if not todo:
            continue
        bench = Bench(Plan.load(Setup.of("rot"), seed))
        with args.out.open("a", encoding="utf-8") as out:
            for row in todo:
                line = bench.line(row)
                out.write(json.dumps(line) + "\n")
                text = f"{seed} {row.name:60s} retained {line['retained']:.3f}"
                print(text, file=sys.stderr, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
