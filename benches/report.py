"""The table: rows of ratios with their targets, as text, Markdown and JSON."""

from __future__ import annotations

import platform
from dataclasses import asdict, dataclass
from importlib import metadata
from typing import Any

import numpy as np

import microlora._core as core


@dataclass(frozen=True)
class Row:
    """One comparison.

    Attributes:
        work: What was measured.
        ours: Our figure, with its unit.
        peer: The peer and its figure.
        ratio: How many times better than the peer (or the share of a limit).
        target: What the ratio should at least be; ``None`` for rows that only inform.
        error: Largest relative difference to float64, where numbers came out.
    """

    work: str
    ours: str
    peer: str
    ratio: float | None = None
    target: float | None = None
    error: float | None = None
    #: Rows where less is better: the ratio must stay below the target.
    below: bool = False
    #: Shown on the README's first screen.
    headline: bool = False

    @property
    def verdict(self) -> str:
        """``ok``, ``MISSED`` or nothing."""
        if self.ratio is None or self.target is None:
            return ""
        met = self.ratio <= self.target if self.below else self.ratio >= self.target
        return "ok" if met else "MISSED"


def machine() -> dict[str, Any]:
    """What the figures were measured on and with."""
    cpu = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as f:
            info = dict(line.split(":", 1) for line in f.read().split("\n\n")[0].splitlines() if ":" in line)
        fields = {k.strip(): v.strip() for k, v in info.items()}
        cpu = f"{fields['model name']} (family {fields['cpu family']}, model {fields['model']})"
    except (OSError, KeyError, ValueError):
        pass
    versions = {}
    for name in ("torch", "peft"):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "not installed"
    return {
        "cpu": cpu,
        "isa": core.isa(),
        "microlora": core.__version__,
        "python": platform.python_version(),
        "numpy": np.__version__,
        **versions,
    }


def duration(ns: float) -> str:
    """Nanoseconds in a readable unit."""
    if ns < 1e4:
        return f"{ns:,.0f} ns"
    if ns < 1e6:
        return f"{ns / 1e3:,.1f} us"
    return f"{ns / 1e6:,.2f} ms" if ns < 1e9 else f"{ns / 1e9:,.2f} s"


class Report:
    """Collects rows."""

    def __init__(self) -> None:
        self.rows: list[Row | str] = []

    def section(self, title: str) -> None:
        """Starts a section."""
        self.rows.append(title)
        print(f"... {title}", flush=True)

    def add(self, *args: Any, **kwargs: Any) -> None:
        """Adds a :class:`Row`."""
        self.rows.append(Row(*args, **kwargs))

    def as_dicts(self) -> list[dict[str, Any]]:
        """Rows for JSON, each with its section."""
        out, title = [], ""
        for row in self.rows:
            if isinstance(row, str):
                title = row
            else:
                out.append({"section": title, **asdict(row), "verdict": row.verdict})
        return out

    def _cells(self, row: Row) -> list[str]:
        ratio = "" if row.ratio is None else f"{row.ratio:.2f}x"
        target = "" if row.target is None else f"{'<=' if row.below else '>='} {row.target:g}x"
        error = "" if row.error is None else f"{row.error:.0e}"
        return [row.work, row.ours, row.peer, ratio, target, row.verdict, error]

    HEAD = ("work", "ours", "peer", "ratio", "target", "", "error")

    def text(self) -> str:
        """Aligned columns."""
        cells = [self._cells(r) for r in self.rows if isinstance(r, Row)]
        widths = [max(len(c[i]) for c in [list(self.HEAD), *cells]) for i in range(len(self.HEAD))]
        line = lambda c: "  ".join(v.ljust(w) for v, w in zip(c, widths, strict=True)).rstrip()  # noqa: E731
        out = [line(self.HEAD)]
        for row in self.rows:
            out.append(f"\n[{row}]" if isinstance(row, str) else line(self._cells(row)))
        return "\n".join(out)

    def markdown(self, facts: dict[str, Any]) -> str:
        """A Markdown table per section, with the machine above."""
        out = ["Measured on " + ", ".join(f"{k} {v}" for k, v in facts.items()) + ".", ""]
        for row in self.rows:
            if isinstance(row, str):
                out += [
                    "",
                    f"**{row}**",
                    "",
                    "| " + " | ".join(self.HEAD) + " |",
                    "|---" * len(self.HEAD) + "|",
                ]
            else:
                out.append("| " + " | ".join(self._cells(row)) + " |")
        return "\n".join(out) + "\n"
