"""Optimisers as settings: rows of one table, each the keyword arguments of the core's optimiser.

| name | step on the mean gradient g |
|---|---|
| ``sgd`` | W -= lr g |
| ``momentum`` | v = momentum v + g; W -= lr v (Polyak 1964) |
| ``adamw`` | Adam with bias correction and decoupled weight decay (arXiv 1711.05101) |

``lora_plus_ratio`` is how many times faster B learns than A (LoRA+, arXiv 2402.12354): 1 is plain LoRA; the
paper recommends about 16 with Adam.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from microlora._checks import check_keys, choice, real, wrong

__all__ = ["OPTIMIZERS", "SGD", "AdamW", "Momentum", "OptimizerSettings", "as_optimizer"]


@dataclass(frozen=True)
class OptimizerSettings:
    """What all optimisers share; use one of `OPTIMIZERS`.

    Attributes:
        weight_decay: 0 to 1e6; AdamW takes ``lr * weight_decay`` of each factor in every step, the others
            add ``weight_decay * W`` to the gradient, as torch does.
        lora_plus_ratio: Learning rate of B over that of A, 1e-6 to 1e6.

    Raises:
        ConfigError: A value out of its range.
    """

    kind: ClassVar[str] = ""

    weight_decay: float = 0.0
    lora_plus_ratio: float = 1.0

    def __post_init__(self) -> None:
        put = object.__setattr__
        put(self, "weight_decay", decay_rate("optimizer.weight_decay", self.weight_decay))
        want = "a number from 1e-6 to 1e6"
        ratio = real("optimizer.lora_plus_ratio", self.lora_plus_ratio, want)
        if not 1e-6 <= ratio <= 1e6:
            raise wrong("optimizer.lora_plus_ratio", self.lora_plus_ratio, want)
        put(self, "lora_plus_ratio", ratio)

    def kwargs(self) -> dict[str, Any]:
        """Keyword arguments of the core's optimiser."""
        return {item.name: getattr(self, item.name) for item in dataclasses.fields(self)}

    def to_dict(self) -> dict[str, Any]:
        """A plain dict that JSON can hold."""
        values = {k: list(v) if isinstance(v, tuple) else v for k, v in self.kwargs().items()}
        return {"kind": self.kind, **values}


@dataclass(frozen=True)
class SGD(OptimizerSettings):
    """Plain gradient descent; keeps no state."""

    kind: ClassVar[str] = "sgd"


@dataclass(frozen=True)
class Momentum(OptimizerSettings):
    """Gradient descent with heavy-ball momentum; keeps one float per weight.

    Attributes:
        momentum: Share of the last step that is kept, 0 up to but not including 1.
    """

    kind: ClassVar[str] = "momentum"

    momentum: float = 0.9

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "momentum", _share("optimizer.momentum", self.momentum))


@dataclass(frozen=True)
class AdamW(OptimizerSettings):
    """Adam with decoupled weight decay; keeps two floats per weight.

    Attributes:
        betas: Rates of the running means of g and g^2, each 0 up to but not including 1.
        eps: Added to the root of the second, 1e-30 to 1.
    """

    kind: ClassVar[str] = "adamw"

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8

    def __post_init__(self) -> None:
        super().__post_init__()
        put = object.__setattr__
        if not isinstance(self.betas, tuple | list) or len(self.betas) != 2:
            raise wrong("optimizer.betas", self.betas, "two numbers from 0 up to, but not including, 1")
        put(self, "betas", tuple(_share(f"optimizer.betas[{i}]", b) for i, b in enumerate(self.betas)))
        want = "a number from 1e-30 to 1"
        eps = real("optimizer.eps", self.eps, want)
        if not 1e-30 <= eps <= 1.0:
            raise wrong("optimizer.eps", self.eps, want)
        put(self, "eps", eps)


OPTIMIZERS: Mapping[str, type[OptimizerSettings]] = {row.kind: row for row in (SGD, Momentum, AdamW)}


def as_optimizer(value: object) -> OptimizerSettings:
    """Settings from settings, a name of `OPTIMIZERS`, or the dict of `OptimizerSettings.to_dict`.

    Raises:
        ConfigError: An unknown name or key, or a value out of its range.
    """
    if isinstance(value, OptimizerSettings) and value.kind:
        return value
    if isinstance(value, str):
        return OPTIMIZERS[choice("optimizer", value, tuple(OPTIMIZERS))]()
    if isinstance(value, Mapping):
        values = dict(value)
        row = OPTIMIZERS[choice("optimizer.kind", values.pop("kind", None), tuple(OPTIMIZERS))]
        check_keys("optimizer", values, (item.name for item in dataclasses.fields(row)))
        return row(**values)
    raise wrong("optimizer", value, f"one of {', '.join(map(repr, OPTIMIZERS))}, or its settings")


def decay_rate(name: str, value: object) -> float:
    """``value`` as a weight decay, 0 to 1e6."""
    want = "a number from 0 to 1e6"
    number = real(name, value, want)
    if not 0.0 <= number <= 1e6:
        raise wrong(name, value, want)
    return number + 0.0


def _share(name: str, value: object) -> float:
    want = "a number from 0 up to, but not including, 1"
    number = real(name, value, want)
    if not 0.0 <= number < 1.0:
        raise wrong(name, value, want)
    return number + 0.0
