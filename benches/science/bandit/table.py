"""Summary of a file of bandit runs: means and deviations over seeds, targets met or missed.

PYTHONPATH=benches/science python -m bandit.table docs/data/bandit.jsonl

Prints Markdown.
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

from .rows import BOTH, EVENTS, NATIVE, ROWS, Row
from .task import ARMS, TITLES

#: Share of LinUCB's reward that the bottleneck is to reach at d >= 768, and its share of the time.
REWARD, TIME = 0.95, 1 / 20
#: What value regression is to earn on the digits.
VALUE = 0.65
#: Standard errors above chance that count.
ABOVE = 4.0
HEAD = ("policy", "by", "reward", "last 500", "regret", "10 % flipped", "µs per event")

Runs = list[dict[str, Any]]
#: Row, data, noise.
Found = dict[tuple[str, str, float], Runs]


def latest(lines: Sequence[dict[str, Any]]) -> Found:
    """The last line of every run, by row, data and noise, of rows and settings that there still are."""
    last = {}
    for line in lines:
        row = ROWS.get(line["row"])
        if row and line["events"] == EVENTS and line["settings"] == row.options:
            last[line["row"], line["data"], line["noise"], line["seed"]] = line
    found: Found = {}
    for (row, data, noise, _), line in last.items():
        found.setdefault((row, data, noise), []).append(line)
    return found


def mean(runs: Runs, key: str) -> float | None:
    """Mean over seeds."""
    return statistics.mean(run[key] for run in runs) if runs else None


def middle(runs: Runs, key: str) -> float | None:
    """Median over seeds: other work on the machine disturbs some of them."""
    return statistics.median(run[key] for run in runs) if runs else None


def spread(runs: Runs, key: str = "reward") -> str:
    """Mean and standard deviation over seeds."""
    values = [run[key] for run in runs]
    if len(values) < 2:
        return "".join(f"{v:.3f}" for v in values)
    return f"{statistics.mean(values):.3f} ± {statistics.stdev(values):.3f}"


def cells(row: Row, data: str, found: Found) -> list[str]:
    """A row of the table of one data set."""
    runs, flipped = (found.get((row.name, data, noise), []) for noise in (0.0, 0.1))
    (regret, last), us = (mean(runs, key) for key in ("regret", "last")), middle(runs, "us")
    return [
        row.title,
        row.engine,
        spread(runs),
        "" if last is None else f"{last:.3f}",
        "" if regret is None else f"{regret:,.0f}",
        spread(flipped),
        "" if us is None else f"{us:,.1f}",
    ]


def targets(found: Found) -> list[dict[str, str]]:
    """What was asked for beforehand."""
    out = []

    def add(what: str, wanted: str, measured: str, ok: bool | None) -> None:
        verdict = "not run" if ok is None else "ok" if ok else "MISSED"
        out.append({"what": what, "wanted": wanted, "measured": measured, "verdict": verdict})

    def of(name: str, key: str, data: str) -> float | None:
        return (middle if key == "us" else mean)(found.get((name, data, 0.0), []), key)

    full, ours = of("linucb", "reward", "mnist"), of("bottleneck-32", "reward", "mnist")
    share = None if full is None or ours is None else ours / full
    add(
        "MNIST-5k: reward of bottleneck LinUCB, r = 32, against LinUCB",
        f"at least {REWARD:.2f}",
        "" if share is None else f"{share:.3f}",
        None if share is None else share >= REWARD,
    )
    slow = [t for name in ("linucb", "linucb-native") if (t := of(name, "us", "mnist")) is not None]
    fast = of("bottleneck-32", "us", "mnist")
    ratio = min(slow) / fast if slow and fast else None
    add(
        "MNIST-5k: time of the faster LinUCB against it",
        f"at least {1 / TIME:.0f}x",
        "" if ratio is None else f"{ratio:.0f}x",
        None if ratio is None else ratio >= 1 / TIME,
    )
    value = of("value", "reward", "digits")
    add(
        "digits: value regression, fitted A",
        f"at least {VALUE}",
        "" if value is None else f"{value:.3f}",
        None if value is None else value >= VALUE,
    )
    error = (1 / ARMS * (1 - 1 / ARMS) / EVENTS) ** 0.5
    line = 1 / ARMS + ABOVE * error
    for noise, told in ((0.0, ""), (0.1, ", 10 % of rewards flipped")):
        worst = [
            (min(run["reward"] for run in runs), f"{ROWS[name].title}, {ROWS[name].engine}, {data}")
            for (name, data, flipped), runs in found.items()
            if ROWS[name].scalar and flipped == noise
        ]
        least, who = min(worst, default=(None, ""))
        add(
            f"every scalar path above chance, worst seed{told}",
            f"above {line:.3f} ({ABOVE:g} standard errors)",
            "" if least is None else f"{least:.3f} ({who})",
            None if least is None else least > line,
        )
    shipped = [
        run["reward"] for (name, _, _), runs in found.items() if ROWS[name].engine == NATIVE for run in runs
    ]
    add(
        "every path that microlora ships, worst seed, flipped or not",
        "above 0.200",
        f"{min(shipped):.3f}" if shipped else "",
        min(shipped) > 0.2 if shipped else None,
    )
    lost = [run["reward"] for (name, _, _), runs in found.items() if name == "constant" for run in runs]
    add(
        "constant gradient, best seed: at chance, as expected",
        "below 0.200",
        f"{max(lost):.3f}" if lost else "",
        max(lost) < 0.2 if lost else None,
    )
    return out


def summary(lines: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """All that a page says."""
    found = latest(lines)
    tables = []
    for data in BOTH:
        rows = [cells(row, data, found) for row in ROWS.values() if (row.name, data, 0.0) in found]
        seeds = sorted({run["seed"] for (_, d, _), runs in found.items() if d == data for run in runs})
        if rows:
            tables.append({"title": TITLES[data], "seeds": seeds, "rows": rows})
    return {
        "head": list(HEAD),
        "tables": tables,
        "targets": targets(found),
        "events": EVENTS,
        "environment": lines[-1]["environment"],
    }


def main() -> int:
    """Prints the tables; the exit status says whether there were runs, not whether targets were met."""
    parser = argparse.ArgumentParser(prog="bandit.table", description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path)
    parser.add_argument("--json", type=Path, help="also write what the page says")
    args = parser.parse_args()
    lines = read(args.file)
    if not lines:
        raise SystemExit("no lines")
    data = summary(lines)
    if args.json:
        args.json.write_text(json.dumps(data, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    for part in data["tables"]:
        seeds = f"{len(part['seeds'])} seeds ({part['seeds'][0]} to {part['seeds'][-1]})"
        print(f"{part['title']}, {data['events']:,} events, {seeds}; mean ± standard deviation\n")
        print(markdown(data["head"], part["rows"]) + "\n")
    print(markdown(["target", "wanted", "measured", ""], [list(t.values()) for t in data["targets"]]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
