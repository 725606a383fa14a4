"""Summary of a file of merges: means and deviations over seeds, targets met or missed.

PYTHONPATH=benches:benches/science python -m merging.table docs/data/merging.jsonl --json merging.json

Prints Markdown; `docs/build.py` makes the same tables in docs/merging.md from the JSON.
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

from .rows import BOUNDS, ELEMENT, FACTOR, PEFT, RANK, ROWS, WRONG

#: Share of its parents' accuracy that RegMean is to retain.
RETAINED = 0.92
#: Largest relative difference to PEFT where it computes the same.
PARITY = 1e-5
TITLES = {
    BOUNDS: "Without merging",
    WRONG: "What averages factors",
    PEFT: "PEFT on the same factors",
    FACTOR: "`ml.merge`, factor space",
    ELEMENT: "`ml.merge`, element-wise",
}
HEAD = ("merge", "setting", "rank", "30°", "90°", "retained")

Lines = dict[str, dict[int, dict[str, Any]]]


def latest(lines: Sequence[dict[str, Any]]) -> Lines:
    """The last line of every row and seed, in the order of the table, of rows that it still has.

    Raises:
        SystemExit: Lines of one seed from different plans.
    """
    found: Lines = {name: {} for name in ROWS}
    plans: dict[int, str] = {}
    for line in lines:
        if line["row"] not in ROWS or line["settings"] != ROWS[line["row"]].options:
            continue
        if plans.setdefault(line["seed"], line["plan"]) != line["plan"]:
            raise SystemExit(f"seed {line['seed']}: lines of different plans cannot be compared")
        found[line["row"]][line["seed"]] = line
    return {name: runs for name, runs in found.items() if runs}


def spread(values: Sequence[float]) -> str:
    """Mean and standard deviation."""
    mean = f"{statistics.mean(values):.3f}"
    return mean if len(values) < 2 else f"{mean} ± {statistics.stdev(values):.3f}"


def cells(name: str, runs: dict[int, dict[str, Any]], best: str) -> list[str]:
    """A row of the table; `best` is printed bold."""
    row, seen = ROWS[name], list(runs.values())
    rank = str(max(seen[-1]["ranks"])) if "ranks" in seen[-1] else ""
    scores = [spread([line["accuracy"][i] for line in seen]) for i in (0, 1)]
    kept = spread([line["retained"] for line in seen])
    return [row.title, row.setting, rank, *scores, f"**{kept}**" if name == best else kept]


def targets(found: Lines) -> list[dict[str, str]]:
    """What was asked for beforehand."""
    out = []

    def add(what: str, wanted: str, measured: str, ok: bool | None) -> None:
        verdict = "not run" if ok is None else "met" if ok else "MISSED"
        out.append({"what": what, "wanted": wanted, "measured": measured, "verdict": verdict})

    kept = [line["retained"] for line in found.get("regmean", {}).values()]
    mean = statistics.mean(kept) if kept else None
    wanted = f"at least {RETAINED:.2f}"
    add("RegMean, retained", wanted, spread(kept) if kept else "", None if mean is None else mean >= RETAINED)
    for row in ROWS.values():
        if row.like:
            seen = [line["difference"] for line in found.get(row.name, {}).values()]
            worst = max(seen, default=None)
            what = f"{row.title} ({row.setting}): weight change against `ml.merge`, worst module and seed"
            add(
                what,
                f"below {PARITY:g}",
                "" if worst is None else f"{worst:.1e}",
                None if worst is None else worst < PARITY,
            )
    exact = [row for row in ROWS.values() if row.group == PEFT and not row.random]
    lines = [(line["reproduced"], row.title) for row in exact for line in found.get(row.name, {}).values()]
    worst, title = max(lines, default=(None, ""))
    kinds = len({row.method for row in exact})
    add(
        f'{kinds} types of PEFT without chance, by `semantics="peft"`, worst',
        f"below {PARITY:g}",
        "" if worst is None else f"{title}: {worst:.1e}",
        None if worst is None else worst < PARITY,
    )
    return out


def summary(lines: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """All that the page says."""
    found = latest(lines)
    merges = {n: r for n, r in found.items() if ROWS[n].group != BOUNDS}
    means = {n: statistics.mean(line["retained"] for line in r.values()) for n, r in found.items()}
    best = max(merges, key=lambda n: means[n], default="")
    groups = [
        {"title": title, "rows": [cells(n, r, best) for n, r in found.items() if ROWS[n].group == group]}
        for group, title in TITLES.items()
    ]
    return {
        "head": list(HEAD),
        "groups": [group for group in groups if group["rows"]],
        "targets": targets(found),
        "means": means,
        "seeds": sorted({seed for runs in found.values() for seed in runs}),
        "rank": RANK,
        "environment": lines[-1]["environment"],
    }


def main() -> int:
    """Prints the tables; the exit status says whether there were lines, not whether targets were met."""
    parser = argparse.ArgumentParser(prog="merging.table", description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path)
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the summary as JSON")
    args = parser.parse_args()
    lines = read(args.file)
    if not lines:
        raise SystemExit(f"{args.file}: no lines")
    data = summary(lines)
    for group in data["groups"]:
        print(f"{group['title']}\n\n{markdown(data['head'], group['rows'])}\n")
    print(markdown(["target", "wanted", "measured", ""], [list(t.values()) for t in data["targets"]]))
    if args.json:
        args.json.write_text(json.dumps(data, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
