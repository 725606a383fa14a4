"""What a checkpoint's state must look like: a right digest says nothing of who wrote it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeVar

from microlora.exceptions import ConfigError, FormatError
from microlora.training.result import STOP_REASONS, EpochRecord, TrainingHistory, ValidationRecord

if TYPE_CHECKING:
    from microlora.training.checkpoint import Checkpoint

__all__ = ["check_state", "refuse_other_ewc"]

T = TypeVar("T")

_WANT = {
    "int": "an integer, 0 or above",
    "float": "a finite number",
    "float | None": "a finite number or None",
    "bool": "True or False",
}


def _is(kind: str, value: object) -> bool:
    """Whether a value is of the annotated kind."""
    if kind == "bool":
        return isinstance(value, bool)
    if value is None:
        return kind.endswith("None")
    if isinstance(value, bool):
        return False
    if kind == "int":
        return isinstance(value, int) and 0 <= value < 2**63
    return isinstance(value, int | float) and math.isfinite(value)


def _refuse(name: str, came: object, want: str) -> FormatError:
    return FormatError(f"{name}: got {came!r:.80}, expected {want}")


def record(name: str, cls: type[T], data: object) -> T:
    """A flat dataclass of a plain dict with exactly its fields, each of its annotated kind.

    Raises:
        FormatError: Anything else; the message names the field, what came and what was wanted.
    """
    fields = {f.name: str(f.type) for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    if not isinstance(data, Mapping) or set(data) != set(fields):
        raise _refuse(name, data, f"a mapping with {', '.join(fields)}")
    for key, kind in fields.items():
        if not _is(kind, data[key]):
            raise _refuse(f"{name}.{key}", data[key], _WANT[kind])
    return cls(**data)


@dataclasses.dataclass
class _Best:
    """As `loop.Best`, without the weights."""

    loss: float
    epoch: int
    step: int


@dataclasses.dataclass
class _Stopping:
    """As `EarlyStopping.state`."""

    best: float | None
    checks: int
    waited: int
    diverged: bool


def _records(name: str, cls: type[T], data: object) -> tuple[T, ...]:
    if not isinstance(data, list):
        raise _refuse(name, data, "a list")
    return tuple(record(f"{name}[{i}]", cls, item) for i, item in enumerate(data))


def check_state(path: str, found: Checkpoint, rows: int) -> None:
    """Refuses a state that no run could have written, before anything is changed.

    Args:
        path: The file, as messages name it.
        found: What was read; its keys are all there.
        rows: Rows of an epoch.

    Raises:
        FormatError: A field that is not what it should be, or a part that is missing.
    """
    from microlora.training.loop import Place  # the loop imports the checkpoint's module

    state, parts = found.state, found.parts
    for key in ("config", "history"):
        if not isinstance(state[key], Mapping):
            raise _refuse(f"{path}: {key}", state[key], "a mapping")
    if state["ewc"] is not None and not isinstance(state["ewc"], Mapping):
        raise _refuse(f"{path}: ewc", state["ewc"], "a mapping or None")
    place = record(f"{path}: place", Place, state["place"])
    if place.row >= rows:
        raise _refuse(f"{path}: place.row", place.row, f"a row of {rows}")
    record(f"{path}: stopping", _Stopping, state["stopping"])
    if state["best"] is not None:
        record(f"{path}: best", _Best, state["best"])
    if set(state["history"]) != {"epochs", "validations"}:
        raise _refuse(f"{path}: history", state["history"], "a mapping with epochs, validations")
    history = TrainingHistory(
        _records(f"{path}: history.epochs", EpochRecord, state["history"]["epochs"]),
        _records(f"{path}: history.validations", ValidationRecord, state["history"]["validations"]),
    )
    reason = state["stop_reason"]
    if reason is not None and reason not in STOP_REASONS:
        raise _refuse(f"{path}: stop_reason", reason, f"None or one of {', '.join(STOP_REASONS)}")
    # A part of an epoch has a record only where the run ended within it.
    closed = len(history.epochs) - place.epoch
    if not (closed == 0 and (place.epoch or reason is None)) and not (closed == 1 and reason is not None):
        raise _refuse(f"{path}: history.epochs", f"{len(history.epochs)} epochs", f"{place.epoch}")
    wanted = {"snapshot": True, "optimizer": True, "best": state["best"] is not None}
    wanted |= {"ewc": state["ewc"] is not None, "replay": state["config"].get("replay") is not None}
    lacks = [name for name, needed in wanted.items() if needed]
    lacks = [name for name in lacks if name not in parts]
    if lacks:
        raise FormatError(f"{path}: a checkpoint without the part {', '.join(lacks)}")


def refuse_other_ewc(theirs: Mapping[str, Any] | None, ours: Mapping[str, Any] | None) -> None:
    """Refuses to go on under a penalty of other settings.

    Raises:
        ConfigError: The first setting that differs, with both values.
    """
    if (theirs is None) != (ours is None):
        shown = ["none" if s is None else "one" for s in (ours, theirs)]
        raise ConfigError(f"resume: ewc: got {shown[0]}, expected {shown[1]} as in the checkpoint")
    theirs, ours = theirs or {}, ours or {}
    for key in sorted({*theirs, *ours}):
        if theirs.get(key) != ours.get(key):
            raise ConfigError(
                f"resume: ewc.{key}: got {ours.get(key)!r}, expected {theirs.get(key)!r} as in the checkpoint"
            )
