"""From one format to another, losing nothing that was not given up by name."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import microlora._core as _core
from microlora._checks import choice, flag, near
from microlora._destinations import check_destination, remove_other_weights
from microlora._file_checks import check_allow, check_calls, check_kinds, path_text
from microlora.adapter import Adapter
from microlora.exceptions import ConfigError, DTypeError, UnsupportedVariantError
from microlora.formats import gguf
from microlora.formats.base_config import read_base_config
from microlora.formats.file import AdapterFile, PathLike
from microlora.progress import CancelToken, Progress
from microlora.quantized import QuantizedAdapter

__all__ = ["WRITERS", "Conversion", "Options", "Writer", "convert"]


@dataclass(frozen=True)
class Options:
    """What a writer may need besides the file.

    Attributes:
        base_config: The base model's ``config.json`` as a mapping (head counts, architecture).
        allow: Losses that the caller accepts.
        dtype: Element type to write; None for the format's default.
        progress: For writers that tell it themselves: called with modules done and in all.
        cancel: Stops between modules where they are written one by one (GGUF).
    """

    base_config: Mapping[str, Any] | None = None
    allow: tuple[str, ...] = ()
    dtype: str | None = None
    progress: Progress | None = None
    cancel: CancelToken | None = None


@dataclass(frozen=True)
class Writer:
    """One format that can be written: a row of :data:`WRITERS`.

    Attributes:
        name: Public name of the format.
        losses: What the format cannot hold of a file: ``{kind: where}``.
        write: Writes; returns notes.
        dtypes: Element types that can be asked for; none where tensors are written as they are.
        also: What it may be allowed besides ``drop:<kind>``.
        tells: Whether it tells progress itself, module by module; of others it is told once, at the end.
    """

    name: str
    losses: Callable[[AdapterFile, Options], dict[str, str]]
    write: Callable[[AdapterFile, Path, Options], list[str]]
    dtypes: tuple[str, ...] = ()
    also: tuple[str, ...] = ()
    tells: bool = False


@dataclass(frozen=True)
class Conversion:
    """What a conversion did.

    Attributes:
        source: Format that was read.
        format: Format that was written.
        path: Where it lies.
        modules: Number of modules written.
        dropped: What was given up, ``{kind: where}``.
        notes: What is worth knowing, of the reading and of the writing.
    """

    source: str
    format: str
    path: str
    modules: int
    dropped: dict[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def _nothing(file: AdapterFile, options: Options) -> dict[str, str]:
    return {}


def _single(file: AdapterFile, path: Path, options: Options) -> list[str]:
    expand = "drop:blocks" in options.allow
    file.save_single(os.fspath(path), list(gguf.unplaced(file)), expand)
    others = sorted({m.kind for m in file.modules} - {"linear"})
    if not file.has_blocks or not (expand or others):
        return []
    return ["blocks were written as float32" + (f": the file has {', '.join(others)}" if others else "")]


def _not_in_peft(file: AdapterFile, options: Options) -> dict[str, str]:
    return dict(reversed(file.lost_in_peft()))


def _peft(file: AdapterFile, path: Path, options: Options) -> list[str]:
    file.save_peft(os.fspath(path))
    return []


def _style(name: str, also: tuple[str, ...] = ()) -> Writer:
    """A format that is one key style, written by the core."""

    def losses(file: AdapterFile, options: Options) -> dict[str, str]:
        return dict(file.lost_in(name, options.allow))

    def write(file: AdapterFile, path: Path, options: Options) -> list[str]:
        return list(file.save_style(os.fspath(path), name, options.allow))

    return Writer(name, losses, write, also=also)


# One row per format that can be written.
WRITERS: dict[str, Writer] = {
    row.name: row
    for row in (
        Writer("safetensors", _nothing, _single),
        Writer("peft", _not_in_peft, _peft),
        Writer("gguf", gguf.losses, gguf.write, dtypes=gguf.DTYPES, tells=True),
        _style("mlx", also=("pad:rank", "round:scale")),
        _style("kohya"),
        _style("diffusers"),
        _style("flat"),
        _style("npz"),
    )
}


def convert(
    src: PathLike | AdapterFile | Adapter | QuantizedAdapter,
    dst: PathLike,
    *,
    format: str,
    base_config: Mapping[str, Any] | PathLike | None = None,
    allow: Sequence[str] = (),
    overwrite: bool = False,
    dtype: str | None = None,
    names: str | None = None,
    alpha: float | None = None,
    orientation: str | None = None,
    module_names: PathLike | Sequence[str] | None = None,
    progress: Progress | None = None,
    cancel: CancelToken | None = None,
) -> Conversion:
    """Writes an adapter in another format.

    Args:
        src: A path of any format that is read, what was read from one, or an adapter. Factors in blocks stay
            blocks in ``"gguf"`` and ``"safetensors"``, and become float32 elsewhere; a note names them.
        dst: File or directory to write, in a folder that exists. Its ending must not be that of another
            format: ``.safetensors`` is for single files, ``.gguf`` and ``.npz`` for those, none of them for
            the directories of ``"peft"`` and ``"mlx"``.
        format: One of the names of :data:`WRITERS`.
        base_config: The base model's ``config.json`` (its path, or its content), for formats that need its
            architecture and head counts.
        allow: Losses that are accepted by name, such as ``"drop:dora"``. An MLX adapter has one rank and
            one scale: ``"pad:rank"`` pads smaller ranks with zeros, ``"round:scale"`` lets other scales be
            rounded into B (without it only where that is exact). Blocks that GGUF cannot hold as they are (of
            B along out_features, of other types than ``dtype``) are written as their numbers, in ``dtype``,
            under ``"drop:blocks"``; with it ``"safetensors"`` has no blocks either.
        overwrite: Replace what lies at ``dst``. Of a directory the files of an adapter are replaced, with
            the weights of another format; other files stay. A file is not replaced by a directory, nor a
            directory by a file.
        dtype: Element type of ``"gguf"``: ``"auto"`` (the default: as the tensors are, blocks as they are),
            ``"f32"``, ``"f16"``, ``"bf16"``, ``"q8_0"``, ``"q6_k"``, ``"q5_k"``, ``"q4_k"``, ``"q4_1"``,
            ``"q4_0"`` (blocks where a row is a whole number of them, f16 elsewhere). Other formats keep
            every tensor's type.
        names: As for :meth:`AdapterFile.read`.
        alpha: Scaling numerator, for paths of files that carry none.
        orientation: As for :meth:`AdapterFile.read`, for paths.
        module_names: As for :meth:`AdapterFile.read`; to write Kohya's style, names that underscores would
            not keep apart are refused.
        progress: Called with modules done and in all; where they are written in one go once, when all is
            in its place and the weights of another format are gone: an error of it comes after the work.
        cancel: Stops before anything is written, of GGUF between modules too; nothing is left behind.

    Returns:
        What was written, and what was given up.

    Raises:
        UnsupportedVariantError: The format cannot hold what the file has; the message has the names to allow.
        DestinationExistsError: ``dst`` exists and ``overwrite`` is false, or it is a pipe, a socket
            or a device, a file where the format is a directory, or the other way round.
        MissingPathError: The folder of ``dst`` is not there.
        ConfigError: An unknown format or dtype, a name of ``dst`` that is for another format,
            ``base_config`` is needed and missing or of no use, ``alpha`` or ``orientation`` for what is no
            path, or ``allow`` with a kind that there is not.
        DTypeError: ``src`` is no path and no adapter.
        MissingExtraError: GGUF names need the gguf package.
        ShapeError: A module that does not fit the base.
        NonFiniteError: A number that ``dtype`` cannot hold.
        CancelledError: ``cancel`` was set.
        FormatError: The source is broken.
        OSError: The system refused; what was at ``dst`` is left whole.
    """
    writer = WRITERS.get(format) if isinstance(format, str) else None
    if writer is None:
        hint = near(str(format).lower(), WRITERS)
        raise ConfigError(f"format: got {format!r}, expected one of {', '.join(sorted(WRITERS))}{hint}")
    if dtype is not None and dtype not in writer.dtypes:
        want = f"one of {', '.join(writer.dtypes)}" if writer.dtypes else f"None ({format} keeps every type)"
        raise ConfigError(f"dtype: got {dtype!r}, expected {want}")
    if names is not None:
        choice("names", names, ("gguf",))
    check_calls(progress, cancel)
    config = read_base_config(base_config)
    options = Options(config, tuple(check_allow(allow, writer.also)), dtype, progress, cancel)
    target = check_destination("dst", dst, format, overwrite=flag("overwrite", overwrite))
    file = read_source(src, alpha=alpha, orientation=orientation)
    check_kinds(options.allow, ("blocks", *(v.kind for v in file.variants)))
    if config is not None and format != "gguf" and not gguf.has_own_names(file):
        was = file.format or "an adapter"
        raise ConfigError(f"base_config: got one for {was} to {format}, expected None (it is for GGUF files)")
    if names is not None or (config is not None and gguf.has_own_names(file)):
        file = AdapterFile.wrap(gguf.named(file, config, names))
    if module_names is not None:
        file = file.with_module_names(module_names)
    losses = writer.losses(file, options)
    if format != "gguf":
        losses |= gguf.unplaced(file)
    left = {kind: at for kind, at in losses.items() if f"drop:{kind}" not in options.allow}
    if left:
        names = ", ".join(f'"drop:{kind}"' for kind in left)
        what = "; ".join(f"{kind} ({at})" for kind, at in left.items())
        numbers = " (of blocks their numbers stay)" if "blocks" in left else ""
        if format == "gguf" and "along the features" in left.get("blocks", ""):
            numbers += "; quantize with b_along_rank=True has blocks as GGUF has them"
        raise UnsupportedVariantError(
            f"{file.file}: {format} cannot hold {what}; allow=[{names}] leaves it out{numbers}"
        )
    if cancel is not None:
        cancel.raise_if_cancelled("converting")
    notes = [*file.notes, *_on_names(file, format), *writer.write(file, target, options)]
    notes += remove_other_weights(target, format)
    modules = len(file.rows())
    if progress is not None and not writer.tells:
        progress(modules, modules, "writing")
    return Conversion(
        source=file.format,
        format=format,
        path=os.fspath(dst),
        modules=modules,
        dropped=losses,
        notes=tuple(dict.fromkeys(notes)),
    )


def _on_names(file: AdapterFile, format: str) -> list[str]:
    """Names of Kohya's and of llama.cpp's that no other program finds in a model."""
    paths = [row[0] for row in file.rows()]
    flat = [path for path in paths if file.format == "kohya" and path.startswith("lora_")]
    if flat and format != "kohya":
        return [
            f"{len(flat)} modules keep Kohya's names, such as {flat[0]!r}, which no model has: "
            "pass module_names= for the base's own"
        ]
    blocks = [path for path in paths if gguf.is_own_name(path)]
    if blocks and format != "gguf":
        return [
            f"{len(blocks)} modules keep llama.cpp's names, such as {blocks[0]!r}, which no model of other "
            "programs has: read the GGUF file with base_config= for the model's own"
        ]
    return []


def read_source(
    src: PathLike | AdapterFile | Adapter | QuantizedAdapter,
    *,
    alpha: float | None = None,
    orientation: str | None = None,
    arg: str = "src",
) -> AdapterFile:
    """The file of a path, of an adapter, or itself."""
    if isinstance(src, (AdapterFile, _core.Adapter, _core.QuantizedAdapter)):
        for name, value in (("alpha", alpha), ("orientation", orientation)):
            if value is not None:
                raise ConfigError(
                    f"{name}: got {value!r} for a {type(src).__name__}, expected None (it has one)"
                )
    if isinstance(src, AdapterFile):
        return src
    if isinstance(src, _core.QuantizedAdapter):
        return AdapterFile.from_adapter(QuantizedAdapter(src))
    if isinstance(src, _core.Adapter):
        return AdapterFile.from_adapter(Adapter(src))
    if not isinstance(src, str | os.PathLike):
        raise DTypeError(f"{arg}: got {type(src).__name__}, expected a path, an adapter or an AdapterFile")
    return AdapterFile.read(path_text(arg, src), alpha=alpha, orientation=orientation)
