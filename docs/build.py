"""Writes the figures of README.md and docs/ from the files that the commands wrote.

`make docs` runs the bench table and the demo into `docs/data/` and then this script; a test checks that the
pages still say what those files say.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT / "docs" / "data"


def machine(facts: dict[str, Any]) -> str:
    """One sentence on where figures come from."""
    return (
        f"{facts['cpu']}, one thread, {facts['isa']}; microlora {facts['microlora']}, "
        f"Python {facts['python']}, NumPy {facts['numpy']}, torch {facts['torch']}, PEFT {facts['peft']}"
    )


def cells(row: dict[str, Any]) -> list[str]:
    """Work, ours, peer, ratio, error of a row."""
    ratio = "" if row["ratio"] is None else f"{row['ratio']:.1f}x"
    error = "" if row["error"] is None else f"{row['error']:.0e}"
    return [row["work"], row["ours"], row["peer"], ratio, error]


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join(lines + ["| " + " | ".join(r) + " |" for r in rows])


def bench_block(data: dict[str, Any]) -> str:
    """The README's table."""
    rows = [cells(r) for r in data["rows"] if r["headline"]]
    head = ["work", "microlora", "peer", "ratio", "error to float64"]
    judged = [r["verdict"] for r in data["rows"] if r["verdict"]]
    missed = f"{judged.count('MISSED')} of {len(judged)} targets missed"
    where = f"{machine(data['machine'])}. All rows ({missed}): [docs/performance.md](docs/performance.md)."
    return f"{table(head, rows)}\n\n{where}"


def demo_block(text: str) -> str:
    """The demo's output, as printed."""
    return "```text\n" + text.strip("\n") + "\n```"


def feedback_block(lines: list[dict[str, Any]]) -> str:
    """Gain per kind of feedback: means and deviations over splits."""
    kinds: dict[str, list[dict[str, Any]]] = {}
    for line in lines:
        kinds.setdefault(line["kind"], []).append(line)
    best = statistics.mean(r["all"] for r in kinds["target, RLS"])
    rows = []
    for kind, runs in kinds.items():
        early, late = ([r[key] for r in runs] for key in ("early", "all"))
        mean = statistics.mean(late)
        spread = f"{mean:+.3f} ± {statistics.pstdev(late):.3f}"
        rows.append([kind, f"{statistics.mean(early):+.3f}", spread, f"{mean / best:.0%}"])
    return table(["feedback, rule", "after 10 events", "after all", "share of target, RLS"], rows)


def continual_block(data: dict[str, Any]) -> str:
    """Task after task: accuracy, differences on the same seeds, time, and what was asked for."""
    where, seeds = data["environment"], data["seeds"]
    engine = {"native": "microlora", "reference": "the NumPy reference"}[data["shown"]]
    targets = table(["target", "wanted", "measured", ""], [list(t.values()) for t in data["targets"]])
    parts = [
        f"Accuracy of {engine}; mean ± standard deviation over seeds {seeds[0]} to {seeds[-1]}.",
        table(data["accuracy"]["head"], data["accuracy"]["rows"]),
        "The same seeds, splits, starts and batches against each other:",
        table(data["paired"]["head"], data["paired"]["rows"]),
        "microlora against the NumPy reference, and seconds of training and consolidation per run (median):",
        table(data["engines"]["head"], data["engines"]["rows"]),
        targets,
        f"{data['runs']} runs, two at a time, one thread each, on {where['cpu']}; microlora "
        f"{where['microlora']}, Python {where['python']}, NumPy {where['numpy']} with {where['blas']}.",
    ]
    return "\n\n".join(parts)


def presets_block(lines: list[dict[str, Any]]) -> str:
    """Held-out loss of every adapter on every task, and how near its own one comes to the best possible."""
    tasks: dict[str, dict[str, dict[str, Any]]] = {}
    for line in lines:
        tasks.setdefault(line["task"], {})[line["adapter"]] = line
    names, rows = list(tasks), []
    for task, row in tasks.items():
        lowest, own = min(r["loss"] for r in row.values()), row[task]
        cells = [f"{row[n]['loss']:.3f}" for n in names]
        cells = [f"**{c}**" if row[n]["loss"] == lowest else c for n, c in zip(names, cells, strict=True)]
        reached = (own["untrained"] - own["loss"]) / (own["untrained"] - own["best"])
        distance = f"{own['loss'] - own['best']:+.3f}"
        rows.append(
            [task, *cells, f"{own['untrained']:.3f}", f"{own['best']:.3f}", distance, f"{reached:.1%}"]
        )
    head = ["task", *names, "untrained", "best possible", "own above it", "of the way"]
    return table(head, rows)


def merging_block(data: dict[str, Any]) -> str:
    """What every merge of two adapters keeps of both domains."""
    where, seeds = data["environment"], data["seeds"]
    parts = [
        f"Two adapters of rank {data['rank']}, {len(seeds)} seeds ({seeds[0]} to {seeds[-1]}); accuracy on "
        "each domain, mean ± standard deviation. *Retained* is the mean over domains of the accuracy as a "
        "share of the domain's own adapter's; the best merge is bold."
    ]
    for group in data["groups"]:
        parts += [f"{group['title']}:", table(data["head"], group["rows"])]
    parts += [
        table(["target", "wanted", "measured", ""], [list(t.values()) for t in data["targets"]]),
        f"One thread on {where['cpu']}; microlora {where['microlora']}, NumPy {where['numpy']}, torch "
        f"{where['torch']}, PEFT {where['peft']}.",
    ]
    return "\n\n".join(parts)


def sona_block(data: dict[str, Any], name: str) -> str:
    """The tables of one experiment with the three loops."""
    parts = []
    for made in data["blocks"][name]:
        rows = [[str(cell).replace("|", "\\|") for cell in row] for row in made["rows"]]
        parts += [f"{made['title']}:", table(made["head"], rows)]
    return "\n\n".join(parts)


def sona_facts_block(data: dict[str, Any]) -> str:
    """Where the tables of the three loops come from."""
    where, seeds = data["environment"], data["seeds"]
    minilm = "" if data["minilm"] else " MiniLM was not installed, so its rows are not there."
    return (
        "Gain in MRR@10 of held-out queries over no adapter, mean ± standard deviation over splits "
        f"{seeds[0]} to {seeds[-1]}. One thread on {where['cpu']}; microlora {where['microlora']}, Python "
        f"{where['python']}, NumPy {where['numpy']} with {where['blas']}.{minilm}"
    )


def bandit_block(data: dict[str, Any]) -> str:
    """The tables of choices among arms."""
    parts = []
    for made in data["tables"]:
        seeds = f"{len(made['seeds'])} seeds ({made['seeds'][0]} to {made['seeds'][-1]})"
        parts += [f"{made['title']}, {data['events']:,} events, {seeds}:", table(data["head"], made["rows"])]
    where = data["environment"]
    parts += [
        table(["target", "wanted", "measured", ""], [list(t.values()) for t in data["targets"]]),
        f"One thread on {where['cpu']}; Python {where['python']}, NumPy {where['numpy']}, {where['blas']}.",
    ]
    return "\n\n".join(parts)


def sona_targets_block(data: dict[str, Any]) -> str:
    """What the loops had to reach on right clicks, and what they reached."""

    def mean(block: str, start: list[str], column: int) -> float:
        rows = (row for table in data["blocks"][block] for row in table["rows"])
        row = next(row for row in rows if row[: len(start)] == start)
        return float(row[column].split()[0])

    loops = ["three loops", "16", "log", "0.1"]
    late, early = mean("uplift", loops, 5), mean("uplift", loops, 4)
    single = mean("strategies", ["`low_latency`", "1"], 3)
    shared = mean("shared", ["one for all, three loops", "16"], 4)
    rows = [
        ("one adapter per persona, rank 16, after all clicks", late, 0.040),
        ("the same after 10 events", early, 0.015),
        ("the same after all clicks, above rank 1 (`low_latency`)", late - single, 0.020),
        ("one adapter for all, rank 16, on unrelated queries", shared, -0.012),
    ]
    lines = ["| three loops, LSA encoder | gain | target | |", "|---|---|---|---|"]
    for what, got, want in rows:
        met = "met" if got >= want else "MISSED"
        lines.append(f"| {what} | {got:+.3f} | at least {want:+.3f} | {met} |")
    return "\n".join(lines)


def quant_block(data: dict[str, Any]) -> str:
    """What every type costs the adapters of the continual-learning benchmark, and what was asked for."""
    where, seeds = data["environment"], data["seeds"]
    parts = [
        f"Adapters of rank 8 for digits turned by 90 degrees (accuracy {data['accuracy']:.3f} in float32), "
        f"mean over {len(seeds)} seeds ({seeds[0]} to {seeds[-1]}), with the standard deviation of changes."
    ]
    for group in data["groups"]:
        parts += [f"{group['title']}:", table(data["head"], group["rows"])]
    parts += ["Widths that are not whole blocks gave other types to " + "; ".join(data["fallbacks"]) + "."]
    parts += [table(["target", "wanted", "measured", ""], [list(t.values()) for t in data["targets"]])]
    parts += [f"One thread on {where['cpu']}; microlora {where['microlora']}, NumPy {where['numpy']}."]
    return "\n\n".join(parts)


def quant_profiles_block(data: dict[str, Any]) -> str:
    """What is expected of the profiles, beside what is measured."""
    return table(data["profiles"]["head"], data["profiles"]["rows"])


def personas_block(lines: list[dict[str, Any]]) -> str:
    """MRR of merged adapters on every persona, and the share of the own adapters' gain that is kept."""
    rows: dict[str, list[dict[str, Any]]] = {}
    for line in lines:
        rows.setdefault(line["row"], []).append(line)
    names = list(lines[0]["mrr"])
    mean = {row: [statistics.mean(line["mrr"].values()) for line in found] for row, found in rows.items()}
    none, own = (statistics.mean(mean[row]) for row in ("none", "own"))
    cells = []
    for row, found in rows.items():
        each = [f"{statistics.mean(line['mrr'][name] for line in found):.3f}" for name in names]
        spread = f"{statistics.mean(mean[row]):.3f} ± {statistics.stdev(mean[row]):.3f}"
        share = "" if row == "none" else f"{(statistics.mean(mean[row]) - none) / (own - none):.0%}"
        setting = found[0]["setting"]
        cells.append([found[0]["title"] + (f", {setting}" if setting else ""), *each, spread, share])
    splits = sorted({line["split"] for line in lines})
    head = f"Three adapters of rank {lines[0]['rank']}, {len(splits)} splits ({splits[0]} to {splits[-1]}); "
    return (
        head + "MRR@10 of each persona's held-out queries, mean over splits.\n\n"
        f"{table(['adapter', *names, 'mean ± SD over splits', 'of the own gain'], cells)}"
    )


def learning_rates_block(lines: list[dict[str, Any]]) -> str:
    """Share of what can be learned that is missing after one epoch, by width, task and rate."""
    rows: dict[tuple[int, str], list[str]] = {}
    for line in lines:
        key = line["width"], f"`{line['task']}` (rank {line['rank']})"
        rows.setdefault(key, []).append(f"{line['missing']:.3f}")
    rates = list(dict.fromkeys(f"{line['rate']:g}" for line in lines))
    return table(["width", "task", *rates], [[str(width), task, *c] for (width, task), c in rows.items()])


def sidecar_block(lines: list[dict[str, Any]]) -> str:
    """Sizes of side-cars as shares of the bytes that change."""
    head = ["dtype", "delta / weights", "weights rounded away", "residual", "adapter", "restored"]
    shares = ("lossy", "residual", "adapter")
    rows = [
        [
            x["dtype"],
            f"{x['ratio']:g}",
            *(f"{x[k]:.2%}" for k in shares),
            "bit for bit" if x["exact"] else "NO",
        ]
        for x in lines
    ]
    return table(head, rows)


def methods_block() -> str:
    """The merge methods, one row each, as the core's table has them."""
    from microlora.merging import methods

    rows = []
    for name, m in methods().items():
        if name != m.name:
            continue
        settings = _settings(m.defaults)
        laws = ", ".join(m.laws)
        formula = f"`{m.formula.replace('|', chr(92) + '|')}`"
        rows.append([f"`{name}`", m.family, formula, m.paper, m.when, settings, m.weights, laws])
    head = ["method", "family", "formula", "from", "when", "settings", "weights", "laws"]
    return table(head, rows)


def peft_methods_block() -> str:
    """PEFT's combination types, one row each, as the core's table has them."""
    from microlora.merging import methods

    rows = []
    for name, m in methods("peft").items():
        if name == m.name:
            rank = "its own" if "gauge" not in m.laws else "the sum" if name == "cat" else "the largest"
            on = "the delta" if "gauge" in m.laws else "A and B apart"
            formula = f"`{m.formula.replace('|', chr(92) + '|')}`"
            rows.append([f"`{name}`", on, formula, _settings(m.defaults), rank, ", ".join(m.laws)])
    return table(["type", "works on", "formula", "settings", "rank", "laws"], rows)


def checks_block() -> str:
    """What the doctor looks for, one row each."""
    from microlora.doctor import CHECKS

    ways = {"yes": "yes", "asked": "when asked", "no": ""}
    rows = [[f"`{c.code}`", c.severity, c.what, c.todo, ways[c.way]] for c in CHECKS]
    return table(["code", "severity", "what it sees", "what to do", "`fix=`"], rows)


def _settings(defaults: Mapping[str, Any]) -> str:
    taken = sorted(set(defaults) - {"lam", "rank"})
    return ", ".join(f"{key} {_shown(defaults[key])}" for key in taken)


def _shown(value: object) -> str:
    return f"{value:g}" if isinstance(value, int | float) and not isinstance(value, bool) else str(value)


def soak_block(found: dict[str, Any]) -> str:
    """Memory and latencies of the long run over many loops."""
    sys.path.insert(0, str(ROOT / "benches" / "science"))
    from sona_soak import markdown

    where = found["machine"]
    cores = f"{where['cores']} cores, {where['isa']}; microlora {where['microlora']}"
    return f"{markdown(found)}\n\n{where['cpu']}, {cores}, Python {where['python']}."


def performance(data: dict[str, Any], soak: dict[str, Any] | None = None) -> str:
    """The whole page of measurements."""
    out = [
        "# Performance",
        "",
        "Written by `make docs` from one run of `benches/table.py`; do not edit. A ratio compares within",
        "that run; the error is the largest difference to float64, relative to the largest number. Rows that",
        "miss their target say so. The bare kernel, the call over it and the read path with a manager",
        "are the best of four allocations, forward from blocks the best of three, because where buffers lie",
        "to each other moves a kernel by up to a quarter; all other rows have one.",
        "A share above 1 means that the limit itself was measured low in that moment.",
        "",
        f"Machine: {machine(data['machine'])}.",
    ]
    section = ""
    for row in data["rows"]:
        if row["section"] != section:
            section = row["section"]
            out += ["", f"## {section[0].upper()}{section[1:]}", ""]
            out += ["| work | microlora | compared with | ratio | target | | error |", "|" + "---|" * 7]
        c = cells(row)
        target = (
            "" if row["target"] is None else f"{'at most' if row['below'] else 'at least'} {row['target']:g}x"
        )
        out.append("| " + " | ".join([*c[:4], target, row["verdict"], c[4]]) + " |")
    if soak is not None:
        out += ["", "## A soak of the three loops", "", "Written by `make soak`, from a run of its own.", ""]
        out += [soak_block(soak)]
    return "\n".join(out) + "\n"


def inject(page: str, name: str, block: str) -> str:
    """Puts a block between its two markers."""
    start, end = f"<!-- {name}:start -->", f"<!-- {name}:end -->"
    if page.count(start) != 1 or page.count(end) != 1:
        raise SystemExit(f"expected one pair of markers {name}:start and {name}:end")
    head, rest = page.split(start)
    return f"{head}{start}\n{block}\n{end}{rest.split(end)[1]}"


def pages() -> dict[Path, str]:
    """What every generated page should say."""
    data = json.loads((DATA / "bench.json").read_text(encoding="utf-8"))
    feedback = [
        json.loads(line) for line in (DATA / "feedback.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    learning = (ROOT / "docs" / "learning.md").read_text(encoding="utf-8")
    learning = inject(learning, "feedback", feedback_block(feedback))
    if (DATA / "continual.json").exists():
        continual = json.loads((DATA / "continual.json").read_text(encoding="utf-8"))
        learning = inject(learning, "continual", continual_block(continual))
    if (DATA / "presets.jsonl").exists():
        presets = (DATA / "presets.jsonl").read_text(encoding="utf-8").splitlines()
        learning = inject(learning, "presets", presets_block([json.loads(line) for line in presets]))
    training = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
    if (DATA / "learning_rates.jsonl").exists():
        rates = (DATA / "learning_rates.jsonl").read_text(encoding="utf-8").splitlines()
        training = inject(training, "learning_rates", learning_rates_block([json.loads(r) for r in rates]))
    soak = DATA / "sona_soak.json"
    soaked = json.loads(soak.read_text(encoding="utf-8")) if soak.exists() else None
    sidecar = (DATA / "sidecar.jsonl").read_text(encoding="utf-8").splitlines()
    fusing = (ROOT / "docs" / "fusing.md").read_text(encoding="utf-8")
    fusing = inject(fusing, "sidecar", sidecar_block([json.loads(line) for line in sidecar]))
    merged = (ROOT / "docs" / "merging.md").read_text(encoding="utf-8")
    merged = inject(merged, "methods", methods_block())
    merged = inject(merged, "peft-methods", peft_methods_block())
    if (DATA / "merging.json").exists():
        merged = inject(
            merged, "merging-science", merging_block(json.loads((DATA / "merging.json").read_text("utf-8")))
        )
    if (DATA / "merging_personas.jsonl").exists():
        personas = (DATA / "merging_personas.jsonl").read_text(encoding="utf-8").splitlines()
        merged = inject(merged, "merging-personas", personas_block([json.loads(line) for line in personas]))
    sona = (ROOT / "docs" / "sona.md").read_text(encoding="utf-8")
    if (DATA / "sona.json").exists():
        measured = json.loads((DATA / "sona.json").read_text(encoding="utf-8"))
        sona = inject(sona, "sona-facts", sona_facts_block(measured))
        sona = inject(sona, "sona-targets", sona_targets_block(measured))
        for name in measured["blocks"]:
            sona = inject(sona, f"sona-{name}", sona_block(measured, name))
    if (DATA / "bandit.json").exists():
        sona = inject(sona, "bandit", bandit_block(json.loads((DATA / "bandit.json").read_text("utf-8"))))
    if (DATA / "sona_soak.json").exists():
        sona = inject(sona, "soak", json.loads((DATA / "sona_soak.json").read_text("utf-8"))["text"])
    formats = (ROOT / "docs" / "formats.md").read_text(encoding="utf-8")
    if (DATA / "interop.json").exists():
        programs = json.loads((DATA / "interop.json").read_text(encoding="utf-8"))
        named = ", ".join(f"{name} {version}" for name, version in programs.items())
        formats = inject(formats, "formats-versions", f"Proven in: {named}.")
    quantized = (ROOT / "docs" / "quantization.md").read_text(encoding="utf-8")
    if (DATA / "quant.json").exists():
        found = json.loads((DATA / "quant.json").read_text(encoding="utf-8"))
        quantized = inject(quantized, "quant", quant_block(found))
        quantized = inject(quantized, "quant-profiles", quant_profiles_block(found))
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    readme = inject(readme, "bench", bench_block(data))
    readme = inject(readme, "demo", demo_block((DATA / "demo.txt").read_text(encoding="utf-8")))
    readme = inject(readme, "merge", demo_block((DATA / "merge.txt").read_text(encoding="utf-8")))
    readme = inject(readme, "doctor", demo_block((DATA / "doctor.txt").read_text(encoding="utf-8")))
    doctor = (ROOT / "docs" / "doctor.md").read_text(encoding="utf-8")
    doctor = inject(doctor, "checks", checks_block())
    return {
        ROOT / "README.md": readme,
        ROOT / "docs" / "doctor.md": doctor,
        ROOT / "docs" / "fusing.md": fusing,
        ROOT / "docs" / "learning.md": learning,
        ROOT / "docs" / "merging.md": merged,
        ROOT / "docs" / "quantization.md": quantized,
        ROOT / "docs" / "sona.md": sona,
        ROOT / "docs" / "formats.md": formats,
        ROOT / "docs" / "training.md": training,
        ROOT / "docs" / "performance.md": performance(data, soaked),
    }


def main() -> int:
    """Writes the pages, or checks them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 where a page differs")
    check = parser.parse_args().check
    stale = []
    for path, text in pages().items():
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            stale.append(path.name)
            if not check:
                path.write_text(text, encoding="utf-8")
    if check and stale:
        print(f"{', '.join(stale)}: figures differ from docs/data; run `make docs`", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
