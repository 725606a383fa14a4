"""LoRA adapters that learn per request, in microseconds, inside a Python process."""

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
)
from microlora.adapter import Adapter, ModuleInfo, Snapshot
from microlora.config import InstantConfig, LoraConfig, LoraConfigBuilder
from microlora.exceptions import MicroLoraError
from microlora.feedback import Feedback
from microlora.files import load, save
from microlora.metadata import AdapterMetadata, Metric
from microlora.micro_lora import MicroLoRA, create_lora
from microlora.progress import CancelToken, Progress
from microlora.target import TargetModule

__all__ = [
    "Adapter",
    "AdapterMetadata",
    "CancelToken",
    "Contrastive",
    "Feedback",
    "Gradient",
    "InstantConfig",
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
    "create_lora",
    "exceptions",
    "load",
    "presets",
    "save",
]
