"""The columns under a dataset: arrays for numbers, lists or mapped lines for texts."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from microlora._core import FeedbackBase
from microlora.data.arrays import Array, Floats, Integers, frozen
from microlora.data.feedbacks import FeedbackColumn
from microlora.data.hashing import array_digest
from microlora.data.sample import TrainingSample
from microlora.exceptions import ConfigError, ShapeError

__all__ = ["SCALARS", "TEXTS", "Columns", "MemoryTexts", "Texts", "first_repeat"]

Doubles = npt.NDArray[np.float64]

TEXTS: Mapping[str, str | None] = {
    "id": "",
    "query": None,
    "response": None,
    "domain": "",
    "session_id": "",
    "module": None,
    "parent_id": "",
}
"""Text fields of a sample and the value of each where nothing is stored."""

SCALARS: Mapping[str, tuple[str, float]] = {
    "quality": ("<f8", 1.0),
    "weight": ("<f8", 1.0),
    "latency_ms": ("<f8", float("nan")),
    "timestamp": ("<f8", float("nan")),
    "token_count": ("<i8", -1),
}
"""Number fields of a sample: their dtype, and what stands for None or the default."""

_NONE_IS_NAN = ("latency_ms", "timestamp")


class Texts(Protocol):
    """The text fields of all samples."""

    def __len__(self) -> int:
        """Number of samples."""

    def row(self, row: int) -> dict[str, str]:
        """The fields of one sample that differ from their default."""

    def column(self, name: str, rows: Iterable[int]) -> list[str | None]:
        """One field of some samples, defaults filled in."""


class MemoryTexts:
    """Texts as lists; a field without a list has its default everywhere."""

    def __init__(self, fields: Mapping[str, list[str | None]], count: int) -> None:
        self._fields = {name: list(values) for name, values in fields.items()}
        self._count = count

    @classmethod
    def of_rows(cls, rows: Sequence[Mapping[str, Any]]) -> MemoryTexts:
        """Texts of samples given as mappings of fields."""
        used = {name for row in rows for name in row}
        fields = {n: [row.get(n, none) for row in rows] for n, none in TEXTS.items() if n in used}
        return cls(fields, len(rows))

    def __len__(self) -> int:
        return self._count

    def row(self, row: int) -> dict[str, str]:
        """The fields of one sample that differ from their default."""
        pairs = ((name, values[row]) for name, values in self._fields.items())
        return {name: value for name, value in pairs if value is not None and value != TEXTS[name]}

    def column(self, name: str, rows: Iterable[int]) -> list[str | None]:
        """One field of some samples, defaults filled in."""
        values = self._fields.get(name)
        return [TEXTS[name] for _ in rows] if values is None else [values[row] for row in rows]


@dataclass(frozen=True, eq=False)
class Columns:
    """All that a dataset knows of its samples, n of them; arrays are read-only.

    Attributes:
        texts: Their texts and ids.
        quality: float64 (n,).
        weight: float64 (n,).
        latency_ms: float64 (n,), NaN for None.
        timestamp: float64 (n,), NaN for None.
        token_count: int64 (n,), -1 for None.
        inputs: float32 (n, in_features), or None where samples are texts only.
        targets: float32 (n, out_features), or None.
        labels: int64 (n,), or None.
        feedback: Feedback of n samples, or None.
    """

    texts: Texts
    quality: Doubles
    weight: Doubles
    latency_ms: Doubles
    timestamp: Doubles
    token_count: Integers
    inputs: Floats | None = None
    targets: Floats | None = None
    labels: Integers | None = None
    feedback: FeedbackColumn | None = None

    def __len__(self) -> int:
        return len(self.quality)

    @property
    def kind(self) -> str:
        """What the samples are to give: ``"targets"``, ``"labels"``, ``"feedback"`` or ``"none"``."""
        kinds = ("targets", "labels", "feedback")
        return next((name for name in kinds if getattr(self, name) is not None), "none")

    @property
    def in_features(self) -> int | None:
        """Width of the inputs."""
        return None if self.inputs is None else int(self.inputs.shape[1])

    @property
    def out_features(self) -> int | None:
        """Width of targets or feedback."""
        if self.targets is not None:
            return int(self.targets.shape[1])
        return None if self.feedback is None else self.feedback.width

    def sample(self, row: int) -> TrainingSample:
        """One sample, checked again: a mapped file may hold anything."""
        numbers: dict[str, Any] = {"quality": float(self.quality[row]), "weight": float(self.weight[row])}
        for name in _NONE_IS_NAN:
            value = float(getattr(self, name)[row])
            numbers[name] = None if np.isnan(value) else value
        tokens = int(self.token_count[row])
        texts: dict[str, Any] = dict(self.texts.row(row))
        return TrainingSample(
            None if self.inputs is None else self.inputs[row],
            None if self.targets is None else self.targets[row],
            label=None if self.labels is None else int(self.labels[row]),
            feedback=None if self.feedback is None else self.feedback.row(row),
            token_count=None if tokens < 0 else tokens,
            **numbers,
            **texts,
        )

    def take(self, rows: Integers) -> Columns:
        """The columns of some samples in the order of ``rows``, in memory."""
        rows = np.asarray(rows, np.int64)
        arrays: dict[str, Any] = {}
        for item in dataclasses.fields(self):
            value = getattr(self, item.name)
            if isinstance(value, FeedbackColumn):
                arrays[item.name] = value.take(rows)
            elif isinstance(value, np.ndarray):
                arrays[item.name] = frozen(np.asarray(value[rows]))
        texts = MemoryTexts.of_rows([self.texts.row(row) for row in rows.tolist()])
        return Columns(texts=texts, **arrays)

    def has_outputs(self, rows: Integers) -> bool:
        """Whether these rows have targets, labels, or feedback that is nothing but targets."""
        if self.feedback is not None:
            return self.feedback.all_targets(rows)
        return self.targets is not None or self.labels is not None

    def arrays(self, place: slice | Integers) -> tuple[Floats, Array, Floats]:
        """Inputs, targets or labels, and float32 weights of some rows that have them."""
        y: Array | None = self.targets if self.labels is None else self.labels
        if y is not None:
            y = y[place]
        elif self.feedback is not None:
            y = self.feedback.targets(place)
        if self.inputs is None or y is None:
            raise ConfigError("dataset: got rows without inputs or outputs, expected both")
        return self.inputs[place], y, self.weight[place].astype(np.float32)

    # -- making --

    @classmethod
    def of_samples(cls, samples: Sequence[TrainingSample]) -> Columns:
        """Columns of samples; those without an id get one.

        Raises:
            ConfigError: a sample that is none; kinds of targets, or texts and vectors, mixed; or a repeated
                id.
            ShapeError: widths that differ.
        """
        for row, item in enumerate(samples):
            if not isinstance(item, TrainingSample):
                raise ConfigError(f"samples[{row}]: got {type(item).__name__}, expected a TrainingSample")
        ids = named(samples)
        repeated = first_repeat(ids)
        if repeated is not None:
            raise ConfigError(f"samples: id {repeated!r} appears twice, expected every id once")
        rows = [{name: getattr(item, name) for name in TEXTS} for item in samples]
        for fields, name in zip(rows, ids, strict=True):
            fields["id"] = name
        arrays: dict[str, Any] = {}
        for name, (dtype, none) in SCALARS.items():
            values = [getattr(item, name) for item in samples]
            arrays[name] = frozen(np.array([none if v is None else v for v in values], dtype))
        arrays["inputs"] = _stack("input_embedding", samples, ids)
        arrays["targets"] = _stack("output_embedding", samples, ids)
        labels = _all_or_none("label", samples, ids)
        arrays["labels"] = None if labels is None else frozen(np.array(labels, "<i8"))
        feedback: list[FeedbackBase] | None = _all_or_none("feedback", samples, ids)
        arrays["feedback"] = None if feedback is None else FeedbackColumn.of(feedback, ids)
        used = {n: [r[n] for r in rows] for n, d in TEXTS.items() if any(r[n] != d for r in rows)}
        return cls(texts=MemoryTexts(used, len(rows)), **arrays)

    @classmethod
    def concat(cls, parts: Sequence[Columns]) -> Columns:
        """Several sets of columns, one after the other, in memory; ids are the caller's to check.

        Raises:
            ConfigError: kinds of targets, or texts and vectors, mixed.
            ShapeError: widths that differ.
        """
        parts = [part for part in parts if len(part)] or list(parts[:1])
        first = parts[0]
        for part in parts[1:]:
            check_alike(first, part)
        arrays: dict[str, Any] = {}
        for item in dataclasses.fields(cls):
            values = [getattr(part, item.name) for part in parts]
            if isinstance(values[0], FeedbackColumn):
                arrays[item.name] = FeedbackColumn.concat(values)
            elif isinstance(values[0], np.ndarray):
                arrays[item.name] = frozen(np.concatenate(values))
        rows = [part.texts.row(row) for part in parts for row in range(len(part))]
        return cls(texts=MemoryTexts.of_rows(rows), **arrays)


def check_alike(first: Columns, other: Columns) -> None:
    """Raise unless the samples of two sets of columns can stand in one dataset."""
    for name in ("in_features", "out_features"):
        ours, theirs = getattr(first, name), getattr(other, name)
        if None not in (ours, theirs) and ours != theirs:
            raise ShapeError(f"dataset: {name}: got {theirs}, expected {ours} as in the samples before")
    if (first.inputs is None) != (other.inputs is None):
        raise ConfigError("dataset: got samples with and without input_embedding, expected one sort")
    if first.kind != other.kind:
        raise ConfigError(f"dataset: got samples with {other.kind}, expected {first.kind} as in those before")


def named(samples: Sequence[TrainingSample]) -> list[str]:
    """Ids of samples: their own, or a digest of the contents, numbered where contents repeat."""
    seen: dict[str, int] = {}
    out = []
    for item in samples:
        name = item.id
        if not name:
            rest = [getattr(item, field) for field in TEXTS]
            text = repr((rest, item.label, item.quality, item.weight, item.timestamp))
            arrays: list[Array | None] = [item.input_embedding, item.output_embedding]
            arrays.append(np.frombuffer(text.encode(), np.uint8))
            if item.feedback is not None:
                column = FeedbackColumn.of([item.feedback], [""])
                arrays += [column.kinds, column.scalars, column.vectors]
            digest = array_digest(arrays)
            seen[digest] = seen.get(digest, 0) + 1
            name = digest if seen[digest] == 1 else f"{digest}-{seen[digest]}"
        out.append(name)
    return out


def first_repeat(ids: Iterable[str | None]) -> str | None:
    """The first id that was there before, or None."""
    seen = set()
    for name in ids:
        if name in seen:
            return name
        seen.add(name)
    return None


def _all_or_none(field: str, samples: Sequence[TrainingSample], ids: Sequence[str]) -> list[Any] | None:
    values = [getattr(item, field) for item in samples]
    if not values or all(value is None for value in values):
        return None
    for name, value in zip(ids, values, strict=True):
        if (value is None) != (values[0] is None):
            has, lacks = (ids[0], name) if value is None else (name, ids[0])
            raise ConfigError(
                f"sample {lacks!r}: has no {field}, sample {has!r} has one; expected all of a dataset alike"
                + ("; encoded(encoder) turns queries into vectors" if field == "input_embedding" else "")
            )
    return values


def _stack(field: str, samples: Sequence[TrainingSample], ids: Sequence[str]) -> Floats | None:
    values: list[Floats] | None = _all_or_none(field, samples, ids)
    if values is None:
        return None
    for name, value in zip(ids, values, strict=True):
        if value.shape != values[0].shape:
            raise ShapeError(
                f"sample {name!r}: {field}: got width {len(value)}, expected {len(values[0])} as in sample "
                f"{ids[0]!r}"
            )
    out = np.vstack(values)
    frozen(out)
    return out
