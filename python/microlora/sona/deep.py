"""The deep loop: the adapter trainer on all that is remembered, behind the same gate as everything else."""

from __future__ import annotations

import dataclasses
import logging
import math
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from microlora._checks import flag
from microlora.exceptions import CancelledError, ConfigError, DTypeError, SwapError
from microlora.micro_lora import MicroLoRA
from microlora.progress import CancelToken
from microlora.sona import distil
from microlora.sona.background import GOES_ON
from microlora.sona.gather import Gathered, gather, rows, split
from microlora.sona.state import write_fisher
from microlora.training import engine
from microlora.training.trainer import AdapterTrainer

if TYPE_CHECKING:
    from microlora._core import AdaptationResult
    from microlora.ewc import EwcPlusPlus
    from microlora.progress import Progress
    from microlora.sona.loop import SonaLoop
    from microlora.training.result import TrainingResult

__all__ = ["DeepResult", "deep_optimize"]

_log = logging.getLogger("microlora.sona.deep")


@dataclass(frozen=True)
class DeepResult:
    """What a deep run did: the fields of an `AdaptationResult`, and what only training has.

    Attributes:
        applied: Whether its weights are served now.
        loop_type: ``"deep"``.
        outcome: ``"accepted"``, or ``"kept"`` where the gate refused it.
        latency_us: Time of the whole run, microseconds.
        quality_delta: Held-out loss before less after; NaN where it could not be measured.
        samples_used: Samples that were trained on.
        notes: What there is to say, and why it was refused.
        event: None.
        loss_before: Held-out loss before; None where it could not be measured.
        loss_after: Held-out loss of what is served now; likewise.
        version: Version of the live learner afterwards.
        training: What the trainer did.
        ensemble_loss: Held-out loss of the ensemble, where it was distilled.
        student_loss: That of the adapter that it became, measured alike.
    """

    applied: bool
    loop_type: Literal["deep"]
    outcome: str
    latency_us: float
    quality_delta: float
    samples_used: int
    notes: tuple[str, ...]
    event: None
    loss_before: float | None
    loss_after: float | None
    version: int
    training: TrainingResult
    ensemble_loss: float | None = None
    student_loss: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """A plain dict that JSON can hold: NaN becomes None."""
        out = {item.name: getattr(self, item.name) for item in dataclasses.fields(self)}
        out["notes"], out["training"] = list(self.notes), self.training.to_dict()
        return {k: None if isinstance(v, float) and math.isnan(v) else v for k, v in out.items()}


def deep_optimize(
    loop: SonaLoop,
    samples: Any,
    distill: bool,
    progress: Progress | bool | None,
    cancel: CancelToken | None,
    base: str | None,
) -> DeepResult:
    """See `SonaLoop.deep_optimize`."""
    distill = flag("distill", distill)
    if not (cancel is None or isinstance(cancel, CancelToken)):
        raise DTypeError(f"cancel: got {type(cancel).__name__}, expected a CancelToken or None")
    if not loop._deep_lock.acquire(blocking=False):
        raise SwapError("deep_optimize: another deep run is under way, expected one at a time")
    try:
        result = _run(loop, samples, distill, progress, cancel, base)
    except CancelledError:
        # The trainer speaks of its learner, which is a copy that nobody sees.
        raise CancelledError("the deep run was cancelled; nothing changed, the loop goes on") from None
    finally:
        loop._deep_lock.release()
    loop._done(result)
    return result


def _run(
    loop: SonaLoop,
    samples: Any,
    distill: bool,
    progress: Progress | bool | None,
    cancel: CancelToken | None,
    base: str | None,
) -> DeepResult:
    started = time.perf_counter()
    if cancel is not None:
        cancel.raise_if_cancelled("the deep run")
    _drain(loop)
    teacher, members = distil.teacher_of(loop) if distill else (None, 0)
    gathered = gather(loop, samples, base)
    events = gathered.events if teacher is None else distil.lessons(loop, teacher, gathered.events)
    if not events:
        raise ConfigError("samples: got none to train on and none is remembered, expected one or more")
    stats = loop.stats()
    train, held = split(events, loop.config.seed, stats.deep_count)
    student = MicroLoRA(loop.adapter(), seed=loop.config.seed)
    ewc = _penalty(loop, student)
    trainer = AdapterTrainer(loop.config.deep, ewc)
    trained = trainer.train(
        student, rows(train), rows(held) if held else None, progress=progress, cancel=cancel
    )
    if cancel is not None:
        cancel.raise_if_cancelled("the deep run")
    notes = [
        *_left_out(gathered),
        f"training ended by {trained.stop_reason} after {trained.total_steps} steps",
    ]
    losses: list[float] = []
    if teacher is not None:
        losses, count = distil.heldout_loss(loop, [teacher, student.forward])
        if losses:
            shown = f"ensemble of {members} {losses[0]:.6g}, one adapter {losses[1]:.6g}"
            notes.append(f"held-out loss on {count} samples: {shown}")
        else:
            notes.append("held-out loss of the ensemble was not measured: no held-out sample has one")
    needed = None if trainer.ewc is None else trainer.ewc.export_state()
    with loop._install_lock:  # whoever saves sees the new weights with what they need, or neither
        done = loop.install(student.adapter(), len(train), True)
        if done.applied:
            loop._fisher = needed
            if loop._opened is not None:
                write_fisher(loop._opened.path, needed)
    return _result(done, notes, (time.perf_counter() - started) * 1e6, trained, losses)


def _drain(loop: SonaLoop) -> None:
    """Consolidates what waits, so that it is remembered and can be trained on."""
    while (result := loop.maybe_background(force=True)) is not None and result.outcome == GOES_ON:
        pass


def _penalty(loop: SonaLoop, student: MicroLoRA) -> EwcPlusPlus | None:
    """What earlier deep runs needed, anchored at the weights of now; the first run has nothing to hold."""
    training = loop.config.deep.training
    ewc = engine.make_ewc(student, training)
    if ewc is not None and loop._fisher is not None:
        ewc.import_state(loop._fisher)
        ewc.start_new_task()
    return ewc


def _left_out(gathered: Gathered) -> list[str]:
    reasons = {
        "below the quality threshold": gathered.low,
        "equal to a held-out sample of the gate": gathered.held_out,
        "remembered as well as given": gathered.repeated,
    }
    return [f"{count} samples left out: {why}" for why, count in reasons.items() if count]


def _result(
    done: AdaptationResult, notes: list[str], latency: float, trained: TrainingResult, losses: list[float]
) -> DeepResult:
    ensemble, student = losses if losses else (None, None)
    return DeepResult(
        applied=done.applied,
        loop_type="deep",
        outcome=done.outcome,
        latency_us=latency,
        quality_delta=done.quality_delta,
        samples_used=done.samples_used,
        notes=(*done.notes, *notes),
        event=None,
        loss_before=done.loss_before,
        loss_after=done.loss_after,
        version=done.version,
        training=trained,
        ensemble_loss=ensemble,
        student_loss=student,
    )
