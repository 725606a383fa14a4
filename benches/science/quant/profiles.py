"""The quantisation profiles: quality, size and speed that were promised, beside those that are measured.

Quality is accuracy as a share of the float32 adapter's, mean over seeds; size is of resident bytes against
the same adapter in float16, and speed is a forward of one row, both at 4,096 features and rank 16.

PYTHONPATH=benches/science python -m quant.profiles --out docs/data/quant_profiles.jsonl
"""

from __future__ import annotations

import argparse
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
    "adapter, device", "recipe", "quality promised", "measured", "saved of f16, promised", "measured",
    "speed to f32, promised", "measured",
)  # fmt: skip
WIDTH, RANK = 4096, 16


def large() -> ml.Adapter:
    """A random adapter of one module, float32."""
    rng = np.random.default_rng(0)
    a = rng.standard_normal((RANK, WIDTH), np.float32) / np.float32(np.sqrt(WIDTH))
    b = rng.standard_normal((WIDTH, RANK), np.float32) / np.float32(np.sqrt(RANK))
    return ml.Adapter.from_factors({"m": (a, b)}, alpha=2.0 * RANK)


def nanoseconds(call: Callable[[], object], loops: int) -> float:
    """Median over 15 runs of many calls, after warming up."""
    runs = []
    for _ in range(16):
        start = time.perf_counter_ns()
        for _ in range(loops):
            call()
        runs.append((time.perf_counter_ns() - start) / loops)
    return statistics.median(runs[1:])


def measured(profile: ml.QuantizationProfile, adapter: ml.Adapter, loops: int) -> tuple[float, float]:
    """Share of float16's bytes that is saved, and speed as a multiple of float32's."""
    made, report = ml.quantize(adapter, profile)
    half = ml.quantize(adapter, "f16").adapter.memory_bytes
    plain = ml.MicroLoRA(adapter.config, dims=adapter.dims)
    plain.import_weights(adapter.to_bytes())
    x = np.random.default_rng(1).standard_normal(WIDTH).astype(np.float32)
    out = np.empty(WIDTH, np.float32)
    times = [nanoseconds(lambda: form.forward(x, "m", out), loops) for form in (plain, made)]  # noqa: B023
    assert report.memory_after == made.memory_bytes
    return 1 - made.memory_bytes / half, times[0] / times[1]


def line(names: tuple[str, str], benches: list[Bench], loops: int) -> dict[str, Any]:
    """What the file says of a profile."""
    profile = ml.quantization_profile(*names)
    quality = []
    for bench in benches:
        made = ml.quantize(bench.whole, profile).adapter
        quality.append(bench.accuracy(bench.predict(made)) / bench.accuracy(bench.labels))
    kept = statistics.mean(quality)
    saved, speed = measured(profile, large(), loops)
    return {
        "profile": list(names),
        "recipe": profile.recipe,
        "promised": [profile.quality_threshold, profile.size_reduction, profile.inference_speed_gain],
        "measured": [kept, saved, speed],
        "cells": [
            ", ".join(names), f"`{profile.recipe}`",
            f"{profile.quality_threshold:g}", f"{kept:.4f}",
            f"{profile.size_reduction:.0%}", f"{saved:.0%}",
            f"{profile.inference_speed_gain:g}x", f"{speed:.2f}x",
        ],
        "seeds": [bench.plan.seed for bench in benches],
        "isa": ml._core.isa() if hasattr(ml, "_core") else "",
    }  # fmt: skip


def main() -> int:
    """Measures every profile."""
    parser = argparse.ArgumentParser(prog="quant.profiles", description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=continual.seeds, default=list(SEEDS), help="such as 10-14 or 10,12")
    parser.add_argument("--loops", type=int, default=2000, help="forwards in a run")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE")
    args = parser.parse_args()
    benches = [Bench(Plan.load(Setup.of("rot"), seed)) for seed in args.seeds]
    lines = [line(names, benches, args.loops) for names in PROFILES]
    args.out.write_text("".join(json.dumps(made) + "\n" for made in lines), encoding="utf-8")
    for made in lines:
        print("  ".join(made["cells"]), file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
