"""What a deep run learns from: remembered and given samples, none held out by the gate, none twice."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from microlora._checks import choice
from microlora._core import FeedbackBase, Gradient, Target
from microlora.exceptions import ConfigError, ShapeError
from microlora.training.events_in import InEvent, event_weight, incoming
from microlora.training.rows import Rows, rows_of, rows_of_events

if TYPE_CHECKING:
    from microlora.sona.loop import SonaLoop

__all__ = ["Gathered", "gather", "remembered", "rows", "split"]

#: Share of the samples that early stopping looks at.
VALIDATION = 0.1
FEWEST = 10


class Gathered(NamedTuple):
    """Events, each with its weight, and how many were left out."""

    events: list[InEvent]
    low: int
    held_out: int
    repeated: int


def remembered(loop: SonaLoop, held_out: bool) -> list[InEvent]:
    """The loop's samples as events; their weights have the quality in them already."""
    found = []
    for _, x, feedback, base, module, _, weight in loop.samples(held_out):
        weight = weight if isinstance(feedback, Target) else 1.0
        if weight > 0.0:
            found.append(InEvent(x, feedback, module, base, None, weight))
    return found


def gather(loop: SonaLoop, samples: Any, base: str | None) -> Gathered:
    """Given samples and remembered ones together.

    What equals a held-out sample is left out: the gate would measure with what was trained on. Equality is
    that of half precision, because the reservoir may store that.

    Args:
        loop: Whose reservoir it is.
        samples: As of `SonaLoop.deep_optimize`, or None.
        base: As there.

    Raises:
        MicroLoraError: Samples that cannot be learned from.
    """
    base = None if base is None else choice("base", base, ("input",))
    threshold = loop.config.quality_threshold
    held = {key(e, half=True) for e in remembered(loop, held_out=True)}
    events: list[InEvent] = []
    seen: set[bytes] = set()
    low = leaked = repeated = 0
    for event in () if samples is None else _given(loop, samples, base):
        weight = event_weight(event.quality, event.weight, event.feedback, threshold)
        if weight <= 0.0:
            low += 1
        elif (half := key(event, half=True)) in held:
            leaked += 1
        else:
            seen.add(half)
            events.append(event._replace(quality=None, weight=weight))
    for event in remembered(loop, held_out=False):
        if key(event, half=True) in seen:
            repeated += 1
        else:
            events.append(event)
    return Gathered(events, low, leaked, repeated)


def _given(loop: SonaLoop, samples: Any, base: str | None) -> Iterable[InEvent]:
    """Given samples as events; texts become vectors, whose embedding is the frozen layer's output."""
    texts: list[bool] = []

    def encoded(items: Iterable[Any]) -> Iterable[Any]:
        for item in items:
            is_text = getattr(item, "input_embedding", item) is None and bool(item.query)
            texts.append(is_text)
            yield loop._encoders.sample(item) if is_text else item

    arrays = isinstance(samples, tuple) and len(samples) in (2, 3) and np.ndim(samples[0]) == 2
    listed = isinstance(samples, Iterable) and not isinstance(samples, str | bytes | dict)
    source = encoded(samples) if listed and not arrays else samples
    for i, event in enumerate(incoming(source, None, None, None)):
        x = np.ascontiguousarray(event.x, np.float32)
        own = event.base
        if own is None and (base == "input" or (i < len(texts) and texts[i])):
            own = x if event.feedback.width == len(x) else None
            if own is None and base == "input":
                raise ShapeError(
                    f"base: got 'input' for widths {len(x)} -> {event.feedback.width}, expected equal ones"
                )
        yield event._replace(x=x, base=own)


def key(event: InEvent, half: bool = False) -> bytes:
    """A digest of an event's input and of what was said of it."""
    dtype = np.float16 if half else np.float32
    digest = hashlib.blake2b(digest_size=16)
    kind, values = event.feedback.__reduce__()
    digest.update(kind.__name__.encode())
    with np.errstate(over="ignore"):
        for value in (event.x, *values):
            if isinstance(value, str):
                digest.update(value.encode())
            elif value is not None:
                digest.update(np.asarray(value, dtype).tobytes() + b";")
    return digest.digest()


def split(events: list[InEvent], seed: int, run: int) -> tuple[list[InEvent], list[InEvent]]:
    """Training events, and a tenth for early stopping; repetitions of one event stay on one side.

    Args:
        events: All of them.
        seed: Seed of the draw.
        run: Number of the run; each draws anew.

    Returns:
        Both parts. The second is empty with fewer than ten events that have a loss.
    """
    groups: dict[bytes, list[int]] = {}
    for i, event in enumerate(events):
        if not isinstance(event.feedback, Gradient):
            groups.setdefault(key(event), []).append(i)
    if len(groups) < FEWEST:
        return events, []
    draw = np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, run]))).permutation(len(groups))
    members = list(groups.values())
    chosen = {i for g in draw[: max(1, round(VALIDATION * len(groups)))] for i in members[g]}
    kept = [e for i, e in enumerate(events) if i not in chosen]
    return kept, [e for i, e in enumerate(events) if i in chosen]


def rows(events: list[InEvent]) -> Rows:
    """Events as the trainer takes them: arrays where they are all plain targets of the same modules.

    Raises:
        MicroLoraError: Events that cannot be learned from.
    """
    first = events[0]
    shape = (len(first.x), first.feedback.width)
    for event in events:
        plain = isinstance(event.feedback, Target) and event.feedback.loss == "mse"
        if not plain or event.module != first.module or (len(event.x), event.feedback.width) != shape:
            return rows_of_events(events, 0.0)
    x = np.stack([np.asarray(e.x, np.float32) for e in events])
    y = np.stack([_wanted(e.feedback, e.base) for e in events])
    weights = np.array([e.weight for e in events], np.float32)
    arrays = (x, y) if (weights == 1.0).all() else (x, y, weights)
    return dataclasses.replace(rows_of("samples", arrays, 0.0), module=first.module)


def _wanted(feedback: FeedbackBase, base: Any) -> Any:
    if not isinstance(feedback, Target):
        raise ConfigError(f"feedback: got {type(feedback).__name__}, expected a Target")
    return feedback.t if base is None else feedback.t - np.asarray(base, np.float32)
