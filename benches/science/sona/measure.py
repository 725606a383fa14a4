"""The experiments: a row and a split in, what the file says of them out."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from . import streams
from .plan import EARLY, MODULE, Bench, Server
from .rows import EVENTS, NOISE, POISON, POISONED, SETTINGS, SHARED, STRATEGIES, SWITCH, UPLIFT, Row

#: Events between two looks at a curve.
EVERY = 10
#: Share of a fresh adapter's gain that counts as recovered.
RECOVERED = 0.9
#: Personas that share a loop in the streams of the strategies.
GROUP = 4


def _mean(values: Any) -> float:
    return float(np.mean(list(values)))


def _turns(count: Counter[str], done: Any) -> None:
    if done is not None:
        count[done.outcome] += 1


def uplift(row: Row, bench: Bench) -> dict[str, Any]:
    """One loop for every persona: gain after ten events, after all, and on unrelated queries."""
    user = getattr(streams, row.options.get("user", "right"))
    early, late, drift, turns = [], [], [], Counter[str]()
    for persona in bench.task.personas:
        loop, clicks = bench.loop(row.setting), bench.task.split.stream[persona]
        ten = min(EARLY, len(clicks))

        def look(n: int, done: Any, loop: Server = loop, persona: str = persona, ten: int = ten) -> None:
            _turns(turns, done)
            if n == ten:
                early.append(bench.gain(loop, persona))

        streams.serve(bench, row.setting, loop, clicks, user, look)
        late.append(bench.gain(loop, persona))
        drift.append(bench.gain(loop))
    return {"early": _mean(early), "all": _mean(late), "drift": _mean(drift), "turns": dict(turns)}


def shared(row: Row, bench: Bench) -> dict[str, Any]:
    """One loop for all personas, one after the other."""
    loop, after, turns = bench.loop(row.setting), [], Counter[str]()
    for number, persona in enumerate(bench.task.personas):
        clicks = bench.task.split.stream[persona]
        streams.serve(
            bench,
            row.setting,
            loop,
            clicks,
            streams.right,
            lambda n, done: _turns(turns, done),
            key=100 + number,
        )
        after.append(bench.gain(loop, persona))
    end = _mean(bench.gain(loop, persona) for persona in bench.task.personas)
    return {"after": _mean(after), "all": end, "drift": bench.gain(loop), "turns": dict(turns)}


def _curve(row: Row, bench: Bench, loop: Server, persona: str, length: int) -> list[float]:
    """Gain on a persona before and after every few of its events; the last one stays to the end."""
    points = [bench.gain(loop, persona)]
    clicks = bench.task.split.stream[persona]

    def look(n: int, done: Any) -> None:
        if n % (EVERY // 2) == 0:
            points.append(bench.gain(loop, persona))

    streams.serve(bench, row.setting, loop, clicks, streams.right, look)
    last = bench.gain(loop, persona)
    return [*points, *[last] * (length - len(points))]


def switch(row: Row, bench: Bench) -> dict[str, Any]:
    """A persona's clicks, then the next one's: how soon the second is served, and what the first loses."""
    names = bench.task.personas
    length = max(len(bench.task.split.stream[name]) for name in names) // (EVERY // 2) + 2
    fresh, moved, first, kept = [], [], [], []
    for old, new in zip(names, (*names[1:], names[0]), strict=True):
        fresh.append(_curve(row, bench, bench.loop(row.setting), new, length))
        loop = bench.loop(row.setting)
        streams.serve(bench, row.setting, loop, bench.task.split.stream[old], streams.right)
        first.append(bench.gain(loop, old))
        moved.append(_curve(row, bench, loop, new, length))
        kept.append(bench.gain(loop, old))
    alone, after = np.mean(fresh, axis=0), np.mean(moved, axis=0)

    def reached(curve: Any) -> int | None:
        there = np.flatnonzero(curve >= RECOVERED * alone[-1])
        return int(there[0]) * (EVERY // 2) if len(there) else None

    return {
        "fresh": float(alone[-1]),
        "all": float(after[-1]),
        "fresh_events": reached(alone),
        "events": reached(after),
        "first": _mean(first),
        "kept": _mean(kept),
        "curve": after.round(5).tolist(),
        "fresh_curve": alone.round(5).tolist(),
    }


def noise(row: Row, bench: Bench) -> dict[str, Any]:
    """Clicks that are wrong, or that fall where people look; there a persona's stream comes three times."""
    quality = row.options["quality"]
    if "eta" in row.options:
        user, passes = streams.biased(row.options["eta"], quality), 3
    else:
        user, passes = streams.noisy(row.options["share"], bool(quality)), 1
    length = max(len(v) for k, v in bench.task.split.stream.items() if k in bench.task.personas)
    length = length * passes // EVERY + 2
    curves, told, turns = [], 0, Counter[str]()
    for number, persona in enumerate(bench.task.personas):
        loop, clicks = bench.loop(row.setting), np.tile(bench.task.split.stream[persona], passes)
        points = [0.0]

        def look(
            n: int, done: Any, loop: Server = loop, persona: str = persona, points: list[float] = points
        ) -> None:
            _turns(turns, done)
            if n % (EVERY * passes) == 0:
                points.append(bench.gain(loop, persona))

        told += streams.serve(bench, row.setting, loop, clicks, user, look, key=200 + number)
        last = bench.gain(loop, persona)
        curves.append([*points, *[last] * (length - len(points))])
    curve = np.mean(curves, axis=0)
    return {
        "all": float(curve[-1]),
        "events": told,
        "curve": curve[: length // passes + 2].round(5).tolist(),
        "turns": dict(turns),
    }


def _groups(bench: Bench) -> list[Sequence[str]]:
    names = bench.task.personas
    return [names[i : i + GROUP] for i in range(0, len(names), GROUP)]


def strategies(row: Row, bench: Bench) -> dict[str, Any]:
    """Gain at the end of a stream.

    ``domains``: four modules one after the other through one loop. ``personas``: the same clicks in random
    order. ``ratings``: a loop for each persona, 30 % of the clicks wrong, all rated. ``alone``: a loop for
    each persona, right clicks, the first module ranks.
    """
    stream, gains, turns, members = row.options["stream"], [], Counter[str](), []
    together = stream in ("domains", "personas")
    groups = _groups(bench) if together else [[name] for name in bench.task.personas]
    user = streams.noisy(0.3, True) if stream == "ratings" else streams.right
    for number, group in enumerate(groups):
        if row.setting.preset:
            module = row.setting.config(bench.task.dim, 0).lora.target_modules[0]
        else:
            module = MODULE
        loop = bench.loop(row.setting)
        clicks = streams.mixed(bench, group) if stream == "personas" else streams.in_turn(bench, group)
        look = lambda n, done: _turns(turns, done)  # noqa: E731
        key = 200 + number if stream == "ratings" else 300 + number
        streams.serve(bench, row.setting, loop, clicks, user, look, key=key, module=module)
        gains += [bench.gain(loop, name, module) for name in group]
        members.append(loop.stats().members)  # type: ignore[attr-defined]
    return {"all": _mean(gains), "turns": dict(turns), "members": _mean(members)}


def poison(row: Row, bench: Bench) -> dict[str, Any]:
    """All personas' clicks through one loop; for 64 events the targets are turned round."""
    task, loop = bench.task, bench.loop(row.setting)
    clicks = streams.mixed(bench, task.personas)[:EVENTS]
    held = bench.rng(5).permutation(np.concatenate([task.split.held_out[name] for name in task.personas]))[
        :300
    ]
    x, wanted = task.queries[held], task.documents[held]
    zero = task.mrr(None, held)
    first, last = POISONED
    points: list[list[float]] = []
    log: list[dict[str, Any]] = []
    turns = {"before": Counter[str](), "during": Counter[str](), "after": Counter[str]()}

    def at(n: int) -> str:
        """Where the window that ends with event n lies; one poisoned event is enough for "during"."""
        began = log[-1]["event"] if log else 0
        return "before" if n <= first else "during" if began < last else "after"

    def look(n: int, done: Any) -> None:
        if done is not None:
            turns[at(n)][done.outcome] += 1
            log.append(
                {
                    "event": n,
                    "outcome": done.outcome,
                    "before": done.loss_before,
                    "after": done.loss_after,
                    "note": done.notes[0] if done.notes else "",
                }
            )
        if n % 16 == 0:
            served: Any = loop
            mrr = task.mrr(served, held) - zero
            loss = 0.5 * float(((x + loop.forward(x, MODULE) - wanted) ** 2).sum(axis=1).mean())
            points.append([n, mrr, loss])

    streams.serve(
        bench, row.setting, loop, clicks, streams.flipped(first, last), look, changing=True, key=400
    )
    curve = np.array(points)

    def mean(lo: int, hi: int, column: int) -> float:
        return float(curve[(curve[:, 0] > lo) & (curve[:, 0] <= hi), column].mean())

    spans = {"before": (first - 64, first), "during": (first, last), "after": (last, last + 64)}
    spans["end"] = (EVENTS - 16, EVENTS)
    return {
        **{f"mrr_{name}": mean(*span, 1) for name, span in spans.items()},
        **{f"loss_{name}": mean(*span, 2) for name, span in spans.items()},
        "worst": float(curve[curve[:, 0] > first, 1].min()),
        "all": float(curve[-1, 1]),
        "turns": {name: dict(count) for name, count in turns.items()},
        "curve": curve.round(5).tolist(),
        "log": log,
    }


def moved(row: Row, bench: Bench) -> float:
    """Gain on a second persona at its end, after a first one: `switch` without its curves."""
    names, gains = bench.task.personas, []
    for old, new in zip(names, (*names[1:], names[0]), strict=True):
        loop = bench.loop(row.setting)
        streams.serve(bench, row.setting, loop, streams.in_turn(bench, (old, new)), streams.right)
        gains.append(bench.gain(loop, new))
    return _mean(gains)


def settings(row: Row, bench: Bench) -> dict[str, Any]:
    """What a setting does to five streams."""
    noisy = dataclasses.replace(row, options={"share": 0.3, "quality": ""})
    clean, wrong = uplift(dataclasses.replace(row, options={}), bench), noise(noisy, bench)
    turn, bad = shared(row, bench), poison(row, bench)
    found = {
        "clean": clean["all"],
        "noisy": wrong["all"],
        "shared": turn["all"],
        "switch": moved(row, bench),
        "poison_during": bad["mrr_during"],
        "poison_end": bad["mrr_end"],
    }
    streams_of = ("clean", "noisy", "shared", "switch", "poison_end")
    return {
        **found,
        "all": _mean(found[name] for name in streams_of),
        "turns": clean["turns"],
        "poison_turns": bad["turns"],
    }


EXPERIMENTS: dict[str, Callable[[Row, Bench], dict[str, Any]]] = {
    UPLIFT: uplift,
    SHARED: shared,
    SWITCH: switch,
    NOISE: noise,
    STRATEGIES: strategies,
    POISON: poison,
    SETTINGS: settings,
}
