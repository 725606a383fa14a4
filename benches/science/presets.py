"""Five presets on five made-up tasks: `python benches/science/presets.py` (or `make science-learning`).

Each preset learns the task of its name; then every adapter is tested on every task's held-out samples. The
best possible loss is known, so the distance to it is printed. One JSON line per task and adapter;
`docs/build.py` makes the table in docs/learning.md.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

import microlora as ml
from microlora import _core, data


def train(name: str, dataset: Any, hidden_dim: int, seed: int) -> tuple[Any, Any]:
    """The preset's adapter after training on its task, and what the trainer reports."""
    lora = ml.create_lora(name, hidden_dim, seed=seed)
    return lora, ml.AdapterTrainer(ml.AdapterTrainingConfig.stable()).train(lora, dataset)


def losses(lora: Any, dataset: Any) -> float:
    """Mean held-out loss `1/2 |dY - t|^2` over samples and modules."""
    x, t, _ = dataset.validation.arrays()
    return float(np.mean(_core.evaluate(lora, x, t), dtype=np.float64))


def measure(hidden_dim: int, seed: int, samples: int) -> list[dict[str, Any]]:
    """Every adapter on every task."""
    tasks = data.SyntheticDataGenerator(hidden_dim, seed).generate_all(samples)
    lines = []
    for adapter, own in tasks:
        lora, result = train(adapter, own, hidden_dim, seed)
        steps = {"steps": result.total_steps, "epochs": result.epochs_completed}
        for task, dataset in tasks:
            held_out = {
                "loss": losses(lora, dataset),
                "best": dataset.optimum.best_loss,
                "untrained": dataset.optimum.zero_loss,
            }
            line = {"task": task, "adapter": adapter, **held_out, **steps}
            lines.append({**line, "hidden_dim": hidden_dim, "samples": samples, "seed": seed})
            print(json.dumps(lines[-1]), file=sys.stderr, flush=True)
    return lines


def beaten(lines: list[dict[str, Any]]) -> list[str]:
    """Tasks whose own adapter is not the best on them."""
    rows: dict[str, dict[str, float]] = {}
    for line in lines:
        rows.setdefault(line["task"], {})[line["adapter"]] = line["loss"]
    return [task for task, row in rows.items() if row[task] != min(row.values())]


def main() -> int:
    """Trains, tests, writes; says which adapter lost on its own task."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--hidden-dim", type=int, default=768)
    parser.add_argument("--samples", type=int, default=2000, help="per task; every fifth is held out")
    parser.add_argument("--seed", type=int, default=20)
    parser.add_argument("--out", metavar="FILE", help="where the JSON lines go (default: standard output)")
    args = parser.parse_args()
    lines = measure(args.hidden_dim, args.seed, args.samples)
    text = "".join(json.dumps(line) + "\n" for line in lines)
    if args.out:
        Path(args.out).write_text(text, encoding="utf-8")
    else:
        print(text, end="")
    lost = beaten(lines)
    if lost:
        print(f"MISSED: another adapter is better on {', '.join(lost)}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
