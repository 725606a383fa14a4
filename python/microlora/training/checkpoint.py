"""One file that a killed run goes on from: written beside its place, synced, then renamed.

The file is safetensors with one U8 tensor per part; ``__metadata__`` holds the format, its version, the run's
state as JSON and a BLAKE2b digest of the parts.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from microlora._checks import read_json, write_json
from microlora.exceptions import FormatError

__all__ = ["FILE_NAME", "FORMAT_VERSION", "Checkpoint", "read", "write", "write_atomic"]

FILE_NAME = "checkpoint.safetensors"
FORMAT = "microlora-checkpoint"
FORMAT_VERSION = 1
MAX_HEADER = 1 << 28


@dataclass(frozen=True)
class Checkpoint:
    """The state of a run as plain values, and its parts as bytes."""

    state: Mapping[str, Any]
    parts: Mapping[str, bytes] = field(default_factory=dict)


def write(path: Path, checkpoint: Checkpoint) -> None:
    """Writes it whole or not at all.

    Raises:
        OSError: The system refused, for example because the disk is full; an older file is left as it was.
    """
    header: dict[str, Any] = {
        "__metadata__": {
            "format": FORMAT,
            "format_version": str(FORMAT_VERSION),
            "digest": _digest(checkpoint.parts),
            "state": write_json(checkpoint.state),
        }
    }
    at = 0
    for name, part in checkpoint.parts.items():
        header[name] = {"dtype": "U8", "shape": [len(part)], "data_offsets": [at, at + len(part)]}
        at += len(part)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    write_atomic(path, [struct.pack("<Q", len(text)), text, *checkpoint.parts.values()])


def write_atomic(path: Path, pieces: list[bytes]) -> None:
    """Writes the pieces to a sibling, syncs it and renames it to ``path``.

    The sibling's name is fixed, so that what a killed run left behind is overwritten by the next.

    Raises:
        OSError: The system refused; an older file at ``path`` is left as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("wb") as file:
            for piece in pieces:
                file.write(piece)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    with contextlib.suppress(OSError):  # makes the rename durable where the system can
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def read(path: Path) -> Checkpoint:
    """Reads a checkpoint; sizes are checked before memory is taken.

    Raises:
        FormatError: Not a checkpoint, a truncated or altered one, or of a newer version.
        OSError: The file cannot be read.
    """
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        first = file.read(8)
        length = struct.unpack("<Q", first)[0] if len(first) == 8 else 0
        if not 2 <= length <= min(size - 8, MAX_HEADER):
            raise FormatError(f"{path}: not a checkpoint: got a header of {length} bytes in a file of {size}")
        header = read_json(str(path), file.read(length))
        about = header.pop("__metadata__", None)
        if not isinstance(about, dict) or about.get("format") != FORMAT:
            raise FormatError(f"{path}: not a checkpoint of a training run")
        version = about.get("format_version", "")
        if not (isinstance(version, str) and version.isdecimal()):
            raise FormatError(f"{path}: format_version: got {version!r}, expected a number")
        if int(version) > FORMAT_VERSION:
            raise FormatError(
                f"{path}: format_version {version} is newer than {FORMAT_VERSION}, the newest that this "
                "microlora reads"
            )
        spans = _spans(path, header, size - 8 - length)
        parts = {}
        for name, n in spans.items():
            parts[name] = file.read(n)
            if len(parts[name]) != n:
                raise FormatError(f"{path}: {name}: the file ends within it")
    if _digest(parts) != about.get("digest"):
        raise FormatError(f"{path}: its contents do not have the digest that was written with them")
    return Checkpoint(read_json(f"{path}: state", str(about.get("state"))), parts)


def _spans(path: Path, header: Mapping[str, Any], available: int) -> dict[str, int]:
    """Length of every part, in the file's order, which must have no holes."""
    at, out = 0, {}
    for name, entry in header.items():
        offsets: Any = entry.get("data_offsets") if isinstance(entry, dict) else None
        whole = isinstance(offsets, list) and len(offsets) == 2 and all(isinstance(v, int) for v in offsets)
        if not whole or offsets[0] != at or offsets[1] < at:
            raise FormatError(f"{path}: {name}: got data_offsets {offsets}, expected them from {at}")
        out[name] = offsets[1] - at
        at = offsets[1]
    if at != available:
        raise FormatError(f"{path}: got {available} bytes of parts, expected {at}")
    return out


def _digest(parts: Mapping[str, bytes]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for name, part in parts.items():
        digest.update(f"{name}:{len(part)};".encode())
        digest.update(part)
    return digest.hexdigest()
