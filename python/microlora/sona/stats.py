"""What a loop has done, measured: `SonaStats`."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self

from microlora._checks import FrozenMap

__all__ = ["SonaStats"]

_NAN = math.nan


@dataclass(frozen=True)
class SonaStats:
    """Counters and measurements of a loop, at one moment.

    What was never measured is NaN (None in `to_dict`). Latencies are microseconds, of the core's own work.

    Attributes:
        instant_count: Events that came.
        instant_applied: Events that changed weights.
        skipped: Events that did not, by reason.
        instant_avg_latency_us: Mean time of an event.
        instant_p50_us: Median of the last events.
        instant_p99_us: 99th percentile of the last events.
        forward_count: Calls of ``forward``; 0 where they are not counted.
        forward_p50_us: Median of the last ones that were timed.
        forward_p99_us: 99th percentile of the last ones that were timed.
        nlms_halvings: How often a step of NLMS was halved before its loss fell.
        refused_steps: Events of which no step lowered the loss.
        background_count: Consolidations that came to an end.
        background_avg_latency_us: Mean time of one.
        accepted: Consolidations that are served.
        refused: Those whose result the gate refused.
        rolled_back: Those of them where the live weights failed too, so that the last accepted ones are back.
        unmeasured: Consolidations kept without a judgement, for want of held-out samples.
        deep_count: Deep runs that came to an end.
        pending_samples: Events that wait for a consolidation.
        overflowed_samples: Events that left the queue unconsolidated.
        accumulated_quality: Sum of qualities since the last deep run.
        reservoir_samples: Samples that are remembered for training.
        held_out_samples: Samples that only the gate sees.
        patterns: Patterns of inputs that are told apart.
        heldout_loss_first: Held-out loss before the first consolidation that measured it.
        heldout_loss_last: Held-out loss after the last one.
        prequential_loss: Mean loss of the last events, each before it was learned from (Gama et al. 2013).
        prequential_loss_first: The same of the first events.
        warmed_up: Whether A was chosen from inputs.
        warmup_left: Inputs that the warm-up still waits for.
        version: Version of the live weights.
        generation: Number of the version that the manager serves.
        bytes: Bytes by part: ``adapter``, ``reservoir``, ``window``, ``patterns``, ...

    """

    instant_count: int = 0
    instant_applied: int = 0
    skipped: Mapping[str, int] = field(default_factory=FrozenMap)
    instant_avg_latency_us: float = _NAN
    instant_p50_us: float = _NAN
    instant_p99_us: float = _NAN
    forward_count: int = 0
    forward_p50_us: float = _NAN
    forward_p99_us: float = _NAN
    nlms_halvings: int = 0
    refused_steps: int = 0
    background_count: int = 0
    background_avg_latency_us: float = _NAN
    accepted: int = 0
    refused: int = 0
    rolled_back: int = 0
    unmeasured: int = 0
    deep_count: int = 0
    pending_samples: int = 0
    overflowed_samples: int = 0
    accumulated_quality: float = 0.0
    reservoir_samples: int = 0
    held_out_samples: int = 0
    patterns: int = 0
    heldout_loss_first: float = _NAN
    heldout_loss_last: float = _NAN
    prequential_loss: float = _NAN
    prequential_loss_first: float = _NAN
    warmed_up: bool = False
    warmup_left: int = 0
    version: int = 0
    generation: int = 0
    bytes: Mapping[str, int] = field(default_factory=FrozenMap)

    @classmethod
    def from_core(cls, values: Mapping[str, Any]) -> Self:
        """The statistics of the core's dict; None there is NaN here, keys of a newer core are passed over."""
        known: dict[str, Any] = {}
        for item in dataclasses.fields(cls):
            if item.name not in values:
                continue
            value = values[item.name]
            if isinstance(value, Mapping):
                value = FrozenMap(value)
            known[item.name] = _NAN if value is None else value
        return cls(**known)

    @property
    def memory_bytes(self) -> int:
        """Bytes of all parts together."""
        return sum(self.bytes.values())

    def to_dict(self) -> dict[str, Any]:
        """A plain dict that JSON can hold: NaN becomes None."""
        out: dict[str, Any] = {}
        for item in dataclasses.fields(self):
            value = getattr(self, item.name)
            if isinstance(value, Mapping):
                value = dict(value)
            elif isinstance(value, float) and not math.isfinite(value):
                value = None
            out[item.name] = value
        return out

    def __str__(self) -> str:
        """A few lines for people; what was not measured is left out."""
        lines = [f"{name:<11} {shown}" for name, line in _LINES.items() if (shown := line(self))]
        return "\n".join(lines)


def _us(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.1f} us"


def _joined(*parts: str) -> str:
    return ", ".join(part for part in parts if part)


def _named(name: str, shown: str) -> str:
    return f"{name} {shown}" if shown else ""


def _loss(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.4g}"


def _arrow(first: float, last: float) -> str:
    a, b = _loss(first), _loss(last)
    return f"{a} -> {b}" if a and b else a or b


def _skips(stats: SonaStats) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in stats.skipped.items())


_LINES: Mapping[str, Any] = {
    "instant": lambda s: _joined(
        f"{s.instant_applied} of {s.instant_count} events learned",
        _named("mean", _us(s.instant_avg_latency_us)),
        _named("p50", _us(s.instant_p50_us)),
        _named("p99", _us(s.instant_p99_us)),
    ),
    "skipped": _skips,
    "forward": lambda s: _joined(_named("p50", _us(s.forward_p50_us)), _named("p99", _us(s.forward_p99_us))),
    "background": lambda s: _joined(
        f"{s.background_count} consolidations",
        f"{s.accepted} accepted",
        f"{s.refused} refused",
        f"{s.rolled_back} rolled back",
        _named("mean", _us(s.background_avg_latency_us)),
        f"{s.pending_samples} events wait",
    ),
    "deep": lambda s: f"{s.deep_count} runs, accumulated quality {s.accumulated_quality:.1f}",
    "loss": lambda s: _joined(
        _named("held-out", _arrow(s.heldout_loss_first, s.heldout_loss_last)),
        _named("as it came", _arrow(s.prequential_loss_first, s.prequential_loss)),
    ),
    "memory": lambda s: _joined(
        f"{s.memory_bytes:,} bytes",
        f"{s.reservoir_samples} samples",
        f"{s.held_out_samples} held out",
        f"{s.patterns} patterns",
    ),
}
