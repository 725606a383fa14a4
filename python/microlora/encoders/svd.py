"""The leading right singular vectors of a sparse matrix."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from microlora.encoders.sparse import Csr

__all__ = ["right_singular_vectors"]

_BLOCK = 4096  # rows turned to float64 at a time


def right_singular_vectors(
    matrix: Csr, k: int, power: int, oversample: int, seed: int, step: Callable[[int], None]
) -> npt.NDArray[np.float32]:
    """The k leading right singular vectors of ``matrix`` by a randomized SVD.

    Halko, Martinsson & Tropp, "Finding structure with randomness" (2011), algorithms 4.4 and 5.1, with the
    final small problem solved through its Gram matrix in float64.

    Args:
        matrix: (n, m).
        k: vectors wanted.
        power: power iterations, each a product with the transpose and with the matrix, orthonormalised after.
        oversample: extra random directions.
        seed: of the random directions.
        step: called with 0, 1, ... before each of the 2 * power + 2 products; may raise to stop.

    Returns:
        float32 (m, k), orthonormal columns, the sign of each such that its largest entry is positive; those
        beyond the rank of the matrix are zero.
    """
    n, m = matrix.shape
    size = min(k + oversample, n, m)
    flipped = matrix.transpose()
    rng = np.random.default_rng(seed)
    done = 0

    def product(by: Csr, dense: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        nonlocal done
        step(done)
        done += 1
        return by.dot(dense)

    basis = product(matrix, rng.standard_normal((m, size), np.float32))
    for _ in range(power):
        basis = product(matrix, product(flipped, np.linalg.qr(basis).Q))
    small = product(flipped, np.linalg.qr(basis).Q)  # (m, size): matrix^T Q
    gram = np.zeros((size, size))
    for lo in range(0, m, _BLOCK):
        part = small[lo : lo + _BLOCK].astype(np.float64)
        gram += part.T @ part
    squares, vectors = np.linalg.eigh(gram)
    squares, vectors = squares[::-1][:k], vectors[:, ::-1][:, :k]
    real = squares > 1e-9 * max(float(squares[0]), np.finfo(np.float64).tiny)
    weights = np.where(real, vectors / np.sqrt(np.where(real, squares, 1.0)), 0.0)
    out = np.zeros((m, k), np.float32)
    out[:, : weights.shape[1]] = small @ weights.astype(np.float32)
    signs = np.sign(out[np.abs(out).argmax(axis=0), np.arange(k)])
    out *= np.where(signs == 0, 1, signs).astype(np.float32)
    return out
