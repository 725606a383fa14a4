"""One training run: stretches of steps between looks at the validation set, checkpoints and epoch ends."""

from __future__ import annotations

import dataclasses
import math
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from microlora._core import Optimizer
from microlora.exceptions import CancelledError, NonFiniteError, SampleError
from microlora.training import engine
from microlora.training.callbacks import Callbacks, StepsEvent
from microlora.training.checkpoint import Checkpoint
from microlora.training.early_stopping import EarlyStopping
from microlora.training.result import EpochRecord, TrainingHistory, ValidationRecord
from microlora.training.state import refuse_other_ewc

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from microlora._core import ReplayMemory
    from microlora.ewc import EwcPlusPlus
    from microlora.progress import CancelToken, Progress
    from microlora.training.config import AdapterTrainingConfig
    from microlora.training.feeds import Feed
    from microlora.training.rows import Rows
    from microlora.training.schedule import LearningRateSchedule

__all__ = ["Loop"]


@dataclass
class Place:
    """Where a run is, and what it summed up in the epoch so far; all of it goes into a checkpoint."""

    epoch: int = 0
    row: int = 0
    step: int = 0
    loss_sum: float = 0.0
    measured: int = 0
    norm_sum: float = 0.0
    steps: int = 0
    samples: int = 0
    seconds: float = 0.0
    lr: float = 0.0


@dataclass
class Best:
    """The weights of the lowest validation loss."""

    state: engine.State
    loss: float
    epoch: int
    step: int


@dataclass
class Loop:
    """The state of a run and its steps; `AdapterTrainer` sets it up and finishes it."""

    config: AdapterTrainingConfig
    target: Any
    rows: Rows
    feed: Feed
    validation: Feed | None
    schedule: LearningRateSchedule
    optimizer: Optimizer
    ewc: EwcPlusPlus | None
    replay: ReplayMemory | None
    callbacks: Callbacks
    progress: Progress | None
    cancel: CancelToken | None
    save_checkpoint: Callable[[], None] | None
    on_best: Callable[[engine.State], None] | None
    total: int = 0
    place: Place = field(default_factory=Place)
    best: Best | None = None
    start: engine.State | None = None
    epochs: list[EpochRecord] = field(default_factory=list)
    validations: list[ValidationRecord] = field(default_factory=list)
    stop_reason: str | None = None
    failed: str | None = None

    def __post_init__(self) -> None:
        self.stopping = EarlyStopping(self.config.early_stopping_patience, self.config.min_improvement)

    @property
    def history(self) -> TrainingHistory:
        """Every epoch and look so far."""
        return TrainingHistory(tuple(self.epochs), tuple(self.validations))

    def run(self) -> str:
        """Goes on to the end; returns why it ended."""
        if self.start is None and self.best is None:
            self.start = engine.snapshot(
                self.target
            )  # what a run that diverges at its first look goes back to
        self._report()
        while self.stop_reason is None:
            if self.place.epoch >= self.config.epochs:
                self.stop_reason = "completed"
            elif self.place.step >= self.total:
                self.stop_reason = "max_steps"
            else:
                self._epoch()
        if self.stop_reason == "diverged" and self.failed is not None:
            self._close_epoch(None)
        elif self.place.steps:
            self._refuse_silence()
            looked = bool(self.validations) and self.validations[-1].step == self.place.step
            self._close_epoch(self._validate() if not looked else self.validations[-1].loss)
        if self.save_checkpoint is not None:
            self.save_checkpoint()
        assert self.stop_reason is not None
        return self.stop_reason

    def _epoch(self) -> None:
        """From the present place to the end of its epoch, or to where the run stops."""
        order, place = self.rows.order(self.config.training.seed, self.place.epoch), self.place
        if self.feed.tally is not None and not place.row:
            self.feed.tally.reset()
        while place.row < len(order) and place.step < self.total:
            self._stretch(order)
            if self.stop_reason is not None:
                return
            ended = place.row >= len(order)
            if not ended and self._due(self.config.validation_interval):
                self._validate()
                if self.stop_reason is not None:
                    return
            if ended:
                self._end_epoch()
            if self.save_checkpoint is not None and self._due(self.config.checkpoint_every):
                self.save_checkpoint()
            if ended:
                return

    def _due(self, interval: int | None) -> bool:
        return interval is not None and self.place.step % interval == 0

    def _stretch(self, order: NDArray[np.int64]) -> None:
        """Steps up to the next point at which something else is to be done."""
        place, size = self.place, self.config.training.step_size
        left = -(-(len(order) - place.row) // size)
        ends = [place.step + left, self.total]
        for interval in (self.config.validation_interval, self.config.checkpoint_every):
            if interval is not None:
                ends.append((place.step // interval + 1) * interval)
        if self.callbacks.every_step:
            ends.append(place.step + 1)
        steps = min(ends) - place.step
        rows = order[place.row : place.row + steps * size]
        lrs = self.schedule.lrs(np.arange(place.step, place.step + steps))
        before, started = self.optimizer.steps, time.perf_counter()
        try:
            losses, norms = self.feed.steps(
                self.optimizer, self.ewc, self.replay, rows, lrs, self._forwarded(), self.cancel
            )
        except SampleError as error:
            raise self._named(error) from error
        except NonFiniteError as error:  # the step itself: a gradient or weights beyond float32
            place.step += self.optimizer.steps - before
            self.failed, self.stop_reason = str(error), "diverged"
            return
        except BaseException:
            place.step += self.optimizer.steps - before
            raise
        place.seconds += time.perf_counter() - started
        counts = np.full(steps, size)
        counts[-1] = len(rows) - size * (steps - 1)
        # One addition per step, so that a resumed run sums up in the same order.
        for loss, count, norm in zip(losses.tolist(), counts.tolist(), norms.tolist(), strict=True):
            if not math.isnan(loss):
                place.loss_sum += loss * count
                place.measured += count
            place.norm_sum += norm
        place.step += steps
        place.steps += steps
        place.row += len(rows)
        place.samples += len(rows)
        place.lr = float(lrs[-1])
        self._report()
        self.callbacks.steps(StepsEvent(place.epoch, place.step, losses, norms, lrs))

    def _forwarded(self) -> Progress | None:
        """The caller's progress, with this run's counts in place of a stretch's."""
        if self.progress is None:
            return None
        report, start, message = self.progress, self.place.step, self._message()

        def forward(done: int, total: int | None, _: str) -> None:
            report(start + done, self.total, message)

        return forward

    def _message(self) -> str:
        return f"epoch {min(self.place.epoch + 1, self.config.epochs)} of {self.config.epochs}"

    def _report(self) -> None:
        if self.progress is not None:
            self.progress(self.place.step, self.total, self._message())
        if self.cancel is not None and self.cancel.cancelled:
            raise CancelledError("training was cancelled")

    def _named(self, error: SampleError) -> SampleError:
        """The same error with the sample's id and the run's step."""
        name, done = self.rows.ids()[error.row], self.place.step + error.steps_done
        self.place.step = done
        message = f"{error} (sample {name!r}, after step {done})"
        if self.rows.moderate(error.row):
            message += (
                ": the sample's own numbers are finite, so the weights have grown too large; lower the "
                "learning_rate"
            )
            if self.config.save_best and self.best is not None:
                engine.restore(self.target, self.best.state)
                message += "; the learner has the best weights"
        return SampleError(message, row=error.row, steps_done=done, sample_id=name)

    def _validate(self) -> float | None:
        """Looks at the validation set; None where there is none."""
        if self.validation is None:
            return None
        loss = self.validation.evaluate(self.cancel)
        improved = self.stopping.update(loss)
        finite = loss if math.isfinite(loss) else None
        record = ValidationRecord(self.place.step, self.place.epoch, finite, improved)
        self.validations.append(record)
        if improved:
            self.best = Best(engine.snapshot(self.target), loss, self.place.epoch, self.place.step)
            if self.on_best is not None:
                self.on_best(self.best.state)
        if self.stopping.stop:
            self.stop_reason = "diverged" if self.stopping.diverged else "early_stopping"
        self.callbacks.validation(record)
        return finite

    def _refuse_silence(self) -> None:
        """Raises where no sample of this epoch taught anything; a resumed epoch's first part is not known."""
        tally = self.feed.tally
        if tally is not None and tally.rows == self.place.samples:
            tally.refuse_silence("dataset")

    def _end_epoch(self) -> None:
        self._refuse_silence()
        self._close_epoch(self._validate())
        self.place.epoch += 1
        self.place.row = 0

    def _close_epoch(self, val_loss: float | None) -> None:
        """Writes down what the epoch summed up, and starts the sums afresh."""
        p = self.place
        record = EpochRecord(
            epoch=p.epoch,
            train_loss=p.loss_sum / p.measured if p.measured else None,
            val_loss=val_loss,
            learning_rate=p.lr,
            steps=p.steps,
            samples=p.samples,
            seconds=p.seconds,
            grad_norm=p.norm_sum / p.steps if p.steps else 0.0,
        )
        self.epochs.append(record)
        self.place = Place(epoch=p.epoch, row=p.row, step=p.step, lr=p.lr)
        self.callbacks.epoch_end(record)

    # -- checkpoints --

    def checkpoint(self, about: dict[str, Any]) -> Checkpoint:
        """All that a later process needs to go on bit for bit."""
        parts = {
            "snapshot": engine.state_bytes(engine.snapshot(self.target)),
            "optimizer": self.optimizer.to_bytes(),
        }
        best = None
        if self.best is not None:
            parts["best"] = engine.state_bytes(self.best.state)
            best = {"loss": self.best.loss, "epoch": self.best.epoch, "step": self.best.step}
        elif self.start is not None:
            parts["start"] = engine.state_bytes(self.start)
        if self.ewc is not None:
            parts["ewc"] = self.ewc.export_state()
        if self.replay is not None:
            parts["replay"] = self.replay.to_bytes()
        state = {
            **about,
            "place": dataclasses.asdict(self.place),
            "stopping": self.stopping.state(),
            "best": best,
            "history": self.history.to_dict(),
            "stop_reason": self.stop_reason,
            "ewc": None if self.ewc is None else self.ewc.settings,
        }
        return Checkpoint(state, parts)

    def resume(self, checkpoint: Checkpoint) -> None:
        """Goes back to where a checkpoint was written."""
        state, parts = checkpoint.state, checkpoint.parts
        refuse_other_ewc(state["ewc"], None if self.ewc is None else self.ewc.settings)
        place, history = Place(**state["place"]), TrainingHistory.from_dict(state["history"])
        stopping = EarlyStopping(self.config.early_stopping_patience, self.config.min_improvement)
        stopping.restore(state["stopping"])
        best = None
        if state["best"] is not None:
            best = Best(parts["best"], **state["best"])
        start = parts.get("start")
        self.optimizer.restore(parts["optimizer"])
        if self.ewc is not None:
            self.ewc.import_state(parts["ewc"])
        if self.replay is not None:
            self.replay.restore(parts["replay"])
        engine.restore(self.target, parts["snapshot"])
        self.place, self.best, self.start, self.stopping = place, best, start, stopping
        self.epochs, self.validations = list(history.epochs), list(history.validations)
        self.stop_reason = state["stop_reason"]
