"""Hashes: of an adapter's weights, whatever file holds them, and of files byte for byte."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping
from pathlib import Path

import microlora._core as _core
from microlora._checks import wrong
from microlora._file_checks import path_text, read_document
from microlora.adapter import Adapter
from microlora.exceptions import DTypeError, FormatError, VerificationError
from microlora.formats.file import AdapterFile
from microlora.formats.limits import Limits
from microlora.quantized import QuantizedAdapter

__all__ = ["Manifest", "PathLike", "digest", "file_sha256", "fingerprint", "manifest", "read_manifest"]

PathLike = str | os.PathLike[str]
#: File names of a directory and the SHA-256 of each: 64 hex digits.
Manifest = dict[str, str]

_CHUNK = 1 << 20
_MOST_FILES = 10_000


def fingerprint(
    source: PathLike | AdapterFile | _core.Adapter | QuantizedAdapter, *, limits: Limits | None = None
) -> str:
    """SHA-256 of an adapter's weights: names, shapes, dtypes, scaling and data, and nothing else.

    The same for the same adapter in memory, in our single file and in a PEFT directory; another with other
    module names, another alpha or another dtype. Factors in blocks count as their blocks. docs/doctor.md
    states what is hashed.

    Args:
        source: A path of any format, what was read from one, or an adapter.
        limits: What a file may ask for.

    Returns:
        64 hex digits.

    Raises:
        FormatError: The file is broken.
        DTypeError: Something else.
        OSError: It cannot be read.
    """
    Limits.of(limits)
    if isinstance(source, str | os.PathLike):
        source = AdapterFile.read(path_text("source", source), strict=False, limits=limits)
    if isinstance(source, _core.MicroLora):
        source = source.adapter()
    if isinstance(source, _core.Adapter):
        source = AdapterFile.from_adapter(Adapter(source))
    if isinstance(source, QuantizedAdapter):
        source = AdapterFile.from_adapter(source)
    if not isinstance(source, AdapterFile):
        raise DTypeError(
            f"source: got {type(source).__name__}, expected a path, an AdapterFile or an Adapter"
        )
    return source.fingerprint()


def file_sha256(path: PathLike) -> str:
    """SHA-256 of a regular file's bytes: 64 hex digits.

    Raises:
        FormatError: Not a regular file.
        OSError: It cannot be read.
    """
    place = Path(path_text("path", path))
    if not place.is_file():
        place.stat()
        raise FormatError(f"{place}: not a regular file")
    found = hashlib.sha256()
    with place.open("rb") as file:
        while chunk := file.read(_CHUNK):
            found.update(chunk)
    return found.hexdigest()


def manifest(path: PathLike) -> Manifest:
    """The SHA-256 of a file, or of every file below a directory, by name with forward slashes.

    Raises:
        FormatError: A symbolic link or a special file in the directory, or more than 10,000 files.
        OSError: A file cannot be read.
    """
    place = Path(path_text("path", path))
    if not place.is_dir():
        return {place.name: file_sha256(place)}
    out: Manifest = {}
    for found in sorted(place.rglob("*")):
        if found.is_symlink() or not (found.is_dir() or found.is_file()):
            raise FormatError(f"{found}: a link or special file, expected plain files in what is hashed")
        if found.is_file():
            if len(out) == _MOST_FILES:
                raise FormatError(f"{place}: more than {_MOST_FILES} files")
            out[found.relative_to(place).as_posix()] = file_sha256(found)
    return out


def digest(arg: str, value: object) -> str:
    """A SHA-256 as 64 lower-case hex digits.

    Raises:
        ConfigError: It is none.
    """
    if not isinstance(value, str) or not re.fullmatch("[0-9a-fA-F]{64}", value):
        raise wrong(arg, value, "64 hex digits")
    return value.lower()


def read_manifest(source: Mapping[str, str] | PathLike) -> Manifest:
    """A manifest from a mapping, or from a JSON file ``{"file": "sha256"}``.

    Raises:
        ConfigError: A name that leaves the directory, or a value that is no SHA-256.
        FormatError: Not a regular file, too large, not JSON, or with a key twice.
        MissingPathError: There is no such file.
        OSError: The file cannot be read.
    """
    if not isinstance(source, Mapping):
        if not isinstance(source, str | os.PathLike):
            raise wrong("manifest", source, "a mapping {file: sha256} or the path of its JSON")
        source = read_document("manifest", source, "a mapping {file: sha256} or the path of its JSON")
    out: Manifest = {}
    for name, value in source.items():
        parts = name.split("/") if isinstance(name, str) else []
        if not parts or any(p in ("", ".", "..") or "\\" in p or "\0" in p or ":" in p for p in parts):
            raise wrong("manifest: name", name, "the name of a file below the directory")
        out[name] = digest(f"manifest[{name!r}]", value)
    if not out:
        raise wrong("manifest", {}, "at least one file")
    return out


def compare(place: Path, want: Manifest) -> None:
    """Checks that a place has exactly the files of a manifest, each with its bytes.

    Raises:
        VerificationError: A file is missing, changed, or not named.
    """
    import hmac

    found = manifest(place)
    for name in want:
        where = place / name if place.is_dir() else place
        if name not in found:
            raise VerificationError(f"{where}: missing; the manifest names {name}")
        if not hmac.compare_digest(found[name], want[name]):
            raise VerificationError(f"{where}: SHA-256 is {found[name]}, expected {want[name]}")
    for name in found:
        if name not in want:
            raise VerificationError(f"{place / name}: not named in the manifest")
