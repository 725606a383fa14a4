"""Forward: the kernel against the caches, the call against the kernel, the call against the peers."""

from __future__ import annotations

from typing import Any

import numpy as np

import microlora._core as core
from peers import NumpyLora, TorchPeers, learned, numbers
from report import Report, duration
from timing import Case, Clock

#: hidden, rank: at least this many times NumPy, torch, PEFT.
PEERS = {
    (768, 16): (2.5, 6.0, 30.0),
    (768, 2): (8.0, 20.0, None),
    (4096, 2): (2.5, 6.0, None),
    (4096, 16): (1.2, 2.0, None),
}
#: Shapes whose weights live in L2.
ROOFLINE = [(768, 8), (768, 16), (768, 32), (768, 64), (2048, 8), (2048, 16), (4096, 8)]
#: Allocations tried: where buffers lie to each other moves a kernel by up to a quarter; the best counts.
PLACES = 4
CACHES = {"L1": 24 << 10, "L2": 512 << 10, "L3": 8 << 20, "DRAM": 512 << 20}


def run(report: Report, clock: Clock, *, smoke: bool) -> None:
    """Adds the rows."""
    seconds = 0.002 if smoke else 0.1
    limits(report, seconds)
    roofline(report, seconds)
    overhead(report, clock, seconds)
    forward(report, clock)
    batch(report, clock, seconds)
    presets(report, clock)


def limits(report: Report, seconds: float) -> None:
    """What the machine can do."""
    report.section("limits of this core, measured now")
    for name, size in CACHES.items():
        report.add(
            f"read bandwidth, {name} ({size >> 10} KiB)",
            f"{core.probe_read_gbps(size, seconds):.0f} GB/s",
            "",
        )
    report.add("FMA peak, float32", f"{core.probe_fma_gflops(seconds):.0f} GFLOP/s", "")


def roofline(report: Report, seconds: float) -> None:
    """Weights, x and y per second, against reads of the same footprint."""
    report.section("bare kernel, share of the read bandwidth of the same footprint")
    for hidden, rank in ROOFLINE:
        plain = 0.0
        for dtype in ("f32", "f16"):
            handles = [learned(hidden, rank, dtype)["q_proj"] for _ in range(PLACES)]
            size = rank * 2 * hidden * (4 if dtype == "f32" else 2) + 2 * hidden * 4
            ns, limit = min(best_of(lambda h=h: core.probe_forward_ns(h, seconds / 4)) for h in handles), None
            if dtype == "f32":
                plain = ns
                limit = core.probe_read_gbps(size, seconds)
                share = size / ns / limit
                text = f"{duration(ns)}, {size / ns:.0f} GB/s"
                report.add(f"forward {hidden} r{rank}", text, f"read {limit:.0f} GB/s", share, 0.85)
            elif hidden == 768:
                report.add(
                    f"forward {hidden} r{rank} f16", duration(ns), f"f32 {duration(plain)}", plain / ns, 1.4
                )


def best_of(f: Any, repeats: int = 5) -> float:
    """The smallest of several results."""
    return float(min(f() for _ in range(repeats)))


def overhead(report: Report, clock: Clock, seconds: float) -> None:
    """What a Python call adds to the kernel."""
    report.section("a Python call over the bare kernel, 768 r16")
    bare, ns = float("inf"), {"handle": float("inf"), "new": float("inf")}
    for _ in range(PLACES):
        lora = learned(768, 16)
        handle, x, y = lora["q_proj"], numbers(768), np.empty(768, np.float32)
        here = best_of(lambda h=handle: core.probe_forward_ns(h, seconds))
        names = {"h": handle, "lora": lora, "x": x, "y": y}
        cases = {"handle": Case("h.forward(x, y)", names), "new": Case('lora.forward(x, "q_proj")', names)}
        # Each minimum on its own: pairing the luckiest call with its own kernel would flatter the call.
        bare = min(bare, here)
        ns = {key: min(ns[key], value) for key, value in clock.compare(cases).items()}
    for name, key, target in (
        ("handle.forward(x, buf)", "handle", 60.0),
        ('lora.forward(x, "q_proj")', "new", 250.0),
    ):
        over = ns[key] - bare
        report.add(
            name,
            f"{over:+.0f} ns ({duration(ns[key])} less the kernel's {duration(bare)})",
            f"limit {target:+.0f} ns",
            over / target,
            1.0,
            below=True,
        )


def error_of(lora: Any, x: Any, y: Any) -> float:
    """Largest difference to float64, relative to the largest output."""
    handle = lora["q_proj"]
    a, b = handle.lora_a.astype(np.float64), handle.lora_b.astype(np.float64)
    want = handle.scaling * (x.astype(np.float64) @ a.T) @ b.T
    return float(np.abs(y - want).max() / np.abs(want).max())


def torch_peers(lora: Any) -> TorchPeers | None:
    """torch and PEFT, where installed."""
    try:
        return TorchPeers(lora)
    except ImportError:
        return None


def forward(report: Report, clock: Clock) -> None:
    """One row from Python."""
    report.section("forward of one row, from Python")
    for (hidden, rank), (to_numpy, to_torch, to_peft) in PEERS.items():
        lora = learned(hidden, rank)
        x, y = numbers(hidden), np.empty(hidden, np.float32)
        cases = {
            "ours": Case("h.forward(x, y)", {"h": lora["q_proj"], "x": x, "y": y}),
            "numpy": Case("f(x)", {"f": NumpyLora(lora).forward, "x": x}),
        }
        peers = torch_peers(lora)
        if peers:
            tx = peers.torch.tensor(x)
            names = {"f": peers.forward, "x": tx, "layer": peers.peft, "base": peers.base}
            cases["torch"] = Case("f(x)", names)
            cases["peft"] = Case("layer(x)", names, minus="base(x)")
        guard = peers.torch.inference_mode() if peers else _Nothing()
        with guard:
            ns = clock.compare(cases)
        error = error_of(lora, x, lora.forward(x))
        work = f"forward {hidden} r{rank}"
        report.add(
            work,
            duration(ns["ours"]),
            f"NumPy {duration(ns['numpy'])}",
            ns["numpy"] / ns["ours"],
            to_numpy,
            error,
            headline=(hidden, rank) == (768, 16),
        )
        if peers:
            report.add(
                work,
                duration(ns["ours"]),
                f"torch {duration(ns['torch'])}",
                ns["torch"] / ns["ours"],
                to_torch,
                headline=(hidden, rank) == (768, 16),
            )
            text = f"PEFT layer less base {duration(ns['peft'])}"
            report.add(
                work,
                duration(ns["ours"]),
                text,
                ns["peft"] / ns["ours"],
                to_peft,
                headline=rank == 16 and hidden == 768,
            )


class _Nothing:
    def __enter__(self) -> None: ...
    def __exit__(self, *_: object) -> None: ...


def batch(report: Report, clock: Clock, seconds: float) -> None:
    """256 rows."""
    report.section("forward of 256 rows, 768 r16")
    lora = learned(768, 16)
    x, y = numbers(256, 768), np.empty((256, 768), np.float32)
    cases = {
        "ours": Case("h.forward(x, y)", {"h": lora["q_proj"], "x": x, "y": y}),
        "numpy": Case("f(x)", {"f": NumpyLora(lora).forward, "x": x}),
    }
    ns = clock.compare(cases)
    target = 1.3 if core.isa() == "avx512" else 1.2
    error = error_of(lora, x, lora.forward(x))
    report.add(
        "256 rows",
        duration(ns["ours"]),
        f"NumPy {duration(ns['numpy'])}",
        ns["numpy"] / ns["ours"],
        target,
        error,
        headline=True,
    )
    flops, peak = 2 * 256 * 16 * 2 * 768, core.probe_fma_gflops(seconds)
    rate = flops / ns["ours"]
    report.add("256 rows, share of FMA peak", f"{rate:.0f} GFLOP/s", f"peak {peak:.0f}", rate / peak, 0.85)


#: What a forward of each preset at 768 was designed to stay under, in microseconds.
LIMITS = {"coder": 50, "researcher": 30, "security": 80, "architect": 60, "reviewer": 30}


def presets(report: Report, clock: Clock) -> None:
    """Each preset, one call per shared input."""
    import microlora as ml

    report.section("presets at 768: all modules, one call per shared input, against their design limits")
    groups = (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",))
    for name, limit in LIMITS.items():
        lora = ml.create_lora(name, 768)
        calls = [[m for m in group if m in lora] for group in groups]
        calls = [c for c in calls if c]
        stmt = "; ".join(f"f(x, {c!r})" for c in calls)
        ns = clock.compare({"ours": Case(stmt, {"f": lora.forward_all, "x": numbers(768)})})["ours"]
        sizes = f"{lora.param_count:,} parameters, {lora.memory_bytes:,} bytes"
        report.add(
            f"{name}, {len(calls)} calls",
            duration(ns),
            f"limit {limit} us ({sizes})",
            limit * 1e3 / ns,
            1.0,
        )
