"""Where an adapter comes from: the one schema of its metadata, versioned."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, ClassVar

from microlora._checks import (
    SCHEMA_KEY,
    check_document,
    check_keys,
    integer,
    read_json,
    real,
    text,
    texts,
    wrong,
)
from microlora._document import Document
from microlora.exceptions import ConfigError, FormatError

__all__ = ["AdapterMetadata", "Metric", "utc_now"]

#: Version 2 has ``recipe``; what has none is written as version 1, so that older readers go on reading it.
SCHEMA_VERSION = 2


@dataclass(frozen=True)
class Metric:
    """One measured number.

    Attributes:
        name: What was measured, e.g. ``"mrr@10"``.
        data_hash: Fingerprint of the data it was measured on; two values compare only where it is the same.
        value: The number, finite.

    Raises:
        ConfigError: names the field.
    """

    name: str
    data_hash: str
    value: float

    def __post_init__(self) -> None:
        put = object.__setattr__
        put(self, "name", text("metric.name", self.name, empty=False))
        put(self, "data_hash", text("metric.data_hash", self.data_hash, empty=False))
        put(self, "value", real("metric.value", self.value, "a finite number"))

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Metric:
        """The metric of a dict with exactly the keys name, data_hash and value.

        Raises:
            ConfigError: a key is missing or unknown, or a value is wrong.
        """
        if not isinstance(data, Mapping):
            raise wrong("metric", data, "a mapping")
        names = [item.name for item in dataclasses.fields(cls)]
        check_keys("metric", data, names)
        for name in names:
            if name not in data:
                raise ConfigError(f"metric: key {name!r} is missing")
        return cls(**data)


@dataclass(frozen=True)
class AdapterMetadata(Document):
    """What is known of an adapter besides its weights and config.

    Attributes:
        name: Name of the adapter.
        version: Version of the adapter, free text such as ``"1.2.0"``.
        base_model: Short name of the model that it is for.
        base_fingerprint: Fingerprint of that model's weights or config; empty if unknown.
        task_types: What it is for, distinct strings.
        training_size: Examples or events it has learned from, 0 or more.
        metrics: Measured numbers, each with the hash of its data.
        created: Time of making, ISO 8601 in UTC, ``2026-01-31T12:00:00Z``; empty if unknown.
        parents: Names or fingerprints of the adapters it was made from, distinct.
        recipe: How it was made of them, a JSON object such as ``{"merge": {"method": "ties", ...}}``; empty
            if unknown.

    Raises:
        ConfigError: names the field, the value that came and what was wanted.
    """

    _document: ClassVar[str] = "metadata"

    name: str = ""
    version: str = ""
    base_model: str = ""
    base_fingerprint: str = ""
    task_types: tuple[str, ...] = ()
    training_size: int = 0
    metrics: tuple[Metric, ...] = ()
    created: str = ""
    parents: tuple[str, ...] = ()
    recipe: str = ""

    def __post_init__(self) -> None:
        put = object.__setattr__
        for name in ("name", "version", "base_model", "base_fingerprint"):
            put(self, name, text(name, getattr(self, name)))
        for name in ("task_types", "parents"):
            put(self, name, texts(name, getattr(self, name)))
        put(self, "training_size", integer("training_size", self.training_size, 0, 2**63 - 1))
        put(self, "metrics", _metrics(self.metrics))
        put(self, "created", _utc(self.created))
        put(self, "recipe", _recipe(self.recipe))

    def to_dict(self) -> dict[str, Any]:
        """A plain dict that JSON can hold, with its ``schema_version``."""
        out: dict[str, Any] = {SCHEMA_KEY: SCHEMA_VERSION if self.recipe else 1}
        for item in dataclasses.fields(self):
            if item.name == "recipe" and not self.recipe:
                continue
            value = getattr(self, item.name)
            out[item.name] = list(value) if isinstance(value, tuple) else value
        out["metrics"] = [dataclasses.asdict(metric) for metric in self.metrics]
        return out

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> AdapterMetadata:
        """The metadata of a dict; keys left out keep their default, no ``schema_version`` means version 1.

        Raises:
            ConfigError: an unknown key (with the nearest known one), or a wrong value.
            FormatError: written by a newer version of microlora.
        """
        names = [item.name for item in dataclasses.fields(cls)]
        values = check_document("metadata", data, names, SCHEMA_VERSION)
        if "metrics" in values:
            items = values["metrics"]
            if not isinstance(items, list | tuple):
                raise wrong("metrics", items, "a list of metrics")
            values["metrics"] = tuple(Metric.from_dict(item) for item in items)
        return cls(**values)


def utc_now() -> str:
    """The time now in the form of `AdapterMetadata.created`, to the second."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _metrics(value: object) -> tuple[Metric, ...]:
    want = "a list or tuple of Metric"
    if isinstance(value, str | bytes | Mapping) or not isinstance(value, Iterable):
        raise wrong("metrics", value, want)
    out = tuple(value)
    for i, item in enumerate(out):
        if not isinstance(item, Metric):
            raise wrong(f"metrics[{i}]", item, "a Metric")
    return out


def _recipe(value: object) -> str:
    recipe = text("recipe", value)
    if recipe:
        try:
            read_json("recipe", recipe)
        except FormatError as e:
            raise wrong("recipe", value, f"the text of a JSON object ({e})") from None
    return recipe


def _utc(value: object) -> str:
    stamp = text("created", value)
    if not stamp:
        return stamp
    want = "an ISO 8601 time in UTC such as 2026-01-31T12:00:00Z"
    try:
        when = datetime.fromisoformat(stamp)
    except ValueError:
        raise wrong("created", value, want) from None
    offset = when.utcoffset()
    if offset is None or offset.total_seconds() != 0:
        raise wrong("created", value, want)
    return stamp
