"""Weights from what was measured: better adapters count more."""

from __future__ import annotations

import re
from collections.abc import Mapping
from itertools import pairwise

from microlora.adapter import Adapter
from microlora.exceptions import ConfigError
from microlora.metadata import Metric

__all__ = ["LOWER_IS_BETTER", "performance_weights"]

#: A metric with one of these words in its name (``val_loss``, ``testMSE``) is better the lower it is.
LOWER_IS_BETTER = (
    *("loss", "error", "perplexity", "ppl", "nll", "crossentropy", "mse", "rmse", "mae", "mape"),
    *("wer", "cer", "eer", "ece", "brier", "bpc", "bpb", "deviance", "divergence", "distance"),
    "regret",
)
_LONG = tuple(word for word in LOWER_IS_BETTER if len(word) > 3 and word not in ("rmse", "mape"))


def performance_weights(adapters: Mapping[str, Adapter], metric: str | None = None) -> dict[str, float]:
    """Weights in proportion to a metric that all adapters have, of the same data; they sum to 1.

    Where lower is better (a word of :data:`LOWER_IS_BETTER` in the name) in proportion to its inverse.

    Args:
        adapters: With metrics in their metadata.
        metric: Name of the metric; None where they have one in common.

    Raises:
        ConfigError: No such metric of the same data, several, or values that are not above 0.
    """
    tables = {name: _table(name, adapter.metadata.metrics) for name, adapter in adapters.items()}
    first, *others = tables.values()
    common = [key for key in first if all(key in table for table in others)]
    chosen = [key for key in common if metric in (None, key[0])]
    if len(chosen) != 1:
        raise ConfigError(_why(tables, common, chosen, metric))
    name, _ = key = chosen[0]
    values = {who: table[key] for who, table in tables.items()}
    for who, value in values.items():
        if value <= 0.0:
            raise ConfigError(
                f"weights: got {name} = {value:g} of {who!r}, expected a number above 0 for "
                "weights='performance'"
            )
    if _lower_is_better(name):
        best = min(values.values())  # keeps the inverses of very small values finite
        values = {who: best / value for who, value in values.items()}
    top = max(values.values())
    shares = {who: value / top for who, value in values.items()}
    total = sum(shares.values())
    return {who: value / total for who, value in shares.items()}


def _lower_is_better(name: str) -> bool:
    """By the name's words, in any spelling: snake_case, camelCase, upper case, plural."""
    words = [w.lower() for w in re.findall(r"[A-Z]+s?(?![a-z])|[A-Z]?[a-z]+", name)]
    words += [first + second for first, second in pairwise(words)]  # cross entropy
    stems = {*words, *(w.removesuffix("s") for w in words), *(w.removesuffix("es") for w in words)}
    return any(w in LOWER_IS_BETTER or w.endswith(_LONG) for w in stems)


def _table(name: str, metrics: tuple[Metric, ...]) -> dict[tuple[str, str], float]:
    out: dict[tuple[str, str], float] = {}
    for item in metrics:
        key = item.name, item.data_hash
        if out.setdefault(key, item.value) != item.value:
            raise ConfigError(
                f"weights: {name!r} has two values of {item.name} on the same data, expected one"
            )
    return out


def _why(
    tables: Mapping[str, Mapping[tuple[str, str], float]],
    common: list[tuple[str, str]],
    chosen: list[tuple[str, str]],
    metric: str | None,
) -> str:
    what = "a metric" if metric is None else f"the metric {metric!r}"
    if chosen:
        shown = ", ".join(f"{name} on data {data[:16]}" for name, data in chosen)
        way = "name one with metric=" if metric is None else "measure on one set of data only"
        return f"weights: got {len(chosen)} that all adapters have ({shown}), expected one: {way}"
    names = {who: {n for n, _ in table if metric in (None, n)} for who, table in tables.items()}
    without = [who for who, have in names.items() if not have]
    if without:
        return f"weights: got none in the metadata of {', '.join(map(repr, without))}, expected {what} in all"
    if set.intersection(*names.values()):
        return f"weights: got {what} measured on different data, expected the same data_hash in all adapters"
    have = "; ".join(f"{who!r}: {', '.join(sorted(n))}" for who, n in names.items())
    extra = f" (all have {', '.join(n for n, _ in common)})" if common else ""
    return f"weights: got {have}, expected {what} that all adapters have{extra}"
