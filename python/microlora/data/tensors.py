"""A small reader and writer of safetensors files: bounded headers, nothing believed, mapped on demand."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from microlora._checks import read_json
from microlora.data.arrays import Array, frozen
from microlora.exceptions import FormatError

__all__ = ["DTYPES", "MAX_HEADER", "header_bytes", "layout", "read_tensors"]

MAX_HEADER = 1 << 20
"""Bytes of the longest header that is read; ours have about 1,500."""

DTYPES: Mapping[str, str] = {"F64": "<f8", "I64": "<i8", "F32": "<f4", "U8": "|u1"}
_NAMES = {np.dtype(code).str: name for name, code in DTYPES.items()}

Entry = tuple[str, str, tuple[int, ...]]
"""Name, NumPy dtype and shape of a tensor."""


def layout(entries: Iterable[Entry]) -> list[Entry]:
    """The order in which tensors are written: wide elements first, so that each lies aligned."""
    return sorted(entries, key=lambda entry: (-np.dtype(entry[1]).itemsize, entry[0]))


def header_bytes(entries: Iterable[Entry]) -> bytes:
    """Length and header of a file that holds these tensors in this order, padded to 8 bytes."""
    at = 0
    table: dict[str, Any] = {}
    for name, code, shape in entries:
        end = at + np.dtype(code).itemsize * math.prod(shape)
        table[name] = {
            "dtype": _NAMES[np.dtype(code).str],
            "shape": list(shape),
            "data_offsets": [at, end],
        }
        at = end
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def read_tensors(
    path: Path, known: Mapping[str, str], *, mmap: bool, sha256: str | None = None
) -> dict[str, Array]:
    """The tensors of a file, read-only.

    Args:
        path: The file.
        known: The tensors that may be in it, with their NumPy dtypes.
        mmap: Give views of the mapped file (`numpy.memmap`) instead of reading it.
        sha256: The checksum it must have, compared where it is read and not mapped.

    Raises:
        FormatError: anything that is not as it should be; names the file, the tensor and the reason.
        OSError: the file cannot be read.
    """
    with path.open("rb") as file:
        size = file.seek(0, 2)
        file.seek(0)
        start, table = _header(path, file, size)
    spans = _spans(path, table, known, size - start)
    raw: Array = (
        np.memmap(path, np.uint8, "r", shape=(size,)) if mmap else frozen(np.fromfile(path, np.uint8, size))
    )
    if len(raw) != size:
        raise FormatError(f"{path}: got {len(raw)} bytes where there were {size}; it is being written to")
    if sha256 is not None and not mmap and hashlib.sha256(raw.data).hexdigest() != sha256:
        raise FormatError(f"{path}: its SHA-256 is not the one in dataset.json; the file was changed")
    out = {}
    for name, (code, shape, begin, end) in spans.items():
        part = raw[start + begin : start + end].view(code).reshape(shape)
        out[name] = part if part.flags.aligned else frozen(np.array(part))
    return out


def _header(path: Path, file: BinaryIO, size: int) -> tuple[int, dict[str, Any]]:
    head = file.read(8)
    if len(head) < 8:
        raise FormatError(f"{path}: {size} bytes are too few for a safetensors file")
    length = int.from_bytes(head, "little")
    if length > min(MAX_HEADER, size - 8):
        raise FormatError(
            f"{path}: a header of {length} bytes, expected at most {min(MAX_HEADER, size - 8)} in this file"
        )
    table = read_json(str(path), file.read(length))
    if not isinstance(table.pop("__metadata__", {}), dict):
        raise FormatError(f"{path}: __metadata__: expected an object")
    return 8 + length, table


def _spans(
    path: Path, table: Mapping[str, Any], known: Mapping[str, str], room: int
) -> dict[str, tuple[str, tuple[int, ...], int, int]]:
    """dtype, shape, begin and end of every tensor, which together fill the room without a gap."""
    out = {}
    for name, entry in table.items():
        at = f"{path}: tensor {name[:80]!r}"
        if name not in known:
            raise FormatError(f"{at}: unknown; known: {', '.join(known)}")
        if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
            raise FormatError(f"{at}: expected dtype, shape and data_offsets")
        code = DTYPES.get(entry["dtype"]) if isinstance(entry["dtype"], str) else None
        if code is None or np.dtype(code) != np.dtype(known[name]):
            raise FormatError(f"{at}: dtype {entry['dtype']!r:.40}, expected {_NAMES[known[name]]}")
        shape, offsets = entry["shape"], entry["data_offsets"]
        for numbers, most in ((shape, 2), (offsets, 2)):
            if (
                not isinstance(numbers, list)
                or not 1 <= len(numbers) <= most
                or not all(type(n) is int and 0 <= n < 2**62 for n in numbers)
            ):
                raise FormatError(f"{at}: shape {shape!r:.60} or data_offsets {offsets!r:.60} is none")
        wanted = np.dtype(code).itemsize * math.prod(shape)
        if len(offsets) != 2 or offsets[1] - offsets[0] != wanted or offsets[1] > room:
            raise FormatError(
                f"{at}: data_offsets {offsets}, expected {wanted} bytes within the {room} of the file"
            )
        out[name] = (code, tuple(shape), offsets[0], offsets[1])
    end = 0
    for name, (_, _, begin, stop) in sorted(out.items(), key=lambda item: item[1][2:]):
        if begin != end:
            raise FormatError(f"{path}: tensor {name!r}: begins at {begin}, expected {end}")
        end = stop
    if end != room:
        raise FormatError(f"{path}: {room} bytes of data, expected the {end} that its header names")
    return out
