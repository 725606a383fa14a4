"""Quantised adapters: types by name, by profile or by error budget, measured."""

from microlora.quantizing.make import Quantization, quantize
from microlora.quantizing.profiles import QuantizationProfile, quantization_profile
from microlora.quantizing.report import QuantizationReport, QuantizedModule

__all__ = [
    "Quantization",
    "QuantizationProfile",
    "QuantizationReport",
    "QuantizedModule",
    "quantization_profile",
    "quantize",
]
