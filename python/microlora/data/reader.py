"""Reading datasets: whole into memory, or mapped."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from microlora._checks import read_json
from microlora.data.arrays import Array, Integers, frozen, not_finite
from microlora.data.columns import SCALARS, TEXTS, Columns, MemoryTexts, Texts
from microlora.data.dataset import AdapterDataset
from microlora.data.feedbacks import FeedbackColumn
from microlora.data.files import DATA, FORMAT, INDEX, SAMPLES, TENSORS, VERSION, locate
from microlora.data.optimum import Optimum
from microlora.data.tensors import read_tensors
from microlora.exceptions import FormatError, MicroLoraError

__all__ = ["LineTexts", "read_dataset", "verify"]

_INDEX_BYTES = 64 << 20
_KEYS = (
    "format", "version", "rows", "validation_rows", "in_features", "out_features", "kind", "files", "optimum",
    "metadata",
)  # fmt: skip


class LineTexts:
    """Texts as lines of JSON, found by where each begins; a line is parsed when it is asked for."""

    def __init__(self, path: Path, lines: Array, offsets: Integers) -> None:
        self._path = path
        self._lines = lines
        self._offsets = offsets

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def row(self, row: int) -> dict[str, str]:
        """The fields of one sample that differ from their default.

        Raises:
            FormatError: the line is no JSON object of texts; names the file and the line.
        """
        at = f"{self._path}: line {row + 1}"
        start, stop = int(self._offsets[row]), int(self._offsets[row + 1])
        if not 0 <= start < stop <= len(self._lines):
            raise FormatError(f"{at}: lies at {start} to {stop} of {len(self._lines)} bytes")
        out = read_json(at, self._lines[start:stop].tobytes())
        for name, value in out.items():
            if name not in TEXTS or not isinstance(value, str):
                raise FormatError(f"{at}: got {name!r:.80} of {type(value).__name__}, expected known texts")
        if not out.get("id"):
            raise FormatError(f"{at}: has no id")
        return out

    def column(self, name: str, rows: Iterable[int]) -> list[str | None]:
        """One field of some samples, defaults filled in."""
        return [self.row(row).get(name, TEXTS[name]) for row in rows]


def read_dataset(path: str | os.PathLike[str], *, mmap: bool = False) -> AdapterDataset:
    """What `AdapterDataset.load` does; arguments and errors are those of it."""
    place = locate(Path(path))
    index = read_index(place)
    sums = index["files"]
    tensors = read_tensors(place / DATA, TENSORS, mmap=mmap, sha256=sums[DATA]["sha256"])
    columns = _columns(place, index, tensors, mmap)
    held: Array = tensors["held_out"] != 0
    if int(held.sum()) != index["validation_rows"]:
        raise FormatError(f"{place / DATA}: held_out: not the {index['validation_rows']} of {INDEX}")
    try:
        optimum = _optimum(index, tensors)
        more: dict[str, Any] = {"metadata": index["metadata"], "optimum": optimum}
        if not held.any():
            return AdapterDataset.of(columns, **more)
        validation = AdapterDataset.of(columns, np.flatnonzero(held), **more)
        return AdapterDataset.of(columns, np.flatnonzero(~held), validation=validation, **more)
    except MicroLoraError as err:
        raise FormatError(f"{place / INDEX}: {err}") from None


def verify(path: str | os.PathLike[str]) -> None:
    """Read all of a dataset once and compare it with its checksums, without holding it in memory.

    Raises:
        FormatError: damaged; names the file.
        OSError: the files cannot be read.
    """
    place = locate(Path(path))
    for name, wanted in read_index(place)["files"].items():
        with (place / name).open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != wanted["sha256"]:
                raise FormatError(f"{place / name}: its SHA-256 is not the one in {INDEX}")


def read_index(place: Path) -> dict[str, Any]:
    """The checked contents of ``dataset.json``, with the lengths of the other files compared."""
    path = place / INDEX
    if not path.is_file():
        raise FormatError(f"{place}: has no {INDEX}; no dataset")
    with path.open("rb") as file:
        data = file.read(_INDEX_BYTES + 1)
    if len(data) > _INDEX_BYTES:
        raise FormatError(f"{path}: more than {_INDEX_BYTES} bytes")
    index = read_json(str(path), data)
    if index.get("format") != FORMAT:
        raise FormatError(f"{path}: format: got {index.get('format')!r:.80}, expected {FORMAT!r}")
    version = index.get("version")
    if type(version) is not int or version < 1:
        raise FormatError(f"{path}: version: got {version!r:.80}, expected an integer of 1 or more")
    if version > VERSION:
        raise FormatError(
            f"{path}: version {version} is newer than {VERSION}, the newest this microlora reads"
        )
    for key in _KEYS:
        if key not in index:
            raise FormatError(f"{path}: has no {key!r}")
    for key in ("rows", "validation_rows"):
        if type(index[key]) is not int or not 0 <= index[key] < 2**62:
            raise FormatError(f"{path}: {key}: got {index[key]!r:.80}, expected an integer of 0 or more")
    if not isinstance(index["metadata"], dict) or not isinstance(index["files"], dict):
        raise FormatError(f"{path}: metadata, files: expected objects")
    if set(index["files"]) != {DATA, SAMPLES}:
        raise FormatError(f"{path}: files: expected {DATA} and {SAMPLES}")
    for name, entry in index["files"].items():
        if not isinstance(entry, dict) or type(entry.get("bytes")) is not int:
            raise FormatError(f"{path}: files: {name}: expected bytes and sha256")
        if not isinstance(entry.get("sha256"), str):
            raise FormatError(f"{path}: files: {name}: expected bytes and sha256")
        file_path = place / name
        if not file_path.is_file():
            raise FormatError(f"{file_path}: is missing")
        size = file_path.stat().st_size
        if size != entry["bytes"]:
            raise FormatError(
                f"{file_path}: {size} bytes, expected {entry['bytes']}; it is cut off or changed"
            )
    return index


def _columns(place: Path, index: Mapping[str, Any], tensors: Mapping[str, Array], mmap: bool) -> Columns:
    n, path = index["rows"], place / DATA
    kind = index["kind"]
    wanted: dict[str, tuple[int | None, ...]] = dict.fromkeys((*SCALARS, "held_out"), (n,))
    wanted["text_offsets"] = (n + 1,)
    width_in, width_out = index["in_features"], index["out_features"]
    if n and width_in is not None:
        wanted["inputs"] = (n, width_in)
    if kind == "targets":
        wanted["targets"] = (n, width_out)
    elif kind == "labels":
        wanted["labels"] = (n,)
    elif kind == "feedback":
        wanted |= {"feedback_kinds": (n,), "feedback_scalars": (n, 2), "feedback_offsets": (n + 1,)}
        wanted["feedback_vectors"] = (None, width_out)
    elif kind != "none":
        raise FormatError(
            f"{place / INDEX}: kind: got {kind!r:.80}, expected targets, labels, feedback or none"
        )
    for name, shape in wanted.items():
        if name not in tensors:
            raise FormatError(f"{path}: has no tensor {name!r}")
        came = tensors[name].shape
        if len(came) != len(shape) or any(w not in (None, c) for w, c in zip(shape, came, strict=True)):
            raise FormatError(f"{path}: tensor {name!r}: shape {came}, expected {shape} by {INDEX}")
    extra = set(tensors) - set(wanted) - {"optimum_lora_a", "optimum_lora_b"}
    if extra:
        raise FormatError(f"{path}: tensor {min(extra)!r} does not belong to a dataset of {kind}")
    feedback = None
    if kind == "feedback":
        feedback = FeedbackColumn(
            *(tensors[f"feedback_{x}"] for x in ("kinds", "scalars", "offsets", "vectors"))
        )
        feedback.check(str(path))
    arrays: dict[str, Any] = {name: tensors[name] for name in SCALARS}
    arrays |= {name: tensors.get(name) for name in ("inputs", "targets", "labels")}
    texts = _texts(place / SAMPLES, tensors["text_offsets"], index["files"][SAMPLES], mmap)
    if not mmap:
        for name in ("inputs", "targets", "feedback_vectors"):
            row = None if name not in tensors else not_finite(tensors[name])
            if row is not None:
                raise FormatError(f"{path}: tensor {name!r}: NaN or infinity in row {row}")
    return Columns(texts, feedback=feedback, **arrays)


def _texts(path: Path, offsets: Integers, sums: Mapping[str, Any], mmap: bool) -> Texts:
    size = sums["bytes"]
    if offsets[0] != 0 or offsets[-1] != size or (not mmap and (np.diff(offsets) < 1).any()):
        raise FormatError(f"{path}: text_offsets do not rise from 0 to {size}")
    if not size:
        return MemoryTexts({}, 0)
    if mmap:
        return LineTexts(path, np.memmap(path, np.uint8, "r", shape=(size,)), offsets)
    lines = frozen(np.fromfile(path, np.uint8))
    if hashlib.sha256(lines.data).hexdigest() != sums["sha256"]:
        raise FormatError(f"{path}: its SHA-256 is not the one in {INDEX}; the file was changed")
    mapped = LineTexts(path, lines, offsets)
    return MemoryTexts.of_rows([mapped.row(row) for row in range(len(mapped))])


def _optimum(index: Mapping[str, Any], tensors: Mapping[str, Array]) -> Optimum | None:
    given = index["optimum"]
    names = ("optimum_lora_a", "optimum_lora_b")
    if given is None:
        return None
    if not isinstance(given, dict) or set(given) != {"sigma", "best_loss", "zero_loss"}:
        raise FormatError("optimum: expected sigma, best_loss and zero_loss")
    if any(name not in tensors for name in names):
        raise FormatError(f"optimum: expected the tensors {' and '.join(names)}")
    return Optimum(tensors[names[0]], tensors[names[1]], **given)
