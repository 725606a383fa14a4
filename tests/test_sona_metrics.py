"""Metrics of loops as the real Prometheus and OpenTelemetry libraries read them."""

import gc
import math
import sys

import pytest

import microlora as ml
from microlora import exceptions as ex
from microlora.sona import SonaStats, metrics
from sona_support import feed, loop

STATS = SonaStats(
    instant_count=12,
    instant_applied=9,
    skipped={"quality": 2, "held out": 1},
    instant_p50_us=3.5,
    accepted=4,
    refused=2,
    kept=1,
    rolled_back=1,
    deep_count=1,
    pending_samples=7,
    heldout_loss_last=0.25,
    bytes={"adapter": 1000, "reservoir": 234},
    generation=5,
)


@pytest.fixture
def sona(monkeypatch):
    value = loop()
    monkeypatch.setattr(value, "stats", lambda: STATS)
    return value


def test_prometheus_scrapes_a_loop(sona):
    client = pytest.importorskip("prometheus_client")
    registry = client.CollectorRegistry()
    metrics.PrometheusCollector({"search": sona}, registry)

    def value(name, **labels):
        return registry.get_sample_value(f"microlora_sona_{name}", {"loop": "search", **labels})

    assert value("events_total") == 12
    assert value("events_applied_total") == 9
    assert value("events_skipped_total", reason="quality") == 2
    assert value("instant_latency_seconds", quantile="0.5") == pytest.approx(3.5e-6)
    assert value("instant_latency_seconds", quantile="0.99") is None
    assert value("journal_bytes") == 0
    assert value("consolidations_total", outcome="accepted") == 4
    assert value("consolidations_total", outcome="kept") == 1
    assert value("consolidations_total", outcome="rolled_back") == 1
    assert value("memory_bytes", part="reservoir") == 234
    assert value("loss_held_out") == 0.25
    assert value("loss_prequential") is None
    text = client.generate_latest(registry).decode()
    assert "# TYPE microlora_sona_events_total counter" in text
    assert "# TYPE microlora_sona_pending gauge" in text
    assert "nan" not in text.lower()
    parser = pytest.importorskip("prometheus_client.parser")
    families = list(parser.text_string_to_metric_families(text))
    assert len(families) == len(metrics.METRICS)


def test_prometheus_sees_what_a_live_loop_does():
    client = pytest.importorskip("prometheus_client")
    registry = client.CollectorRegistry()
    sona = loop()
    metrics.PrometheusCollector(sona, registry)
    counted = lambda: registry.get_sample_value("microlora_sona_events_total", {"loop": "default"})  # noqa: E731
    assert counted() == 0
    feed(sona, 30)
    assert counted() == 30
    del sona
    gc.collect()
    assert counted() is None
    with pytest.raises(ValueError, match="Duplicated"):
        metrics.PrometheusCollector(loop(), registry)


def test_prometheus_own_registry_is_the_default(sona):
    client = pytest.importorskip("prometheus_client")
    collector = metrics.PrometheusCollector(sona)
    try:
        assert client.REGISTRY.get_sample_value("microlora_sona_events_total", {"loop": "default"}) == 12
    finally:
        client.REGISTRY.unregister(collector)


def test_opentelemetry_reads_loops(sona):
    sdk = pytest.importorskip("opentelemetry.sdk.metrics")
    export = pytest.importorskip("opentelemetry.sdk.metrics.export")
    reader = export.InMemoryMetricReader()
    provider = sdk.MeterProvider([reader])
    other = loop()
    feed(other, 30)
    made = metrics.observe_meter(provider.get_meter("test"), {"a": sona, "b": other})
    assert len(made) == len(metrics.METRICS)
    data = reader.get_metrics_data()
    (scope,) = data.resource_metrics[0].scope_metrics
    found = {m.name: m for m in scope.metrics}
    points = {
        (name, tuple(sorted(p.attributes.items()))): p.value
        for name, m in found.items()
        for p in m.data.data_points
    }
    assert points["microlora.sona.events", (("loop", "a"),)] == 12
    assert points["microlora.sona.events", (("loop", "b"),)] == 30
    assert points["microlora.sona.instant.latency", (("loop", "a"), ("quantile", "0.5"))] == 3.5
    assert points["microlora.sona.memory", (("loop", "a"), ("part", "adapter"))] == 1000
    assert found["microlora.sona.instant.latency"].unit == "us"
    assert type(found["microlora.sona.events"].data).__name__ == "Sum"
    assert found["microlora.sona.events"].data.is_monotonic
    assert type(found["microlora.sona.pending"].data).__name__ == "Gauge"
    assert not any(math.isnan(v) for v in points.values())
    provider.shutdown()


@pytest.mark.parametrize("make", [metrics.PrometheusCollector, lambda x: metrics.observe_meter(None, x)])
def test_only_loops_are_measured(make):
    pytest.importorskip("prometheus_client")
    pytest.importorskip("opentelemetry.metrics")
    with pytest.raises(ex.DTypeError, match="got int, expected a SonaLoop"):
        make({"a": 3})
    with pytest.raises(ex.ConfigError, match="loops: got none"):
        make({})
    with pytest.raises(ex.ConfigError, match="loops: name"):
        make({"": loop()})


def test_without_the_libraries_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    monkeypatch.setitem(sys.modules, "opentelemetry.metrics", None)
    with pytest.raises(ex.MissingExtraError, match=r"microlora\[metrics\]"):
        metrics.PrometheusCollector(loop())
    with pytest.raises(ex.MissingExtraError, match=r"microlora\[metrics\]"):
        metrics.observe_meter(None, loop())


def test_every_number_of_the_statistics_is_told_or_left_out_on_purpose():
    told = {key for m in metrics.METRICS for key in dir_of(m)}
    silent = {
        "instant_avg_latency_us",
        "nlms_steps",
        "nlms_halvings",
        "refused_steps",
        "background_count",
        "background_p99_us",
        "refused",
        "refused_in_a_row",
        "unmeasured",
        "cancelled",
        "deep_refused",
        "quality_count",
        "quality_mean",
        "quality_min",
        "quality_max",
        "members",
        "heldout_loss_least",
        "consolidating",
        "events",
        "reservoir_samples",
        "held_out_samples",
        "patterns",
        "heldout_loss_first",
        "prequential_loss_first",
        "warmed_up",
        "warmup_left",
        "version",
    }
    assert told | silent == set(SonaStats.__dataclass_fields__)
    assert told & silent == set()
    assert isinstance(ml.sona.SonaStats(), SonaStats)


def dir_of(measure):
    """Names of the fields that a metric reads."""

    class Spy:
        def __init__(self):
            self.read = set()

        def __getattr__(self, name):
            self.read.add(name)
            return {} if name in ("skipped", "bytes") else 1.0

    spy = Spy()
    list(measure.values(spy))
    return spy.read
