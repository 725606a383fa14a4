"""What comes in as events: samples, pairs or arrays, and how much each counts."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from microlora._checks import real, wrong
from microlora._core import FeedbackBase, Gradient, Target
from microlora.exceptions import ConfigError, DTypeError, FeedbackError, NonFiniteError

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

    from microlora.micro_lora import MicroLoRA

__all__ = [
    "InEvent",
    "event_weight",
    "imitation_weight",
    "imitation_weights",
    "incoming",
    "of_sample",
    "weighted",
]


class InEvent(NamedTuple):
    """One sample as the learner takes it."""

    x: Any
    feedback: FeedbackBase
    module: str | None = None
    base: Any = None
    quality: float | None = None
    weight: float = 1.0


def event_weight(quality: float | None, weight: float, feedback: FeedbackBase, threshold: float) -> float:
    """How much an event counts: 0 is passed over, 1 is full.

    Raises:
        NonFiniteError: ``quality`` is NaN.
        FeedbackError: ``quality`` is no number from 0 to 1.
        ConfigError: ``weight`` is no number above 0, or not 1 with feedback that is no target.
    """
    factor = real("weight", weight, "a number above 0")
    if factor <= 0.0:
        raise wrong("weight", weight, "a number above 0")
    if factor != 1.0 and not isinstance(feedback, Target):
        raise wrong("weight", weight, f"1 with {type(feedback).__name__}: only targets have weights")
    return factor * imitation_weight(quality, feedback, threshold)


def imitation_weight(quality: float | None, feedback: FeedbackBase, threshold: float) -> float:
    """The part of `event_weight` that comes from the quality."""
    if quality is None:
        return 1.0
    if isinstance(quality, bool | str) or not hasattr(quality, "__float__"):
        raise FeedbackError(f"quality: got {quality!r}, expected a number from 0 to 1")
    q = float(quality)
    if math.isnan(q):
        raise NonFiniteError("quality: got NaN, expected a number from 0 to 1")
    if not 0.0 <= q <= 1.0:
        raise FeedbackError(f"quality: got {quality!r}, expected a number from 0 to 1")
    if not isinstance(feedback, Target):
        return 1.0
    return max(0.0, (q - threshold) / (1.0 - threshold))


def imitation_weights(quality: ArrayLike, threshold: float) -> NDArray[np.float64]:
    """The same for many targets, whose qualities are checked already: float64 (n,)."""
    q = np.asarray(quality, np.float64)
    return np.maximum(0.0, (q - threshold) / (1.0 - threshold))


def weighted(
    lora: MicroLoRA,
    x: ArrayLike,
    feedback: FeedbackBase,
    module: str | None,
    base: ArrayLike | None,
    weight: float,
) -> tuple[float, Gradient]:
    """Loss of a target, and its gradient times ``weight``, which ``adapt`` then takes."""
    assert isinstance(feedback, Target)
    y = np.asarray(lora.forward(x, module), np.float64)
    if y.ndim != 1:
        raise FeedbackError(f"x: got {y.shape[0]} rows, expected one event: (in_features,)")
    if base is not None:
        y = y + np.asarray(base, np.float64)
    t = np.asarray(feedback.t, np.float64)
    if feedback.loss == "mse":
        g = y - t
        return 0.5 * float(g @ g), Gradient((weight * g).astype(np.float32))
    length = float(np.linalg.norm(y))
    if length == 0.0:
        # The cosine of a zero output is not defined: adapt says so, with its own reason.
        return 1.0, Gradient(np.zeros_like(t, np.float32))
    unit = y / length
    cosine = float(unit @ t)
    return 1.0 - cosine, Gradient((-weight * (t - cosine * unit) / length).astype(np.float32))


def incoming(samples: Any, y: Any, base: Any, quality: Any) -> Iterator[InEvent]:
    """Events of arrays, of ``(x, feedback)`` pairs or of samples, in their order.

    Raises:
        ConfigError: Arrays of different lengths, or arrays beside samples.
        DTypeError: Something that is no sample.
    """
    weights = None
    if y is None and isinstance(samples, tuple) and len(samples) in (2, 3) and np.ndim(samples[0]) == 2:
        samples, y, weights = (*samples, None)[:3]
    if y is not None:
        x, targets = np.asarray(samples), np.asarray(y)
        others = {"base": base, "quality": quality, "weights": weights}
        rows = {k: np.asarray(v) for k, v in others.items() if v is not None}
        for name, array in {"y": targets, **rows}.items():
            if x.ndim != 2 or array.shape[:1] != x.shape[:1]:
                raise ConfigError(
                    f"{name}: got shape {array.shape}, expected one row for each of x {x.shape}"
                )
        for i in range(len(x)):
            q = float(rows["quality"][i]) if "quality" in rows else None
            weight = float(rows["weights"][i]) if "weights" in rows else 1.0
            yield InEvent(
                x[i], Target(targets[i]), None, rows["base"][i] if "base" in rows else None, q, weight
            )
        return
    if base is not None or quality is not None:
        raise ConfigError("base, quality: got them without y, expected them with arrays only")
    if not isinstance(samples, Iterable) or isinstance(samples, str | bytes | Mapping):
        raise DTypeError(f"samples: got {type(samples).__name__}, expected samples, pairs or an array with y")
    for i, item in enumerate(samples):
        if isinstance(item, tuple):
            if len(item) != 2 or not isinstance(item[1], FeedbackBase):
                held = ", ".join(type(v).__name__ for v in item)
                raise DTypeError(f"samples[{i}]: got ({held}), expected a TrainingSample or (x, feedback)")
            yield InEvent(item[0], item[1])
        else:
            yield of_sample(item, f"samples[{i}]")


def of_sample(sample: Any, name: str = "sample") -> InEvent:
    """The event of a `TrainingSample`.

    Raises:
        ConfigError: It has no input embedding, or nothing that says what should come out.
        DTypeError: It is none.
    """
    if not (hasattr(sample, "input_embedding") and hasattr(sample, "feedback")):
        raise DTypeError(f"{name}: got {type(sample).__name__}, expected a TrainingSample")
    x, feedback = sample.input_embedding, sample.feedback
    if feedback is None and sample.output_embedding is not None:
        feedback = Target(sample.output_embedding)
    if x is None or feedback is None:
        lacks = "input_embedding" if x is None else "output_embedding or feedback"
        raise ConfigError(
            f"sample {sample.id!r}: got no {lacks}, expected vectors (encoded() makes them of texts)"
        )
    return InEvent(x, feedback, sample.module, None, sample.quality, sample.weight)
