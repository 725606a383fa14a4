"""A short soak: memory flat, no read refused, and a measure of memory that sees a leak."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from support import rng, run_python

BENCHES = Path(__file__).parent.parent / "benches"
SOAK = """
import json, sys
sys.path[:0] = sys.argv[1:3]
import sona_soak
if sys.argv[4] == "leaky":
    kept, adapt = [], sona_soak.SonaLoop.instant_adapt
    def keep(self, x, target, quality):
        kept.append(x.tobytes())
        return adapt(self, x, target, quality)
    sona_soak.SonaLoop.instant_adapt = keep
print(json.dumps(sona_soak.run(sona_soak.Plan(**json.loads(sys.argv[3])))))
"""
# Loops with so little memory have filled it when the second half begins; an event has 512 to 1,024 bytes.
SHORT = {
    "events": 16_000,
    "adapters": 8,
    "pairs": 10,
    "off": 0.25,
    "rate": 0.0,
    "reservoir": 64,
    "pending": 128,
}


def soak(kind="", **changes):
    plan = json.dumps({**SHORT, "threshold": 128.0, **changes})
    return json.loads(run_python(SOAK, BENCHES, BENCHES / "science", plan, kind))


@pytest.fixture(scope="module")
def measure():
    """The module itself, for its arithmetic."""
    folders = [str(BENCHES), str(BENCHES / "science")]
    sys.path[:0] = folders
    try:
        import sona_soak
    finally:
        for folder in folders:
            sys.path.remove(folder)
    return sona_soak


def test_a_short_soak_is_flat_and_refuses_no_read():
    found = soak()
    assert found["refused_reads"] == 0, found["refusals"]
    assert found["events"] == found["loops"]["instant_count"] == 20_000
    assert found["loops"]["background_count"] > 0
    assert found["memory"]["flat"], found["memory"]
    assert all(
        found[call][state]["calls"] > 0 for call in ("forward", "instant_adapt") for state in ("on", "off")
    )


def test_a_leak_of_the_inputs_is_seen():
    found = soak("leaky")
    assert found["memory"]["slope"] > 300.0
    assert not found["memory"]["flat"]


def test_refused_reads_are_counted(measure):
    class Refuses:
        def forward(self, x, module, out):
            raise ValueError("no")

    class Broken:
        def forward(self, x, module, out):
            out[:] = float("nan")

    x = rng().standard_normal((measure.POOL, 4))
    readers = measure.Readers([Refuses(), Broken()], [x, x], 1)
    while len(readers.refused) < 2:
        pass
    readers.stop()
    assert sorted(set(readers.refused)) == ["ValueError('no')", "a number that is not finite"]


@pytest.mark.parametrize(("rise", "flat"), [(0.0, True), (-5.0, True), (3.0, True), (5.0, False)])
def test_the_slope_is_found_under_noise(measure, rise, flat):
    r = rng(1)
    samples = [(1e4 * i, 1e8 + rise * 1e4 * i + 1e4 * r.standard_normal()) for i in range(200)]
    found = measure.memory(samples, 4.0)
    assert found["low"] < rise < found["high"]
    assert found["high"] - found["low"] < 0.5
    assert found["flat"] is flat


def test_the_first_half_may_fill_the_memory(measure):
    samples = [(float(i), 1e6 * min(i, 50)) for i in range(100)]
    assert measure.memory(samples, 1.0)["slope"] == 0.0


def test_quantiles_of_counted_times_are_those_of_the_times(measure):
    times = np.r_[rng(2).integers(100, 900_000, 20_000), rng(3).integers(2_000_000, 9_000_000, 400)]
    one, two = measure.Histogram(), measure.Histogram()
    for i, ns in enumerate(times.tolist()):
        (one if i % 2 else two).add(ns)
    one.merge(two)
    found = one.summary()
    assert found["calls"] == len(times)
    for name, q in (("p50", 50), ("p99", 99), ("p99.9", 99.9)):
        want = np.percentile(times, q, method="inverted_cdf")
        assert abs(found[name] - want) <= (8 if want < 1e6 else 2**13)
