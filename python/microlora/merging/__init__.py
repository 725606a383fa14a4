"""Merging, resizing, comparing and composing adapters, without their base model.

Everything acts on the weight changes ``D = s B A`` themselves, in factor space wherever the mathematics
allows.
"""

from microlora.merging.compose import compose_parallel, compose_sequential
from microlora.merging.config import MergeConfig
from microlora.merging.difference import DiffReport, ModuleDiff, diff
from microlora.merging.extracting import Extracted, extract
from microlora.merging.merger import AdapterMerger, Merged, merge
from microlora.merging.methods import Method, methods
from microlora.merging.performance import performance_weights
from microlora.merging.report import MergeReport, ModuleReport
from microlora.merging.resizing import Resized, resize
from microlora.merging.routed import RoutedEnsemble
from microlora.merging.router import CentroidRouter, Router
from microlora.merging.statistics import Statistics

__all__ = [
    "AdapterMerger",
    "CentroidRouter",
    "DiffReport",
    "Extracted",
    "MergeConfig",
    "MergeReport",
    "Merged",
    "Method",
    "ModuleDiff",
    "ModuleReport",
    "Resized",
    "RoutedEnsemble",
    "Router",
    "Statistics",
    "compose_parallel",
    "compose_sequential",
    "diff",
    "extract",
    "merge",
    "methods",
    "performance_weights",
    "resize",
]
