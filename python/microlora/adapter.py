"""Adapters as values: weights, settings and metadata that never change."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import microlora._core as _core
from microlora.config import LoraConfig
from microlora.metadata import AdapterMetadata

if TYPE_CHECKING:
    from numpy.typing import NDArray


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

    @property
    def config(self) -> LoraConfig | None:
        """The settings it was made with, or ``None`` for a file that carries none of ours."""
        return LoraConfig.from_json(self.config_json) if self.config_json else None

    @property
    def metadata(self) -> AdapterMetadata:
        """Name, base model, metrics and so on; empty where the file carries none."""
        return AdapterMetadata.from_json(self.metadata_json) if self.metadata_json else AdapterMetadata()

    def with_metadata(self, metadata: AdapterMetadata) -> Adapter:
        """The same weights (shared) with other metadata."""
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
