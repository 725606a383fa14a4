"""The continual-learning experiment as a speed row: the same training steps here and in NumPy."""

from __future__ import annotations

import importlib.util
import sys
import time
from pathlib import Path

from report import Report, duration
from timing import Clock

DATA = {"perm": ("sklearn",), "rot": ("sklearn", "mlxtend", "scipy")}


def run(report: Report, clock: Clock, *, smoke: bool) -> None:
    """Adds a row for each benchmark whose packages are there."""
    del clock
    have = [d for d, packages in DATA.items() if all(importlib.util.find_spec(p) for p in packages)]
    report.section("one task of the continual-learning benchmark: 3 layers, r8, Adam, batch 32")
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "science"))
    for data in have:
        if data == "rot" and smoke:
            continue
        task(report, data, repeats=1 if smoke else 5)


def task(report: Report, data: str, repeats: int) -> None:
    """Training alone, without tests and importance; the best of some repeats, in turn."""
    from continual.methods import METHODS
    from continual.native import NativeLearner
    from continual.plan import Plan, Setup
    from continual.reference import Learner

    plan = Plan.load(Setup.of(data), 20)
    feed = plan.feed(0)
    seconds: dict[str, list[float]] = {"ours": [], "numpy": []}
    for _ in range(repeats):
        for name, learner in (("ours", NativeLearner), ("numpy", Learner)):
            made = learner(plan, METHODS["none"])
            start = time.perf_counter()
            made.train(feed)
            seconds[name].append(time.perf_counter() - start)
    ours, numpy = (min(seconds[name]) * 1e9 for name in ("ours", "numpy"))
    steps = sum(-(-len(order) // feed.batch) for order in feed.orders)
    title = {"perm": "permuted digits", "rot": "rotated MNIST-5k"}[data]
    text = f"NumPy reference {duration(numpy)}"
    report.add(f"{title}, {steps} steps", duration(ours), text, numpy / ours, 1.8)
