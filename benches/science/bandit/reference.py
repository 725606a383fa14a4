"""Policies in NumPy: what the native ones are measured against, and what loses.

All scores are ``y = s (x A) B``; steps are normalised by the curvature of both factors (NLMS).
"""

from __future__ import annotations

import numpy as np

from .task import ARMS, Floats, Task

SCALE, BETA, FLOOR = np.float32(2.0), 0.1, 0.02


class Chance:
    """Any arm."""

    def __init__(self, task: Task) -> None:
        self.rng = np.random.default_rng((task.seed, 3))

    def choose(self, x: Floats) -> int:
        return int(self.rng.integers(ARMS))

    def learn(self, reward: float, label: int) -> None:
        pass


class FullLinUcb:
    """LinUCB with one model per arm on all d dimensions (Li et al. 2010, arXiv 1003.0146)."""

    def __init__(self, task: Task, *, alpha: float = 0.3) -> None:
        d, self.alpha = task.width, np.float32(alpha)
        self.p = np.stack([np.eye(d, dtype=np.float32)] * ARMS)
        self.theta = np.zeros((ARMS, d), np.float32)

    def choose(self, x: Floats) -> int:
        self.x, self.pu = x, self.p @ x
        bonus = self.alpha * np.sqrt(np.maximum(self.pu @ x, 0) + 1e-12)
        self.arm = int(np.argmax(self.theta @ x + bonus))
        return self.arm

    def learn(self, reward: float, label: int) -> None:
        a, pu = self.arm, self.pu[self.arm]
        gain = pu / (1 + self.x @ pu)
        self.p[a] -= np.outer(gain, pu)
        self.theta[a] += gain * (reward - self.theta[a] @ self.x)


class Adapter:
    """Two factors and a normalised step; subclasses say which arm, and which gradient of the scores."""

    def __init__(self, task: Task, *, rate: float, fitted: bool, rank: int = 16) -> None:
        self.rng, self.rate = np.random.default_rng((task.seed, 4)), rate
        if fitted:
            warm = task.warm()
            self.a = np.linalg.eigh(warm.T @ warm)[1][:, ::-1][:, :rank].astype(np.float32)
        else:
            width = np.sqrt(3 / task.width)
            self.a = self.rng.uniform(-width, width, (task.width, rank)).astype(np.float32)
        self.b = np.zeros((rank, ARMS), np.float32)
        self.baseline = 0.1

    def choose(self, x: Floats) -> int:
        self.x, self.u = x, x @ self.a
        self.y = SCALE * (self.u @ self.b)
        self.arm = self.pick()
        return self.arm

    def pick(self) -> int:
        """Drawn from the softmax of the scores, with a floor."""
        self.p = (1 - FLOOR) * self.softmax() + FLOOR / ARMS
        return int(self.rng.choice(ARMS, p=self.p / self.p.sum()))

    def softmax(self) -> Floats:
        z = np.exp((self.y - self.y.max()) / BETA)
        return z / z.sum()

    def learn(self, reward: float, label: int) -> None:
        advantage = reward - self.baseline
        self.baseline += 0.02 * advantage
        g = np.asarray(self.gradient(reward, advantage, label), np.float32)
        w = self.b @ g
        curvature = SCALE**2 * (self.u @ self.u + (self.x @ self.x) * (self.b * self.b).sum())
        step = np.float32(self.rate / (curvature + 1e-2)) * SCALE
        self.a -= step * np.outer(self.x, w)
        self.b -= step * np.outer(self.u, g)

    def gradient(self, reward: float, advantage: float, label: int) -> Floats:
        raise NotImplementedError


class FullInformation(Adapter):
    """Told the label: cross entropy."""

    def pick(self) -> int:
        return int(np.argmax(self.y))

    def gradient(self, reward: float, advantage: float, label: int) -> Floats:
        g = self.softmax()
        g[label] -= 1
        return g


class Reinforce(Adapter):
    """REINFORCE (Williams 1992) with a running baseline."""

    def gradient(self, reward: float, advantage: float, label: int) -> Floats:
        g = self.p * advantage
        g[self.arm] -= advantage
        return g


class Weighted(Adapter):
    """Advantage-weighted regression (arXiv 1910.00177)."""

    def gradient(self, reward: float, advantage: float, label: int) -> Floats:
        w = min(np.exp(advantage / 0.3), 20.0) * BETA
        g = self.p * w
        g[self.arm] -= w
        return g


class Perturbed(Adapter):
    """Node perturbation: noise on the scores that decided, weighted by what it earned."""

    def pick(self) -> int:
        self.noise = self.rng.standard_normal(ARMS) * 0.3
        return int(np.argmax(self.y + self.noise))

    def gradient(self, reward: float, advantage: float, label: int) -> Floats:
        return -0.1 * advantage * self.noise / 0.09


class Constant(Adapter):
    """A constant pushed into every score, times the reward: what the first design of such adapters does."""

    def gradient(self, reward: float, advantage: float, label: int) -> Floats:
        return np.full(ARMS, 0.01 * reward**2, np.float32)
