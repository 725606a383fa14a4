"""Learning rate schedules: seven rows of one table, and a decay per epoch on top of any of them.

With step t = 0, 1, ..., total T, warm-up W, base rate b, lowest rate m and ``tau = (t - W) / (T - W)``:

| name | rate from step W on |
|---|---|
| ``constant`` | b |
| ``warmup_constant`` | b |
| ``linear`` | b + (m - b) tau |
| ``cosine`` | m + (b - m)(1 + cos(pi tau)) / 2 |
| ``exponential`` | max(m, b decay^(t - W)); decay is (m / b)^(1 / (T - W)) where none is given |
| ``step`` | max(m, b gamma^(milestones passed)) |
| ``one_cycle`` | cosine from M/25 up to M at 0.3 T - 1, then down to M/250,000 at T - 1 (arXiv 1708.07120) |

Before step W the rate is ``m + (b - m)(t + 1) / W``. Steps beyond T stay at the rate of T: nothing restarts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import numpy as np

from microlora._checks import check_keys, choice, integer, real, wrong
from microlora._document import Document
from microlora.exceptions import ConfigError

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

    Rates = NDArray[np.float64]

__all__ = ["SCHEDULES", "LearningRateSchedule"]

MAX_STEPS = 2**53
# Of torch's OneCycleLR, which is what people compare with.
ONE_CYCLE_RISE, ONE_CYCLE_START, ONE_CYCLE_END = 0.3, 25.0, 1e4


@dataclass(frozen=True)
class LearningRateSchedule(Document):
    """The learning rate of every step.

    Attributes:
        name: One of `SCHEDULES`.
        base_lr: Rate b, above 0. None leaves it to the run (``TrainingConfig.learning_rate``).
        total: Steps T, 1 or more. None leaves it to the run, which knows how many it will make; asked for a
            rate without it, the schedules that need it refuse.
        warmup: Steps W of linear warm-up, fewer than T. None leaves it to the run. ``constant`` and
            ``one_cycle`` take none.
        min_lr: Lowest rate m, 0 up to b.
        decay: Factor per step of ``exponential``, above 0 and at most 1.
        gamma: Factor per milestone of ``step``, above 0 and at most 1.
        milestones: Steps at which ``step`` falls, rising; none given means half and three quarters of T.
        epoch_decay: A factor on top of every epoch, ``rate * epoch_decay^epoch``; above 0 and at most 1.
        epoch_steps: Steps of an epoch, which ``epoch_decay`` needs. None leaves it to the run.

    Raises:
        ConfigError: A value out of its range, or one that the named schedule has no use for.

    Example:
        >>> LearningRateSchedule("linear", base_lr=1.0, total=4).lrs([0, 1, 2, 3, 4, 9]).tolist()
        [1.0, 0.75, 0.5, 0.25, 0.0, 0.0]
    """

    _document: ClassVar[str] = "schedule"

    name: str = "constant"
    base_lr: float | None = None
    total: int | None = None
    warmup: int | None = None
    min_lr: float = 0.0
    decay: float | None = None
    gamma: float = 0.1
    milestones: tuple[int, ...] = ()
    epoch_decay: float = 1.0
    epoch_steps: int | None = None

    def __post_init__(self) -> None:
        put = object.__setattr__
        put(self, "name", choice("schedule.name", self.name, tuple(SCHEDULES)))
        if self.base_lr is not None:
            put(self, "base_lr", rate("schedule.base_lr", self.base_lr))
        for name in ("total", "epoch_steps"):
            if getattr(self, name) is not None:
                put(self, name, integer(f"schedule.{name}", getattr(self, name), 1, MAX_STEPS))
        if self.warmup is not None:
            put(self, "warmup", integer("schedule.warmup", self.warmup, 0, MAX_STEPS))
        want = "a number of 0 or more, at most 1e30"
        low = real("schedule.min_lr", self.min_lr, want)
        if not 0.0 <= low <= 1e30:
            raise wrong("schedule.min_lr", self.min_lr, want)
        put(self, "min_lr", low + 0.0)
        if self.decay is not None:
            put(self, "decay", factor("schedule.decay", self.decay))
        put(self, "gamma", factor("schedule.gamma", self.gamma))
        put(self, "epoch_decay", factor("schedule.epoch_decay", self.epoch_decay))
        put(self, "milestones", _milestones(self.milestones))
        self._check_uses()
        if self.base_lr is not None and self.min_lr > self.base_lr:
            raise wrong("schedule.min_lr", self.min_lr, f"at most base_lr, {self.base_lr:g}")
        if self.total is not None and self.warmup is not None and self.warmup >= self.total:
            raise wrong("schedule.warmup", self.warmup, f"fewer steps than total, {self.total}")

    def _check_uses(self) -> None:
        """A value that the named schedule would pass over is refused."""
        row = SCHEDULES[self.name]
        given = {
            "warmup": bool(self.warmup),
            "min_lr": self.min_lr != 0.0,
            "decay": self.decay is not None,
            "milestones": bool(self.milestones),
        }
        for name, is_given in given.items():
            if is_given and name not in row.uses:
                hint = " (use 'warmup_constant')" if (self.name, name) == ("constant", "warmup") else ""
                raise ConfigError(
                    f"schedule.{name}: got {getattr(self, name)!r} with the schedule {self.name!r}, "
                    f"which has no use for it{hint}"
                )
        if self.name == "warmup_constant" and self.warmup == 0:
            raise wrong("schedule.warmup", 0, "1 step or more with the schedule 'warmup_constant'")

    def lr(self, step: int) -> float:
        """The rate of one step, counted from 0.

        Raises:
            ConfigError: ``step`` is no integer of 0 or more, or the schedule lacks a number that it needs.
        """
        return float(self.lrs([integer("step", step, 0, MAX_STEPS)])[0])

    def lrs(self, steps: ArrayLike) -> Rates:
        """The rates of several steps.

        Args:
            steps: Integers (n,), 0 or more.

        Returns:
            float64 (n,).

        Raises:
            ConfigError: A negative step or one that is no integer, or the schedule lacks a number it needs.
        """
        came = np.asarray(steps)
        if came.size and (came.dtype.kind not in "iu" or came.min() < 0):
            raise wrong("steps", steps, "integers of 0 or more")
        self._check_complete()
        t = came.astype(np.float64)
        if self.total is not None:
            t = np.minimum(t, float(self.total))
        rates = SCHEDULES[self.name].rates(self, t)
        warmup = self.warmup or 0
        if warmup:
            early = self.min_lr + (_base(self) - self.min_lr) * (t + 1.0) / warmup
            rates = np.where(t < warmup, early, rates)
        if self.epoch_decay != 1.0:
            assert self.epoch_steps is not None
            rates = rates * self.epoch_decay ** np.floor_divide(t, self.epoch_steps)
        return rates

    def _check_complete(self) -> None:
        missing = []
        if self.base_lr is None:
            missing.append("base_lr")
        if self.needs_total and self.total is None:
            missing.append("total")
        if self.name == "warmup_constant" and not self.warmup:
            missing.append("warmup")
        if self.epoch_decay != 1.0 and self.epoch_steps is None:
            missing.append("epoch_steps")
        for name in missing:
            raise ConfigError(f"schedule.{name}: got None, expected a number: {self.name!r} needs it")
        if self.name == "exponential" and self.decay is None and self.min_lr == 0.0:
            raise ConfigError("schedule.min_lr: got 0.0, expected above 0 for 'exponential' without decay")

    @property
    def needs_total(self) -> bool:
        """Whether it must know how many steps the run makes."""
        return SCHEDULES[self.name].needs_total(self)

    def bind(
        self, *, base_lr: float, total: int | None, warmup: int = 0, epoch_steps: int | None = None
    ) -> LearningRateSchedule:
        """This schedule with what a run knows put where nothing is set.

        Raises:
            ConfigError: A number is still missing that the schedule needs, or they do not fit together.
        """
        bound = dataclasses.replace(
            self,
            base_lr=base_lr if self.base_lr is None else self.base_lr,
            total=total if self.total is None else self.total,
            warmup=warmup if self.warmup is None else self.warmup,
            epoch_steps=epoch_steps if self.epoch_steps is None else self.epoch_steps,
        )
        bound._check_complete()
        return bound

    def to_dict(self) -> dict[str, Any]:
        """A plain dict that JSON can hold."""
        return {**dataclasses.asdict(self), "milestones": list(self.milestones)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> LearningRateSchedule:
        """The schedule of a dict; keys left out keep their default.

        Raises:
            ConfigError: An unknown key (with the nearest known one), or a value out of its range.
        """
        if not isinstance(data, Mapping):
            raise wrong("schedule", data, "a mapping")
        check_keys("schedule", data, (item.name for item in dataclasses.fields(cls)))
        return cls(**data)


class _Row(NamedTuple):
    rates: Callable[[LearningRateSchedule, Rates], Rates]
    uses: frozenset[str]
    needs_total: Callable[[LearningRateSchedule], bool]


def _base(s: LearningRateSchedule) -> float:
    assert s.base_lr is not None
    return s.base_lr


def _span(s: LearningRateSchedule) -> tuple[float, float]:
    assert s.total is not None
    return float(s.warmup or 0), float(s.total)


def _tau(s: LearningRateSchedule, t: Rates) -> Rates:
    start, end = _span(s)
    return np.clip((t - start) / (end - start), 0.0, 1.0)


def _constant(s: LearningRateSchedule, t: Rates) -> Rates:
    return np.full_like(t, _base(s))


def _linear(s: LearningRateSchedule, t: Rates) -> Rates:
    tau = _tau(s, t)
    # Both ends exact, which b + (m - b) tau is not in floating point.
    return _base(s) * (1.0 - tau) + s.min_lr * tau


def _cosine(s: LearningRateSchedule, t: Rates) -> Rates:
    share = 0.5 * (1.0 + np.cos(np.pi * _tau(s, t)))
    return _base(s) * share + s.min_lr * (1.0 - share)


def _exponential(s: LearningRateSchedule, t: Rates) -> Rates:
    base, since = _base(s), np.maximum(t - float(s.warmup or 0), 0.0)
    if s.decay is not None:
        return np.maximum(s.min_lr, base * s.decay**since)
    return np.maximum(s.min_lr, base * (s.min_lr / base) ** _tau(s, t))


def _step(s: LearningRateSchedule, t: Rates) -> Rates:
    if s.milestones:
        marks = np.asarray(s.milestones, np.float64)
    else:
        _, total = _span(s)
        marks = np.floor(np.asarray([0.5, 0.75]) * total)
    passed = np.searchsorted(marks, t, side="right")
    return np.maximum(s.min_lr, _base(s) * s.gamma ** passed.astype(np.float64))


def _one_cycle(s: LearningRateSchedule, t: Rates) -> Rates:
    _, total = _span(s)
    top, peak, last = _base(s), ONE_CYCLE_RISE * total - 1.0, total - 1.0
    t = np.minimum(t, last)
    low, end = top / ONE_CYCLE_START, top / ONE_CYCLE_START / ONE_CYCLE_END
    # Below four steps the peak would lie before the first one.
    up = np.clip(t / peak, 0.0, 1.0) if peak > 0.0 else np.ones_like(t)
    down = np.clip((t - peak) / (last - peak), 0.0, 1.0)
    rise, fall = 0.5 * (1.0 - np.cos(np.pi * up)), 0.5 * (1.0 + np.cos(np.pi * down))
    return np.where(t <= peak, low * (1.0 - rise) + top * rise, end * (1.0 - fall) + top * fall)


def _always(_: LearningRateSchedule) -> bool:
    return True


def _never(_: LearningRateSchedule) -> bool:
    return False


_WARM = frozenset({"warmup", "min_lr"})

SCHEDULES: Mapping[str, _Row] = {
    "constant": _Row(_constant, frozenset(), _never),
    "warmup_constant": _Row(_constant, _WARM, _never),
    "linear": _Row(_linear, _WARM, _always),
    "cosine": _Row(_cosine, _WARM, _always),
    "exponential": _Row(_exponential, _WARM | {"decay"}, lambda s: s.decay is None),
    "step": _Row(_step, _WARM | {"milestones"}, lambda s: not s.milestones),
    "one_cycle": _Row(_one_cycle, frozenset(), _always),
}


def rate(name: str, value: object) -> float:
    """``value`` as a learning rate above 0."""
    want = "a number above 0, at most 1e30"
    number = real(name, value, want)
    if not 1e-30 <= number <= 1e30:
        raise wrong(name, value, want)
    return number


def factor(name: str, value: object) -> float:
    """``value`` as a factor above 0 and at most 1."""
    want = "a number above 0 and at most 1"
    number = real(name, value, want)
    if not 0.0 < number <= 1.0:
        raise wrong(name, value, want)
    return number


def _milestones(value: object) -> tuple[int, ...]:
    want = "rising steps, each 1 or more"
    if isinstance(value, str | bytes | Mapping) or not hasattr(value, "__iter__"):
        raise wrong("schedule.milestones", value, want)
    marks = tuple(integer(f"schedule.milestones[{i}]", m, 1, MAX_STEPS) for i, m in enumerate(value))
    if any(a >= b for a, b in pairwise(marks)):
        raise wrong("schedule.milestones", marks, want)
    return marks
