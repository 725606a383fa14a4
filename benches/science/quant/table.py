"""Summary of a file of quantised adapters: means over seeds, targets met or missed.

PYTHONPATH=benches/science python -m quant.table docs/data/quant.jsonl --json docs/data/quant.json

Prints Markdown; `docs/build.py` makes the same tables in docs/quantization.md from the JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from continual.run import read
from continual.table import markdown

from .profiles import HEAD as PROFILE_HEAD
from .rows import AS_IT_IS, ROWS, SEARCHED, WHOLE

TITLES = {
    WHOLE: "Widths filled up with zeros to multiples of 256, so that every factor has the type",
    AS_IT_IS: "The same adapters as they are",
    SEARCHED: "Types searched for an error of outputs on training rows",
}
HEAD = ("type", "accuracy change (points)", "same class", "delta error", "output error", "resident bytes")

Lines = dict[str, dict[int, dict[str, Any]]]


def latest(lines: Sequence[dict[str, Any]]) -> Lines:
    """The last line of every row and seed, in the order of the table, of rows that it still has.

    Raises:
        SystemExit: Lines of one seed from different plans.
    """
    found: Lines = {name: {} for name in ROWS}
    plans: dict[int, str] = {}
    for line in lines:
        if line["row"] not in ROWS or line["settings"] != ROWS[line["row"]].settings:
            continue
        if plans.setdefault(line["seed"], line["plan"]) != line["plan"]:
            raise SystemExit(f"seed {line['seed']}: lines of different plans cannot be compared")
        found[line["row"]][line["seed"]] = line
    return {name: runs for name, runs in found.items() if runs}


def mean(runs: dict[int, dict[str, Any]], key: str) -> float:
    """Mean over seeds."""
    return statistics.mean(line[key] for line in runs.values())


def spread(runs: dict[int, dict[str, Any]], key: str) -> str:
    """Mean and standard deviation of signed numbers."""
    values = [line[key] for line in runs.values()]
    text = f"{statistics.mean(values):+.2f}"
    return text if len(values) < 2 else f"{text} ± {statistics.stdev(values):.2f}"


def cells(name: str, runs: dict[int, dict[str, Any]]) -> list[str]:
    """A row of the table."""
    first = next(iter(runs.values()))
    before, after = first["memory"]
    size = f"{after:,} ({after / before:.0%} of f32)"
    if ROWS[name].group == SEARCHED:
        after = statistics.mean(line["memory"][1] for line in runs.values())
        size = f"{after:,.0f} ({after / before:.0%} of f32)"
    errors = [f"{mean(runs, key):.4f}" for key in ("delta_error", "output_error")]
    return [ROWS[name].title, spread(runs, "change"), f"{mean(runs, 'agreement'):.4f}", *errors, size]


def targets(found: Lines) -> list[dict[str, str]]:
    """What was asked for beforehand."""
    out = []
    for row in ROWS.values():
        runs = found.get(row.name, {})
        asked = (
            ("change", row.change, "size of the accuracy change in points"),
            ("delta_error", row.error, "delta error"),
        )
        for key, limit, what in asked:
            if limit is None:
                continue
            got = abs(mean(runs, key)) if runs else None
            out.append(
                {
                    "what": f"{row.title}: {what}, mean over seeds",
                    "wanted": f"at most {limit:g}",
                    "measured": "" if got is None else f"{got:.4g}",
                    "verdict": "not run" if got is None else "met" if got <= limit else "MISSED",
                }
            )
    return out


def fallbacks(found: Lines) -> list[str]:
    """What fell back of the adapters as they are, with the types that it is true of."""
    said: dict[str, list[str]] = {}
    for name, runs in found.items():
        first = next(iter(runs.values()))
        if first["fell_back"]:
            parts = [f"`{module}` {' and '.join(sides)}" for module, sides in first["fell_back"].items()]
            said.setdefault(", ".join(parts), []).append(ROWS[name].title)
    return [f"{text} (asked for: {', '.join(titles)})" for text, titles in said.items()]


def summary(lines: Sequence[dict[str, Any]], profiles: Sequence[dict[str, Any]] = ()) -> dict[str, Any]:
    """All that the page says."""
    found = latest(lines)
    groups = [
        {"title": title, "rows": [cells(n, r) for n, r in found.items() if ROWS[n].group == group]}
        for group, title in TITLES.items()
    ]
    return {
        "head": list(HEAD),
        "groups": [group for group in groups if group["rows"]],
        "fallbacks": fallbacks(found),
        "targets": targets(found),
        "profiles": {"head": list(PROFILE_HEAD), "rows": [p["cells"] for p in profiles]},
        "accuracy": mean(found["whole f32"], "accuracy") if "whole f32" in found else None,
        "seeds": sorted({seed for runs in found.values() for seed in runs}),
        "environment": lines[-1]["environment"],
    }


def main() -> int:
    """Prints the tables; the exit status says whether there were lines, not whether targets were met."""
    parser = argparse.ArgumentParser(prog="quant.table", description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path)
    parser.add_argument("--profiles", type=Path, metavar="FILE", help="what quant.profiles wrote")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the summary as JSON")
    args = parser.parse_args()
    lines = read(args.file)
    if not lines:
        raise SystemExit(f"{args.file}: no lines")
    data = summary(lines, read(args.profiles) if args.profiles else ())
    for group in data["groups"]:
        print(f"{group['title']}:\n\n{markdown(data['head'], group['rows'])}\n")
    print(markdown(["target", "wanted", "measured", ""], [list(t.values()) for t in data["targets"]]))
    if data["profiles"]["rows"]:
        print("\n" + markdown(data["profiles"]["head"], data["profiles"]["rows"]))
    if args.json:
        args.json.write_text(json.dumps(data, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
