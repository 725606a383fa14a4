"""What the settings of training have in common: their JSON, and how large a count may be."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Self

from microlora._checks import SCHEMA_KEY, check_document
from microlora._document import Document

__all__ = ["MAX_COUNT", "SCHEMA_VERSION", "Settings"]

SCHEMA_VERSION = 1
MAX_COUNT = 2**31 - 1


class Settings(Document):
    """Fields as JSON, with a schema version."""

    def to_dict(self) -> dict[str, Any]:
        """A plain dict that JSON can hold, with its ``schema_version``."""
        out: dict[str, Any] = {SCHEMA_KEY: SCHEMA_VERSION}
        for item in dataclasses.fields(self):  # type: ignore[arg-type]
            value = getattr(self, item.name)
            out[item.name] = value.to_dict() if hasattr(value, "to_dict") else value
        return out

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """The config of a dict; keys left out keep their default, no ``schema_version`` means version 1.

        Raises:
            ConfigError: An unknown key (with the nearest known one), or a value out of its range.
            FormatError: Written by a newer version of microlora.
        """
        names = [item.name for item in dataclasses.fields(cls)]  # type: ignore[arg-type]
        return cls(**check_document("config", data, names, SCHEMA_VERSION))
