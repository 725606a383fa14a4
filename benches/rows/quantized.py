"""Forward from blocks against forward from plain factors, each with the error of what it runs."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np

import microlora as ml
from peers import learned, numbers
from report import Report, duration
from timing import Case, Clock

HIDDEN, RANK = 4096, 16
#: Type of both factors: how fast at least, f32 being 1.
TARGETS = {"q8_0": 1.0, "q6_k": None, "q5_k": None, "q4_k": None, "q4_1": None, "q4_0": None}
#: Allocations tried, as in read_path.py; the best counts.
PLACES = 3
#: Adapters that take turns: of float32 8 times the level-3 cache of the machine in the table.
MANY = 512


def run(report: Report, clock: Clock, *, smoke: bool) -> None:
    """Adds the rows."""
    places = 1 if smoke else PLACES
    best: dict[str, float] = {}
    errors: dict[str, float] = {}
    for _ in range(places):
        for name, ns in _once(clock, errors).items():
            best[name] = min(best.get(name, ns), ns)
    report.section(
        f"forward of one row from blocks, {HIDDEN} r{RANK}; error: of the kernel, relative to float64"
    )
    peer = best["f32"]
    report.add(f"forward f32 {HIDDEN} r{RANK}", duration(peer), "", error=errors["f32"])
    for name, target in {"f16": 1.1, **TARGETS}.items():
        report.add(
            f"forward {name} {HIDDEN} r{RANK}",
            duration(best[name]),
            f"f32 {duration(peer)}",
            peer / best[name],
            target,
            errors[name],
        )
    _in_turn(report, clock, 2 if smoke else MANY)
    _batch(report, clock)


def _in_turn(report: Report, clock: Clock, many: int) -> None:
    """Many adapters, each of which the others have driven out of the caches when its turn comes."""
    report.section(f"forward of one row from blocks, {many} adapters of {HIDDEN} r{RANK} in turn")
    x, y = numbers(HIDDEN), np.empty(HIDDEN, np.float32)
    source = learned(HIDDEN, RANK).adapter()
    made = {
        "f32": lambda: learned(HIDDEN, RANK),
        "f16": lambda: learned(HIDDEN, RANK, "f16"),
        "q8_0": lambda: _quantized(source, "q8_0"),
        "q4_k": lambda: _quantized(source, "q4_k"),
    }
    ns = {}
    for name, make in made.items():
        turn = itertools.cycle([make().forward for _ in range(many)])
        names = {"turn": turn, "x": x, "y": y}
        ns[name] = clock.compare({name: Case("next(turn)(x, 'q_proj', y)", names)})[name]
    peer = ns.pop("f32")
    report.add("forward f32, cold", duration(peer), "")
    for name, value in ns.items():
        report.add(f"forward {name}, cold", duration(value), f"f32 {duration(peer)}", peer / value)


def _batch(report: Report, clock: Clock) -> None:
    report.section(f"forward of 64 rows from blocks, {HIDDEN} r{RANK}")
    lora = learned(HIDDEN, RANK)
    x, y = numbers(64, HIDDEN), np.empty((64, HIDDEN), np.float32)
    sides = {name: _quantized(lora.adapter(), name) for name in ("q8_0", "q4_k")}
    cases = {"f32": Case("l.forward(x, 'q_proj', y)", {"l": lora, "x": x, "y": y})}
    for name, q in sides.items():
        cases[name] = Case("l.forward(x, 'q_proj', y)", {"l": q, "x": x, "y": y})
    ns = clock.compare(cases)
    for name, q in sides.items():
        error = _error(q.dequantize(), x, q.forward(x, "q_proj"))
        text = f"f32 {duration(ns['f32'])}"
        report.add(f"64 rows {name}", duration(ns[name]), text, ns["f32"] / ns[name], None, error)


def _quantized(adapter: ml.Adapter, name: str) -> ml.QuantizedAdapter:
    return ml.QuantizedAdapter.from_adapter(adapter, {"q_proj": (name, name)})


def _once(clock: Clock, errors: dict[str, float]) -> dict[str, float]:
    """Nanoseconds of every type on new allocations, in one comparison."""
    lora = learned(HIDDEN, RANK)
    plain = {"f32": lora, "f16": learned(HIDDEN, RANK, "f16")}
    models: dict[str, Any] = {**plain, **{name: _quantized(lora.adapter(), name) for name in TARGETS}}
    x = numbers(HIDDEN)
    cases = {}
    for name, model in models.items():
        names = {"l": model, "x": x, "y": np.empty(HIDDEN, np.float32)}
        cases[name] = Case("l.forward(x, 'q_proj', y)", names)
        adapter = model.adapter() if name in plain else model.dequantize()
        errors[name] = max(errors.get(name, 0.0), _error(adapter, x, model.forward(x, "q_proj")))
    return clock.compare(cases)


def _error(adapter: ml.Adapter, x: Any, y: Any) -> float:
    """Largest difference to float64 on the same numbers, relative to the largest output."""
    a, b = (w.astype(np.float64) for w in adapter.factors("q_proj"))
    want = adapter.info("q_proj").scaling * (x.astype(np.float64) @ a.T) @ b.T
    return float(np.abs(y - want).max() / np.abs(want).max())
