"""Runs methods on seeds and appends one JSON line per run; those that the file has are skipped.

A line of other settings or of other code does not count: the run is made again, and the later line wins.

PYTHONPATH=benches/science python -m continual.run --data both --out docs/data/continual.jsonl
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import importlib
import json
import multiprocessing
import os
import platform
import sys
import time
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from .domains import DATASETS
from .methods import METHODS, SEEDS, Method, scores
from .plan import Plan, Setup

THREADS = ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS")
ENGINES = ("reference", "native")
Job = tuple[str, int, str, str]
"""Data, seed, method, engine: what names a run."""


def key(line: dict[str, Any]) -> Job:
    """Names the run of a line."""
    return line["data"], line["seed"], line["method"], line["engine"]


def settings(data: str, method: Method) -> dict[str, Any]:
    """What a run's result depends on besides its seed."""
    out: dict[str, Any] = {"setup": Setup.of(data).digest(), "strength": method.strength.get(data, 0.0)}
    if method.native is not None:
        out["ewc"] = method.native
    if method.memory:
        out["memory"] = method.memory
    if method.dark:
        out["logit_weight"] = method.logit_weight[data]
    return out


@functools.cache
def code(engine: str) -> str:
    """Digest of what computes: these sources, and for native the extension."""
    here = Path(__file__).parent
    files = [
        here / f"{name}.py" for name in ("domains", "network", "plan", "penalties", "methods", "reference")
    ]
    if engine == "native":
        files += [here / "native.py", Path(importlib.import_module("microlora._core").__file__ or "")]
    sha = hashlib.sha256()
    for file in files:
        sha.update(file.read_bytes())
    return sha.hexdigest()[:12]


@functools.cache
def environment() -> dict[str, str]:
    """Versions and the processor."""
    blas = np.show_config(mode="dicts")["Build Dependencies"]["blas"]
    out = {"python": platform.python_version(), "numpy": np.__version__, "cpu": _cpu()}
    out["blas"] = f"{blas['name']} {blas['version']}"
    for name in ("microlora", "scikit-learn", "mlxtend", "scipy"):
        try:
            out[name] = version(name)
        except PackageNotFoundError:
            out[name] = "absent"
    return out


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.machine()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "unknown")


@functools.lru_cache(maxsize=1)
def _plan(data: str, seed: int) -> Plan:
    plan = Plan.load(Setup.of(data), seed)
    plan.tasks()
    return plan


def make_plan(job: tuple[str, int]) -> str:
    """Makes a plan in a worker; returns its digest."""
    return _plan(*job).digest


def work(job: Job) -> dict[str, Any]:
    """One run, as the line that it leaves."""
    data, seed, name, engine = job
    method, plan = METHODS[name], _plan(data, seed)
    result = importlib.import_module(f".{engine}", __package__).run(plan, method)
    return {
        "data": data,
        "method": name,
        "engine": engine,
        "seed": seed,
        **scores(result.r, joint=method.joint),
        "R": result.r.round(6).tolist(),
        "seconds": {k: round(getattr(result, k), 4) for k in ("train", "consolidate", "evaluate")},
        "plan": plan.digest,
        "settings": settings(data, method),
        "code": code(engine),
        "environment": environment(),
    }


def read(path: Path) -> list[dict[str, Any]]:
    """Lines of a file of results; none where there is no file. A line that was cut off is left out."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
    if lines and not lines[-1].endswith("\n"):
        lines.pop()
    return [json.loads(line) for line in lines]


def missing(jobs: Iterable[Job], lines: Iterable[dict[str, Any]]) -> list[Job]:
    """Jobs that no line of today's code and settings answers."""
    have = {key(line): (line["settings"], line["code"]) for line in lines}
    return [job for job in jobs if have.get(job) != (settings(job[0], METHODS[job[2]]), code(job[3]))]


def seeds(text: str) -> list[int]:
    """`20-29` or `20,22,25`."""
    out: list[int] = []
    for part in text.split(","):
        first, _, last = part.partition("-")
        out += range(int(first), int(last or first) + 1)
    return out


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="continual.run", description=__doc__.splitlines()[0])
    parser.add_argument("--data", choices=(*DATASETS, "both"), default="both")
    parser.add_argument("--seeds", type=seeds, default=list(SEEDS), help="such as 20-29 or 20,22")
    parser.add_argument(
        "--methods", nargs="+", choices=list(METHODS), default=list(METHODS), metavar="METHOD"
    )
    parser.add_argument("--engine", choices=(*ENGINES, "both"), default="both")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--out", type=Path, required=True, metavar="FILE")
    return parser.parse_args(argv)


def main() -> int:
    """Runs what is missing."""
    args = parse()
    data = DATASETS if args.data == "both" else (args.data,)
    engines = ENGINES if args.engine == "both" else (args.engine,)
    # The engines of a run follow each other, so that both are timed on the same machine in the same minute.
    jobs = [(d, s, m, e) for d in data for s in args.seeds for m in args.methods for e in engines]
    todo = missing(jobs, read(args.out))
    args.out.parent.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    # For the workers, which load NumPy afresh.
    os.environ.update(dict.fromkeys(THREADS, "1"))
    with multiprocessing.get_context("spawn").Pool(args.processes) as pool, args.out.open("a") as out:
        pool.map(make_plan, dict.fromkeys((d, s) for d, s, _, _ in todo), chunksize=1)
        for n, line in enumerate(pool.imap_unordered(work, todo), 1):
            out.write(json.dumps(line) + "\n")
            out.flush()
            spent = time.monotonic() - start
            left = spent / n * (len(todo) - n)
            print(
                f"{n}/{len(todo)}  {line['data']} {line['seed']} {line['method']:13s} {line['engine']:9s} "
                f"ACC {line['ACC']:.3f}  {line['seconds']['train']:5.2f} s  about {left / 60:.0f} min left",
                file=sys.stderr,
                flush=True,
            )
    print(
        f"{len(todo)} runs in {time.monotonic() - start:.0f} s, {len(jobs) - len(todo)} were there",
        file=sys.stderr,
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
