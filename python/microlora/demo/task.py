"""The encoded search task, and what it asks of a learner."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from microlora.demo.corpus import Split
from microlora.demo.evaluate import mrr, ranks_of

__all__ = ["Api", "Learner", "Task", "default_api"]


class Learner(Protocol):
    """The part of `microlora.MicroLoRA` that the demo uses."""

    @property
    def param_count(self) -> int:
        """Numbers in both factors."""

    def forward(self, x: npt.NDArray[np.float32], /) -> npt.NDArray[np.float32]:
        """The change that the adapter makes to the output for ``x``."""

    def fit_input_basis(self, x: npt.NDArray[np.float32], /) -> Any:
        """Choose A from unlabelled inputs."""

    def instant(self, x: npt.NDArray[np.float32], feedback: Any, /, *, base: npt.NDArray[np.float32]) -> Any:
        """Learn from one event at once."""

    def adapt(self, x: npt.NDArray[np.float32], feedback: Any, /, *, base: npt.NDArray[np.float32]) -> Any:
        """Accumulate the gradient of one event."""

    def apply_updates(self, lr: float, /) -> Any:
        """Take a step along the accumulated gradient."""

    def save(self, path: str | Path, /) -> Any:
        """Write the adapter."""


@dataclass(frozen=True, slots=True)
class Api:
    """How learners and feedback are made.

    Attributes:
        make: a fresh learner from (rank, dim, seed), its A drawn at random and B zero.
        load: a learner from a file that ``save`` wrote.
        target: feedback that says which output was wanted.
    """

    make: Callable[[int, int, int], Learner]
    load: Callable[[Path], Learner]
    target: Callable[[npt.NDArray[np.float32]], Any]


def default_api() -> Api:
    """The package's own learner, with one module ``embed`` and alpha of twice the rank."""
    import microlora as ml

    def make(rank: int, dim: int, seed: int) -> Learner:
        config = ml.LoraConfig(rank=rank, alpha=2.0 * rank, target_modules=("embed",))
        return ml.MicroLoRA(config, hidden_dim=dim, seed=seed)

    return Api(make, ml.MicroLoRA.load, ml.Target)


@dataclass(frozen=True, slots=True)
class Task:
    """The encoded corpus and who clicks what.

    The frozen layer is the identity: a learner moves query q to q + forward(q).

    Attributes:
        queries: float32 (n, d), rows of length 1.
        documents: float32 (n, d), rows of length 1; row i is what query i looks for.
        split: the stream and the held-out queries of each module.
        personas: the modules that take part.
    """

    queries: npt.NDArray[np.float32]
    documents: npt.NDArray[np.float32]
    split: Split
    personas: tuple[str, ...]

    @property
    def dim(self) -> int:
        """Length of the vectors."""
        return int(self.queries.shape[1])

    def unlabelled(self) -> npt.NDArray[np.float32]:
        """The stream queries of every module, without their clicks: what a search log holds."""
        return self.queries[self.split.all_stream()]

    def others(self, persona: str) -> npt.NDArray[np.int64]:
        """Held-out queries of the other personas, int64 indices."""
        rest = [self.split.held_out[name] for name in self.personas if name != persona]
        return np.concatenate(rest) if rest else np.zeros(0, np.int64)

    def ranks(self, learner: Learner | None, which: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Places, 0 the best, of the queries ``which`` through ``learner``, or without an adapter."""
        x = self.queries[which]
        moved = x if learner is None else x + learner.forward(x)
        return ranks_of(moved, self.documents, which)

    def mrr(self, learner: Learner | None, which: npt.NDArray[np.int64]) -> float:
        """MRR@10 of the queries ``which``; the whole corpus is the candidates; nan for no query."""
        return mrr(self.ranks(learner, which)) if len(which) else float("nan")
