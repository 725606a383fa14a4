"""How well queries find their documents."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from microlora.exceptions import ConfigError, NonFiniteError, ShapeError

__all__ = ["best_hits", "mrr", "ranks_of"]

_BLOCK = 512


def _unit(vectors: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    return np.asarray(vectors / np.maximum(lengths, np.finfo(np.float32).tiny), np.float32)


def ranks_of(
    queries: npt.NDArray[np.float32], documents: npt.NDArray[np.float32], gold: npt.NDArray[np.int64]
) -> npt.NDArray[np.int64]:
    """Place of each query's own document among all, 0 the best, by cosine.

    Equals count against the query, so that a query of zeros, to which all documents are alike, comes last.

    Args:
        queries: (n, d), of any length each.
        documents: (m, d), rows of length 1: every one is a candidate for every query.
        gold: (n,), the row of each query's document.

    Returns:
        int64 (n,), from 0 to m - 1.

    Raises:
        ShapeError: the shapes do not fit.
        NonFiniteError: NaN or infinity in ``queries``.
    """
    if queries.ndim != 2 or documents.ndim != 2 or queries.shape[1] != documents.shape[1]:
        raise ShapeError(f"queries {queries.shape} and documents {documents.shape} differ in width")
    if gold.shape != (len(queries),):
        raise ShapeError(f"gold has shape {gold.shape}; wanted {(len(queries),)}")
    if not np.isfinite(queries).all():
        raise NonFiniteError("queries hold NaN or infinity")
    out = np.empty(len(queries), np.int64)
    unit = _unit(queries)
    for lo in range(0, len(queries), _BLOCK):
        scores = unit[lo : lo + _BLOCK] @ documents.T
        mine = scores[np.arange(len(scores)), gold[lo : lo + _BLOCK]]
        out[lo : lo + _BLOCK] = (scores >= mine[:, None]).sum(axis=1) - 1
    return out


def mrr(ranks: npt.NDArray[np.int64], at: int = 10) -> float:
    """Mean reciprocal rank, 0 for what lies beyond the first ``at`` places.

    Raises:
        ConfigError: no ranks, or ``at`` below 1.
    """
    if at < 1 or not len(ranks):
        raise ConfigError(f"mrr of {len(ranks)} ranks at {at}; at least one of each is wanted")
    return float(np.where(ranks < at, 1.0 / (ranks + 1.0), 0.0).mean())


def best_hits(
    query: npt.NDArray[np.float32], documents: npt.NDArray[np.float32], n: int
) -> list[tuple[int, float]]:
    """The n best documents for one query (d,), as (row, cosine), best first, equals by row."""
    scores = documents @ _unit(query[None, :])[0]
    order = np.argsort(-scores, kind="stable")[:n]
    return [(int(i), float(scores[i])) for i in order]
