"""Merging and resizing: against PEFT on the same factors, by rank, width and number, method by method."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

import microlora as ml
from merge_cases import MODULE, adapters, best, distance, factors, residual, statistics, weighted_sum
from peers import PeftMerge, numbers
from report import Report, duration
from timing import Clock, shortest

RANK, PARENTS, DENSITY = 16, 3, 0.2
MEBIBYTE = 2**20
#: Bytes that a merge may take beyond parents and result.
LIMIT = 32 * 10**6
#: At least this many times PEFT's speed, by width.
LINEAR = {768: 120.0, 4096: 8000.0}
TIES = {768: 12.0, 4096: 80.0}


def run(report: Report, clock: Clock, *, smoke: bool) -> None:
    """Adds the rows."""
    del clock
    widths = (64, 96) if smoke else (768, 4096)
    budget = 0.01 if smoke else 1.0
    for width in widths:
        linear(report, width, budget)
        ties(report, width, budget)
    memory(report, widths[-1])
    resize(report, 96 if smoke else 4096, 2 if smoke else 32, budget)
    scaling(report, budget / 4, smoke=smoke)
    methods(report, widths[0], budget / 2)


def have_peft() -> bool:
    """Whether the peer is there."""
    return all(importlib.util.find_spec(name) is not None for name in ("torch", "peft"))


def best_of(peft: PeftMerge, kind: str, weight: float, width: int, **options: float) -> tuple[float, object]:
    """PEFT's nanoseconds and factors; one call where it takes many seconds."""
    runs = [peft.merge(kind, [weight] * PARENTS, **options) for _ in range(1 if width > 1024 else 5)]  # type: ignore[arg-type]
    return min(seconds for _, seconds in runs) * 1e9, runs[-1][0][MODULE]


def linear(report: Report, width: int, budget: float) -> None:
    """The mean of three adapters, back at the rank of one."""
    report.section(f"merge 3 x r{RANK} into r{RANK}, one module of {width} x {width}, default report")
    parents = adapters(width, RANK, PARENTS)
    ns = shortest(lambda: ml.merge(parents, method="linear", rank=RANK), budget)
    want = best(*weighted_sum(parents, 1 / PARENTS), RANK)
    error = distance(factors(ml.merge(parents, method="linear", rank=RANK).adapter), want)
    if not have_peft():
        report.add("linear", duration(ns), "", error=error)
        return
    slow, _ = best_of(PeftMerge(parents), "svd", 1 / PARENTS, width, rank=RANK)
    target = LINEAR.get(width)
    text = f"PEFT svd {duration(slow)}"
    report.add("linear", duration(ns), text, slow / ns, target, error, headline=target is not None)


def ties(report: Report, width: int, budget: float) -> None:
    """TIES on the weight change itself, and how near the result is to the best of its rank."""
    parents = adapters(width, RANK, PARENTS)

    def ours() -> ml.merging.Merged:
        return ml.merge(parents, method="ties", density=DENSITY, rank=RANK)

    ns = shortest(ours, budget)
    if not have_peft():
        report.add("ties", duration(ns), "")
        return
    slow, (a, b, scaling) = best_of(PeftMerge(parents), "ties_svd", 1.0, width, rank=RANK, density=DENSITY)
    target = TIES.get(width)
    text = f"PEFT ties_svd {duration(slow)}"
    report.add("ties", duration(ns), text, slow / ns, target, headline=target is not None)
    dense = ties_of(parents)
    ours_left, peft_left = residual(dense, *factors(ours().adapter)), residual(dense, a, scaling * b)
    report.add(
        f"ties, what r{RANK} leaves of it",
        f"{ours_left:.6f}",
        f"PEFT's dense SVD {peft_left:.6f}",
        ours_left / peft_left,
        1.001,
        below=True,
    )


def ties_of(parents: dict[str, ml.Adapter]) -> np.ndarray:
    """The dense result of PEFT's own TIES, before its SVD."""
    import torch
    from peft.utils.merge_utils import ties

    deltas = [torch.tensor((b @ a).astype(np.float32)) for a, b in map(factors, parents.values())]
    return np.asarray(ties(deltas, torch.ones(len(deltas)), DENSITY))


def memory(report: Report, width: int) -> None:
    """Resident bytes of a process that merges, beyond parents and result."""
    report.section(f"merge 3 x r{RANK} into r{RANK}, {width} x {width}: memory beyond parents and result")
    script = Path(__file__).resolve().parent.parent / "merge_memory.py"
    for method in ("ties", "linear"):
        command = [sys.executable, str(script), method, str(width), str(RANK), str(PARENTS)]
        found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        ours = f"{found['resident'] / 1e6:.1f} MB resident, {found['reported'] / 1e6:.1f} MB in its report"
        worst = max(found.values())
        report.add(method, ours, f"limit {LIMIT / 1e6:.0f} MB", worst / LIMIT, 1.0, below=True)


def resize(report: Report, width: int, modules: int, budget: float) -> None:
    """A large adapter made small, against reading its file and against a dense SVD of each module."""
    high, low = 64, 8
    report.section(f"resize r{high} to r{low}, {modules} modules of {width} x {width}")
    weights = {f"m{i}": (numbers(high, width), numbers(width, high)) for i in range(modules)}
    adapter = ml.Adapter.from_factors(weights, alpha=high)
    del weights
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "adapter.safetensors")
        ml.save(adapter, path)
        read, load = shortest(path.read_bytes, budget), shortest(lambda: ml.load(path), budget)
    ns = shortest(lambda: ml.resize(adapter, rank=low), budget)
    small = ml.resize(adapter, rank=low).adapter
    error = distance(factors(small, "m0"), best(*factors(adapter, "m0"), low))
    work, ours, mib = "resize", duration(ns), adapter.memory_bytes / MEBIBYTE
    text = f"reading its {mib:.0f} MiB {duration(read)}"
    report.add(work, ours, text, ns / read, 100.0 if width == 4096 else None, error, below=True)
    report.add(work, ours, f"ml.load of it {duration(load)}", ns / load)
    if importlib.util.find_spec("torch"):
        import torch

        torch.set_num_threads(1)
        dense = torch.tensor(small.factors("m0")[1] @ numbers(low, width))
        dense += torch.tensor(numbers(width, width))
        slow = modules * shortest(
            lambda: torch.linalg.svd(dense, full_matrices=False), 0.0, once=width > 1024
        )
        text = f"torch SVD of one dense module, times {modules}: {duration(slow)}"
        report.add(work, ours, text, slow / ns, 200.0 if width == 4096 else None)


def scaling(report: Report, budget: float, *, smoke: bool) -> None:
    """How time grows with rank, width and the number of parents."""
    report.section("merging by rank, width and number of parents, result of one parent's rank")
    top = 96 if smoke else 768
    cases = [(top, rank, PARENTS) for rank in (4, 8, 16, 32, 64)]
    cases += [(width, RANK, PARENTS) for width in ((64, 96) if smoke else (256, 512, 1024, 2048, 4096))]
    cases += [(top, RANK, n) for n in ((2, 4) if smoke else (2, 4, 8, 16, 32, 64))]
    for width, rank, n in cases:
        parents = adapters(width, rank, n)
        factor, element = (
            shortest(lambda m=method, p=parents, r=rank: ml.merge(p, method=m, rank=r), budget)  # type: ignore[misc]
            for method in ("linear", "ties")
        )
        text, ratio = "", None
        if have_peft() and width <= 1024:
            _, seconds = PeftMerge(parents).merge("svd", [1 / n] * n, rank=rank)
            text, ratio = f"PEFT svd {duration(seconds * 1e9)}", seconds * 1e9 / factor
        report.add(f"linear, {n} x r{rank}, {width}", duration(factor), text, ratio)
        report.add(f"ties, {n} x r{rank}, {width}", duration(element), "")


def methods(report: Report, width: int, budget: float) -> None:
    """Every method at its default but the rank."""
    report.section(f"every method, r{RANK} parents into r{RANK}, {width} x {width}")
    three, two = adapters(width, RANK, PARENTS), adapters(width, RANK, 2)
    known = statistics(three)
    for name, row in ml.merging.methods().items():
        if name != row.name:
            continue
        parents = two if row.parents[1] == 2 else three
        options = {"statistics": known} if row.statistics else {}
        if row.name != "cat":
            options["rank"] = RANK
        ns = shortest(lambda p=parents, m=row.name, o=options: ml.merge(p, method=m, **o), budget)  # type: ignore[misc]
        report.add(f"{row.name}, {len(parents)} parents", duration(ns), "")
