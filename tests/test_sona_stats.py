"""Statistics: what the core counts, as a value, a text and a dict."""

import json
import math

import pytest

from microlora.sona import SonaStats

CORE = {
    "instant_count": 12,
    "instant_applied": 9,
    "skipped": {"quality": 2, "held out": 1},
    "instant_avg_latency_us": 3.25,
    "instant_p99_us": 9.0,
    "background_count": 3,
    "accepted": 2,
    "refused": 1,
    "kept": 1,
    "accumulated_quality": 8.5,
    "heldout_loss_first": 0.5,
    "heldout_loss_last": 0.25,
    "prequential_loss": None,
    "bytes": {"adapter": 1000, "reservoir": 2345},
    "of_a_newer_core": 1,
}


def test_the_names_are_those_of_the_core():
    stats = SonaStats.from_core(CORE)
    assert (stats.instant_count, stats.instant_avg_latency_us, stats.background_count) == (12, 3.25, 3)
    assert (stats.pending_samples, stats.accumulated_quality) == (0, 8.5)
    assert stats.skipped == {"quality": 2, "held out": 1}
    assert stats.memory_bytes == 3345
    assert math.isnan(stats.prequential_loss)
    assert math.isnan(stats.instant_p50_us)


def test_text_says_what_was_measured_and_nothing_else():
    text = str(SonaStats.from_core(CORE))
    assert "9 of 12 events learned, mean 3.2 us, p99 9.0 us" in text
    assert "1 held out, 2 quality" in text
    assert "3 consolidations, 2 accepted, 1 kept the live weights, 0 rolled back" in text
    assert "held-out 0.5 -> 0.25" in text
    assert "3,345 bytes" in text
    assert "nan" not in text
    assert "as it came" not in text


def test_nothing_measured_is_a_text_too():
    assert "0 of 0 events" in str(SonaStats())
    assert "nan" not in str(SonaStats())


def test_dict_is_json_without_nan():
    values = SonaStats.from_core(CORE).to_dict()
    assert json.loads(json.dumps(values, allow_nan=False)) == values
    assert values["prequential_loss"] is None
    assert values["bytes"] == {"adapter": 1000, "reservoir": 2345}


def test_it_is_a_value():
    stats = SonaStats.from_core(CORE)
    with pytest.raises(AttributeError):
        stats.accepted = 3
    with pytest.raises(TypeError):
        stats.skipped["x"] = 1
