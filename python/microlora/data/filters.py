"""What keeps bad samples out: each filter says of every sample why it must go, or nothing.

A filter is a class with a ``name`` and ``check``; the ones here are listed in `FILTERS`. All are idempotent:
what one has let through it lets through again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol, runtime_checkable

import numpy as np

from microlora._checks import choice, integer, real, wrong
from microlora.data.hashing import array_digest, text_digest
from microlora.data.near import near_texts, near_vectors
from microlora.data.sample import TrainingSample
from microlora.exceptions import ConfigError

__all__ = [
    "FILTERS", "Duplicates", "Length", "NearDuplicateEmbeddings", "NearDuplicates", "QualityFilter", "Score",
]  # fmt: skip


@runtime_checkable
class QualityFilter(Protocol):
    """Anything with these two can stand in a manager's ``filters``."""

    @property
    def name(self) -> str:
        """Its name in reports."""

    def check(self, samples: Sequence[TrainingSample]) -> list[str | None]:
        """For each sample why it is dropped, in a few words that reports count by, or None to keep it."""


@dataclass(frozen=True)
class Duplicates:
    """Drops a sample whose contents an earlier one had.

    Texts are compared by the SHA-256 of query and response without case, width and white space; embeddings by
    a digest of the input, rounded.

    Attributes:
        of: ``"text"``, ``"embedding"``, or ``"both"``: samples are the same where all that they have is.
        decimals: Digits after the point that an embedding is rounded to.
    """

    of: str = "both"
    decimals: int = 5
    name: ClassVar[str] = "duplicates"

    def __post_init__(self) -> None:
        choice("duplicates: of", self.of, ("text", "embedding", "both"))
        integer("duplicates: decimals", self.decimals, 0, 12)

    def check(self, samples: Sequence[TrainingSample]) -> list[str | None]:
        """``"same text"``, ``"same embedding"`` or ``"same text and embedding"`` for a repetition."""
        seen: set[tuple[bytes | None, str | None]] = set()
        out: list[str | None] = []
        for sample in samples:
            text = vector = None
            if self.of != "embedding" and sample.query is not None:
                text = text_digest(sample.query, sample.response)
            if self.of != "text" and sample.input_embedding is not None:
                rounded = np.round(sample.input_embedding.astype(np.float64), self.decimals) + 0.0
                vector = array_digest([rounded], 16)
            key = (text, vector)
            parts = [word for word, part in (("text", text), ("embedding", vector)) if part is not None]
            out.append(f"same {' and '.join(parts)}" if parts and key in seen else None)
            seen.add(key)
        return out


@dataclass(frozen=True)
class NearDuplicates:
    """Drops a sample whose text is nearly one that was kept before.

    Candidates come from MinHash signatures in bands (Broder 1997; 64 hashes, 16 bands of 4); each is then
    compared by the exact Jaccard index of the two sets of character 5-grams, so nothing is dropped by chance.
    A pair with an index of 0.7 is missed once in about 80 times, one with 0.8 once in about 4,600.

    Variations of one original are not compared with it or with each other: being near is their purpose.

    Attributes:
        threshold: Jaccard index from which two texts are nearly the same, above 0 up to 1.
    """

    threshold: float = 0.8
    name: ClassVar[str] = "near_duplicates"

    def __post_init__(self) -> None:
        _share("near_duplicates: threshold", self.threshold)

    def check(self, samples: Sequence[TrainingSample]) -> list[str | None]:
        """``"nearly the same text"``, for samples with a query."""
        texts = [None if s.query is None else f"{s.query} {s.response or ''}" for s in samples]
        near = near_texts(texts, [s.root_id for s in samples], self.threshold)
        return ["nearly the same text" if hit else None for hit in near]


@dataclass(frozen=True)
class NearDuplicateEmbeddings:
    """Drops a sample whose input embedding is nearly one that was kept before.

    Candidates come from SimHash signatures in bands (Charikar 2002; 128 signs, 16 bands of 8); each is then
    compared by its exact cosine. A pair with a cosine of 0.99 is missed less than once in 10^7 times.
    Variations of one original are not compared with it or with each other.

    Attributes:
        threshold: Cosine from which two embeddings are nearly the same, above 0 up to 1.
    """

    threshold: float = 0.99
    name: ClassVar[str] = "near_duplicate_embeddings"

    def __post_init__(self) -> None:
        _share("near_duplicate_embeddings: threshold", self.threshold)

    def check(self, samples: Sequence[TrainingSample]) -> list[str | None]:
        """``"nearly the same embedding"``, for samples with an input embedding."""
        vectors = [s.input_embedding for s in samples]
        near = near_vectors(vectors, [s.root_id for s in samples], self.threshold)
        return ["nearly the same embedding" if hit else None for hit in near]


@dataclass(frozen=True)
class Length:
    """Drops a sample with a text that is too short or too long; texts that are not there are not judged.

    Attributes:
        min_words: Fewest words, split at white space.
        max_words: Most words.
        max_chars: Most characters.
        field: ``"query"``, ``"response"`` or ``"both"``.
    """

    min_words: int = 1
    max_words: int = 4096
    max_chars: int = 65_536
    field: str = "both"
    name: ClassVar[str] = "length"

    def __post_init__(self) -> None:
        integer("length: min_words", self.min_words, 0, 2**31 - 1)
        integer("length: max_words", self.max_words, self.min_words, 2**31 - 1)
        integer("length: max_chars", self.max_chars, 1, 2**31 - 1)
        choice("length: field", self.field, ("query", "response", "both"))

    def check(self, samples: Sequence[TrainingSample]) -> list[str | None]:
        """``"query too short"`` and its like."""
        return [self._why(sample) for sample in samples]

    def _why(self, sample: TrainingSample) -> str | None:
        for field in ("query", "response"):
            text = getattr(sample, field)
            if text is None or self.field not in (field, "both"):
                continue
            words = len(text.split())
            if words < self.min_words:
                return f"{field} too short"
            if words > self.max_words or len(text) > self.max_chars:
                return f"{field} too long"
        return None


@dataclass(frozen=True)
class Score:
    """Drops a sample whose score is too low.

    Attributes:
        minimum: Lowest score that is kept.
        of: What gives the score of a sample; None takes its quality.
    """

    minimum: float = 0.5
    of: Callable[[TrainingSample], float] | None = None
    name: ClassVar[str] = "score"

    def __post_init__(self) -> None:
        real("score: minimum", self.minimum, "a number")
        if self.of is not None and not callable(self.of):
            raise wrong("score: of", self.of, "a function of a sample, or None")

    def check(self, samples: Sequence[TrainingSample]) -> list[str | None]:
        """``"score too low"``; a score that is no number raises ConfigError with the sample's id."""
        out: list[str | None] = []
        for sample in samples:
            score = sample.quality if self.of is None else self.of(sample)
            number = real(f"sample {sample.id!r}: score", score, "a finite number")
            out.append("score too low" if number < self.minimum else None)
        return out


FILTERS: dict[str, type[QualityFilter]] = {
    kind.name: kind for kind in (Duplicates, NearDuplicates, NearDuplicateEmbeddings, Length, Score)
}
"""Every filter of this package by name."""


def run(filter_: QualityFilter, samples: Sequence[TrainingSample]) -> list[str | None]:
    """What a filter says, held to its contract."""
    reasons = filter_.check(samples)
    if len(reasons) != len(samples):
        raise ConfigError(f"filter {filter_.name!r}: gave {len(reasons)} answers for {len(samples)} samples")
    return reasons


def _share(name: str, value: object) -> None:
    want = "a number above 0, at most 1"
    if not 0.0 < real(name, value, want) <= 1.0:
        raise wrong(name, value, want)
