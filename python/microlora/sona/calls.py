"""Calls of the compiled loop whose arguments people get wrong, checked and named before any work."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from microlora._core import Choice
from microlora.exceptions import DTypeError, FeedbackError, UnknownChoiceError
from microlora.sona.watch import Watched

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

__all__ = ["Calls"]

_MOST = 2**64


class Calls(Watched):
    """Choices among arms, and forgetting."""

    def choose(self, x: ArrayLike, arms: Sequence[str], module: str | None = None) -> Choice:
        """Chooses one of some named arms for an input: LinUCB (arXiv 1003.0146) in the bottleneck.

        Args:
            x: float32 (in_features,).
            arms: Their names, which may differ from call to call.
            module: Whose bottleneck to choose by; None takes the first, and then that of the first choice.

        Returns:
            The choice: ``name`` of the arm, ``arm`` (its position in ``arms``), ``id`` for `reward`,
            ``propensity`` (probability of this choice), and ``scores`` of all arms, in their order.

        Raises:
            DTypeError: ``arms`` is not a sequence of texts, or ``module`` no text.
            ConfigError: No arms, an arm twice, or another module than that of the first choice.
            UnknownModuleError: No such module.
            MicroLoraError: An input that does not fit. Nothing changes in any error.
        """
        if isinstance(arms, str | bytes) or not isinstance(arms, Sequence):
            raise DTypeError(f"arms: got {type(arms).__name__}, expected a list of names (str)")
        for i, name in enumerate(arms):
            if not isinstance(name, str):
                raise DTypeError(f"arms[{i}]: got {type(name).__name__}, expected a name (str)")
        if not (module is None or isinstance(module, str)):
            raise DTypeError(f"module: got {type(module).__name__}, expected a name or None")
        return super().choose(x, arms, module)

    def reward(self, choice: Choice | int, reward: float) -> float:
        """Says what a choice earned; its arm learns from that.

        Args:
            choice: What `choose` returned, or its ``id``.
            reward: A finite number.

        Returns:
            The reward that was expected of it.

        Raises:
            DTypeError: An argument of another type.
            UnknownChoiceError: A choice that is unknown or settled.
            ConfigError: Nothing was chosen yet.
            NonFiniteError: NaN or infinity. Nothing changes in any error.
        """
        number = _whole("choice", choice.id if isinstance(choice, Choice) else choice, "a Choice, or its id")
        if isinstance(reward, bool | str | bytes) or not hasattr(reward, "__float__"):
            raise DTypeError(f"reward: got {type(reward).__name__}, expected a finite number")
        if not 0 <= number < _MOST:
            raise UnknownChoiceError(f"choice: got {number}, expected the id of a choice that waits")
        return super().reward(number, float(reward))

    def forget(self, event: int, how: str | None = None) -> str:
        """Takes an event out of what was learned from it.

        One that waits in the window is taken out by learning the window again without it. An older one is
        taken out by replaying the whole journal into a new one that never held it; meanwhile nothing new is
        learned, and readers go on.

        Args:
            event: Its number: ``result.event`` of what `instant_adapt` returned, or one of `audit`.
            how: ``"replay"`` (exact), ``"downdate"`` (subtracts it from the RLS state, within 1e-5), or None
                for the first of them that is possible.

        Returns:
            Which it was.

        Raises:
            DTypeError: ``event`` is no whole number, or ``how`` no text.
            ConfigError: Another ``how``.
            FeedbackError: An event that is unknown, or that neither way can take out; says why. Nothing
                changes in any error.
        """
        number = _whole("event", event, "the number of an event (result.event)")
        if not (how is None or isinstance(how, str)):
            raise DTypeError(f"how: got {type(how).__name__}, expected 'replay', 'downdate' or None")
        if not 0 <= number < _MOST:
            raise FeedbackError(f"event: got {number}, expected the number of an event that was learned")
        return super().forget(number, how)


def _whole(arg: str, value: object, want: str) -> int:
    index = getattr(value, "__index__", None)
    if isinstance(value, bool) or index is None:
        raise DTypeError(f"{arg}: got {type(value).__name__}, expected {want}")
    number: int = index()
    return number
