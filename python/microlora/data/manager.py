"""From raw sources to a dataset, with every loss counted: `TrainingDataManager`."""

from __future__ import annotations

import math
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from microlora._checks import integer, real, text, texts, wrong
from microlora.data.columns import named
from microlora.data.dataset import AdapterDataset
from microlora.data.filters import QualityFilter, run
from microlora.data.report import PrepareReport, Stage
from microlora.data.sample import TrainingSample
from microlora.data.split import Keys, refuse_leaks
from microlora.data.variations import Variation, vary
from microlora.encoders.protocol import TextEncoder, encode_checked
from microlora.exceptions import ConfigError

__all__ = ["DataSource", "TrainingDataManager", "apportion"]

Samples = Iterable[TrainingSample]
_ENCODE = 256


@dataclass(frozen=True, eq=False)
class DataSource:
    """Samples from one place.

    Attributes:
        name: Its name in reports.
        samples: The samples, or a function that gives them when they are wanted.
        weight: Its part in the whole, in relation to the weights of the others, above 0; None takes the
            number of its samples, so that sources without weights are used up.
        domains: Fields of work it serves, for ``prepare(domain=)``; none means all.
    """

    name: str
    samples: Samples | Callable[[], Samples]
    weight: float | None = None
    domains: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "name", text("source: name", self.name, empty=False))
        if self.weight is not None:
            want = "a number above 0, or None"
            weight = real(f"source {self.name!r}: weight", self.weight, want)
            if weight <= 0.0:
                raise wrong(f"source {self.name!r}: weight", self.weight, want)
        object.__setattr__(self, "domains", texts(f"source {self.name!r}: domains", self.domains))

    def load(self) -> list[TrainingSample]:
        """Its samples as a list."""
        return list(self.samples() if callable(self.samples) else self.samples)


class TrainingDataManager:
    """Draws from sources, filters, holds out, makes variations, filters those, and reports all of it.

    Args:
        sources: Where samples come from; names differ.
        variations: What is made of each sample to train on, see `microlora.data.variations`.
        filters: What samples must pass, in this order, see `microlora.data.filters`.
        seed: 0 to 2^63 - 1: decides what is drawn, held out and varied.

    Raises:
        ConfigError: no source, a repeated name, or something of a wrong sort.

    Example:
        >>> from microlora.data import Duplicates
        >>> chat = [TrainingSample(query=f"how do I do thing number {i}?", label=i % 2) for i in range(40)]
        >>> manager = TrainingDataManager([DataSource("chat", chat)], filters=[Duplicates()])
        >>> dataset, report = manager.prepare(validation=0.25)
        >>> report.rows[1]["kind"], report.rows[1]["rows_in"], report.rows[1]["reasons"]
        ('filter', 40, {})
    """

    def __init__(
        self,
        sources: Sequence[DataSource],
        variations: Sequence[Variation] = (),
        filters: Sequence[QualityFilter] = (),
        seed: int = 0,
    ) -> None:
        self.sources = _all("sources", sources, DataSource)
        self.variations: tuple[Variation, ...] = _all("variations", variations, Variation)
        self.filters: tuple[QualityFilter, ...] = _all("filters", filters, QualityFilter)
        self.seed = integer("seed", seed, 0, 2**63 - 1)
        if not self.sources:
            raise ConfigError("sources: got none, expected one or more")
        for what, items in (("sources", self.sources), ("variations", self.variations)):
            again = [name for name, n in Counter(item.name for item in items).items() if n > 1]
            if again:
                raise ConfigError(f"{what}: {again[0]!r} appears twice, expected every name once")

    def prepare(
        self,
        count: int | None = None,
        *,
        validation: float | AdapterDataset | None = 0.2,
        by: str = "id",
        domain: str | None = None,
        encoder: TextEncoder | None = None,
    ) -> tuple[AdapterDataset, PrepareReport]:
        """Make a dataset.

        Samples are drawn from the sources in proportion to their weights, without repetition; filtered; and
        split by hash. Only then variations are made, of the part to train on alone, and pass the same
        filters with everything else before them, so that a variation never repeats a sample of either part.

        Args:
            count: Samples to draw in all, shared out exactly by largest remainders. None draws as many as the
                weights allow.
            validation: Share to hold out, a dataset that is held out, or None for nothing.
            by: What the split keeps together, as in `AdapterDataset.split`.
            domain: Draw only from sources that serve this domain, which one of them must name.
            encoder: Makes vectors of texts that have none, variations included.

        Returns:
            The dataset with its held-out part, and what became of every sample.

        Raises:
            ConfigError: no source names the domain, a source has too few samples, one id stands for two
                different samples, a part would be empty, or a text would be varied beside an embedding with
                no encoder to make a new one.
            ShapeError: mixed widths.
            LeakageError: a sample or a text on both sides.
        """
        stages: list[Stage] = []
        originals = self._draw(count, domain, stages)
        for item in self.filters:
            originals = _pass(item, originals, stages)
        if not originals:
            raise ConfigError("prepare: no sample passed the filters, expected some to train on")
        dataset, held = self._split(originals, validation, by, stages)
        train = list(dataset)
        made = self._vary(train, encoder is not None, stages)
        made = self._sift(held, train, made, stages)
        everything = AdapterDataset(_encoded([*train, *made], encoder))
        if held:
            everything = everything.with_validation(AdapterDataset(_encoded(held, encoder)))
        report = PrepareReport(tuple(stages), len(everything), len(held), len(made))
        return everything.with_metadata({"prepared": report.to_dict()}), report

    # -- stages --

    def _draw(self, count: int | None, domain: str | None, stages: list[Stage]) -> list[TrainingSample]:
        known = sorted({name for s in self.sources for name in s.domains})
        if domain is not None and domain not in known:
            raise wrong("domain", domain, f"one that a source names: {', '.join(known) or 'none does'}")
        sources = [s for s in self.sources if domain is None or not s.domains or domain in s.domains]
        loaded = [source.load() for source in sources]
        sizes = [len(samples) for samples in loaded]
        weights = [float(n) if s.weight is None else s.weight for s, n in zip(sources, sizes, strict=True)]
        if not sum(sizes):
            raise ConfigError("sources: got no samples, expected some")
        shares = _counts(count, weights, sizes, [source.name for source in sources])
        drawn: list[TrainingSample] = []
        for source, samples, n in zip(sources, loaded, shares, strict=True):
            rng = np.random.Generator(np.random.PCG64([self.seed, zlib.crc32(source.name.encode())]))
            rows = sorted(rng.permutation(len(samples))[:n].tolist())
            drawn += [samples[row] for row in rows]
            left = len(samples) - n
            reasons = {"not drawn": left} if left else {}
            stages.append(Stage("source", source.name, len(samples), n, reasons))
        return _named_once(drawn, stages)

    def _split(
        self,
        originals: list[TrainingSample],
        validation: float | AdapterDataset | None,
        by: str,
        stages: list[Stage],
    ) -> tuple[AdapterDataset, list[TrainingSample]]:
        dataset = AdapterDataset(originals)
        if validation is None:
            return dataset, []
        if isinstance(validation, AdapterDataset):
            refuse_leaks(dataset, validation)
            return dataset, list(validation)
        dataset = dataset.split(validation, by, self.seed)
        held = [] if dataset.validation is None else list(dataset.validation)
        stages.append(Stage("split", f"by {by}", len(originals), len(dataset), {"held out": len(held)}))
        return dataset.examples, held

    def _vary(self, train: list[TrainingSample], encodes: bool, stages: list[Stage]) -> list[TrainingSample]:
        made: list[TrainingSample] = []
        for variation in self.variations:
            if variation.changes_text and not encodes:
                for sample in train:
                    if sample.query is not None and sample.input_embedding is not None:
                        raise ConfigError(
                            f"encoder: got None, expected one: {variation.name} changes the text of sample "
                            f"{sample.id!r}, whose embedding was made of the old one"
                        )
            copies, reasons = vary(variation, train, self.seed)
            stages.append(Stage("variation", variation.name, len(train), len(copies), reasons))
            made += copies
        return made

    def _sift(
        self,
        held: list[TrainingSample],
        train: list[TrainingSample],
        made: list[TrainingSample],
        stages: list[Stage],
    ) -> list[TrainingSample]:
        """The variations that pass every filter with all that stands before them, and repeat no held text."""
        if not made:
            return made
        kind, before = "filter of variations", [*held, *train]
        for item in self.filters:
            reasons = run(item, [*before, *made])[len(before) :]
            made = _kept(kind, item.name, made, reasons, stages)
        if held:
            taken = {key for key in _text_keys(held) if key}
            why = ["text of a held-out sample" if key in taken else None for key in _text_keys(made)]
            made = _kept(kind, "leakage", made, why, stages)
        return made


def apportion(count: int, weights: Sequence[float]) -> list[int]:
    """``count`` in whole parts in proportion to weights: largest remainders, the first of equal ones."""
    total = math.fsum(weights)
    exact = [count * weight / total for weight in weights]
    parts = [math.floor(part) for part in exact]
    order = sorted(range(len(parts)), key=lambda i: (parts[i] - exact[i], i))
    for i in order[: count - sum(parts)]:
        parts[i] += 1
    return parts


def _counts(
    count: int | None, weights: Sequence[float], sizes: Sequence[int], names: Sequence[str]
) -> list[int]:
    if count is not None:
        parts = apportion(integer("count", count, 1, 2**31 - 1), weights)
        for name, part, size in zip(names, parts, sizes, strict=True):
            if part > size:
                raise ConfigError(f"source {name!r}: has {size} samples, expected {part} for its weight")
        return parts
    total = math.fsum(weights)
    pairs = [(weight, size) for weight, size in zip(weights, sizes, strict=True) if weight]
    most = min(sum(sizes), math.ceil(min((size + 1) * total / weight for weight, size in pairs)))
    while True:  # a part is at most one above its exact share, so a few steps down are enough
        parts = apportion(most, weights)
        if all(part <= size for part, size in zip(parts, sizes, strict=True)):
            return parts
        most -= 1


def _named_once(drawn: list[TrainingSample], stages: list[Stage]) -> list[TrainingSample]:
    """Samples with ids, the same sample of two sources once."""
    seen: dict[str, TrainingSample] = {}
    out = []
    for sample, name in zip(drawn, named(drawn), strict=True):
        full = sample if sample.id else sample.replace(id=name)
        if name not in seen:
            seen[name] = full
            out.append(full)
        elif seen[name] != full:
            raise ConfigError(f"sources: id {name!r} stands for two different samples, expected one")
    if len(out) < len(drawn):
        stages.append(Stage("filter", "ids", len(drawn), len(out), {"same sample": len(drawn) - len(out)}))
    return out


def _pass(item: QualityFilter, samples: list[TrainingSample], stages: list[Stage]) -> list[TrainingSample]:
    return _kept("filter", item.name, samples, run(item, samples), stages)


def _kept(
    kind: str,
    name: str,
    samples: list[TrainingSample],
    reasons: Sequence[str | None],
    stages: list[Stage],
) -> list[TrainingSample]:
    out = [sample for sample, why in zip(samples, reasons, strict=True) if why is None]
    counts = dict(sorted(Counter(why for why in reasons if why is not None).items()))
    stages.append(Stage(kind, name, len(samples), len(out), counts))
    return out


def _text_keys(samples: Iterable[TrainingSample]) -> list[int]:
    keys = Keys()
    for sample in samples:
        pairs = (("id", sample.id), ("query", sample.query), ("response", sample.response))
        keys.add({name: value for name, value in pairs if value is not None})
    return keys.texts


def _encoded(samples: list[TrainingSample], encoder: TextEncoder | None) -> list[TrainingSample]:
    """Samples with vectors for texts that had none, each different text encoded once."""
    if encoder is None:
        return samples
    wanted: dict[str, None] = {}
    for s in samples:
        if s.input_embedding is None and s.query is not None:
            wanted[s.query] = None
        if not s.has_target and s.response is not None:
            wanted[s.response] = None
    every = list(wanted)
    vectors: dict[str, object] = {}
    for start in range(0, len(every), _ENCODE):
        part = every[start : start + _ENCODE]
        vectors.update(zip(part, encode_checked(encoder, part), strict=True))
    out = []
    for s in samples:
        changes: dict[str, object] = {}
        if s.input_embedding is None and s.query is not None:
            changes["input_embedding"] = vectors[s.query]
        if not s.has_target and s.response is not None:
            changes["output_embedding"] = vectors[s.response]
        out.append(s.replace(**changes) if changes else s)
    return out


def _all(what: str, items: Iterable[Any], kind: Any) -> tuple[Any, ...]:
    out = tuple(items)
    for i, item in enumerate(out):
        if isinstance(item, type) or not isinstance(item, kind):
            hint = f", as {item.__name__}() makes one" if isinstance(item, type) else ""
            raise wrong(f"{what}[{i}]", item, f"a {kind.__name__}{hint}")
    return out
