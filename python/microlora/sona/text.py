"""Events of texts: encoders held to what the modules need, and strings turned into vectors and feedback."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from microlora._core import FeedbackBase, Reward
from microlora.encoders.protocol import TextEncoder, encode_checked
from microlora.exceptions import (
    ConfigError,
    DTypeError,
    EncoderError,
    FeedbackError,
    MicroLoraError,
    NonFiniteError,
    ShapeError,
)

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from microlora.data.sample import TrainingSample

    Floats = NDArray[np.float32]

__all__ = ["PROBES", "Encoders", "TextEvent", "check_quality"]

#: Texts by whose vectors an encoder is known again, in words that most corpora have.
PROBES = ("how do I read a file and return each line that matches", "the sum of a list of numbers 0 1 2 3")
#: Largest difference of a coordinate between two runs of one encoder, whose machines may differ.
SAME = 1e-3

Dims = Mapping[str, tuple[int, int]]


class TextEvent(NamedTuple):
    """An event of texts as the core takes it."""

    x: Floats
    feedback: FeedbackBase
    base: Floats | None


class Encoders:
    """The encoder of queries and that of responses, which are often the same.

    Args:
        encoder: Encoder of queries, and of responses where there is no other.
        response_encoder: Encoder of responses, or None.

    Raises:
        DTypeError: One of them has not the attributes of a `TextEncoder`.
        ConfigError: ``response_encoder`` without ``encoder``.
    """

    def __init__(self, encoder: TextEncoder | None, response_encoder: TextEncoder | None) -> None:
        if encoder is None and response_encoder is not None:
            raise ConfigError("encoder: got None with a response_encoder, expected the encoder of queries")
        for arg, item in (("encoder", encoder), ("response_encoder", response_encoder)):
            if not (item is None or isinstance(item, TextEncoder)):
                want = "a TextEncoder (name, dim, encode) or None"
                raise DTypeError(f"{arg}: got {type(item).__name__}, expected {want}")
        self.query = encoder
        self.response = encoder if response_encoder is None else response_encoder

    @property
    def widths(self) -> tuple[int, int] | None:
        """Widths of queries and of responses; None without an encoder."""
        if self.query is None or self.response is None:
            return None
        return int(self.query.dim), int(self.response.dim)

    @property
    def names(self) -> tuple[str, str] | None:
        """Names of both; None without an encoder."""
        if self.query is None or self.response is None:
            return None
        return str(self.query.name), str(self.response.name)

    @cached_property
    def probes(self) -> tuple[Floats, Floats] | None:
        """Vectors of `PROBES`, of queries and of responses; None where an encoder has none to give."""
        if self.query is None or self.response is None:
            return None
        try:
            query = self._encode(self.query, list(PROBES))
            same = self.response is self.query
            return query, query if same else self._encode(self.response, list(PROBES))
        except MicroLoraError:
            return None  # whoever needs its vectors will hear of it

    def check_probes(self, known: tuple[Floats, Floats] | None) -> None:
        """Refuses encoders whose vectors are not those that a loop learned with.

        Raises:
            ConfigError: Names the encoder and the difference.
        """
        if known is None or self.probes is None:
            return
        for arg, now, then in zip(("encoder", "response_encoder"), self.probes, known, strict=True):
            if now.shape != then.shape:
                raise ConfigError(f"{arg}: got vectors of {now.shape[1]} features, expected {then.shape[1]}")
            apart = float(np.abs(now - then).max())
            if apart > SAME:
                raise ConfigError(
                    f"{arg}: got one whose vectors of known texts differ by {apart:.3g} from those that the "
                    f"loop learned with, expected at most {SAME}: the same encoder, fitted to the same texts"
                )

    def check(self, dims: Dims) -> None:
        """Refuses encoders that fit no module.

        Raises:
            ShapeError: Names the encoder whose width it is, and those of the modules.
        """
        if self.widths is None or self.widths in dims.values():
            return
        n_in, n_out = self.widths
        alone = n_in in {shape[0] for shape in dims.values()}
        arg, width, side = ("response_encoder", n_out, "out") if alone else ("encoder", n_in, "in")
        have = ", ".join(f"{module} {i} -> {o}" for module, (i, o) in dims.items())
        raise ShapeError(
            f"{arg}: got vectors of {width} features, expected {side}_features of a module ({have})"
        )

    def event(self, query: str, response: object, quality: float | None) -> TextEvent:
        """The event that a query and what is said of it make; see `SonaLoop.instant_adapt`.

        Everything is checked before an encoder is asked.

        Raises:
            ConfigError: No encoder, or an empty text.
            DTypeError: ``response`` is neither a text nor feedback.
            FeedbackError: No quality with a response, or one out of its range; a response of which the
                encoder knows nothing.
            NonFiniteError: A quality of NaN, or what an encoder gave.
            EncoderError: An encoder raised; its own error is the cause.
        """
        encoder, other = self._need()
        _full("query", query)
        if isinstance(response, FeedbackBase):
            if quality is not None:
                check_quality(quality)
            x = self._encode(encoder, [query])[0]
            return TextEvent(x, response, x if response.width == len(x) else None)
        if not isinstance(response, str):
            want = "a text, or feedback such as Target(t)"
            raise DTypeError(f"response: got {type(response).__name__}, expected {want}")
        _full("response", response)
        if quality is None:
            raise FeedbackError(
                "quality: got None with a response, expected a number from 0 to 1: without it nothing says "
                "whether the response was good"
            )
        score = check_quality(quality)
        if encoder is other:
            x, e = self._encode(encoder, [query, response])
        else:
            x, e = self._encode(encoder, [query])[0], self._encode(other, [response])[0]
        if not e.any():
            raise FeedbackError(
                f"response: got a text that encoder {other.name!r} maps to zero, expected one that it knows"
            )
        return TextEvent(x, Reward(score, e), None)  # a reward is about dY alone

    def sample(self, sample: TrainingSample) -> TrainingSample:
        """A sample of texts as one of vectors; a response becomes the wanted output.

        Raises:
            MicroLoraError: As `event`.
        """
        encoder, other = self._need()
        _full("query", sample.query)
        changes: dict[str, Any] = {"input_embedding": self._encode(encoder, [str(sample.query)])[0]}
        if sample.response and not sample.has_target:
            changes["output_embedding"] = self._encode(other, [sample.response])[0]
        return sample.replace(**changes)

    def vectors(self, texts: list[str]) -> Floats:
        """Vectors of queries: float32 (n, in_features).

        Raises:
            MicroLoraError: As `event`.
        """
        encoder, _ = self._need()
        for text in texts:
            _full("query", text)
        return self._encode(encoder, texts)

    def _need(self) -> tuple[TextEncoder, TextEncoder]:
        if self.query is None or self.response is None:
            raise ConfigError(
                "x: got a text and there is no encoder, expected a vector, or SonaLoop(..., encoder=...)"
            )
        return self.query, self.response

    @staticmethod
    def _encode(encoder: TextEncoder, texts: list[str]) -> Floats:
        try:
            return encode_checked(encoder, texts)
        except MicroLoraError:
            raise
        except Exception as error:
            name = getattr(encoder, "name", type(encoder).__name__)
            raise EncoderError(f"encoder {name!r} raised {type(error).__name__}: {error}") from error


def check_quality(quality: Any) -> float:
    """``quality`` as a number from 0 to 1.

    Raises:
        NonFiniteError: NaN.
        FeedbackError: Anything else that is no number from 0 to 1.
    """
    want = "expected a number from 0 to 1"
    if isinstance(quality, bool | str | bytes) or not hasattr(quality, "__float__"):
        raise FeedbackError(f"quality: got {quality!r}, {want}")
    value = float(quality)
    if math.isnan(value):
        raise NonFiniteError(f"quality: got NaN, {want}")
    if not 0.0 <= value <= 1.0:
        raise FeedbackError(f"quality: got {quality!r}, {want}")
    return value


def _full(arg: str, text: object) -> None:
    if not isinstance(text, str):
        raise DTypeError(f"{arg}: got {type(text).__name__}, expected a text")
    if not text.strip():
        raise ConfigError(f"{arg}: got {text!r}, expected a text that is not empty")
