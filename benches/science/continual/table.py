"""Summary of a file of runs: means, paired differences, targets met or missed.

PYTHONPATH=benches/science python -m continual.table docs/data/continual.jsonl --json continual.json

Prints Markdown; `docs/build.py` makes the same tables in docs/learning.md from the JSON.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .domains import DATASETS, TITLES
from .methods import METHODS
from .run import read

#: Native and reference may differ by this much of accuracy, paired mean.
CLOSE = 0.015
#: EWC above none on the rotated digits.
GAIN = 0.12
#: Of DER++ with 200 rows: mean accuracy, and what earlier tasks may lose.
DARK_ACC, DARK_BWT = 0.80, -0.10
#: Ten pairs, two-sided 5 % (2.26), rounded up.
T = 2.3
#: Native `none` against NumPy's.
SPEED = 1.8
#: First minus second, and why it is looked at.
COMPARED = (
    ("ewc", "none"),
    ("delta-online", "ewc-online"),
    ("delta-online", "delta"),
    ("delta-online", "replay200"),
    ("der++", "replay200"),
    ("der++", "delta-online"),
    ("der++delta", "der++"),
)


@dataclass(frozen=True)
class Paired:
    """Mean difference over the seeds that both have."""

    mean: float
    sd: float
    t: float | None
    wins: int
    n: int

    @classmethod
    def of(cls, a: dict[int, float], b: dict[int, float]) -> Paired | None:
        """Differences `a - b`; None with fewer than two seeds in common."""
        d = [a[s] - b[s] for s in sorted(a.keys() & b.keys())]
        if len(d) < 2:
            return None
        mean, sd = statistics.mean(d), statistics.stdev(d)
        t = mean / (sd / math.sqrt(len(d))) if sd else None
        return cls(mean, sd, t, sum(v > 0 for v in d), len(d))

    def cell(self) -> str:
        """In points of accuracy."""
        return f"{100 * self.mean:+.1f} (t {'-' if self.t is None else f'{self.t:.1f}'})"


@dataclass(frozen=True)
class Target:
    """What was asked for, and what came."""

    what: str
    wanted: str
    measured: str
    verdict: str


class Runs:
    """Lines by data, method, engine and seed."""

    def __init__(self, lines: Sequence[dict[str, Any]]) -> None:
        self.lines = lines
        self.by: dict[tuple[str, str, str], dict[int, dict[str, Any]]] = {}
        plans: dict[tuple[str, int], str] = {}
        for line in lines:
            self.by.setdefault((line["data"], line["method"], line["engine"]), {})[line["seed"]] = line
            if plans.setdefault((line["data"], line["seed"]), line["plan"]) != line["plan"]:
                raise SystemExit(f"{line['data']} {line['seed']}: runs of different plans cannot be paired")
        #: What the tables show: native where there is any.
        self.shown = "native" if any(line["engine"] == "native" for line in lines) else "reference"

    def values(self, data: str, method: str, name: str = "ACC", engine: str = "") -> dict[int, float]:
        """One number by seed; a name of `seconds` is looked up there."""
        runs = self.by.get((data, method, engine or self.shown), {})
        return {s: line[name] if name in line else line["seconds"][name] for s, line in runs.items()}

    def paired(self, data: str, first: str, second: str) -> Paired | None:
        """Accuracy of one method minus that of another, as shown."""
        return Paired.of(self.values(data, first), self.values(data, second))

    def to_reference(self, data: str, method: str) -> Paired | None:
        """Native minus reference."""
        return Paired.of(*(self.values(data, method, engine=e) for e in ("native", "reference")))

    def seconds(self, data: str, method: str, engine: str) -> float | None:
        """Median time of a run's steps and consolidation."""
        parts = [self.values(data, method, p, engine) for p in ("train", "consolidate")]
        return statistics.median(a + parts[1][s] for s, a in parts[0].items()) if parts[0] else None


def spread(values: dict[int, float], *, signed: bool = False) -> str:
    """Mean and standard deviation."""
    v = list(values.values())
    if not v:
        return ""
    mean = f"{statistics.mean(v):{'+' if signed else ''}.3f}"
    return mean if len(v) < 2 else f"{mean} ± {statistics.stdev(v):.3f}"


def accuracy_table(runs: Runs) -> dict[str, Any]:
    """Every method on both benchmarks."""
    short = {"rot": "rotated", "perm": "permuted"}
    head = ["method (strength)"]
    for data in DATASETS:
        head += [f"{short[data]}: ACC", "BWT", "LA"]
    rows = []
    for m in METHODS.values():
        row = [m.label()]
        for data in DATASETS:
            row.append(spread(runs.values(data, m.name)))
            row.append("" if m.joint else spread(runs.values(data, m.name, "BWT"), signed=True))
            row.append("" if m.joint else spread(runs.values(data, m.name, "LA")))
        rows.append(row)
    return {"head": head, "rows": rows}


def engines_table(runs: Runs) -> dict[str, Any]:
    """Native against reference: accuracy and time."""
    head = ["method"]
    for data in DATASETS:
        head += [f"{TITLES[data]}: native - NumPy, points", "NumPy, s", "native, s", "ratio"]
    rows = []
    for m in METHODS.values():
        row = [m.title]
        for data in DATASETS:
            pair = runs.to_reference(data, m.name)
            slow, fast = (runs.seconds(data, m.name, e) for e in ("reference", "native"))
            row += ["" if pair is None else pair.cell()]
            row += ["" if s is None else f"{s:.2f}" for s in (slow, fast)]
            row += ["" if slow is None or fast is None else f"{slow / fast:.1f}x"]
        if any(row[1:]):
            rows.append(row)
    return {"head": head, "rows": rows}


def paired_table(runs: Runs) -> dict[str, Any]:
    """Methods against each other, on the same seeds and batches."""
    rows = []
    for first, second in COMPARED:
        row = [f"{METHODS[first].title} minus {METHODS[second].title}"]
        for data in DATASETS:
            pair = runs.paired(data, first, second)
            row += ["", ""] if pair is None else [pair.cell(), f"{pair.wins} of {pair.n}"]
        rows.append(row)
    head = ["difference of ACC, points", "rotated (t)", "better on", "permuted (t)", "better on"]
    return {"head": head, "rows": rows}


def targets(runs: Runs) -> list[Target]:
    """What was asked for beforehand."""
    out = []

    def add(what: str, wanted: str, measured: str, ok: bool | None) -> None:
        verdict = "not run" if ok is None else "met" if ok else "MISSED"
        out.append(Target(what, wanted, measured, verdict))

    for data in DATASETS:
        pairs = {m.title: runs.to_reference(data, m.name) for m in METHODS.values()}
        found = {title: pair for title, pair in pairs.items() if pair is not None}
        worst = max(found, key=lambda title: abs(found[title].mean), default=None)
        wanted = f"within {100 * CLOSE:g} points"
        what = f"{TITLES[data]}: native and NumPy, worst row"
        if worst is None:
            add(what, wanted, "", None)
        else:
            close = abs(found[worst].mean) <= CLOSE
            add(what, wanted, f"{worst}: {found[worst].cell()}", close if len(found) == len(pairs) else None)
    gain = runs.paired("rot", "ewc", "none")
    what, wanted = f"{TITLES['rot']}: EWC minus none", f"at least +{100 * GAIN:g} points"
    add(what, wanted, gain.cell() if gain else "", gain.mean >= GAIN if gain else None)
    for data in DATASETS:
        pair = runs.paired(data, "delta-online", "ewc-online")
        better = None if pair is None else pair.mean > 0 and (pair.t or 0) > T
        what = f"{TITLES[data]}: ΔW-EWC online minus online EWC"
        add(what, f"above 0 with t > {T:g}", pair.cell() if pair else "", better)
    for data in DATASETS:
        for name, least in (("ACC", DARK_ACC), ("BWT", DARK_BWT)):
            values = runs.values(data, "der++", name)
            enough = statistics.mean(values.values()) >= least if values else None
            shown = spread(values, signed=name == "BWT")
            add(f"{TITLES[data]}: DER++, 200 rows, {name}", f"at least {least:g}", shown, enough)
    for data in DATASETS:
        slow, fast = (runs.seconds(data, "none", e) for e in ("reference", "native"))
        ratio = slow / fast if slow and fast else None
        measured = f"{ratio:.1f}x" if ratio else ""
        fast_enough = None if ratio is None else ratio >= SPEED
        add(f"{TITLES[data]}: none, native against NumPy", f"at least {SPEED:g}x", measured, fast_enough)
    return out


def summary(lines: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """All that the page says."""
    runs = Runs(lines)
    numbers = {
        f"{data} {method} {engine}": {
            name: statistics.mean(runs.values(data, method, name, engine).values())
            for name in ("ACC", "BWT", "LA")
        }
        for data, method, engine in runs.by
    }
    return {
        "shown": runs.shown,
        "seeds": sorted({line["seed"] for line in lines}),
        "runs": len(lines),
        "environment": lines[-1]["environment"],
        "accuracy": accuracy_table(runs),
        "paired": paired_table(runs),
        "engines": engines_table(runs),
        "targets": [asdict(t) for t in targets(runs)],
        "means": numbers,
    }


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table."""
    return "\n".join(["| " + " | ".join(r) + " |" for r in (head, ["---"] * len(head), *rows)])


def main() -> int:
    """Prints the tables; the exit status says whether there were runs, not whether targets were met."""
    parser = argparse.ArgumentParser(prog="continual.table", description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path)
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the summary as JSON")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="also write the tables")
    args = parser.parse_args()
    lines = read(args.file)
    if not lines:
        raise SystemExit(f"{args.file}: no runs")
    data = summary(lines)
    parts = [markdown(data[name]["head"], data[name]["rows"]) for name in ("accuracy", "paired", "engines")]
    parts.append(markdown(["target", "wanted", "measured", ""], [list(t.values()) for t in data["targets"]]))
    text = "\n\n".join(parts) + "\n"
    print(text)
    if args.markdown:
        args.markdown.write_text(text, encoding="utf-8")
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(data, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
