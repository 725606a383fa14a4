"""LoRA adapters that learn per request, in microseconds, inside a Python process."""

from typing import TYPE_CHECKING

from microlora import exceptions, presets
from microlora._core import (
    Contrastive,
    Gradient,
    ModuleHandle,
    Preference,
    Reward,
    StepResult,
    Target,
    __version__,
    num_threads,
    set_num_threads,
)
from microlora.adapter import Adapter, ModuleInfo, Snapshot
from microlora.chain import LoraChain
from microlora.config import InstantConfig, LoraConfig, LoraConfigBuilder
from microlora.ewc import EwcPlusPlus
from microlora.exceptions import MicroLoraError
from microlora.feedback import Feedback
from microlora.files import load, save
from microlora.gram import Gram, collect_gram
from microlora.metadata import AdapterMetadata, Metric
from microlora.micro_lora import MicroLoRA, create_lora
from microlora.progress import CancelToken, Progress
from microlora.target import TargetModule

if TYPE_CHECKING:
    from microlora import encoders as encoders

__all__ = [
    "Adapter",
    "AdapterMetadata",
    "CancelToken",
    "Contrastive",
    "EwcPlusPlus",
    "Feedback",
    "Gradient",
    "Gram",
    "InstantConfig",
    "LoraChain",
    "LoraConfig",
    "LoraConfigBuilder",
    "Metric",
    "MicroLoRA",
    "MicroLoraError",
    "ModuleHandle",
    "ModuleInfo",
    "Preference",
    "Progress",
    "Reward",
    "Snapshot",
    "StepResult",
    "Target",
    "TargetModule",
    "__version__",
    "collect_gram",
    "create_lora",
    "encoders",
    "exceptions",
    "load",
    "num_threads",
    "presets",
    "save",
    "set_num_threads",
]


def __getattr__(name: str) -> object:
    """Rooms that are only loaded when they are used."""
    if name == "encoders":
        import importlib

        return importlib.import_module("microlora.encoders")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
