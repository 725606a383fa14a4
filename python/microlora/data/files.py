"""The directory of a dataset: what is in it, and how one takes the place of another.

| file | holds |
|---|---|
| ``dataset.json`` | format name and version, counts, widths, length and SHA-256 of the other two, metadata |
| ``data.safetensors`` | a tensor for each column of numbers, and where each line of the texts begins |
| ``samples.jsonl`` | one JSON object for each sample: its id, texts, domain, session and so on |

A new dataset is written beside its place, synced, and renamed; the old one steps aside under a fixed name
(``.NAME.previous``) and is deleted after that. Killed at any moment, one of the two is whole, and `locate`
finds it.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
from collections.abc import Mapping
from pathlib import Path

from microlora.exceptions import ConfigError

__all__ = ["DATA", "FORMAT", "INDEX", "SAMPLES", "TENSORS", "VERSION", "commit", "locate", "stage"]

FORMAT = "microlora-dataset"
VERSION = 1
INDEX = "dataset.json"
DATA = "data.safetensors"
SAMPLES = "samples.jsonl"
_OURS = {INDEX, DATA, SAMPLES}

TENSORS: Mapping[str, str] = {
    "quality": "<f8",
    "weight": "<f8",
    "latency_ms": "<f8",
    "timestamp": "<f8",
    "token_count": "<i8",
    "text_offsets": "<i8",
    "held_out": "|u1",
    "inputs": "<f4",
    "targets": "<f4",
    "labels": "<i8",
    "feedback_kinds": "|u1",
    "feedback_scalars": "<f8",
    "feedback_offsets": "<i8",
    "feedback_vectors": "<f4",
    "optimum_lora_a": "<f4",
    "optimum_lora_b": "<f4",
}
"""Every tensor that a file may hold, with its dtype."""


def _aside(place: Path) -> Path:
    return place.with_name(f".{place.name}.previous")


def locate(place: Path) -> Path:
    """Where the dataset of this name lies: at its place, or aside if a write was cut off between renames.

    Raises:
        FileNotFoundError: in neither.
    """
    for path in (place, _aside(place)):
        if path.exists():
            return path
    raise FileNotFoundError(2, "there is no dataset", str(place))


def stage(place: Path) -> Path:
    """A new empty directory beside ``place``.

    Raises:
        ConfigError: at ``place`` is something that must not be replaced.
        OSError: the parent does not exist or cannot be written.
    """
    if not place.name:
        raise ConfigError(f"path: got {str(place)!r}, expected the name of a directory")
    if place.exists() or place.is_symlink():
        others = sorted(set(os.listdir(place)) - _OURS) if place.is_dir() else None
        if place.is_symlink() or others is None:
            raise ConfigError(f"path: {place} is no directory; expected a dataset there, or nothing")
        if others:
            raise ConfigError(f"path: {place} holds {others[0]!r}; expected a dataset there, or nothing")
    staged = place.with_name(f".{place.name}.{secrets.token_hex(4)}.tmp")
    staged.mkdir()
    return staged


def commit(staged: Path, place: Path) -> None:
    """Put a finished directory in its place, the old one out of it; on a failure the old one is back."""
    aside = _aside(place)
    if aside.exists() and not place.exists():
        os.rename(aside, place)
    shutil.rmtree(aside, ignore_errors=True)
    moved = place.exists()
    if moved:
        os.rename(place, aside)
    try:
        os.rename(staged, place)
    except BaseException:
        if moved:
            os.rename(aside, place)
        raise
    sync_dir(place.parent)
    shutil.rmtree(aside, ignore_errors=True)


def sync_dir(path: Path) -> None:
    """Make a rename durable where the system can."""
    with contextlib.suppress(OSError):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
