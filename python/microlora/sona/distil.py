"""An ensemble as a teacher: its outputs to imitate, and its held-out loss beside the student's."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from microlora._core import Reward, Target
from microlora.exceptions import ConfigError, FeedbackError
from microlora.micro_lora import MicroLoRA
from microlora.sona.consolidation import Consolidation
from microlora.sona.gather import remembered
from microlora.training.events_in import InEvent

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from microlora.sona.loop import SonaLoop

    Forward = Callable[[Any, str], NDArray[np.float32]]

__all__ = ["heldout_loss", "lessons", "teacher_of"]


def teacher_of(loop: SonaLoop) -> tuple[Forward, int]:
    """What the ensemble serves, and how many members it has.

    Raises:
        ConfigError: The loop has no ensemble.
    """
    if loop.config.consolidation != Consolidation.ENSEMBLE:
        raise ConfigError(
            f"distill: got True with consolidation {loop.config.consolidation!r}, expected 'ensemble': there "
            "is one adapter already"
        )
    return loop.forward, len(loop.ensemble())


def lessons(loop: SonaLoop, teacher: Forward, events: list[InEvent]) -> list[InEvent]:
    """The inputs of the events with the teacher's outputs as targets, one for each module that fits."""
    out = []
    for event in events:
        for module in _modules(loop, event):
            out.append(InEvent(event.x, Target(teacher(event.x, module)), module))
    return out


def heldout_loss(loop: SonaLoop, forwards: list[Forward]) -> tuple[list[float], int]:
    """Mean held-out loss of outputs ``dY = forward(x, module)``, and the number of samples measured.

    Every kind has its own loss; that of a reward is ``1/2 (e . dY - kappa (R - b))^2`` with b the mean of the
    held-out rewards, the same for all that are compared.

    Returns:
        A loss for each of ``forwards``; empty without a sample that has one.
    """
    events = remembered(loop, held_out=True)
    rewards = [e.feedback.r for e in events if isinstance(e.feedback, Reward)]
    baseline = float(np.mean(rewards)) if rewards else 0.0
    # dY of a new learner is zero, so that the output to measure goes in as the base.
    probe = MicroLoRA(loop.lora.config, dims=dict(loop.adapter().dims))
    kappa = loop.lora.config.instant.kappa
    rows: list[list[float]] = []
    for event in events:
        for module in _modules(loop, event):
            outputs = [forward(event.x, module) for forward in forwards]
            found = [_loss(probe, event, module, y, kappa, baseline) for y in outputs]
            known = [loss for loss in found if loss is not None]
            if len(known) == len(forwards):
                rows.append([event.weight * loss for loss in known] + [event.weight])
    if not rows:
        return [], 0
    total = np.sum(rows, axis=0)
    return [float(v / total[-1]) for v in total[:-1]], len(rows)


def _loss(
    probe: MicroLoRA, event: InEvent, module: str, y: Any, kappa: float, baseline: float
) -> float | None:
    feedback = event.feedback
    if isinstance(feedback, Reward):
        along = float(feedback.response.astype(np.float64) @ y)
        return 0.5 * (along - kappa * (feedback.r - baseline)) ** 2
    base = y if event.base is None else y + event.base
    try:
        return probe.adapt(event.x, feedback, module, base).loss_before
    except FeedbackError:  # an output of zero has no angle
        return None
    finally:
        probe.apply_updates(0.0)


def _modules(loop: SonaLoop, event: InEvent) -> list[str]:
    if event.module is not None:
        return [event.module]
    shape = (len(event.x), event.feedback.width)
    return [m for m in loop.modules() if (loop.lora[m].in_features, loop.lora[m].out_features) == shape]
