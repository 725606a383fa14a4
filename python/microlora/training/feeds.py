"""How rows reach the core: arrays in whole stretches of steps, other feedback sample by sample."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from microlora._core import Gradient, Optimizer, StepResult, Target, evaluate
from microlora.exceptions import ConfigError, FeedbackError, NonFiniteError, SampleError, ShapeError
from microlora.training import engine
from microlora.training.events_in import InEvent, weighted

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from microlora._core import ReplayMemory
    from microlora.ewc import EwcPlusPlus
    from microlora.progress import CancelToken, Progress
    from microlora.training.config import TrainingConfig
    from microlora.training.rows import Rows

    Log = tuple[NDArray[np.float32], NDArray[np.float32]]

__all__ = ["Feed", "feed_of"]


@dataclass
class Tally:
    """Rows that were shown to ``adapt``, how many taught, and why the others did not."""

    based: bool
    rows: int = 0
    taught: int = 0
    reasons: Counter[str] = field(default_factory=Counter)

    def reset(self) -> None:
        """A new epoch."""
        self.rows = self.taught = 0
        self.reasons.clear()

    def add(self, result: StepResult) -> None:
        """Takes up what ``adapt`` said of a row for one module."""
        if result.applied:
            self.taught += 1
        else:
            self.reasons[str(result.reason)] += 1

    def refuse_silence(self, name: str) -> None:
        """Raises where rows were shown and none of them taught anything.

        Raises:
            FeedbackError: With the commonest reason, and the way out.
        """
        if self.taught or not self.reasons:
            return
        raise FeedbackError(f"{name}: all {self.rows} samples were passed over: {self.why()}")

    def why(self) -> str:
        """The commonest reason and the way out."""
        reason = self.reasons.most_common(1)[0][0]
        if self.based:
            return reason
        return f"{reason}; base='input' takes each sample's own input for the frozen layer's output"


class Feed(Protocol):
    """What the loop needs of a dataset and a learner together.

    Attributes:
        estimates: Whether importance can be estimated from any of its rows.
        has_loss: Whether any of its rows has a loss; bare gradients have none.
        replayable: Whether rows of earlier tasks can join its batches.
        tally: What became of the rows since the epoch began; None where every row teaches.
    """

    estimates: bool
    has_loss: bool
    replayable: bool
    tally: Tally | None

    def steps(
        self,
        optimizer: Optimizer,
        ewc: EwcPlusPlus | None,
        replay: ReplayMemory | None,
        order: NDArray[np.int64],
        lrs: NDArray[np.float64],
        progress: Progress | None,
        cancel: CancelToken | None,
    ) -> Log:
        """Makes the steps of these rows: loss (NaN where there is none) and gradient norm of each."""

    def evaluate(self, cancel: CancelToken | None) -> float:
        """Weighted mean loss of all rows; NaN where it is not finite."""

    def accumulate_fisher(self, ewc: EwcPlusPlus, rows: NDArray[np.int64], most: int | None) -> None:
        """Adds the first ``most`` of these rows that can be used to the importance of the present task."""

    def check_replay(self, replay: ReplayMemory) -> None:
        """Refuses a memory whose rows cannot join these, where ``replayable``."""

    def remember(self, replay: ReplayMemory) -> None:
        """Shows the rows that count to the memory, where ``replayable``."""


class ArrayFeed:
    """Rows of arrays through the core's own loop."""

    estimates = has_loss = replayable = True
    tally: Tally | None = None

    def __init__(
        self,
        target: Any,
        rows: Rows,
        config: TrainingConfig,
        modules: list[str] | None,
        base: str | None = None,
    ) -> None:
        self._target, self._rows, self._config = target, rows, config
        self._modules = None if engine.is_chain(target) else modules
        self._base = None if base is None else rows.arrays[0]

    def steps(
        self,
        optimizer: Optimizer,
        ewc: EwcPlusPlus | None,
        replay: ReplayMemory | None,
        order: NDArray[np.int64],
        lrs: NDArray[np.float64],
        progress: Progress | None,
        cancel: CancelToken | None,
    ) -> Log:
        x, y = self._rows.arrays
        return optimizer.train(
            self._target,
            x,
            y,
            order,
            lrs,
            batch_size=self._config.batch_size,
            accumulation=self._config.gradient_accumulation,
            modules=self._modules,
            weights=self._rows.weights,
            base=self._base,
            max_grad_norm=self._config.max_grad_norm,
            ewc=ewc,
            ewc_every=self._config.ewc_every,
            replay=replay,
            progress=progress,
            cancel=cancel,
        )

    def check_replay(self, replay: ReplayMemory) -> None:
        x, y = self._rows.arrays
        replay.check(self._target, x, y, modules=self._modules)

    def remember(self, replay: ReplayMemory) -> None:
        x, y = self._rows.arrays
        replay.offer(
            self._target,
            x,
            y,
            self._rows.kept,
            modules=self._modules,
            weights=self._rows.weights,
            base=self._base,
        )

    def evaluate(self, cancel: CancelToken | None) -> float:
        rows = self._rows
        x, y = rows.arrays
        if len(rows) != rows.total:
            x, y = x[rows.kept], y[rows.kept]
        base = None if self._base is None else x
        try:
            losses = evaluate(self._target, x, y, modules=self._modules, base=base, cancel=cancel)
        except NonFiniteError:  # the arrays are finite, so it is the learner that is not
            return math.nan
        if rows.weights is None:
            return float(losses.mean(dtype=np.float64))
        weights = rows.weights[rows.kept].astype(np.float64)
        return float((losses * weights).sum() / weights.sum())

    def accumulate_fisher(self, ewc: EwcPlusPlus, rows: NDArray[np.int64], most: int | None) -> None:
        rows = rows[:most]
        x, y = self._rows.arrays
        if engine.is_chain(self._target):
            ewc.accumulate_fisher(x[rows], y[rows])
            return
        for row in rows:
            feedback = Target(y[row])
            base = None if self._base is None else x[row]
            for module in self._modules or ():
                ewc.accumulate_fisher(x[row], feedback, module, base)


class DropoutFeed(ArrayFeed):
    """Rows of arrays for a learner with dropout, which only ``adapt`` applies; validation is without it."""

    replayable = False

    def steps(
        self,
        optimizer: Optimizer,
        ewc: EwcPlusPlus | None,
        replay: ReplayMemory | None,
        order: NDArray[np.int64],
        lrs: NDArray[np.float64],
        progress: Progress | None,
        cancel: CancelToken | None,
    ) -> Log:
        x, y = self._rows.arrays
        weights = self._rows.weights

        def event(row: int) -> InEvent:
            weight = 1.0 if weights is None else float(weights[row])
            base = None if self._base is None else x[row]
            return InEvent(x[row], Target(y[row]), base=base, weight=weight)

        def modules(_: InEvent) -> list[str]:
            return self._modules or []

        return adapt_steps(
            engine.learner_of(self._target),
            self._config,
            event,
            modules,
            optimizer,
            ewc,
            order,
            lrs,
            progress,
            cancel,
        )


class EventFeed:
    """Samples with their own feedback through ``adapt``."""

    replayable = False
    tally: Tally | None

    def __init__(self, target: Any, rows: Rows, config: TrainingConfig, base: str | None = None) -> None:
        if engine.is_chain(target):
            raise ConfigError(
                "dataset: got feedback sample by sample for a chain, expected targets or labels"
            )
        self._lora, self._rows, self._config = engine.learner_of(target), rows, config
        refuse_pending(self._lora)
        assert rows.events is not None
        events = rows.events
        if base is not None:
            for row in rows.kept:
                _equal_widths(len(events[row].x), events[row].feedback.width)
            events = tuple(e if e.base is not None else e._replace(base=e.x) for e in events)
        self._events = events
        self._fits: dict[tuple[int, int], list[str]] = {}
        for row in rows.kept:
            self._modules(self._events[row])
        self.tally = Tally(base is not None)
        feedback = [self._events[row].feedback for row in rows.kept]
        self.estimates = any(engine.can_estimate(config, f) for f in feedback)
        self.has_loss = any(not isinstance(f, Gradient) for f in feedback)

    def _modules(self, event: InEvent) -> list[str]:
        if event.module is not None:
            return [event.module]
        shape = (len(event.x), event.feedback.width)
        if shape not in self._fits:
            self._fits[shape] = fitting(self._lora, *shape)
        return self._fits[shape]

    def steps(
        self,
        optimizer: Optimizer,
        ewc: EwcPlusPlus | None,
        replay: ReplayMemory | None,
        order: NDArray[np.int64],
        lrs: NDArray[np.float64],
        progress: Progress | None,
        cancel: CancelToken | None,
    ) -> Log:
        return adapt_steps(
            self._lora,
            self._config,
            self._events.__getitem__,
            self._modules,
            optimizer,
            ewc,
            order,
            lrs,
            progress,
            cancel,
            self.tally,
        )

    def evaluate(self, cancel: CancelToken | None) -> float:
        if cancel is not None:
            cancel.raise_if_cancelled("validation")
        assert self.tally is not None
        rows, event, tally = self._rows.kept, self._events.__getitem__, Tally(self.tally.based)
        try:
            found = adapt_rows(self._lora.copy(), rows, event, self._modules, 0, tally)
        except SampleError:
            return math.nan
        if not found:
            tally.refuse_silence("validation")
        # As for arrays: by the sum of the weights, so that a dataset's loss is the same on either path.
        return sum(w * loss for w, loss in found) / sum(w for w, _ in found) if found else math.nan

    def accumulate_fisher(self, ewc: EwcPlusPlus, rows: NDArray[np.int64], most: int | None) -> None:
        events = (self._events[row] for row in rows)
        usable = (e for e in events if engine.can_estimate(self._config, e.feedback))
        for event in islice(usable, most):
            for module in self._modules(event):
                ewc.accumulate_fisher(event.x, event.feedback, module, event.base)

    def check_replay(self, replay: ReplayMemory) -> None:
        raise NotImplementedError

    def remember(self, replay: ReplayMemory) -> None:
        raise NotImplementedError


def adapt_rows(
    lora: Any,
    rows: NDArray[np.int64],
    event_of: Callable[[int], InEvent],
    modules_of: Callable[[InEvent], list[str]],
    steps_done: int,
    tally: Tally | None = None,
) -> list[tuple[float, float]]:
    """Shows rows to ``adapt``: weight and loss of every row and module that has one."""
    found: list[tuple[float, float]] = []
    for row in rows.tolist():
        event = event_of(row)
        for module in modules_of(event):
            try:
                if event.weight == 1.0:
                    result = lora.adapt(event.x, event.feedback, module, event.base)
                    loss = result.loss_before
                else:
                    loss, gradient = weighted(lora, event.x, event.feedback, module, event.base, event.weight)
                    result = lora.adapt(event.x, gradient, module, event.base)
            except NonFiniteError as error:
                lora.apply_updates(0.0)  # forgets the step's other rows
                raise SampleError(str(error), row=row, steps_done=steps_done) from error
            if tally is not None:
                tally.add(result)
            if loss is not None:
                found.append((event.weight, loss))
        if tally is not None:
            tally.rows += 1
    return found


def adapt_steps(
    lora: Any,
    config: TrainingConfig,
    event_of: Callable[[int], InEvent],
    modules_of: Callable[[InEvent], list[str]],
    optimizer: Optimizer,
    ewc: EwcPlusPlus | None,
    order: NDArray[np.int64],
    lrs: NDArray[np.float64],
    progress: Progress | None,
    cancel: CancelToken | None,
    tally: Tally | None = None,
) -> Log:
    """Steps of events through ``adapt``: loss (NaN where there is none) and gradient norm of each."""
    losses, norms = np.zeros(len(lrs), np.float32), np.zeros(len(lrs), np.float32)
    size = config.step_size
    for step, lr in enumerate(lrs.tolist()):
        if cancel is not None:
            cancel.raise_if_cancelled("training")
        rows = order[step * size : (step + 1) * size]
        found = adapt_rows(lora, rows, event_of, modules_of, step, tally)
        losses[step] = np.mean([w * loss for w, loss in found]) if found else math.nan
        _, norms[step] = optimizer.step(
            lora, lr, max_grad_norm=config.max_grad_norm, ewc=ewc, ewc_every=config.ewc_every
        )
        if progress is not None:
            progress(step + 1, len(lrs), "training")
    return losses, norms


def refuse_pending(lora: Any) -> None:
    """Gradients that wait in a learner would be part of a step that goes through ``adapt``."""
    waiting = [name for name in lora.modules() if lora[name].pending]
    if waiting:
        raise ConfigError(f"lora: got pending gradients in {', '.join(waiting)}, expected none")


def fitting(lora: Any, n_in: int, n_out: int) -> list[str]:
    """The modules of these widths.

    Raises:
        ShapeError: None has them; the message lists the widths there are.
    """
    shapes = {name: (lora[name].in_features, lora[name].out_features) for name in lora.modules()}
    found = [name for name, shape in shapes.items() if shape == (n_in, n_out)]
    if not found:
        have = ", ".join(f"{name} {i} -> {o}" for name, (i, o) in shapes.items())
        raise ShapeError(f"dataset: got widths {n_in} -> {n_out}, expected those of a module: {have}")
    return found


def _equal_widths(n_in: int, n_out: int) -> None:
    if n_in != n_out:
        raise ShapeError(
            f"base: got 'input' for widths {n_in} -> {n_out}, expected equal ones: the input stands for the "
            "frozen layer's output"
        )


def feed_of(
    target: Any, rows: Rows, config: TrainingConfig, modules: list[str] | None, base: str | None = None
) -> Feed:
    """The way these rows take to this learner.

    Args:
        target: A learner or a chain.
        rows: The samples.
        config: Batch sizes.
        modules: The modules that learn from arrays; None takes those whose widths fit.
        base: ``"input"``, or None for no frozen layer.

    Raises:
        ShapeError: No module has these widths, or unequal ones with ``base``.
        UnknownModuleError: No such module.
        ConfigError: Samples that this learner cannot take.
    """
    if rows.events is not None:
        if modules is not None:
            raise ConfigError(
                "modules: got names with samples that have feedback of their own, expected None"
            )
        return EventFeed(target, rows, config, base)
    if engine.is_chain(target):
        if base is not None:
            raise ConfigError(f"base: got {base!r} with a chain, expected None: it has its frozen layers")
        if modules is not None:
            raise ConfigError("modules: got names with a chain, expected None: all its layers learn")
        return ArrayFeed(target, rows, config, None)
    lora = engine.learner_of(target)
    x, y = rows.arrays
    if y.ndim != 2:
        raise ConfigError("dataset: got labels, expected target vectors (labels need a LoraChain)")
    if modules is None and rows.module is not None:
        modules = [rows.module]
    if modules is None:
        modules = fitting(lora, x.shape[1], y.shape[1])
    for name in modules:
        handle = lora[name]
        if (handle.in_features, handle.out_features) != (x.shape[1], y.shape[1]):
            raise ShapeError(
                f"dataset: got widths {x.shape[1]} -> {y.shape[1]}, expected those of {name}: "
                f"{handle.in_features} -> {handle.out_features}"
            )
    if base is not None:
        _equal_widths(x.shape[1], y.shape[1])
    if lora.config.dropout > 0.0:
        refuse_pending(lora)
        return DropoutFeed(target, rows, config, list(modules), base)
    return ArrayFeed(target, rows, config, list(modules), base)
