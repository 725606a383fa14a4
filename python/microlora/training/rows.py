"""A dataset as the trainer sees it: arrays, or samples with feedback of their own; with ids and a digest."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from microlora._core import Target
from microlora.exceptions import ConfigError, DTypeError, NonFiniteError, ShapeError
from microlora.training.events_in import InEvent, event_weight, imitation_weights, of_sample

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[Any]
    Order = NDArray[np.int64]

__all__ = ["Rows", "refuse_shared", "rows_of", "rows_of_events"]


# Squares of such numbers, summed over any width, stay far from the end of float32.
MODERATE = 1e15


@dataclass(frozen=True, eq=False)
class Rows:
    """Samples to train or validate on.

    Attributes:
        x: float32 (n, in_features); None where the samples are ``events``.
        y: float32 (n, out_features) targets or int64 (n,) labels; None likewise.
        weights: float32 (n,), the quality's part included; None where all are 1.
        events: Samples with their own feedback or module; None where there are arrays.
        ids: Name of every row.
        kept: int64: rows that count; the others have a quality below the threshold.
        shuffled: The order of one epoch from seed and epoch.
        fingerprint: Digest of all that is learned from.
        module: The one module that every sample names; None where none does.
        named: Whether every row has an id of its own, and not its place alone.
    """

    x: Array | None
    y: Array | None
    weights: NDArray[np.float32] | None
    events: tuple[InEvent, ...] | None
    ids: Callable[[], list[str]]
    kept: Order
    shuffled: Callable[[int, int], Order]
    fingerprint: str
    module: str | None = None
    named: bool = True

    def __len__(self) -> int:
        """How many rows count."""
        return len(self.kept)

    @property
    def total(self) -> int:
        """How many rows there are."""
        return len(self.events) if self.events is not None else len(self._x)

    @property
    def _x(self) -> Array:
        assert self.x is not None
        return self.x

    @property
    def arrays(self) -> tuple[Array, Array]:
        """Inputs and targets of a dataset of arrays."""
        assert self.y is not None
        return self._x, self.y

    def contents(self) -> list[bytes]:
        """A digest of every row that counts, of its input and of what should come out."""
        if self.events is not None:
            return [_row_digest(*_parts(self.events[row])) for row in self.kept.tolist()]
        x, y = self.arrays
        return [_row_digest(x[row].tobytes(), y[row].tobytes()) for row in self.kept.tolist()]

    def moderate(self, row: int) -> bool:
        """Whether a row's own numbers leave room for a loss in float32."""
        if self.events is not None:
            feedback = self.events[row].feedback
            numbers = [self.events[row].x, *(v for v in feedback.__reduce__()[1] if not isinstance(v, str))]
        else:
            x, y = self.arrays
            numbers = [x[row], y[row]]
        return all(bool((np.abs(np.asarray(v, np.float64)) < MODERATE).all()) for v in numbers)

    def order(self, seed: int, epoch: int) -> Order:
        """The rows that count in the order of one epoch."""
        order = np.asarray(self.shuffled(seed, epoch), np.int64)
        if len(self.kept) == self.total:
            return order
        counts = np.zeros(self.total, np.bool_)
        counts[self.kept] = True
        return order[counts[order]]


def permutation(n: int) -> Callable[[int, int], Order]:
    """Orders of n rows: PCG64 of (seed, epoch)."""

    def order(seed: int, epoch: int) -> Order:
        generator = np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, epoch])))
        return generator.permutation(n).astype(np.int64)

    return order


def rows_of(name: str, dataset: Any, threshold: float) -> Rows:
    """The rows of an `AdapterDataset`, of ``(x, y)`` or ``(x, y, weights)``, or of a sequence of samples.

    Raises:
        ConfigError: No samples, none of enough quality, or samples that hold nothing to learn from.
        ShapeError: Arrays of other shapes than these.
        DTypeError: Not a dataset.
        NonFiniteError: NaN or infinity in an array.
    """
    if isinstance(dataset, Rows):
        return dataset
    if isinstance(dataset, tuple) and len(dataset) in (2, 3):
        rows = _of_arrays(name, *dataset)
    elif hasattr(dataset, "arrays"):
        rows = _of_dataset(dataset, threshold)
    elif isinstance(dataset, list | tuple):
        events = [of_sample(s, f"{name}[{i}]") for i, s in enumerate(dataset)]
        rows = _of_samples(events, [str(s.id) for s in dataset], threshold)
    else:
        raise DTypeError(
            f"{name}: got {type(dataset).__name__}, expected an AdapterDataset, (x, y) or a list of samples"
        )
    if not rows.total:
        raise ConfigError(f"{name}: got no samples, expected one or more")
    if not len(rows):
        raise ConfigError(f"{name}: got no sample of quality {threshold:g} or more, expected some")
    return rows


def rows_of_events(events: list[InEvent], threshold: float) -> Rows:
    """The rows of events that may have a base of their own, in their order.

    Raises:
        ConfigError: None, or none of enough quality.
    """
    if not events:
        raise ConfigError("events: got none, expected one or more")
    rows = _of_samples(events, [""] * len(events), threshold)
    if not len(rows):
        raise ConfigError(f"events: got none of quality {threshold:g} or more, expected some")
    return rows


def refuse_shared(rows: Rows, held: Rows | None) -> None:
    """Refuses held-out samples that are training data too.

    Raises:
        ConfigError: Says how many, and which.
    """
    if held is None:
        return
    if held is rows or held.fingerprint == rows.fingerprint:
        raise ConfigError("validation: got the training data themselves, expected other samples")
    if not (rows.named and held.named):
        known = set(rows.contents())
        twice = [
            row for row, digest in zip(held.kept.tolist(), held.contents(), strict=True) if digest in known
        ]
        if twice:
            raise ConfigError(
                f"validation: got {len(twice)} rows with inputs and targets of training data (first: row "
                f"{twice[0]}), expected none"
            )
        return
    shared = sorted(set(rows.ids()) & set(held.ids()))
    if shared:
        shown = ", ".join(map(repr, shared[:3])) + (", ..." if len(shared) > 3 else "")
        raise ConfigError(
            f"validation: got {len(shared)} samples that are training data too ({shown}), expected none"
        )


def _of_arrays(name: str, x: Any, y: Any, weights: Any = None) -> Rows:
    inputs, targets = _floats(f"{name}[0]", x), np.asarray(y)
    if inputs.ndim != 2:
        raise ShapeError(f"{name}[0]: got shape {inputs.shape}, expected (n, in_features)")
    if targets.dtype.kind in "iu" and targets.ndim == 1:
        targets = np.ascontiguousarray(targets, np.int64)
    else:
        targets = _floats(f"{name}[1]", y)
        if targets.ndim != 2:
            raise ShapeError(
                f"{name}[1]: got shape {targets.shape}, expected (n, out_features) or labels (n,)"
            )
    given = None if weights is None else _floats(f"{name}[2]", weights)
    for i, array in ((1, targets), (2, given)):
        if array is not None and array.shape[0] != len(inputs):
            raise ShapeError(f"{name}[{i}]: got {array.shape[0]} rows, expected {len(inputs)} as in x")
    n = len(inputs)
    return Rows(
        inputs, targets, given, None, lambda: [str(i) for i in range(n)], np.arange(n), permutation(n),
        _digest([inputs, targets, given]), None, False,
    )  # fmt: skip


def _of_dataset(dataset: Any, threshold: float) -> Rows:
    names = [m for m in dataset.modules if m is not None]
    if not dataset.has_arrays or len(dataset.modules) > 1:
        ids = dataset.texts("id")
        events = [of_sample(sample) for sample in dataset]
        return _of_samples(events, ids, threshold, dataset.order)
    x, y, weights = dataset.arrays()
    parts = imitation_weights(dataset.columns.quality[dataset.rows], threshold)
    total = (weights * parts).astype(np.float32)
    return Rows(
        x, y, None if (total == 1.0).all() else total, None, lambda: dataset.texts("id"),
        np.flatnonzero(parts > 0.0), dataset.order, _digest([x, y, total]), names[0] if names else None,
    )  # fmt: skip


def _of_samples(
    events: list[InEvent],
    ids: list[str],
    threshold: float,
    shuffled: Callable[[int, int], Order] | None = None,
) -> Rows:
    weights = [event_weight(e.quality, e.weight, e.feedback, threshold) for e in events]
    weighed = tuple(e._replace(weight=w, quality=None) for e, w in zip(events, weights, strict=True))
    kept = np.flatnonzero(np.asarray(weights) > 0.0)
    places = [name or str(row) for row, name in enumerate(ids)]
    digest = hashlib.sha256()
    for event in weighed:
        kind, values = event.feedback.__reduce__()
        digest.update(np.asarray(event.x, np.float32).tobytes())
        digest.update(f"{kind.__name__};{event.module};{event.weight};".encode())
        for value in values:
            digest.update(np.asarray(value).tobytes() if not isinstance(value, str) else value.encode())
    order = permutation(len(events)) if shuffled is None else shuffled
    named = all(ids)
    return Rows(None, None, None, weighed, lambda: places, kept, order, digest.hexdigest(), None, named)


def _parts(event: InEvent) -> tuple[bytes, bytes]:
    """Input and outcome of a sample as bytes; a plain target's are those of a row of arrays."""
    x = np.asarray(event.x, np.float32).tobytes()
    if isinstance(event.feedback, Target) and event.feedback.loss == "mse":
        return x, np.asarray(event.feedback.t, np.float32).tobytes()
    kind, values = event.feedback.__reduce__()
    texts = [v.encode() if isinstance(v, str) else np.asarray(v).tobytes() for v in values]
    return x, kind.__name__.encode() + b";".join(texts)


def _row_digest(x: bytes, y: bytes) -> bytes:
    return hashlib.blake2b(len(x).to_bytes(8, "little") + x + y, digest_size=16).digest()


def _floats(name: str, value: Any) -> Array:
    array = np.asarray(value)
    if array.dtype.kind != "f":
        raise DTypeError(f"{name}: got dtype {array.dtype}, expected floating point")
    out = np.ascontiguousarray(array, np.float32)
    flat = out.reshape(-1)
    # The sum of squares of finite numbers may overflow too, so it only ever spares the long look.
    with np.errstate(over="ignore", invalid="ignore"):
        squares = np.dot(flat, flat)
    if not np.isfinite(squares) and not np.isfinite(out).all():
        row = int(np.argwhere(~np.isfinite(out))[0][0])
        raise NonFiniteError(f"{name}: got NaN or infinity in row {row}, expected finite numbers")
    return out


def _digest(arrays: list[Array | None]) -> str:
    digest = hashlib.sha256()
    for array in arrays:
        if array is None:
            digest.update(b"none;")
            continue
        digest.update(f"{array.dtype.str}{array.shape};".encode())
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()
