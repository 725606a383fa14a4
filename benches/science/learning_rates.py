"""Which rate one epoch wants: `python benches/science/learning_rates.py` (or `make science-learning`).

Made-up tasks of known optimum, several widths, several rates: the share of what can be learned that is still
missing on held-out samples after one epoch, `(loss - best possible) / (untrained - best possible)`. One JSON
line per width, task and rate; `docs/build.py` makes the table in docs/training.md.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

import microlora as ml
from microlora import _core, data

TASKS = ("coder", "reviewer")
WIDTHS = (64, 256, 768)
RATES = (3e-4, 1e-3, 2e-3, 5e-3, 1e-2)


def missing(lora: Any, dataset: Any) -> float:
    """Share of the way from an untrained adapter to the best possible that is not made."""
    x, t, _ = dataset.validation.arrays()
    loss = float(np.mean(_core.evaluate(lora, x, t), dtype=np.float64))
    best, untrained = dataset.optimum.best_loss, dataset.optimum.zero_loss
    return (loss - best) / (untrained - best)


def measure(samples: int, seed: int) -> list[dict[str, Any]]:
    """Every rate on every task and width, each from the same start and in the same order."""
    training = ml.TrainingConfig(optimizer="adamw", batch_size=4, schedule="cosine", ewc_lambda=0.0)
    lines = []
    for width in WIDTHS:
        for task in TASKS:
            dataset = data.SyntheticDataGenerator(width, seed).generate(task, samples)
            for rate in RATES:
                config = ml.AdapterTrainingConfig(
                    training=training.replace(learning_rate=rate), epochs=1, early_stopping_patience=0
                )
                lora = ml.create_lora(task, width, seed=seed)
                # Bare arrays: the last weights count, not the best look at the samples held out.
                x, t, _ = dataset.arrays()
                result = ml.AdapterTrainer(config).train(lora, (x, t))
                line = {"width": width, "task": task, "rank": lora.config.rank, "rate": rate}
                line |= {"missing": missing(lora, dataset), "samples": len(x), "steps": result.total_steps}
                lines.append({**line, "seed": seed})
    return lines


def table(lines: list[dict[str, Any]]) -> str:
    """The table in Markdown: a row per width and task, a column per rate."""
    rates = sorted({line["rate"] for line in lines})
    rows: dict[tuple[int, str], dict[float, str]] = {}
    for line in lines:
        name = f"`{line['task']}` (rank {line['rank']})"
        rows.setdefault((line["width"], name), {})[line["rate"]] = f"{line['missing']:.3f}"
    out = ["| width | task | " + " | ".join(f"{r:g}" for r in rates) + " |", "|" + "---|" * (len(rates) + 2)]
    for (width, name), row in rows.items():
        out.append(f"| {width} | {name} | " + " | ".join(row[r] for r in rates) + " |")
    return "\n".join(out)


def main() -> int:
    """Trains, tests, writes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=1000, help="per task; every fifth is held out")
    parser.add_argument("--seed", type=int, default=20)
    parser.add_argument("--out", metavar="FILE", help="where the JSON lines go (default: standard output)")
    args = parser.parse_args()
    started = time.perf_counter()
    lines = measure(args.samples, args.seed)
    text = "".join(json.dumps(line) + "\n" for line in lines)
    if args.out:
        Path(args.out).write_text(text, encoding="utf-8")
    else:
        print(text, end="")
    print(f"{table(lines)}\n{time.perf_counter() - started:.0f} s", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
