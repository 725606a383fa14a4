"""Which type for which kind of adapter on which device, with the figures that are expected of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from microlora._checks import text, wrong
from microlora.quantizing.types import RECIPES, Pair

__all__ = ["QuantizationProfile", "quantization_profile"]


@dataclass(frozen=True)
class QuantizationProfile:
    """A recipe and what is expected of it. Expected, not measured: the report of a quantisation measures.

    Attributes:
        adapter_type: Kind of adapter, ``""`` where the profile is the default.
        device: Kind of device, ``""`` where the profile is the default.
        recipe: Name of a pair of types, such as ``"q4_k_m"``.
        quality_threshold: Least quality that is accepted. :func:`quantize` measures quality as one minus the
            relative error (of outputs where there are calibration inputs, else of weight changes).
        size_reduction: Expected share of a float16 adapter's bytes that is saved.
        inference_speed_gain: Expected speed of a forward, as a multiple of float32's.
    """

    adapter_type: str
    device: str
    recipe: str
    quality_threshold: float
    size_reduction: float
    inference_speed_gain: float

    @property
    def types(self) -> Pair:
        """Types of both factors, where their widths permit."""
        return RECIPES[self.recipe]


_ROWS = (
    QuantizationProfile("intent_classifier", "mobile", "q4_k_m", 0.85, 0.75, 2.0),
    QuantizationProfile("content_generator", "desktop", "q6_k", 0.95, 0.5, 1.3),
    QuantizationProfile("workflow_builder", "server", "q8_0", 0.98, 0.25, 1.1),
)
#: For every other pair: q6_k, the middle of the three, with its figures.
DEFAULT = QuantizationProfile("", "", "q6_k", 0.95, 0.5, 1.3)


def quantization_profile(adapter_type: str, device: str) -> QuantizationProfile:
    """The profile of a kind of adapter on a kind of device.

    Args:
        adapter_type: Such as ``"intent_classifier"``, ``"content_generator"`` or ``"workflow_builder"``.
        device: Such as ``"mobile"``, ``"desktop"`` or ``"server"``.

    Returns:
        The row of both names, in any letters (``IntentClassifier``, ``Mobile``); for every other pair
        ``q6_k``, with both names empty.

    Raises:
        ConfigError: A name that is no text, or empty, or the two in each other's place.
    """
    for field, value, of in (("adapter_type", adapter_type, "device"), ("device", device, "adapter_type")):
        if _name(field, value) in {_name(of, getattr(row, of)) for row in _ROWS}:
            want = f"no {of}: quantization_profile(adapter_type, device) has the two the other way round"
            raise wrong(field, value, want)
    names = (_name("adapter_type", adapter_type), _name("device", device))
    for row in _ROWS:
        if (row.adapter_type.replace("_", ""), row.device) == names:
            return row
    return DEFAULT


def _name(field: str, value: Any) -> str:
    return text(field, value, empty=False).lower().replace("_", "").replace("-", "").strip()
