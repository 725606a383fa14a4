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
    from microlora import doctor as doctor
    from microlora import encoders as encoders
    from microlora import merging as merging
    from microlora import sona as sona
    from microlora import training as training
    from microlora import trust as trust
    from microlora.chain import LoraChain
    from microlora.data import AdapterDataset, SyntheticDataGenerator, TrainingSample
    from microlora.doctor import inspect
    from microlora.ewc import EwcPlusPlus
    from microlora.formats import AdapterFile, Conversion, Limits, convert, convert_to_plain
    from microlora.fusing import FusedTensor, FuseReport, fuse, unfuse
    from microlora.gram import Gram, collect_gram
    from microlora.hot_swap import HotSwapManager
    from microlora.merging import (
        AdapterMerger,
        CentroidRouter,
        MergeConfig,
        MergeReport,
        RoutedEnsemble,
        compose_parallel,
        compose_sequential,
        diff,
        extract,
        merge,
        resize,
    )
    from microlora.quantized import QuantizedAdapter
    from microlora.quantizing import (
        Quantization,
        QuantizationProfile,
        QuantizationReport,
        quantization_profile,
        quantize,
    )
    from microlora.sona import SonaConfig, SonaLoop
    from microlora.training import (
        AdapterTrainer,
        AdapterTrainingConfig,
        LearningEvent,
        LearningRateSchedule,
        ReplayConfig,
        TrainingConfig,
        TrainingPipeline,
        TrainingResult,
    )
    from microlora.trust import Verification, fingerprint, sign, verify

__all__ = [
    "Adapter",
    "AdapterDataset",
    "AdapterFile",
    "AdapterMerger",
    "AdapterMetadata",
    "AdapterTrainer",
    "AdapterTrainingConfig",
    "CancelToken",
    "CentroidRouter",
    "Contrastive",
    "Conversion",
    "EwcPlusPlus",
    "Feedback",
    "FuseReport",
    "FusedTensor",
    "Gradient",
    "Gram",
    "HotSwapManager",
    "InstantConfig",
    "LearningEvent",
    "LearningRateSchedule",
    "Limits",
    "LoraChain",
    "LoraConfig",
    "LoraConfigBuilder",
    "MergeConfig",
    "MergeReport",
    "Metric",
    "MicroLoRA",
    "MicroLoraError",
    "ModuleHandle",
    "ModuleInfo",
    "Preference",
    "Progress",
    "Quantization",
    "QuantizationProfile",
    "QuantizationReport",
    "QuantizedAdapter",
    "ReplayConfig",
    "Reward",
    "RoutedEnsemble",
    "Snapshot",
    "SonaConfig",
    "SonaLoop",
    "StepResult",
    "SyntheticDataGenerator",
    "Target",
    "TargetModule",
    "TrainingConfig",
    "TrainingPipeline",
    "TrainingResult",
    "TrainingSample",
    "Verification",
    "__version__",
    "collect_gram",
    "compose_parallel",
    "compose_sequential",
    "convert",
    "convert_to_plain",
    "create_lora",
    "data",
    "diff",
    "doctor",
    "encoders",
    "exceptions",
    "extract",
    "fingerprint",
    "fuse",
    "inspect",
    "load",
    "merge",
    "merging",
    "num_threads",
    "presets",
    "quantization_profile",
    "quantize",
    "resize",
    "save",
    "set_num_threads",
    "sign",
    "sona",
    "training",
    "trust",
    "unfuse",
    "verify",
]


_ROOMS = {
    "chain": ("LoraChain",),
    "data": ("data", "AdapterDataset", "SyntheticDataGenerator", "TrainingSample"),
    "doctor": ("doctor", "inspect"),
    "encoders": ("encoders",),
    "ewc": ("EwcPlusPlus",),
    "formats": ("AdapterFile", "Conversion", "Limits", "convert", "convert_to_plain"),
    "fusing": ("FuseReport", "FusedTensor", "fuse", "unfuse"),
    "gram": ("Gram", "collect_gram"),
    "hot_swap": ("HotSwapManager",),
    "merging": (
        "merging",
        "AdapterMerger",
        "CentroidRouter",
        "MergeConfig",
        "MergeReport",
        "RoutedEnsemble",
        "compose_parallel",
        "compose_sequential",
        "diff",
        "extract",
        "merge",
        "resize",
    ),
    "quantized": ("QuantizedAdapter",),
    "quantizing": (
        "Quantization",
        "QuantizationProfile",
        "QuantizationReport",
        "quantization_profile",
        "quantize",
    ),
    "sona": ("sona", "SonaConfig", "SonaLoop"),
    "training": (
        "training",
        "AdapterTrainer",
        "AdapterTrainingConfig",
        "LearningEvent",
        "LearningRateSchedule",
        "ReplayConfig",
        "TrainingConfig",
        "TrainingPipeline",
        "TrainingResult",
    ),
    "trust": ("trust", "Verification", "fingerprint", "sign", "verify"),
}


def __dir__() -> list[str]:
    """Names that are loaded already, and those that will be when they are used."""
    return sorted({*globals(), *__all__})


def __getattr__(name: str) -> object:
    """Rooms, and names from them, that are only loaded when they are used."""
    for room, names in _ROOMS.items():
        if name in names:
            import importlib

            module = importlib.import_module(f"microlora.{room}")
            return module if name == room else getattr(module, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
