"""Feedback in columns: one row of numbers for each sample, so that it can be stored and mapped."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from microlora._core import Contrastive, FeedbackBase, Gradient, Preference, Reward, Target
from microlora.data.arrays import Floats, Integers, frozen
from microlora.exceptions import FormatError, ShapeError

__all__ = ["KINDS", "FeedbackColumn"]

Scalars = tuple[float, float]
Vectors = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Kind:
    """How one kind of feedback becomes two numbers and some rows of vectors, and back."""

    name: str
    matches: Callable[[Any], bool]
    scalars: Callable[[Any], Scalars]
    vectors: Callable[[Any], Vectors]
    make: Callable[[Scalars, Vectors], FeedbackBase]


def _rows(*parts: Any) -> Vectors:
    return np.vstack([np.asarray(part, np.float32).reshape(-1, np.shape(part)[-1]) for part in parts])


def _target(loss: str) -> Kind:
    return Kind(
        f"target_{loss}",
        lambda f: isinstance(f, Target) and f.loss == loss,
        lambda f: (0.0, 0.0),
        lambda f: _rows(f.t),
        lambda s, v: Target(v[0], loss=loss),
    )


# The place in this table is what files hold: new kinds go to the end.
KINDS: tuple[Kind, ...] = (
    _target("mse"),
    _target("cosine"),
    Kind(
        "gradient",
        lambda f: isinstance(f, Gradient),
        lambda f: (0.0, 0.0),
        lambda f: _rows(f.g),
        lambda s, v: Gradient(v[0]),
    ),
    Kind(
        "reward",
        lambda f: isinstance(f, Reward),
        lambda f: (f.r, 0.0),
        lambda f: _rows(f.response),
        lambda s, v: Reward(s[0], v[0]),
    ),
    Kind(
        "preference",
        lambda f: isinstance(f, Preference),
        lambda f: (f.p, f.beta),
        lambda f: _rows(f.chosen, f.rejected),
        lambda s, v: Preference(v[0], v[1], p=s[0], beta=s[1]),
    ),
    Kind(
        "contrastive",
        lambda f: isinstance(f, Contrastive),
        lambda f: (f.tau, 0.0),
        lambda f: _rows(f.positive, f.negatives),
        lambda s, v: Contrastive(v[0], v[1:], tau=s[0]),
    ),
)
MSE = 0


@dataclass(frozen=True, eq=False)
class FeedbackColumn:
    """Feedback of n samples.

    Attributes:
        kinds: uint8 (n,), places in `KINDS`.
        scalars: float64 (n, 2), what the kind keeps beside its vectors.
        offsets: int64 (n + 1,): the vectors of sample i are rows ``offsets[i]`` to ``offsets[i + 1]``.
        vectors: float32 (m, out_features).
    """

    kinds: npt.NDArray[np.uint8]
    scalars: npt.NDArray[np.float64]
    offsets: Integers
    vectors: Floats

    @classmethod
    def of(cls, feedback: Sequence[FeedbackBase], names: Sequence[str]) -> FeedbackColumn:
        """Columns of feedback; ``names`` are the samples' ids, for messages.

        Raises:
            ShapeError: widths differ.
        """
        kinds = np.zeros(len(feedback), np.uint8)
        scalars = np.zeros((len(feedback), 2))
        offsets = np.zeros(len(feedback) + 1, np.int64)
        vectors: list[Vectors] = []
        for row, item in enumerate(feedback):
            place = next(i for i, kind in enumerate(KINDS) if kind.matches(item))
            if item.width != feedback[0].width:
                raise ShapeError(
                    f"sample {names[row]!r}: feedback: got width {item.width}, expected "
                    f"{feedback[0].width} as in sample {names[0]!r}"
                )
            kinds[row], scalars[row] = place, KINDS[place].scalars(item)
            vectors.append(KINDS[place].vectors(item))
            offsets[row + 1] = offsets[row] + len(vectors[-1])
        column = cls(kinds, scalars, offsets, np.vstack(vectors))
        for array in (kinds, scalars, offsets, column.vectors):
            frozen(array)
        return column

    def __len__(self) -> int:
        return len(self.kinds)

    @property
    def width(self) -> int:
        """Output features."""
        return int(self.vectors.shape[1])

    def row(self, row: int) -> FeedbackBase:
        """The feedback of one sample, equal to the one that came."""
        start, stop = int(self.offsets[row]), int(self.offsets[row + 1])
        a, b = self.scalars[row].tolist()
        return KINDS[int(self.kinds[row])].make((a, b), np.array(self.vectors[start:stop]))

    def take(self, rows: Integers) -> FeedbackColumn:
        """The columns of some samples, in the order of ``rows``."""
        starts, counts = self.offsets[rows], self.offsets[rows + 1] - self.offsets[rows]
        offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        within = np.arange(offsets[-1]) - np.repeat(offsets[:-1], counts)
        vectors = self.vectors[np.repeat(starts, counts) + within]
        return FeedbackColumn(self.kinds[rows], self.scalars[rows], offsets, vectors)

    @classmethod
    def concat(cls, parts: Sequence[FeedbackColumn]) -> FeedbackColumn:
        """Several columns of one width, one after the other."""
        ends = np.cumsum([0] + [int(part.offsets[-1]) for part in parts])
        offsets = [part.offsets[1:] + end for part, end in zip(parts, ends, strict=False)]
        return cls(
            np.concatenate([part.kinds for part in parts]),
            np.concatenate([part.scalars for part in parts]),
            np.concatenate([np.zeros(1, np.int64), *offsets]),
            np.concatenate([part.vectors for part in parts]),
        )

    def all_targets(self, rows: Integers) -> bool:
        """Whether all of the rows are targets with the squared loss."""
        return not (self.kinds[rows] != MSE).any()

    def targets(self, rows: Integers | slice) -> Floats:
        """float32 (rows, out_features) of rows that are all targets."""
        out: Floats = self.vectors[self.offsets[:-1][rows]]
        return out

    def check(self, what: str) -> None:
        """Raise FormatError unless the four arrays belong together; ``what`` names their file."""
        n = len(self.kinds)
        steps = np.diff(self.offsets)
        if self.scalars.shape != (n, 2) or self.offsets.shape != (n + 1,):
            raise FormatError(f"{what}: feedback: columns of different lengths")
        if self.offsets[0] != 0 or self.offsets[-1] != len(self.vectors) or (steps < 1).any():
            raise FormatError(f"{what}: feedback_offsets: do not rise from 0 to {len(self.vectors)}")
        if n and int(self.kinds.max()) >= len(KINDS):
            top = int(self.kinds.max())
            raise FormatError(f"{what}: feedback_kinds: got {top}, known to {len(KINDS) - 1}")
        fixed = (self.kinds <= 3) & (steps != 1) | (self.kinds == 4) & (steps != 2)
        if (fixed | (self.kinds == 5) & (steps < 2)).any():
            raise FormatError(f"{what}: feedback_offsets: a feedback with a wrong number of vectors")
