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
    from microlora import encoders as encoders
    from microlora import training as training
    from microlora.training import AdapterTrainer as AdapterTrainer
    from microlora.training import AdapterTrainingConfig as AdapterTrainingConfig
    from microlora.training import LearningEvent as LearningEvent
    from microlora.training import LearningRateSchedule as LearningRateSchedule
    from microlora.training import TrainingConfig as TrainingConfig
    from microlora.training import TrainingPipeline as TrainingPipeline
    from microlora.training import TrainingResult as TrainingResult

__all__ = [
    "Adapter",
    "AdapterMetadata",
    "AdapterTrainer",
    "AdapterTrainingConfig",
    "CancelToken",
    "Contrastive",
    "Feedback",
    "Gradient",
    "InstantConfig",
    "LearningEvent",
    "LearningRateSchedule",
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
    "TrainingConfig",
    "TrainingPipeline",
    "TrainingResult",
    "__version__",
    "create_lora",
    "encoders",
    "exceptions",
    "load",
    "num_threads",
    "presets",
    "save",
    "set_num_threads",
    "training",
]


_ROOMS = {
    "encoders": ("encoders",),
    "training": (
        "training",
        "AdapterTrainer",
        "AdapterTrainingConfig",
        "LearningEvent",
        "LearningRateSchedule",
        "TrainingConfig",
        "TrainingPipeline",
        "TrainingResult",
    ),
}


def __getattr__(name: str) -> object:
    """Rooms, and names from them, that are only loaded when they are used."""
    for room, names in _ROOMS.items():
        if name in names:
            import importlib

            module = importlib.import_module(f"microlora.{room}")
            return module if name == room else getattr(module, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
