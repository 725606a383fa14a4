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
        instant_p50_us: Median.
        instant_p99_us: 99th percentile.
        instant_p999_us: 99.9th percentile.
        nlms_steps: Steps of NLMS.
        nlms_halvings: Of them, those that were halved before their loss fell.
        refused_steps: Events of which no step lowered the loss.
        background_count: Consolidations that came to an end.
        background_avg_latency_us: Mean time of one.
        background_p99_us: 99th percentile.
        accepted: Consolidations that are served.
        refused: Those whose result the gate refused.
        kept: Those of them where the live weights stay: they are as good, or nothing contradicts them.
        rolled_back: Those of them where the live weights failed too, so that the last accepted ones are back.
        refused_in_a_row: Those since the last one that was accepted.
        unmeasured: Consolidations kept without a judgement, for want of held-out samples.
        cancelled: Consolidations that were given up, because their window was overtaken.
        deep_count: Deep runs that came to an end.
        deep_refused: Those of them that the gate refused.
        pending_samples: Events that wait for a consolidation.
        overflowed_samples: Events that left the queue unconsolidated.
        accumulated_quality: Sum of qualities since the last deep run; an event without one counts 1.
        quality_count: Events that came with a quality.
        quality_mean: Mean of their qualities.
        quality_min: The least.
        quality_max: The highest.
        reservoir_samples: Samples that are remembered for training.
        held_out_samples: Samples that only the gate sees.
        patterns: Patterns of inputs that are told apart.
        members: Sets of weights that serve; more than one in an ensemble.
        heldout_loss_first: Held-out loss after the first consolidation that measured it.
        heldout_loss_last: That after the last one.
        heldout_loss_least: The least of all.
        prequential_loss: Moving average of the loss of events, each before it was learned from
            (Gama et al. 2013).
        prequential_loss_first: Its mean over the first events.
        warmed_up: Whether A was chosen from inputs, or need not be.
        warmup_left: Inputs that the warm-up still waits for.
        consolidating: Whether a consolidation waits for its next turn.
        version: Version of the live weights.
        generation: Number of the version that the manager serves.
        events: Number of the last event that was kept.
        journal_bytes: Bytes of the journal on disk.
        bytes: Resident bytes by part: ``adapter``, ``accepted``, ``reservoir``, ``patterns``, ``window``, ...

    """

    instant_count: int = 0
    instant_applied: int = 0
    skipped: Mapping[str, int] = field(default_factory=FrozenMap)
    instant_avg_latency_us: float = _NAN
    instant_p50_us: float = _NAN
    instant_p99_us: float = _NAN
    instant_p999_us: float = _NAN
    nlms_steps: int = 0
    nlms_halvings: int = 0
    refused_steps: int = 0
    background_count: int = 0
    background_avg_latency_us: float = _NAN
    background_p99_us: float = _NAN
    accepted: int = 0
    refused: int = 0
    kept: int = 0
    rolled_back: int = 0
    refused_in_a_row: int = 0
    unmeasured: int = 0
    cancelled: int = 0
    deep_count: int = 0
    deep_refused: int = 0
    pending_samples: int = 0
    overflowed_samples: int = 0
    accumulated_quality: float = 0.0
    quality_count: int = 0
    quality_mean: float = _NAN
    quality_min: float = _NAN
    quality_max: float = _NAN
    reservoir_samples: int = 0
    held_out_samples: int = 0
    patterns: int = 0
    members: int = 0
    heldout_loss_first: float = _NAN
    heldout_loss_last: float = _NAN
    heldout_loss_least: float = _NAN
    prequential_loss: float = _NAN
    prequential_loss_first: float = _NAN
    warmed_up: bool = False
    warmup_left: int = 0
    consolidating: bool = False
    version: int = 0
    generation: int = 0
    events: int = 0
    journal_bytes: int = 0
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
    "background": lambda s: _joined(
        f"{s.background_count} consolidations",
        f"{s.accepted} accepted",
        f"{s.kept} kept the live weights",
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
