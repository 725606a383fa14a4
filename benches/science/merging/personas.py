"""The same question on the demo's task: adapters of three personas of the standard library's search, merged.

Every persona's adapter learns from its clicks by RLS, one pass, its A chosen from its own unlabelled queries.
What a persona's queries tell (Gram, importance) is taken from the same clicks. MRR@10 over the whole corpus,
of each persona's held-out queries; splits 10 to 14, nothing tuned. One JSON line per split and row.

PYTHONPATH=benches:benches/science python -m merging.personas --out docs/data/merging_personas.jsonl
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from continual.run import seeds

import microlora as ml
from microlora.demo.corpus import read_corpus
from microlora.demo.experiment import learn
from microlora.demo.session import default_cache_dir, make_encoder, prepare
from microlora.demo.task import Api, Learner, Task, default_api

from . import engines
from .parents import read_statistics
from .rows import BOUNDS, ELEMENT, FACTOR, PEFT, ROWS, WRONG, Row

SPLITS = (10, 11, 12, 13, 14)
RANK = 16
PERSONAS = 3
#: Methods that are of two parents.
OF_TWO = frozenset({"slerp", "nuslerp"})

_BOUNDS = (
    Row("none", BOUNDS, "no adapter"),
    Row("others", BOUNDS, "another persona's adapter (mean of both)"),
    Row("own", BOUNDS, "the persona's own adapter"),
    Row("joint", BOUNDS, "one adapter that learned from all three"),
)


def _third(method: str, **options: Any) -> Row:
    settings = {"weight": round(1 / PERSONAS, 6), **options}
    name = " ".join(["peft", method, *(f"{key}={value}" for key, value in options.items())])
    return Row(name, PEFT, f"PEFT `{method}`", method, settings)


_PEFT = (
    _third("linear"),
    _third("svd", rank=RANK),
    _third("ties_svd", density=0.2, rank=RANK),
)
_METHODS = tuple(
    row
    for row in ROWS.values()
    if row.group in (FACTOR, ELEMENT, WRONG) and not row.options and row.method not in OF_TWO
)
_SUMS = (
    Row("linear rank", FACTOR, "`linear`", "linear", {"rank": RANK}),
    Row("linear weight", FACTOR, "`linear`", "linear", {"weight": 0.7}),
    Row("regmean rank", FACTOR, "`regmean`", "regmean", {"rank": RANK}),
)
#: Every row that is run, bounds first.
TABLE = {row.name: row for row in (*_BOUNDS, *_PEFT, *_METHODS, *_SUMS)}


def learned(task: Task, clicks: Any, seed: int, api: Api) -> Learner:
    """An adapter with the clicks behind it; A spans the clicks' own queries."""
    learner = api.make(RANK, task.dim, seed)
    learner.fit_input_basis(task.queries[clicks])
    learn(learner, task, clicks, api)
    return learner


def observe(lora: ml.MicroLoRA, task: Task, clicks: Any) -> ml.EwcPlusPlus:
    """Importance and Gram of a persona's queries."""
    ewc = ml.EwcPlusPlus(lora, kind="delta", fisher="empirical")
    for i in clicks:
        ewc.accumulate_fisher(task.queries[i], ml.Target(task.documents[i]), base=task.queries[i])
    ewc.grams["embed"] = ml.collect_gram(lora, task.queries[clicks])
    return ewc


class Search:
    """The adapters of one split."""

    def __init__(self, task: Task, seed: int, folder: Path) -> None:
        self.task, self.seed, self.folder = task, seed, folder
        api, streams = default_api(), task.split.stream
        self.adapters: dict[str, ml.Adapter] = {}
        self.statistics: dict[str, Any] = {}
        for n, persona in enumerate(task.personas):
            path = folder / f"{n}.safetensors"
            lora: Any = learned(task, streams[persona], seed + n, api)
            lora.save(path)
            observe(lora, task, streams[persona]).save(path)
            self.adapters[persona] = ml.load(path)
            self.statistics[persona] = read_statistics(lora, path)
        everything = np.concatenate([streams[persona] for persona in task.personas])
        shuffled = np.random.default_rng(seed).permutation(everything)
        together: Any = learned(task, shuffled, seed, api)
        self.joint = together.adapter()

    def mrr(self, adapter: ml.Adapter | None, persona: str) -> float:
        """MRR@10 of a persona's held-out queries through an adapter that went through a file."""
        lora: Any = None
        if adapter is not None:
            ml.save(adapter, self.folder / "tested.safetensors")
            lora = ml.MicroLoRA.load(self.folder / "tested.safetensors")
        return self.task.mrr(lora, self.task.split.held_out[persona])

    def scores(self, row: Row) -> dict[str, float]:
        """MRR@10 of every persona."""
        names = self.task.personas
        if row.name == "own":
            return {name: self.mrr(self.adapters[name], name) for name in names}
        if row.name == "others":
            return {
                name: float(
                    np.mean([self.mrr(self.adapters[other], name) for other in names if other != name])
                )
                for name in names
            }
        if row.group == BOUNDS:
            adapter = self.joint if row.name == "joint" else None
        else:
            adapter = engines.merge(row, self.adapters, self.statistics, self.seed).adapter
        return {name: self.mrr(adapter, name) for name in names}


def main() -> int:
    """Runs every row on every split."""
    parser = argparse.ArgumentParser(prog="merging.personas", description=__doc__.splitlines()[0])
    parser.add_argument("--splits", type=seeds, default=list(SPLITS), help="such as 10-14")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE")
    args = parser.parse_args()
    lines, corpus = [], read_corpus()
    rows = [row for row in TABLE.values() if row.group != PEFT or engines.have_peft()]
    for split in args.splits:
        task = prepare(make_encoder("lsa"), PERSONAS, split, default_cache_dir(), corpus=corpus).task
        with tempfile.TemporaryDirectory() as folder:
            search = Search(task, split, Path(folder))
            for row in rows:
                mrr = search.scores(row)
                said = {"group": row.group, "title": row.title, "setting": row.setting}
                lines.append({"row": row.name, **said, "split": split, "rank": RANK, "mrr": mrr})
                text = "  ".join(f"{name} {value:.3f}" for name, value in mrr.items())
                mean = np.mean(list(mrr.values()))
                print(f"{split} {row.name:24s} {text}  mean {mean:.4f}", file=sys.stderr, flush=True)
    args.out.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
