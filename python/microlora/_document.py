"""What every kind of settings can do: copies with changes, and JSON text both ways."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, Self

from microlora._checks import check_keys, read_json, write_json

__all__ = ["Document"]


class Document:
    """Base of frozen dataclasses that have a ``to_dict`` and a ``from_dict``."""

    #: What errors call it.
    _document: ClassVar[str] = "config"

    def replace(self, **changes: Any) -> Self:
        """A copy with some fields changed, validated again.

        Raises:
            ConfigError: An unknown field (with the nearest known one), or a value out of its range.
        """
        names = (item.name for item in dataclasses.fields(self))  # type: ignore[arg-type]
        check_keys(self._document, changes, names)
        return dataclasses.replace(self, **changes)  # type: ignore[type-var]

    def to_dict(self) -> dict[str, Any]:
        """A plain dict that JSON can hold."""
        raise NotImplementedError

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """The value of a dict."""
        raise NotImplementedError

    def to_json(self, indent: int | None = None) -> str:
        """JSON text; equal values give equal text."""
        return write_json(self.to_dict(), indent)

    @classmethod
    def from_json(cls, document: str | bytes) -> Self:
        """The value of a JSON text: exactly what `to_json` was called on.

        Raises:
            ConfigError: An unknown key (with the nearest known one), or a value out of its range.
            FormatError: No JSON object, a repeated key, or written by a newer version of microlora.
        """
        return cls.from_dict(read_json(cls._document, document))
