"""What the doctor found: a value to print, to send as JSON, or to draw."""

from __future__ import annotations

import json
import math
import os
import textwrap
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from microlora.doctor.names import shown

__all__ = ["SEVERITIES", "Finding", "ModuleRow", "Report"]

#: From worst to least.
SEVERITIES = ("error", "warning", "info")
#: Lines of the table of modules that are printed.
MOST_ROWS = 12


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong, or worth knowing.

    Attributes:
        severity: ``"error"`` (it will not load, or not do what it should), ``"warning"`` or ``"info"``.
        code: A short name that stays.
        message: What was seen.
        where: Tensors, modules, settings or files that show it.
        todo: What to do about it.
        repair: ``"yes"`` (``fix=`` removes it), ``"asked"`` (with its code in ``also=``) or ``"no"``.
    """

    severity: str
    code: str
    message: str
    where: tuple[str, ...]
    todo: str
    repair: str = "no"

    def __str__(self) -> str:
        """What, where, and what to do, within 110 columns where names allow it."""
        way = {"yes": " [fix= does]", "asked": f" [fix= does with also={self.code!r}]"}.get(self.repair, "")
        lines = _wrapped(f"{self.code}: {self.message}", f"{self.severity:<8}")
        places = [place for place in self.where if place not in self.message]
        if places:
            lines += [f"        in {shown(places, 1 if len(places[0]) > 40 else 3)}"]
        return "\n".join([*lines, *_wrapped(f"-> {self.todo}{way}", " " * 8)])

    @property
    def line(self) -> str:
        """The message with its places."""
        return f"{self.message}: {shown(self.where)}" if self.where else self.message


@dataclass(frozen=True)
class ModuleRow:
    """One module. Norms are Frobenius norms in float64, of the numbers that are finite.

    Attributes:
        path: Module path, without PEFT's prefix.
        kind: ``"linear"``, ``"embedding"``, ``"conv"`` or ``"experts"``.
        rank: Rank by the tensors, None where they contradict or one is missing.
        alpha: Scaling numerator, None where the file names none.
        scaling: ``alpha / rank``, or ``alpha / sqrt(rank)`` with rsLoRA.
        use_rslora: Whether it is rsLoRA.
        dtype: Element type as it is stored, or both (``"F32/F16"``, ``"Q8_0/F16"``).
        norm_a: ``|A|``; None where it is missing.
        norm_b: ``|B|``.
        norm_delta: ``|s B A|`` from Gram matrices; None where it cannot be told.
        nonfinite: Numbers that are NaN or infinite.
    """

    path: str
    kind: str
    rank: int | None
    alpha: float | None
    scaling: float | None
    use_rslora: bool
    dtype: str
    norm_a: float | None
    norm_b: float | None
    norm_delta: float | None
    nonfinite: int


@dataclass(frozen=True)
class Report:
    """What :func:`microlora.inspect` found. ``print(report)`` shows it.

    Attributes:
        path: What was looked at.
        format: Name of the format, ``"unknown"`` where no reader knows it.
        base_model: Base model that the file names; empty where it names none.
        tensors: Number of tensors.
        data_bytes: Bytes of all tensors.
        modules: A row per module.
        findings: Worst first.
        weights_sha256: Fingerprint that the header claims; ``weights_changed`` is a finding where it lies.
        parents: Adapters that it was made from, where the metadata names them.
        recipe: How it was made of them, where the metadata says it.
        compared: What of it was held against the base model, and what that is; empty without one.
        fixed: Where the repaired copy lies; empty without ``fix=``.
        repairs: What the copy differs in; empty where nothing was to be repaired.
    """

    path: str
    format: str
    base_model: str
    tensors: int
    data_bytes: int
    modules: tuple[ModuleRow, ...]
    findings: tuple[Finding, ...]
    weights_sha256: str = ""
    parents: tuple[str, ...] = ()
    recipe: str = ""
    compared: str = ""
    fixed: str = ""
    repairs: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether nothing was found that is an error."""
        return not any(f.severity == "error" for f in self.findings)

    @property
    def codes(self) -> tuple[str, ...]:
        """Codes of the findings, each once."""
        return tuple(dict.fromkeys(f.code for f in self.findings))

    def count(self, severity: str) -> int:
        """How many findings of a severity there are."""
        return sum(f.severity == severity for f in self.findings)

    def to_dict(self) -> dict[str, Any]:
        """A plain dict that JSON can hold; numbers that are not finite are None."""
        out = asdict(self)
        out["ok"] = self.ok
        out["modules"] = [
            {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
            for row in out["modules"]
        ]
        return out

    def to_json(self, indent: int | None = None) -> str:
        """JSON text of :meth:`to_dict`."""
        return json.dumps(self.to_dict(), indent=indent, allow_nan=False)

    def __str__(self) -> str:
        """Facts, a table of modules, findings, and repairs."""
        base = f", base {self.base_model}" if self.base_model else ""
        lines = [
            f"{self.path}: {self.format}{base}, {_many(len(self.modules), 'module')}, "
            f"{_many(self.tensors, 'tensor')}, {self.data_bytes:,} bytes"
        ]
        if self.modules:
            lines += ["", *_table(self.modules)]
        if self.compared:
            lines += ["", *_wrapped(f"compared with {self.compared}", "")]
        lines.append("")
        lines += [str(f) for f in self.findings] or ["nothing was found"]
        counts = ", ".join(_many(self.count(s), s) for s in SEVERITIES if self.count(s))
        if counts:
            lines += ["", f"{'sound' if self.ok else 'broken'}: {counts}"]
        if self.fixed and not self.repairs:
            lines += ["", f"nothing was to be repaired: {self.fixed} is a copy of the tensors and settings"]
        elif self.fixed:
            lines += [
                "",
                f"repaired copy: {self.fixed}",
                *(t for r in self.repairs for t in _wrapped(r, "  ")),
            ]
        return "\n".join(lines)

    def plot(self, path: str | os.PathLike[str]) -> None:
        """A map of norms: a row per kind of layer, a column per layer, its colour ``|delta|``.

        Layers of zero delta and those with NaN are marked.

        Args:
            path: PNG, SVG or PDF by its ending; written through a temporary sibling and a rename.

        Raises:
            MissingExtraError: matplotlib is not installed.
            ConfigError: Another ending, or no module to draw.
            MissingPathError: The folder of ``path`` is not there.
            OSError: The file cannot be written.
        """
        from microlora.doctor.plot import draw

        draw(self, path)


def _wrapped(text: str, head: str) -> list[str]:
    return textwrap.wrap(
        text, 110, initial_indent=head, subsequent_indent=" " * len(head), break_long_words=False
    )


def _many(n: int, what: str) -> str:
    return f"{n:,} {what}{'' if n == 1 or what == 'info' else 's'}"


def _number(value: float | None) -> str:
    return "?" if value is None else f"{value:.4g}"


def _table(modules: Sequence[ModuleRow]) -> list[str]:
    from microlora.merging.report import aligned

    head = ["module", "kind", "rank", "alpha", "scaling", "dtype", "|A|", "|B|", "|delta|", "NaN/Inf"]
    rows = []
    for m in modules if len(modules) <= MOST_ROWS else modules[: MOST_ROWS - 1]:
        scaling = _number(m.scaling) + (" rs" if m.use_rslora else "")
        row = [m.path, m.kind, "?" if m.rank is None else str(m.rank), _number(m.alpha), scaling, m.dtype]
        row += [_number(v) for v in (m.norm_a, m.norm_b, m.norm_delta)]
        rows.append([*row, str(m.nonfinite) if m.nonfinite else ""])
    lines = aligned(head, rows, text=2)
    if len(modules) > MOST_ROWS:
        lines.append(f"... and {len(modules) - MOST_ROWS + 1} more")
    return lines
