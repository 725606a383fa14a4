"""Writing datasets, larger than memory if need be: `DatasetWriter`."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, BinaryIO, Self

import numpy as np

from microlora._checks import integer, write_json
from microlora.data.arrays import Array
from microlora.data.build import checked_metadata
from microlora.data.columns import SCALARS, Columns, check_alike
from microlora.data.dataset import AdapterDataset
from microlora.data.files import DATA, FORMAT, INDEX, SAMPLES, TENSORS, VERSION, commit, stage, sync_dir
from microlora.data.hashing import hash64
from microlora.data.sample import TrainingSample
from microlora.data.split import Keys, leak
from microlora.data.tensors import Entry, header_bytes, layout
from microlora.exceptions import ConfigError

if TYPE_CHECKING:
    from microlora.data.optimum import Optimum

__all__ = ["DatasetWriter", "write_dataset"]

_ROWS = 1024
_CHUNK = 1 << 20
_HASHES = ("ids", "roots", "texts")


class DatasetWriter:
    """Appends samples to a dataset on disk, a batch at a time; holds one batch in memory.

    Nothing is at ``path`` until `close`; then it is there as a whole. Use it in a ``with`` block: an error in
    the block, a full disk included, leaves what was at ``path`` before.

    Args:
        path: The directory to write; an older dataset there is replaced.
        metadata: Anything that JSON can hold.
        optimum: The optimum of synthetic data.

    Raises:
        ConfigError: ``path`` is something else than a dataset, or metadata that JSON cannot hold.
        OSError: the system refused.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     with DatasetWriter(Path(folder, "big"), metadata={"from": "logs"}) as writer:
        ...         for day in range(3):
        ...             rows = writer.append([TrainingSample.new([day, 1.0], [0.0], id=f"d{day}")])
        ...     len(AdapterDataset.load(Path(folder, "big"), mmap=True))
        3
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        metadata: Mapping[str, Any] | None = None,
        optimum: Optimum | None = None,
    ) -> None:
        self._metadata = checked_metadata(metadata)
        self._optimum = optimum
        self._place = Path(path)
        self._files: dict[str, BinaryIO] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._rows = self._held = self._text_bytes = self._vectors = 0
        self._first: Columns | None = None
        self._staged: Path | None = stage(self._place)

    @property
    def rows(self) -> int:
        """Samples written so far, held out ones included."""
        return self._rows

    def append(self, samples: Iterable[TrainingSample], *, validation: bool = False) -> int:
        """Write some samples; those of a dataset's held-out part are not among them.

        Args:
            samples: Of one sort with those before.
            validation: Whether they are held out.

        Returns:
            How many there were.

        Raises:
            ConfigError: the writer is closed, or sorts mixed.
            ShapeError: other widths than before.
            OSError: the disk is full; nothing of this writer is left, the old dataset is.
        """
        if self._staged is None:
            raise ConfigError("writer: it is closed, expected an open one")
        if isinstance(samples, AdapterDataset):
            parts = (samples.rows[at : at + _ROWS] for at in range(0, len(samples), _ROWS))
            batches: Iterable[Columns] = (samples.columns.take(rows) for rows in parts)
        else:
            batches = (Columns.of_samples(part) for part in _parts(samples))
        before = self._rows
        for columns in batches:
            if self._first is not None:
                check_alike(self._first, columns)
            try:
                self._append(columns, validation)
            except BaseException:
                self.abort()
                raise
        return self._rows - before

    def _append(self, columns: Columns, validation: bool) -> None:
        n = len(columns)
        if not n:
            return
        if self._first is None:
            self._first = columns.take(np.zeros(1, np.int64))
        keys = Keys()
        ends = np.empty(n, np.int64)
        lines = []
        for row in range(n):
            fields = columns.texts.row(row)
            keys.add(fields)
            lines.append(json.dumps(fields, ensure_ascii=False, separators=(",", ":")).encode() + b"\n")
            self._text_bytes += len(lines[-1])
            ends[row] = self._text_bytes
        self._write(SAMPLES, b"".join(lines))
        ids = [hash64(str(name)) for name in columns.texts.column("id", range(n))]
        for name, hashes in zip(_HASHES, (ids, keys.roots, keys.texts), strict=True):
            self._write(name, np.array(hashes, np.uint64).tobytes())
        self._tensor("text_offsets", ends)
        self._tensor("held_out", np.full(n, validation, np.uint8))
        for name in (*SCALARS, "inputs", "targets", "labels"):
            array = getattr(columns, name)
            if array is not None:
                self._tensor(name, array)
        if columns.feedback is not None:
            f = columns.feedback
            self._tensor("feedback_kinds", f.kinds)
            self._tensor("feedback_scalars", f.scalars)
            self._tensor("feedback_offsets", f.offsets[1:] + self._vectors)
            self._tensor("feedback_vectors", f.vectors)
            self._vectors += int(f.offsets[-1])
        self._rows += n
        self._held += n if validation else 0

    def _tensor(self, name: str, array: Array) -> None:
        array = np.ascontiguousarray(array, TENSORS[name])
        if name.endswith("_offsets") and name not in self._shapes:
            array = np.concatenate([np.zeros(1, array.dtype), array])  # where the first row begins
        rows = self._shapes.get(name, (0,))[0] + len(array)
        self._write(name, array.tobytes())
        self._shapes[name] = (rows, *array.shape[1:])

    def _write(self, name: str, data: bytes) -> None:
        assert self._staged is not None
        if name not in self._files:
            file = SAMPLES if name == SAMPLES else f"{name}.part"
            self._files[name] = (self._staged / file).open("xb", buffering=_CHUNK)
        self._files[name].write(data)

    def close(self) -> None:
        """Put the dataset in its place; a second call does nothing.

        Raises:
            ConfigError: an id appears twice.
            LeakageError: a sample, text or variation is both held out and not.
            OSError: the disk is full; the old dataset is left whole.
        """
        if self._staged is None:
            return
        try:
            for name in (SAMPLES, *_HASHES, "held_out"):
                self._write(name, b"")
            if self._optimum is not None:
                self._tensor("optimum_lora_a", self._optimum.lora_a)
                self._tensor("optimum_lora_b", self._optimum.lora_b)
            for file in self._files.values():
                file.flush()
            self._check()
            self._assemble()
            commit(self._staged, self._place)
            self._staged = None
        finally:
            self.abort()

    def abort(self) -> None:
        """Throw away what was written; what was at the path stays."""
        for file in self._files.values():
            try:
                file.close()
            except OSError:  # its buffer may not fit the disk either, and is not wanted any more
                file.raw.close() if hasattr(file, "raw") else None
        self._files.clear()
        if self._staged is not None:
            shutil.rmtree(self._staged, ignore_errors=True)
            self._staged = None

    def _check(self) -> None:
        """Refuse repeated ids and leakage, from 8 bytes a sample for each."""
        assert self._staged is not None
        ids, roots, texts = (np.fromfile(self._staged / f"{name}.part", np.uint64) for name in _HASHES)
        held = np.fromfile(self._staged / "held_out.part", np.uint8) != 0
        order = np.argsort(ids, kind="stable")
        twice = np.flatnonzero(ids[order][1:] == ids[order][:-1])
        if len(twice):
            name = self._id(int(order[twice[0] + 1]))
            raise ConfigError(f"writer: id {name!r} appears twice, expected every id once")
        for what, keys in (("the same sample, or a variation of it, as", roots), ("the same text as", texts)):
            both = np.intersect1d(keys[held & (keys != 0)], keys[~held])
            if len(both):
                ours, theirs = (int(np.flatnonzero((keys == both[0]) & side)[0]) for side in (~held, held))
                raise leak(self._id(ours), self._id(theirs), what)

    def _id(self, row: int) -> str:
        assert self._staged is not None
        with (self._staged / SAMPLES).open("rb") as file:
            line = next(line for at, line in enumerate(file) if at == row)
        return str(json.loads(line)["id"])

    def _assemble(self) -> None:
        """Join the parts into one file of tensors, and write the index over both."""
        assert self._staged is not None
        for file in self._files.values():
            file.close()
        for name in ("text_offsets", "held_out", *SCALARS):  # a dataset without samples has them too
            if name not in self._shapes:
                empty = np.zeros(1 if name == "text_offsets" else 0, TENSORS[name])
                (self._staged / f"{name}.part").write_bytes(empty.tobytes())
                self._shapes[name] = empty.shape
        entries: list[Entry] = layout((name, TENSORS[name], shape) for name, shape in self._shapes.items())
        with (self._staged / DATA).open("xb", buffering=_CHUNK) as out:
            out.write(header_bytes(entries))
            for name, _, _ in entries:
                part = self._staged / f"{name}.part"
                with part.open("rb") as source:
                    shutil.copyfileobj(source, out, _CHUNK)
                part.unlink()
        for name in _HASHES:
            (self._staged / f"{name}.part").unlink()
        files = {name: _measure(self._staged / name) for name in (DATA, SAMPLES)}
        first = self._first
        o = self._optimum
        index = {
            "format": FORMAT,
            "version": VERSION,
            "rows": self._rows,
            "validation_rows": self._held,
            "in_features": None if first is None else first.in_features,
            "out_features": None if first is None else first.out_features,
            "kind": "none" if first is None else first.kind,
            "files": files,
            "optimum": None if o is None else {k: getattr(o, k) for k in ("sigma", "best_loss", "zero_loss")},
            "metadata": dict(self._metadata),
        }
        with (self._staged / INDEX).open("x", encoding="utf-8") as text:
            text.write(write_json(index, indent=2) + "\n")
            text.flush()
            os.fsync(text.fileno())
        sync_dir(self._staged)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self.abort()

    def __del__(self) -> None:
        if getattr(self, "_staged", None) is not None:
            self.abort()


def write_dataset(dataset: AdapterDataset, path: str | os.PathLike[str], rows: int = _ROWS) -> None:
    """Save a dataset and its held-out part; ``rows`` at a time are in memory."""
    integer("rows", rows, 1, 2**31 - 1)
    with DatasetWriter(path, metadata=dataset.metadata, optimum=dataset.optimum) as writer:
        writer.append(dataset)
        if dataset.validation is not None:
            writer.append(dataset.validation, validation=True)


def _parts(samples: Iterable[TrainingSample]) -> Iterable[list[TrainingSample]]:
    part: list[TrainingSample] = []
    for sample in samples:
        part.append(sample)
        if len(part) == _ROWS:
            yield part
            part = []
    if part:
        yield part


def _measure(path: Path) -> dict[str, Any]:
    """Length and SHA-256 of a file, which is synced to disk."""
    with path.open("r+b") as file:
        os.fsync(file.fileno())
        digest = hashlib.file_digest(file, "sha256")
    return {"bytes": path.stat().st_size, "sha256": digest.hexdigest()}
