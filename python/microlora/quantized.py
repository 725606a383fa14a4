"""Adapters that stay quantised: their factors run as the blocks that they are."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import microlora._core as _core
from microlora._checks import flag, text, wrong
from microlora.adapter import Adapter, ModuleInfo, check_config, config_of
from microlora.config import LoraConfig
from microlora.exceptions import DTypeError
from microlora.metadata import AdapterMetadata

if TYPE_CHECKING:
    from microlora.formats.conversion import Conversion
    from microlora.progress import CancelToken, Progress

PathLike = str | os.PathLike[str]


class QuantizedAdapter(_core.QuantizedAdapter):
    """An immutable adapter whose factors are blocks of few bits: equal, hashable, picklable by its content.

    ``forward`` decodes blocks in registers, so that ``memory_bytes`` is all it ever takes. Made by
    :func:`microlora.quantize`, by :meth:`from_adapter` and by :func:`microlora.load` of a file that
    :func:`microlora.save` wrote; the constructor takes another one (shared, not copied) or the bytes of
    :meth:`to_bytes`.

    Args:
        source: A quantised adapter, or bytes.

    Raises:
        FormatError: The bytes are not a quantised adapter.
    """

    @classmethod
    def from_adapter(
        cls, adapter: Adapter, types: Mapping[str, tuple[str, str]], *, b_along_rank: bool = False
    ) -> QuantizedAdapter:
        """Quantises each factor to the type that is named for it; nothing gives way to another type.

        Args:
            adapter: What to quantise; settings, metadata and other tensors are kept.
            types: ``{module: (type of A, type of B)}``, every module: ``"q8_0"``, ``"q6_k"``, ``"q5_k"``,
                ``"q4_k"``, ``"q4_1"``, ``"q4_0"``, or ``"f32"``, ``"f16"``, ``"bf16"`` for a plain factor.
            b_along_rank: Lay the blocks of B along the rank, as a GGUF file does, not along out_features.

        Raises:
            ShapeError: A width that is not a multiple of the type's block (32, or 256 for ``*_k``).
            NonFiniteError: Numbers too large for the type's scales.
            ConfigError: An unknown type, or a module without types.
            DTypeError: No adapter.
            UnknownModuleError: Types for a module that the adapter does not have.
        """
        if not isinstance(adapter, _core.Adapter):
            raise DTypeError(f"adapter: got {type(adapter).__name__}, expected an Adapter")
        turned = flag("b_along_rank", b_along_rank)
        return cls(_core.QuantizedAdapter.quantize(adapter, _pairs(types), turned))

    def dequantize(self) -> Adapter:
        """The plain adapter: float32 where a factor was quantised, in four to eight times the memory."""
        return Adapter(super().dequantize())

    def save(
        self,
        dst: PathLike,
        format: str | None = None,
        *,
        base_config: Mapping[str, Any] | PathLike | None = None,
        allow: Sequence[str] = (),
        overwrite: bool = False,
        progress: Progress | None = None,
        cancel: CancelToken | None = None,
    ) -> Conversion:
        """Writes it: :func:`microlora.convert` of this adapter.

        ``"gguf"`` and ``"safetensors"`` hold blocks byte for byte, other formats float32. GGUF lays blocks of
        B along the rank: those that lie along out_features (``b_along_rank=False``) are an error there,
        unless ``allow=["drop:blocks"]`` lets their numbers be written.

        Args:
            dst: File or directory to write.
            format: Name of the format; by default ``"gguf"`` where the name ends so, else ``"safetensors"``.
            base_config: As for :func:`microlora.convert`; GGUF needs it.
            allow: Losses that are accepted by name.
            overwrite: Replace what lies at ``dst``.
            progress: As for :func:`microlora.convert`.
            cancel: As for :func:`microlora.convert`.

        Raises:
            UnsupportedVariantError: Blocks that the format cannot hold; the message has the name to allow.
            DestinationExistsError: ``dst`` exists and ``overwrite`` is false.
            ConfigError: An unknown format, or one that needs more than was given.
            OSError: The system refused; what was at ``dst`` is left whole.
        """
        from microlora.formats.conversion import convert

        if format is None:
            format = "gguf" if str(dst).lower().endswith(".gguf") else "safetensors"
        return convert(
            self,
            dst,
            format=format,
            base_config=base_config,
            allow=allow,
            overwrite=overwrite,
            progress=progress,
            cancel=cancel,
        )

    def info(self, module: str) -> ModuleInfo:
        """Shape and scaling of one module; ``dtype_a`` and ``dtype_b`` are the types of its factors.

        Raises:
            UnknownModuleError: The adapter has no such module.
        """
        return ModuleInfo(*self.describe(module))

    def types(self, module: str) -> tuple[str, str]:
        """The types of A and B of a module, such as ``("q4_k", "q8_0")``.

        Raises:
            UnknownModuleError: The adapter has no such module.
        """
        info = self.info(module)
        return info.dtype_a, info.dtype_b

    @property
    def dims(self) -> dict[str, tuple[int, int]]:
        """``{module: (in_features, out_features)}``."""
        return {name: (self.info(name).in_features, self.info(name).out_features) for name in self.modules()}

    @property
    def config(self) -> LoraConfig:
        """The settings of the adapter that was quantised; ``dtype`` is how that one was stored.

        Raises:
            FormatError: Its settings contradict its weights, or were written by a newer version.
        """
        shapes = config_of(self)
        return check_config(self, self.config_json, shapes) if self.config_json else shapes

    @property
    def metadata(self) -> AdapterMetadata:
        """Name, base model, metrics and so on; empty where the file carries none."""
        return AdapterMetadata.from_json(self.metadata_json) if self.metadata_json else AdapterMetadata()

    def with_metadata(self, metadata: AdapterMetadata) -> QuantizedAdapter:
        """The same weights (shared) with other metadata.

        Raises:
            ConfigError: No metadata.
        """
        if not isinstance(metadata, AdapterMetadata):
            raise wrong("metadata", metadata, "an AdapterMetadata")
        return QuantizedAdapter(self.with_json(self.config_json, metadata.to_json()))

    def __repr__(self) -> str:
        """Sizes and types, never weights."""
        names = self.modules()
        shown = ", ".join(f"{n}: {'/'.join(self.types(n))}" for n in names[:4])
        more = f", ... ({len(names)} modules)" if len(names) > 4 else ""
        sizes = f"{self.param_count:,} parameters, {self.memory_bytes:,} bytes"
        return f"{type(self).__name__}({shown}{more}; {sizes})"

    # Defining __eq__ anywhere in a class body would drop the core's hash; both come from the core.
    __hash__ = _core.QuantizedAdapter.__hash__


def _pairs(types: object) -> dict[str, tuple[str, str]]:
    """The types of both factors of each module."""
    if not isinstance(types, Mapping):
        raise wrong("types", types, "a mapping {module: (type of A, type of B)}")
    out = {}
    for module, pair in types.items():
        name = text("types: module", module)
        if not isinstance(pair, tuple | list) or len(pair) != 2:
            raise wrong(f"types[{name!r}]", pair, "a pair of names, of A and of B")
        out[name] = (text(f"types[{name!r}]", pair[0]), text(f"types[{name!r}]", pair[1]))
    return out
