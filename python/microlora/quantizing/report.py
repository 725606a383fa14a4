"""What a quantisation did to every module: measured, printable, JSON both ways."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from microlora.merging.documents import Record, Table
from microlora.merging.report import aligned

__all__ = ["QuantizationReport", "QuantizedModule"]


@dataclass(frozen=True)
class QuantizedModule(Record):
    """One quantised module.

    Attributes:
        name: The module.
        rank: Of the module.
        in_features: Width of A's rows.
        out_features: Width of B's rows.
        asked: Types that were asked for, of A and B; None where they were searched.
        types: Types that the factors have.
        delta_error: Relative Frobenius norm of what changed of the weight change.
        delta_norm: Frobenius norm of the weight change before.
        output_error: Relative root mean square of what changed of the outputs on the calibration inputs; None
            without inputs.
        output_norm: Root mean square (over rows) of the norm of the outputs before; None without inputs.
        bytes_before: Numbers of the factors as they were, without padding.
        bytes_after: Numbers and scales as they are, without padding.
    """

    name: str
    rank: int
    in_features: int
    out_features: int
    asked: tuple[str, str] | None
    types: tuple[str, str]
    delta_error: float
    delta_norm: float
    output_error: float | None
    output_norm: float | None
    bytes_before: int
    bytes_after: int

    @property
    def fell_back(self) -> tuple[str, ...]:
        """Factors that got another type than was asked for, because their width is not whole blocks."""
        if self.asked is None:
            return ()
        rows = zip(("lora_a", "lora_b"), self.asked, self.types, strict=True)
        return tuple(side for side, wanted, got in rows if wanted != got)


@dataclass(frozen=True)
class QuantizationReport(Table):
    """What a quantisation did. ``print(report)`` shows a table.

    Attributes:
        recipe: What was asked for, in words.
        modules: One row per module, in order.
        memory_before: Bytes resident of the adapter.
        memory_after: Bytes resident of the quantised adapter.
        target_error: What was to be kept, or None.
        reached_error: What was kept, or None where nothing was to be.
        measure: What the two are an error of: ``output``, ``delta`` or ``output and delta``; None without.
        quality_threshold: Least quality of the profile, or None.
    """

    _document: ClassVar[str] = "quantization report"
    _rows: ClassVar[type[Record]] = QuantizedModule

    recipe: str
    modules: tuple[QuantizedModule, ...]
    memory_before: int
    memory_after: int
    target_error: float | None = None
    reached_error: float | None = None
    measure: str | None = None
    quality_threshold: float | None = None

    @property
    def delta_error(self) -> float:
        """Relative Frobenius norm of what changed of all weight changes together."""
        return _together([(m.delta_error, m.delta_norm) for m in self.modules])

    @property
    def output_error(self) -> float | None:
        """The same of the outputs of the modules that have calibration inputs; None without any."""
        known = [(m.output_error, m.output_norm) for m in self.modules]
        rows = [(e, n) for e, n in known if e is not None and n is not None]
        return _together(rows) if rows else None

    @property
    def quality(self) -> float:
        """One minus the error of outputs, or of weight changes where there are no calibration inputs."""
        output = self.output_error
        return 1.0 - (self.delta_error if output is None else output)

    @property
    def bytes_before(self) -> int:
        """Numbers of all factors as they were, without padding."""
        return sum(m.bytes_before for m in self.modules)

    @property
    def bytes_after(self) -> int:
        """Numbers and scales of all factors as they are, without padding."""
        return sum(m.bytes_after for m in self.modules)

    @property
    def size_reduction(self) -> float:
        """Share of the resident bytes that is saved."""
        return 1.0 - self.memory_after / self.memory_before if self.memory_before else 0.0

    def bytes_by_type(self) -> dict[tuple[str, str], tuple[int, int, int]]:
        """``{(type of A, type of B): (modules, bytes before, bytes after)}``."""
        out: dict[tuple[str, str], tuple[int, int, int]] = {}
        for m in self.modules:
            n, before, after = out.get(m.types, (0, 0, 0))
            out[m.types] = (n + 1, before + m.bytes_before, after + m.bytes_after)
        return out

    def __str__(self) -> str:
        """A table that fits 110 columns, with totals and notes below it."""
        outputs = any(m.output_error is not None for m in self.modules)
        head = ["module", "A", "B", "rank", "delta error", *(["output error"] if outputs else [])]
        head += ["bytes before", "after", "share"]
        rows = []
        for m in self.modules:
            marks = [
                t + ("*" if s in m.fell_back else "")
                for s, t in zip(("lora_a", "lora_b"), m.types, strict=True)
            ]
            row = [m.name, *marks, str(m.rank), f"{m.delta_error:.4f}"]
            row += [("" if m.output_error is None else f"{m.output_error:.4f}")] if outputs else []
            share = m.bytes_after / m.bytes_before if m.bytes_before else 1.0
            rows.append([*row, f"{m.bytes_before:,}", f"{m.bytes_after:,}", f"{share:.0%}"])
        lines = aligned(head, rows, text=3)
        said = "" if self.output_error is None else f", output error {self.output_error:.4f}"
        lines.append(
            f"{self.recipe}: delta error {self.delta_error:.4f}{said}; resident {self.memory_before:,} -> "
            f"{self.memory_after:,} bytes ({self.size_reduction:.0%} saved)"
        )
        if self.target_error is not None and self.reached_error is not None:
            lines.append(
                f"{self.measure} error wanted {self.target_error:g}, reached {self.reached_error:.4g}"
            )
        if self.quality_threshold is not None:
            verdict = "met" if self.quality >= self.quality_threshold else "MISSED"
            lines.append(f"quality wanted {self.quality_threshold:g}, measured {self.quality:.4f}: {verdict}")
        if any(m.fell_back for m in self.modules):
            lines.append("* the width is not whole blocks of the type asked for, so another one was taken")
        return "\n".join(lines)


def _together(rows: list[tuple[float, float]]) -> float:
    """Relative error of several parts from each one's relative error and size."""
    total = math.fsum(size * size for _, size in rows)
    off = math.fsum((error * size) ** 2 for error, size in rows)
    return math.sqrt(off / total) if total > 0 else 0.0
