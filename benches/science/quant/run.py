"""Quantises the adapter of each seed in every way and appends one JSON line per seed and row.

Lines of other code or other settings do not count: their rows are made again, and the later line wins.

PYTHONPATH=benches/science python -m quant.run --out docs/data/quant.jsonl
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import importlib
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from continual import run as continual
from continual.plan import Plan, Setup

import microlora as ml

from .adapters import Bench, filled
from .rows import ROWS, SEEDS, WHOLE, Row


@functools.cache
def code() -> str:
    """Digest of what computes: these sources, those of the plan, the quantiser, and the extension."""
    here, package = Path(__file__).parent, Path(ml.__file__).parent
    files = [here / "adapters.py", here.parent / "merging" / "parents.py"]
    files += [here.parent / "continual" / f"{name}.py" for name in ("domains", "network", "plan")]
    files += sorted((package / "quantizing").glob("*.py"))
    files.append(Path(importlib.import_module("microlora._core").__file__ or ""))
    sha = hashlib.sha256()
    for file in files:
        sha.update(file.read_bytes())
    return sha.hexdigest()[:12]


def line(bench: Bench, row: Row) -> dict[str, Any]:
    """What the file says of a row."""
    adapter = bench.whole if row.group == WHOLE else bench.adapter
    reads = {m: filled(x, adapter.dims[m][0]) for m, x in bench.inputs.items()}
    made, report = ml.quantize(adapter, row.kind, target_error=row.target_error, calibration=reads)
    predicted = bench.predict(made)
    before, after = bench.accuracy(bench.labels), bench.accuracy(predicted)
    points = round(100 * (after - before), 6)
    return {
        "row": row.name,
        "seed": bench.plan.seed,
        "accuracy": after,
        "change": points,
        "agreement": float(np.mean(predicted == bench.labels)),
        "delta_error": report.delta_error,
        "worst_module": max(m.delta_error for m in report.modules),
        "output_error": report.output_error,
        "types": {m.name: m.types for m in report.modules},
        "fell_back": {m.name: m.fell_back for m in report.modules if m.fell_back},
        "memory": [report.memory_before, report.memory_after],
        "bytes": [report.bytes_before, report.bytes_after],
        "settings": row.settings,
        "plan": bench.plan.digest,
        "code": code(),
        "environment": dict(continual.environment()) | {"microlora": ml.__version__},
    }


def missing(rows: Iterable[Row], seed: int, lines: Iterable[dict[str, Any]]) -> list[Row]:
    """Rows of a seed that no line of today's code and settings answers."""
    have = {(line["row"], line["seed"]): (line["code"], line["settings"]) for line in lines}
    return [row for row in rows if have.get((row.name, seed)) != (code(), row.settings)]


def main() -> int:
    """Runs what is missing."""
    parser = argparse.ArgumentParser(prog="quant.run", description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=continual.seeds, default=list(SEEDS), help="such as 10-14 or 10,12")
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), metavar="ROW", default=list(ROWS))
    parser.add_argument("--out", type=Path, required=True, metavar="FILE")
    args = parser.parse_args()
    rows = [ROWS[name] for name in args.rows]
    args.out.parent.mkdir(parents=True, exist_ok=True)
    before = continual.read(args.out)
    for seed in args.seeds:
        todo = missing(rows, seed, before)
        if not todo:
            continue
        bench = Bench(Plan.load(Setup.of("rot"), seed))
        with args.out.open("a", encoding="utf-8") as out:
            for row in todo:
                made = line(bench, row)
                out.write(json.dumps(made) + "\n")
                text = f"{made['change']:+.2f} points, delta error {made['delta_error']:.4f}"
                print(f"{seed} {row.name:20s} {text}", file=sys.stderr, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
