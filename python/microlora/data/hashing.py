"""Stable hashes of texts, ids and arrays: the same on every machine and in every process."""

from __future__ import annotations

import hashlib
import unicodedata
from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["array_digest", "hash64", "normalise", "share", "text_digest"]


def normalise(text: str) -> str:
    """A text without differences that do not matter: NFKC, case folded, runs of white space made one blank.

    Punctuation stays, because ``a + b`` and ``a - b`` are two texts.
    """
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def text_digest(*texts: str | None) -> bytes:
    """SHA-256 of normalised texts; None and the empty text are told apart, and so are ``("ab",)`` and
    ``("a", "b")``.
    """  # noqa: D205
    digest = hashlib.sha256()
    for text in texts:
        raw = b"" if text is None else normalise(text).encode("utf-8", "surrogatepass")
        digest.update(b"-" if text is None else b"%d:" % len(raw))
        digest.update(raw)
    return digest.digest()


def hash64(key: str | bytes, seed: int = 0) -> int:
    """64 bits of BLAKE2b of a key under a seed."""
    raw = key.encode("utf-8", "surrogatepass") if isinstance(key, str) else key
    salt = seed.to_bytes(16, "little", signed=True)
    return int.from_bytes(hashlib.blake2b(raw, digest_size=8, salt=salt).digest(), "little")


def share(key: str, seed: int) -> float:
    """A key's place in [0, 1), uniform over keys and fixed for each: what a split by hash compares."""
    return (hash64(key, seed) >> 11) * 2.0**-53


def array_digest(arrays: Iterable[npt.NDArray[Any] | None], size: int = 8) -> str:
    """Hexadecimal BLAKE2b of the shapes, dtypes and bytes of arrays; None counts as a value of its own."""
    digest = hashlib.blake2b(digest_size=size)
    for array in arrays:
        if array is None:
            digest.update(b"none;")
            continue
        digest.update(f"{array.dtype.str}{array.shape};".encode())
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()
