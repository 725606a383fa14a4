"""From one format to another, losing nothing that was not given up by name."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import microlora._core as _core
from microlora.adapter import Adapter
from microlora.exceptions import ConfigError, DestinationExistsError, UnsupportedVariantError
from microlora.formats.file import AdapterFile, PathLike, check_allow
from microlora.progress import CancelToken, Progress

__all__ = ["WRITERS", "Conversion", "Options", "Writer", "convert"]


@dataclass(frozen=True)
class Options:
    """What a writer may need besides the file.

    Attributes:
        base_config: The base model's ``config.json`` as a mapping (head counts, architecture).
        allow: Losses that the caller accepts.
    """

    base_config: Mapping[str, Any] | None = None
    allow: tuple[str, ...] = ()


@dataclass(frozen=True)
class Writer:
    """One format that can be written: a row of :data:`WRITERS`.

    Attributes:
        name: Public name of the format.
        losses: What the format cannot hold of a file: ``{kind: where}``.
        write: Writes; returns notes.
    """

    name: str
    losses: Callable[[AdapterFile, Options], dict[str, str]]
    write: Callable[[AdapterFile, Path, Options], list[str]]


@dataclass(frozen=True)
class Conversion:
    """What a conversion did.

    Attributes:
        source: Format that was read.
        format: Format that was written.
        path: Where it lies.
        modules: Number of modules written.
        dropped: What was given up, ``{kind: where}``.
        notes: What is worth knowing.
    """

    source: str
    format: str
    path: str
    modules: int
    dropped: dict[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def _variants(file: AdapterFile, options: Options) -> dict[str, str]:
    return {v.kind: v.at for v in reversed(file.variants)}


def _single(file: AdapterFile, path: Path, options: Options) -> list[str]:
    _core.save_single(file.runnable(list(options.allow)), os.fspath(path))
    return []


def _peft(file: AdapterFile, path: Path, options: Options) -> list[str]:
    _core.save_peft(file.runnable(list(options.allow)), os.fspath(path), None, None)
    return []


# One row per format that can be written.
WRITERS: dict[str, Writer] = {
    row.name: row
    for row in (
        Writer("safetensors", _variants, _single),
        Writer("peft", _variants, _peft),
    )
}


def convert(
    src: PathLike | AdapterFile | Adapter,
    dst: PathLike,
    *,
    format: str,
    base_config: Mapping[str, Any] | PathLike | None = None,
    allow: Sequence[str] = (),
    overwrite: bool = False,
    alpha: float | None = None,
    orientation: str | None = None,
    progress: Progress | None = None,
    cancel: CancelToken | None = None,
) -> Conversion:
    """Writes an adapter in another format.

    Args:
        src: A path of any format that is read, or what was read from one.
        dst: File or directory to write.
        format: One of the names of :data:`WRITERS`.
        base_config: The base model's ``config.json`` (its path, or its content), for formats that need its
            architecture and head counts.
        allow: Losses that are accepted by name, such as ``"drop:dora"``.
        overwrite: Replace what lies at ``dst``.
        alpha: Scaling numerator, for sources that carry none.
        orientation: As for :meth:`AdapterFile.read`.
        progress: Called with modules done and in all.
        cancel: Stops between modules; nothing is left behind.

    Returns:
        What was written, and what was given up.

    Raises:
        UnsupportedVariantError: The format cannot hold what the file has; the message has the names to allow.
        DestinationExistsError: ``dst`` exists and ``overwrite`` is false.
        ConfigError: An unknown format, or ``base_config`` is needed and missing.
        FormatError: The source is broken.
        OSError: The system refused; what was at ``dst`` is left whole.
    """
    writer = WRITERS.get(format)
    if writer is None:
        raise ConfigError(f"format: got {format!r}, expected one of {', '.join(sorted(WRITERS))}")
    options = Options(base_config=read_base_config(base_config), allow=tuple(check_allow(allow)))
    target = Path(dst)
    if target.exists() and not overwrite:
        raise DestinationExistsError(f"{target}: exists; pass overwrite=True to replace it")
    file = read_source(src, alpha=alpha, orientation=orientation)
    losses = writer.losses(file, options)
    left = {kind: at for kind, at in losses.items() if f"drop:{kind}" not in options.allow}
    if left:
        names = ", ".join(f'"drop:{kind}"' for kind in left)
        what = "; ".join(f"{kind} ({at})" for kind, at in left.items())
        raise UnsupportedVariantError(
            f"{file.file}: {format} cannot hold {what}; allow=[{names}] leaves it out"
        )
    if cancel is not None:
        cancel.raise_if_cancelled("converting")
    notes = writer.write(file, target, options)
    return Conversion(
        source=file.format,
        format=format,
        path=os.fspath(dst),
        modules=len(file.rows()),
        dropped=losses,
        notes=tuple(notes),
    )


def read_source(
    src: PathLike | AdapterFile | Adapter, *, alpha: float | None = None, orientation: str | None = None
) -> AdapterFile:
    """The file of a path, of an adapter, or itself."""
    if isinstance(src, AdapterFile):
        return src
    if isinstance(src, Adapter):
        return AdapterFile.from_adapter(src)
    return AdapterFile.read(src, alpha=alpha, orientation=orientation)


def read_base_config(config: Mapping[str, Any] | PathLike | None) -> Mapping[str, Any] | None:
    """A base model's configuration from its path (file, or the model's directory) or as it is.

    Raises:
        FormatError: Not JSON, or not an object.
        OSError: It cannot be read.
    """
    if config is None or isinstance(config, Mapping):
        return config
    import json

    from microlora.exceptions import FormatError

    path = Path(config)
    if path.is_dir():
        path = path / "config.json"
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as e:
        raise FormatError(f"{path}: base_config is not JSON: {e}") from e
    if not isinstance(value, dict):
        raise FormatError(f"{path}: base_config is {type(value).__name__}, expected an object")
    return value
