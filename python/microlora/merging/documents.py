"""Reports as frozen dataclasses: rows inside a table, JSON both ways."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, Self

from microlora._checks import SCHEMA_KEY, check_document, check_keys, near, wrong
from microlora._document import Document
from microlora.exceptions import ConfigError, UnknownModuleError

__all__ = ["Record", "Table"]

SCHEMA_VERSION = 1


class Record:
    """A row: a frozen dataclass with a ``name``, made of numbers, texts and tuples of them."""

    name: str

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """The row of a dict; only fields with a default may be left out.

        Raises:
            ConfigError: A key is missing or unknown.
        """
        if not isinstance(data, Mapping):
            raise wrong(cls.__name__, data, "a mapping")
        _check(cls, data, cls.__name__)
        return cls(**{key: tuples(value) for key, value in data.items()})


class Table(Document):
    """A report: a frozen dataclass whose field ``modules`` holds rows."""

    _rows: ClassVar[type[Record]]

    modules: tuple[Any, ...]

    def __getitem__(self, module: str) -> Any:
        """The row of one module. Raises UnknownModuleError if there is none."""
        for item in self.modules:
            if item.name == module:
                return item
        names = [item.name for item in self.modules]
        raise UnknownModuleError(
            f"module: got {module!r}, expected one of {', '.join(names[:9])}{near(module, names)}"
        )

    def to_dict(self) -> dict[str, Any]:
        """A plain dict that JSON can hold, with its ``schema_version``."""
        return {SCHEMA_KEY: SCHEMA_VERSION, **lists(dataclasses.asdict(self))}  # type: ignore[call-overload]

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """The report of a dict.

        Raises:
            ConfigError: A key is missing or unknown.
            FormatError: Written by a newer version of microlora.
        """
        fields = dataclasses.fields(cls)  # type: ignore[arg-type]
        values = check_document(cls._document, data, [item.name for item in fields], SCHEMA_VERSION)
        _check(cls, values, cls._document)
        rows = values.pop("modules")
        if not isinstance(rows, list | tuple):
            raise wrong(f"{cls._document}: modules", rows, "a list")
        modules = tuple(cls._rows.from_dict(row) for row in rows)
        return cls(modules=modules, **{key: tuples(value) for key, value in values.items()})  # type: ignore[call-arg]


def _check(cls: type, data: Mapping[str, Any], what: str) -> None:
    fields = dataclasses.fields(cls)
    check_keys(what, data, [item.name for item in fields])
    for item in fields:
        if item.name not in data and item.default is dataclasses.MISSING:
            raise ConfigError(f"{what}: key {item.name!r} is missing")


def tuples(value: Any) -> Any:
    """Lists as tuples, at every depth."""
    return tuple(tuples(item) for item in value) if isinstance(value, list | tuple) else value


def lists(value: Any) -> Any:
    """Tuples as lists, at every depth."""
    if isinstance(value, dict):
        return {key: lists(item) for key, item in value.items()}
    return [lists(item) for item in value] if isinstance(value, list | tuple) else value
