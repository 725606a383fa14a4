"""Files: loading and saving beside PEFT, safetensors and a raw write."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np

import microlora as ml
from report import Report, duration
from timing import Clock, shortest

#: Modules, rank, in_features, out_features of a small adapter (1.6 MB) and of a large one (302 MB).
SMALL, LARGE, TINY = (16, 16, 768, 768), (64, 128, 4096, 5120), (2, 4, 64, 64)
WEIGHTS = "adapter_model.safetensors"

#: Processes that load once.
FIRSTS = 7
FIRST = """
import sys, time
kind, path, weights = sys.argv[1:]
if kind == "peer":
    from safetensors.numpy import load_file
    start = time.perf_counter_ns()
    kept = load_file(path + "/" + weights)
else:
    import microlora as ml
    ml.load
    start = time.perf_counter_ns()
    kept = ml.load(path, mmap=kind == "mmap")
print(time.perf_counter_ns() - start)
"""


def run(report: Report, clock: Clock, *, smoke: bool) -> None:
    """Adds the rows."""
    with tempfile.TemporaryDirectory() as folder:
        small(report, Path(folder) / "small", TINY if smoke else SMALL, smoke)
        large(report, Path(folder) / "large", TINY if smoke else LARGE, smoke)


def made(shape: tuple[int, int, int, int]) -> ml.Adapter:
    """An adapter of Gaussian factors on q_proj of that many layers."""
    count, rank, n_in, n_out = shape
    draw = np.random.default_rng(0).standard_normal
    pair = (draw((rank, n_in), np.float32), draw((n_out, rank), np.float32))
    names = [f"model.layers.{i}.self_attn.q_proj" for i in range(count)]
    return ml.Adapter.from_factors(dict.fromkeys(names, pair), alpha=2.0 * rank)


def title(path: Path, shape: tuple[int, int, int, int]) -> str:
    """What the file is."""
    size = (path / WEIGHTS).stat().st_size
    return f"{shape[0]} modules, {shape[2]} to {shape[3]} r{shape[1]}, {size / 1e6:.1f} MB"


def small(report: Report, path: Path, shape: tuple[int, int, int, int], smoke: bool) -> None:
    """Copy, checks and packing, against PEFT putting the same directory into a model."""
    ml.save(made(shape), path, format="peft")
    report.section(f"load: {title(path, shape)}")
    ours = shortest(lambda: ml.load(path), 0.5, once=smoke)
    try:
        import torch
        from peft import PeftModel
        from peft.utils.save_and_load import load_peft_weights
        from safetensors.numpy import load_file
    except ImportError:
        report.add("ml.load", duration(ours), "")
        return
    torch.set_num_threads(1)
    plain = shortest(lambda: load_file(path / WEIGHTS), 0.5, once=smoke)
    report.add("ml.load", duration(ours), f"safetensors.numpy.load_file {duration(plain)}", plain / ours)
    read = shortest(lambda: load_peft_weights(str(path), device="cpu"), 0.5, once=smoke)
    report.add("ml.load", duration(ours), f"PEFT load_peft_weights {duration(read)}", read / ours)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = PeftModel.from_pretrained(skeleton(shape), str(path), adapter_name="first")

        def load() -> None:
            model.load_adapter(str(path), "again")
            model.delete_adapter("again")

        theirs = shortest(load, 1.0, once=smoke)
    report.add("ml.load", duration(ours), f"PEFT load_adapter {duration(theirs)}", theirs / ours, 20.0)


def skeleton(shape: tuple[int, int, int, int]) -> Any:
    """A model with the modules that the adapter is for."""
    import torch

    count, _, n_in, n_out = shape

    def part(**children: Any) -> Any:
        node = torch.nn.Module()
        for name, child in children.items():
            node.add_module(name, child)
        return node

    linear = [torch.nn.Linear(n_in, n_out, bias=False) for _ in range(count)]
    layers = torch.nn.ModuleList(part(self_attn=part(q_proj=one)) for one in linear)
    return part(model=part(layers=layers))


def first(kind: str, path: Path, times: int) -> float:
    """Nanoseconds of the first load of a process, the least of some: memory comes from the system then.

    Later loads of the same process take memory that the allocator may have kept or given back: up to
    three times as long for the same program.
    """
    command = [sys.executable, "-c", FIRST, kind, str(path), WEIGHTS]
    return min(float(subprocess.check_output(command)) for _ in range(times))


def large(report: Report, path: Path, shape: tuple[int, int, int, int], smoke: bool) -> None:
    """A file of hundreds of MB: bandwidth of memory and page faults decide."""
    adapter = made(shape)
    ml.save(adapter, path, format="peft")
    weights = path / WEIGHTS
    report.section(f"load and save: {title(path, shape)}")
    copied = shortest(lambda: ml.load(path), 2.0, once=smoke)
    mapped = shortest(lambda: ml.load(path, mmap=True), 2.0, once=smoke)
    try:
        from safetensors.numpy import load_file
    except ImportError:
        load_file = None
    if load_file is not None:
        theirs = shortest(lambda: load_file(weights), 2.0, once=smoke)
        peer = f"safetensors.numpy.load_file {duration(theirs)}"
        report.add("ml.load again and again, numbers checked", duration(copied), peer, copied / theirs)
        report.add("ml.load(mmap=True) again and again", duration(mapped), peer, mapped / theirs)
        ours, lazy, other = (first(kind, path, 1 if smoke else FIRSTS) for kind in ("copy", "mmap", "peer"))
        peer = f"safetensors.numpy.load_file {duration(other)}"
        report.add("ml.load, the first of a process", duration(ours), peer, ours / other, 1.3, below=True)
        report.add(
            "ml.load(mmap=True), the first of a process",
            duration(lazy),
            f"ml.load {duration(ours)}",
            ours / lazy,
            1.0,
        )
    data = weights.read_bytes()

    def raw() -> None:
        with open(path / "raw", "wb") as f:
            f.write(data)
            f.flush()
            os.fsync(f.fileno())

    written = shortest(raw, 2.0, once=smoke)
    single = path / "one.safetensors"
    for name, save in (
        ("ml.save, PEFT directory, on disk", lambda: ml.save(adapter, path, format="peft")),
        ("ml.save, single file, on disk", lambda: ml.save(adapter, single, format="safetensors")),
    ):
        ns = shortest(save, 2.0, once=smoke)
        peer = f"write and fsync {duration(written)}"
        report.add(name, duration(ns), peer, ns / written, 1.5, below=True)
