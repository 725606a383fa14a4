"""Settings of the three loops: `SonaConfig`, checked on construction, JSON both ways."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self

from microlora._checks import (
    SCHEMA_KEY,
    FrozenMap,
    check_document,
    choice,
    flag,
    integer,
    real,
    write_json,
    wrong,
)
from microlora._document import Document
from microlora.config import MAX_FEATURES, LoraConfig
from microlora.exceptions import ConfigError
from microlora.sona.consolidation import Consolidation
from microlora.target import TargetModule
from microlora.training.config import AdapterTrainingConfig

__all__ = ["CANONICAL_LAMBDA", "SonaConfig"]

SCHEMA_VERSION = 1
MAX_COUNT = 2**31 - 1
#: What ``ewc_lambda=None`` stands for: the best of the delta kind, see docs/ewc.md.
CANONICAL_LAMBDA = 100.0
#: Canonical units of one unit of lambda of the presets: see `SonaConfig.low_latency`.
_PRESET_LAMBDA = 200.0


@dataclass(frozen=True)
class SonaConfig(Document):
    """How an adapter learns on three time scales while it serves.

    Validated on construction; immutable, hashable, equal by value. The presets `low_latency`, `balanced`,
    `high_quality` and `minimal_memory` are copies with a few fields changed.

    Attributes:
        lora: The adapter and its one-event rule. ``lora.instant.train`` must be ``"b"``: fast and slow
            weights share one A. A itself moves in the warm-up and in deep runs only.
        training: The deep loop. Its own ``ewc_lambda``, where it is None, is the one below.
        hidden_dim: Width of every module (in and out), or None.
        dims: ``{module: (in_features, out_features)}`` instead, or None. Both None where a learner is given.
        instant_lr: Step mu of NLMS, above 0 and at most 1: the share of an event's error that its step
            removes (see `InstantConfig`). None takes the default of the feedback's kind. Refused with the
            rule ``"rls"``, which has no step size; with ``"auto"`` targets are learned by RLS all the same.
        background_interval_ms: Least time between the starts of two consolidations, 0 or above.
        background_min_samples: Events that a consolidation waits for, 1 or more.
        deep_trigger_threshold: Sum of qualities since the last deep run at which `should_trigger_deep` says
            yes, above 0.
        consolidation: A name of `Consolidation`.
        max_pending_samples: Most events that wait for a consolidation; older ones leave unconsolidated, and
            are counted. Beside those that are held out there must be room for ``background_min_samples``
            and ``warmup_inputs``.
        quality_threshold: Targets of a lower quality are passed over, and one of quality q counts
            ``(q - threshold) / (1 - threshold)``; 0 up to but not including 1. Rewards and preferences are
            never dropped: a failure is their information.
        max_ms: Time that one call of `maybe_background` may take, above 0; it goes on in the next one. None
            has no limit.
        reservoir_capacity: Most samples that are remembered (Vitter's algorithm R), 0 for none.
        reservoir_max_bytes: Most bytes of them; None has no limit beside the capacity.
        reservoir_dtype: ``"f32"``, or ``"f16"`` for half the bytes.
        reservoir_balance: Rare patterns of inputs keep their place beside common ones
            (Chrysakis & Moens 2020).
        holdout: Share of the events that no loop trains on and the gate measures with, 0 to 0.5.
        gate_tolerance: How much the held-out loss may rise at a consolidation that is kept, as a share.
        gate_min_samples: Held-out samples that the gate needs to judge, 1 or more.
        ewc_lambda: Strength of the penalty on what was learned earlier, in canonical units (mean loss, mean
            of per-sample squares, factor 1/2): in consolidations without a reservoir, and in deep runs. 0
            turns it off; None is 100.
        logit_weight: Weight of remembered outputs beside remembered targets (alpha of DER++), 0 or above.
        replay_ratio: Weight of the reservoir's mean loss beside the window's, 0 or above.
        consolidation_steps: Steps of a consolidation after the merge, 0 or more.
        best_share: Share of a window that ``best_only`` trains on, above 0 and at most 1.
        ensemble_size: Most members of an ``ensemble``.
        ensemble_temperature: Temperature of their weights, above 0: the smaller, the more goes to the
            nearest.
        ensemble_hard: All weight to the nearest member.
        patterns: Most patterns of inputs that are told apart.
        pattern_threshold: Cosine below which an input starts a new pattern, -1 to 1.
        warmup_inputs: Inputs that A is chosen from, once; 0 leaves it as it was drawn.
        seed: Seed of every draw.

    Raises:
        ConfigError: Names the field, the value that came and what was wanted.

    Example:
        >>> config = SonaConfig.for_hidden_dim(768).low_latency()
        >>> config.lora.rank, config.lora.target_modules, config.background_interval_ms
        (1, ('q_proj',), 200.0)
    """

    _document: ClassVar[str] = "sona config"

    lora: LoraConfig = field(default_factory=LoraConfig)
    training: AdapterTrainingConfig = field(default_factory=AdapterTrainingConfig)
    hidden_dim: int | None = None
    dims: Mapping[str, tuple[int, int]] | None = None
    instant_lr: float | None = None
    background_interval_ms: float = 100.0
    background_min_samples: int = 10
    deep_trigger_threshold: float = 100.0
    consolidation: str = Consolidation.EWC_MERGE.value
    max_pending_samples: int = 1000
    quality_threshold: float = 0.5
    max_ms: float | None = 10.0
    reservoir_capacity: int = 512
    reservoir_max_bytes: int | None = None
    reservoir_dtype: str = "f32"
    reservoir_balance: bool = False
    holdout: float = 0.1
    gate_tolerance: float = 0.01
    gate_min_samples: int = 4
    ewc_lambda: float | None = None
    logit_weight: float = 0.5
    replay_ratio: float = 1.0
    consolidation_steps: int = 2
    best_share: float = 0.2
    ensemble_size: int = 4
    ensemble_temperature: float = 0.1
    ensemble_hard: bool = False
    patterns: int = 32
    pattern_threshold: float = 0.5
    warmup_inputs: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        put = object.__setattr__
        for name, kind in _NESTED.items():
            value = getattr(self, name)
            if isinstance(value, Mapping):
                value = kind.from_dict(value)
            if not isinstance(value, kind):
                raise wrong(name, value, f"a {kind.__name__}")
            put(self, name, value)
        for name, check in _CHECKS.items():
            put(self, name, check(name, getattr(self, name)))
        put(self, "consolidation", Consolidation(self.consolidation).value)
        put(self, "dims", _dims(self.dims))
        room = _usable(self.max_pending_samples, self.holdout)
        for name in ("background_min_samples", "warmup_inputs"):
            if room < getattr(self, name):
                want = f"room for {name} ({getattr(self, name)}) beside those that are held out"
                raise wrong("max_pending_samples", self.max_pending_samples, want)
        self._check_rule()
        if self.hidden_dim is not None or self.dims is not None:
            self.lora.resolve_dims(self.hidden_dim, self.dims)

    def _check_rule(self) -> None:
        rule = self.lora.instant
        if rule.train != "b":
            raise wrong("lora.instant.train", rule.train, "'b': the slow and the fast weights share one A")
        if self.instant_lr is None:
            return
        if rule.rule == "rls":
            raise wrong("instant_lr", self.instant_lr, "None with lora.instant.rule 'rls', which has no step")
        if rule.mu is not None and rule.mu != self.instant_lr:
            want = f"None or {rule.mu} beside lora.instant.mu, which is the same setting"
            raise wrong("instant_lr", self.instant_lr, want)

    # -- what the parts are made with --

    @property
    def learner(self) -> LoraConfig:
        """Settings of the live learner: `lora` with ``instant_lr`` as its mu."""
        if self.instant_lr is None:
            return self.lora
        return self.lora.replace(instant=dataclasses.replace(self.lora.instant, mu=self.instant_lr))

    @property
    def canonical_lambda(self) -> float:
        """``ewc_lambda`` as a number."""
        return CANONICAL_LAMBDA if self.ewc_lambda is None else self.ewc_lambda

    @property
    def deep(self) -> AdapterTrainingConfig:
        """Settings of a deep run: `training` with the penalty and the threshold of these settings."""
        training = self.training.training
        strength = self.ewc_lambda if training.ewc_lambda is None else training.ewc_lambda
        changed = training.replace(quality_threshold=self.quality_threshold, ewc_lambda=strength)
        return self.training.replace(training=changed)

    def core_json(self) -> str:
        """What the core is made with: a JSON object of its settings, every key given."""
        skipped = {*_NESTED, "hidden_dim", "dims", "instant_lr"}
        names = [item.name for item in dataclasses.fields(self) if item.name not in skipped]
        values = {name: getattr(self, name) for name in names}
        return write_json({**values, "ewc_lambda": self.canonical_lambda})

    # -- making --

    @classmethod
    def for_hidden_dim(cls, hidden_dim: int, **changes: Any) -> Self:
        """Settings for square modules of ``hidden_dim`` features, with the rank that suits them.

        Args:
            hidden_dim: Width of every module; the rank is that of `LoraConfig.for_hidden_dim`.
            **changes: Other fields.

        Raises:
            ConfigError: As of the class.
        """
        width = integer("hidden_dim", hidden_dim, 1, MAX_FEATURES)
        return cls(**{"lora": LoraConfig.for_hidden_dim(width), "hidden_dim": width, **changes})

    def low_latency(self) -> Self:
        """A copy for the shortest calls: rank 1, q_proj, consolidation every 200 ms, no penalty.

        Lambda of the three presets is 0, 0.1 and 0.5 where the Fisher is summed over 100 samples and the
        penalty has no factor 1/2. The canonical unit is a mean with that factor, so each is times
        ``100 * 2``: 0, 20 and 100.
        """
        return self._preset(1, TargetModule.speed(), 200.0, 0.0)

    def balanced(self) -> Self:
        """A copy between the two: rank 2, q_proj and v_proj, every 100 ms, lambda 20 (see `low_latency`)."""
        return self._preset(2, TargetModule.quality(), 100.0, 0.1)

    def high_quality(self) -> Self:
        """A copy that learns most: rank 4, all of attention, every 50 ms, lambda 100 (see `low_latency`)."""
        return self._preset(4, TargetModule.attention(), 50.0, 0.5)

    def minimal_memory(self) -> Self:
        """A copy of the fewest bytes: rank 1, q_proj, at most 100 events that wait."""
        room = _usable(100, self.holdout)
        return self.replace(
            lora=self._lora(1, TargetModule.speed()),
            max_pending_samples=100,
            background_min_samples=min(self.background_min_samples, room),
            warmup_inputs=min(self.warmup_inputs, room),
        )

    def _preset(self, rank: int, modules: tuple[TargetModule, ...], interval: float, unit: float) -> Self:
        return self.replace(
            lora=self._lora(rank, modules),
            background_interval_ms=interval,
            ewc_lambda=unit * _PRESET_LAMBDA,
        )

    def _lora(self, rank: int, modules: tuple[TargetModule, ...]) -> LoraConfig:
        # Ranks and alphas of single modules name modules that may be gone.
        return self.lora.replace(
            rank=rank, alpha=2.0 * rank, target_modules=modules, module_ranks={}, module_alphas={}
        )

    # -- JSON --

    def to_dict(self) -> dict[str, Any]:
        """A plain dict that JSON can hold, with its ``schema_version``."""
        out: dict[str, Any] = {SCHEMA_KEY: SCHEMA_VERSION}
        for item in dataclasses.fields(self):
            value = getattr(self, item.name)
            out[item.name] = value.to_dict() if hasattr(value, "to_dict") else value
        if self.dims is not None:
            out["dims"] = {module: list(shape) for module, shape in self.dims.items()}
        return out

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """The config of a dict; keys left out keep their default, no ``schema_version`` means version 1.

        Raises:
            ConfigError: An unknown key (with the nearest known one), or a value out of its range.
            FormatError: Written by a newer version of microlora.
        """
        names = [item.name for item in dataclasses.fields(cls)]
        return cls(**check_document(cls._document, data, names, SCHEMA_VERSION))


_NESTED: Mapping[str, Any] = {"lora": LoraConfig, "training": AdapterTrainingConfig}


def _number(low: float, high: float, want: str, *, low_open: bool = False, high_open: bool = False) -> Check:
    def check(name: str, value: object) -> float:
        number = real(name, value, want)
        above = number > low if low_open else number >= low
        below = number < high if high_open else number <= high
        if not (above and below):
            raise wrong(name, value, want)
        return number + 0.0  # -0.0 would print as another value than 0.0

    return check


def _count(low: int, high: int = MAX_COUNT) -> Check:
    return lambda name, value: integer(name, value, low, high)


def _or_none(check: Check) -> Check:
    return lambda name, value: None if value is None else check(name, value)


Check = Callable[[str, object], Any]

_STRENGTH = _number(0.0, 1e30, "a number from 0 to 1e30")
_CHECKS: Mapping[str, Check] = {
    "hidden_dim": _or_none(_count(1, MAX_FEATURES)),
    "instant_lr": _or_none(_number(1e-30, 1.0, "a number above 0 and at most 1, or None")),
    "background_interval_ms": _number(0.0, 1e9, "milliseconds from 0 to 1e9"),
    "background_min_samples": _count(1),
    "deep_trigger_threshold": _number(0.0, 1e30, "a number above 0", low_open=True),
    "max_pending_samples": _count(1),
    "quality_threshold": _number(0.0, 1.0, "a number from 0 up to, but not including, 1", high_open=True),
    "max_ms": _or_none(_number(0.0, 1e9, "milliseconds above 0, or None", low_open=True)),
    "reservoir_capacity": _count(0),
    "reservoir_max_bytes": _or_none(_count(1, 2**53)),
    "reservoir_dtype": lambda name, value: choice(name, value, ("f32", "f16")),
    "reservoir_balance": flag,
    "holdout": _number(0.0, 0.5, "a share from 0 to 0.5"),
    "gate_tolerance": _number(0.0, 1e30, "a share of 0 or more"),
    "gate_min_samples": _count(1),
    "ewc_lambda": _or_none(_number(0.0, 1e30, "a number from 0 to 1e30, or None")),
    "logit_weight": _STRENGTH,
    "replay_ratio": _STRENGTH,
    "consolidation_steps": _count(0, 1000),
    "best_share": _number(0.0, 1.0, "a share above 0 and at most 1", low_open=True),
    "ensemble_size": _count(1, 4096),
    "ensemble_temperature": _number(0.0, 1e30, "a number above 0", low_open=True),
    "ensemble_hard": flag,
    "patterns": _count(1, 65_536),
    "pattern_threshold": _number(-1.0, 1.0, "a cosine from -1 to 1"),
    "warmup_inputs": _count(0, 65_536),
    "seed": _count(0, 2**63 - 1),
}


def _usable(pending: int, holdout: float) -> int:
    """How many of so many events are not held out."""
    return int(pending * (1.0 - holdout) + 1e-9)


def _dims(value: object) -> FrozenMap[tuple[int, int]] | None:
    if value is None:
        return None
    if not isinstance(value, Mapping):
        raise wrong("dims", value, "a mapping of module to (in_features, out_features)")
    out: dict[str, tuple[int, int]] = {}
    for module, shape in value.items():
        if not isinstance(module, str):
            raise ConfigError(f"dims: got the module {module!r}, expected a name")
        if not isinstance(shape, tuple | list) or len(shape) != 2:
            raise wrong(f"dims[{module!r}]", shape, "(in_features, out_features)")
        n_in, n_out = (integer(f"dims[{module!r}][{i}]", n, 1, MAX_FEATURES) for i, n in enumerate(shape))
        out[module] = (n_in, n_out)
    return FrozenMap(out)
