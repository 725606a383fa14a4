"""What a dataset is made of, in numbers."""

from __future__ import annotations

import dataclasses
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from microlora.data.dataset import AdapterDataset

__all__ = ["DatasetStats"]

BINS = 10


@dataclass(frozen=True)
class DatasetStats:
    """Counts and sizes of a dataset; those of quality, tokens and so on are of its training part.

    Attributes:
        examples: Samples to train on.
        validation: Samples held out, 0 where there are none.
        in_features: Width of the inputs, or None.
        out_features: Width of targets or feedback, or None.
        kind: ``"targets"``, ``"labels"``, ``"feedback"`` or ``"none"``.
        quality_mean: Mean quality, NaN for no samples.
        quality_min: Lowest quality.
        quality_max: Highest quality.
        quality_histogram: Samples with a quality in ``[0, 0.1)``, ``[0.1, 0.2)`` ... ``[0.9, 1]``.
        weight_sum: Sum of the weights.
        domains: Samples of each domain, most first; the key is empty for those without one.
        sessions: Different sessions.
        labels: Samples of each label, by label.
        variations: Samples that are variations of others.
        tokens: Sum of the token counts that are known.
        latency_ms_mean: Mean of the latencies that are known, NaN for none.
        array_bytes: Bytes of inputs and targets of this part.
    """

    examples: int
    validation: int
    in_features: int | None
    out_features: int | None
    kind: str
    quality_mean: float
    quality_min: float
    quality_max: float
    quality_histogram: tuple[int, ...]
    weight_sum: float
    domains: dict[str, int]
    sessions: int
    labels: dict[int, int]
    variations: int
    tokens: int
    latency_ms_mean: float
    array_bytes: int

    @classmethod
    def of(cls, dataset: AdapterDataset) -> DatasetStats:
        """Count a dataset; reads its texts once, not its embeddings."""
        columns, rows = dataset.columns, dataset.rows
        quality, latency = columns.quality[rows], columns.latency_ms[rows]
        tokens, known = columns.token_count[rows], ~np.isnan(latency)
        labels = [] if columns.labels is None else columns.labels[rows].tolist()
        some = len(rows) > 0
        widths = (columns.in_features or 0) + (0 if columns.targets is None else columns.targets.shape[1])
        held = dataset.validation
        return cls(
            examples=len(rows),
            validation=0 if held is None else len(held),
            in_features=columns.in_features,
            out_features=columns.out_features,
            kind=columns.kind,
            quality_mean=float(quality.mean()) if some else float("nan"),
            quality_min=float(quality.min()) if some else float("nan"),
            quality_max=float(quality.max()) if some else float("nan"),
            quality_histogram=tuple(np.histogram(quality, BINS, (0.0, 1.0))[0].tolist()),
            weight_sum=float(columns.weight[rows].sum()),
            domains=dict(Counter(str(name) for name in dataset.texts("domain")).most_common()),
            sessions=len({name for name in dataset.texts("session_id") if name}),
            labels=dict(sorted(Counter(labels).items())),
            variations=sum(1 for name in dataset.texts("parent_id") if name),
            tokens=int(tokens[tokens >= 0].sum()),
            latency_ms_mean=float(latency[known].mean()) if known.any() else float("nan"),
            array_bytes=4 * len(rows) * widths,
        )

    def to_dict(self) -> dict[str, Any]:
        """A plain dict."""
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        shown = dict(list(self.domains.items())[:8])
        lines = (
            f"examples    {self.examples} to train on, {self.validation} held out",
            f"widths      {self.in_features} -> {self.out_features}, {self.kind}",
            f"quality     mean {self.quality_mean:.3f}, {self.quality_min:.3f} to {self.quality_max:.3f}",
            f"histogram   {' '.join(map(str, self.quality_histogram))}",
            f"domains     {', '.join(f'{name or None}: {n}' for name, n in shown.items()) or None}",
            f"sessions    {self.sessions}, variations {self.variations}, tokens {self.tokens}",
            f"labels      {', '.join(f'{name}: {n}' for name, n in self.labels.items()) or None}",
        )
        return "\n".join(lines)
