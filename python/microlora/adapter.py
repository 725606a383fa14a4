"""Adapters as values: weights, settings and metadata that never change."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import microlora._core as _core
from microlora._checks import flag, real, text, wrong
from microlora.config import LoraConfig
from microlora.exceptions import DTypeError, FormatError
from microlora.metadata import AdapterMetadata

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray


class ModuleInfo(NamedTuple):
    """Shape and scaling of one module of an :class:`Adapter`."""

    in_features: int
    out_features: int
    rank: int
    alpha: float
    use_rslora: bool
    dtype_a: str
    dtype_b: str

    @property
    def scaling(self) -> float:
        """``alpha / rank``, or ``alpha / sqrt(rank)`` with rsLoRA (arXiv 2312.03732)."""
        return float(self.alpha / (self.rank**0.5 if self.use_rslora else self.rank))


class Adapter(_core.Adapter):
    """An immutable adapter: equal, hashable and picklable by its content.

    Made by :func:`microlora.load`, :meth:`MicroLoRA.adapter` and the functions that return one; the
    constructor takes another adapter (shared, not copied) or the bytes of :meth:`to_bytes`.

    Args:
        source: An adapter, or bytes.

    Raises:
        FormatError: The bytes are not an adapter.
    """

    @classmethod
    def from_factors(
        cls,
        factors: Mapping[str, tuple[ArrayLike, ArrayLike]],
        *,
        alpha: float | Mapping[str, float],
        use_rslora: bool = False,
        dtype: str = "f32",
    ) -> Adapter:
        """An adapter from raw arrays in PEFT's orientation.

        :meth:`AdapterFile.to_arrays <microlora.AdapterFile.to_arrays>` is the way back, and
        :func:`microlora.load` reads arrays from a ``.npz`` file.

        Args:
            factors: ``{module: (lora_a (rank, in_features), lora_b (out_features, rank))}``, float32.
            alpha: Scaling numerator of every module, or one per module by name.
            use_rslora: Scaling is ``alpha / sqrt(rank)``.
            dtype: How the weights are stored: ``"f32"``, ``"f16"`` or ``"bf16"`` (rounded to nearest even).

        Raises:
            ShapeError: Factors of different ranks.
            NonFiniteError: NaN or infinity.
            ConfigError: Unknown dtype, alpha that is no number or that a module lacks, no modules.
            DTypeError: Factors that are no pairs of arrays of numbers.
        """
        rows = _rows(factors, alpha)
        plain = cls(_core.adapter_from_factors(rows, flag("use_rslora", use_rslora), text("dtype", dtype)))
        return cls(plain.with_json(config_of(plain).to_json(), None))

    @property
    def config(self) -> LoraConfig:
        """The settings it was made with; what the weights say where the file carries none of ours.

        Raises:
            FormatError: Its settings contradict its weights, or were written by a newer version.
        """
        shapes = config_of(self)
        if not self.config_json:
            return shapes
        return check_config(self, self.config_json, shapes)

    @property
    def metadata(self) -> AdapterMetadata:
        """Name, base model, metrics and so on; empty where the file carries none."""
        return AdapterMetadata.from_json(self.metadata_json) if self.metadata_json else AdapterMetadata()

    def with_metadata(self, metadata: AdapterMetadata) -> Adapter:
        """The same weights (shared) with other metadata.

        Raises:
            ConfigError: No metadata.
        """
        if not isinstance(metadata, AdapterMetadata):
            raise wrong("metadata", metadata, "an AdapterMetadata")
        return Adapter(self.with_json(self.config_json, metadata.to_json()))

    def info(self, module: str) -> ModuleInfo:
        """Shape and scaling of one module.

        Raises:
            UnknownModuleError: The adapter has no such module.
        """
        return ModuleInfo(*self.describe(module))

    @property
    def dims(self) -> dict[str, tuple[int, int]]:
        """``{module: (in_features, out_features)}``."""
        return {name: (self.info(name).in_features, self.info(name).out_features) for name in self.modules()}

    def factors(self, module: str) -> tuple[NDArray[Any], NDArray[Any]]:
        """``(lora_a, lora_b)`` of a module: float32 (rank, in) and (out, rank), read-only copies.

        Raises:
            UnknownModuleError: The adapter has no such module.
        """
        return self.lora_a(module), self.lora_b(module)

    # -- exact sums: the delta of the result is the sum of deltas, its rank the sum of ranks --

    def __add__(self, other: Adapter) -> Adapter:
        """The sum of both deltas, exactly; modules are those of either.

        Tensors that are no factors are left out of it and of all other results of operators, with a warning
        in the log.
        """
        return _combine((self, 1.0), (other, 1.0)) if isinstance(other, Adapter) else NotImplemented

    def __sub__(self, other: Adapter) -> Adapter:
        """The difference of the deltas, exactly."""
        return _combine((self, 1.0), (other, -1.0)) if isinstance(other, Adapter) else NotImplemented

    def __mul__(self, factor: float) -> Adapter:
        """The delta times a finite number: into alpha, its sign into B."""
        return _combine((self, factor)) if _is_number(factor) else NotImplemented

    __rmul__ = __mul__

    def __truediv__(self, factor: float) -> Adapter:
        """The delta over a number that is not 0."""
        if not _is_number(factor):
            return NotImplemented
        if factor == 0:
            raise ZeroDivisionError("factor: got 0, expected a number to divide by")
        return _combine((self, 1.0 / factor))

    def __neg__(self) -> Adapter:
        """The delta with its sign turned: what unlearns it."""
        return _combine((self, -1.0))

    def __repr__(self) -> str:
        """Sizes, never weights."""
        names = self.modules()
        shown = ", ".join(names[:4]) + (f", ... ({len(names)} modules)" if len(names) > 4 else "")
        return f"{type(self).__name__}({shown}; {self.param_count:,} parameters, {self.memory_bytes:,} bytes)"

    # Defining __eq__ anywhere in a class body would drop the core's hash; both come from the core.
    __hash__ = _core.Adapter.__hash__


class Snapshot(_core.Snapshot, Adapter):
    """An :class:`Adapter` that also carries what its learner remembered.

    ``restore`` of a snapshot gives bit-identical outputs and later learning: RLS state, pending gradients,
    reward baseline, random numbers and counters come back with the weights.
    """

    __hash__ = _core.Snapshot.__hash__


def _rows(factors: object, alpha: object) -> list[tuple[str, Any, Any, float]]:
    """Name, A, B and alpha of each module that :meth:`Adapter.from_factors` was given."""
    if not isinstance(factors, Mapping) or not factors:
        raise wrong("factors", factors, "a mapping {module: (lora_a, lora_b)} of at least one module")
    alphas = alpha if isinstance(alpha, Mapping) else dict.fromkeys(factors, alpha)
    for name in alphas:
        if name not in factors:
            raise wrong("alpha: module", name, f"modules of factors: {', '.join(map(str, factors))}")
    rows = []
    for name, pair in factors.items():
        text("factors: module", name, empty=False)
        if not isinstance(pair, tuple | list) or len(pair) != 2:
            got = type(pair).__name__
            raise DTypeError(f"factors[{name!r}]: got {got}, expected a pair (lora_a, lora_b) of arrays")
        if name not in alphas:
            raise wrong("alpha", alpha, f"a number for module {name!r} too")
        field = f"alpha[{name!r}]" if isinstance(alpha, Mapping) else "alpha"
        rows.append((name, *pair, real(field, alphas[name], "a finite number, or one per module by name")))
    return rows


def _is_number(value: object) -> bool:
    return hasattr(value, "__float__") and not isinstance(value, bool | str | _core.Adapter)


def _combine(*terms: tuple[Adapter, float]) -> Adapter:
    from microlora.merging.compose import combine

    return combine(terms)


class _Described(Protocol):
    """Whatever has modules of known shapes."""

    def modules(self) -> list[str]: ...
    def info(self, module: str) -> ModuleInfo: ...


def check_config(adapter: _Described, text: str, shapes: LoraConfig) -> LoraConfig:
    """The settings in a file's JSON, held against what its weights say.

    Raises:
        FormatError: They contradict each other, or the settings were written by a newer version.
    """
    config = LoraConfig.from_json(text)
    if set(config.target_modules) != set(adapter.modules()):
        # Saved under a model's paths: the weights know the names, the settings the rest.
        kept = ("dropout", "name", "description", "tags", "instant")
        return shapes.replace(**{key: getattr(config, key) for key in kept})
    for module in adapter.modules():
        info = adapter.info(module)
        said = (config.rank_of(module), config.alpha_of(module), config.use_rslora)
        if said != (info.rank, info.alpha, info.use_rslora):
            got = (info.rank, info.alpha, info.use_rslora)
            raise FormatError(
                f"config: {module} has (rank, alpha, use_rslora) {said}, but its weights have {got}"
            )
    return config


def config_of(adapter: _Described, description: str = "") -> LoraConfig:
    """Settings that describe an adapter whose file carries none of ours.

    The commonest rank and alpha become the global ones; the others are listed per module.
    """
    infos = {name: adapter.info(name) for name in adapter.modules()}
    ranks, alphas = [i.rank for i in infos.values()], [i.alpha for i in infos.values()]
    rank, alpha = max(ranks, key=ranks.count), max(alphas, key=alphas.count)
    first = next(iter(infos.values()))
    return LoraConfig(
        rank=rank,
        alpha=alpha,
        target_modules=tuple(infos),
        use_rslora=first.use_rslora,
        dtype=first.dtype_a if first.dtype_a in ("f16", "bf16") else "f32",
        description=description,
        module_ranks={m: i.rank for m, i in infos.items() if i.rank != rank},
        module_alphas={m: i.alpha for m, i in infos.items() if i.alpha != alpha},
    )
