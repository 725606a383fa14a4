"""One table of rows: every type on adapters of which it can hold every factor, and on adapters as they are.

Widths of 784 pixels and 10 classes are no whole blocks. On `whole` adapters both are filled up with zeros to
the next multiple of 256 (the network's outputs stay the same): nothing falls back, so the types are judged.
`as it is` shows what happens to the same adapters without that.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

#: Splits, starts and batches of a run.
SEEDS = (10, 11, 12, 13, 14)
#: Task of the continual-learning plan that the adapter is for: 90 degrees.
DOMAIN = 2
WHOLE, AS_IT_IS, SEARCHED = "whole", "as it is", "searched"


@dataclass(frozen=True)
class Row:
    """One way to store the adapter.

    Attributes:
        name: On the command line and in files.
        group: Which adapters: with widths filled up, or as they are.
        title: What the table calls it.
        kind: Type or recipe of `microlora.quantize`.
        target_error: Instead of a type.
        change: Largest change of accuracy that is accepted (mean over seeds), in points.
        error: Largest relative error of the weight changes that is accepted (mean over seeds).
    """

    name: str
    group: str
    title: str
    kind: str | None = None
    target_error: float | None = None
    change: float | None = None
    error: float | None = None

    @property
    def settings(self) -> dict[str, Any]:
        """What the result depends on besides its seed."""
        return {"group": self.group, "type": self.kind, "target_error": self.target_error}


def _row(group: str, kind: str, **targets: float) -> Row:
    return Row(f"{group} {kind}", group, f"`{kind}`", kind, **targets)


_ROWS = (
    *(_row(WHOLE, kind) for kind in ("f32", "f16", "bf16")),
    _row(WHOLE, "q8_0", change=0.3, error=0.01),
    _row(WHOLE, "q6_k", change=0.3, error=0.03),
    _row(WHOLE, "q5_k"),
    _row(WHOLE, "q4_k_m"),
    _row(WHOLE, "q4_k", change=0.8, error=0.11),
    _row(WHOLE, "q4_1"),
    _row(WHOLE, "q4_0"),
    *(_row(AS_IT_IS, kind) for kind in ("q8_0", "q6_k", "q4_k_m", "q4_k", "q4_0")),
    *(
        Row(f"{SEARCHED} {target}", SEARCHED, f"`target_error={target}`", None, target)
        for target in (0.005, 0.02, 0.05)
    ),
)
#: Every row by name, in the order of the table.
ROWS = {row.name: row for row in _ROWS}
