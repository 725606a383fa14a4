"""A sparse matrix by rows and its product with a dense one, in NumPy alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["Csr"]

_BLOCK = 1 << 14  # stored entries gathered at a time: 25 MB of float32 at 400 dense columns


@dataclass(frozen=True, slots=True)
class Csr:
    """A float32 matrix in compressed sparse rows: row i holds entries ``indptr[i]:indptr[i + 1]``.

    Attributes:
        indptr: int64 (rows + 1,), not decreasing, from 0 to the number of stored entries.
        indices: int64 (entries,), the column of each entry, increasing within a row.
        data: float32 (entries,), the value of each entry.
        columns: number of columns.
    """

    indptr: npt.NDArray[np.int64]
    indices: npt.NDArray[np.int64]
    data: npt.NDArray[np.float32]
    columns: int

    @classmethod
    def from_triples(
        cls,
        rows: npt.NDArray[np.int64],
        cols: npt.NDArray[np.int64],
        values: npt.NDArray[Any],
        shape: tuple[int, int],
    ) -> Csr:
        """Build from (row, column, value) triples in any order; values of one cell are summed."""
        key = rows * shape[1] + cols
        cells, inverse = np.unique(key, return_inverse=True)
        data = np.bincount(inverse, weights=values, minlength=len(cells)).astype(np.float32)
        row_of, indices = np.divmod(cells, shape[1])
        indptr = np.zeros(shape[0] + 1, np.int64)
        np.cumsum(np.bincount(row_of, minlength=shape[0]), out=indptr[1:])
        return cls(indptr, indices.astype(np.int64), data, shape[1])

    @classmethod
    def stack(cls, parts: Sequence[Csr], columns: int) -> Csr:
        """The rows of ``parts``, each of ``columns`` columns, one part below the other."""
        sizes = [np.diff(part.indptr) for part in parts]
        indptr = np.concatenate([np.zeros(1, np.int64), *sizes])
        indices = np.concatenate([np.zeros(0, np.int64), *(part.indices for part in parts)])
        data = np.concatenate([np.zeros(0, np.float32), *(part.data for part in parts)])
        return cls(np.cumsum(indptr), indices, data, columns)

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, columns)."""
        return len(self.indptr) - 1, self.columns

    def row_of_entry(self) -> npt.NDArray[np.int64]:
        """The row of each stored entry, int64 (entries,)."""
        return np.repeat(np.arange(len(self.indptr) - 1), np.diff(self.indptr))

    def keep_columns(self, kept: npt.NDArray[np.int64]) -> Csr:
        """The matrix of the columns ``kept`` (increasing), renumbered from 0."""
        new = np.full(self.columns, -1, np.int64)
        new[kept] = np.arange(len(kept))
        cols = new[self.indices]
        held = cols >= 0
        counts = np.bincount(self.row_of_entry()[held], minlength=self.shape[0])
        indptr = np.concatenate(([0], np.cumsum(counts))).astype(np.int64)
        return Csr(indptr, cols[held], self.data[held], len(kept))

    def transpose(self) -> Csr:
        """The transposed matrix, again by rows."""
        order = np.argsort(self.indices, kind="stable")
        counts = np.bincount(self.indices, minlength=self.columns)
        indptr = np.concatenate(([0], np.cumsum(counts))).astype(np.int64)
        return Csr(indptr, self.row_of_entry()[order], self.data[order], self.shape[0])

    def normalized(self) -> Csr:
        """Rows scaled to Euclidean length 1; empty rows stay empty."""
        squares = np.bincount(
            self.row_of_entry(), weights=np.square(self.data, dtype=np.float64), minlength=self.shape[0]
        )
        lengths = np.sqrt(np.maximum(squares, np.finfo(np.float32).tiny))
        data = (self.data / np.repeat(lengths, np.diff(self.indptr))).astype(np.float32)
        return Csr(self.indptr, self.indices, data, self.columns)

    def dot(self, dense: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """The product with ``dense``, float32 (columns, k), as float32 (rows, k).

        Rows are taken in blocks, so that the gathered rows of ``dense`` stay near 25 MB; a row longer than
        a block is a block by itself.
        """
        out = np.zeros((self.shape[0], dense.shape[1]), np.float32)
        filled = np.flatnonzero(np.diff(self.indptr))
        starts, ends = self.indptr[filled], self.indptr[filled + 1]
        first = 0
        while first < len(filled):
            last = max(first + 1, int(np.searchsorted(ends, starts[first] + _BLOCK, side="right")))
            lo, hi = int(starts[first]), int(ends[last - 1])
            part = dense[self.indices[lo:hi]]
            part *= self.data[lo:hi, None]
            # reduceat gives an empty segment its next element, hence only rows that hold entries
            out[filled[first:last]] = np.add.reduceat(part, starts[first:last] - lo, axis=0)
            first = last
        return out
