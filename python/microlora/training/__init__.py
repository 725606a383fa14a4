"""Training: settings, the pipeline for streams, the trainer for datasets, and events.

`TrainingPipeline` takes samples as they come; `AdapterTrainer` goes through a dataset with validation, early
stopping and checkpoints. Both make the same optimiser steps, and both hold on to earlier tasks by EWC, the
trainer also by replay.
"""

from microlora._core import Optimizer, ReplayMemory, evaluate
from microlora.training.breakthrough import BreakthroughDetector, check_breakthrough
from microlora.training.callbacks import EpochEvent, StepsEvent, ValidationEvent
from microlora.training.config import AdapterTrainingConfig, TrainingConfig
from microlora.training.early_stopping import EarlyStopping
from microlora.training.events import EventOutcome, EventStats, LearningEvent
from microlora.training.optimizers import OPTIMIZERS, SGD, AdamW, Momentum
from microlora.training.pipeline import BatchOutcome, PipelineStats, StepOutcome, TrainingPipeline
from microlora.training.replay import ReplayConfig
from microlora.training.result import EpochRecord, TrainingHistory, TrainingResult, ValidationRecord
from microlora.training.schedule import SCHEDULES, LearningRateSchedule
from microlora.training.trainer import AdapterTrainer

__all__ = [
    "OPTIMIZERS",
    "SCHEDULES",
    "SGD",
    "AdamW",
    "AdapterTrainer",
    "AdapterTrainingConfig",
    "BatchOutcome",
    "BreakthroughDetector",
    "EarlyStopping",
    "EpochEvent",
    "EpochRecord",
    "EventOutcome",
    "EventStats",
    "LearningEvent",
    "LearningRateSchedule",
    "Momentum",
    "Optimizer",
    "PipelineStats",
    "ReplayConfig",
    "ReplayMemory",
    "StepOutcome",
    "StepsEvent",
    "TrainingConfig",
    "TrainingHistory",
    "TrainingPipeline",
    "TrainingResult",
    "ValidationEvent",
    "ValidationRecord",
    "check_breakthrough",
    "evaluate",
]
