"""SONA: an adapter that improves while it serves, by an instant, a background and a deep loop.

`SonaLoop` is the whole; `Background` serves many of them with one thread, `AsyncSona` is the front for
asyncio. What they did is told by `SonaLoop.stats`, by loggers (see `microlora.sona.telemetry`) and, with the
extra ``metrics``, by `microlora.sona.metrics`.
"""

from typing import TYPE_CHECKING

from microlora._core import AdaptationResult
from microlora.sona import telemetry
from microlora.sona.background import Background
from microlora.sona.config import SonaConfig
from microlora.sona.consolidation import Consolidation
from microlora.sona.journal import JournalConfig
from microlora.sona.loop import SonaLoop
from microlora.sona.stats import SonaStats

if TYPE_CHECKING:
    from microlora.sona.aio import AsyncSona
    from microlora.sona.deep import DeepResult
    from microlora.sona.diagnose import Finding

__all__ = [
    "AdaptationResult",
    "AsyncSona",
    "Background",
    "Consolidation",
    "DeepResult",
    "Finding",
    "JournalConfig",
    "SonaConfig",
    "SonaLoop",
    "SonaStats",
]

telemetry.configure()


_LATER = {"AsyncSona": "aio", "DeepResult": "deep", "Finding": "diagnose"}


def __dir__() -> list[str]:
    """The public names, those that are loaded later among them."""
    return sorted({*globals(), *__all__} - {"TYPE_CHECKING"})


def __getattr__(name: str) -> object:
    """What is only loaded when it is used."""
    if name in _LATER:
        import importlib

        return getattr(importlib.import_module(f"{__name__}.{_LATER[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
