"""A file's whole content, whether it is run here or not."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import microlora._core as _core
from microlora.adapter import Adapter
from microlora.exceptions import ConfigError
from microlora.formats.limits import Limits

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


def check_allow(allow: Iterable[str]) -> list[str]:
    """The losses that a caller accepts by name, checked.

    Raises:
        ConfigError: Not a list of names of the form ``drop:<kind>``.
    """
    if isinstance(allow, str):
        raise ConfigError(f"allow: got {allow!r}, expected a list of names such as ['drop:dora']")
    names = list(allow)
    for name in names:
        if not isinstance(name, str) or not name.startswith("drop:") or name == "drop:":
            raise ConfigError(f"allow: got {name!r}, expected names of the form 'drop:<kind>'")
    return names


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
    ) -> AdapterFile:
        """Reads any format that :func:`microlora.load` knows, variants that are not run included.

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

        Raises:
            FormatError: The file is broken, ambiguous, beyond the limits, of no known format, or of another
                architecture than ``base_config``.
            ConfigError: ``base_config`` or ``names`` for a file of another format than GGUF.
            UnsupportedVariantError: A pickle, or a kind that cannot even be kept.
            OSError: The file cannot be read.
        """
        bounds = (limits or Limits()).as_tuple()
        file = _core.AdapterFile.open(os.fspath(path), mmap, strict, bounds, alpha, orientation)
        if base_config is not None or names is not None:
            from microlora.formats.base_config import read_base_config
            from microlora.formats.gguf import named

            file = named(file, read_base_config(base_config), names)
        return cls.wrap(file)

    @classmethod
    def from_adapter(cls, adapter: Adapter) -> AdapterFile:
        """An adapter as a file would hold it."""
        return cls.wrap(_core.AdapterFile.of(adapter))

    @classmethod
    def wrap(cls, inner: _core.AdapterFile) -> AdapterFile:
        """What the core read, shared."""
        return cls(inner)

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

    def adapter(self, *, allow: Sequence[str] = ()) -> Adapter:
        """The adapter that runs.

        Args:
            allow: Variants to leave out, by name: ``["drop:modules_to_save"]``.

        Raises:
            UnsupportedVariantError: A variant is left; the message has the names to allow.
        """
        return Adapter(self.runnable(check_allow(allow)))
