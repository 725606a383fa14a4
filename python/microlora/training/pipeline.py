"""Training from a stream: samples come one by one, weights move once per batch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from microlora._core import FeedbackBase, Optimizer, StepResult
from microlora.exceptions import ConfigError, DTypeError, NonFiniteError, SampleError
from microlora.training import engine
from microlora.training.config import TrainingConfig
from microlora.training.events_in import event_weight, incoming, weighted
from microlora.training.reservoir import Event, Reservoir

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

    from microlora.ewc import EwcPlusPlus
    from microlora.micro_lora import MicroLoRA
    from microlora.training.schedule import LearningRateSchedule

__all__ = ["BatchOutcome", "PipelineStats", "StepOutcome", "TrainingPipeline"]


@dataclass(frozen=True)
class StepOutcome:
    """What one `TrainingPipeline.train_step` did.

    Attributes:
        result: What ``adapt`` said of the event; None where it was not shown to it.
        applied: Whether this event completed a batch, so that the weights moved.
        learning_rate: Rate of that step; None where none was made.
        loss: Loss of the event before the step; None where its feedback has none.
        reason: Why the event taught nothing; None where it did.
    """

    result: StepResult | None
    applied: bool
    learning_rate: float | None
    loss: float | None
    reason: str | None = None


@dataclass(frozen=True)
class BatchOutcome:
    """What one `TrainingPipeline.train_batch` did.

    Attributes:
        events: Events that taught, over all epochs.
        steps: Optimiser steps.
        skipped: Events passed over for their quality.
        loss: Mean loss of the last epoch's events, each before its step; None where none has one.
        learning_rate: Rate of the last step; None where none was made.
        skipped_other: Events that ``adapt`` gave a reason not to learn from.
        reason: The commonest of all reasons, where no event taught anything; None where one did.
    """

    events: int
    steps: int
    skipped: int
    loss: float | None
    learning_rate: float | None
    skipped_other: int = 0
    reason: str | None = None


@dataclass(frozen=True)
class PipelineStats:
    """Counts since `TrainingPipeline.init_for_lora`.

    Attributes:
        steps: Optimiser steps.
        events: Events that taught.
        skipped_quality: Targets passed over because their quality was below the threshold.
        skipped_other: Events that ``adapt`` gave a reason not to learn from.
        pending: Events that wait for their batch to be complete.
        tasks: Tasks that were ended by `TrainingPipeline.start_new_task`.
        mean_loss: Mean loss of all events that have one, each before its step.
        last_loss: Loss of the last such event.
        learning_rate: Rate of the last step.
        fisher_samples: Events of the present task that importance will be estimated on.
    """

    steps: int = 0
    events: int = 0
    skipped_quality: int = 0
    skipped_other: int = 0
    pending: int = 0
    tasks: int = 0
    mean_loss: float | None = None
    last_loss: float | None = None
    learning_rate: float | None = None
    fisher_samples: int = 0


@dataclass
class _Counts:
    steps: int = 0
    events: int = 0
    skipped_quality: int = 0
    skipped_other: int = 0
    tasks: int = 0
    losses: int = 0
    loss_sum: float = 0.0
    last_loss: float | None = None
    learning_rate: float | None = None


@dataclass
class _Run:
    """What belongs to the learner that the pipeline was made ready for."""

    lora: MicroLoRA
    optimizer: Optimizer
    ewc: EwcPlusPlus | None
    schedule: LearningRateSchedule
    reservoir: Reservoir
    config: TrainingConfig
    pending: int = 0
    learned: int = 0
    counts: _Counts = field(default_factory=_Counts)


class TrainingPipeline:
    """Learns from events as they come: ``batch_size * gradient_accumulation`` of them make one step.

    Between tasks `start_new_task` anchors the weights, and with ``ewc_lambda`` above 0 later steps are held
    back where earlier tasks need the weights to stay. Their importance is estimated at the weights that a
    task ends with, on a uniform draw of at most ``fisher_samples`` of its events, which are kept for that
    (three vectors each). Not for several threads at once; reading the learner from others is fine.

    Args:
        config: Settings; a schedule that needs a total takes it from ``max_steps``.

    Raises:
        DTypeError: ``config`` is none.

    Example:
        >>> import numpy as np, microlora as ml
        >>> lora = ml.MicroLoRA(ml.LoraConfig(rank=4, target_modules=["q_proj"]), hidden_dim=16)
        >>> pipeline = ml.TrainingPipeline(ml.TrainingConfig(batch_size=2)).init_for_lora(lora)
        >>> x = np.eye(16, dtype=np.float32)
        >>> [pipeline.train_step(lora, x[i], ml.Target(x[i + 1])).applied for i in range(4)]
        [False, True, False, True]
    """

    def __init__(self, config: TrainingConfig | None = None) -> None:
        self.config = TrainingConfig() if config is None else config
        if not isinstance(self.config, TrainingConfig):
            raise DTypeError(f"config: got {type(config).__name__}, expected TrainingConfig")
        self._run: _Run | None = None

    def init_for_lora(self, lora: MicroLoRA, ewc: EwcPlusPlus | None = None) -> TrainingPipeline:
        """Makes the optimiser and the EWC penalty of a learner; counts start at 0.

        Args:
            lora: The learner. Gradients that it already holds would be part of the first step.
            ewc: An `EwcPlusPlus` of this learner that knows earlier tasks; None starts without any.

        Returns:
            The pipeline itself.

        Raises:
            ConfigError: The schedule needs a total and ``max_steps`` is None; or ``ewc`` with
                ``ewc_lambda`` 0, which would not use it, of another learner, or beside other settings.
            DTypeError: ``lora`` is no learner.
        """
        config = self.config
        if engine.is_chain(lora):
            raise DTypeError("lora: got a LoraChain, expected a MicroLoRA (AdapterTrainer trains chains)")
        if ewc is not None and not config.ewc:
            raise ConfigError("ewc: got one with ewc_lambda 0, expected none, or a lambda above 0")
        learner = engine.learner_of(lora)
        if ewc is not None:
            engine.check_ewc(ewc, learner, config)
            config = engine.follow_ewc(ewc, config)
        self._run = _Run(
            lora=learner,
            optimizer=engine.make_optimizer(learner, config),
            ewc=engine.make_ewc(learner, config) if ewc is None else ewc,
            schedule=config.bound_schedule(None),
            reservoir=Reservoir(config.fisher_samples if config.measures_importance else 0, config.seed),
            config=config,
        )
        return self

    @property
    def ewc(self) -> EwcPlusPlus | None:
        """The EWC penalty; None where it is off or no learner is set up."""
        return self._run.ewc if self._run else None

    def train_step(
        self,
        lora: MicroLoRA,
        x: ArrayLike,
        feedback: FeedbackBase,
        module: str | None = None,
        base: ArrayLike | None = None,
        quality: float | None = None,
        weight: float = 1.0,
    ) -> StepOutcome:
        """Takes one event; every ``batch_size * gradient_accumulation`` of them the weights move.

        Args:
            lora: The learner of `init_for_lora`.
            x: float32 (in_features,): the layer's input.
            feedback: As for ``adapt``.
            module: Name of the module; None where there is only one.
            base: float32 (out_features,): output of the frozen layer; see ``adapt``.
            quality: How good the sample is, 0 to 1. It decides over a `Target` alone: below
                ``quality_threshold`` it is passed over, else it counts ``(q - threshold) / (1 - threshold)``.
                None counts fully.
            weight: Factor of a target's loss in the mean, above 0.

        Returns:
            What was done.

        Raises:
            ConfigError: Another learner, none was set up, or a ``weight`` out of its range or with feedback
                that is no target.
            FeedbackError: ``quality`` out of its range.
            NonFiniteError: NaN in the quality or in the sample. Nothing changes in any error.
        """
        run = self._ready(lora)
        weight = event_weight(quality, weight, feedback, self.config.quality_threshold)
        counts = run.counts
        if weight == 0.0:
            counts.skipped_quality += 1
            return StepOutcome(None, False, None, None, "quality")
        if self.config.max_steps is not None and counts.steps >= self.config.max_steps:
            return StepOutcome(None, False, None, None, "max_steps")
        if weight == 1.0:
            result = run.lora.adapt(x, feedback, module, base)
            loss = result.loss_before
        else:
            loss, gradient = weighted(run.lora, x, feedback, module, base, weight)
            result = run.lora.adapt(x, gradient, module, base)
        if not result.applied:
            counts.skipped_other += 1
            return StepOutcome(result, False, None, loss, result.reason)
        run.pending += 1
        counts.events += 1
        if loss is not None:
            counts.losses += 1
            counts.loss_sum += loss
            counts.last_loss = loss
        run.learned += 1
        if run.ewc is not None and engine.can_estimate(run.config, feedback):
            run.reservoir.offer(lambda: Event.copy_of(x, feedback, module, base))
        if run.pending < self.config.step_size:
            return StepOutcome(result, False, None, loss)
        return StepOutcome(result, True, self._step(run), loss)

    def _ready(self, lora: MicroLoRA) -> _Run:
        if self._run is None:
            raise ConfigError("lora: got one before init_for_lora, expected init_for_lora(lora) first")
        if self._run.lora is not lora:
            raise ConfigError("lora: got another learner than that of init_for_lora, expected the same")
        return self._run

    def _step(self, run: _Run) -> float:
        lr = run.schedule.lr(run.counts.steps)
        config = self.config
        run.optimizer.step(
            run.lora, lr, max_grad_norm=config.max_grad_norm, ewc=run.ewc, ewc_every=config.ewc_every
        )
        run.pending = 0
        run.counts.steps += 1
        run.counts.learning_rate = lr
        return lr

    def flush(self, lora: MicroLoRA) -> bool:
        """Makes a step of the events that wait, fewer than a batch; returns whether there were any.

        Raises:
            ConfigError: Another learner, or none was set up.
        """
        run = self._ready(lora)
        if not run.pending:
            return False
        self._step(run)
        return True

    def train_batch(
        self,
        lora: MicroLoRA,
        samples: Iterable[Any] | ArrayLike,
        y: ArrayLike | None = None,
        *,
        module: str | None = None,
        base: ArrayLike | None = None,
        quality: ArrayLike | None = None,
    ) -> BatchOutcome:
        """Takes several samples, ``epochs`` times over; what does not fill a batch waits as in `train_step`.

        Args:
            lora: The learner of `init_for_lora`.
            samples: `TrainingSample` values, ``(x, feedback)`` pairs, or float32 (n, in_features) with ``y``.
                Arrays ``(x, y)`` and ``(x, y, weights)`` are taken as by `AdapterTrainer`.
            y: float32 (n, out_features): targets, where ``samples`` is an array.
            module: Name of the module; None where there is only one.
            base: float32 (n, out_features): outputs of the frozen layer, with arrays only.
            quality: (n,): quality of each row, with arrays only.

        Returns:
            Counts and mean loss; where all events were passed over, why.

        Raises:
            ConfigError: Another learner, or arguments that do not go together.
            DTypeError: Something that is no sample.
            SampleError: NaN or infinity in a sample, named by its row and id; those before it count.
            MicroLoraError: As `train_step`, at the first bad sample; those before it count.
        """
        run = self._ready(lora)
        listed = list(samples) if isinstance(samples, Iterator) else samples
        events = list(incoming(listed, y, base, quality))
        before = (run.counts.events, run.counts.steps, run.counts.skipped_quality, run.counts.skipped_other)
        losses: list[float] = []
        reasons: Counter[str] = Counter()
        for _ in range(self.config.epochs):
            losses.clear()
            for row, event in enumerate(events):
                where = module if event.module is None else event.module
                try:
                    outcome = self.train_step(
                        lora, event.x, event.feedback, where, event.base, event.quality, event.weight
                    )
                except NonFiniteError as error:
                    name = getattr(listed[row], "id", None) if isinstance(listed, list | tuple) else None
                    shown = "" if name is None else f", sample {name!r}"
                    raise SampleError(
                        f"{error} (row {row}{shown})",
                        row=row,
                        steps_done=run.counts.steps - before[1],
                        sample_id=name,
                    ) from error
                if outcome.loss is not None:
                    losses.append(outcome.loss)
                if outcome.reason is not None:
                    reasons[outcome.reason] += 1
        counts = run.counts
        steps = counts.steps - before[1]
        return BatchOutcome(
            events=counts.events - before[0],
            steps=steps,
            skipped=counts.skipped_quality - before[2],
            loss=float(np.mean(losses)) if losses else None,
            learning_rate=counts.learning_rate if steps else None,
            skipped_other=counts.skipped_other - before[3],
            reason=reasons.most_common(1)[0][0] if reasons and counts.events == before[0] else None,
        )

    def start_new_task(self, lora: MicroLoRA) -> None:
        """Ends the present task: flushes, estimates importance at these weights and anchors them.

        Unless ``incremental_update`` is set the optimiser's moments start afresh.

        Raises:
            ConfigError: Another learner; no event was learned since the last task; or none of them says what
                the task needs (with ``fisher`` "exact" or "sample" only what is a likelihood does).
        """
        run = self._ready(lora)
        if not run.learned:
            raise ConfigError("start_new_task: got no event since the last task, expected one or more")
        if run.ewc is not None and run.config.measures_importance and not len(run.reservoir):
            raise ConfigError(
                f"start_new_task: got no event that fisher={run.config.fisher!r} can estimate importance "
                "from, expected some, or fisher='empirical'"
            )
        self.flush(lora)
        if run.ewc is not None:
            for event in run.reservoir.drain():
                run.ewc.accumulate_fisher(event.x, event.feedback, event.module, event.base)
            run.ewc.start_new_task()
        if not self.config.incremental_update:
            run.optimizer = engine.make_optimizer(run.lora, self.config)
        run.learned = 0
        run.counts.tasks += 1

    def stats(self) -> PipelineStats:
        """Counts since `init_for_lora`; zeros before it."""
        run = self._run
        if run is None:
            return PipelineStats()
        c = run.counts
        return PipelineStats(
            steps=c.steps,
            events=c.events,
            skipped_quality=c.skipped_quality,
            skipped_other=c.skipped_other,
            pending=run.pending,
            tasks=c.tasks,
            mean_loss=c.loss_sum / c.losses if c.losses else None,
            last_loss=c.last_loss,
            learning_rate=c.learning_rate,
            fisher_samples=len(run.reservoir),
        )
