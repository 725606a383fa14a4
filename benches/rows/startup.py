"""What it costs to import the package and to hold a thousand adapters."""

from __future__ import annotations

import subprocess
import sys

from report import Report
from timing import Clock, best

IMPORT = """
import time
import numpy
start = time.perf_counter()
import microlora
print((time.perf_counter() - start) * 1e3)
"""

RESIDENT = """
import os
import numpy as np
import microlora as ml

def resident():
    with open("/proc/self/statm") as f:
        return int(f.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

config = ml.LoraConfig(rank=16, alpha=32, target_modules=("q_proj",))
g = ml.Gradient(np.ones(768, np.float32))
x = np.ones(768, np.float32)
def make():
    lora = ml.MicroLoRA(config, hidden_dim=768)
    # An event of RLS writes every page of B; A was written when it was drawn.
    lora.instant(x, ml.Target(x))
    return lora
keep = [make() for _ in range(20)]
before, start = resident(), len(keep)
keep += [make() for _ in range({count})]
print((resident() - before) / sum(l.memory_bytes for l in keep[start:]))
"""


def child(code: str) -> float:
    """The number that a fresh interpreter prints."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return float(done.stdout)


def run(report: Report, clock: Clock, *, smoke: bool) -> None:
    """Adds the rows."""
    del clock
    report.section("import and memory")
    ms = best(lambda: child(IMPORT), 1 if smoke else 7)
    report.add("import microlora beyond NumPy", f"{ms:.1f} ms", "limit 50 ms", ms / 50, 1.0, below=True)
    share = child(RESIDENT.replace("{count}", "50" if smoke else "1000"))
    text = f"{share:.3f} of documented bytes"
    report.add(
        "RSS growth of 1,000 adapters, 768 r16", text, "within 5 %", abs(share - 1) / 0.05, 1.0, below=True
    )
