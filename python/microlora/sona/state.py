"""A loop on disk: a directory whose ``sona.json`` is written last and names the files that belong to it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import microlora._core as _core
from microlora._checks import SCHEMA_KEY, check_document, read_json, write_json
from microlora.exceptions import ConfigError, FormatError
from microlora.sona.config import SonaConfig

if TYPE_CHECKING:
    from microlora.files import PathLike
    from microlora.sona.loop import SonaLoop

__all__ = ["MANIFEST", "Parts", "read", "restore", "write"]

MANIFEST = "sona.json"
SCHEMA_VERSION = 1
_KEYS = ("config", "state", "fisher", "encoders", "microlora")
_KINDS = ("state", "fisher")


class Parts(NamedTuple):
    """Settings, the core's state, what deep runs hold on to, and the encoders' names."""

    config: SonaConfig
    state: bytes
    fisher: bytes | None
    encoders: tuple[str, ...] | None


def write(loop: SonaLoop, path: PathLike) -> None:
    """Writes a loop; what was there before is whole until all of it is written.

    Raises:
        OSError: The system refused.
    """
    folder = Path(os.fspath(path))
    folder.mkdir(parents=True, exist_ok=True)
    with loop._install_lock:
        parts = {"state": loop.to_bytes(), "fisher": loop._fisher}
    number = 1 + max((_number(item.name) for item in folder.iterdir()), default=0)
    named: dict[str, Any] = dict.fromkeys(_KINDS)
    for kind, data in parts.items():
        if data is not None:
            named[kind] = f"{kind}-{number:06d}.safetensors"
            _core.write_file(str(folder / named[kind]), data)
    document = {
        SCHEMA_KEY: SCHEMA_VERSION,
        "config": loop.config.to_dict(),
        **named,
        "encoders": loop._encoders.names,
        "microlora": _core.__version__,
    }
    _core.write_file(str(folder / MANIFEST), write_json(document, indent=1).encode())
    for item in folder.iterdir():
        if _number(item.name) and item.name not in named.values():
            item.unlink(missing_ok=True)


def read(path: PathLike) -> Parts:
    """What `write` wrote.

    Raises:
        FormatError: Not such a directory, a part that is missing, or a newer version.
        ConfigError: Settings out of their range.
        OSError: It cannot be read.
    """
    folder = Path(os.fspath(path))
    manifest = folder / MANIFEST
    if folder.is_dir() and not manifest.exists():
        raise FormatError(
            f"{folder}: got a directory without {MANIFEST}, expected one that SonaLoop.save wrote"
        )
    values = check_document(
        str(manifest), read_json(str(manifest), manifest.read_bytes()), _KEYS, SCHEMA_VERSION
    )
    missing = [key for key in ("config", "state") if values.get(key) is None]
    if missing:
        raise FormatError(f"{manifest}: lacks {', '.join(missing)}")
    found = {kind: _part(folder, manifest, kind, values.get(kind)) for kind in _KINDS}
    state = found["state"]
    assert state is not None
    names = values.get("encoders")
    encoders = None if names is None else tuple(str(name) for name in names)
    return Parts(SonaConfig.from_dict(values["config"]), state, found["fisher"], encoders)


def _part(folder: Path, manifest: Path, kind: str, name: object) -> bytes | None:
    if name is None:
        return None
    # A name from a file goes to the file system: nothing but what `write` makes up is followed.
    if not isinstance(name, str) or not name.startswith(f"{kind}-") or not _number(name):
        raise FormatError(
            f"{manifest}: {kind}: got {name!r}, expected a file such as {kind}-000001.safetensors"
        )
    try:
        return (folder / name).read_bytes()
    except FileNotFoundError:
        raise FormatError(f"{manifest}: {kind}: {name} is missing from the directory") from None


def restore(loop: SonaLoop, parts: Parts) -> None:
    """Puts the parts into a new loop of their settings.

    Raises:
        ConfigError: Encoders of other names.
        FormatError: A damaged state.
    """
    names = loop._encoders.names
    if None not in (names, parts.encoders) and names != parts.encoders:
        raise ConfigError(f"encoder: got {names}, expected {parts.encoders}, which the loop learned with")
    loop.restore(parts.state)
    loop._fisher = parts.fisher


def _number(name: str) -> int:
    """Number of a part's file; 0 of any other."""
    kind, _, rest = name.partition("-")
    digits, dot, suffix = rest.partition(".")
    known = kind in _KINDS and dot and suffix == "safetensors" and digits.isascii() and digits.isdigit()
    return int(digits) if known else 0
