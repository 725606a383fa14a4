"""The adapters of one seed, trained natively, and what they tell of their data."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from continual.network import softmax
from continual.plan import Feed, Plan, Task
from numpy.typing import NDArray

import microlora as ml
from microlora import _core

from .rows import ALPHA, RANK

Floats = NDArray[np.float32]
#: Tasks of the continual-learning plan that the two adapters are for: 30 and 90 degrees.
DOMAINS = (0, 2)


def layers(plan: Plan) -> list[tuple[Floats, Floats]]:
    """Frozen layers as (W (out, in), b)."""
    return [(w.T.copy(), b) for w, b in zip(plan.weights, plan.biases, strict=True)]


def start(plan: Plan, part: int) -> list[Floats]:
    """First A of every layer, (r, in): every adapter has its own."""
    rng = np.random.default_rng([plan.seed, 20 + part])
    bounds = [1 / np.sqrt(len(w)) for w in plan.weights]
    return [
        rng.uniform(-bound, bound, (RANK, len(w))).astype(np.float32)
        for bound, w in zip(bounds, plan.weights, strict=True)
    ]


def train(plan: Plan, feed: Feed, part: int) -> ml.LoraChain:
    """Adam on both factors of every layer, as the plan says."""
    chain = ml.LoraChain(layers(plan), rank=RANK, alpha=ALPHA, head="cross_entropy")
    zeros = [np.zeros((len(b), RANK), np.float32) for b in plan.biases]
    chain.set_factors(dict(zip(chain.modules(), zip(start(plan, part), zeros, strict=True), strict=True)))
    optimizer = _core.Optimizer(chain, "adamw", weight_decay=0.0)
    for order in feed.orders:
        rates = np.full(-(-len(order) // feed.batch), plan.setup.lr)
        optimizer.train(chain, feed.x, feed.y, order, rates, batch_size=feed.batch)
    return chain


def inputs(chain: ml.LoraChain, x: Floats) -> list[Floats]:
    """What every layer reads when the chain, adapters and all, reads x."""
    out, fused = [x], chain.fuse()
    for w, b in fused[:-1]:
        z = out[-1] @ w.T
        out.append(np.maximum(z if b is None else z + b, 0, dtype=np.float32))
    return out


def observe(chain: ml.LoraChain, task: Task) -> ml.EwcPlusPlus:
    """Importance and input Grams on a task's training rows, in one state."""
    ewc = ml.EwcPlusPlus(chain, kind="delta", fisher="exact")
    ewc.accumulate_fisher(task.x, task.y)
    for module, x in zip(chain.modules(), inputs(chain, task.x), strict=True):
        ewc.grams[module] = ml.collect_gram(chain.lora, x, module)
    return ewc


@dataclass(frozen=True)
class Pair:
    """Both adapters of one seed.

    Attributes:
        plan: Frozen network, splits and orders.
        names: Of the two domains.
        tasks: Their rows.
        adapters: One trained on each, by name.
        statistics: What each saw, as `microlora.merge` takes it: read back from the side-car of its file.
    """

    plan: Plan
    names: tuple[str, str]
    tasks: tuple[Task, Task]
    adapters: dict[str, ml.Adapter]
    statistics: dict[str, Any]

    @classmethod
    def train(cls, plan: Plan, domains: tuple[int, int] = DOMAINS) -> Pair:
        """Trains both, writes them with their side-cars and reads them back."""
        names = tuple(f"domain {i + 1}" for i in domains)
        tasks = tuple(plan.tasks()[i] for i in domains)
        adapters, statistics = {}, {}
        with tempfile.TemporaryDirectory() as folder:
            for part, (name, domain, task) in enumerate(zip(names, domains, tasks, strict=True)):
                chain, path = train(plan, plan.feed(domain), part), Path(folder, f"{part}.safetensors")
                ml.save(chain.lora.adapter(), path)
                observe(chain, task).save(path)
                adapters[name] = ml.load(path)
                statistics[name] = read_statistics(chain.lora, path)
        return cls(plan, (names[0], names[1]), (tasks[0], tasks[1]), adapters, statistics)

    @cached_property
    def joint(self) -> ml.Adapter:
        """One adapter trained on the rows of both domains, for as many epochs."""
        x, y = (np.concatenate([getattr(t, v) for t in self.tasks]) for v in "xy")
        rng, setup = np.random.default_rng([self.plan.seed, 30]), self.plan.setup
        orders = [rng.permutation(len(x)) for _ in range(setup.epochs)]
        return train(self.plan, Feed(x, y, orders, setup.batch), 2).lora.adapter()

    def scores(self, adapters: Sequence[ml.Adapter | None]) -> tuple[float, float]:
        """Accuracy on each domain's test rows through an adapter of its own."""
        first, second = (
            float((logits(self.plan, adapter, task.x_test).argmax(axis=1) == task.y_test).mean())
            for adapter, task in zip(adapters, self.tasks, strict=True)
        )
        return first, second

    def both(self) -> tuple[ml.Adapter, ml.Adapter]:
        """The adapters in the order of the domains."""
        return self.adapters[self.names[0]], self.adapters[self.names[1]]

    def ensemble(self) -> tuple[float, float]:
        """Accuracy of the mean of both adapters' probabilities."""
        out = []
        for task in self.tasks:
            p = sum(softmax(logits(self.plan, adapter, task.x_test)) for adapter in self.both())
            out.append(float((np.argmax(p, axis=1) == task.y_test).mean()))
        return out[0], out[1]


def logits(plan: Plan, adapter: ml.Adapter | None, x: Floats) -> Floats:
    """Outputs of the frozen network with an adapter of any rank."""
    h = x
    for i, (w, b) in enumerate(zip(plan.weights, plan.biases, strict=True)):
        z = h @ w + b
        if adapter is not None:
            a, up = adapter.factors(f"layers.{i}")
            z += np.float32(adapter.info(f"layers.{i}").scaling) * ((h @ a.T) @ up.T)
        h = np.maximum(z, 0) if i + 1 < len(plan.weights) else z
    return h


def delta(adapter: ml.Adapter, module: str) -> NDArray[np.float64]:
    """Weight change (out, in) of a module."""
    a, b = (v.astype(np.float64) for v in adapter.factors(module))
    return adapter.info(module).scaling * (b @ a)


def read_statistics(lora: ml.MicroLoRA, path: Path) -> Any:
    """Importance and Grams of a side-car."""
    return ml.EwcPlusPlus.load(lora, path)
