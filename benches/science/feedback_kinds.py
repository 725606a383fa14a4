"""How much each kind of feedback teaches: `python benches/science/feedback_kinds.py` (or `make science`).

The demo's task: one adapter per persona, one pass over its clicks, one `instant` per click, MRR@10 of
held-out queries over the whole corpus. Splits 10-14 are reported; nothing was tuned here, every rule runs
on its defaults. One JSON line per split and kind; `docs/build.py` makes the table in docs/learning.md.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import microlora as ml
from microlora.demo.corpus import read_corpus
from microlora.demo.session import default_cache_dir, make_encoder, prepare
from microlora.demo.task import Task

Feedback = Any
#: Documents shown for a scalar reward, drawn by their score at this temperature.
SHOWN, TEMPERATURE = 10, 0.05


class Clicks:
    """What a persona's click tells, in one kind of feedback after another."""

    def __init__(self, task: Task, seed: int) -> None:
        self.task, self.rng = task, np.random.default_rng(seed)

    def target(self, i: int, _scores: Any) -> Feedback:
        """The clicked document itself."""
        return ml.Target(self.task.documents[i])

    def contrastive(self, i: int, scores: Any) -> Feedback:
        """The clicked document among the 8 best others and 8 random ones."""
        hard = self._best_others(i, scores, 8)
        wrong = np.concatenate([hard, self.rng.integers(0, len(scores), 8)])
        return ml.Contrastive(self.task.documents[i], self.task.documents[wrong[wrong != i]])

    def preference(self, i: int, scores: Any) -> Feedback:
        """The clicked document over the best other one."""
        other = self._best_others(i, scores, 1)[0]
        return ml.Preference(self.task.documents[i], self.task.documents[other])

    def reward(self, i: int, scores: Any) -> Feedback:
        """One of the ten best documents is shown; 1 if it was the one wanted, else 0."""
        shown = self._best_others(-1, scores, SHOWN)
        p = np.exp((scores[shown] - scores[shown].max()) / TEMPERATURE)
        pick = self.rng.choice(shown, p=p / p.sum())
        return ml.Reward(float(pick == i), self.task.documents[pick])

    def constant(self, i: int, _scores: Any) -> Feedback:
        """A constant gradient whatever was clicked: what must not learn."""
        return ml.Gradient(np.full(self.task.dim, 0.01, np.float32))

    def _best_others(self, i: int, scores: Any, n: int) -> Any:
        best = np.argpartition(-scores, n)[: n + 1]
        best = best[np.argsort(-scores[best])]
        return best[best != i][:n]


KINDS: dict[str, tuple[str, dict[str, Any], Callable[[Clicks], Callable[[int, Any], Feedback]]]] = {
    "target, RLS": ("Target", {}, lambda c: c.target),
    "target, NLMS": ("Target", {"rule": "nlms"}, lambda c: c.target),
    "contrastive, NLMS": ("Contrastive", {}, lambda c: c.contrastive),
    "preference, NLMS": ("Preference", {}, lambda c: c.preference),
    "scalar reward, NLMS": ("Reward", {}, lambda c: c.reward),
    "constant gradient": ("Gradient", {}, lambda c: c.constant),
}


def uplift(task: Task, kind: str, rank: int, seed: int) -> tuple[float, float]:
    """Mean gain over personas after 10 events and after all."""
    _, options, pick = KINDS[kind]
    gains = []
    for persona in task.personas:
        config = ml.LoraConfig(
            rank=rank, alpha=2.0 * rank, target_modules=("embed",), instant=ml.InstantConfig(**options)
        )
        lora = ml.MicroLoRA(config, hidden_dim=task.dim, seed=seed)
        lora.fit_input_basis(task.unlabelled())
        held_out, tell = task.split.held_out[persona], pick(Clicks(task, seed))
        before, early = task.mrr(None, held_out), 0.0
        for n, i in enumerate(task.split.stream[persona]):
            x = task.queries[i]
            scores = task.documents @ (x + lora.forward(x))
            lora.instant(x, tell(int(i), scores), base=x)
            if n == 9:
                early = task.mrr(lora, held_out) - before
        gains.append((early, task.mrr(lora, held_out) - before))
    mean = np.mean(gains, axis=0)
    return float(mean[0]), float(mean[1])


def main() -> int:
    """Runs every kind on every split."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--splits", type=int, nargs="+", default=[10, 11, 12, 13, 14])
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--personas", type=int, default=12)
    parser.add_argument("--out", metavar="FILE", help="where the JSON lines go (default: standard output)")
    args = parser.parse_args()
    lines, corpus = [], read_corpus()
    for split in args.splits:
        encoder = make_encoder("lsa")
        task = prepare(encoder, args.personas, split, default_cache_dir(), corpus=corpus).task
        for kind in KINDS:
            early, late = uplift(task, kind, args.rank, split)
            lines.append({"kind": kind, "split": split, "rank": args.rank, "early": early, "all": late})
            print(json.dumps(lines[-1]), file=sys.stderr, flush=True)
    text = "".join(json.dumps(line) + "\n" for line in lines)
    if args.out:
        Path(args.out).write_text(text, encoding="utf-8")
    else:
        print(text, end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
