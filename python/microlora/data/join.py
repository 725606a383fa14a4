"""Several datasets made one."""

from __future__ import annotations

from collections.abc import Sequence

from microlora.data.columns import Columns, first_repeat
from microlora.data.dataset import AdapterDataset
from microlora.exceptions import ConfigError

__all__ = ["joined"]


def joined(parts: Sequence[AdapterDataset]) -> AdapterDataset:
    """What `AdapterDataset.concat` gives."""
    if not parts:
        raise ConfigError("datasets: got none, expected one or more")
    columns = Columns.concat([part.columns.take(part.rows) for part in parts])
    repeated = first_repeat(columns.texts.column("id", range(len(columns))))
    if repeated is not None:
        raise ConfigError(f"datasets: id {repeated!r} appears twice, expected every id once")
    first = parts[0]
    made = AdapterDataset.of(
        columns,
        metadata=first.metadata if all(part.metadata == first.metadata for part in parts) else None,
        optimum=first.optimum if all(part.optimum == first.optimum for part in parts) else None,
    )
    held = [part.validation for part in parts if part.validation is not None]
    return made.with_validation(joined(held)) if held else made
