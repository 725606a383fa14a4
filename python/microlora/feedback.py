"""Feedback by the names people know, on top of the five kinds that the core learns from.

| name | kind |
|---|---|
| ``Feedback.correction(t)`` | `Target` |
| ``Feedback.success(score, response=e)``, ``failure``, ``from_quality`` | `Reward` |
| ``Feedback.preference(chosen, rejected)`` | `Preference` |

A target teaches about ten times as much as a scalar from the same number of events: prefer a correction.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from microlora._checks import real
from microlora._core import Contrastive, Gradient, Preference, Reward, Target
from microlora.exceptions import ConfigError, FeedbackError

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

__all__ = ["Contrastive", "Feedback", "Gradient", "Preference", "Reward", "Target"]


class Feedback:
    """Makers of feedback; every one returns a value that ``adapt`` and ``instant`` take."""

    def __init__(self) -> None:
        raise FeedbackError(
            "feedback: Feedback holds only makers, use one of Feedback.correction, success, failure, "
            "preference, from_quality"
        )

    @staticmethod
    def correction(t: ArrayLike, loss: str = "mse") -> Target:
        """The output that should have come.

        Args:
            t: float32 (out_features,): the wanted ``base + dY``, or the wanted ``dY`` where no base is given.
            loss: ``"mse"`` is half the summed squared error, ``"cosine"`` is one minus the cosine.

        Returns:
            A `Target`.
        """
        return Target(t, loss=loss)

    @staticmethod
    def success(score: float, response: ArrayLike | None = None) -> Reward:
        """A response that was good.

        Args:
            score: How good, 0 to 1.
            response: float32 (out_features,): embedding of the response that earned the score.

        Returns:
            A `Reward` of ``score``.

        Raises:
            FeedbackError: the score is out of its range or NaN, or ``response`` is missing.
        """
        return _reward("success", score, 0.0, 1.0, response)

    @staticmethod
    def failure(score: float, response: ArrayLike | None = None) -> Reward:
        """A response that was bad.

        Args:
            score: How bad, -1 to 0.
            response: float32 (out_features,): embedding of the response that earned the score.

        Returns:
            A `Reward` of ``score``.

        Raises:
            FeedbackError: the score is out of its range or NaN, or ``response`` is missing.
        """
        return _reward("failure", score, -1.0, 0.0, response)

    @staticmethod
    def from_quality(q: float, response: ArrayLike | None = None) -> Reward:
        """A quality score, as ratings come; what is learned is its distance from the running mean.

        Args:
            q: Quality, 0 to 1.
            response: float32 (out_features,): embedding of the response that was rated.

        Returns:
            A `Reward` of ``q``.

        Raises:
            FeedbackError: ``q`` is out of its range or NaN, or ``response`` is missing.
        """
        return _reward("from_quality", q, 0.0, 1.0, response)

    @staticmethod
    def preference(chosen: ArrayLike, rejected: ArrayLike, p: float = 1.0, beta: float = 20.0) -> Preference:
        """One response was preferred to another (Bradley and Terry 1952).

        Args:
            chosen: float32 (out_features,): embedding of the preferred response.
            rejected: float32 (out_features,): embedding of the other one.
            p: Probability that ``chosen`` is the better one, 0 to 1.
            beta: Steepness on the difference of cosines, above 0.

        Returns:
            A `Preference`.

        Raises:
            FeedbackError: ``p`` or ``beta`` is out of its range or NaN.
        """
        probability = _number("preference: p", p, "a number from 0 to 1", 0.0, 1.0)
        steepness = _number("preference: beta", beta, "a number above 0, at most 1e6", 1e-6, 1e6)
        return Preference(chosen, rejected, p=probability, beta=steepness)


def _number(name: str, value: Any, want: str, low: float, high: float) -> float:
    try:
        number = real(name, value, want)
    except ConfigError as error:
        raise FeedbackError(str(error)) from None
    if not low <= number <= high:
        raise FeedbackError(f"{name}: got {value!r}, expected {want}")
    return number


def _reward(maker: str, score: float, low: float, high: float, response: ArrayLike | None) -> Reward:
    number = _number(f"{maker}: score", score, f"a number from {low:g} to {high:g}", low, high)
    if response is None:
        raise FeedbackError(
            f"{maker}: a score alone has no direction to learn in; pass response=, the embedding of the "
            "response that earned it, or better the output that was wanted, Feedback.correction(t): a target "
            "teaches about ten times as much as a scalar"
        )
    return Reward(number, response)
