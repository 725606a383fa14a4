"""A set of samples to learn from: `AdapterDataset`."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, overload

import numpy as np
import numpy.typing as npt

from microlora._checks import FrozenMap, integer, real, text
from microlora.data.arrays import Array, Floats, Integers, frozen
from microlora.data.build import checked_metadata, columns_of_arrays, encode_texts, row_numbers
from microlora.data.columns import TEXTS, Columns
from microlora.data.sample import TrainingSample
from microlora.data.split import check_held_out, held_out
from microlora.data.stats import DatasetStats
from microlora.encoders.protocol import TextEncoder
from microlora.exceptions import ConfigError

if TYPE_CHECKING:
    from microlora.data.optimum import Optimum

__all__ = ["AdapterDataset"]

PathLike = str | os.PathLike[str]


class AdapterDataset(Sequence[TrainingSample]):
    """Samples of one shape, as a sequence of `TrainingSample` over columns of arrays.

    A dataset never changes: ``filter``, ``split`` and the rest give new ones that share its columns. Its
    samples are those to train on; what is held out is ``validation``, a dataset of its own.

    Args:
        samples: Samples of one sort: all with embeddings of the same widths, or all texts; all with one kind
            of target. Those without an id are named by a digest of their contents.
        validation: Held-out samples of the same sort.
        metadata: Anything that JSON can hold, kept and saved with the dataset.

    Raises:
        ConfigError: sorts mixed, a repeated id, or something that is no sample.
        ShapeError: mixed widths; the message names the sample.
        LeakageError: a sample, a text or a variation that is on both sides.

    Example:
        >>> d = AdapterDataset.from_arrays(np.ones((4, 3)), np.zeros((4, 2)), domains="code")
        >>> len(d), d[0].domain, d[1:3].arrays()[0].shape
        (4, 'code', (2, 3))
    """

    def __init__(
        self,
        samples: Iterable[TrainingSample] = (),
        validation: Iterable[TrainingSample] | None = None,
        *,
        metadata: Mapping[str, Any] | None = None,
    ) -> None:
        self._columns = Columns.of_samples(list(samples))
        self._rows: Integers | None = None
        self._validation: AdapterDataset | None = None
        self._metadata: FrozenMap[Any] = checked_metadata(metadata)
        self._optimum: Optimum | None = None
        if validation is not None:
            held = validation if isinstance(validation, AdapterDataset) else AdapterDataset(validation)
            self._validation = self.with_validation(held)._validation

    # -- making --

    @classmethod
    def of(
        cls,
        columns: Columns,
        rows: Integers | None = None,
        *,
        validation: AdapterDataset | None = None,
        metadata: Mapping[str, Any] | None = None,
        optimum: Optimum | None = None,
    ) -> AdapterDataset:
        """A dataset over columns that are sound already; ``rows`` are those it has, None for all."""
        made = object.__new__(cls)
        made._columns = columns
        made._rows = None if rows is None else frozen(np.asarray(rows, np.int64))
        made._validation = validation
        made._metadata = checked_metadata(metadata)
        made._optimum = optimum
        return made

    @classmethod
    def from_samples(cls, samples: Iterable[TrainingSample], **options: Any) -> AdapterDataset:
        """A dataset of samples; the same as calling the class."""
        return cls(samples, **options)

    @classmethod
    def from_arrays(
        cls,
        x: npt.ArrayLike,
        y: npt.ArrayLike | None = None,
        *,
        quality: npt.ArrayLike | float = 1.0,
        weights: npt.ArrayLike | float = 1.0,
        ids: Sequence[str] | None = None,
        domains: Sequence[str] | str = "",
        sessions: Sequence[str] | str = "",
        queries: Sequence[str | None] | None = None,
        responses: Sequence[str | None] | None = None,
        metadata: Mapping[str, Any] | None = None,
        copy: bool = True,
    ) -> AdapterDataset:
        """A dataset of arrays, without making a sample of each row.

        Args:
            x: (n, in_features) real numbers, kept as float32.
            y: (n, out_features) real numbers: targets, kept as float32; or (n,) integers from 0: labels.
            quality: One for all, or (n,), 0 to 1.
            weights: One for all, or (n,), above 0.
            ids: n different names; None makes them of a digest of ``x`` and ``y`` and the row number.
            domains: One for all, or n.
            sessions: One for all, or n.
            queries: n texts, or None.
            responses: n texts, or None.
            metadata: As of the class.
            copy: False keeps float32 arrays without a copy: they must not be written to any more.

        Raises:
            ShapeError: no matrix, or another number of rows.
            DTypeError: no numbers, or labels that are no integers.
            NonFiniteError: NaN or infinity; the message names the sample and the row.
            ConfigError: a value out of its range, or a repeated id.
        """
        columns = columns_of_arrays(
            x, y, quality, weights, ids, domains, sessions, queries, responses, copy=copy
        )
        return cls.of(columns, metadata=metadata)

    @classmethod
    def from_jsonl(cls, path: PathLike, **options: Any) -> AdapterDataset:
        """A dataset of JSON lines, see `microlora.data.tables.read_jsonl`."""
        from microlora.data.tables import read_jsonl

        return cls(read_jsonl(path, **options))

    @classmethod
    def from_csv(cls, path: PathLike, **options: Any) -> AdapterDataset:
        """A dataset of comma-separated values, see `microlora.data.tables.read_csv`."""
        from microlora.data.tables import read_csv

        return cls(read_csv(path, **options))

    @classmethod
    def from_parquet(cls, path: PathLike, **options: Any) -> AdapterDataset:
        """A dataset of a Parquet file, see `microlora.data.tables.read_parquet`; needs the extra ``data``."""
        from microlora.data.tables import read_parquet

        return cls(read_parquet(path, **options))

    @classmethod
    def concat(cls, datasets: Iterable[AdapterDataset]) -> AdapterDataset:
        """Several datasets one after the other, in memory, held-out parts too; shared metadata is kept.

        Raises:
            ConfigError: none given, an id that two of them have, or sorts mixed.
            ShapeError: mixed widths.
            LeakageError: what one holds out another trains on.
        """
        from microlora.data.join import joined

        return joined(list(datasets))

    # -- the sequence --

    def __len__(self) -> int:
        return len(self._columns) if self._rows is None else len(self._rows)

    @overload
    def __getitem__(self, index: int) -> TrainingSample: ...
    @overload
    def __getitem__(self, index: slice) -> AdapterDataset: ...
    def __getitem__(self, index: int | slice) -> TrainingSample | AdapterDataset:
        if isinstance(index, slice):
            return self.subset(np.arange(len(self))[index])
        row = range(len(self))[index]
        return self._columns.sample(row if self._rows is None else int(self._rows[row]))

    def __iter__(self) -> Iterator[TrainingSample]:
        for row in range(len(self)):
            yield self[row]

    def __add__(self, other: AdapterDataset) -> AdapterDataset:
        return AdapterDataset.concat([self, other])

    def __eq__(self, other: object) -> bool:
        """Same samples in the same order, held out ones included, same metadata and optimum."""
        return (
            isinstance(other, AdapterDataset)
            and len(self) == len(other)
            and self._metadata == other._metadata
            and self._optimum == other._optimum
            and all(a == b for a, b in zip(self, other, strict=True))
            and self._validation == other._validation
        )

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        held = "none" if self._validation is None else len(self._validation)
        c = self._columns
        return (
            f"AdapterDataset({len(self)} examples, validation {held}, {c.in_features} -> {c.out_features}, "
            f"{c.kind})"
        )

    # -- what it holds --

    @property
    def columns(self) -> Columns:
        """The columns under it, which may hold more rows than it has."""
        return self._columns

    @property
    def rows(self) -> Integers:
        """int64 (n,): its rows in ``columns``."""
        return np.arange(len(self._columns)) if self._rows is None else self._rows

    @property
    def examples(self) -> AdapterDataset:
        """The samples to train on, without the held-out part."""
        return self._belonging(self._metadata, self._optimum)

    @property
    def validation(self) -> AdapterDataset | None:
        """The held-out part, or None."""
        return self._validation

    @property
    def metadata(self) -> Mapping[str, Any]:
        """What was given with it; JSON can hold it."""
        return self._metadata

    @property
    def optimum(self) -> Optimum | None:
        """The true map of synthetic data with its losses, or None."""
        return self._optimum

    @property
    def in_features(self) -> int | None:
        """Width of the inputs; None for texts."""
        return self._columns.in_features

    @property
    def out_features(self) -> int | None:
        """Width of targets or feedback; None where there are none."""
        return self._columns.out_features

    @property
    def modules(self) -> tuple[str | None, ...]:
        """The modules that samples name, in order of first appearance; None for samples that name none."""
        return tuple(dict.fromkeys(self.texts("module")))

    def texts(self, field: str) -> list[str | None]:
        """One text field of every sample: ``id``, ``query``, ``response``, ``domain`` and so on."""
        if field not in TEXTS:
            raise ConfigError(f"field: got {field!r}, expected one of {', '.join(TEXTS)}")
        return self._columns.texts.column(field, self.rows.tolist())

    @property
    def has_arrays(self) -> bool:
        """Whether `arrays` gives something: inputs with targets, labels or targets as feedback."""
        return self._columns.inputs is not None and self._columns.has_outputs(self.rows)

    def arrays(self) -> tuple[Floats, Array, Floats]:
        """The training part as a trainer takes it.

        Returns:
            x float32 (n, in_features); y float32 (n, out_features) targets or int64 (n,) labels; weights
            float32 (n,). C-contiguous and read-only; views of the columns where the rows lie together, so
            that those of a mapped dataset are mapped too.

        Raises:
            ConfigError: no embeddings, nothing to aim at, feedback other than ``Target`` with the squared
                loss, or samples for different modules.
        """
        self._ready()
        place = self._place()
        x, y, weights = self._columns.arrays(place)
        return frozen(x), frozen(y), frozen(weights)

    def batches(
        self, batch_size: int, *, order: npt.ArrayLike | None = None
    ) -> Iterator[tuple[Floats, Array, Floats]]:
        """What `arrays` gives, ``batch_size`` rows at a time: a mapped dataset is never read as a whole.

        Args:
            batch_size: Rows of a batch; the last may have fewer.
            order: int64 rows to visit, as `order` makes them; None goes from the first to the last.

        Raises:
            ConfigError: as `arrays`, or a batch size below 1.
            ShapeError: ``order`` holds rows that are not there.
        """
        size = integer("batch_size", batch_size, 1, 2**31 - 1)
        places = np.arange(len(self)) if order is None else row_numbers("order", order, len(self))
        self._ready()
        for start in range(0, len(places), size):
            yield self._columns.arrays(self.rows[places[start : start + size]])

    def _place(self) -> slice | Integers:
        """How to take the rows of a column: a slice where they lie together, for that is a view."""
        rows = self._rows
        if rows is None:
            return slice(0, len(self._columns))
        if len(rows) and rows[-1] - rows[0] == len(rows) - 1 and (np.diff(rows) == 1).all():
            return slice(int(rows[0]), int(rows[-1]) + 1)
        return rows

    def _ready(self) -> None:
        """Raise ConfigError unless `arrays` can give something."""
        if self._columns.inputs is None:
            raise ConfigError("dataset: got texts, expected embeddings: dataset.encoded(encoder) makes them")
        if not self._columns.has_outputs(self.rows):
            raise ConfigError(
                f"dataset: got samples with {self._columns.kind}, expected targets, labels or Target "
                "feedback with the squared loss; give other feedback sample by sample"
            )
        if len(self.modules) > 1:
            raise ConfigError(
                f"dataset: got samples for the modules {self.modules}, expected one: see for_module"
            )

    def stats(self) -> DatasetStats:
        """Counts, widths, quality, domains and so on."""
        return DatasetStats.of(self)

    # -- new ones from it --

    def subset(self, rows: npt.ArrayLike) -> AdapterDataset:
        """The samples at ``rows`` in that order; the held-out part stays.

        Args:
            rows: Integers from ``-len`` to ``len - 1``, each at most once; or bool (n,).

        Raises:
            ShapeError: rows that are not there, or no vector.
            ConfigError: a row that appears twice.
        """
        places = row_numbers("rows", rows, len(self))
        if len(np.unique(places)) != len(places):
            raise ConfigError("rows: got a row twice, expected every row at most once")
        return self._with(self.rows[places], self._validation)

    def filter(
        self,
        fn: Callable[[TrainingSample], bool] | None = None,
        *,
        min_quality: float | None = None,
        domain: str | None = None,
    ) -> AdapterDataset:
        """The samples that pass every test given; the held-out part is filtered alike.

        Args:
            fn: Called with each sample.
            min_quality: Lowest quality kept.
            domain: The one domain kept.
        """
        keep = np.ones(len(self), np.bool_)
        if min_quality is not None:
            keep &= self._columns.quality[self.rows] >= real("min_quality", min_quality, "a number")
        if domain is not None:
            wanted = text("domain", domain)
            keep &= np.array([name == wanted for name in self.texts("domain")], np.bool_)
        if fn is not None:
            keep[keep] = [bool(fn(self[row])) for row in np.flatnonzero(keep).tolist()]
        held = self._validation
        if held is not None:
            held = held.filter(fn, min_quality=min_quality, domain=domain)
        return self._with(self.rows[keep], held if held else None)

    def for_module(self, module: str) -> AdapterDataset:
        """The samples that ``module`` learns from: those that name it and those that name none."""
        return self.filter(lambda sample: sample.module in (None, module))

    def order(self, seed: int, epoch: int = 0) -> Integers:
        """The rows in the random order of one epoch: the same on every machine.

        Returns:
            int64 (n,): ``Generator(PCG64(SeedSequence([seed, epoch]))).permutation(n)`` of NumPy.
        """
        entropy = [integer("seed", seed, 0, 2**63 - 1), integer("epoch", epoch, 0, 2**63 - 1)]
        generator = np.random.Generator(np.random.PCG64(np.random.SeedSequence(entropy)))
        return generator.permutation(len(self)).astype(np.int64)

    def shuffle(self, seed: int) -> AdapterDataset:
        """The samples in the order ``order(seed, 0)``; the held-out part stays."""
        return self.subset(self.order(seed))

    def split(self, validation: float = 0.2, by: str = "id", seed: int = 0) -> AdapterDataset:
        """Hold out about a share of the samples.

        A sample's side depends on the hash of its key and on the seed alone: all samples of a key are on one
        side, and stay there when samples are added.

        Args:
            validation: Share to hold out, above 0 and below 1. It is met on average over keys.
            by: The key: ``"id"`` (a variation goes with its parent), ``"session"`` or ``"row"``.
            seed: Another seed holds out others.

        Returns:
            The training part; the rest is its ``validation``.

        Raises:
            ConfigError: a held-out part is there already, a side would be empty, or a setting is wrong.
            LeakageError: the same text would be on both sides.
        """
        if self._validation is not None:
            raise ConfigError("split: there is a held-out part already; with_validation(None) drops it")
        held = held_out(self, validation, by, seed)
        rows = self.rows
        return self._with(rows[~held], None).with_validation(self._with(rows[held], None))

    def with_validation(self, validation: AdapterDataset | None) -> AdapterDataset:
        """The same samples with another held-out part, or with none.

        Raises:
            ConfigError: another sort of samples, or an empty part.
            ShapeError: other widths.
            LeakageError: a sample, a text or a variation on both sides.
        """
        if validation is not None:
            check_held_out(self, validation)
            validation = validation._belonging(self._metadata, self._optimum)
        return self._with(self._rows, validation)

    def with_metadata(self, metadata: Mapping[str, Any]) -> AdapterDataset:
        """The same samples with other metadata."""
        made = self._belonging(checked_metadata(metadata), self._optimum)
        held = self._validation
        made._validation = None if held is None else held._belonging(made._metadata, self._optimum)
        return made

    def _belonging(self, metadata: Mapping[str, Any], optimum: Optimum | None) -> AdapterDataset:
        """The samples alone, as a part of the dataset that has this metadata and optimum."""
        return AdapterDataset.of(self._columns, self._rows, metadata=metadata, optimum=optimum)

    def encoded(self, encoder: TextEncoder) -> AdapterDataset:
        """The same samples with vectors for their texts, where vectors were missing; held-out part too.

        Queries become inputs, and responses the targets of samples that have no target of any kind.

        Raises:
            ConfigError: a sample without input and query; the message names it.
            ShapeError: the encoder gives other shapes than it promises.
            NonFiniteError: the encoder gives NaN or infinity.
        """
        columns = self._columns.take(self.rows)
        changes: dict[str, Floats] = {}
        if columns.inputs is None:
            changes["inputs"] = encode_texts(encoder, self, "query")
        if columns.kind == "none" and len(self) and None not in self.texts("response"):
            changes["targets"] = encode_texts(encoder, self, "response")
        values = {**vars(columns), **changes}
        held = None if self._validation is None else self._validation.encoded(encoder)
        return AdapterDataset.of(
            Columns(**values), validation=held, metadata=self._metadata, optimum=self._optimum
        )

    def _with(self, rows: Integers | None, validation: AdapterDataset | None) -> AdapterDataset:
        return AdapterDataset.of(
            self._columns, rows, validation=validation, metadata=self._metadata, optimum=self._optimum
        )

    # -- files --

    def save(self, path: PathLike) -> None:
        """Write the dataset as a directory (`microlora.data.files`) in place of an older one.

        Raises:
            ConfigError: ``path`` is something else than a dataset.
            OSError: the system refused, or the disk is full; the older dataset is left whole.
        """
        from microlora.data.writer import write_dataset

        write_dataset(self, path)

    @classmethod
    def load(cls, path: PathLike, *, mmap: bool = False) -> AdapterDataset:
        """Read a directory that `save` or `DatasetWriter` wrote.

        Args:
            path: The directory.
            mmap: Map the files: arrays are read where they are used, texts line by line. Headers and lengths
                are checked, checksums are not (``microlora.data.verify`` does that).

        Raises:
            FormatError: damaged, truncated, of a newer version or no dataset; names the file and the reason.
            OSError: the files cannot be read.
        """
        from microlora.data.reader import read_dataset

        return read_dataset(path, mmap=mmap)
