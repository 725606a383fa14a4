"""A soak of the loops: `make soak`, about four minutes.

Two million events by one writer thread into 64 loops that one `Background` consolidates, while readers never
stop. Blocks with the background on take turns with shorter ones with it off, so that both are measured on the
same minutes. Memory counts as flat where the resident size, over the second half of the run, rises by less
than the threshold with the whole 95 % interval of its least-squares slope. Writes docs/data/sona_soak.json,
from which `docs/build.py` makes a table in docs/performance.md.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import sys
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import microlora as ml
from microlora.sona import Background, SonaConfig, SonaLoop
from quantiles import Histogram
from report import duration, machine

#: Width of the loops, in turn.
WIDTHS = (64, 96, 128)
RANK = 8
#: Directions that the inputs of a loop lie in, but for noise.
TOPICS = 4
#: Inputs of each loop; targets are made afresh for every event.
POOL = 256
#: Events between two looks at the clock of the writer.
BATCH = 1024


@dataclass(frozen=True)
class Plan:
    """How much of everything.

    Attributes:
        events: Events with the background on.
        adapters: Loops.
        readers: Threads that read.
        pairs: Blocks with the background on, each after a block with it off.
        off: Events of a block with it off, as a share of one with it on.
        rate: Events a second; 0 writes as fast as it goes.
        reservoir: Samples that each loop remembers.
        pending: Events that may wait in each loop.
        threshold: Bytes an event by which the resident size may rise.
    """

    events: int = 2_000_000
    adapters: int = 64
    readers: int = 2
    pairs: int = 50
    off: float = 0.2
    rate: float = 16_000.0
    reservoir: int = 512
    pending: int = 1000
    threshold: float = 4.0


class Readers:
    """Threads that read from all loops in turn, check what they get, and time every call."""

    def __init__(self, loops: list[SonaLoop], inputs: list[Any], count: int) -> None:
        self.on, self.stopped = False, False
        self.refused: list[str] = []
        self.seen = [{False: Histogram(), True: Histogram()} for _ in range(count)]
        self.threads = [
            threading.Thread(target=self._read, args=(loops, inputs, seen), daemon=True) for seen in self.seen
        ]
        for thread in self.threads:
            thread.start()

    def _read(self, loops: list[SonaLoop], inputs: list[Any], seen: dict[bool, Histogram]) -> None:
        clock = time.perf_counter_ns
        work = [
            (loop.forward, x, np.empty(x.shape[1], np.float32)) for loop, x in zip(loops, inputs, strict=True)
        ]
        turn = 0
        while not self.stopped:
            turn += 1
            for f, x, out in work:
                row, on = x[turn % POOL], self.on
                start = clock()
                try:
                    f(row, None, out)
                except Exception as error:
                    self.refused.append(repr(error))
                    continue
                seen[on].add(clock() - start)
                if not np.isfinite(out[turn % len(out)]):
                    self.refused.append("a number that is not finite")

    def stop(self) -> None:
        """Ends the threads."""
        self.stopped = True
        for thread in self.threads:
            thread.join()

    def summary(self, on: bool) -> dict[str, float]:
        """What all of them saw."""
        total = Histogram()
        for seen in self.seen:
            total.merge(seen[on])
        return total.summary()


class Writer:
    """Events for all loops in turn: a few topics of each loop's own, linear answers, noise, and a quality."""

    def __init__(self, loops: list[SonaLoop], rate: float) -> None:
        self.loops, self.rate, self.rng = loops, rate, np.random.default_rng(0)
        self.seen = {False: Histogram(), True: Histogram()}
        self.written = 0
        self.inputs, self.targets = [], []
        for loop in loops:
            width = loop.lora["q_proj"].in_features
            z = self._normal(POOL, TOPICS)
            for kept, noise in ((self.inputs, 0.05), (self.targets, 0.1)):
                kept.append(z @ self._normal(TOPICS, width) / 2 + noise * self._normal(POOL, width))

    def _normal(self, *shape: int) -> Any:
        return self.rng.standard_normal(shape, dtype=np.float32)

    def write(self, count: int, on: bool) -> None:
        """So many events, at the writer's rate."""
        clock, seen, loops = time.perf_counter_ns, self.seen[on], self.loops
        start = time.perf_counter()
        for first in range(0, count, BATCH):
            for _ in range(min(BATCH, count - first)):
                at, turn = self.written % len(loops), self.written // len(loops) % POOL
                x, target = self.inputs[at][turn], ml.Target(self.targets[at][turn])
                quality = 0.6 + 0.1 * (self.written % 5)
                begun = clock()
                loops[at].instant_adapt(x, target, quality)
                seen.add(clock() - begun)
                self.written += 1
            if self.rate:
                time.sleep(max(0.0, start + (first + BATCH) / self.rate - time.perf_counter()))


def resident() -> int:
    """Bytes of this process in memory."""
    with open("/proc/self/statm", encoding="ascii") as f:
        return int(f.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def slope(x: list[float], y: list[float]) -> tuple[float, float]:
    """Least-squares slope, and half the width of its 95 % interval (Student's t)."""
    xs, ys = np.asarray(x), np.asarray(y)
    n = len(xs)
    dx = xs - xs.mean()
    value = float(dx @ ys / (dx @ dx))
    left = ys - ys.mean() - value * dx
    error = math.sqrt(float(left @ left) / (n - 2) / float(dx @ dx))
    z = 1.959964
    # Cornish-Fisher: within 1 % of Student's quantile from 5 degrees of freedom on.
    t = z + (z**3 + z) / (4 * (n - 2)) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * (n - 2) ** 2)
    return value, t * error


def memory(samples: list[tuple[float, float]], threshold: float) -> dict[str, Any]:
    """Whether the resident size is flat over the second half of ``(events, bytes)`` pairs."""
    half = samples[len(samples) // 2 :]
    value, width = slope([e for e, _ in half], [b for _, b in half])
    return {
        "slope": value,
        "low": value - width,
        "high": value + width,
        "threshold": threshold,
        "flat": value + width < threshold,
        "samples": len(half),
        "first": samples[0][1],
        "middle": half[0][1],
        "last": half[-1][1],
    }


def run(plan: Plan, tell: Any = lambda _line: None) -> dict[str, Any]:
    """One soak."""
    loops = []
    for i in range(plan.adapters):
        lora = ml.LoraConfig(rank=RANK, alpha=2.0 * RANK, target_modules=("q_proj",))
        width = WIDTHS[i % len(WIDTHS)]
        config = SonaConfig(
            lora=lora,
            hidden_dim=width,
            seed=i,
            reservoir_capacity=plan.reservoir,
            max_pending_samples=plan.pending,
        )
        loops.append(SonaLoop(config))
    writer = Writer(loops, plan.rate)
    background = Background(*loops)
    readers = Readers(loops, writer.inputs, plan.readers)
    samples: list[tuple[float, float]] = []
    started = time.perf_counter()
    on_events = plan.events // plan.pairs
    try:
        for pair in range(plan.pairs):
            writer.write(round(plan.off * on_events), False)
            background.start()
            readers.on = True
            for _ in range(4):
                writer.write(on_events // 4, True)
                samples.append((writer.written, resident()))
            readers.on = False
            background.stop()
            if pair % 5 == 4:
                spent = time.perf_counter() - started
                tell(f"{writer.written:,} events, {spent:.0f} s, {samples[-1][1] / 2**20:.1f} MiB")
    finally:
        background.stop()
        readers.stop()
    stats = [loop.stats() for loop in loops]
    names = ("instant_count", "background_count", "accepted", "refused", "rolled_back", "overflowed_samples")
    return {
        "machine": {**machine(), "cores": os.cpu_count(), "system": platform.system()},
        "plan": asdict(plan),
        "seconds": time.perf_counter() - started,
        "events": writer.written,
        "memory": memory(samples, plan.threshold),
        "resident": samples,
        "refused_reads": len(readers.refused),
        "refusals": sorted(set(readers.refused))[:5],
        "forward": {"on": readers.summary(True), "off": readers.summary(False)},
        "instant_adapt": {"on": writer.seen[True].summary(), "off": writer.seen[False].summary()},
        "loops": {name: sum(getattr(s, name) for s in stats) for name in names},
        "loop_bytes": sum(s.memory_bytes for s in stats),
    }


def markdown(found: dict[str, Any]) -> str:
    """The table for the docs."""
    at = ("p50", "p99", "p99.9")
    lines = ["| call | background | calls | p50 | p99 | p99.9 |", "|" + "---|" * 6]
    for call in ("forward", "instant_adapt"):
        for state in ("off", "on"):
            s = found[call][state]
            cells = [f"`{call}`", state, f"{s['calls']:,}", *(duration(s[q]) for q in at)]
            lines.append("| " + " | ".join(cells) + " |")
    m, loops, plan = found["memory"], found["loops"], found["plan"]
    text = (
        f"{found['events']:,} events in {found['seconds']:.0f} s over {plan['adapters']} adapters (widths "
        f"{', '.join(map(str, WIDTHS))}, rank {RANK}) by one writer, {plan['readers']} readers, "
        f"{loops['background_count']:,} consolidations by one thread ({loops['accepted']:,} accepted); "
        f"{loops['overflowed_samples']:,} events left a queue unconsolidated; "
        f"{found['refused_reads']} reads refused. "
        f"Resident size over the second half: {m['middle'] / 2**20:.1f} to {m['last'] / 2**20:.1f} MiB, "
        f"{m['slope']:+.2f} bytes an event (95 % interval {m['low']:+.2f} to {m['high']:+.2f}, "
        f"{m['threshold']:g} allowed): {'flat' if m['flat'] else 'NOT FLAT'}."
    )
    return "\n".join([*lines, "", text])


def main() -> int:
    """Runs, writes, and fails where memory rises or a read was refused."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name, value in asdict(Plan()).items():
        parser.add_argument(f"--{name}", type=type(value), default=value)
    parser.add_argument("--out", metavar="FILE", help="also write everything as JSON")
    args = vars(parser.parse_args())
    out = args.pop("out")
    found = run(Plan(**args), lambda line: print("...", line, file=sys.stderr, flush=True))
    found["text"] = markdown(found)
    if out:
        with open(out, "w", encoding="utf-8") as f:
            json.dump(found, f, indent=1)
    print(found["text"])
    return 0 if found["memory"]["flat"] and not found["refused_reads"] else 1


if __name__ == "__main__":
    sys.exit(main())
