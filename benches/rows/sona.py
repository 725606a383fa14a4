"""The three loops: what an event costs beyond the learner, readers beside the background, and whole turns."""

from __future__ import annotations

import itertools
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

import microlora as ml
from microlora.encoders import LsaEncoder
from microlora.sona import JournalConfig, SonaConfig, SonaLoop
from peers import numbers
from quantiles import pinned, quantiles, times_of, usable_cores
from report import Report, duration
from timing import Case, Clock

#: What is expected of a loop: an event, a consolidation, a deep run ("minutes"), nanoseconds.
EXPECTED_INSTANT, EXPECTED_BACKGROUND, EXPECTED_DEEP = 1e6, 100e6, 60e9
#: Gradient accumulation for one event at 768 r16 by a scalar loop in Rust, rustc -O with target-cpu=native,
#: on an AMD EPYC, best of 15 times 2,000. Measured apart from this run.
SCALAR_ACCUMULATION = 30_795.0
WIDTH, RANK = 768, 16
WINDOW, RESERVOIR = 64, 512
#: Events that the streams go round.
EVENTS = 4096

Event = tuple[Any, ml.Target]


def run(report: Report, clock: Clock, *, smoke: bool) -> None:
    """Adds the rows."""
    instant(report, clock)
    wide(report, clock)
    texts(report, clock, smoke)
    readers(report, 1 if smoke else 30)
    consolidation(report, 2 if smoke else 100)
    deep(report, 1 if smoke else 5)


def settings(
    width: int = WIDTH, rank: int = RANK, modules: tuple[str, ...] = ("q_proj",), **more: Any
) -> Any:
    """Settings of a loop that learns from its first event on."""
    lora = ml.LoraConfig(rank=rank, alpha=2.0 * rank, target_modules=modules)
    return SonaConfig(lora=lora, hidden_dim=width, warmup_inputs=0, **more)


def stream(loop: SonaLoop, count: int = EVENTS) -> list[Event]:
    """Inputs, and targets of one map that the module can reach, up to noise."""
    handle = loop.lora["q_proj"]
    wanted = np.random.default_rng(1).standard_normal((handle.rank, handle.out_features), np.float32)
    x = numbers(count, handle.in_features) / np.sqrt(np.float32(handle.in_features))
    y = (handle.scaling * x @ handle.lora_a.T) @ wanted + 0.1 * numbers(count, handle.out_features)
    return [(row, ml.Target(target)) for row, target in zip(x, y, strict=True)]


def instant(report: Report, clock: Clock) -> None:
    """One event with the same `Target` through the learner, the loop, and the loop with a journal.

    Nothing is held out here, so that every event learns, as it does in the learner.
    """
    report.section("instant loop: one event, 768 r16, every event learned")
    config = settings(holdout=0.0)
    x, target = numbers(WIDTH) / 28, ml.Target(numbers(WIDTH))
    with tempfile.TemporaryDirectory() as folder:
        plain = SonaLoop(config)
        written = SonaLoop.open(folder, config, journal=JournalConfig(fsync="never"))
        default = SonaLoop(settings())
        names = {"x": x, "t": target}
        bare = ml.MicroLoRA(config.lora, hidden_dim=WIDTH)
        ns = clock.compare(
            {
                "bare": Case("f(x, t)", {**names, "f": bare.instant}),
                "loop": Case("f(x, t)", {**names, "f": plain.instant_adapt}),
                "journal": Case("f(x, t)", {**names, "f": written.instant_adapt}),
                "default": Case("f(x, t)", {**names, "f": default.instant_adapt}),
            }
        )
        files = [path.stat().st_blocks * 512 for path in Path(folder).rglob("*") if path.is_file()]
        each = sum(files) / written.stats().instant_count
        core = plain.stats().instant_p50_us * 1e3
        written.close()
    alone = f"lora.instant {duration(ns['bare'])}"
    share = ns["loop"] / ns["bare"]
    report.add("instant_adapt", duration(ns["loop"]), alone, share, 1.5, below=True, headline=True)
    text = f'instant_adapt, journal fsync="never" ({each:,.0f} bytes an event)'
    report.add(text, duration(ns["journal"]), alone, ns["journal"] / ns["bare"], 2.5, below=True)
    text = "instant_adapt, one event in ten held out (the default)"
    report.add(text, duration(ns["default"]), alone, ns["default"] / ns["bare"])
    peer = f"scalar gradient accumulation {duration(SCALAR_ACCUMULATION)} (measured apart)"
    report.add("instant_adapt", duration(ns["loop"]), peer, SCALAR_ACCUMULATION / ns["loop"], 10.0)
    report.add("the same in the core, its own p50", duration(core), peer, SCALAR_ACCUMULATION / core, 10.0)


def wide(report: Report, clock: Clock) -> None:
    """One event for two modules: one call of the loop, two of the learner."""
    report.section("instant loop: one event, 4096 r2, two modules")
    modules = ("q_proj", "v_proj")
    config = settings(4096, 2, modules, holdout=0.0)
    names = {"x": numbers(4096) / 64, "t": ml.Target(numbers(4096))}
    loop, bare = SonaLoop(config), ml.MicroLoRA(config.lora, hidden_dim=4096)
    both = "; ".join(f"f(x, t, {name!r})" for name in modules)
    ns = clock.compare(
        {
            "loop": Case("f(x, t)", {**names, "f": loop.instant_adapt}),
            "bare": Case(both, {**names, "f": bare.instant}),
        }
    )
    text = f"lora.instant on each {duration(ns['bare'])}"
    report.add("instant_adapt", duration(ns["loop"]), text, ns["loop"] / ns["bare"], 1.5, below=True)


def texts(report: Report, clock: Clock, smoke: bool) -> None:
    """Events of texts, with the encoder's own time beside them."""
    from microlora.demo.corpus import read_corpus

    pairs = read_corpus().pairs[: 300 if smoke else None]
    encoder = LsaEncoder().fit([pair.code for pair in pairs])
    title = f"instant loop on texts: LSA encoder of {encoder.dim} on {len(pairs):,} functions, r16"
    report.section(title)
    pair = pairs[len(pairs) // 2]
    config = settings(encoder.dim, RANK, holdout=0.0)
    loop = SonaLoop(config, encoder=encoder)
    names = {"f": loop.instant_adapt, "e": encoder.encode, "q": pair.query, "r": pair.code}
    names["t"] = ml.Target(encoder.encode([pair.code])[0])
    ns = clock.compare(
        {
            "encode": Case("e([q])", names),
            "encode both": Case("e([q, r])", names),
            "target": Case("f(q, t)", names),
            "both": Case("f(q, r, 0.9)", names),
        }
    )
    limit = f"limit of {duration(EXPECTED_INSTANT)}"
    for what, call, alone in (
        ("query and response", "both", "encode both"),
        ("query and Target", "target", "encode"),
    ):
        report.add(f"encoder alone, {what}", duration(ns[alone]), limit, EXPECTED_INSTANT / ns[alone])
        text = f"{limit}; {duration(ns[call] - ns[alone])} beside the encoder"
        work = f"instant_adapt, {what}"
        report.add(work, duration(ns[call]), text, EXPECTED_INSTANT / ns[call], 1.0)


def readers(report: Report, rounds: int, reads: int = 8_000, each: int = 1_000) -> None:
    """`forward` of one pinned reader, in blocks with the background thread and without, in turn.

    The reader itself brings in a window of events before every `each` reads, in both kinds of blocks, and
    these are not timed. With an interval of 1 ms the background hardly rests; the default is 100 ms.
    """
    report.section(
        f"forward, 768 r16, one pinned reader, {rounds * reads:,} calls with the background and without"
    )
    cores = usable_cores()
    loop = SonaLoop(settings(background_interval_ms=1.0, max_ms=None))
    events = filled(loop)
    x, out = numbers(WIDTH), np.empty(WIDTH, np.float32)
    seen: dict[bool, list[int]] = {False: [], True: []}
    busy = wall = turns = 0.0
    with pinned(cores[-1]):
        for number in range(2 * rounds):
            on = number % 2 == 1
            before = loop.stats()
            if on:
                with pinned(cores[0]):
                    loop.start()
            start = time.perf_counter()
            for _ in range(reads // each):
                feed(loop, events, WINDOW)
                seen[on] += times_of(loop.forward, (x, None, out), each)
            if on:
                wall += time.perf_counter() - start
                loop.stop()
                after = loop.stats()
                turns += after.background_count - before.background_count
                busy += spent(after) - spent(before)
            else:
                loop.maybe_background(force=True)
    off, on_ = quantiles(seen[False]), quantiles(seen[True])
    where = "on another core" if len(cores) > 1 else "on the same core"
    report.add(
        "background meanwhile, wall time of its turns",
        f"{busy / 1e6 / wall:.0%} of the time",
        f"{turns:,.0f} turns {where}",
    )
    for name, target in (("p50", None), ("p99", 3.0), ("p99.9", None)):
        without = f"without {duration(off[name])}"
        report.add(
            f"forward, {name}", duration(on_[name]), without, on_[name] / off[name], target, below=True
        )


def consolidation(report: Report, repeats: int) -> None:
    """One turn of the background loop, from the window to the exchange, gate included.

    The gate lets every result pass here, so that the exchange is always in the time.
    """
    report.section("background loop: window 64, reservoir 512, 768 r16")
    loop = SonaLoop(settings(max_ms=None, gate_tolerance=10.0))
    events = filled(loop)
    wall: list[float] = []
    work: list[float] = []
    accepted = 0
    for _ in range(repeats):
        feed(loop, events, WINDOW)
        start, spent = time.perf_counter_ns(), time.thread_time_ns()
        done = loop.maybe_background(force=True)
        wall.append(time.perf_counter_ns() - start)
        work.append(time.thread_time_ns() - spent)
        accepted += done is not None and done.outcome == "accepted"
    best, usual = min(wall), statistics.median(work)
    ours = f"{duration(best)} (median CPU time {duration(usual)}, {accepted} of {repeats} accepted)"
    report.add("maybe_background, limit 3 ms", ours, "limit 3 ms", best / 3e6, 1.0, below=True)
    text = f"expected ~{duration(EXPECTED_BACKGROUND)}"
    report.add("maybe_background", duration(best), text, EXPECTED_BACKGROUND / best, 10.0)


def deep(report: Report, repeats: int) -> None:
    """Training on 512 given samples and on what is remembered, gate included."""
    report.section("deep loop: 512 given samples and the reservoir, 768 r16")
    loop = SonaLoop(settings(max_ms=None))
    filled(loop)
    pairs = stream(loop, 512)
    seen, done = [], None
    for _ in range(repeats):
        start = time.perf_counter_ns()
        done = loop.deep_optimize(pairs)
        seen.append(time.perf_counter_ns() - start)
    assert done is not None
    ours = f"{duration(min(seen))} ({done.training.total_steps} steps, {done.outcome})"
    text = "expected minutes, taken as one"
    report.add("deep_optimize", ours, text, EXPECTED_DEEP / min(seen), 6.0)


def filled(loop: SonaLoop) -> Iterator[Event]:
    """Fills the reservoir by consolidations; an endless stream to go on with."""
    events = itertools.cycle(stream(loop))
    for _ in range(64):
        feed(loop, events, WINDOW)
        loop.maybe_background(force=True)
        stats = loop.stats()
        if stats.reservoir_samples + stats.held_out_samples >= RESERVOIR:
            return events
    raise SystemExit(
        f"the reservoir holds {stats.reservoir_samples} samples after {stats.instant_count} events"
    )


def feed(loop: SonaLoop, events: Iterator[Event], count: int) -> None:
    """So many events."""
    for x, target in itertools.islice(events, count):
        loop.instant_adapt(x, target)


def spent(stats: Any) -> float:
    """Microseconds of all consolidations."""
    return stats.background_count * stats.background_avg_latency_us if stats.background_count else 0.0
