"""The same runs through `microlora`: a chain of frozen layers, its optimiser, `EwcPlusPlus`."""

from __future__ import annotations

from typing import Any

import numpy as np

import microlora as ml
from microlora import _core

from .methods import Method
from .plan import SCALING, Feed, Plan, Task
from .reference import Learner, Run
from .reference import run as run_with


class NativeLearner(Learner):
    """Chain and penalty of one run."""

    def __init__(self, plan: Plan, method: Method) -> None:
        self.plan, self.setup, self.method = plan, plan.setup, method
        self.memory: Any = None
        if method.dark:
            # It keeps and draws rows of its own: the same law as the plan's, other numbers.
            weights = {"label_weight": 1.0, "logit_weight": method.logit_weight[self.setup.data]}
            self.memory = _core.ReplayMemory(capacity=method.memory, **weights, seed=plan.seed)
        layers = [(w.T.copy(), b) for w, b in zip(plan.weights, plan.biases, strict=True)]
        rank = self.setup.rank
        self.chain = ml.LoraChain(layers, rank=rank, alpha=SCALING * rank, head="cross_entropy")
        first = zip(plan.factors, plan.biases, strict=True)
        self.chain.set_factors(
            {
                f"layers.{i}": (a.T.copy(), np.zeros((len(b), rank), np.float32))
                for i, (a, b) in enumerate(first)
            }
        )
        self.ewc: Any = None
        if method.native is not None:
            self.ewc = ml.EwcPlusPlus(self.chain, method.strength[self.setup.data], **method.native)

    def feed(self, task: int) -> Feed:
        return self.plan.feed(task, 0 if self.method.dark else self.method.memory)

    def train(self, feed: Feed) -> None:
        optimizer = _core.Optimizer(self.chain, "adamw", weight_decay=0.0)
        for order in feed.orders:
            optimizer.train(
                self.chain,
                feed.x,
                feed.y,
                order,
                np.full(-(-len(order) // feed.batch), self.setup.lr),
                batch_size=feed.batch,
                ewc=self.ewc,
                accumulate_fisher=self.method.while_training,
                replay=self.memory,
            )

    def end_task(self, task: Task) -> None:
        if self.memory is not None:
            self.memory.offer(self.chain, task.x, task.y)
        if self.ewc is None:
            return
        if not self.method.while_training and self.ewc.kind in ("delta", "factor", "mas"):
            self.ewc.accumulate_fisher(task.x, task.y)
        self.ewc.start_new_task()

    def accuracy(self, task: Task) -> float:
        return float((self.chain.predict(task.x_test) == task.y_test).mean())


def run(plan: Plan, method: Method) -> Run:
    """Trains on one task after another and tests on all after each."""
    return run_with(plan, method, NativeLearner)
