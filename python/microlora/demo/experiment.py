"""One adapter per persona learns from its clicks; held-out queries are ranked before and after."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from microlora.demo.corpus import Split
from microlora.demo.evaluate import mrr, ranks_of
from microlora.exceptions import ConfigError
from microlora.progress import CancelToken, Progress

__all__ = [
    "EARLY",
    "SGD_RATE",
    "Api",
    "Learner",
    "PersonaResult",
    "Task",
    "default_api",
    "learn",
    "run_persona",
]

EARLY = 10
"""Clicks after which the first look is taken."""

SGD_RATE = 0.3
"""Learning rate of the baseline: the best of 0.1, 0.3, 1, 3, 10 on splits that are not reported."""


class Learner(Protocol):
    """The part of `microlora.MicroLoRA` that the experiment uses."""

    def forward(self, x: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """The change that the adapter makes to the output for ``x``."""

    def fit_input_basis(self, x: npt.NDArray[np.float32]) -> Any:
        """Choose A from unlabelled inputs."""

    def instant(self, x: npt.NDArray[np.float32], feedback: Any, *, base: npt.NDArray[np.float32]) -> Any:
        """Learn from one event at once."""

    def adapt(self, x: npt.NDArray[np.float32], feedback: Any, *, base: npt.NDArray[np.float32]) -> Any:
        """Accumulate the gradient of one event."""

    def apply_updates(self, lr: float) -> Any:
        """Take a step along the accumulated gradient."""

    def save(self, path: str | Path) -> Any:
        """Write the adapter."""


@dataclass(frozen=True, slots=True)
class Api:
    """How learners and feedback are made: by `microlora` itself, or by a twin in a test."""

    make: Callable[[int, int, int], Learner]  # (rank, dim, seed)
    load: Callable[[Path], Learner]
    target: Callable[[npt.NDArray[np.float32]], Any]


def default_api() -> Api:
    """The package's own learner."""
    import importlib

    ml: Any = importlib.import_module("microlora")

    def make(rank: int, dim: int, seed: int) -> Learner:
        config = ml.LoraConfig(rank=rank, alpha=2.0 * rank, target_modules=("query",))
        learner: Learner = ml.MicroLoRA(config, hidden_dim=dim, seed=seed)
        return learner

    return Api(make, ml.MicroLoRA.load, ml.Target)


@dataclass(frozen=True, slots=True)
class Task:
    """The encoded corpus and who clicks what.

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

    def unlabelled(self) -> npt.NDArray[np.float32]:
        """The stream queries of every module, without their clicks: what a search log holds."""
        return self.queries[self.split.all_stream()]

    def others(self, persona: str) -> npt.NDArray[np.int64]:
        """Held-out queries of the other personas."""
        rest = [self.split.held_out[name] for name in self.personas if name != persona]
        return np.concatenate(rest) if rest else np.zeros(0, np.int64)

    def ranks(self, learner: Learner | None, which: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Places of the queries ``which``, through ``learner`` or without an adapter."""
        x = self.queries[which]
        moved = x if learner is None else x + learner.forward(x)
        return ranks_of(moved, self.documents, which)

    def mrr(self, learner: Learner | None, which: npt.NDArray[np.int64]) -> float:
        """MRR@10 of the queries ``which``; the whole corpus is the candidates."""
        return mrr(self.ranks(learner, which))


@dataclass(frozen=True, slots=True)
class PersonaResult:
    """What one persona's adapter learned. All but the counts and times are MRR@10 of held-out queries.

    Attributes:
        persona: its module.
        clicks: events in its stream.
        held_out: queries it is measured on.
        before: without an adapter.
        early: after the first 10 clicks.
        after: after all clicks.
        others_before: the other personas' queries without an adapter; nan for a lone persona.
        others_after: the same through this persona's adapter.
        sgd_early: the baseline, random A and SGD on both factors, after 10 clicks.
        sgd_after: the same after all clicks.
        event_ns: duration of each `instant` call, int64 (clicks,).
    """

    persona: str
    clicks: int
    held_out: int
    before: float
    early: float
    after: float
    others_before: float
    others_after: float
    sgd_early: float
    sgd_after: float
    event_ns: npt.NDArray[np.int64]

    @property
    def uplift(self) -> float:
        """Gain in MRR@10 after all clicks."""
        return self.after - self.before


def learn(
    learner: Learner,
    task: Task,
    clicks: npt.NDArray[np.int64],
    api: Api,
    *,
    early: Callable[[], None] | None = None,
    cancel: CancelToken | None = None,
) -> npt.NDArray[np.int64]:
    """Feed the clicks to ``learner.instant``, one at a time and each once.

    The frozen layer is the identity: query q is moved to q + forward(q), and the click's target is the
    clicked document.

    Args:
        learner: it learns in place.
        task: the encoded corpus.
        clicks: pairs clicked, in order.
        api: makes the feedback.
        early: called after the first 10 clicks, or after the last of fewer.
        cancel: looked at before each click.

    Returns:
        Nanoseconds of each `instant` call alone, int64 (clicks,).
    """
    spent = np.zeros(len(clicks), np.int64)
    clock = time.perf_counter_ns
    for n, i in enumerate(clicks):
        if cancel is not None:
            cancel.raise_if_cancelled("learning")
        x, feedback = task.queries[i], api.target(task.documents[i])
        start = clock()
        learner.instant(x, feedback, base=x)
        spent[n] = clock() - start
        if early is not None and n + 1 == min(EARLY, len(clicks)):
            early()
    return spent


def _sgd(task: Task, persona: str, learner: Learner, api: Api, rate: float) -> tuple[float, float]:
    """The baseline: A as drawn, a gradient step on both factors after each click."""
    clicks, held_out = task.split.stream[persona], task.split.held_out[persona]
    early = task.mrr(None, held_out)
    for n, i in enumerate(clicks):
        x = task.queries[i]
        learner.adapt(x, api.target(task.documents[i]), base=x)
        learner.apply_updates(rate)
        if n + 1 == min(EARLY, len(clicks)):
            early = task.mrr(learner, held_out)
    return early, task.mrr(learner, held_out)


def run_persona(
    task: Task,
    persona: str,
    rank: int,
    seed: int,
    api: Api,
    *,
    sgd_rate: float = SGD_RATE,
    cancel: CancelToken | None = None,
) -> tuple[PersonaResult, Learner]:
    """Let one persona's adapter learn, and measure it and the baselines.

    Args:
        task: the encoded corpus.
        persona: a module of ``task.personas``.
        rank: of the adapter.
        seed: of its random start.
        api: makes learners and feedback.
        sgd_rate: learning rate of the baseline.
        cancel: looked at before each click.

    Returns:
        The figures, and the learner in its final state.

    Raises:
        ConfigError: ``persona`` is not in the task.
        CancelledError: ``cancel`` was set.
    """
    if persona not in task.personas:
        raise ConfigError(f"persona {persona!r} is not one of {', '.join(task.personas)}")
    clicks, held_out, others = task.split.stream[persona], task.split.held_out[persona], task.others(persona)
    dim = task.queries.shape[1]
    learner = api.make(rank, dim, seed)
    learner.fit_input_basis(task.unlabelled())
    before = task.mrr(None, held_out)
    looks: list[float] = []
    spent = learn(
        learner, task, clicks, api, early=lambda: looks.append(task.mrr(learner, held_out)), cancel=cancel
    )
    sgd_early, sgd_after = _sgd(task, persona, api.make(rank, dim, seed), api, sgd_rate)
    result = PersonaResult(
        persona=persona,
        clicks=len(clicks),
        held_out=len(held_out),
        before=before,
        early=looks[0],
        after=task.mrr(learner, held_out),
        others_before=task.mrr(None, others) if len(others) else float("nan"),
        others_after=task.mrr(learner, others) if len(others) else float("nan"),
        sgd_early=sgd_early,
        sgd_after=sgd_after,
        event_ns=spent,
    )
    return result, learner


def run_all(
    task: Task,
    personas: Sequence[str],
    rank: int,
    seed: int,
    api: Api,
    *,
    progress: Progress | None = None,
    cancel: CancelToken | None = None,
) -> list[tuple[PersonaResult, Learner]]:
    """`run_persona` for each of ``personas``, reporting (personas done, personas in all, name)."""
    out = []
    for n, persona in enumerate(personas):
        if progress is not None:
            progress(n, len(personas), f"{persona} clicks")
        out.append(run_persona(task, persona, rank, seed, api, cancel=cancel))
    if progress is not None:
        progress(len(personas), len(personas), "all personas have clicked")
    return out
