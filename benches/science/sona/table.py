"""Summary of a file of measurements: means and deviations over splits.

PYTHONPATH=benches/science python -m sona.table docs/data/sona.jsonl --json docs/data/sona.json

Prints Markdown; `docs/build.py` puts the same blocks into docs/sona.md from the JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from continual.run import read
from continual.table import markdown

from .plan import SEEDS, TUNING
from .rows import (
    EVENTS,
    NOISE,
    POISON,
    POISONED,
    PROTECTION,
    ROWS,
    SETTINGS,
    SHARED,
    STRATEGIES,
    STREAMS,
    SWITCH,
    UPLIFT,
    Row,
)
from .run import asked

Runs = dict[int, dict[str, Any]]
Table = dict[str, Any]
ENCODERS = {"lsa": "LSA encoder", "minilm": "all-MiniLM-L6-v2"}
OUTCOMES = ("accepted", "kept", "rolled_back")


class Found:
    """The last line of every row, encoder and split, of rows and settings that the table still has."""

    def __init__(self, lines: Sequence[dict[str, Any]]) -> None:
        settings = {name: asked(row) for name, row in ROWS.items()}
        self.runs: dict[tuple[str, str], Runs] = {}
        self.environment: dict[str, str] = lines[-1]["environment"] if lines else {}
        self.code = sorted({line["code"] for line in lines})
        for line in lines:
            if settings.get(line["row"]) == line["settings"]:
                self.runs.setdefault((line["row"], line["encoder"]), {})[line["seed"]] = line

    def of(self, row: str, encoder: str = "lsa", seeds: Iterable[int] = SEEDS) -> list[dict[str, Any]]:
        """Lines of a row, split after split."""
        runs = self.runs.get((row, encoder), {})
        return [runs[seed] for seed in seeds if seed in runs]

    def rows(self, experiment: str, encoder: str = "lsa") -> list[Row]:
        """Rows of an experiment that were measured, in the order of the table."""
        return [r for r in ROWS.values() if r.experiment == experiment and self.of(r.name, encoder)]

    def cell(self, row: str, key: str, encoder: str = "lsa") -> str:
        """Mean and deviation of a gain; empty where it was not measured."""
        return gain([line[key] for line in self.of(row, encoder)])


def gain(values: Sequence[float]) -> str:
    """Mean and standard deviation of differences in MRR@10."""
    if not values:
        return ""
    mean = f"{statistics.mean(values):+.3f}"
    return mean if len(values) < 2 else f"{mean} ± {statistics.stdev(values):.3f}"


def verdicts(counts: Sequence[dict[str, int]]) -> str:
    """Consolidations accepted / kept / rolled back, mean per split."""
    if not any(counts):
        return ""
    means = [statistics.mean(count.get(name, 0) for count in counts) for name in OUTCOMES]
    return " / ".join(f"{mean:.0f}" for mean in means)


def events(values: Sequence[int | None]) -> str:
    """Mean of numbers of events; those that never came are counted."""
    there = [v for v in values if v is not None]
    if not there:
        return "never"
    mean = f"{statistics.mean(there):.0f}"
    return mean if len(there) == len(values) else f"{mean} ({len(there)} of {len(values)} splits)"


def uplift(found: Found) -> list[Table]:
    """Ranks, starts of A and what holding out costs; then the rules."""
    out = []
    for encoder, title in ENCODERS.items():
        loops, rules = [], []
        for row in found.rows(UPLIFT, encoder):
            lines = found.of(row.name, encoder)
            cells = [found.cell(row.name, key, encoder) for key in ("early", "all", "drift")]
            if row.name.startswith("rule"):
                rules.append([row.title, *cells])
                continue
            held = row.setting.changes.get("holdout", 0.1)
            head = [row.title, str(row.setting.rank), row.setting.basis, f"{held:g}"]
            loops.append([*head, *cells, verdicts([line["turns"] for line in lines])])
        measured = ["after 10 events", "after all", "unrelated queries"]
        if loops:
            head = ["loops", "rank", "A from", "held out", *measured, "accepted / kept / rolled back"]
            out.append({"title": f"One adapter per persona, {title}", "head": head, "rows": loops})
        if rules:
            base = "uplift instant r=16 A=log holdout=0"
            best = ["RLS, target", *(found.cell(base, key, encoder) for key in ("early", "all", "drift"))]
            text = f"Other rules, rank 16, A from the log, nothing held out, instant loop alone, {title}"
            out.append({"title": text, "head": ["rule", *measured], "rows": [best, *rules]})
    return out


def shared(found: Found) -> list[Table]:
    """One adapter for all against one per persona."""
    out = []
    for encoder, title in ENCODERS.items():
        rows = []
        for row in found.rows(SHARED, encoder):
            cells = [found.cell(row.name, key, encoder) for key in ("after", "all", "drift")]
            turns = verdicts([line["turns"] for line in found.of(row.name, encoder)])
            rows.append([f"one for all, {row.title}", str(row.setting.rank), *cells, turns])
        for rank in (16, 32):
            for kind, held in (("instant", "0"), ("three loops", "0.1")):
                own = f"uplift {kind} r={rank} A=log holdout={held}"
                if rows and found.of(own, encoder):
                    end = found.cell(own, "all", encoder)
                    turns = verdicts([line["turns"] for line in found.of(own, encoder)])
                    drift = found.cell(own, "drift", encoder)
                    rows.append([f"one per persona, {kind}", str(rank), end, end, drift, turns])
        if rows:
            head = ["adapters", "rank", "right after its persona", "after all twelve", "unrelated queries"]
            head.append("accepted / kept / rolled back")
            out.append({"title": f"Twelve personas in turn, {title}", "head": head, "rows": rows})
    return out


def switch(found: Found) -> list[Table]:
    """Recovery and forgetting."""
    rows = []
    for row in found.rows(SWITCH):
        lines = found.of(row.name)
        rows.append(
            [
                row.title,
                found.cell(row.name, "fresh"),
                events([line["fresh_events"] for line in lines]),
                found.cell(row.name, "all"),
                events([line["events"] for line in lines]),
                found.cell(row.name, "first"),
                found.cell(row.name, "kept"),
            ]
        )
    head = ["rule, loops", "fresh adapter, all clicks", "its events to 90 %", "second persona, all clicks"]
    head += ["events to 90 % of the fresh", "first persona before", "first persona after"]
    return [{"title": "A persona's clicks, then the next one's", "head": head, "rows": rows}] if rows else []


def noise(found: Found) -> list[Table]:
    """Wrong clicks, and clicks where people look."""
    said = {"": "none", "rating": "ratings", "ips": "inverse propensity"}
    out = []
    for title, key in (("Wrong clicks", "share"), ("Position bias, eta 1, three passes", "eta")):
        rows: dict[tuple[str, str], dict[str, str]] = {}
        for row in found.rows(NOISE):
            if key in row.options:
                what = f"{row.options[key]:.0%}" if key == "share" else ""
                name = what, said[row.options["quality"]]
                rows.setdefault(name, {})[row.title] = found.cell(row.name, "all")
        drop = 0 if key == "share" else 1
        head = ["wrong", "quality weights", *PROTECTION][drop:]
        cells = [[*name, *(row.get(p, "") for p in PROTECTION)][drop:] for name, row in rows.items()]
        if cells:
            out.append({"title": title, "head": head, "rows": cells})
    return out


def strategies(found: Found) -> list[Table]:
    """Strategies by stream, thresholds, presets."""
    names = {
        "domains": "four domains in turn",
        "ratings": "30 % wrong, rated",
        "personas": "four personas mixed",
    }
    every = found.rows(STRATEGIES)
    by: dict[str, dict[str, str]] = {}
    for row in every:
        if row.name.split()[0] in STREAMS:
            lines = found.of(row.name)
            text = f"{found.cell(row.name, 'all')} ({verdicts([x['turns'] for x in lines]) or 'none'})"
            by.setdefault(row.title, {})[row.options["stream"]] = text
    rows = [[title, *(cells.get(s, "") for s in STREAMS)] for title, cells in by.items()]
    out = []
    if rows:
        head = ["strategy", *(names[s] for s in STREAMS)]
        out.append({"title": "Strategies (accepted / kept / rolled back)", "head": head, "rows": rows})
    rows = [[r.title, found.cell(r.name, "all")] for r in every if r.name.startswith("threshold")]
    if rows:
        head = ["strategy, `quality_threshold`", "30 % wrong, rated"]
        out.append({"title": "Quality thresholds", "head": head, "rows": rows})
    rows = []
    for row in every:
        if row.name.startswith("preset"):
            config = row.setting.config(1024, 0)
            size = [str(config.lora.rank), str(len(config.lora.target_modules))]
            turns = verdicts([line["turns"] for line in found.of(row.name)])
            rows.append([row.title, *size, found.cell(row.name, "all"), turns])
    if rows:
        head = ["preset", "rank", "modules", "after all clicks", "accepted / kept / rolled back"]
        out.append({"title": "Presets, one loop per persona, right clicks", "head": head, "rows": rows})
    return out


#: The loops whose run is shown.
LOGGED = ("poison three loops", "poison NLMS, three loops")


def poison(found: Found) -> list[Table]:
    """Before, during and after, and the run of the first split."""
    spans, rows, out = ("before", "during", "after", "end"), [], []
    for row in found.rows(POISON):
        lines = found.of(row.name)
        cells = [found.cell(row.name, f"mrr_{span}") for span in spans]
        loss = " / ".join(f"{statistics.mean(x[f'loss_{s}'] for x in lines):.3f}" for s in spans)
        turns = verdicts([line["turns"]["during"] for line in lines])
        rows.append([row.title, *cells, found.cell(row.name, "worst"), loss, turns])
    if not rows:
        return []
    first, last = POISONED
    head = ["loops", f"events {first - 63} to {first}", f"{first + 1} to {last}, poisoned"]
    head += [f"{last + 1} to {last + 64}", f"at {EVENTS}", "lowest since", "held-out loss in the same places"]
    head.append("verdicts on poisoned windows")
    out.append({"title": "Targets turned round for 64 events", "head": head, "rows": rows})
    for name in LOGGED:
        for line in found.of(name)[:1]:
            shown = [x for x in line["log"] if first - 30 < x["event"] <= last + 50]
            cells = [
                [
                    str(x["event"]),
                    "yes" if first < x["event"] <= last else "",
                    x["outcome"].replace("_", " "),
                    f"{x['before']:.3f}" if x["before"] is not None else "",
                    f"{x['after']:.3f}" if x["after"] is not None else "",
                    x["note"].split(";")[0],
                ]
                for x in shown
            ]
            text = f"Run of the gate: {ROWS[name].title}, split {line['seed']}"
            head = ["after event", "poisoned", "verdict", "held-out loss before", "after", "what it said"]
            out.append({"title": text, "head": head, "rows": cells})
    return out


def settings(found: Found) -> list[Table]:
    """Defaults and their neighbours: chosen on some splits, reported on others."""
    out = []
    keys = ("clean", "noisy", "shared", "switch", "poison_during", "poison_end")
    for rule in ("RLS", "NLMS"):
        rows = []
        for row in found.rows(SETTINGS):
            if row.options["rule"] != rule:
                continue
            tuned = [line["all"] for line in found.of(row.name, seeds=TUNING)]
            mean = f"{statistics.mean(tuned):+.4f}" if tuned else ""
            cells = [gain([line[key] for line in found.of(row.name)]).split(" ")[0] for key in keys]
            all_of = gain([line["all"] for line in found.of(row.name)])
            rows.append([row.title, mean, all_of, *cells])
        head = ["settings", f"mean, splits {TUNING[0]}-{TUNING[-1]}", f"mean, splits {SEEDS[0]}-{SEEDS[-1]}"]
        head += ["right clicks", "30 % wrong", "twelve in turn", "after a switch"]
        head += ["during poison", "after poison"]
        if rows:
            out.append({"title": f"Settings, {rule}", "head": head, "rows": rows})
    return out


BLOCKS: dict[str, Callable[[Found], list[Table]]] = {
    UPLIFT: uplift,
    SHARED: shared,
    SWITCH: switch,
    NOISE: noise,
    STRATEGIES: strategies,
    POISON: poison,
    SETTINGS: settings,
}


def summary(lines: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """All that the page says."""
    found = Found(lines)
    spent = sum(line["seconds"] for runs in found.runs.values() for line in runs.values())
    return {
        "blocks": {name: block(found) for name, block in BLOCKS.items()},
        "seeds": list(SEEDS),
        "minutes": round(spent / 60, 1),
        "minilm": any(encoder == "minilm" for _, encoder in found.runs),
        "environment": found.environment,
    }


def main() -> int:
    """Prints the tables."""
    parser = argparse.ArgumentParser(prog="sona.table", description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path)
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the summary as JSON")
    args = parser.parse_args()
    lines = read(args.file)
    if not lines:
        raise SystemExit(f"{args.file}: no lines")
    data = summary(lines)
    for name, tables in data["blocks"].items():
        for table in tables:
            print(f"{name}: {table['title']}\n\n{markdown(table['head'], table['rows'])}\n")
    if args.json:
        args.json.write_text(json.dumps(data, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
