"""Fusing into files: bytes per second beside a copy of the same file, and PEFT's merge of the same factors."""

from __future__ import annotations

import json
import os
import shutil
import struct
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import microlora as ml
from peers import numbers
from report import Report, duration
from timing import Clock

WIDTH, RANK, LAYERS = 4096, 16, 4


def run(report: Report, clock: Clock, *, smoke: bool) -> None:
    """Adds the rows."""
    del clock
    width, repeats = (256, 1) if smoke else (WIDTH, 5)
    with tempfile.TemporaryDirectory() as folder:
        speed(report, Path(folder), width, repeats)


def stored(values: Any, dtype: str) -> bytes:
    """Bits of float32 values in a file's dtype, rounded to nearest even."""
    if dtype == "BF16":
        bits = values.view(np.uint32)
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16).tobytes()
    return values.astype({"F32": np.float32, "F16": np.float16}[dtype]).tobytes()


def write_base(path: Path, width: int, dtype: str, layers: int = LAYERS) -> None:
    """A model of square layers whose weights have a deviation of 0.02."""
    size = width * width * (4 if dtype == "F32" else 2)
    header = {
        f"layers.{i}.q_proj.weight": {
            "dtype": dtype,
            "shape": [width, width],
            "data_offsets": [i * size, (i + 1) * size],
        }
        for i in range(layers)
    }
    text = json.dumps(header).encode()
    with path.open("wb") as f:
        f.write(struct.pack("<Q", len(text)) + text)
        for _ in range(layers):
            f.write(stored(np.float32(0.02) * numbers(width, width), dtype))


def adapter_of(width: int, ratio: float, layers: int = LAYERS) -> ml.Adapter:
    """An adapter whose delta has ``ratio`` times the deviation of the weights."""
    scale = np.float32(np.sqrt(0.02 * ratio / np.sqrt(RANK)))
    factors = {
        f"layers.{i}.q_proj": (scale * numbers(RANK, width), scale * numbers(width, RANK))
        for i in range(layers)
    }
    return ml.Adapter.from_factors(factors, alpha=float(RANK))


def timed(call: Callable[[], Any], made: list[Path], repeats: int) -> float:
    """Best seconds of a call; what it made is removed outside of the time."""
    times = []
    for _ in range(repeats):
        for path in made:
            path.unlink(missing_ok=True)
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return min(times)


def copy(source: Path, to: Path) -> None:
    """A copy that is on disk, as a fused file is."""
    shutil.copyfile(source, to)
    with to.open("rb+") as f:
        os.fsync(f.fileno())


def speed(report: Report, folder: Path, width: int, repeats: int) -> None:
    """File to file."""
    report.section(f"fuse {LAYERS} modules of {width} x {width}, r{RANK}, file to file with fsync")
    base, out, back = folder / "base", folder / "out", folder / "back"
    car = folder / "out.unfuse"
    adapter = adapter_of(width, 1e-2)
    for dtype in ("F32", "BF16", "F16"):
        write_base(base, width, dtype)
        size = base.stat().st_size
        rate = lambda seconds, size=size: f"{duration(seconds * 1e9)}, {size / seconds / 1e9:.2f} GB/s"  # noqa: E731
        plain = timed(lambda: copy(base, out), [out], repeats)
        bare = timed(lambda: ml.fuse(base, adapter, out=out, sidecar=False), [out], repeats)
        whole = timed(lambda: ml.fuse(base, adapter, out=out), [out, car], repeats)
        undo = timed(lambda: ml.unfuse(out, car, out=back), [back], repeats)
        peer = f"copy of the file {rate(plain)}"
        report.add(f"fuse without side-car, {dtype}", rate(bare), peer, plain / bare)
        report.add(f"fuse with side-car, {dtype}", rate(whole), peer, plain / whole)
        report.add(f"unfuse, {dtype}", rate(undo), peer, plain / undo)
        merge = peft_merge(base, adapter, folder / "peft", width, repeats)
        if merge is not None:
            text = f"PEFT: load, merge, save {rate(merge)}"
            report.add(f"fuse without side-car, {dtype}", rate(bare), text, merge / bare)


def peft_merge(base: Path, adapter: ml.Adapter, out: Path, width: int, repeats: int) -> float | None:
    """Seconds of PEFT's merge of the same factors, file to file; None where it is not installed."""
    try:
        import torch
        from peft import LoraConfig
        from peft.tuners.lora.layer import Linear
        from safetensors.torch import load_file, save_file
    except ImportError:
        return None
    torch.set_num_threads(1)
    config = LoraConfig(r=RANK, lora_alpha=RANK, lora_dropout=0.0)
    pairs = {m: [torch.tensor(f) for f in adapter.factors(m)] for m in adapter.modules()}

    def merge() -> None:
        state = load_file(base)
        for module, (a, b) in pairs.items():
            key = f"{module}.weight"
            linear = torch.nn.Linear(width, width, bias=False, device="meta")
            linear.weight = torch.nn.Parameter(state[key], requires_grad=False)
            layer = Linear(linear, "default", config=config, r=RANK, lora_alpha=RANK)
            with torch.no_grad():
                layer.lora_A["default"].weight.copy_(a)
                layer.lora_B["default"].weight.copy_(b)
                layer.merge()
            state[key] = linear.weight.data
        save_file(state, out)
        with out.open("rb+") as f:
            os.fsync(f.fileno())

    return timed(merge, [out], repeats)
