"""Plays every row on every seed and appends one JSON line per run; those that the file has are skipped.

Lines of other code or other settings do not count: their runs are made again, and the later line wins.

PYTHONPATH=benches/science python -m bandit.run --out docs/data/bandit.jsonl
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import importlib
import json
import sys
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from continual.run import environment, read

from .rows import BOTH, EVENTS, NATIVE, ROWS, SEEDS, Row
from .task import Task, play

Line = dict[str, Any]


@functools.cache
def code(engine: str) -> str:
    """Digest of what computes: these sources, and for native rows the extension."""
    here = Path(__file__).parent
    files = [here / "task.py", here / ("native.py" if engine == NATIVE else "reference.py")]
    if engine == NATIVE:
        files.append(Path(importlib.import_module("microlora._core").__file__ or ""))
    sha = hashlib.sha256()
    for file in files:
        sha.update(file.read_bytes())
    return sha.hexdigest()[:12]


def run(row: Row, data: str, seed: int, noise: float, events: int = EVENTS) -> Line:
    """One pass of one policy."""
    task = Task.of(data, seed, events, noise)
    played = play(row.policy(task), task)
    return {
        "row": row.name,
        "data": data,
        "seed": seed,
        "noise": noise,
        "events": events,
        **asdict(played),
        "settings": row.options,
        "code": code(row.engine),
        "environment": environment(),
    }


def jobs() -> Iterator[tuple[Row, str, int, float]]:
    """Every run of the table, the quick data first."""
    for data in BOTH:
        for row in ROWS.values():
            for noise in row.noises if data in row.data else ():
                yield from ((row, data, seed, noise) for seed in SEEDS[data])


def missing(lines: Iterable[Line]) -> list[tuple[Row, str, int, float]]:
    """Runs that no line of today's code and settings answers."""
    have = {
        (x["row"], x["data"], x["seed"], x["noise"], x["events"]): (x["code"], x["settings"]) for x in lines
    }
    return [
        (row, data, seed, noise)
        for row, data, seed, noise in jobs()
        if have.get((row.name, data, seed, noise, EVENTS)) != (code(row.engine), row.options)
    ]


def main() -> int:
    """Runs what is missing."""
    parser = argparse.ArgumentParser(prog="bandit.run", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, metavar="FILE")
    args = parser.parse_args()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    for row, data, seed, noise in missing(read(args.out)):
        line = run(row, data, seed, noise)
        with args.out.open("a", encoding="utf-8") as out:
            out.write(json.dumps(line) + "\n")
        text = f"{data:6s} {seed} {noise:.1f} {row.name:20s} {line['reward']:.3f} {line['us']:8.1f} us"
        print(text, file=sys.stderr, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
