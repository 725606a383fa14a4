"""The rows of the table: who plays, on which images, how often.

Step sizes and the kind of A were chosen on seeds 0 and 1 of the digits for value regression and the losing
rows; bandits and `Reward` run on their defaults. Seeds from 20 on are reported.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from . import native, reference
from .task import Policy, Task

SEEDS = {"digits": (20, 21, 22, 23, 24), "mnist": (20, 21, 22)}
NOISES = (0.0, 0.1)
EVENTS = 4000
BOTH = ("digits", "mnist")


@dataclass(frozen=True)
class Row:
    """One policy."""

    name: str
    title: str
    engine: str
    make: Callable[..., Policy]
    options: dict[str, Any] = field(default_factory=dict)
    data: tuple[str, ...] = BOTH
    noises: tuple[float, ...] = NOISES
    #: Learns from scalars alone and is meant to.
    scalar: bool = True

    def policy(self, task: Task) -> Policy:
        """Ready to play."""
        return self.make(task, **self.options)


NATIVE, NUMPY = "microlora", "NumPy"

_ROWS = (
    Row("full-information", "full information (told the label)", NUMPY, reference.FullInformation,
        {"rate": 1.0, "fitted": True}, scalar=False),
    Row("linucb", "LinUCB, all d dimensions", NUMPY, reference.FullLinUcb),
    Row("linucb-native", "LinUCB, all d dimensions", NATIVE, native.FullLinUcb, noises=(0.0,)),
    Row("bottleneck-16", "bottleneck LinUCB, r = 16", NATIVE, native.LinUcb, {"rank": 16}),
    Row("bottleneck-32", "bottleneck LinUCB, r = 32", NATIVE, native.LinUcb, {"rank": 32}),
    Row("bottleneck-random", "bottleneck LinUCB, r = 32, random A", NATIVE, native.LinUcb,
        {"rank": 32, "fitted": False}),
    Row("value", "value regression, NLMS, r = 16", NATIVE, native.Greedy,
        {"feedback": "value", "mu": 0.5}),
    Row("value-random", "value regression, NLMS, r = 16, random A", NATIVE, native.Greedy,
        {"feedback": "value", "mu": 0.5, "fitted": False}),
    Row("advantage", "advantage regression (`Reward`), r = 16", NATIVE, native.Greedy,
        {"feedback": "advantage", "mu": None}),
    Row("reinforce", "REINFORCE", NUMPY, reference.Reinforce, {"rate": 0.5, "fitted": False}),
    Row("awr", "advantage-weighted regression", NUMPY, reference.Weighted, {"rate": 0.2, "fitted": False}),
    Row("perturbation", "node perturbation", NUMPY, reference.Perturbed, {"rate": 1.0, "fitted": True}),
    Row("constant", "constant gradient", NUMPY, reference.Constant, {"rate": 0.5, "fitted": True},
        scalar=False),
    Row("chance", "any arm", NUMPY, reference.Chance, scalar=False),
)  # fmt: skip
ROWS = {row.name: row for row in _ROWS}
