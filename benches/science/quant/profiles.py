"""The quantisation profiles: quality, size and speed that are expected, beside those that are measured.

Quality is accuracy as a share of the float32 adapter's, mean over seeds; size is of resident bytes against
the same adapter in float16, and speed is a forward of one row, both at 4,096 features and rank 16: of one
adapter that stays in the caches, and of many that take turns.

PYTHONPATH=benches/science python -m quant.profiles --out docs/data/quant_profiles.jsonl
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from continual import run as continual
from continual.plan import Plan, Setup

import microlora as ml

from .adapters import Bench
from .rows import SEEDS

PROFILES = (
    ("intent_classifier", "mobile"),
    ("content_generator", "desktop"),
    ("workflow_builder", "server"),
    ("any other", "any other"),
)
HEAD = (
    "adapter, device", "recipe", "quality expected", "measured", "saved of f16, expected", "measured",
    "speed to f32, expected", "measured", "many in turn",
)  # fmt: skip
WIDTH, RANK = 4096, 16

Measure = Callable[[ml.QuantizationProfile], tuple[float, float, float]]
#: Adapters that take turns: of float32 as many bytes as no cache of today's processors holds.
MANY = 512


def large() -> ml.Adapter:
    """A random adapter of one module, float32."""
    rng = np.random.default_rng(0)
    a = rng.standard_normal((RANK, WIDTH), np.float32) / np.float32(np.sqrt(WIDTH))
    b = rng.standard_normal((WIDTH, RANK), np.float32) / np.float32(np.sqrt(RANK))
    return ml.Adapter.from_factors({"m": (a, b)}, alpha=2.0 * RANK)


def nanoseconds(calls: dict[str, Callable[[], object]], loops: int) -> dict[str, float]:
    """The least of 15 runs of each, one after the other, after warming up."""
    best = dict.fromkeys(calls, float("inf"))
    for run in range(16):
        for name, call in calls.items():
            start = time.perf_counter_ns()
            for _ in range(loops):
                call()
            if run:
                best[name] = min(best[name], (time.perf_counter_ns() - start) / loops)
    return best


def learner(adapter: ml.Adapter) -> ml.MicroLoRA:
    """A learner with its own copy of the weights."""
    made = ml.MicroLoRA(adapter.config, dims=adapter.dims)
    made.import_weights(adapter.to_bytes())
    return made


def measured(
    profile: ml.QuantizationProfile, adapter: ml.Adapter, loops: int, many: int
) -> tuple[float, float, float]:
    """Share of float16's bytes that is saved, and speed to float32: of one adapter, of many in turn."""
    made, report = ml.quantize(adapter, profile)
    assert report.memory_after == made.memory_bytes
    half = ml.quantize(adapter, "f16").adapter.memory_bytes
    x = np.random.default_rng(1).standard_normal(WIDTH).astype(np.float32)
    out = np.empty(WIDTH, np.float32)
    speeds = []
    for count, times in ((1, loops), (many, max(loops // 2, many))):
        plain = itertools.cycle([learner(adapter).forward for _ in range(count)])
        blocks = itertools.cycle([ml.QuantizedAdapter(made.to_bytes()).forward for _ in range(count)])
        ns = nanoseconds(
            {"plain": lambda: next(plain)(x, "m", out), "blocks": lambda: next(blocks)(x, "m", out)},  # noqa: B023
            times,
        )
        speeds.append(ns["plain"] / ns["blocks"])
    return 1 - made.memory_bytes / half, speeds[0], speeds[1]


def line(names: tuple[str, str], benches: list[Bench], of_recipe: Measure) -> dict[str, Any]:
    """What the file says of a profile."""
    profile = ml.quantization_profile(*names)
    quality = []
    for bench in benches:
        made = ml.quantize(bench.whole, profile).adapter
        quality.append(bench.accuracy(bench.predict(made)) / bench.accuracy(bench.labels))
    kept = statistics.mean(quality)
    saved, speed, in_turn = of_recipe(profile)
    return {
        "profile": list(names),
        "recipe": profile.recipe,
        "expected": [profile.quality_threshold, profile.size_reduction, profile.inference_speed_gain],
        "measured": [kept, saved, speed, in_turn],
        "cells": [
            ", ".join(names), f"`{profile.recipe}`",
            f"{profile.quality_threshold:g}", f"{kept:.4f}",
            f"{profile.size_reduction:.0%}", f"{saved:.0%}",
            f"{profile.inference_speed_gain:g}x", f"{speed:.2f}x", f"{in_turn:.2f}x",
        ],
        "seeds": [bench.plan.seed for bench in benches],
        "isa": ml._core.isa() if hasattr(ml, "_core") else "",
    }  # fmt: skip


def main() -> int:
    """Measures every profile."""
    parser = argparse.ArgumentParser(prog="quant.profiles", description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=continual.seeds, default=list(SEEDS), help="such as 10-14 or 10,12")
    parser.add_argument("--loops", type=int, default=2000, help="forwards in a run")
    parser.add_argument("--many", type=int, default=MANY, help="adapters that take turns")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE")
    args = parser.parse_args()
    benches = [Bench(Plan.load(Setup.of("rot"), seed)) for seed in args.seeds]
    adapter, known = large(), dict[str, tuple[float, float, float]]()

    def of_recipe(profile: ml.QuantizationProfile) -> tuple[float, float, float]:
        """One measurement for profiles of one recipe."""
        if profile.recipe not in known:
            known[profile.recipe] = measured(profile, adapter, args.loops, args.many)
        return known[profile.recipe]

    lines = [line(names, benches, of_recipe) for names in PROFILES]
    args.out.write_text("".join(json.dumps(made) + "\n" for made in lines), encoding="utf-8")
    for made in lines:
        print("  ".join(made["cells"]), file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
