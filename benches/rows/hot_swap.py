"""Hot swap: the exchange itself, the read path with a manager and without, and both under load."""

from __future__ import annotations

from typing import Any

import numpy as np

import microlora as ml
import microlora._core as core
from peers import learned, numbers
from report import Report, duration
from timing import Case, Clock

#: hidden, rank.
READS = [(768, 16), (768, 2), (4096, 2)]
#: Modules of the adapter that is swapped; 224 are the seven of 32 layers.
SIZES = (1, 7, 224)
READERS = 8
#: Allocations tried, as in read_path.py; the best counts.
PLACES = 4


def run(report: Report, clock: Clock, *, smoke: bool) -> None:
    """Adds the rows."""
    seconds = 0.01 if smoke else 1.0
    exchange(report, seconds)
    reads(report, clock)
    under_load(report, seconds)
    peft(report, clock)


def many(modules: int, hidden: int = 768, rank: int = 16) -> Any:
    """An adapter of so many modules."""
    a, b = numbers(rank, hidden), numbers(hidden, rank)
    return ml.Adapter.from_factors({f"layers.{i}.proj": (a, b) for i in range(modules)}, alpha=2.0 * rank)


def exchange(report: Report, seconds: float) -> None:
    """One swap without Python, clock included."""
    report.section("hot swap: the exchange, without Python")
    for modules in SIZES:
        ns = core.probe_swap(many(modules, rank=2), 0, True, seconds)
        report.add(
            f"swap(), {modules} module{'s' if modules > 1 else ''}",
            f"{duration(ns['swap'])} (p99 {duration(ns['swap_p99'])})",
            f"limit 1 us (freeing the places of an old one: {duration(ns['free'])})",
            ns["swap"] / 1e3,
            1.0,
            below=True,
        )


def reads(report: Report, clock: Clock) -> None:
    """One row into a buffer, by a handle of the manager and by one of the learner, on the same weights."""
    report.section("read path with a manager, against the learner's own handle on the same weights")
    for hidden, rank in READS:
        ns = {"with": np.inf, "without": np.inf}
        for _ in range(PLACES):
            lora = learned(hidden, rank)
            manager = ml.HotSwapManager(lora)
            x, y = numbers(hidden), np.empty(hidden, np.float32)
            cases = {
                "with": Case("h.forward(x, y)", {"h": manager["q_proj"], "x": x, "y": y}),
                "without": Case("h.forward(x, y)", {"h": lora["q_proj"], "x": x, "y": y}),
            }
            ns = {name: min(ns[name], found) for name, found in clock.compare(cases).items()}
        report.add(
            f"forward {hidden} r{rank}, manager",
            duration(ns["with"]),
            f"learner {duration(ns['without'])}",
            ns["with"] / ns["without"],
            1.05,
            below=True,
        )


def under_load(report: Report, seconds: float) -> None:
    """Readers that never stop, on the one core of this run."""
    report.section(f"{READERS} reader threads on one core, 768 r16, without Python")
    adapter = many(1)
    quiet = core.probe_swap(adapter, READERS, False, seconds)
    busy = core.probe_swap(adapter, READERS, True, seconds)
    took = f"a swap takes {duration(busy['swap'])}, p99 {duration(busy['swap_p99'])}"
    report.add("swaps per second", f"{busy['swaps_per_second']:,.0f}", took)
    for what, key in (("median", "read"), ("p99", "read_p99")):
        report.add(
            f"read while swapping, {what}",
            duration(busy[key]),
            f"no swaps {duration(quiet[key])}",
            busy[key] / quiet[key],
        )


def peft(report: Report, clock: Clock) -> None:
    """Weights in memory to weights in service: checked and exchanged here, copied in place there."""
    try:
        import torch
        from peft import LoraConfig, get_peft_model
        from peft.utils.hotswap import hotswap_adapter_from_state_dict
    except ImportError:
        return
    report.section("from weights in memory to weights in service, 768 r16")
    torch.set_num_threads(1)
    for modules in (1, 7):
        names = [f"m{i}" for i in range(modules)]
        base = torch.nn.ModuleDict({n: torch.nn.Linear(768, 768, bias=False) for n in names})
        config = LoraConfig(r=16, lora_alpha=32, target_modules=names)
        model = get_peft_model(base, config)
        state = {k: v.clone() for k, v in model.state_dict().items() if "lora_" in k}
        a, b = numbers(16, 768), numbers(768, 16)
        manager = ml.HotSwapManager()
        value = ml.Adapter.from_factors(dict.fromkeys(names, (a, b)), alpha=32.0)
        swap = {"f": hotswap_adapter_from_state_dict, "m": model, "s": state, "c": config}
        cases = {
            "ours": Case("f(a)", {"f": manager.set_active, "a": value}),
            "peft": Case('f(m, s, "default", c)', swap),
        }
        ns = clock.compare(cases)
        report.add(
            f"set_active, {modules} module{'s' if modules > 1 else ''}",
            duration(ns["ours"]),
            f"PEFT hotswap_adapter_from_state_dict {duration(ns['peft'])}",
            ns["peft"] / ns["ours"],
        )
