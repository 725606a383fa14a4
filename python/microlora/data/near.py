"""Nearly equal texts and vectors, found through bands of hashes and then measured exactly."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from microlora.data.arrays import Floats
from microlora.data.hashing import normalise

__all__ = ["jaccard", "near_texts", "near_vectors", "shingles"]

SHINGLE = 5
HASHES, BANDS = 64, 16
SIGNS, SIGN_BANDS = 128, 16

Words = npt.NDArray[np.uint64]


def shingles(text: str) -> Words:
    """Sorted different hashes of the character 5-grams of a normalised text; a short text is one of them."""
    raw = normalise(text)
    grams = {raw[i : i + SHINGLE] for i in range(max(1, len(raw) - SHINGLE + 1))}
    return np.unique(np.array([_mix(gram) for gram in grams], np.uint64))


def _mix(gram: str) -> int:
    data = gram.encode("utf-8", "surrogatepass")
    return zlib.crc32(data) << 32 | zlib.adler32(data)


def jaccard(a: Words, b: Words) -> float:
    """Size of the intersection over that of the union."""
    both = len(np.intersect1d(a, b, assume_unique=True))
    return both / (len(a) + len(b) - both)


def near_texts(texts: Sequence[str | None], families: Sequence[str], threshold: float) -> list[bool]:
    """Which texts are near to an earlier one that is not, families apart."""
    rng = np.random.Generator(np.random.PCG64(0))
    odd = rng.integers(0, 2**63, (HASHES, 1), np.uint64) * np.uint64(2) + np.uint64(1)
    add = rng.integers(0, 2**63, (HASHES, 1), np.uint64)
    sets = [None if text is None else shingles(text) for text in texts]
    keys: list[list[bytes] | None] = []
    for words in sets:
        if words is None:
            keys.append(None)
            continue
        mixed = words[None, :] * odd + add  # modulo 2^64
        mixed ^= mixed >> np.uint64(29)
        mixed *= np.uint64(0xBF58476D1CE4E5B9)
        least = (mixed >> np.uint64(16)).min(axis=1).reshape(BANDS, -1)
        keys.append([band.tobytes() for band in least])

    def near(i: int, j: int) -> bool:
        a, b = sets[i], sets[j]
        return a is not None and b is not None and jaccard(a, b) >= threshold

    return _greedy(keys, families, near)


def near_vectors(vectors: Sequence[Floats | None], families: Sequence[str], threshold: float) -> list[bool]:
    """Which vectors are near, by their cosine, to an earlier one of the same width that is not."""
    planes: dict[int, npt.NDArray[np.float64]] = {}
    unit: list[npt.NDArray[np.float64] | None] = []
    keys: list[list[bytes] | None] = []
    for vector in vectors:
        length = 0.0 if vector is None else float(np.linalg.norm(vector.astype(np.float64)))
        if vector is None or length == 0.0:
            unit.append(None)
            keys.append(None)
            continue
        d = len(vector)
        if d not in planes:
            planes[d] = np.random.Generator(np.random.PCG64(d)).standard_normal((SIGNS, d))
        unit.append(vector.astype(np.float64) / length)
        signs = np.packbits(planes[d] @ vector > 0).reshape(SIGN_BANDS, -1)
        keys.append([band.tobytes() for band in signs])

    def near(i: int, j: int) -> bool:
        a, b = unit[i], unit[j]
        # The rounding of a vector's product with itself must not save it at a threshold of 1.
        return a is not None and b is not None and a.shape == b.shape and float(a @ b) >= threshold - 1e-12

    return _greedy(keys, families, near)


def _greedy(
    keys: Sequence[list[bytes] | None], families: Sequence[str], near: Callable[[int, int], bool]
) -> list[bool]:
    """Goes from first to last; one is dropped if it is near to a kept one of another family."""
    buckets: dict[tuple[int, bytes], list[int]] = {}
    out = []
    for row, bands in enumerate(keys):
        if bands is None:
            out.append(False)
            continue
        found = {other for band in enumerate(bands) for other in buckets.get(band, ())}
        hit = any(families[other] != families[row] and near(row, other) for other in sorted(found))
        out.append(hit)
        if not hit:
            for band in enumerate(bands):
                buckets.setdefault(band, []).append(row)
    return out
