"""How adapters are merged: `MergeConfig`, checked on construction, JSON both ways."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property
from typing import Any, ClassVar, Self, cast

from microlora._checks import (
    SCHEMA_KEY,
    FrozenMap,
    check_document,
    check_keys,
    choice,
    flag,
    integer,
    real,
    text,
    wrong,
)
from microlora._document import Document
from microlora.config import DTYPE_BYTES, MAX_RANK
from microlora.exceptions import ConfigError
from microlora.merging.constructors import Constructors
from microlora.merging.methods import METHOD_SETTINGS, Method, method

__all__ = ["MISSING", "PERFORMANCE", "SEMANTICS", "MergeConfig"]

SCHEMA_VERSION = 1
PERFORMANCE = "performance"
SEMANTICS = ("exact", "mergekit", "peft")
MISSING = ("skip", "zero", "error", "common")

Overrides = tuple[tuple[str, FrozenMap[Any]], ...]


@dataclass(frozen=True)
class MergeConfig(Constructors, Document):
    """Settings of a merge. Validated on construction; immutable, hashable, equal by value.

    None stands for the default of the method, which :attr:`row` tells. A setting given to a method that has
    no use for it is refused.

    Attributes:
        method: A name of the table in docs/merging.md.
        weights: ``{adapter: weight}``, one for each; ``"performance"`` for weights from recorded metrics;
            None for equal ones.
        density: Share of the entries that is kept, above 0 and up to 1.
        lam: Factor of the result.
        rank: Rank of every merged module; None takes the sum of the parents' ranks (family ``"factor"``) or
            their largest (``"element"``).
        seed: Seed of random masks, 0 to 2^64 - 1.
        semantics: ``"exact"`` (the paper, on the delta), ``"mergekit"`` or ``"peft"`` where those differ.
        dtype: How results are stored: ``"f32"``, ``"f16"`` or ``"bf16"``; None takes the parents' widest.
        report: ``"default"``, or ``"full"`` for the rate of sign conflicts too, at the cost of a pass over
            the deltas.
        t: Place between the first (0) and the second (1) of two adapters.
        epsilon: Spread of keep probabilities around ``density``.
        gamma: Share of the largest entries that is dropped.
        rho: Share of the off-diagonal part of Grams that is used, 0 to 1.
        normalize: Divide by the sum of weights.
        majority: Signs are elected by ``"total"`` (sums) or ``"frequency"`` (numbers).
        missing: Modules that not every adapter has: ``"skip"`` merges those that have it, ``"zero"`` takes a
            change of zero for the others (not with semantics ``"peft"``), ``"common"`` leaves such modules
            out, ``"error"`` refuses. With ``"skip"``, a module of one adapter alone is merged by the method
            like any other; only slerp, nuslerp, model_stock, regmean and fisher, which have nothing to do
            then, take it as it is, times ``lam``.
        metric: Name of the metric of ``weights="performance"``; None where there is only one.
        overrides: Settings of single modules, ``{pattern: {setting: value}}``: the first pattern (``*``,
            ``?``, ``[..]``, case-sensitive, on the whole name) that matches wins. One that names a method
            begins from that method's defaults; weights, lam, rank and seed are taken over where it has a use
            for them.

    Raises:
        ConfigError: names the setting, the value that came and what was wanted.
    """

    _document: ClassVar[str] = "merge config"

    method: str = "average"
    weights: Mapping[str, float] | str | None = None
    density: float | None = None
    lam: float | None = None
    rank: int | None = None
    seed: int | None = None
    semantics: str = "exact"
    dtype: str | None = None
    report: str = "default"
    t: float | None = None
    epsilon: float | None = None
    gamma: float | None = None
    rho: float | None = None
    normalize: bool | None = None
    majority: str | None = None
    missing: str = "skip"
    metric: str | None = None
    overrides: Overrides | Mapping[str, Mapping[str, Any]] = ()

    def __post_init__(self) -> None:
        put = object.__setattr__
        put(self, "semantics", choice("semantics", self.semantics, SEMANTICS))
        row = method(self.method, self.semantics)
        put(self, "method", row.name)
        for name in METHOD_SETTINGS:
            value = getattr(self, name)
            if value is None:
                continue
            if not row.takes(name):
                takes = ", ".join(s for s in METHOD_SETTINGS if row.takes(s))
                raise wrong(name, value, f"none with method {row.name!r}, which takes {takes}")
            put(self, name, _CHECKS[name](name, value))
        if self.dtype is not None:
            put(self, "dtype", choice("dtype", self.dtype, tuple(DTYPE_BYTES)))
        put(self, "report", choice("report", self.report, ("default", "full")))
        put(self, "missing", choice("missing", self.missing, MISSING))
        if self.missing == "zero" and self.semantics == "peft":
            want = (
                "'skip', 'common' or 'error' with semantics 'peft', which passes over what an adapter lacks"
            )
            raise wrong("missing", "zero", want)
        if self.metric is not None:
            put(self, "metric", text("metric", self.metric, empty=False))
        self._together(row)
        put(self, "overrides", _overrides(self.overrides))
        effective = [self._overridden(changes) for _, changes in self.pairs]
        if self.metric is not None and all(c.weights != PERFORMANCE for c in (self, *effective)):
            raise wrong("metric", self.metric, f"none without weights={PERFORMANCE!r}")

    def _together(self, row: Method) -> None:
        """Settings that are right one by one and wrong together."""
        density, gamma, epsilon = (self.value(name) for name in ("density", "gamma", "epsilon"))
        if gamma is not None and density + gamma > 1.0 + 1e-12:
            raise wrong("density, gamma", (density, gamma), "a sum of 1 at most: both ends are dropped")
        if epsilon is not None:
            half = epsilon if self.semantics == "mergekit" else epsilon / 2
            if density - half <= 0.0 or density + half > 1.0 + 1e-12:
                want = "probabilities density -+ epsilon" + ("" if half == epsilon else " / 2")
                raise wrong("density, epsilon", (density, epsilon), f"{want} above 0 and up to 1")

    @property
    def pairs(self) -> Overrides:
        """The overrides in order, ``(pattern, settings)``."""
        return cast(Overrides, self.overrides)

    @property
    def row(self) -> Method:
        """The method's row of the table: its defaults, laws and paper."""
        return method(self.method, self.semantics)

    def value(self, name: str) -> Any:
        """A setting, with the method's default filled in; None where the method has none of it."""
        own = getattr(self, name)
        return self.row.defaults.get(name) if own is None else own

    # -- modules --

    @cached_property
    def _plain(self) -> MergeConfig:
        return self.replace(overrides=()) if self.overrides else self

    @cached_property
    def _effective(self) -> list[tuple[str, MergeConfig]]:
        return [(pattern, self._overridden(changes)) for pattern, changes in self.pairs]

    def for_module(self, module: str) -> MergeConfig:
        """What holds for one module: these settings, or those of the first override whose pattern matches."""
        for pattern, config in self._effective:
            if fnmatchcase(module, pattern):
                return config
        return self._plain

    def _overridden(self, changes: Mapping[str, Any]) -> MergeConfig:
        values = {item.name: getattr(self, item.name) for item in dataclasses.fields(self)}
        values.update(overrides=(), metric=None)
        if "method" in changes:
            row = method(changes["method"], self.semantics)
            for name in METHOD_SETTINGS:
                common = name in ("weights", "lam", "rank", "seed")
                if not (common and row.takes(name)):
                    values[name] = None
        values.update(changes)
        if values["weights"] == PERFORMANCE:
            values["metric"] = self.metric
        return MergeConfig(**values)

    # -- JSON --

    def to_dict(self) -> dict[str, Any]:
        """A plain dict that JSON can hold, with its ``schema_version``.

        Overrides are a list, because their order has a meaning.
        """
        out: dict[str, Any] = {SCHEMA_KEY: SCHEMA_VERSION}
        out.update((item.name, getattr(self, item.name)) for item in dataclasses.fields(self))
        out["weights"] = _plain(self.weights)
        out["overrides"] = [
            {"modules": pattern, **{name: _plain(value) for name, value in changes.items()}}
            for pattern, changes in self.pairs
        ]
        return out

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """The config of a dict; keys left out keep their default, no ``schema_version`` means version 1.

        Raises:
            ConfigError: An unknown key (with the nearest known one), or a wrong value.
            FormatError: Written by a newer version of microlora.
        """
        names = [item.name for item in dataclasses.fields(cls)]
        values = check_document(cls._document, data, names, SCHEMA_VERSION)
        listed = values.get("overrides")
        if isinstance(listed, list):
            pairs = []
            for i, item in enumerate(listed):
                if not isinstance(item, Mapping) or "modules" not in item:
                    raise wrong(f"overrides[{i}]", item, "an object with the pattern as its key 'modules'")
                pairs.append((item["modules"], {k: v for k, v in item.items() if k != "modules"}))
            values["overrides"] = pairs
        return cls(**values)


def _plain(value: Any) -> Any:
    return dict(value) if isinstance(value, Mapping) else value


def _weights(name: str, value: object) -> FrozenMap[float] | str:
    want = "{adapter: weight}, 'performance' or None"
    if isinstance(value, str):
        return choice(name, value, (PERFORMANCE,))
    if not isinstance(value, Mapping) or not value:
        raise wrong(name, value, want)
    return FrozenMap(
        (text(f"{name}: name", key, empty=False), real(f"{name}[{key!r}]", item, "a finite number") + 0.0)
        for key, item in value.items()
    )


def _between(low: float, high: float, want: str, *, low_open: bool = False, high_open: bool = False) -> Any:
    def check(name: str, value: object) -> float:
        number = real(name, value, want)
        above = number > low if low_open else number >= low
        below = number < high if high_open else number <= high
        if not (above and below):
            raise wrong(name, value, want)
        return number + 0.0  # -0.0 would print as another value than 0.0

    return check


def _lam(name: str, value: object) -> float:
    want = "0, or a number of a size from 1e-12 to 1e12"  # beyond, alpha leaves the range of LoraConfig
    number = real(name, value, want)
    if number != 0.0 and not 1e-12 <= abs(number) <= 1e12:
        raise wrong(name, value, want)
    return number + 0.0


_CHECKS: Mapping[str, Any] = {
    "weights": _weights,
    "density": _between(0.0, 1.0, "a number above 0 and up to 1, the share that is kept", low_open=True),
    "lam": _lam,
    "rank": lambda name, value: integer(name, value, 1, MAX_RANK),
    "seed": lambda name, value: integer(name, value, 0, 2**64 - 1),
    "t": _between(0.0, 1.0, "a number from 0 to 1"),
    "epsilon": _between(0.0, 1.0, "a number from 0 up to, but not including, 1", high_open=True),
    "gamma": _between(0.0, 1.0, "a number from 0 up to, but not including, 1", high_open=True),
    "rho": _between(0.0, 1.0, "a number from 0 to 1"),
    "normalize": flag,
    "majority": lambda name, value: choice(name, value, ("total", "frequency")),
}


def _overrides(value: object) -> Overrides:
    want = "{pattern of modules: {setting: value}}"
    pairs: Iterable[Any]
    if isinstance(value, Mapping):
        pairs = value.items()
    elif isinstance(value, tuple | list):
        pairs = value
    elif value is None:
        pairs = ()
    else:
        raise wrong("overrides", value, want)
    out: list[tuple[str, FrozenMap[Any]]] = []
    for pair in pairs:
        if not isinstance(pair, tuple | list) or len(pair) != 2 or not isinstance(pair[1], Mapping):
            raise wrong("overrides", pair, want)
        pattern = text("overrides: pattern", pair[0], empty=False)
        if not pair[1]:
            raise wrong(f"overrides[{pattern!r}]", pair[1], "at least one setting")
        check_keys(f"overrides[{pattern!r}]", pair[1], ("method", *METHOD_SETTINGS))
        if pattern in (p for p, _ in out):
            raise ConfigError(f"overrides: pattern {pattern!r} came twice, expected every pattern once")
        changes = {k: FrozenMap(v) if isinstance(v, Mapping) else v for k, v in pair[1].items()}
        out.append((pattern, FrozenMap(changes)))
    return tuple(out)
