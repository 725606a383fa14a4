"""One run of one method in NumPy: what native is compared with, in accuracy and in time."""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .methods import Method
from .network import Adam, Floats, Network, Views, residual
from .plan import SCALING, Feed, Ints, Plan, Task


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
        self.method, self.ended = method, 0
        self.stored = np.zeros((method.memory, self.setup.widths[-1]), np.float32)

    def feed(self, task: int) -> Feed:
        """Rows and batches of a task, with those that replay remembers."""
        return self.plan.feed(task, self.method.memory)

    def train(self, feed: Feed) -> None:
        """All epochs of a task with an optimiser of its own."""
        f, penalty = self.f, self.penalty
        grad, adam = f.like(), Adam(len(f.flat), self.setup.lr)
        squares = f.like() if penalty.squares else None
        for order in feed.orders:
            for k in range(0, len(order), feed.batch):
                rows = order[k : k + feed.batch]
                trace = self.net.forward(feed.x[rows], f)
                g = residual(trace.z, feed.y[rows])
                if self.method.dark and self.ended:
                    self._darken(g, trace.z, rows, len(feed.x) - self.method.memory)
                self.net.backward(trace, g, f, grad, squares)
                if squares is not None:
                    penalty.seen(squares, len(rows))
                if penalty.path:
                    loss, before = grad.flat.copy(), f.flat.copy()
                if penalty.active:
                    penalty.add_gradient(f, grad)
                adam.step(f.flat, grad.flat)
                if penalty.path:
                    penalty.moved(loss, before, f.flat)

    def _darken(self, g: Floats, z: Floats, rows: Ints, first: int) -> None:
        """Adds logit_weight/2 |z - stored|^2 of the old half; means of both halves are summed, as backward
        takes one over all.
        """
        half = len(rows) // 2
        weight = np.float32(self.method.logit_weight[self.setup.data])
        g[half:] += weight * (z[half:] - self.stored[rows[half:] - first])
        g *= 2

    def end_task(self, task: Task) -> None:
        """What was learned on this task is to stay."""
        self.penalty.end_task(self.f, task.x)
        if self.method.dark:
            slots = self.plan.slots(self.ended, self.method.memory)
            new = np.flatnonzero(slots // len(task.x) == self.ended)
            self.stored[new] = self.net.forward(task.x[slots[new] % len(task.x)], self.f).z
        self.ended += 1

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
        feed = plan.joint() if method.joint else one.feed(i)
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
