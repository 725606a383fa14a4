"""Made-up relatives of real samples: each variation makes copies of a sample with another text or vector.

A variation is a class with a ``name``, ``copies``, whether it ``changes_text``, and ``make``; the ones here
are listed in `VARIATIONS`. A copy keeps the target, and carries the id of its original as ``parent_id``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol, runtime_checkable

import numpy as np

from microlora._checks import integer, real, texts, wrong
from microlora.data.hashing import hash64
from microlora.data.sample import TrainingSample
from microlora.exceptions import ConfigError

__all__ = [
    "VARIATIONS", "CharacterNoise", "EmbeddingNoise", "TemplateParaphrase", "Variation", "WordDropout",
    "vary",
]  # fmt: skip

TEMPLATES = (
    "please {query}",
    "could you {query}",
    "i need this: {query}",
    "{query}, please",
    "help me with this: {query}",
    "question: {query}",
)
MAX_COPIES = 1000


@runtime_checkable
class Variation(Protocol):
    """Anything with these can stand in a manager's ``variations``."""

    @property
    def name(self) -> str:
        """Its name in reports and in the ids of copies."""

    @property
    def copies(self) -> int:
        """How many copies of each sample it makes."""

    @property
    def changes_text(self) -> bool:
        """Whether the query changes, so that an embedding made of it no longer fits."""

    def make(self, sample: TrainingSample, copy: int, rng: np.random.Generator) -> TrainingSample | str:
        """Copy number ``copy`` of a sample, or why there is none, in a few words that reports count by."""


@dataclass(frozen=True)
class TemplateParaphrase:
    """Puts the query into other sentences.

    Attributes:
        templates: Sentences with ``{query}`` in them; every copy of a sample gets another one.
        copies: Copies of each sample, at most the number of templates.
    """

    templates: tuple[str, ...] = TEMPLATES
    copies: int = 1
    name: ClassVar[str] = "template_paraphrase"
    changes_text: ClassVar[bool] = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "templates", texts("template_paraphrase: templates", self.templates))
        for item in self.templates:
            if "{query}" not in item:
                raise ConfigError(f"template_paraphrase: templates: got {item!r}, expected {{query}} in it")
        integer("template_paraphrase: copies", self.copies, 1, len(self.templates))

    def make(self, sample: TrainingSample, copy: int, rng: np.random.Generator) -> TrainingSample | str:
        """The query in a template."""
        if not (sample.query or "").strip():
            return "no text"
        order = np.random.Generator(np.random.PCG64(hash64(sample.id))).permutation(len(self.templates))
        return sample.replace(query=self.templates[order[copy]].replace("{query}", sample.query or ""))


@dataclass(frozen=True)
class CharacterNoise:
    """Makes typing errors: a letter is left out, doubled, or swapped with the next one.

    Attributes:
        rate: Share of the letters, above 0 up to 1.
        copies: Copies of each sample.
    """

    rate: float = 0.03
    copies: int = 1
    name: ClassVar[str] = "character_noise"
    changes_text: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _rate("character_noise: rate", self.rate)
        integer("character_noise: copies", self.copies, 1, MAX_COPIES)

    def make(self, sample: TrainingSample, copy: int, rng: np.random.Generator) -> TrainingSample | str:
        """The query with errors."""
        query = sample.query or ""
        if not any(map(str.isalpha, query)):
            return "no text"
        out, at = [], 0
        while at < len(query):
            letter = query[at]
            if letter.isalpha() and rng.random() < self.rate:
                kind = int(rng.integers(3))
                if kind == 0 and at + 1 < len(query):
                    out += [query[at + 1], letter]
                    at += 1
                elif kind == 1:
                    out += [letter, letter]
            else:
                out.append(letter)
            at += 1
        return _changed(sample, "".join(out))


@dataclass(frozen=True)
class WordDropout:
    """Leaves words out of the query; one at least stays.

    Attributes:
        rate: Share of the words, above 0 up to 1.
        copies: Copies of each sample.
    """

    rate: float = 0.15
    copies: int = 1
    name: ClassVar[str] = "word_dropout"
    changes_text: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _rate("word_dropout: rate", self.rate)
        integer("word_dropout: copies", self.copies, 1, MAX_COPIES)

    def make(self, sample: TrainingSample, copy: int, rng: np.random.Generator) -> TrainingSample | str:
        """The query with fewer words."""
        words = (sample.query or "").split()
        if len(words) < 2:
            return "fewer than two words"
        keep = rng.random(len(words)) >= self.rate
        if not keep.any():
            keep[int(rng.integers(len(words)))] = True
        if keep.all():
            return "unchanged"
        return _changed(sample, " ".join(word for word, stays in zip(words, keep, strict=True) if stays))


@dataclass(frozen=True)
class EmbeddingNoise:
    """Adds normal noise to the input embedding.

    Attributes:
        sigma: Length of the noise, on average, as a share of the length of the embedding, above 0 up to 1.
        copies: Copies of each sample.
    """

    sigma: float = 0.05
    copies: int = 1
    name: ClassVar[str] = "embedding_noise"
    changes_text: ClassVar[bool] = False

    def __post_init__(self) -> None:
        _rate("embedding_noise: sigma", self.sigma)
        integer("embedding_noise: copies", self.copies, 1, MAX_COPIES)

    def make(self, sample: TrainingSample, copy: int, rng: np.random.Generator) -> TrainingSample | str:
        """The embedding with noise."""
        if sample.input_embedding is None:
            return "no embedding"
        x = sample.input_embedding.astype(np.float64)
        scale = self.sigma * np.sqrt((x @ x) / len(x))
        if not scale > 0.0:
            return "zero embedding"
        return sample.replace(input_embedding=x + scale * rng.standard_normal(len(x)))


VARIATIONS: dict[str, type[Variation]] = {
    kind.name: kind for kind in (TemplateParaphrase, CharacterNoise, WordDropout, EmbeddingNoise)
}
"""Every variation of this package by name."""


def vary(
    variation: Variation, samples: Sequence[TrainingSample], seed: int
) -> tuple[list[TrainingSample], dict[str, int]]:
    """All copies that a variation makes, and how many it did not make for which reason.

    What is drawn for a copy depends on the seed, the variation, the sample's id and the copy's number alone.
    """
    made: list[TrainingSample] = []
    reasons: dict[str, int] = {}
    for sample in samples:
        for copy in range(variation.copies):
            key = hash64(f"{variation.name}/{copy}/{sample.id}")
            rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, key])))
            got = variation.make(sample, copy, rng)
            if isinstance(got, str):
                reasons[got] = reasons.get(got, 0) + 1
                continue
            changes: dict[str, object] = {
                "id": f"{sample.id}~{variation.name}-{copy}",
                "parent_id": sample.root_id,
            }
            if variation.changes_text:
                changes["input_embedding"] = None  # it was made of the old text
            made.append(got.replace(**changes))
    return made, reasons


def _changed(sample: TrainingSample, query: str) -> TrainingSample | str:
    return "unchanged" if query == sample.query else sample.replace(query=query)


def _rate(name: str, value: object) -> None:
    want = "a number above 0, at most 1"
    if not 0.0 < real(name, value, want) <= 1.0:
        raise wrong(name, value, want)
