"""The settings of the LSA encoder, checked."""

from __future__ import annotations

import math
from dataclasses import dataclass

from microlora.exceptions import ConfigError

__all__ = ["LsaSettings"]


@dataclass(frozen=True, slots=True)
class LsaSettings:
    """Settings of an `LsaEncoder`, which documents them."""

    dim: int
    buckets: int
    title_weight: float
    gram_weight: float
    min_documents: int
    power: int
    oversample: int
    seed: int

    def check(self) -> None:
        """Refuse what cannot be meant."""
        for name, least, most in (
            ("dim", 1, 65_536),
            ("buckets", 1, 1 << 24),
            ("min_documents", 1, 1 << 31),
            ("power", 0, 16),
            ("oversample", 0, 1024),
            ("seed", 0, (1 << 63) - 1),
        ):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
                raise ConfigError(f"{name} is {value!r}; an integer from {least} to {most} is wanted")
        for name in ("title_weight", "gram_weight"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise ConfigError(f"{name} is {value!r}; a number is wanted")
            if not (math.isfinite(value) and value >= 0):
                raise ConfigError(f"{name} is {value!r}; a finite number of at least 0 is wanted")
