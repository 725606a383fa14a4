"""Quantising and dequantising, per type, beside llama.cpp's own functions.

llama.cpp comes from the package `xllamacpp`, which is built without native flags: a comparison, no target.
"""

from __future__ import annotations

import ctypes
import importlib.util
from pathlib import Path
from typing import Any

import numpy as np

from microlora import _core
from peers import numbers
from report import Report
from timing import Clock, shortest

ROWS, COLS = 64, 4096


def llama_cpp() -> Any:
    """The library inside `xllamacpp`, or None where it is not installed."""
    spec = importlib.util.find_spec("xllamacpp")
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        for file in sorted(Path(folder).rglob("*.so")):
            library = ctypes.CDLL(str(file))
            if hasattr(library, "ggml_quantize_chunk"):
                library.ggml_quantize_init(8)
                return library
    return None


def run(report: Report, clock: Clock, *, smoke: bool) -> None:
    """Adds a row per type and direction."""
    del clock
    rows, budget = (2, 0.001) if smoke else (ROWS, 0.5)
    report.section(f"block types, {rows} x {COLS} Gaussian numbers, bytes of float32 per second")
    x, library = numbers(rows, COLS), llama_cpp()
    rate = lambda ns: f"{x.nbytes / ns * 1e3:,.0f} MB/s"  # noqa: E731
    for name, number, elements, size in _core.block_types():
        data = _core.quantize_blocks(x, name)
        blocks = np.frombuffer(data, np.uint8).copy()
        assert len(blocks) == x.size // elements * size
        ours = shortest(lambda: _core.quantize_blocks(x, name), budget)  # noqa: B023
        back = shortest(lambda: _core.dequantize_blocks(data, name, rows, COLS), budget)  # noqa: B023
        if library is None:
            report.add(f"quantise {name}", rate(ours), "xllamacpp is not installed")
            report.add(f"dequantise {name}", rate(back), "xllamacpp is not installed")
            continue
        out, floats = np.empty_like(blocks), np.empty_like(x)
        source, to, read = (v.ctypes.data_as(ctypes.c_void_p) for v in (x, out, floats))
        sizes = [ctypes.c_int64(n) for n in (0, rows, COLS)]
        theirs = shortest(
            lambda: library.ggml_quantize_chunk(number, source, to, *sizes, None),  # noqa: B023
            budget,
        )
        if not np.array_equal(out, blocks):
            raise SystemExit(f"{name}: llama.cpp writes other bytes")
        decode = getattr(library, f"dequantize_row_{name.replace('_k', '_K')}")
        count = ctypes.c_int64(x.size)
        theirs_back = shortest(lambda: decode(to, read, count), budget)  # noqa: B023
        error = float(np.abs(floats.astype(np.float64) - x).max() / np.abs(x).max())
        report.add(f"quantise {name}", rate(ours), f"llama.cpp {rate(theirs)}", theirs / ours, error=error)
        text = f"llama.cpp {rate(theirs_back)}"
        report.add(f"dequantise {name}", rate(back), text, theirs_back / back, error=error)
