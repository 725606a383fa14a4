"""Settings of the one-event update, `instant`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from microlora._checks import check_keys, choice, real, wrong
from microlora.exceptions import ConfigError

RULES = ("auto", "rls", "nlms")
TRAIN = ("b", "both")


@dataclass(frozen=True)
class InstantConfig:
    """How ``instant`` turns one event of feedback into new weights.

    Attributes:
        rule: ``"rls"`` is recursive least squares on B, for targets (Haykin, Adaptive Filter Theory);
            ``"nlms"`` is a normalised gradient step (Nagumo & Noda 1967) with a line check, for any
            feedback. ``"auto"`` takes RLS for targets and NLMS for the rest; with ``train="both"`` it is
            NLMS throughout, because RLS remembers past inputs through an A that must not move.
        forgetting: phi of RLS, above 0 and at most 1: an event weighs phi ** (events since it); 1 never
            forgets.
        rho: ridge prior of RLS, above 0, in units of the mean of ``|u|^2`` with ``u = s x A``: larger learns
            more cautiously from the first events.
        mu: step of NLMS, above 0 and at most 1: a B-only step leaves the error of its event times ``1 - mu``.
            None takes the default of the feedback's kind.
        train: ``"b"`` moves B only, ``"both"`` moves A and B.
        kappa: how far one unit of advantage should move the score of a rewarded response, above 0.
        baseline_rate: rate of the moving average of rewards, above 0 and at most 1. It starts as their plain
            mean and is 0 before the first, so that a first failure already pushes away.
        max_grad_norm: norm of dL/dy above which NLMS shortens it to that (Huber), above 0. None does not.

    Raises:
        ConfigError: a value out of its range, or ``rule="rls"`` with ``train="both"``.
    """

    rule: str = "auto"
    forgetting: float = 1.0
    rho: float = 1.0
    mu: float | None = None
    train: str = "b"
    kappa: float = 0.3
    baseline_rate: float = 0.02
    max_grad_norm: float | None = None

    def __post_init__(self) -> None:
        put = object.__setattr__
        put(self, "rule", choice("instant.rule", self.rule, RULES))
        put(self, "train", choice("instant.train", self.train, TRAIN))
        for name in ("forgetting", "baseline_rate"):
            put(self, name, _share(name, getattr(self, name)))
        if self.mu is not None:
            put(self, "mu", _share("mu", self.mu, " or None"))
        for name in ("rho", "kappa"):
            put(self, name, _positive(name, getattr(self, name)))
        if self.max_grad_norm is not None:
            put(self, "max_grad_norm", _positive("max_grad_norm", self.max_grad_norm, " or None"))
        if self.rule == "rls" and self.train == "both":
            raise ConfigError(
                "instant.train: got 'both' with instant.rule 'rls', expected 'b' "
                "(RLS needs an A that stays), or the rule 'nlms'"
            )

    def to_dict(self) -> dict[str, Any]:
        """A plain dict that JSON can hold."""
        return {item.name: getattr(self, item.name) for item in fields(self)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> InstantConfig:
        """The settings of a dict; keys left out keep their default.

        Raises:
            ConfigError: an unknown key (with the nearest known one), or a value out of its range.
        """
        if not isinstance(data, Mapping):
            raise wrong("instant", data, "a mapping")
        check_keys("instant", data, (field.name for field in fields(cls)))
        return cls(**data)


def _share(name: str, value: object, alternative: str = "") -> float:
    want = f"a number above 0 and at most 1{alternative}"
    number = real(f"instant.{name}", value, want)
    # The kernels hold these as float32: a share that would round to 0 there is refused here.
    if not 1e-30 <= number <= 1.0:
        raise wrong(f"instant.{name}", value, want)
    return number


def _positive(name: str, value: object, alternative: str = "") -> float:
    want = f"a number from 1e-30 to 1e30{alternative}"
    number = real(f"instant.{name}", value, want)
    if not 1e-30 <= number <= 1e30:
        raise wrong(f"instant.{name}", value, want)
    return number
