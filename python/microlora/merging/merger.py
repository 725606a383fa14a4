"""Merging adapters without their base model: `merge` and `AdapterMerger`."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import microlora._core as _core
from microlora.adapter import Adapter
from microlora.exceptions import DTypeError
from microlora.merging.config import MergeConfig
from microlora.merging.parents import Parents, Source, described
from microlora.merging.plan import Plan
from microlora.merging.report import MergeReport
from microlora.progress import CancelToken, Progress

__all__ = ["AdapterMerger", "Merged", "merge"]

Sources = Mapping[str, Source] | Iterable[tuple[str, Source]]


class Merged(NamedTuple):
    """A merged adapter and what merging did to it."""

    adapter: Adapter
    report: MergeReport


def merge(
    adapters: Sources,
    method: str = "average",
    *,
    weights: Mapping[str, float] | str | None = None,
    density: float | None = None,
    lam: float | None = None,
    rank: int | None = None,
    seed: int | None = None,
    semantics: str = "exact",
    dtype: str | None = None,
    report: str = "default",
    t: float | None = None,
    epsilon: float | None = None,
    gamma: float | None = None,
    rho: float | None = None,
    normalize: bool | None = None,
    majority: str | None = None,
    missing: str = "skip",
    statistics: Mapping[str, Any] | None = None,
    overrides: Mapping[str, Mapping[str, Any]] | None = None,
    metric: str | None = None,
    progress: Progress | None = None,
    cancel: CancelToken | None = None,
) -> Merged:
    """Merges adapters of one base model into one, on their deltas ``D_i = s_i B_i A_i``; no base is needed.

    Args:
        adapters: ``{name: adapter}`` or pairs of these: an :class:`Adapter`, a :class:`MicroLoRA` (as it
            stands now) or the path of a file. Ranks, alphas, dtypes and sets of modules may differ.
        method: A name of the table in docs/merging.md.
        weights: See :class:`MergeConfig`, as for all that follows up to ``missing``.
        density: Share of the entries that is kept.
        lam: Factor of the result.
        rank: Rank of every merged module.
        seed: Seed of random masks; the same on every machine and for every number of threads.
        semantics: ``"exact"``, ``"mergekit"`` or ``"peft"``.
        dtype: How results are stored.
        report: ``"default"``, or ``"full"`` for the rate of sign conflicts too.
        t: Place between two adapters.
        epsilon: Spread of keep probabilities.
        gamma: Share of the largest entries that is dropped.
        rho: Share of the off-diagonal part of Grams.
        normalize: Divide by the sum of weights.
        majority: How signs are elected.
        missing: What to do with modules that not every adapter has.
        statistics: What ``"regmean"`` and ``"fisher"`` know of the parents, ``{name: source}``: an
            :class:`EwcPlusPlus`, the path of its file or of the adapter beside it, ``{module: Gram}``, or
            ``{module: (a, c)}``. None takes the files beside parents that were given by path.
        overrides: Settings of single modules by pattern.
        metric: Which metric ``weights="performance"`` goes by.
        progress: Called with ``(done, total, what)`` between modules and between parts of large ones.
        cancel: A token looked at there.

    Returns:
        The merged adapter and its :class:`MergeReport`. Its metadata name its parents, its description holds
        the settings.

    Raises:
        ConfigError: A setting out of its range or without a meaning for the method; weights that do not fit
            the adapters; no modules in common; other base weights.
        ShapeError: Modules of one name with different widths.
        NonFiniteError: NaN or infinity in an adapter or in the result.
        UnsupportedVariantError: A file of an adapter to a modified base (PiSSA and so on).
        FormatError: A file that is no adapter.
        CancelledError: The token was set. No error changes an adapter.

    Example:
        >>> import numpy as np, microlora as ml
        >>> r = np.random.default_rng(0)
        >>> def one():
        ...     a, b = r.standard_normal((2, 8)), r.standard_normal((6, 2))
        ...     return ml.Adapter.from_factors({"q_proj": (a, b)}, alpha=2.0)
        >>> merged, report = ml.merge({"a": one(), "b": one()}, method="linear", weights={"a": 0.7, "b": 0.3})
        >>> merged.info("q_proj").rank, report["q_proj"].error
        (4, 0.0)
    """
    config = MergeConfig(
        method=method,
        weights=weights,
        density=density,
        lam=lam,
        rank=rank,
        seed=seed,
        semantics=semantics,
        dtype=dtype,
        report=report,
        t=t,
        epsilon=epsilon,
        gamma=gamma,
        rho=rho,
        normalize=normalize,
        majority=majority,
        missing=missing,
        metric=metric,
        overrides=overrides or (),
    )
    return AdapterMerger(config).merge(adapters, statistics=statistics, progress=progress, cancel=cancel)


class AdapterMerger:
    """Merges by one :class:`MergeConfig`, as often as wanted.

    Args:
        config: How.

    Raises:
        DTypeError: Not a MergeConfig.
    """

    __slots__ = ("_config",)

    def __init__(self, config: MergeConfig) -> None:
        if not isinstance(config, MergeConfig):
            raise DTypeError(f"config: got {type(config).__name__}, expected a MergeConfig")
        self._config = config

    @property
    def config(self) -> MergeConfig:
        """How it merges."""
        return self._config

    def __repr__(self) -> str:
        return f"AdapterMerger({self._config!r})"

    def merge(
        self,
        adapters: Sources,
        *,
        statistics: Mapping[str, Any] | None = None,
        progress: Progress | None = None,
        cancel: CancelToken | None = None,
    ) -> Merged:
        """Merges adapters; see :func:`merge`."""
        if cancel is not None:
            cancel.raise_if_cancelled("merge")
        plan = Plan(self._config, Parents.of(adapters), statistics)
        core, report = _core.merge_adapters(plan.rows, plan.statistics, plan.to_json(), progress, cancel)
        metadata = plan.parents.metadata().replace(recipe=json.dumps({"merge": self._config.to_dict()}))
        made = described(core, metadata, f"merge {self._config.to_json()}")
        document = {**json.loads(report), "notes": plan.notes()}
        return Merged(made, MergeReport.from_dict(document))
