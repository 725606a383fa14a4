"""What became of the samples on their way into a dataset, stage by stage."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["PrepareReport", "Stage"]


@dataclass(frozen=True)
class Stage:
    """One step of `TrainingDataManager.prepare`.

    Attributes:
        kind: ``"source"``, ``"filter"``, ``"split"``, ``"variation"`` or ``"filter of variations"``.
        name: Of the source, filter or variation.
        rows_in: Samples that came to it.
        rows_out: Samples that it gave on; for a variation, those it made.
        reasons: How many did not go on (or were not made), by reason. For a variation ``rows_in`` times its
            copies, and for all others ``rows_in``, is ``rows_out`` plus the sum of these.
    """

    kind: str
    name: str
    rows_in: int
    rows_out: int
    reasons: Mapping[str, int]

    def to_dict(self) -> dict[str, Any]:
        """A plain dict that JSON can hold."""
        return {**dataclasses.asdict(self), "reasons": dict(self.reasons)}


@dataclass(frozen=True)
class PrepareReport:
    """Every stage of a preparation, in order, and what came of it.

    Attributes:
        stages: The stages.
        examples: Samples to train on.
        validation: Samples held out.
        variations: How many of ``examples`` are variations.
    """

    stages: tuple[Stage, ...]
    examples: int
    validation: int
    variations: int

    @property
    def rows(self) -> list[dict[str, Any]]:
        """The stages as plain data."""
        return [stage.to_dict() for stage in self.stages]

    def to_dict(self) -> dict[str, Any]:
        """All of it as plain data that JSON can hold."""
        counts = {name: getattr(self, name) for name in ("examples", "validation", "variations")}
        return {**counts, "stages": self.rows}

    def __str__(self) -> str:
        head = ("stage", "in", "out", "why not")
        table = [head] + [
            (
                f"{s.kind} {s.name}",
                str(s.rows_in),
                str(s.rows_out),
                ", ".join(f"{n} {why}" for why, n in s.reasons.items()) or "-",
            )
            for s in self.stages
        ]
        a, b, c = (max(len(row[i]) for row in table) for i in range(3))
        lines = [f"{row[0]:<{a}}  {row[1]:>{b}}  {row[2]:>{c}}  {row[3]}" for row in table]
        end = f"{self.examples} to train on, {self.variations} of them variations; {self.validation} held out"
        return "\n".join([*lines, end])
