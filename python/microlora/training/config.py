"""Settings of training: `TrainingConfig` for every loop, `AdapterTrainingConfig` for whole runs."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from microlora._checks import check_keys, choice, flag, integer, real, text, wrong
from microlora.exceptions import ConfigError
from microlora.training.optimizers import OptimizerSettings, as_optimizer, decay_rate
from microlora.training.replay import ReplayConfig
from microlora.training.schedule import LearningRateSchedule, factor, rate
from microlora.training.settings import MAX_COUNT, Settings

__all__ = ["AdapterTrainingConfig", "TrainingConfig"]

EWC_KINDS = ("delta", "factor", "l2", "si", "mas")
FISHERS = ("auto", "exact", "sample", "empirical")
STORAGE = ("f16", "bf16")

# After an epoch of 800 samples of the synthetic tasks (widths 64 to 768, batches of 4) the usual 3e-4 has
# still up to three quarters to learn, this a few percent at most: see the table in docs/training.md.
DEFAULT_LEARNING_RATE = 2e-3
DEFAULT_EPOCHS = 3


@dataclass(frozen=True)
class TrainingConfig(Settings):
    """How weights are learned: batches, step sizes, and what earlier tasks may still say.

    Attributes:
        batch_size: Events of a batch, 1 or more.
        epochs: How often `TrainingPipeline.train_batch` goes through its samples, 1 or more. A whole run
            follows it too, where it is not 1 and `AdapterTrainingConfig.epochs` is left out.
        max_steps: Optimiser steps after which training ends; None has no limit.
        learning_rate: Rate of the schedule, above 0.
        schedule: Name of a schedule (`microlora.training.SCHEDULES`) or a `LearningRateSchedule`, whose
            ``base_lr`` must be left out: ``learning_rate`` is it.
        warmup: Steps of linear warm-up.
        epoch_decay: Factor on the rate after every epoch, above 0 and at most 1.
        optimizer: ``"sgd"``, ``"momentum"``, ``"adamw"``, or settings such as
            ``AdamW(lora_plus_ratio=16.0)``.
        weight_decay: Weight decay in place of the optimiser's own; None leaves that.
        gradient_accumulation: Batches of one optimiser step, 1 or more: the step is that of one batch
            of ``batch_size * gradient_accumulation``.
        max_grad_norm: Norm to which the mean gradient of all modules together is shortened; None does not.
        quality_threshold: Targets of a lower quality are not imitated, and one of quality q counts
            ``(q - threshold) / (1 - threshold)``; 0 up to but not including 1. Rewards and preferences are
            never dropped: a failure is their information.
        ewc_lambda: Strength of the penalty on what earlier tasks need, in the canonical unit (mean loss, mean
            of per-sample squares, factor 1/2). None is the default of its kind; 0 turns it off.
        ewc_kind: ``"delta"``, ``"factor"``, ``"l2"``, ``"si"`` or ``"mas"``; see `EwcPlusPlus`.
        ewc_every: The penalty acts in every n-th step, n-fold: a part of its cost, and the same lambda.
        online_ewc_gamma: ``gamma`` of `EwcPlusPlus`: share of the older tasks' importance that is kept at a
            new task, 0 to 1. Below 1 the oldest task is forgotten first.
        fisher: How importance is estimated: ``"auto"``, ``"exact"``, ``"sample"`` or ``"empirical"``.
            Rewards, bare gradients and cosine targets are no likelihood: ``"auto"`` and ``"empirical"`` take
            their observed gradient, the other two do not count them.
        fisher_samples: Most samples of a task that importance is estimated on; None takes all.
        incremental_update: Go on where the last run or task ended: the optimiser keeps its moments. Otherwise
            each run and each new task starts them afresh.
        seed: Seed of the order of samples and of draws.

    Raises:
        ConfigError: Names the field, the value that came and what was wanted.
    """

    batch_size: int = 4
    epochs: int = 1
    max_steps: int | None = None
    learning_rate: float = DEFAULT_LEARNING_RATE
    schedule: LearningRateSchedule = field(default_factory=LearningRateSchedule)
    warmup: int = 0
    epoch_decay: float = 1.0
    optimizer: OptimizerSettings = field(default_factory=lambda: as_optimizer("adamw"))
    weight_decay: float | None = None
    gradient_accumulation: int = 1
    max_grad_norm: float | None = 1.0
    quality_threshold: float = 0.5
    ewc_lambda: float | None = None
    ewc_kind: str = "delta"
    ewc_every: int = 1
    online_ewc_gamma: float = 1.0
    fisher: str = "auto"
    fisher_samples: int | None = 1024
    incremental_update: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        put = object.__setattr__
        for name in ("batch_size", "epochs", "gradient_accumulation", "ewc_every"):
            put(self, name, integer(name, getattr(self, name), 1, MAX_COUNT))
        for name in ("max_steps", "fisher_samples"):
            put(self, name, _count_or_none(name, getattr(self, name)))
        put(self, "learning_rate", rate("learning_rate", self.learning_rate))
        put(self, "warmup", integer("warmup", self.warmup, 0, MAX_COUNT))
        put(self, "epoch_decay", factor("epoch_decay", self.epoch_decay))
        put(self, "schedule", self._schedule(self.schedule))
        put(self, "optimizer", as_optimizer(self.optimizer))
        if self.weight_decay is not None:
            put(self, "weight_decay", decay_rate("weight_decay", self.weight_decay))
        if self.max_grad_norm is not None:
            put(self, "max_grad_norm", rate("max_grad_norm", self.max_grad_norm))
        want = "a number from 0 up to, but not including, 1"
        threshold = real("quality_threshold", self.quality_threshold, want)
        if not 0.0 <= threshold < 1.0:
            raise wrong("quality_threshold", self.quality_threshold, want)
        put(self, "quality_threshold", threshold + 0.0)
        if self.ewc_lambda is not None:
            put(self, "ewc_lambda", _within("ewc_lambda", self.ewc_lambda, 1e30, " or None"))
        put(self, "ewc_kind", choice("ewc_kind", self.ewc_kind, EWC_KINDS))
        put(self, "online_ewc_gamma", _within("online_ewc_gamma", self.online_ewc_gamma, 1.0))
        put(self, "fisher", choice("fisher", self.fisher, FISHERS))
        put(self, "incremental_update", flag("incremental_update", self.incremental_update))
        put(self, "seed", integer("seed", self.seed, 0, 2**63 - 1))

    def _schedule(self, value: object) -> LearningRateSchedule:
        """The shape of the schedule, refused here where this config could not complete it."""
        if isinstance(value, str):
            value = LearningRateSchedule(value)
        elif isinstance(value, Mapping):
            value = LearningRateSchedule.from_dict(value)
        if not isinstance(value, LearningRateSchedule):
            raise wrong("schedule", value, "the name of a schedule or a LearningRateSchedule")
        for name, ours, own in (
            ("base_lr", "learning_rate", value.base_lr),
            ("warmup", "warmup", value.warmup),
        ):
            if own is not None:
                raise ConfigError(f"schedule.{name}: got {own!r}, expected none: {ours} is it")
        if value.epoch_decay != 1.0:
            raise ConfigError(
                f"schedule.epoch_decay: got {value.epoch_decay!r}, expected 1.0: epoch_decay is it"
            )
        self._shape(value)
        return value

    def _shape(self, value: LearningRateSchedule) -> LearningRateSchedule:
        """The schedule with what these settings say."""
        return dataclasses.replace(
            value, base_lr=self.learning_rate, warmup=self.warmup, epoch_decay=self.epoch_decay
        )

    @property
    def ewc(self) -> bool:
        """Whether earlier tasks are protected at all."""
        return self.ewc_lambda != 0.0

    @property
    def measures_importance(self) -> bool:
        """Whether the penalty needs samples of each task."""
        return self.ewc and self.ewc_kind not in ("l2", "si")

    @property
    def step_size(self) -> int:
        """Events of one optimiser step."""
        return self.batch_size * self.gradient_accumulation

    def bound_schedule(self, total: int | None, epoch_steps: int | None = None) -> LearningRateSchedule:
        """The schedule of a run of ``total`` steps.

        Raises:
            ConfigError: The schedule needs a total and none is known, or the warm-up is as long as the run.
        """
        known = [n for n in (total, self.max_steps) if n is not None]
        return self._shape(self.schedule).bind(
            base_lr=self.learning_rate, total=min(known) if known else None, epoch_steps=epoch_steps
        )

    def for_stream(self) -> TrainingConfig:
        """These settings for a stream without an end: the rate is constant where it would need one.

        A warm-up stays. With ``max_steps``, or a total in the schedule itself, nothing changes.
        """
        decays = self.epoch_decay != 1.0 and self.schedule.epoch_steps is None
        endless = self.max_steps is None and self.schedule.total is None and self.schedule.needs_total
        if not (decays or endless):
            return self
        name = "warmup_constant" if self.warmup else "constant"
        schedule = LearningRateSchedule(name) if endless else self.schedule
        return self.replace(schedule=schedule, epoch_decay=1.0 if decays else self.epoch_decay)

    def optimizer_kwargs(self) -> dict[str, Any]:
        """Keyword arguments of the core's optimiser."""
        kwargs = self.optimizer.kwargs()
        return kwargs if self.weight_decay is None else {**kwargs, "weight_decay": self.weight_decay}

    def ewc_kwargs(self) -> dict[str, Any]:
        """Keyword arguments of `EwcPlusPlus`."""
        return {
            "ewc_lambda": self.ewc_lambda,
            "kind": self.ewc_kind,
            "gamma": self.online_ewc_gamma,
            "fisher": self.fisher,
            "fisher_samples": self.fisher_samples,
            "seed": self.seed,
        }

    @classmethod
    def fast(cls, **changes: Any) -> TrainingConfig:
        """Batches of 8, one epoch."""
        return cls(**{"batch_size": 8, "epochs": 1, **changes})

    @classmethod
    def thorough(cls, **changes: Any) -> TrainingConfig:
        """Batches of 4, three epochs."""
        return cls(**{"batch_size": 4, "epochs": 3, **changes})

    @classmethod
    def incremental(cls, **changes: Any) -> TrainingConfig:
        """Small updates of a trained adapter: a third of the rate, moments kept, earlier tasks protected."""
        small = DEFAULT_LEARNING_RATE / 3.0
        return cls(**{"learning_rate": small, "incremental_update": True, **changes})


@dataclass(frozen=True)
class AdapterTrainingConfig(Settings):
    """A whole training run over a dataset.

    Attributes:
        training: How weights are learned. None given has a cosine schedule. One that is given is taken as it
            is: its own default is ``"constant"``, which cannot be told from a chosen one, so name the
            schedule too, as in ``TrainingConfig(batch_size=16, schedule="cosine")``.
        epochs: Passes over the dataset, 1 or more. Left out (or None) it is ``training.epochs`` where that is
            not 1, else 3.
        validation_interval: Steps between looks at the validation set, which is also looked at after every
            epoch; None looks only then. Small intervals need a large patience: see docs/training.md.
        early_stopping_patience: Looks without improvement after which training stops; 0 never stops early.
            Without a validation set there is nothing to look at.
        min_improvement: Smallest improvement of the validation loss that counts, relative, 0 up to 1.
        gradient_checkpointing: Recompute a chain's activations instead of keeping all: about half the memory
            from 16 layers on, for at most one more forward. Single layers keep no activations: nothing to do.
        mixed_precision: ``"bf16"`` or ``"f16"``: the forward pass reads weights of that width while float32
            masters take the steps; the storage of before comes back after the run. True is ``"bf16"``.
        save_best: End with the weights of the best validation loss; otherwise with the last ones, unless
            early stopping ended the run.
        output_dir: Folder of ``best.safetensors`` and of checkpoints; None writes nothing.
        checkpoint_every: Steps between resumable checkpoints in ``output_dir``; None writes none.
        replay: Rows of earlier tasks that join every batch; None trains on the task's own alone. With replay
            a ``training.ewc_lambda`` of None means no EWC, which does not pay beside it (docs/learning.md);
            a number is followed. Events of `AdapterTrainer.process_event` are neither kept nor joined.

    Raises:
        ConfigError: Names the field, the value that came and what was wanted.
    """

    training: TrainingConfig = field(default_factory=lambda: TrainingConfig(schedule=_named("cosine")))
    epochs: int = None  # type: ignore[assignment]  # __post_init__ puts a number
    validation_interval: int | None = None
    early_stopping_patience: int = 3
    min_improvement: float = 1e-4
    gradient_checkpointing: bool = False
    mixed_precision: str | None = None
    save_best: bool = True
    output_dir: str | None = None
    checkpoint_every: int | None = None
    replay: ReplayConfig | None = None

    def __post_init__(self) -> None:
        put = object.__setattr__
        if isinstance(self.training, Mapping):
            put(self, "training", TrainingConfig.from_dict(self.training))
        if not isinstance(self.training, TrainingConfig):
            raise wrong("training", self.training, "a TrainingConfig")
        if self.epochs is None:
            put(self, "epochs", DEFAULT_EPOCHS if self.training.epochs == 1 else self.training.epochs)
        put(self, "epochs", integer("epochs", self.epochs, 1, MAX_COUNT))
        for name in ("validation_interval", "checkpoint_every"):
            put(self, name, _count_or_none(name, getattr(self, name)))
        patience = integer("early_stopping_patience", self.early_stopping_patience, 0, MAX_COUNT)
        put(self, "early_stopping_patience", patience)
        want = "a number from 0 up to, but not including, 1"
        improvement = real("min_improvement", self.min_improvement, want)
        if not 0.0 <= improvement < 1.0:
            raise wrong("min_improvement", self.min_improvement, want)
        put(self, "min_improvement", improvement + 0.0)
        put(self, "gradient_checkpointing", flag("gradient_checkpointing", self.gradient_checkpointing))
        put(self, "mixed_precision", _storage(self.mixed_precision))
        put(self, "save_best", flag("save_best", self.save_best))
        if self.output_dir is not None:
            put(self, "output_dir", text("output_dir", _path_text(self.output_dir), empty=False))
        if self.checkpoint_every is not None and self.output_dir is None:
            raise wrong(
                "checkpoint_every", self.checkpoint_every, "an output_dir to write checkpoints to, or None"
            )
        if isinstance(self.replay, Mapping):
            put(self, "replay", ReplayConfig.from_dict(self.replay))
        if not (self.replay is None or isinstance(self.replay, ReplayConfig)):
            raise wrong("replay", self.replay, "a ReplayConfig or None")

    @property
    def replays(self) -> bool:
        """Whether rows of earlier tasks can have a say."""
        return self.replay is not None and self.replay.acts

    @property
    def learning(self) -> TrainingConfig:
        """``training``, with EWC off where replay stands in for it and no lambda was chosen."""
        if self.replays and self.training.ewc_lambda is None:
            return self.training.replace(ewc_lambda=0.0)
        return self.training

    @classmethod
    def quick(cls, **changes: Any) -> AdapterTrainingConfig:
        """One epoch at a constant rate of 0.005, patience 1: to see whether something can be learned.

        ``changes`` are fields of this class, or of `TrainingConfig` by their name.
        """
        return cls._preset(TrainingConfig(learning_rate=0.005), changes, epochs=1, early_stopping_patience=1)

    @classmethod
    def stable(cls, **changes: Any) -> AdapterTrainingConfig:
        """Five epochs on a cosine from 0.0005, clipped at 0.5, weight decay 0.02, patience 5.

        Earlier tasks are held 2.5 times as strongly as by default (``ewc_lambda`` 250 of the delta kind).
        ``changes`` are fields of this class, or of `TrainingConfig` by their name.
        """
        training = TrainingConfig(
            learning_rate=0.0005,
            schedule=_named("cosine"),
            max_grad_norm=0.5,
            weight_decay=0.02,
            ewc_lambda=250.0,
        )
        return cls._preset(training, changes, epochs=5, early_stopping_patience=5)

    @classmethod
    def _preset(
        cls, training: TrainingConfig, changes: Mapping[str, Any], **run: Any
    ) -> AdapterTrainingConfig:
        """A preset with changes; a name that both classes have (``epochs``) is the run's."""
        ours = [item.name for item in dataclasses.fields(cls)]
        theirs = [item.name for item in dataclasses.fields(TrainingConfig) if item.name not in ours]
        check_keys("config", changes, (*ours, *theirs))
        given = changes.get("training", training)
        if isinstance(given, Mapping):
            given = TrainingConfig.from_dict(given)
        if not isinstance(given, TrainingConfig):
            raise wrong("training", given, "a TrainingConfig")
        if given.epochs != 1:
            run["epochs"] = given.epochs
        inner = {name: value for name, value in changes.items() if name in theirs}
        outer = {name: value for name, value in changes.items() if name in ours}
        return cls(**{**run, **outer, "training": given.replace(**inner)})


def _named(name: str) -> LearningRateSchedule:
    return LearningRateSchedule(name)


def _count_or_none(name: str, value: object) -> int | None:
    if value is None:
        return None
    return integer(name, value, 1, MAX_COUNT)


def _within(name: str, value: object, high: float, alternative: str = "") -> float:
    want = f"a number from 0 to {high:g}{alternative}"
    number = real(name, value, want)
    if not 0.0 <= number <= high:
        raise wrong(name, value, want)
    return number + 0.0


def _storage(value: object) -> str | None:
    if value is None or value is False:
        return None
    if value is True:
        return "bf16"
    if isinstance(value, str):
        return choice("mixed_precision", value, STORAGE)
    raise wrong("mixed_precision", value, "'bf16', 'f16', True (bf16) or None")


def _path_text(value: object) -> object:
    return os.fspath(value) if isinstance(value, os.PathLike) else value
