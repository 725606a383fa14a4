"""How events are written down before they are learned: `JournalConfig`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from microlora._checks import SCHEMA_KEY, check_document, choice, integer, real, wrong
from microlora._document import Document

__all__ = ["JournalConfig"]

SCHEMA_VERSION = 1
POLICIES = ("never", "always", "events", "interval")


@dataclass(frozen=True)
class JournalConfig(Document):
    """Settings of a write-ahead journal: checksummed records in mapped segments.

    Whatever the policy, a process that is killed loses at most the record that it was writing, because the
    system has what was written; power that fails may cost what came since the last fsync.

    Attributes:
        fsync: When records are forced to the disk: ``"never"`` (at checkpoints and at the end alone),
            ``"always"``, ``"events"`` (every so many) or ``"interval"`` (every so many seconds).
        every: Events, or seconds, between two of them; above 0. None with the other two policies.
        segment_bytes: Length of a segment's file, 4,096 to 2^30.
        retain_bytes: Bytes of segments before the last checkpoint that are kept, for `SonaLoop.forget` and
            `SonaLoop.audit`; None keeps all.

    Raises:
        ConfigError: Names the field, the value that came and what was wanted.

    Example:
        >>> JournalConfig(fsync="interval", every=0.5).core()
        ('interval', 0.5, 16777216, None)
    """

    _document: ClassVar[str] = "journal config"

    fsync: str = "never"
    every: float | None = None
    segment_bytes: int = 16 << 20
    retain_bytes: int | None = None

    def __post_init__(self) -> None:
        put = object.__setattr__
        put(self, "fsync", choice("fsync", self.fsync, POLICIES))
        put(self, "every", self._every())
        put(self, "segment_bytes", integer("segment_bytes", self.segment_bytes, 4096, 2**30))
        if self.retain_bytes is not None:
            put(self, "retain_bytes", integer("retain_bytes", self.retain_bytes, 0, 2**62))

    def _every(self) -> float | None:
        if self.fsync not in ("events", "interval"):
            if self.every is not None:
                raise wrong("every", self.every, f"None with fsync {self.fsync!r}")
            return None
        if self.fsync == "events":
            return integer("every", self.every, 1, 2**31 - 1)
        want = "seconds above 0, at most 1e6, with fsync 'interval'"
        seconds = real("every", self.every, want)
        if not 1e-9 <= seconds <= 1e6:
            raise wrong("every", self.every, want)
        return seconds

    def core(self) -> tuple[str, float, int, int | None]:
        """What the core is told."""
        return self.fsync, float(self.every or 0), self.segment_bytes, self.retain_bytes

    def to_dict(self) -> dict[str, Any]:
        """A plain dict that JSON can hold, with its ``schema_version``."""
        values = {item.name: getattr(self, item.name) for item in dataclasses.fields(self)}
        return {SCHEMA_KEY: SCHEMA_VERSION, **values}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """The settings of a dict; keys left out keep their default.

        Raises:
            ConfigError: An unknown key (with the nearest known one), or a value out of its range.
            FormatError: Written by a newer version of microlora.
        """
        names = [item.name for item in dataclasses.fields(cls)]
        return cls(**check_document(cls._document, data, names, SCHEMA_VERSION))
