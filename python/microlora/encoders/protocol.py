"""What the rest of the package asks of an encoder of text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from microlora.exceptions import ConfigError, NonFiniteError, ShapeError

__all__ = ["TextEncoder", "encode_checked"]


@runtime_checkable
class TextEncoder(Protocol):
    """Turns texts into vectors whose dot product is their likeness.

    Anything with these three attributes will do; no base class is needed.
    """

    @property
    def name(self) -> str:
        """A short name, shown beside results."""

    @property
    def dim(self) -> int:
        """Length of each vector."""

    def encode(self, texts: Sequence[str], /) -> npt.NDArray[np.float32]:
        """Vectors of ``texts``, float32 (len(texts), dim), each of Euclidean length 1."""


def encode_checked(encoder: TextEncoder, texts: Sequence[str]) -> npt.NDArray[np.float32]:
    """Encode with an encoder that is not ours, and hold it to its contract.

    Returns:
        float32 (len(texts), encoder.dim), C-contiguous, rows scaled to length 1 (rows of zeros stay so).

    Raises:
        ConfigError: the encoder gave something that is no array of numbers.
        ShapeError: not one row of ``dim`` numbers for each text.
        NonFiniteError: NaN or infinity.
    """
    given: Any = encoder.encode(texts)
    try:
        vectors = np.array(given, np.float32, order="C")
    except (TypeError, ValueError) as err:
        raise ConfigError(
            f"encoder {encoder.name!r} gave {type(given).__name__}; a float32 array is wanted"
        ) from err
    wanted = (len(texts), encoder.dim)
    if vectors.shape != wanted:
        raise ShapeError(f"encoder {encoder.name!r} gave shape {vectors.shape}; wanted {wanted}")
    if not np.isfinite(vectors).all():
        raise NonFiniteError(f"encoder {encoder.name!r} gave NaN or infinity")
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    vectors /= np.maximum(lengths, np.finfo(np.float32).tiny)
    return vectors
