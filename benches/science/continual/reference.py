"""One run of one method in NumPy: what native is compared with, in accuracy and in time."""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .methods import Method
from .network import Adam, Network, Views, residual
from .plan import SCALING, Feed, Plan, Task


@dataclass
class Run:
    """What a run measured.

    Attributes:
        r: Accuracy on task j after training on task i; one row for `joint`.
        train: Seconds of training steps.
        consolidate: Seconds at the tasks' ends (importance, anchors).
        evaluate: Seconds of testing.
    """

    r: NDArray[np.float64]
    train: float = 0.0
    consolidate: float = 0.0
    evaluate: float = 0.0


class Learner:
    """Network, factors and penalty of one run."""

    def __init__(self, plan: Plan, method: Method) -> None:
        self.plan, self.setup = plan, plan.setup
        self.net = Network(plan.weights, plan.biases, SCALING)
        self.f = Views(self.setup.widths, self.setup.rank)
        for ours, first in zip(self.f.a, plan.factors, strict=True):
            ours[:] = first
        self.penalty = method.penalty(self.net, self.f, method.strength.get(self.setup.data, 0.0))

    def train(self, feed: Feed) -> None:
        """All epochs of a task with an optimiser of its own."""
        f, penalty = self.f, self.penalty
        grad, adam = f.like(), Adam(len(f.flat), self.setup.lr)
        squares = f.like() if penalty.squares else None
        for order in feed.orders:
            for k in range(0, len(order), feed.batch):
                rows = order[k : k + feed.batch]
                trace = self.net.forward(feed.x[rows], f)
                self.net.backward(trace, residual(trace.z, feed.y[rows]), f, grad, squares)
                if squares is not None:
                    penalty.seen(squares, len(rows))
                if penalty.path:
                    loss, before = grad.flat.copy(), f.flat.copy()
                if penalty.active:
                    penalty.add_gradient(f, grad)
                adam.step(f.flat, grad.flat)
                if penalty.path:
                    penalty.moved(loss, before, f.flat)

    def end_task(self, task: Task) -> None:
        """What was learned on this task is to stay."""
        self.penalty.end_task(self.f, task.x)

    def accuracy(self, task: Task) -> float:
        """Share of the test rows that are right."""
        return float((self.net.predict(task.x_test, self.f) == task.y_test).mean())


def run(plan: Plan, method: Method, learner: type[Learner] = Learner) -> Run:
    """Trains on one task after another and tests on all after each.

    Args:
        plan: What all runs of this seed share.
        method: A row of the table.
        learner: Who learns; the native one has the same methods.
    """
    one = learner(plan, method)
    tasks = plan.tasks()
    out = Run(np.zeros((1 if method.joint else len(tasks), len(tasks))))
    for i in range(len(out.r)):
        feed = plan.joint() if method.joint else plan.feed(i, method.memory)
        t0 = time.perf_counter()
        one.train(feed)
        t1 = time.perf_counter()
        if i + 1 < len(out.r):
            one.end_task(tasks[i])
        t2 = time.perf_counter()
        out.r[i] = [one.accuracy(task) for task in tasks]
        out.train += t1 - t0
        out.consolidate += t2 - t1
        out.evaluate += time.perf_counter() - t2
    return out
