"""How much a file may ask for before it is refused."""

from __future__ import annotations

from dataclasses import dataclass

from microlora._checks import integer
from microlora.exceptions import ConfigError

__all__ = ["Limits"]

# What safetensors itself permits.
MOST_HEADER_BYTES = 100_000_000


@dataclass(frozen=True)
class Limits:
    """Bounds on what is read; every reader checks them before it takes memory.

    Attributes:
        header_bytes: Bytes of a header (of safetensors its JSON, of GGUF all before the data, of ``.npz`` its
            directory); the default is the most that safetensors permits, and cannot be raised.
        tensors: Tensors in one file.
        total_bytes: Bytes of one file that is copied to memory; a larger one can be mapped.
        rank: Rank of one module.

    Raises:
        ConfigError: names the field.
    """

    header_bytes: int = MOST_HEADER_BYTES
    tensors: int = 1 << 20
    total_bytes: int = 64 << 30
    rank: int = 1 << 20

    def __post_init__(self) -> None:
        for name in ("header_bytes", "tensors", "total_bytes", "rank"):
            most = MOST_HEADER_BYTES if name == "header_bytes" else 2**63 - 1
            object.__setattr__(self, name, integer(f"limits.{name}", getattr(self, name), 1, most))

    def as_tuple(self) -> tuple[int, int, int, int]:
        """The fields in the order that the core takes."""
        return self.header_bytes, self.tensors, self.total_bytes, self.rank

    @classmethod
    def of(cls, value: Limits | None) -> Limits:
        """The value, or the defaults for None.

        Raises:
            ConfigError: Anything else.
        """
        if value is not None and not isinstance(value, Limits):
            raise ConfigError(f"limits: got {type(value).__name__}, expected microlora.Limits or None")
        return value or cls()
