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
from microlora.exceptions import MicroLoraError
from microlora.feedback import Feedback
from microlora.files import load, save
from microlora.metadata import AdapterMetadata, Metric
from microlora.micro_lora import MicroLoRA, create_lora
from microlora.progress import CancelToken, Progress
from microlora.target import TargetModule

if TYPE_CHECKING:
    from microlora import data as data
    from microlora import encoders as encoders
    from microlora.data import AdapterDataset, SyntheticDataGenerator, TrainingSample

__all__ = [
    "Adapter",
    "AdapterDataset",
    "AdapterMetadata",
    "CancelToken",
    "Contrastive",
    "Feedback",
    "Gradient",
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
    "SyntheticDataGenerator",
    "Target",
    "TargetModule",
    "TrainingSample",
    "__version__",
    "create_lora",
    "data",
    "encoders",
    "exceptions",
    "load",
    "num_threads",
    "presets",
    "save",
    "set_num_threads",
]


_ROOMS = {
    "encoders": "microlora.encoders",
    "data": "microlora.data",
    "AdapterDataset": "microlora.data",
    "SyntheticDataGenerator": "microlora.data",
    "TrainingSample": "microlora.data",
}


def __getattr__(name: str) -> object:
    """Rooms that are only loaded when they are used."""
    room = _ROOMS.get(name)
    if room is not None:
        import importlib

        module = importlib.import_module(room)
        return module if room == f"microlora.{name}" else getattr(module, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
