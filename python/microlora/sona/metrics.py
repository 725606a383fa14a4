"""Statistics of loops for Prometheus and OpenTelemetry (extra ``metrics``), read when somebody asks.

One table says what is told; nothing is counted here, and a loop that is gone is not kept alive.

Example:
    >>> from prometheus_client import CollectorRegistry, generate_latest  # doctest: +SKIP
    >>> collector = PrometheusCollector({"search": loop}, CollectorRegistry())  # doctest: +SKIP
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from microlora._checks import text
from microlora.cli.extras import require
from microlora.exceptions import ConfigError, DTypeError
from microlora.sona.loop import SonaLoop

if TYPE_CHECKING:
    from opentelemetry.metrics import CallbackOptions, Meter, Observation
    from prometheus_client import CollectorRegistry, Metric

    from microlora.sona.stats import SonaStats

__all__ = ["METRICS", "PrometheusCollector", "observe_meter"]

Values = Iterable[tuple[Mapping[str, str], float]]


class Measure(NamedTuple):
    """One metric: what it is called and where it comes from.

    Attributes:
        name: With dots, as OpenTelemetry has it; below ``microlora.sona.``.
        kind: A counter only grows, a gauge does not.
        unit: ``"1"``, ``"us"`` or ``"By"``.
        help: One line.
        values: Labels and values of the statistics; those that are NaN are left out.
    """

    name: str
    kind: Literal["counter", "gauge"]
    unit: str
    help: str
    values: Callable[[SonaStats], Values]


def _one(name: str) -> Callable[[SonaStats], Values]:
    return lambda stats: [({}, float(getattr(stats, name)))]


def _each(name: str, label: str) -> Callable[[SonaStats], Values]:
    return lambda stats: [({label: key}, float(value)) for key, value in getattr(stats, name).items()]


def _quantiles(stats: SonaStats) -> Values:
    values = {"0.5": stats.instant_p50_us, "0.99": stats.instant_p99_us, "0.999": stats.instant_p999_us}
    return [({"quantile": q}, value) for q, value in values.items()]


def _outcomes(stats: SonaStats) -> Values:
    # Disjoint, so that they can be summed; the statistics count those rolled back among those refused.
    counts = {"accepted": stats.accepted, "kept": stats.kept, "rolled_back": stats.rolled_back}
    return [({"outcome": name}, float(count)) for name, count in counts.items()]


METRICS: tuple[Measure, ...] = (
    Measure("events", "counter", "1", "Events that came.", _one("instant_count")),
    Measure("events.applied", "counter", "1", "Events that changed weights.", _one("instant_applied")),
    Measure("events.skipped", "counter", "1", "Events that did not, by reason.", _each("skipped", "reason")),
    Measure("instant.latency", "gauge", "us", "Time of events.", _quantiles),
    Measure("consolidations", "counter", "1", "Consolidations by what came of them.", _outcomes),
    Measure(
        "consolidation.latency",
        "gauge",
        "us",
        "Mean time of a consolidation.",
        _one("background_avg_latency_us"),
    ),
    Measure("deep.runs", "counter", "1", "Deep runs that came to an end.", _one("deep_count")),
    Measure("pending", "gauge", "1", "Events that wait for a consolidation.", _one("pending_samples")),
    Measure(
        "overflowed", "counter", "1", "Events that left the queue unconsolidated.", _one("overflowed_samples")
    ),
    Measure(
        "quality.accumulated",
        "gauge",
        "1",
        "Sum of qualities since the last deep run.",
        _one("accumulated_quality"),
    ),
    Measure("loss.held_out", "gauge", "1", "Held-out loss of the last check.", _one("heldout_loss_last")),
    Measure(
        "loss.prequential",
        "gauge",
        "1",
        "Loss of the last events before they were learned from.",
        _one("prequential_loss"),
    ),
    Measure("journal", "gauge", "By", "Bytes of the journal on disk.", _one("journal_bytes")),
    Measure("memory", "gauge", "By", "Bytes by part.", _each("bytes", "part")),
    Measure("generation", "gauge", "1", "Number of the version that is served.", _one("generation")),
)

_UNITS = {"us": ("seconds", 1e-6), "By": ("bytes", 1.0), "1": ("", 1.0)}


class _Loops:
    """Loops by name, none of them held."""

    def __init__(self, loops: SonaLoop | Mapping[str, SonaLoop]) -> None:
        named = loops if isinstance(loops, Mapping) else {"default": loops}
        if not named:
            raise ConfigError("loops: got none, expected a SonaLoop or {name: SonaLoop}")
        self._refs: dict[str, weakref.ref[SonaLoop]] = {}
        for name, loop in named.items():
            if not isinstance(loop, SonaLoop):
                raise DTypeError(f"loops[{name!r}]: got {type(loop).__name__}, expected a SonaLoop")
            self._refs[text("loops: name", name, empty=False)] = weakref.ref(loop)

    def stats(self) -> dict[str, SonaStats]:
        """Statistics of those that are still there."""
        loops = {name: ref() for name, ref in self._refs.items()}
        return {name: loop.stats() for name, loop in loops.items() if loop is not None}


def _points(measure: Measure, stats: Mapping[str, SonaStats]) -> Iterator[tuple[dict[str, str], float]]:
    for name, values in stats.items():
        for labels, value in measure.values(values):
            if not math.isnan(value):
                yield {"loop": name, **labels}, value


class PrometheusCollector:
    """Tells Prometheus of loops; reads `SonaLoop.stats` once per scrape.

    Names follow Prometheus: ``microlora_sona_events_total``, ``microlora_sona_instant_latency_seconds``,
    ``microlora_sona_memory_bytes``; every sample has the label ``loop``.

    Args:
        loops: A loop (named ``default``), or several by name.
        registry: Where to register; None takes ``prometheus_client``'s own.

    Raises:
        MissingExtraError: ``prometheus_client`` is not installed; the message is the pip line.
        DTypeError: Not a loop.
        ConfigError: No loop.
    """

    def __init__(
        self, loops: SonaLoop | Mapping[str, SonaLoop], registry: CollectorRegistry | None = None
    ) -> None:
        require("prometheus_client", "metrics", "PrometheusCollector")
        from prometheus_client import REGISTRY

        self._loops = _Loops(loops)
        (REGISTRY if registry is None else registry).register(self)

    def describe(self) -> Iterable[Metric]:
        """The names, so that registering needs no statistics."""
        return [self._family(measure, ()) for measure in METRICS]

    def collect(self) -> Iterable[Metric]:
        """The present values."""
        stats = self._loops.stats()
        return [self._family(measure, _points(measure, stats)) for measure in METRICS]

    @staticmethod
    def _family(measure: Measure, points: Iterable[tuple[dict[str, str], float]]) -> Metric:
        from prometheus_client import Metric

        unit, factor = _UNITS[measure.unit]
        name = "microlora_sona_" + measure.name.replace(".", "_") + (f"_{unit}" if unit else "")
        family = Metric(name, measure.help, measure.kind)
        sample = name + ("_total" if measure.kind == "counter" else "")
        for labels, value in points:
            family.add_sample(sample, labels, value * factor)
        return family


def observe_meter(meter: Meter, loops: SonaLoop | Mapping[str, SonaLoop]) -> list[Any]:
    """Makes observable instruments of an OpenTelemetry meter, read when its reader collects.

    Names are those of the table below ``microlora.sona.``, units its own; every point has the attribute
    ``loop``.

    Args:
        meter: Of ``opentelemetry.metrics.get_meter``.
        loops: A loop (named ``default``), or several by name.

    Returns:
        The instruments.

    Raises:
        MissingExtraError: ``opentelemetry-api`` is not installed; the message is the pip line.
        DTypeError: Not a loop.
        ConfigError: No loop.
    """
    require("opentelemetry.metrics", "metrics", "observe_meter")
    from opentelemetry.metrics import Observation

    held = _Loops(loops)

    def callback(measure: Measure) -> Callable[[CallbackOptions], list[Observation]]:
        def observe(_: CallbackOptions) -> list[Observation]:
            return [Observation(value, labels) for labels, value in _points(measure, held.stats())]

        return observe

    made: list[Any] = []
    for measure in METRICS:
        make = meter.create_observable_gauge
        if measure.kind == "counter":
            make = meter.create_observable_counter  # type: ignore[assignment]
        name = f"microlora.sona.{measure.name}"
        made.append(make(name, callbacks=[callback(measure)], unit=measure.unit, description=measure.help))
    return made
