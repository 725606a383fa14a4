"""Whole training runs over a dataset: `AdapterTrainer`."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import microlora._core as _core
from microlora._checks import choice
from microlora.exceptions import CancelledError, ConfigError, DTypeError, FormatError
from microlora.progress import CancelToken
from microlora.training import bars, checkpoint, engine
from microlora.training.callbacks import Callbacks
from microlora.training.config import AdapterTrainingConfig
from microlora.training.events import EventLog
from microlora.training.feeds import feed_of
from microlora.training.loop import Loop
from microlora.training.result import TrainingHistory, TrainingResult
from microlora.training.rows import Rows, refuse_shared, rows_of
from microlora.training.state import check_state

if TYPE_CHECKING:
    from microlora.ewc import EwcPlusPlus
    from microlora.progress import Progress

__all__ = ["AdapterTrainer"]

BEST_FILE = "best.safetensors"
# What may differ between a run and the one that resumes it: it has no say in what is learned.
_PLACES = ("output_dir", "checkpoint_every")

_log = logging.getLogger(__name__)


class AdapterTrainer(EventLog):
    """Trains learners and chains on datasets, with validation, early stopping and checkpoints.

    A trainer remembers what it trained: a further `train` of the same learner on other data is a new task, so
    that with ``ewc_lambda`` above 0 the weights are first anchored where the earlier data need them. The
    same data again go on with the same task. With ``replay`` it remembers rows of earlier tasks instead.

    Args:
        config: Settings; None takes the defaults.
        ewc: An `EwcPlusPlus` of the learner that will be trained, which knows earlier tasks. It keeps its own
            settings: ``ewc_lambda``, ``ewc_kind``, ``online_ewc_gamma`` and ``fisher`` of the config are left
            at their defaults, or agree with it.

    Raises:
        DTypeError: ``config`` is none.
        ConfigError: ``ewc`` with ``ewc_lambda`` 0, which would not use it.

    Example:
        >>> import numpy as np, microlora as ml
        >>> lora = ml.MicroLoRA(ml.LoraConfig(rank=2, target_modules=["q_proj"]), hidden_dim=8)
        >>> x = np.random.default_rng(0).standard_normal((64, 8)).astype(np.float32)
        >>> result = ml.AdapterTrainer(ml.AdapterTrainingConfig.quick()).train(lora, (x, 0.1 * x))
        >>> result.total_steps, result.stop_reason
        (16, 'completed')
    """

    def __init__(self, config: AdapterTrainingConfig | None = None, ewc: EwcPlusPlus | None = None) -> None:
        self.config = AdapterTrainingConfig() if config is None else config
        if not isinstance(self.config, AdapterTrainingConfig):
            raise DTypeError(f"config: got {type(config).__name__}, expected AdapterTrainingConfig")
        if ewc is not None and not self.config.training.ewc:
            raise ConfigError("ewc: got one with ewc_lambda 0, expected none, or a lambda above 0")
        self._training = self.config.learning if ewc is None else self.config.training
        self._given_ewc = ewc
        self._written: set[Path] = set()
        super().__init__()
        self.reset()

    def reset(self) -> None:
        """Forgets earlier runs, tasks and events; the learner keeps its weights."""
        super().reset()
        self._target: Any = None
        self._ewc: EwcPlusPlus | None = None
        self._optimizer: _core.Optimizer | None = None
        self._task: str | None = None
        self._before_fisher: bytes | None = None
        self._replay: _core.ReplayMemory | None = None
        self._before_replay: _core.ReplayMemory | None = None
        self._history = TrainingHistory()

    def history(self) -> TrainingHistory:
        """Every epoch and every look at the validation set of the last run, whole or not."""
        return self._history

    @property
    def ewc(self) -> EwcPlusPlus | None:
        """The EWC penalty of the learner trained last; None where it is off."""
        return self._ewc

    @property
    def replay(self) -> _core.ReplayMemory | None:
        """What is remembered of the tasks of the learner trained last; None where replay is off."""
        return self._replay

    def train(
        self,
        lora: Any,
        dataset: Any,
        validation: Any = None,
        callbacks: Sequence[Any] | Callable[..., Any] = (),
        progress: Progress | bool | None = None,
        cancel: CancelToken | None = None,
        resume: bool | str | os.PathLike[str] | None = None,
        modules: Sequence[str] | str | None = None,
        base: str | None = None,
    ) -> TrainingResult:
        """Trains on a dataset.

        Args:
            lora: A `MicroLoRA` or a `LoraChain`; its weights change step by step, while others may read it.
            dataset: An `AdapterDataset`, ``(x, y)`` or ``(x, y, weights)`` with x float32 (n, in_features)
                and y float32 (n, out_features) or int64 labels (n,), or a list of samples. A module's target
                is that of dY, so the frozen layer's output is subtracted from it beforehand.
            validation: The same for held-out data; None takes ``dataset.validation``, if there is one.
            callbacks: See `microlora.training.callbacks`.
            progress: A callable of ``(done, total, message)``, or True for a bar.
            cancel: Looked at every few steps.
            resume: The checkpoint of a run that was cut short, or the folder that it is in, with the same
                settings, data and kind of learner; True takes the one in ``output_dir`` and, with
                ``checkpoint_every``, starts anew where there is none.
            modules: Modules that learn from arrays, or the name of one; None takes all whose widths fit.
            base: ``"input"`` takes each sample's own input for the frozen layer's output, as where embeddings
                are adapted; the widths must be equal. Preferences and contrastive feedback need it on a new
                learner, whose dY is zero. It counts in training, validation and importance. None is no base.

        Returns:
            What was done and measured.

        Raises:
            SampleError: A sample that cannot be learned from. Its step changed nothing, earlier ones stand.
            CancelledError: ``cancel`` was set. The learner has the best weights by validation so far with
                ``save_best``, otherwise the latest.
            ConfigError: Settings that do not fit, an ``ewc`` of another learner, shared samples in training
                and validation data, a checkpoint of other settings, data or learner, or another run's
                checkpoint where this one's would be written.
            LeakageError: Two datasets that share samples, texts or variations.
            ShapeError: No module has the data's widths.
            FeedbackError: No sample of an epoch, or of a look at the validation set, taught anything.
            FormatError: A damaged checkpoint, or one of a newer version.
            OSError: A file could not be written; the one before it is whole.
        """
        training = self._training
        engine.learner_of(lora)
        if not (cancel is None or isinstance(cancel, CancelToken)):
            raise DTypeError(f"cancel: got {type(cancel).__name__}, expected a CancelToken or None")
        rows = rows_of("dataset", dataset, training.quality_threshold)
        if validation is None:
            validation = getattr(dataset, "validation", None)
        held = None if validation is None else rows_of("validation", validation, training.quality_threshold)
        if hasattr(dataset, "with_validation") and hasattr(validation, "with_validation"):
            dataset.with_validation(validation)  # looks for shared ids, texts and variations
        refuse_shared(rows, held)
        names = [modules] if isinstance(modules, str) else None if modules is None else list(modules)
        if base is not None:
            base = choice("base", base, ("input",))
        given = self._given_ewc if self._target is not lora else None
        if given is not None:
            engine.check_ewc(given, lora, training)
        ewc = given if given is not None else self._ewc if self._target is lora else None
        training = engine.follow_ewc(ewc, training)
        feed = feed_of(lora, rows, training, names, base)
        watched = None if held is None else feed_of(lora, held, training, names, base)
        if training.measures_importance and not feed.estimates:
            raise ConfigError(
                f"dataset: got no sample that fisher={training.fisher!r} can estimate importance from, "
                "expected some, or fisher='empirical', or ewc_lambda=0"
            )
        if self.config.replays and not feed.replayable:
            raise ConfigError(
                "replay: got one with samples of their own feedback or a learner with dropout, which are "
                "shown one by one; expected targets or labels as arrays and no dropout, or replay=None"
            )
        if self._target is lora and (memory := self._memory_for(rows)) is not None:
            feed.check_replay(memory)
        if watched is not None and not watched.has_loss:
            raise ConfigError("validation: got bare gradients alone, expected feedback that has a loss")
        steps_per_epoch = -(-len(rows) // training.step_size)
        whole = steps_per_epoch * self.config.epochs
        schedule = training.bound_schedule(whole, steps_per_epoch)
        self._check_flags(lora)
        path = self._checkpoint_path(resume)
        found = None if path is None else checkpoint.read(path)
        about = self._about(rows, held, lora, base)
        if found is not None:
            _refuse_other(str(path), found, about, len(rows))
        self._check_place(path)
        watchers = Callbacks(callbacks)
        with bars.bar(progress) as report, self._storage(lora):
            undo = _Undo(self, resumed=found is not None)
            with undo:
                ewc, optimizer = self._begin(lora, rows, resumed=found is not None)
            loop = Loop(
                config=self.config,
                target=lora,
                rows=rows,
                feed=feed,
                validation=watched,
                schedule=schedule,
                optimizer=optimizer,
                ewc=ewc,
                replay=self._replay,
                callbacks=watchers,
                progress=report,
                cancel=cancel,
                save_checkpoint=None,
                on_best=self._on_best(),
                total=whole if training.max_steps is None else min(whole, training.max_steps),
            )
            if self.config.checkpoint_every is not None:
                place = self._output(checkpoint.FILE_NAME)
                self._written.add(place)
                loop.save_checkpoint = lambda: checkpoint.write(place, loop.checkpoint(about))
            if found is not None:
                with undo:
                    loop.resume(found)
                self._before_fisher = self._before_replay = None
            try:
                reason = loop.run()
            except (CancelledError, KeyboardInterrupt) as error:
                restored = self.config.save_best and loop.best is not None
                if restored and loop.best is not None:
                    engine.restore(lora, loop.best.state)
                if isinstance(error, KeyboardInterrupt):
                    raise
                left = "best" if restored else "latest"
                raise CancelledError(
                    f"training was cancelled after step {loop.place.step}; the learner has the {left} weights"
                ) from error
            finally:
                self._history = loop.history
            return self._finish(loop, rows, reason)

    # -- before a run --

    def _penalty_of(self, lora: Any) -> EwcPlusPlus | None:
        """What holds the events of the learner trained last; the data of its runs are an earlier task."""
        if self._target is not lora or self._ewc is None or engine.is_chain(lora):
            return None
        if self._before_fisher is not None:
            self._ewc.start_new_task()
            self._before_fisher = self._task = None
        return self._ewc

    def _check_flags(self, lora: Any) -> None:
        """Flags that this learner cannot follow are refused."""
        if engine.is_chain(lora) and self.config.gradient_checkpointing and not lora.gradient_checkpointing:
            raise ConfigError(
                "gradient_checkpointing: got True for a chain that was made without, "
                "expected LoraChain(..., gradient_checkpointing=True)"
            )

    @contextlib.contextmanager
    def _storage(self, lora: Any) -> Iterator[None]:
        """Mixed precision for the run alone."""
        wanted = self.config.mixed_precision
        if wanted is None:
            yield
            return
        before = engine.storage_of(lora)
        lora.set_storage(wanted)
        try:
            yield
        finally:
            lora.set_storage(before)

    def _begin(self, lora: Any, rows: Rows, *, resumed: bool) -> tuple[EwcPlusPlus | None, _core.Optimizer]:
        """The penalty and the optimiser of this run; other data than the last run's are a new task."""
        training = self._training
        if self._target is not lora:
            given, self._given_ewc = self._given_ewc, None
            self._target, self._task, self._before_fisher, self._optimizer = lora, None, None, None
            self._before_replay = None
            self._ewc = engine.make_ewc(lora, training) if given is None else given
            self._replay = self.config.replay.memory() if self.config.replay and self.config.replays else None
        elif self._ewc is not None and self._before_fisher is not None and not resumed:
            if self._task == rows.fingerprint:
                self._ewc.import_state(self._before_fisher)
            else:
                self._ewc.start_new_task()
        if not resumed:
            self._replay = self._memory_for(rows)
        self._before_fisher, self._before_replay, self._task = None, None, rows.fingerprint
        if self._optimizer is None or not training.incremental_update:
            self._optimizer = engine.make_optimizer(lora, training)
        return self._ewc, self._optimizer

    def _memory_for(self, rows: Rows) -> _core.ReplayMemory | None:
        """What is remembered of the tasks before this one; the last run's data go on with its task."""
        goes_on = self._before_replay is not None and self._task == rows.fingerprint
        return self._before_replay if goes_on else self._replay

    def _about(self, rows: Rows, held: Rows | None, lora: Any, base: str | None) -> dict[str, Any]:
        """What a checkpoint must agree with."""
        config = {k: v for k, v in self.config.to_dict().items() if k not in _PLACES}
        if not self.config.replays:  # as a checkpoint from before there was replay
            del config["replay"]
        return {
            "config": config,
            "dataset": rows.fingerprint,
            "validation": None if held is None else held.fingerprint,
            "learner": engine.shape_of(lora),
            "network": getattr(lora, "digest", ""),
            "base": base,
            "version": _core.__version__,
            "isa": _core.isa(),
        }

    def _output(self, name: str) -> Path:
        assert self.config.output_dir is not None
        return Path(self.config.output_dir) / name

    def _checkpoint_path(self, resume: bool | str | os.PathLike[str] | None) -> Path | None:
        if resume is None or resume is False:
            return None
        if resume is not True:
            given = Path(resume)
            return given / checkpoint.FILE_NAME if given.is_dir() else given
        if self.config.output_dir is None:
            raise ConfigError("resume: got True without output_dir, expected one, or a checkpoint's path")
        path = self._output(checkpoint.FILE_NAME)
        if path.exists():
            return path
        if self.config.checkpoint_every is None:
            raise ConfigError(
                f"resume: got True, but {path} is not there and checkpoint_every=None never writes it; "
                "expected checkpoint_every, or resume=None"
            )
        return None

    def _check_place(self, resumed: Path | None) -> None:
        """Refuses to write over the checkpoint of a run that this one does not go on from."""
        if self.config.checkpoint_every is None:
            return
        path = self._output(checkpoint.FILE_NAME)
        if path in self._written or not path.exists():
            return
        if resumed is None or not path.samefile(resumed):
            raise ConfigError(
                f"output_dir: {path} is the checkpoint of another run, which this one would write over; "
                "expected resume=True to go on from it, or another output_dir"
            )

    def _on_best(self) -> Callable[[engine.State], None] | None:
        """Writes the best adapter where there is a folder for it."""
        if self.config.output_dir is None or not self.config.save_best:
            return None
        path = self._output(BEST_FILE)

        def write(state: engine.State) -> None:
            checkpoint.write_atomic(path, [engine.state_bytes(state)])

        return write

    # -- after it --

    def _finish(self, loop: Loop, rows: Rows, reason: str) -> TrainingResult:
        stopped = reason in ("early_stopping", "diverged")
        best = loop.best
        restored = best is not None and (stopped or self.config.save_best)
        if restored and best is not None:
            engine.restore(loop.target, best.state)
        elif reason == "diverged" and loop.start is not None:
            engine.restore(loop.target, loop.start)
        if reason == "diverged":
            looked = bool(loop.validations) and loop.validations[-1].loss is None
            why = loop.failed or f"the {'validation loss' if looked else 'gradient'} was not finite"
            _log.warning(
                "training diverged at step %d: %s; a lower learning_rate than %g may help",
                loop.place.step, why, self.config.training.learning_rate,
            )  # fmt: skip
        self._accumulate(loop, rows)
        return TrainingResult(
            final_loss=loop.epochs[-1].train_loss,
            best_val_loss=None if best is None else best.loss,
            best_epoch=None if best is None else best.epoch,
            best_step=None if best is None else best.step,
            epochs_completed=loop.place.epoch,
            total_steps=loop.place.step,
            stop_reason=reason,
            restored_best=restored,
            history=loop.history,
            peak_activation_bytes=loop.optimizer.peak_activation_bytes,
            task=0 if self._ewc is None else self._ewc.task_count,
        )

    def _accumulate(self, loop: Loop, rows: Rows) -> None:
        """Estimates what this task needs, and remembers some of it, at the weights that it ended with."""
        if self._replay is not None:
            before_replay = self._replay.copy()
            loop.feed.remember(self._replay)
            self._before_replay = before_replay
        if self._ewc is None:
            return
        training = engine.follow_ewc(self._ewc, self._training)
        before = self._ewc.export_state()
        if training.measures_importance:
            order = rows.order(training.seed, self.config.epochs)
            loop.feed.accumulate_fisher(self._ewc, order, training.fisher_samples)
        self._before_fisher = before


class _Undo:
    """Puts a trainer back to what it knew, tasks and moments included, where the block raises."""

    FIELDS = (
        "_target", "_given_ewc", "_ewc", "_optimizer", "_task", "_before_fisher", "_replay", "_before_replay",
    )  # fmt: skip

    def __init__(self, trainer: AdapterTrainer, *, resumed: bool) -> None:
        self._trainer = trainer
        self._fields = {name: getattr(trainer, name) for name in self.FIELDS}
        # Only resuming overwrites these, and only it may fail after it has.
        penalties = [e for e in (trainer._ewc, trainer._given_ewc) if e is not None] if resumed else []
        self._penalties = [(ewc, ewc.export_state()) for ewc in penalties]
        if resumed and trainer._replay is not None:
            self._fields["_replay"] = trainer._replay.copy()
        optimizer = trainer._optimizer if resumed else None
        self._moments = None if optimizer is None else (optimizer, optimizer.to_bytes())

    def __enter__(self) -> None:
        """Nothing to do yet."""

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Undoes, where there was an error."""
        if kind is None:
            return
        for name, value in self._fields.items():
            setattr(self._trainer, name, value)
        for ewc, state in self._penalties:
            ewc.import_state(state)
        if self._moments is not None:
            self._moments[0].restore(self._moments[1])


def _refuse_other(path: str, found: checkpoint.Checkpoint, about: dict[str, Any], rows: int) -> None:
    """Refuses a checkpoint of another run, or a state that no run could have written."""
    needed = (*about, "place", "stopping", "best", "history", "stop_reason", "ewc")
    missing = [key for key in needed if key not in found.state]
    if missing:
        raise FormatError(f"{path}: a checkpoint without {', '.join(missing)}")
    if not isinstance(found.state["config"], dict):
        raise FormatError(f"{path}: config: got {found.state['config']!r:.80}, expected a mapping")
    theirs = found.state["config"]
    ours = about["config"]
    if theirs != ours:
        raise ConfigError(
            f"resume: {path} is of a run with other settings: {'; '.join(_differences(theirs, ours))}"
        )
    for key, what in (("learner", "a learner"), ("network", "a chain with a network"), ("base", "a base")):
        if found.state[key] != about[key]:
            came, wanted = found.state[key] or "none", about[key] or "none"
            raise ConfigError(f"resume: {path} is of {what} {came}, this one is of {wanted}")
    for key in ("dataset", "validation"):
        if found.state[key] != about[key]:
            raise ConfigError(f"resume: {path} is of a run on other data ({key})")
    check_state(path, found, rows)
    for key in ("version", "isa"):
        if found.state[key] != about[key]:
            _log.warning(
                "resume: %s was written with %s %s, this is %s: results agree, but not bit for bit",
                path, key, found.state[key], about[key],
            )  # fmt: skip


def _differences(theirs: Mapping[str, Any], ours: Mapping[str, Any], within: str = "") -> list[str]:
    """Every setting that differs, with both values."""
    out: list[str] = []
    for key in sorted({*theirs, *ours}):
        a, b = theirs.get(key), ours.get(key)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            out += _differences(a, b, f"{within}{key}.")
        elif a != b:
            out.append(f"{within}{key}: the checkpoint has {a!r}, these settings {b!r}")
    return out
