"""Arrays and a little metadata in one ``.npz``: written whole or not at all, read with suspicion."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from microlora.exceptions import FormatError

__all__ = ["check", "read", "write"]

_FORMAT = "microlora-encoder"
_VERSION = 1


def write(path: Path, meta: Mapping[str, Any], arrays: Mapping[str, npt.NDArray[Any]]) -> None:
    """Write through a temporary sibling and a rename; on any failure nothing of it is left.

    Raises:
        OSError: the folder does not exist, is not writable, or is full.
    """
    text = json.dumps({"format": _FORMAT, "version": _VERSION, **meta}, sort_keys=True)
    members: dict[str, Any] = {"meta": np.array(text), **arrays}
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            np.savez(file, **members)
            file.flush()
            os.fsync(file.fileno())
        os.replace(name, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(name)
        raise


def read(path: Path, names: Iterable[str]) -> tuple[dict[str, Any], dict[str, npt.NDArray[Any]]]:
    """The metadata and the named arrays.

    Raises:
        FormatError: not such a file, another format or a newer version, or an array is missing.
        OSError: the file cannot be read.
    """
    try:
        with path.open("rb") as raw, np.load(raw, allow_pickle=False) as file:
            meta = json.loads(str(file["meta"]))
            arrays = {name: file[name] for name in names}
    except OSError:
        raise
    except Exception as err:  # a damaged zip, a wrong member or a hostile header: each fails in its own way
        raise FormatError(f"{path}: not a saved encoder: {type(err).__name__}: {err}") from err
    if not isinstance(meta, dict) or meta.get("format") != _FORMAT:
        raise FormatError(f"{path}: not a saved encoder: its metadata has no format {_FORMAT!r}")
    if meta.get("version") != _VERSION:
        raise FormatError(f"{path}: version {meta.get('version')!r}; this release reads {_VERSION}")
    return meta, arrays


def check(
    path: str | Path, name: str, array: npt.NDArray[Any], dtype: type[np.generic], shape: tuple[int, ...]
) -> None:
    """Raise `FormatError` unless ``array`` has this dtype and shape and is finite."""
    if array.dtype != np.dtype(dtype) or array.shape != shape:
        raise FormatError(f"{path}: {name} is {array.dtype} {array.shape}; wanted {np.dtype(dtype)} {shape}")
    if not np.isfinite(array).all():
        raise FormatError(f"{path}: {name} holds NaN or infinity")
