"""Policies that run on microlora."""

from __future__ import annotations

import numpy as np

import microlora as ml
from microlora import _core

from .task import ARMS, NAMES, Floats, Task

MODULE = "q_proj"


def learner(task: Task, rank: int, *, fitted: bool, instant: ml.InstantConfig | None = None) -> ml.MicroLoRA:
    """A learner whose module reads the inputs; its outputs are the scores of the arms."""
    config = ml.LoraConfig(
        rank=rank, alpha=2 * rank, target_modules=[MODULE], instant=instant or ml.InstantConfig()
    )
    lora = ml.MicroLoRA(config, dims={MODULE: (task.width, max(rank, ARMS))}, seed=task.seed)
    if fitted:
        lora.fit_input_basis(task.warm())
    return lora


class LinUcb:
    """`Bandit`: LinUCB in the bottleneck of a module."""

    def __init__(self, task: Task, *, rank: int, fitted: bool = True) -> None:
        self.bandit = _core.Bandit(learner(task, rank, fitted=fitted), seed=task.seed)
        self.choice: _core.Choice | None = None

    def choose(self, x: Floats) -> int:
        self.choice = self.bandit.choose(x, NAMES)
        return self.choice.arm

    def learn(self, reward: float, label: int) -> None:
        assert self.choice is not None
        self.bandit.reward(self.choice, reward)


class FullLinUcb(LinUcb):
    """The same code on all d dimensions: A is the identity."""

    def __init__(self, task: Task) -> None:
        eye = np.eye(task.width, dtype=np.float32)
        adapter = ml.Adapter.from_factors({MODULE: (eye, 0 * eye)}, alpha=float(task.width))
        self.bandit = _core.Bandit(ml.MicroLoRA(adapter), seed=task.seed, history=0)


class Greedy:
    """The best score, or with a falling chance any arm; the arm's score learns by NLMS."""

    def __init__(
        self,
        task: Task,
        *,
        feedback: str,
        mu: float | None,
        fitted: bool = True,
        rank: int = 16,
        share: float = 0.1,
    ) -> None:
        instant = ml.InstantConfig(rule="nlms", mu=mu)
        lora = learner(task, rank, fitted=fitted, instant=instant)
        self.module, self.instant = lora[MODULE], lora.instant
        self.rng, self.share, self.events = np.random.default_rng((task.seed, 2)), share, 0
        self.eye = np.eye(lora[MODULE].out_features, dtype=np.float32)
        self.x, self.y, self.arm, self.regresses = self.eye[0], self.eye[0], 0, feedback == "value"

    def choose(self, x: Floats) -> int:
        self.x, self.y = x, self.module.forward(x)
        self.events += 1
        if self.rng.random() < self.share * min(1.0, 500 / self.events):
            self.arm = int(self.rng.integers(ARMS))
        else:
            self.arm = int(self.y[:ARMS].argmax())
        return self.arm

    def learn(self, reward: float, label: int) -> None:
        unit = self.eye[self.arm]
        if self.regresses:
            self.instant(self.x, ml.Gradient(unit * np.float32(self.y[self.arm] - reward)))
        else:
            self.instant(self.x, ml.Reward(reward, unit))
