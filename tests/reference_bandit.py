"""Float64 twin of the bandit: LinUCB (Li et al. 2010, arXiv 1003.0146) by solving each ridge system."""

from __future__ import annotations

import numpy as np

from microlora import _core
from support import normal

ARMS = ["short", "long", "none"]


def bottleneck(a, scaling, x):
    """``u = s x A`` of inputs (n, in), with A as (rank, in)."""
    return scaling * np.asarray(x, np.float64) @ np.asarray(a, np.float64).T


class Twin:
    """The arms' models, always solved from all that they have seen."""

    def __init__(self, alpha=0.3, ridge=1.0, epsilon=0.0):
        self.alpha, self.ridge, self.epsilon = alpha, ridge, epsilon
        self.unit = None
        self.seen = {}

    def context(self, u):
        """Takes notice of a context: the first one with a length sets the unit."""
        if self.unit is None and u @ u > 0:
            self.unit = u @ u

    def model(self, name, rank):
        """theta and the covariance P of an arm."""
        events = self.seen.get(name, [])
        u = np.array([e[0] for e in events]).reshape(-1, rank)
        gram = self.ridge * (self.unit or 1.0) * np.eye(rank) + u.T @ u
        return np.linalg.solve(gram, u.T @ np.array([e[1] for e in events])), np.linalg.inv(gram)

    def scores(self, u, arms):
        """``theta . u + alpha sqrt(u P u)``."""
        models = [self.model(name, len(u)) for name in arms]
        return np.array([theta @ u + self.alpha * np.sqrt(max(u @ p @ u, 0.0)) for theta, p in models])

    def probabilities(self, u, arms):
        """What every arm's chance is."""
        scores = self.scores(u, arms)
        best = np.isclose(scores, scores.max(), rtol=1e-9, atol=1e-12)
        return (1 - self.epsilon) * best / best.sum() + self.epsilon / len(arms)

    def reward(self, name, u, reward):
        """Returns what was expected."""
        expected = self.model(name, len(u))[0] @ u
        self.seen.setdefault(name, []).append((np.array(u), reward))
        return expected


def off_policy(propensities, rewards, probabilities):
    """IPS and SNIPS with their errors."""
    p, r, q = (np.asarray(v, np.float64) for v in (propensities, rewards, probabilities))
    w, n = q / p, len(r)
    ips, snips = np.mean(w * r), np.sum(w * r) / np.sum(w)
    return {
        "ips": ips,
        "ips_error": np.std(w * r, ddof=1) / np.sqrt(n) if n > 1 else 0.0,
        "snips": snips,
        "snips_error": np.sqrt(np.sum((w * (r - snips)) ** 2)) / np.sum(w),
        "weight": np.mean(w),
        "effective": np.sum(w) ** 2 / np.sum(w**2),
        "events": n,
    }


def taught(lora, r, events=40, **settings):
    """A bandit that has learned, with what it saw: (input, arm, reward)."""
    bandit, seen = _core.Bandit(lora, epsilon=0.3, **settings), []
    for _ in range(events):
        x = normal(r, lora["m"].in_features)
        choice, reward = bandit.choose(x, ARMS), float(r.uniform())
        bandit.reward(choice, reward)
        seen.append((x, choice.name, reward))
    return bandit, seen
