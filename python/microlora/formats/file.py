"""A file's whole content, whether it is run here or not."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

import microlora._core as _core
from microlora._checks import integer, wrong
from microlora._destinations import format_of_name
from microlora._file_checks import check_allow, check_kinds, check_reading, path_text, there
from microlora.adapter import Adapter
from microlora.exceptions import ConfigError, DTypeError, FormatError
from microlora.formats.limits import Limits

if TYPE_CHECKING:
    from microlora.formats.conversion import Conversion
    from microlora.progress import CancelToken, Progress
    from microlora.quantized import QuantizedAdapter

__all__ = ["AdapterFile", "FileModule", "Variant"]

PathLike = str | os.PathLike[str]


class Variant(NamedTuple):
    """Something that is not plain LoRA on linear layers.

    Attributes:
        kind: Short name, the ``<kind>`` of ``drop:<kind>``.
        at: Tensor, module or setting that shows it.
        why: What it changes, and the way out.
    """

    kind: str
    at: str
    why: str


class FileModule(NamedTuple):
    """One pair of factors as the file holds it.

    Attributes:
        path: Module path, without PEFT's prefix.
        kind: ``"linear"``, ``"embedding"``, ``"conv"`` or ``"experts"``.
        rank: Rank.
        alpha: Scaling numerator.
        use_rslora: Scaling is ``alpha / sqrt(rank)`` (arXiv 2312.03732).
        dtype_a: Element type of A, a name of safetensors such as ``"F16"``.
        shape_a: (rank, in_features); of other kinds as the core's ``ModuleKind`` says.
        dtype_b: Element type of B.
        shape_b: (out_features, rank).
    """

    path: str
    kind: str
    rank: int
    alpha: float
    use_rslora: bool
    dtype_a: str
    shape_a: tuple[int, ...]
    dtype_b: str
    shape_b: tuple[int, ...]


def _array(raw: bytes, dtype: str, shape: tuple[int, ...]) -> NDArray[np.float32]:
    """Little-endian numbers of a file, widened to float32."""
    if dtype == "BF16":
        bits = np.frombuffer(raw, "<u2").astype(np.uint32) << np.uint32(16)
        return bits.view(np.float32).reshape(shape)
    kind = {"F32": "<f4", "F16": "<f2"}[dtype]
    return np.frombuffer(raw, kind).astype(np.float32).reshape(shape)


class AdapterFile(_core.AdapterFile):
    """What an adapter file holds, kept byte for byte; :meth:`adapter` gives what can be run of it.

    Made by :meth:`read` and :meth:`from_adapter`.
    """

    @classmethod
    def read(
        cls,
        path: PathLike,
        *,
        mmap: bool = False,
        strict: bool = True,
        limits: Limits | None = None,
        alpha: float | None = None,
        orientation: str | None = None,
        base_config: Mapping[str, Any] | PathLike | None = None,
        names: str | None = None,
        module_names: PathLike | Sequence[str] | None = None,
    ) -> AdapterFile:
        """Reads any format that :func:`microlora.load` knows, variants that are not run included.

        Factors in blocks are expanded to float32 beside their blocks; ``notes`` name them and their types.

        Args:
            path: A file or directory; the content decides what it is, not the name.
            mmap: As for :func:`microlora.load`.
            strict: Refuse tensors and settings that nothing here gives a meaning to.
            limits: What the file may ask for.
            alpha: Scaling numerator, for formats that carry none.
            orientation: ``"rank_first"`` (A (rank, in), as PEFT) or ``"rank_last"`` (A (in, rank), as MLX),
                for flat files whose shapes do not say.
            base_config: Of a GGUF file: the base model's ``config.json`` (its path, or its content), which
                gives the model's own module names and row order back (needs the gguf package).
            names: ``"gguf"`` keeps llama.cpp's names and row order as they are.
            module_names: Dotted names of the base's modules, or a model on disk that has them (safetensors,
                or a folder of them), for files in Kohya's style: see :meth:`with_module_names`.

        Raises:
            FormatError: The file is broken, ambiguous, beyond the limits, of no known format, or of another
                architecture than ``base_config``.
            ConfigError: ``base_config`` or ``names`` for a file of another format than GGUF, or a setting
                of another type.
            DTypeError: ``path`` is none.
            UnsupportedVariantError: A pickle, or a kind that cannot even be kept.
            OSError: The file cannot be read.
        """
        bounds = Limits.of(limits).as_tuple()
        where, number = check_reading(path, mmap, strict, alpha, orientation, names)
        wanted = None if module_names is None else _module_names(module_names)
        config = None
        if base_config is not None:
            from microlora.formats.base_config import read_base_config

            config = read_base_config(base_config)
        file = _core.AdapterFile.open(where, mmap, strict, bounds, number, orientation)
        if config is not None or names is not None:
            from microlora.formats.gguf import named

            file = named(file, config, names)
        content = cls.wrap(file)
        return content if wanted is None else cls.wrap(content.resolved(wanted))

    @classmethod
    def from_adapter(cls, adapter: Adapter | QuantizedAdapter) -> AdapterFile:
        """An adapter as a file would hold it, blocks as blocks.

        Raises:
            DTypeError: No adapter.
        """
        if isinstance(adapter, _core.QuantizedAdapter):
            return cls.wrap(_core.AdapterFile.of_quantized(adapter))
        if not isinstance(adapter, _core.Adapter):
            raise DTypeError(f"adapter: got {type(adapter).__name__}, expected an adapter")
        return cls.wrap(_core.AdapterFile.of(adapter))

    @classmethod
    def wrap(cls, inner: _core.AdapterFile) -> AdapterFile:
        """What the core read, shared."""
        return cls(inner)

    def __repr__(self) -> str:
        """Format, number of modules, and kinds of variants."""
        kinds = sorted({v.kind for v in self.variants})
        variants = f", with {', '.join(kinds)}" if kinds else ""
        return f"AdapterFile({self.format or 'in memory'}, {len(self.rows())} modules{variants})"

    @property
    def modules(self) -> tuple[FileModule, ...]:
        """Every pair of factors, in the file's order."""
        return tuple(
            FileModule(*m[:5], m[5][0], tuple(m[5][1]), m[6][0], tuple(m[6][1])) for m in self.rows()
        )

    @property
    def variants(self) -> tuple[Variant, ...]:
        """Everything that is not plain LoRA on linear layers."""
        return tuple(Variant(*row) for row in self.variant_rows())

    @property
    def config(self) -> dict[str, Any] | None:
        """The settings of PEFT's ``adapter_config.json`` as the file has them; None where there are none."""
        import json

        return None if self.peft_config is None else dict(json.loads(self.peft_config))

    def with_module_names(self, module_names: PathLike | Sequence[str]) -> AdapterFile:
        """The same content under the names of the base's modules.

        Kohya's style writes ``down_blocks.0.attn1.to_q`` as ``lora_unet_down_blocks_0_attn1_to_q``, which
        only the base's own names can undo.

        Args:
            module_names: Dotted names, those of components of a pipeline with or without it
                (``unet.down_blocks...``); or a model on disk, whose tensors have them.

        Raises:
            FormatError: A module that the base lacks, that several of its names may mean, or that another
                has too.
            ConfigError: Not names.
            MissingPathError: There is no such model.
            OSError: The model cannot be read.
        """
        return self.wrap(self.resolved(_module_names(module_names)))

    def to_arrays(
        self,
    ) -> tuple[dict[str, tuple[NDArray[np.float32], NDArray[np.float32]]], dict[str, float]]:
        """The factors as arrays, and the alpha of each module.

        Returns:
            ``({path: (A, B)}, {path: alpha})``: A (rank, in_features) and B (out_features, rank) in float32
            (widened exactly; of other kinds than linear in the shapes of :class:`FileModule`), and the alpha
            for the scaling ``alpha / rank`` (of rsLoRA ``alpha * sqrt(rank)``). Of linear modules,
            ``Adapter.from_factors(factors, alpha=alphas)`` makes the adapter again.
        """
        factors, alphas = {}, {}
        for i, m in enumerate(self.modules):
            raw_a, raw_b = self.factor_bytes(i)
            factors[m.path] = _array(raw_a, m.dtype_a, m.shape_a), _array(raw_b, m.dtype_b, m.shape_b)
            alphas[m.path] = m.alpha * m.rank**0.5 if m.use_rslora else m.alpha
        return factors, alphas

    def adapter(self, *, allow: Sequence[str] = ()) -> Adapter:
        """The adapter that runs.

        Args:
            allow: Variants to leave out, by name: ``["drop:modules_to_save"]``.

        Raises:
            UnsupportedVariantError: A variant is left; the message has the names to allow.
            ConfigError: ``allow`` is no list of names, or has a kind that there is not.
        """
        left_out = check_allow(allow)
        check_kinds(left_out, (v.kind for v in self.variants))
        return Adapter(self.runnable(left_out))

    def unpack_experts(self, experts: int | None = None) -> AdapterFile:
        """The same content with packed experts (PEFT's ``target_parameters``) as modules of their own.

        PEFT packs the experts of a raw parameter in one pair, A (experts * rank, in) with the expert varying
        slowest and B (out, rank * experts) with the expert varying fastest. Here they become modules of kind
        ``"experts"``, A (experts, rank, in) and B (experts, out, rank), under the path in the file: of nested
        wrappers the inner ones end in ``.base_layer``. Saved to PEFT, they are packed again as they were.

        Args:
            experts: Their number, where ranks by pattern leave it open; otherwise it follows from the rank.

        Raises:
            ConfigError: No packed experts, or a number that the ranks of the configuration do not give.
        """
        if experts is not None:
            experts = integer("experts", experts, 1, 2**31 - 1)
        return self.wrap(self.unpacked(experts))

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
        """Writes all of it: :func:`microlora.convert` of this content.

        Args:
            dst: File or directory to write, in a folder that exists.
            format: Name of the format; by default the one it was read from, else by the ending of the name
                (``.safetensors``, ``.gguf``, ``.npz``), else a PEFT directory.
            base_config: As for :func:`microlora.convert`.
            allow: Losses that are accepted by name.
            overwrite: Replace what lies at ``dst``.
            progress: As for :func:`microlora.convert`.
            cancel: As for :func:`microlora.convert`.

        Raises:
            UnsupportedVariantError: The format cannot hold what the file has; the message has the names.
            DestinationExistsError: ``dst`` exists and ``overwrite`` is false.
            ConfigError: An unknown format, one that needs more than was given, or a name that is for
                another one.
            MissingPathError: The folder of ``dst`` is not there.
            OSError: The system refused; what was at ``dst`` is left whole.
        """
        from microlora.formats.conversion import convert

        if format is None:
            format = self.format or format_of_name(path_text("dst", dst))
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


def _module_names(value: object) -> list[str]:
    """Names of a base's modules, from themselves or from a model on disk."""
    want = "dotted names of modules, or a model on disk that has them"
    if isinstance(value, str | os.PathLike):
        path = there("module_names", value, want)
        try:
            tensors = _core.list_tensors(path, "module_names")
        except FormatError as e:
            raise type(e)(f"module_names: got {path!r}, expected {want}: {e}") from None
        return sorted({name.rpartition(".")[0] or name for name, _, _ in tensors})
    if isinstance(value, bytes | Mapping) or not isinstance(value, Iterable):
        raise wrong("module_names", value, want)
    names = list(value)
    for name in names:
        if not isinstance(name, str) or not name:
            raise ConfigError(f"module_names: got {name!r}, expected names of modules, or a path")
    return names
