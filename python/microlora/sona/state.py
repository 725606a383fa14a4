"""A loop on disk: ``state.safetensors`` is the core's, ``fisher.safetensors`` what deep runs hold on to."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

import microlora._core as _core
from microlora._checks import SCHEMA_KEY, check_document, read_json, write_json
from microlora.exceptions import ConfigError, FormatError
from microlora.sona.config import SonaConfig
from microlora.sona.journal import JournalConfig

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from microlora.files import PathLike
    from microlora.sona.loop import SonaLoop

__all__ = ["Opened", "Parts", "open_in", "read", "restore", "there", "write", "write_fisher"]

STATE, FISHER = "state.safetensors", "fisher.safetensors"
SCHEMA_VERSION = 1

_log = logging.getLogger("microlora.sona.journal")


class Parts(NamedTuple):
    """Settings, the core's state, what deep runs hold on to, and the encoders' names and vectors."""

    config: SonaConfig
    state: bytes
    fisher: bytes | None
    encoders: tuple[str, ...] | None
    probes: tuple[NDArray[np.float32], NDArray[np.float32]] | None


class Opened(NamedTuple):
    """What opening a state directory found.

    Attributes:
        path: The directory.
        found: Whether a state was there.
        replayed: Records of the journal that came after that state, learned again.
        exact: Whether the weights have the very bits that they had: all was written by the same build on the
            same instruction set. Otherwise they agree to about 1e-5.
        warnings: Damage that was set aside, and what else there is to know.
    """

    path: Path
    found: bool
    replayed: int
    exact: bool
    warnings: tuple[str, ...]


def about(loop: SonaLoop) -> str:
    """What the core keeps for us in a state: settings, the encoders' names and vectors, as JSON."""
    probes = loop._encoders.probes
    return write_json(
        {
            SCHEMA_KEY: SCHEMA_VERSION,
            "config": loop.config.to_dict(),
            "encoders": loop._encoders.names,
            "probes": None if probes is None else [np.round(p.astype(float), 6).tolist() for p in probes],
        }
    )


def write(loop: SonaLoop, path: PathLike) -> None:
    """Writes a loop; the state's rename is what commits it.

    Raises:
        ConfigError: A directory with a journal, whose records a state from elsewhere does not know.
        OSError: The system refused.
    """
    folder = Path(os.fspath(path))
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.glob("journal-*")):
        raise ConfigError(
            f"path: got {folder}, which has a journal, expected another directory: checkpoint() of the loop "
            "that has it open saves there"
        )
    text = about(loop)
    with loop._install_lock:
        data, fisher = loop.to_bytes(text), loop._fisher
    write_fisher(folder, fisher)
    _core.write_file(str(folder / STATE), data)


def write_fisher(folder: Path, fisher: bytes | None) -> None:
    """Writes what deep runs hold on to, or takes it away."""
    if fisher is None:
        (folder / FISHER).unlink(missing_ok=True)
    else:
        _core.write_file(str(folder / FISHER), fisher)


def there(path: PathLike) -> bool:
    """Whether a directory has a state."""
    return (Path(os.fspath(path)) / STATE).exists()


def read(path: PathLike) -> Parts:
    """What is saved in a directory.

    Raises:
        FormatError: No state there, a damaged one, or one of a newer version.
        ConfigError: Settings out of their range.
        OSError: It cannot be read.
    """
    folder = Path(os.fspath(path))
    file = folder / STATE
    if folder.is_dir() and not file.exists():
        raise FormatError(f"{folder}: got a directory without {STATE}, expected one of SonaLoop.save or open")
    data = file.read_bytes()
    text = _core.sona_config(data)
    if text is None:
        raise FormatError(f"{file}: carries no settings of a loop")
    values = check_document(
        str(file), read_json(str(file), text), ("config", "encoders", "probes"), SCHEMA_VERSION
    )
    if "config" not in values:
        raise FormatError(f"{file}: lacks config")
    names = values.get("encoders")
    encoders = None if names is None else tuple(str(name) for name in names)
    probes = _probes(file, values.get("probes"))
    return Parts(SonaConfig.from_dict(values["config"]), data, _fisher(folder), encoders, probes)


def _probes(file: Path, values: Any) -> tuple[NDArray[np.float32], NDArray[np.float32]] | None:
    if values is None:
        return None
    try:
        query, response = (np.array(rows, np.float32) for rows in values)
    except (TypeError, ValueError) as error:
        raise FormatError(f"{file}: probes are no vectors of two encoders") from error
    if query.ndim != 2 or response.ndim != 2:
        raise FormatError(f"{file}: probes are no vectors of two encoders")
    return query, response


def _fisher(folder: Path) -> bytes | None:
    file = folder / FISHER
    if not file.exists():
        return None
    data = file.read_bytes()
    try:
        _core.Ewc.settings_of(data)
    except FormatError as error:
        raise FormatError(f"{file}: {error}") from error
    return data


def _take(loop: SonaLoop, parts: Parts) -> None:
    names = loop._encoders.names
    if None not in (names, parts.encoders) and names != parts.encoders:
        raise ConfigError(f"encoder: got {names}, expected {parts.encoders}, which the loop learned with")
    loop._encoders.check_probes(parts.probes)
    loop._fisher = parts.fisher


def restore(loop: SonaLoop, parts: Parts) -> None:
    """Puts the parts into a new loop of their settings.

    Raises:
        ConfigError: Encoders of other names or vectors.
        FormatError: A damaged state.
    """
    _take(loop, parts)
    loop.restore(parts.state)


def open_in(loop: SonaLoop, path: PathLike, parts: Parts | None, journal: JournalConfig | None) -> Opened:
    """Has a new loop go on from a directory, and write there from now on.

    Raises:
        ConfigError: Encoders of other names or vectors.
        FormatError: A damaged state.
        OSError: Another process has it open, or the system refused.
    """
    folder = Path(os.fspath(path))
    if parts is not None:
        _take(loop, parts)
    found = json.loads(loop.open_dir(folder, about(loop), None if journal is None else journal.core()))
    opened = Opened(folder, found["found"], found["replayed"], found["exact"], tuple(found["warnings"]))
    for text in opened.warnings:
        _log.warning("%s: %s", folder, text, extra={"path": str(folder)})
    _log.info(
        "%s: %s, %d records learned again",
        folder,
        "a state was found" if opened.found else "a new state",
        opened.replayed,
        extra={"path": str(folder), "replayed": opened.replayed, "exact": opened.exact},
    )
    return opened
