"""What a training run reports: measured numbers only."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

__all__ = ["EpochRecord", "TrainingHistory", "TrainingResult", "ValidationRecord"]

STOP_REASONS = ("completed", "early_stopping", "max_steps", "diverged")


@dataclass(frozen=True)
class EpochRecord:
    """One pass over the data, or the part of one that was made.

    Attributes:
        epoch: Counted from 0.
        train_loss: Mean loss of its samples, each before the step that it was part of, penalty not counted;
            None where they are bare gradients, which have none.
        val_loss: Validation loss after it; None without a validation set, or where it was not finite.
        learning_rate: Rate of its last step.
        steps: Optimiser steps.
        samples: Samples.
        seconds: Time spent in those steps; validation, callbacks and checkpoints are not in it.
        grad_norm: Mean norm of the steps' gradients before clipping.
    """

    epoch: int
    train_loss: float | None
    val_loss: float | None
    learning_rate: float
    steps: int
    samples: int
    seconds: float
    grad_norm: float

    @property
    def samples_per_second(self) -> float:
        """Throughput of the steps alone."""
        return self.samples / self.seconds if self.seconds > 0.0 else 0.0


@dataclass(frozen=True)
class ValidationRecord:
    """One look at the validation set.

    Attributes:
        step: Optimiser steps made before it.
        epoch: Epoch in which, or after which, it was made.
        loss: Mean loss; None where it was not finite.
        improved: Whether it was a new best.
    """

    step: int
    epoch: int
    loss: float | None
    improved: bool


@dataclass(frozen=True)
class TrainingHistory:
    """A run, epoch by epoch.

    Attributes:
        epochs: One record per epoch.
        validations: One record per look at the validation set.
    """

    epochs: tuple[EpochRecord, ...] = ()
    validations: tuple[ValidationRecord, ...] = ()

    @property
    def train_losses(self) -> list[float | None]:
        """Training loss of every epoch."""
        return [e.train_loss for e in self.epochs]

    @property
    def val_losses(self) -> list[float | None]:
        """Validation loss after every epoch, as many as `epochs`; every look is in `validations`."""
        return [e.val_loss for e in self.epochs]

    @property
    def learning_rates(self) -> list[float]:
        """Rate of the last step of every epoch."""
        return [e.learning_rate for e in self.epochs]

    def to_dict(self) -> dict[str, Any]:
        """A plain dict that JSON can hold."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, data: Any) -> TrainingHistory:
        """The history of `to_dict`."""
        return cls(
            tuple(EpochRecord(**e) for e in data["epochs"]),
            tuple(ValidationRecord(**v) for v in data["validations"]),
        )


@dataclass(frozen=True)
class TrainingResult:
    """What `AdapterTrainer.train` did.

    Attributes:
        final_loss: Training loss of the last epoch; None where its samples have none.
        best_val_loss: Lowest validation loss; None without a validation set.
        best_epoch: Epoch in which, or after which, it was measured, counted from 0; None without.
        best_step: Steps made when it was measured; None without.
        epochs_completed: Whole passes over the data.
        total_steps: Optimiser steps.
        stop_reason: ``"completed"``, ``"early_stopping"``, ``"max_steps"`` or ``"diverged"`` (a validation
            loss that was not finite, or a gradient that left float32).
        restored_best: Whether the learner ended with the weights of the best validation loss.
        history: Every epoch and every look at the validation set.
        peak_activation_bytes: Most bytes of a chain's activations that were alive at once; 0 for single
            layers, which keep none.
        task: Number of the task this run was, counted from 0: how many were anchored before it.
    """

    final_loss: float | None
    best_val_loss: float | None
    best_epoch: int | None
    best_step: int | None
    epochs_completed: int
    total_steps: int
    stop_reason: str
    restored_best: bool
    history: TrainingHistory
    peak_activation_bytes: int
    task: int

    def to_dict(self) -> dict[str, Any]:
        """A plain dict that JSON can hold."""
        return dataclasses.asdict(self)
