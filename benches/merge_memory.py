"""What one merge takes beyond parents and result: `python benches/merge_memory.py METHOD WIDTH RANK N`.

Prints JSON: bytes by the operating system's count of resident pages, and by the merge's own report.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import microlora as ml
from merge_cases import adapters


def pages(name: str) -> int:
    """Bytes of a line of `/proc/self/status`."""
    text = Path("/proc/self/status").read_text(encoding="utf-8")
    return next(int(line.split()[1]) * 1024 for line in text.splitlines() if line.startswith(name + ":"))


def main() -> None:
    """Merges small adapters for the code's own pages, then those that count."""
    method, width, rank, n = sys.argv[1], *map(int, sys.argv[2:5])
    ml.merge(adapters(64, 4, n), method=method, rank=4)
    parents = adapters(width, rank, n)
    before = pages("VmRSS")
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    merged, report = ml.merge(parents, method=method, rank=rank)
    beyond = pages("VmHWM") - before - merged.memory_bytes
    print(json.dumps({"resident": beyond, "reported": report.peak_bytes}))


if __name__ == "__main__":
    main()
