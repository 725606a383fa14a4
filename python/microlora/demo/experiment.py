"""One adapter per persona learns from its clicks; held-out queries are ranked before and after."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from microlora.demo.task import Api, Learner, Task
from microlora.exceptions import ConfigError, NonFiniteError
from microlora.progress import CancelToken

__all__ = ["EARLY", "SGD_RATE", "PersonaResult", "learn", "run_persona", "start"]

EARLY = 10
"""Clicks after which the first look is taken."""

SGD_RATE = 0.4
"""Learning rate of the baseline: the best of 0.1 to 0.7 on splits other than those reported; 0.7 diverged."""


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
        sgd_early: the baseline, random A and SGD on both factors, after 10 clicks; nan if it diverged.
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


def start(task: Task, rank: int, seed: int, api: Api) -> Learner:
    """A fresh learner whose A spans the search log's unlabelled queries.

    Raises:
        ConfigError: ``rank`` is not from 1 to the encoder's dimension.
    """
    if not 1 <= rank <= task.dim:
        raise ConfigError(f"rank is {rank}; from 1 to {task.dim}, the encoder's dimension, is wanted")
    learner = api.make(rank, task.dim, seed)
    learner.fit_input_basis(task.unlabelled())
    return learner


def learn(
    learner: Learner,
    task: Task,
    clicks: npt.NDArray[np.int64],
    api: Api,
    *,
    early: Callable[[], None] | None = None,
    cancel: CancelToken | None = None,
) -> npt.NDArray[np.int64]:
    """Feed the clicks to ``learner.instant``, each once; the target is the clicked document.

    Args:
        learner: it learns in place.
        task: the encoded corpus.
        clicks: pairs clicked, in order.
        api: makes the feedback.
        early: called after the first 10 clicks, or after the last of fewer.
        cancel: looked at before each click.

    Returns:
        Nanoseconds of each `instant` call alone, int64 (clicks,).

    Raises:
        CancelledError: ``cancel`` was set.
    """
    spent = np.zeros(len(clicks), np.int64)
    clock = time.perf_counter_ns
    for n, i in enumerate(clicks):
        if cancel is not None:
            cancel.raise_if_cancelled("learning")
        x, feedback = task.queries[i], api.target(task.documents[i])
        begin = clock()
        learner.instant(x, feedback, base=x)
        spent[n] = clock() - begin
        if early is not None and n + 1 == min(EARLY, len(clicks)):
            early()
    return spent


def _sgd(task: Task, persona: str, learner: Learner, api: Api, rate: float) -> tuple[float, float]:
    """The baseline: A as drawn, a gradient step on both factors after each click; nan if it diverges."""
    clicks, held_out = task.split.stream[persona], task.split.held_out[persona]
    early = float("nan")
    try:
        with np.errstate(over="ignore", invalid="ignore"):
            for n, i in enumerate(clicks):
                x = task.queries[i]
                learner.adapt(x, api.target(task.documents[i]), base=x)
                learner.apply_updates(rate)
                if n + 1 == min(EARLY, len(clicks)):
                    early = task.mrr(learner, held_out)
            return early, task.mrr(learner, held_out)
    except NonFiniteError:
        return early, float("nan")


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
        ConfigError: ``persona`` is not in the task, or ``rank`` is out of range.
        CancelledError: ``cancel`` was set.
    """
    if persona not in task.personas:
        raise ConfigError(f"persona is {persona!r}; one of {', '.join(task.personas)} is wanted")
    clicks, held_out, others = task.split.stream[persona], task.split.held_out[persona], task.others(persona)
    learner = start(task, rank, seed, api)
    looks: list[float] = []
    spent = learn(
        learner, task, clicks, api, early=lambda: looks.append(task.mrr(learner, held_out)), cancel=cancel
    )
    sgd_early, sgd_after = _sgd(task, persona, api.make(rank, task.dim, seed), api, sgd_rate)
    result = PersonaResult(
        persona=persona,
        clicks=len(clicks),
        held_out=len(held_out),
        before=task.mrr(None, held_out),
        early=looks[0],
        after=task.mrr(learner, held_out),
        others_before=task.mrr(None, others),
        others_after=task.mrr(learner, others),
        sgd_early=sgd_early,
        sgd_after=sgd_after,
        event_ns=spent,
    )
    return result, learner
