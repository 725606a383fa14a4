"""One table of ratios, all measured in this run: `python benches/table.py` (or `make bench`).

One thread, pinned to one core, hot unless said. A row says what was measured, ours, the peer, the ratio and
what the ratio should at least be; rows that miss say so.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from typing import Any

THREADS = ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS")
if any(os.environ.get(name) != "1" for name in THREADS):
    os.environ.update(dict.fromkeys(THREADS, "1"))
    os.execv(sys.executable, [sys.executable, *sys.argv])

from report import Report, machine  # noqa: E402
from rows import (  # noqa: E402
    files,
    fusing,
    gguf,
    hot_swap,
    learning,
    merging,
    quantized,
    quantizing,
    read_path,
    science,
    sona,
    startup,
    training,
)
from timing import Clock  # noqa: E402


def main() -> int:
    """Runs every section; the exit status says whether they ran, not whether targets were met."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smoke", action="store_true", help="a few repeats only: does everything run?")
    parser.add_argument("--json", metavar="FILE", help="also write machine and rows as JSON")
    parser.add_argument("--markdown", metavar="FILE", help="also write the table as Markdown")
    args = parser.parse_args()
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    clock = Clock(repeats=2, seconds=0.0005) if args.smoke else Clock()
    report = Report()
    facts: dict[str, Any] = machine()
    print("  ".join(f"{k}: {v}" for k, v in facts.items()), flush=True)
    sections = (
        read_path,
        quantized,
        quantizing,
        hot_swap,
        learning,
        sona,
        training,
        merging,
        fusing,
        files,
        gguf,
    )
    for section in (*sections, science, startup):
        section.run(report, clock, smoke=args.smoke)
    print(report.text())
    if args.json:
        with open(args.json, "w", encoding="utf-8") as f:
            json.dump({"machine": facts, "rows": report.as_dicts()}, f, indent=1)
    if args.markdown:
        with open(args.markdown, "w", encoding="utf-8") as f:
            f.write(report.markdown(facts))
    return 0


if __name__ == "__main__":
    sys.exit(main())
