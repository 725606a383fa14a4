"""One learning event, and one accumulated step."""

from __future__ import annotations

import numpy as np

import microlora as ml
from peers import NumpyLora, learned, numbers
from report import Report, duration
from rows.read_path import torch_peers
from timing import Case, Clock


def run(report: Report, clock: Clock, *, smoke: bool) -> None:
    """Adds the rows."""
    del smoke
    instant(report, clock)
    step(report, clock)


def rls_error() -> float:
    """Our B after 200 events against batch ridge in float64, relative to its largest number."""
    lora, target = learned(64, 8), numbers(8, 64)
    handle = lora["q_proj"]
    a, s = handle.lora_a.astype(np.float64), handle.scaling
    start = handle.lora_b.astype(np.float64).T
    xs = numbers(200, 64)
    ts = ((s * xs @ a.T) @ target).astype(np.float32) + numbers(200, 64)
    for x, t in zip(xs, ts, strict=True):
        lora.instant(x, ml.Target(t))
    u = s * xs.astype(np.float64) @ a.T
    ridge = handle.ridge or 0.0
    want = np.linalg.solve(u.T @ u + ridge * np.eye(8), u.T @ ts + ridge * start)
    return float(np.abs(handle.lora_b.T - want).max() / np.abs(want).max())


def instant(report: Report, clock: Clock) -> None:
    """RLS with its forward."""
    report.section("one event, 768 r16")
    lora = learned(768, 16)
    x, t = numbers(768) / 28, numbers(768)
    target = ml.Target(t)
    names = {"f": lora.instant, "x": x, "t": target}
    cases = {
        "ours": Case("f(x, t)", names),
        "made": Case("f(x, T(t))", {**names, "T": ml.Target, "t": t}),
        "numpy": Case("f(x, t)", {"f": NumpyLora(lora).rls, "x": x, "t": t}),
    }
    peers = torch_peers(lora)
    if peers:
        tx, tt = peers.torch.tensor(x), peers.torch.tensor(t)
        cases["torch"] = Case("f(x, t)", {"f": peers.autograd_step, "x": tx, "t": tt})
    ns = clock.compare(cases)
    ours = duration(ns["ours"])
    report.add(
        "instant (RLS)",
        ours,
        f"NumPy RLS {duration(ns['numpy'])}",
        ns["numpy"] / ns["ours"],
        8.0,
        rls_error(),
        headline=True,
    )
    made = duration(ns["made"])
    report.add(
        "instant with a new Target", made, f"NumPy RLS {duration(ns['numpy'])}", ns["numpy"] / ns["made"]
    )
    if peers:
        text = f"another algorithm: torch autograd + SGD {duration(ns['torch'])}"
        report.add("instant (RLS)", ours, text, ns["torch"] / ns["ours"])


def step(report: Report, clock: Clock) -> None:
    """Gradient of both factors, accumulated, then applied."""
    report.section("adapt + apply_updates, both factors, 768 r16")
    lora = learned(768, 16)
    x, t = numbers(768) / 28, numbers(768)
    names = {
        "adapt": lora.adapt,
        "apply": lora.apply_updates,
        "x": x,
        "t": ml.Target(t),
        "f": lora["q_proj"].forward,
    }
    cases = {
        "ours": Case("adapt(x, t); apply(1e-6)", names),
        "cycle": Case("f(x); adapt(x, t); apply(1e-6)", names),
    }
    peers = torch_peers(lora)
    if peers:
        tx, tt = peers.torch.tensor(x), peers.torch.tensor(t)
        cases["torch"] = Case("f(x, t)", {"f": peers.autograd_step, "x": tx, "t": tt})

        def by_hand() -> None:
            with peers.torch.inference_mode():
                peers.manual_step(tx, tt)

        cases["hand"] = Case("f()", {"f": by_hand})
    ns = clock.compare(cases)
    ours = duration(ns["ours"])
    if peers:
        report.add(
            "adapt + apply",
            ours,
            f"torch autograd + SGD {duration(ns['torch'])}",
            ns["torch"] / ns["ours"],
            30.0,
            headline=True,
        )
        report.add(
            "adapt + apply", ours, f"hand-written torch {duration(ns['hand'])}", ns["hand"] / ns["ours"], 3.5
        )
    report.add("forward + adapt + apply", duration(ns["cycle"]), "limit 1 ms", 1e6 / ns["cycle"], 1.0)
