"""Logging of the loops: names to filter by, fields to collect, and ``MICROLORA_LOG``.

==============================  =====================================================================
logger                          what it tells
==============================  =====================================================================
``microlora.sona.instant``      every event (DEBUG; costs nothing where it is off)
``microlora.sona.background``   consolidations (INFO), the first of a row that is rolled back (WARNING)
``microlora.sona.deep``         deep runs (INFO), the first of a row that is refused (WARNING)
``microlora.sona.journal``      what was recovered, written and compacted
==============================  =====================================================================

Every record has the fields of its result as attributes, those of `FIELDS`: a formatter for JSON needs no
parsing.
"""

from __future__ import annotations

import logging
import os
import sys
from typing import TYPE_CHECKING

from microlora._checks import near
from microlora.exceptions import ConfigError

if TYPE_CHECKING:
    from microlora._core import AdaptationResult
    from microlora.sona.deep import DeepResult

__all__ = ["FIELDS", "LOG_VARIABLE", "configure", "logger", "report"]

LOG_VARIABLE = "MICROLORA_LOG"
ROOT = "microlora"
FIELDS = (
    "loop_type",
    "applied",
    "outcome",
    "latency_us",
    "quality_delta",
    "samples_used",
    "notes",
    "event",
    "loss_before",
    "loss_after",
    "version",
)
# A consolidation that is refused for live weights that pass by themselves is nothing to worry about.
_TROUBLE = (("background", "rolled_back"), ("background", "cancelled"), ("deep", "kept"))
_LEVELS = {
    "trace": logging.DEBUG,
    "debug": logging.DEBUG,
    "info": logging.INFO,
    "warn": logging.WARNING,
    "warning": logging.WARNING,
    "error": logging.ERROR,
    "critical": logging.CRITICAL,
    "off": logging.CRITICAL + 10,
}


def logger(loop_type: str) -> logging.Logger:
    """The logger of one loop."""
    return logging.getLogger(f"{ROOT}.sona.{loop_type}")


def report(result: AdaptationResult | DeepResult, again: bool = False) -> None:
    """Logs what a loop did, if anyone listens at that level.

    Args:
        result: What it did.
        again: Whether its last result came to the same: only the first of a row of refusals is a warning.
    """
    what = result.outcome
    if result.loop_type == "instant":
        level, what = logging.DEBUG, "learned" if result.applied else "skipped"
    else:
        trouble = (result.loop_type, what) in _TROUBLE and not again
        level = logging.WARNING if trouble else logging.INFO
    log = logger(result.loop_type)
    if not log.isEnabledFor(level):
        return
    fields = {name: getattr(result, name) for name in FIELDS}
    log.log(
        level,
        "%s %s: %d samples, %.1f us, quality delta %.4g%s",
        result.loop_type,
        what,
        result.samples_used,
        result.latency_us,
        result.quality_delta,
        "".join(f"; {note}" for note in result.notes),
        extra=fields,
    )


class _Fallback(logging.StreamHandler):  # type: ignore[type-arg]
    """Writes to stderr as long as the program itself has not set up logging."""

    def __init__(self) -> None:
        super().__init__(sys.stderr)
        self.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))

    def emit(self, record: logging.LogRecord) -> None:
        if not logging.getLogger().handlers:
            super().emit(record)


def parse(spec: str) -> dict[str, int]:
    """Levels by logger name of a text such as ``"microlora.sona=debug,microlora=info"``, or ``"debug"``.

    Raises:
        ConfigError: Names the part that is wrong, and what was wanted.
    """
    levels: dict[str, int] = {}
    for part in spec.split(","):
        text = part.strip()
        name, _, level = text.rpartition("=")
        name, level = name.strip() or ROOT, level.strip().lower()
        where = f"{LOG_VARIABLE}: got {text!r} in {spec!r}"
        if level not in _LEVELS or text.startswith("="):
            wanted = ", ".join(level for level in _LEVELS if level not in ("trace", "warn"))
            raise ConfigError(f"{where}, expected name=level with a level of {wanted}{near(level, _LEVELS)}")
        if name != ROOT and not name.startswith(ROOT + "."):
            raise ConfigError(f"{where}, expected {ROOT} or a name below it such as {ROOT}.sona.background")
        if name in levels:
            raise ConfigError(f"{where}, expected {name} once")
        levels[name] = _LEVELS[level]
    return levels


def configure(spec: str | None = None) -> dict[str, int]:
    """Sets the levels of our loggers, and has them written to stderr where the program has no handlers.

    Args:
        spec: As in `parse`; None takes the environment's ``MICROLORA_LOG``, and does nothing without it.

    Returns:
        The levels by name.

    Raises:
        ConfigError: A malformed text; nothing is set then.
    """
    if spec is None:
        spec = os.environ.get(LOG_VARIABLE, "")
        if not spec.strip():
            return {}
    levels = parse(spec)
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)
    root = logging.getLogger(ROOT)
    if not any(isinstance(handler, _Fallback) for handler in root.handlers):
        root.addHandler(_Fallback())
    return levels
