"""One example to learn from: `TrainingSample`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass
from datetime import datetime
from typing import Any

import numpy as np
import numpy.typing as npt

from microlora._checks import integer, real, text, wrong
from microlora._core import FeedbackBase
from microlora.data.arrays import Floats, vector
from microlora.encoders.protocol import TextEncoder, encode_checked
from microlora.exceptions import ConfigError

__all__ = ["MAX_LABEL", "TrainingSample"]

MAX_LABEL = 2**31 - 1


@dataclass(frozen=True, eq=False, slots=True)
class TrainingSample:
    """An input, what should come out for it, and where it came from.

    What should come out is given in at most one way: an output embedding, a feedback, or a label. A sample
    of texts alone becomes one of vectors through `encoded`. Checked on construction; immutable; equal by
    value, arrays included.

    Attributes:
        input_embedding: float32 (in_features,), read-only; a copy of what was given, or None.
        output_embedding: float32 (out_features,), read-only: the wanted output (loss ``1/2 |y - t|^2``).
        quality: How good the example is, 0 to 1. A trainer's threshold compares with it; a filter may too.
        feedback: Feedback for this input: ``Target``, ``Gradient``, ``Reward``, ``Preference`` or
            ``Contrastive``, as ``Feedback.correction`` and its like make them.
        label: Class number from 0, for a chain with a cross-entropy head.
        query: The text that came in, or None.
        response: The text that went out, or should have, or None.
        weight: Factor of this sample in a mean loss, above 0.
        domain: Field of work; any text, empty for none.
        latency_ms: Milliseconds that the response took, 0 or more, or None where nobody measured.
        token_count: Tokens of the response, 0 or more, or None where nobody counted.
        session_id: The session it comes from; empty for none. A split by session keeps it whole.
        timestamp: Seconds since 1970 in UTC, or None; a ``datetime`` with a time zone is converted.
        id: Name of the sample. Where it is empty a dataset names it by a digest of its contents.
        module: The one target module that learns from it; None means all whose widths fit.
        parent_id: Id of the sample that this one is a variation of; empty for an original.

    Raises:
        ConfigError: a value out of its range, or two kinds of target.
        ShapeError: an embedding that is no vector, or an empty one.
        DTypeError: an embedding that holds no numbers.
        NonFiniteError: NaN or infinity in an embedding; the message names the sample's id.

    Example:
        >>> s = TrainingSample.new([1.0, 0.0], [0.0, 1.0], 0.9).with_query("what is it?").with_latency(150.0)
        >>> s.quality, s.query, s.latency_ms, s.output_embedding.tolist()
        (0.9, 'what is it?', 150.0, [0.0, 1.0])
    """

    input_embedding: Floats | None = None
    output_embedding: Floats | None = None
    quality: float = 1.0
    _: KW_ONLY
    feedback: FeedbackBase | None = None
    label: int | None = None
    query: str | None = None
    response: str | None = None
    weight: float = 1.0
    domain: str = ""
    latency_ms: float | None = None
    token_count: int | None = None
    session_id: str = ""
    timestamp: float | None = None
    id: str = ""
    module: str | None = None
    parent_id: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "id", text("sample: id", self.id))
        at = f"sample {self.id!r}: " if self.id else "sample: "
        for name, value in _checked(at, self).items():
            object.__setattr__(self, name, value)
        ways = [n for n in ("output_embedding", "feedback", "label") if getattr(self, n) is not None]
        if len(ways) > 1:
            raise ConfigError(
                f"{at}got {' and '.join(ways)}, expected at most one of output_embedding, feedback, label"
            )

    @classmethod
    def new(
        cls,
        input_embedding: npt.ArrayLike,
        output_embedding: npt.ArrayLike | None = None,
        quality: float = 1.0,
        **fields: Any,
    ) -> TrainingSample:
        """A sample of two embeddings and a quality; ``fields`` are those of the class."""
        return cls(input_embedding, output_embedding, quality, **fields)  # type: ignore[arg-type]

    # -- copies --

    def replace(self, **changes: Any) -> TrainingSample:
        """A copy with some fields changed, checked again."""
        known = [item.name for item in dataclasses.fields(self)]
        for name in changes:
            if name not in known:
                raise ConfigError(f"sample: unknown field {name!r}; known: {', '.join(known)}")
        return dataclasses.replace(self, **changes)

    def with_query(self, query: str) -> TrainingSample:
        """A copy with the text that came in."""
        return self.replace(query=query)

    def with_response(self, response: str) -> TrainingSample:
        """A copy with the text that went out."""
        return self.replace(response=response)

    def with_latency(self, latency_ms: float) -> TrainingSample:
        """A copy with the milliseconds that the response took."""
        return self.replace(latency_ms=latency_ms)

    def with_session(self, session_id: str) -> TrainingSample:
        """A copy with the session it comes from."""
        return self.replace(session_id=session_id)

    # -- what it holds --

    @property
    def has_target(self) -> bool:
        """Whether an output embedding, a feedback or a label says what should come out."""
        return self.output_embedding is not None or self.feedback is not None or self.label is not None

    @property
    def root_id(self) -> str:
        """Id of the original: ``parent_id`` of a variation, else ``id``."""
        return self.parent_id or self.id

    def encoded(self, encoder: TextEncoder) -> TrainingSample:
        """A copy whose texts have become vectors, where vectors were missing.

        The query becomes the input embedding, and the response the output embedding of a sample without any
        target. What is there already stays.

        Raises:
            ConfigError: neither an input embedding nor a query; or the encoder gives no array.
            ShapeError: the encoder gives other shapes than it promises.
            NonFiniteError: the encoder gives NaN or infinity.
        """
        changes: dict[str, Any] = {}
        if self.input_embedding is None:
            if self.query is None:
                raise ConfigError(f"sample {self.id!r}: got neither input_embedding nor query, expected one")
            changes["input_embedding"] = encode_checked(encoder, [self.query])[0]
        if not self.has_target and self.response is not None:
            changes["output_embedding"] = encode_checked(encoder, [self.response])[0]
        return dataclasses.replace(self, **changes) if changes else self

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, TrainingSample):
            return NotImplemented
        return all(
            _same(getattr(self, item.name), getattr(other, item.name)) for item in dataclasses.fields(self)
        )

    def __hash__(self) -> int:
        return hash((self.id, self.query, self.response, self.session_id, self.quality, self.label))

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, ({item.name: getattr(self, item.name) for item in dataclasses.fields(self)},)


def _rebuild(values: Mapping[str, Any]) -> TrainingSample:
    return TrainingSample(**values)


def _same(a: object, b: object) -> bool:
    if isinstance(a, np.ndarray) or isinstance(b, np.ndarray):
        both = isinstance(a, np.ndarray) and isinstance(b, np.ndarray)
        return both and np.array_equal(a, b)  # type: ignore[arg-type]
    return bool(a == b)


def _checked(at: str, s: TrainingSample) -> dict[str, Any]:
    """Every field but the id, checked; a failure names the sample."""
    out: dict[str, Any] = {}
    for name in ("input_embedding", "output_embedding"):
        value = getattr(s, name)
        out[name] = None if value is None else vector(at + name, value)
    out["quality"] = _within(at + "quality", s.quality, "a number from 0 to 1", 0.0, 1.0)
    out["weight"] = _within(at + "weight", s.weight, "a number above 0, at most 1e30", 1e-30, 1e30)
    if s.latency_ms is not None:
        want = "milliseconds of 0 or more, or None"
        out["latency_ms"] = _within(at + "latency_ms", s.latency_ms, want, 0.0, 1e300)
    if s.timestamp is not None:
        out["timestamp"] = _seconds(at + "timestamp", s.timestamp)
    if s.token_count is not None:
        out["token_count"] = integer(at + "token_count", s.token_count, 0, 2**62)
    if s.label is not None:
        out["label"] = integer(at + "label", s.label, 0, MAX_LABEL)
    if s.feedback is not None and not isinstance(s.feedback, FeedbackBase):
        raise wrong(at + "feedback", s.feedback, "a feedback, as Feedback.correction makes one, or None")
    for name in ("query", "response"):
        value = getattr(s, name)
        out[name] = None if value is None else text(at + name, value)
    for name in ("domain", "session_id", "parent_id"):
        out[name] = text(at + name, getattr(s, name))
    out["module"] = None if s.module is None else text(at + "module", s.module, empty=False)
    return out


def _within(name: str, value: object, want: str, low: float, high: float) -> float:
    number = real(name, value, want)
    if not low <= number <= high:
        raise wrong(name, value, want)
    return number + 0.0


def _seconds(name: str, value: object) -> float:
    want = "seconds since 1970, a datetime with a time zone, or None"
    if isinstance(value, datetime):
        if value.tzinfo is None:
            raise wrong(name, value, want)
        return value.timestamp()
    return real(name, value, want)
