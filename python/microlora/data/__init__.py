"""Data to learn from: samples, datasets, their files, synthetic tasks and the preparation of raw sources."""

from microlora.data.dataset import AdapterDataset
from microlora.data.filters import Duplicates, Length, NearDuplicateEmbeddings, NearDuplicates, Score
from microlora.data.manager import DataSource, TrainingDataManager
from microlora.data.optimum import Optimum
from microlora.data.reader import verify
from microlora.data.report import PrepareReport, Stage
from microlora.data.sample import TrainingSample
from microlora.data.stats import DatasetStats
from microlora.data.synthetic import TASKS, SyntheticDataGenerator, TaskSpec
from microlora.data.tables import read_csv, read_jsonl, read_parquet, write_jsonl
from microlora.data.variations import CharacterNoise, EmbeddingNoise, TemplateParaphrase, WordDropout
from microlora.data.writer import DatasetWriter

__all__ = [
    "TASKS",
    "AdapterDataset",
    "CharacterNoise",
    "DataSource",
    "DatasetStats",
    "DatasetWriter",
    "Duplicates",
    "EmbeddingNoise",
    "Length",
    "NearDuplicateEmbeddings",
    "NearDuplicates",
    "Optimum",
    "PrepareReport",
    "Score",
    "Stage",
    "SyntheticDataGenerator",
    "TaskSpec",
    "TemplateParaphrase",
    "TrainingDataManager",
    "TrainingSample",
    "WordDropout",
    "read_csv",
    "read_jsonl",
    "read_parquet",
    "verify",
    "write_jsonl",
]
