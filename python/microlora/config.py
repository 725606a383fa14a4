"""What an adapter is made of: `LoraConfig`, its builder, and exact sizes before anything is allocated."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from microlora._checks import (
    SCHEMA_KEY,
    FrozenMap,
    check_document,
    choice,
    flag,
    integer,
    near,
    real,
    text,
    texts,
    wrong,
)
from microlora._document import Document
from microlora.exceptions import ConfigError, UnknownModuleError
from microlora.instant_config import InstantConfig
from microlora.target import TargetModule, check_module_name, parse_targets

__all__ = ["DTYPE_BYTES", "InstantConfig", "LoraConfig", "LoraConfigBuilder"]

SCHEMA_VERSION = 1
MAX_RANK = 65_536
MAX_FEATURES = 2**31 - 1
DTYPE_BYTES: Mapping[str, int] = {"f32": 4, "f16": 2, "bf16": 2}

Dims = Mapping[str, tuple[int, int]]


@dataclass(frozen=True)
class LoraConfig(Document):
    """Settings of one LoRA adapter: ``dY = scaling * (x A) B`` per target module.

    Validated on construction; immutable, hashable, equal by value.

    Attributes:
        rank: Columns of A, rows of B: 1 to 65,536.
        alpha: Numerator of the scaling, 1e-30 to 1e30.
        target_modules: Short names or full module paths, in order; a comma-separated string is parsed.
        dropout: Share of the input dropped while training, 0 up to but not including 1; never in ``forward``.
        use_rslora: Scaling is ``alpha / sqrt(rank)`` (rsLoRA, arXiv 2312.03732) instead of ``alpha / rank``
            (LoRA, arXiv 2106.09685).
        dtype: How weights are stored: ``"f32"``, ``"f16"`` or ``"bf16"``.
        name: Name of the adapter, may be empty.
        description: Free text.
        tags: Distinct, non-empty strings.
        module_ranks: Rank of single modules that differ from ``rank``, by exact module name.
        module_alphas: Alpha of single modules that differ from ``alpha``, by exact module name.
        instant: Settings of the one-event update.

    Raises:
        ConfigError: names the field, the value that came and what was wanted.
    """

    rank: int = 8
    alpha: float = 16.0
    target_modules: tuple[str, ...] = TargetModule.quality()
    dropout: float = 0.0
    use_rslora: bool = False
    dtype: str = "f32"
    name: str = ""
    description: str = ""
    tags: tuple[str, ...] = ()
    module_ranks: Mapping[str, int] = field(default_factory=FrozenMap)
    module_alphas: Mapping[str, float] = field(default_factory=FrozenMap)
    instant: InstantConfig = field(default_factory=InstantConfig)

    def __post_init__(self) -> None:
        put = object.__setattr__
        put(self, "rank", integer("rank", self.rank, 1, MAX_RANK))
        put(self, "alpha", _alpha("alpha", self.alpha))
        put(self, "target_modules", parse_targets(self.target_modules))
        want = "a number from 0 up to, but not including, 1"
        dropout = real("dropout", self.dropout, want)
        if not 0.0 <= dropout < 1.0:
            raise wrong("dropout", self.dropout, want)
        put(self, "dropout", dropout + 0.0)  # -0.0 would print as another value than 0.0
        put(self, "use_rslora", flag("use_rslora", self.use_rslora))
        put(self, "dtype", choice("dtype", self.dtype, tuple(DTYPE_BYTES)))
        put(self, "name", text("name", self.name))
        put(self, "description", text("description", self.description))
        put(self, "tags", texts("tags", self.tags))
        ranks = _by_module("module_ranks", self.module_ranks, self.target_modules)
        put(self, "module_ranks", FrozenMap((m, integer(f, v, 1, MAX_RANK)) for m, f, v in ranks))
        alphas = _by_module("module_alphas", self.module_alphas, self.target_modules)
        put(self, "module_alphas", FrozenMap((m, _alpha(f, v)) for m, f, v in alphas))
        if not isinstance(self.instant, InstantConfig):
            raise wrong("instant", self.instant, "an InstantConfig")

    # -- values per module --

    def rank_of(self, module: str) -> int:
        """Rank of one target module. Raises UnknownModuleError if it is none."""
        return self.module_ranks.get(self._target(module), self.rank)

    def alpha_of(self, module: str) -> float:
        """Alpha of one target module. Raises UnknownModuleError if it is none."""
        return self.module_alphas.get(self._target(module), self.alpha)

    def scaling(self, module: str | None = None) -> float:
        """The factor s before ``(x A) B``.

        Args:
            module: A target module; None takes ``rank`` and ``alpha`` as for modules without their own.

        Returns:
            ``alpha / rank``, or ``alpha / sqrt(rank)`` with ``use_rslora`` (arXiv 2312.03732).

        Raises:
            UnknownModuleError: ``module`` is no target.
        """
        rank, alpha = (
            (self.rank, self.alpha) if module is None else (self.rank_of(module), self.alpha_of(module))
        )
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)

    def _target(self, module: str) -> str:
        if module not in self.target_modules:
            hint = near(module, self.target_modules) if isinstance(module, str) else ""
            have = ", ".join(self.target_modules)
            raise UnknownModuleError(f"module: got {module!r}, expected one of {have}{hint}")
        return module

    # -- sizes --

    def param_count(self, hidden_dim: int | None = None, dims: Dims | None = None) -> int:
        """Exact number of weights, A and B of every module: the sum of ``rank * (in + out)``.

        Args:
            hidden_dim: Input and output features of every module, if all are square and alike.
            dims: ``{module: (in_features, out_features)}`` otherwise.

        Raises:
            ConfigError: see `LoraConfig.resolve_dims`.
        """
        shapes = self.resolve_dims(hidden_dim, dims)
        return sum(self.rank_of(module) * (n_in + n_out) for module, (n_in, n_out) in shapes.items())

    def memory_bytes(
        self, hidden_dim: int | None = None, dims: Dims | None = None, dtype: str | None = None
    ) -> int:
        """Exact bytes of the stored weights; a live learner adds its float32 master and its state.

        Args:
            hidden_dim: As in `param_count`.
            dims: As in `param_count`.
            dtype: ``"f32"`` (4 bytes), ``"f16"`` or ``"bf16"`` (2 bytes); None takes the config's own.

        Raises:
            ConfigError: see `LoraConfig.resolve_dims`, or an unknown dtype.
        """
        stored = self.dtype if dtype is None else choice("dtype", dtype, tuple(DTYPE_BYTES))
        return self.param_count(hidden_dim, dims) * DTYPE_BYTES[stored]

    def resolve_dims(
        self, hidden_dim: int | None = None, dims: Dims | None = None
    ) -> dict[str, tuple[int, int]]:
        """Features of every target module of a new adapter.

        Args:
            hidden_dim: Input and output features of every module, if all are square and alike.
            dims: ``{module: (in_features, out_features)}`` otherwise. Entries of other modules are passed
                over, so that one table of a model's layers serves every adapter on it.

        Returns:
            ``{module: (in_features, out_features)}`` in the order of ``target_modules``.

        Raises:
            ConfigError: both or neither given, a module without an entry, features that are no positive
                integers, or a rank above the smaller side of its layer.
        """
        if (hidden_dim is None) == (dims is None):
            came = "neither" if dims is None else "both"
            raise ConfigError(f"hidden_dim, dims: got {came}, expected exactly one of them")
        if dims is None:
            features = integer("hidden_dim", hidden_dim, 1, MAX_FEATURES)
            shapes = dict.fromkeys(self.target_modules, (features, features))
        else:
            if not isinstance(dims, Mapping):
                raise wrong("dims", dims, "a mapping of module to (in_features, out_features)")
            shapes = {module: _lookup(dims, module) for module in self.target_modules}
        for module, shape in shapes.items():
            rank = self.rank_of(module)
            if rank > min(shape):
                source = f"module_ranks[{module!r}]" if module in self.module_ranks else "rank"
                raise ConfigError(
                    f"{source}: got {rank} for {module!r} with {shape[0]} x {shape[1]} features, "
                    f"expected at most {min(shape)}"
                )
        return shapes

    # -- making --

    @classmethod
    def builder(cls, name: str = "") -> LoraConfigBuilder:
        """A builder with the defaults of this class and the given name."""
        return LoraConfigBuilder(name)

    @classmethod
    def low_rank(cls) -> LoraConfig:
        """Rank 4, scaling as by default: half the weights."""
        return cls(rank=4, alpha=8.0)

    @classmethod
    def high_rank(cls) -> LoraConfig:
        """Rank 16, scaling as by default: the better choice for embeddings."""
        return cls(rank=16, alpha=32.0)

    @classmethod
    def for_hidden_dim(cls, hidden_dim: int) -> LoraConfig:
        """A rank that suits layers of ``hidden_dim`` features.

        The rule: rank 8 below 2,048 features and 16 from there, never more than ``hidden_dim``;
        alpha is twice the rank.

        Raises:
            ConfigError: ``hidden_dim`` is no positive integer.
        """
        features = integer("hidden_dim", hidden_dim, 1, MAX_FEATURES)
        rank = min(features, 8 if features < 2048 else 16)
        return cls(rank=rank, alpha=2.0 * rank)

    # -- JSON --

    def to_dict(self) -> dict[str, Any]:
        """A plain dict that JSON can hold, with its ``schema_version``."""
        out: dict[str, Any] = {SCHEMA_KEY: SCHEMA_VERSION}
        for item in dataclasses.fields(self):
            value = getattr(self, item.name)
            if isinstance(value, tuple):
                value = list(value)
            elif isinstance(value, FrozenMap):
                value = dict(value)
            elif isinstance(value, InstantConfig):
                value = value.to_dict()
            out[item.name] = value
        return out

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> LoraConfig:
        """The config of a dict; keys left out keep their default, no ``schema_version`` means version 1.

        Raises:
            ConfigError: an unknown key (with the nearest known one), or a value out of its range.
            FormatError: written by a newer version of microlora.
        """
        names = [item.name for item in dataclasses.fields(cls)]
        values = check_document("config", data, names, SCHEMA_VERSION)
        if "instant" in values:
            values["instant"] = InstantConfig.from_dict(values["instant"])
        return cls(**values)


class LoraConfigBuilder:
    """Collects settings by name; `build` validates them all at once.

    Every method returns the builder itself, and what is not set keeps the default of `LoraConfig`.

    Example:
        >>> LoraConfig.builder("mine").rank(12).alpha(24).add_tag("x").build().scaling()
        2.0
    """

    def __init__(self, name: str = "") -> None:
        self._values: dict[str, Any] = {"name": name}
        self._added_tags: list[str] = []

    def _set(self, key: str, value: object) -> LoraConfigBuilder:
        self._values[key] = value
        return self

    def rank(self, rank: int) -> LoraConfigBuilder:
        """Sets the rank."""
        return self._set("rank", rank)

    def alpha(self, alpha: float) -> LoraConfigBuilder:
        """Sets alpha."""
        return self._set("alpha", alpha)

    def dropout(self, dropout: float) -> LoraConfigBuilder:
        """Sets the dropout of training."""
        return self._set("dropout", dropout)

    def target_modules(self, target_modules: str | list[str] | tuple[str, ...]) -> LoraConfigBuilder:
        """Sets the modules: a list, a tuple or a comma-separated string."""
        return self._set("target_modules", target_modules)

    def use_rslora(self, use_rslora: bool = True) -> LoraConfigBuilder:
        """Scales by ``alpha / sqrt(rank)``."""
        return self._set("use_rslora", use_rslora)

    def dtype(self, dtype: str) -> LoraConfigBuilder:
        """Sets the storage dtype: f32, f16 or bf16."""
        return self._set("dtype", dtype)

    def description(self, description: str) -> LoraConfigBuilder:
        """Sets the description."""
        return self._set("description", description)

    def tags(self, tags: list[str] | tuple[str, ...]) -> LoraConfigBuilder:
        """Sets all tags, those added before included."""
        self._added_tags = []
        return self._set("tags", tags)

    def add_tag(self, tag: str) -> LoraConfigBuilder:
        """Adds one tag to those that are set."""
        self._added_tags.append(tag)
        return self

    def instant(self, instant: InstantConfig) -> LoraConfigBuilder:
        """Sets how one-event updates are made."""
        return self._set("instant", instant)

    def build(self) -> LoraConfig:
        """The config. Raises ConfigError as `LoraConfig` does; the builder can be used again."""
        values = dict(self._values)
        if self._added_tags:
            values["tags"] = (*texts("tags", values.get("tags", ())), *self._added_tags)
        return LoraConfig(**values)


def _alpha(name: str, value: object) -> float:
    # Within these bounds the scaling of any legal rank is a normal float32.
    want = "a number from 1e-30 to 1e30"
    number = real(name, value, want)
    if not 1e-30 <= number <= 1e30:
        raise wrong(name, value, want)
    return number


def _by_module(name: str, value: object, targets: tuple[str, ...]) -> list[tuple[str, str, object]]:
    if not isinstance(value, Mapping):
        raise wrong(name, value, "a mapping of module name to value")
    out = []
    for module, item in value.items():
        checked = check_module_name(name, module)
        if checked not in targets:
            hint = near(checked, targets)
            raise ConfigError(f"{name}: got module {checked!r}, expected one of target_modules{hint}")
        out.append((checked, f"{name}[{checked!r}]", item))
    return out


def _lookup(dims: Dims, module: str) -> tuple[int, int]:
    if module not in dims:
        hint = near(module, (key for key in dims if isinstance(key, str)))
        raise ConfigError(f"dims: module {module!r} is missing, expected every target module{hint}")
    name, value = f"dims[{module!r}]", dims[module]
    if not isinstance(value, tuple | list) or len(value) != 2:
        raise wrong(name, value, "(in_features, out_features)")
    return integer(f"{name}[0]", value[0], 1, MAX_FEATURES), integer(f"{name}[1]", value[1], 1, MAX_FEATURES)
