"""Learning events: what a service tells a trainer of, one by one."""

from __future__ import annotations

import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from microlora._checks import FrozenMap, real, text, wrong
from microlora._core import FeedbackBase
from microlora.exceptions import ConfigError, DTypeError
from microlora.training.breakthrough import BreakthroughDetector
from microlora.training.config import TrainingConfig
from microlora.training.pipeline import StepOutcome, TrainingPipeline

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from microlora.ewc import EwcPlusPlus
    from microlora.micro_lora import MicroLoRA

__all__ = ["EventLog", "EventOutcome", "EventStats", "LearningEvent"]

ROUGE_ABOVE, ENTROPY_BELOW = 0.7, -0.1


@dataclass(frozen=True, eq=False)
class LearningEvent:
    """Something that happened, with what was measured of it.

    Attributes:
        kind: Free name, such as ``"request"`` or ``"correction"``.
        loss: Loss of the event; None where nothing measured it.
        reward: Reward of the event; None likewise.
        metrics: Other figures by name, such as ``rouge`` and ``entropy_delta``.
        timestamp: Seconds since 1970.
        id: Name of the event.
        x: float32 (in_features,): input to learn from; None for an event that is only counted.
        feedback: What to learn, together with ``x``.
        module: Module that learns; None where there is only one.
        base: float32 (out_features,): output of the frozen layer; see ``MicroLoRA.adapt``.
        quality: Quality of a target; see `TrainingPipeline.train_step`.

    Raises:
        ConfigError: A figure that is not finite, or ``x`` without ``feedback`` or the reverse.
    """

    kind: str = "observation"
    loss: float | None = None
    reward: float | None = None
    metrics: Mapping[str, float] = field(default_factory=FrozenMap)
    timestamp: float = field(default_factory=time.time)
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    x: NDArray[np.float32] | None = None
    feedback: FeedbackBase | None = None
    module: str | None = None
    base: NDArray[np.float32] | None = None
    quality: float | None = None

    def __post_init__(self) -> None:
        put = object.__setattr__
        put(self, "kind", text("kind", self.kind, empty=False))
        put(self, "id", text("id", self.id, empty=False))
        for name in ("loss", "reward"):
            value = getattr(self, name)
            if value is not None:
                put(self, name, real(name, value, "a finite number or None"))
        put(self, "timestamp", real("timestamp", self.timestamp, "seconds since 1970"))
        if not isinstance(self.metrics, Mapping):
            raise wrong("metrics", self.metrics, "a mapping of names to numbers")
        numbers = {k: real(f"metrics[{k!r}]", v, "a finite number") for k, v in self.metrics.items()}
        put(self, "metrics", FrozenMap(numbers))
        if (self.x is None) != (self.feedback is None):
            raise ConfigError("x, feedback: got one without the other, expected both or neither")
        if self.feedback is not None and not isinstance(self.feedback, FeedbackBase):
            raise DTypeError(f"feedback: got {type(self.feedback).__name__}, expected a feedback")

    def check_breakthrough(self) -> bool:
        """Whether this event alone looks like one: ``rouge`` above 0.7 and ``entropy_delta`` below -0.1.

        A rule of thumb for a text that came out right for the first time, without any guard against luck;
        `BreakthroughDetector` has one. False where a figure is missing.
        """
        rouge, entropy = self.metrics.get("rouge"), self.metrics.get("entropy_delta")
        if rouge is None or entropy is None:
            return False
        return rouge > ROUGE_ABOVE and entropy < ENTROPY_BELOW


@dataclass(frozen=True)
class EventOutcome:
    """What `AdapterTrainer.process_event` did.

    Attributes:
        breakthrough: Whether the losses have lastingly dropped with this event.
        step: What was learned; None where the event carried nothing to learn, or no learner was given.
        loss: The loss that the detector saw; None where there was none.
    """

    breakthrough: bool
    step: StepOutcome | None
    loss: float | None


@dataclass(frozen=True)
class EventStats:
    """Counts of events.

    Attributes:
        events: All of them.
        by_kind: By their kind.
        trained: Those that were learned from.
        breakthroughs: Ids of the events that completed one.
    """

    events: int
    by_kind: Mapping[str, int]
    trained: int
    breakthroughs: tuple[str, ...]


class EventLog:
    """Counts events, watches their losses and learns from those that carry something to learn."""

    config: Any

    def __init__(self) -> None:
        self.detector = BreakthroughDetector()
        EventLog.reset(self)

    def reset(self) -> None:
        """Forgets all events."""
        self.detector.reset()
        self._kinds: dict[str, int] = {}
        self._trained = 0
        self._breakthroughs: list[str] = []
        self._last = False
        self._pipeline: TrainingPipeline | None = None
        self._learner: MicroLoRA | None = None
        self._penalty: EwcPlusPlus | None = None

    def _penalty_of(self, lora: MicroLoRA) -> EwcPlusPlus | None:
        """The penalty that holds this learner's events; None leaves the pipeline to make its own."""
        return None

    def process_event(self, event: LearningEvent, lora: MicroLoRA | None = None) -> EventOutcome:
        """Takes one event.

        Args:
            event: With ``x`` and ``feedback`` it is learned from, where ``lora`` is given, by the steps of
                `TrainingPipeline` under ``config.training``, held by the trainer's penalty: what ``lora`` was
                trained on before is an earlier task. The rate is constant where its schedule needs a total
                and ``max_steps`` is None. Its loss, or else the one measured while learning, goes to the
                detector.
            lora: The learner; another one starts afresh.

        Returns:
            What was done.

        Raises:
            DTypeError: Not an event.
            MicroLoraError: As `TrainingPipeline.train_step`; the event is not counted then.
        """
        if not isinstance(event, LearningEvent):
            raise DTypeError(f"event: got {type(event).__name__}, expected a LearningEvent")
        step = None
        if lora is not None and event.x is not None and event.feedback is not None:
            penalty = self._penalty_of(lora)
            made_for = self._learner is lora and (penalty is None or penalty is self._penalty)
            if self._pipeline is None or not made_for:
                config: TrainingConfig = self.config.training
                self._pipeline = TrainingPipeline(config.for_stream()).init_for_lora(lora, penalty)
                self._penalty = penalty
                self._learner = lora
            step = self._pipeline.train_step(
                lora, event.x, event.feedback, event.module, event.base, event.quality
            )
            self._trained += step.reason is None
        loss = event.loss if event.loss is not None or step is None else step.loss
        self._kinds[event.kind] = self._kinds.get(event.kind, 0) + 1
        self._last = loss is not None and self.detector.update(loss)
        if self._last:
            self._breakthroughs.append(event.id)
        return EventOutcome(self._last, step, loss)

    def check_breakthrough(self) -> bool:
        """Whether the last event completed a breakthrough; see `BreakthroughDetector` for the rule."""
        return self._last

    def event_stats(self) -> EventStats:
        """Counts of all events so far."""
        kinds = FrozenMap(self._kinds)
        return EventStats(sum(kinds.values()), kinds, self._trained, tuple(self._breakthroughs))
