"""Merging adapters without their base model: `merge` and `AdapterMerger`."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

import microlora._core as _core
from microlora._checks import check_keys, near
from microlora.adapter import Adapter
from microlora.exceptions import ConfigError, DTypeError
from microlora.merging.config import PERFORMANCE, MergeConfig
from microlora.merging.methods import Method
from microlora.merging.methods import method as method_of
from microlora.merging.parents import Parents, Source, described
from microlora.merging.performance import performance_weights
from microlora.merging.report import MergeReport
from microlora.merging.statistics import Statistics, beside, for_core, statistics_of
from microlora.progress import CancelToken, Progress

__all__ = ["AdapterMerger", "Merged", "merge"]

Sources = Mapping[str, Source] | Iterable[tuple[str, Source]]


class Merged(NamedTuple):
    """A merged adapter and what merging did to it."""

    adapter: Adapter
    report: MergeReport


def merge(
    adapters: Sources,
    *,
    method: str = "average",
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
        plan = _Plan(self._config, Parents.of(adapters), statistics)
        core, report = _core.merge_adapters(plan.rows, plan.statistics, plan.to_json(), progress, cancel)
        made = described(core, plan.parents.metadata(), f"merge {self._config.to_json()}")
        notes = plan.parents.notes()
        document = json.loads(report)
        return Merged(made, MergeReport.from_dict({**document, "notes": notes}))


class _Plan:
    """What the core is told, every default and override resolved, and everything checked."""

    def __init__(self, config: MergeConfig, parents: Parents, statistics: Mapping[str, Any] | None) -> None:
        self.config, self.parents = config, parents
        self._names = list(parents.adapters)
        self._at = {name: i for i, name in enumerate(self._names)}
        self._zeros: dict[str, list[str]] = {}  # by adapter: the modules that a zero stands in for
        self._stands_in: dict[int, tuple[str, list[str]]] = {}  # the same by row
        self._performance: dict[str | None, dict[str, float]] = {}
        self._check_parents()
        self.modules = [self._module(m, names) for m, names in self._taken().items()]
        self._check_patterns()
        self.rows: list[tuple[str, _core.Adapter]] = [(n, parents.adapters[n]) for n in self._names]
        self._add_zeros()
        self.statistics = self._statistics(statistics)

    def to_json(self) -> str:
        config = self.config
        document = {
            "semantics": config.semantics,
            "dtype": config.dtype,
            "full": config.report == "full",
            "modules": self.modules,
        }
        return json.dumps(document)

    # -- checks --

    def _check_parents(self) -> None:
        names, modules = self._names, self.parents.modules
        _check_count(self.config.row, names, None)
        if len(names) > 1 and not any(len(have) > 1 for have in modules.values()):
            have = "; ".join(f"{n!r}: {', '.join(self.parents.adapters[n].modules()[:3])}" for n in names)
            raise ConfigError(
                f"adapters: got no module that two of them have ({have}), expected one at least"
            )

    def _taken(self) -> dict[str, list[str]]:
        """``{module: adapters that take part}`` by the policy for missing modules."""
        policy, names = self.config.missing, self._names
        out: dict[str, list[str]] = {}
        for module, have in self.parents.modules.items():
            if len(have) == len(names) or policy == "skip":
                out[module] = have
            elif policy == "zero":
                out[module] = names
                for name in names:
                    if name not in have:
                        self._zeros.setdefault(name, []).append(module)
            elif policy == "error":
                lack = ", ".join(repr(n) for n in names if n not in have)
                raise ConfigError(
                    f"adapters: got no module {module!r} in {lack}, expected it in all of them with "
                    "missing='error' ('skip', 'zero' and 'common' are the ways to do without)"
                )
        if not out:
            raise ConfigError(
                "adapters: got no module that all of them have, expected one with missing='common'"
            )
        return out

    def _check_patterns(self) -> None:
        """A pattern that decides nothing is a mistake in spelling, or stands behind one that is wider."""
        from fnmatch import fnmatchcase

        taken = [m["name"] for m in self.modules]
        first = {
            next((i for i, (p, _) in enumerate(self.config.pairs) if fnmatchcase(m, p)), -1) for m in taken
        }
        for i, (pattern, _) in enumerate(self.config.pairs):
            if i not in first:
                raise ConfigError(
                    f"overrides: got the pattern {pattern!r}, which is the first that matches for no module; "
                    f"expected some of {', '.join(taken[:6])}{near(pattern, taken)}"
                )

    # -- one module --

    def _module(self, module: str, names: list[str]) -> dict[str, Any]:
        config = self.config.for_module(module)
        row = config.row
        present = [n for n in names if module not in self._zeros.get(n, ())]
        if len(names) == 1 < len(self._names) and (row.parents[0] > 1 or row.statistics):
            # Only one has it: there is nothing to interpolate with or to weigh against.
            plain = MergeConfig(method="average", lam=config.lam, rank=config.rank)
            return self._entry(module, names, plain, plain.row, present, [1.0])
        _check_count(row, names, module)
        return self._entry(module, names, config, row, present, self._weights(config, row, names, module))

    def _entry(
        self,
        module: str,
        names: list[str],
        config: MergeConfig,
        row: Method,
        present: list[str],
        weights: list[float],
    ) -> dict[str, Any]:
        out: dict[str, Any] = {"name": module, "method": row.name, "weights": weights}
        out["parents"] = [self._at[n] for n in names]
        for name in row.defaults:
            value = config.value(name)
            if value is not None:
                out[name] = value
        out["rank"] = self._rank(config, row, module, present)
        return out

    def _rank(self, config: MergeConfig, row: Method, module: str, present: list[str]) -> int | None:
        """The rank asked for, in the range that the method can give."""
        ranks = [self.parents.rank(n, module) for n in present]
        if config.rank is None:
            # A zero that stands in for a missing module has a rank in memory, but adds nothing.
            return None if len(present) == len(self._names) else (sum(ranks) if row.exact else max(ranks))
        if row.exact and config.rank > sum(ranks):
            if len(present) < len(self._names):
                return sum(ranks)
            raise ConfigError(
                f"rank: got {config.rank}, expected at most {sum(ranks)} for {module!r}, the sum of the "
                f"parents' ranks, at which method {row.name!r} is exact"
            )
        smaller = min(self.parents.dims[module])
        if not row.exact and config.rank > smaller:
            raise ConfigError(
                f"rank: got {config.rank}, expected at most {smaller} for {module!r}, its smaller width"
            )
        return config.rank

    def _weights(self, config: MergeConfig, row: Method, names: list[str], module: str) -> list[float]:
        m = len(names)
        equal = 1.0 if row.weights == "one" else 1.0 / m
        if config.weights is None or row.weights == "none":
            return [equal] * m
        if config.weights == PERFORMANCE:
            if config.metric not in self._performance:
                self._performance[config.metric] = performance_weights(self.parents.adapters, config.metric)
            table = self._performance[config.metric]
            total = sum(table[n] for n in names)
            return [table[n] / total * (m * equal) for n in names]
        table = dict(config.weights)  # type: ignore[arg-type]
        check_keys("weights", table, self._names)
        for name in self._names:
            if name not in table:
                raise ConfigError(f"weights: got none for {name!r}, expected one for each adapter")
        values = [table[n] for n in names]
        divides = config.value("normalize")
        if divides is None:
            divides = "weights_ratio" in row.laws
        if divides and abs(sum(values)) <= 1e-12 * sum(map(abs, values)):
            shown = {n: table[n] for n in names}
            raise ConfigError(f"weights: got {shown} for {module!r}, expected a sum that is not 0")
        return values

    # -- zeros and statistics --

    def _add_zeros(self) -> None:
        """Adapters of zeros behind the real ones, for the modules that parents lack."""
        for name, modules in self._zeros.items():
            at = len(self.rows)
            self._stands_in[at] = name, modules
            dims = self.parents.dims
            zeros = [
                (m, np.zeros((1, dims[m][0]), "f4"), np.zeros((dims[m][1], 1), "f4"), 1.0) for m in modules
            ]
            self.rows.append((name, _core.adapter_from_factors(zeros, False, "f32")))
            for entry in self.modules:
                if entry["name"] in modules:
                    entry["parents"] = [at if i == self._at[name] else i for i in entry["parents"]]

    def _statistics(self, given: Mapping[str, Any] | None) -> list[dict[str, dict[str, Any]] | None]:
        needs: dict[str, list[str]] = {}
        for entry in self.modules:
            kind = method_of(entry["method"]).statistics
            if kind is not None:
                needs.setdefault(kind, []).append(entry["name"])
        if given is not None:
            if not isinstance(given, Mapping):
                raise DTypeError(f"statistics: got {type(given).__name__}, expected {{adapter: source}}")
            check_keys("statistics", given, self._names)
            if not needs:
                raise ConfigError("statistics: got some, expected none: no method here has a use for them")
        out: list[dict[str, dict[str, Any]] | None] = [None] * len(self.rows)
        if not needs:
            return out
        known = {name: self._known(name, given) for name in self._names}
        whose = {i: (name, self.parents.adapters[name].modules()) for i, name in enumerate(self._names)}
        for i, (name, modules) in (whose | self._stands_in).items():
            found: dict[str, dict[str, Any]] = {}
            for kind, need in needs.items():
                mine = [m for m in need if m in modules]
                found.update(for_core(kind, name, known[name], mine, self.parents.dims))
            out[i] = found
        return out

    def _known(self, name: str, given: Mapping[str, Any] | None) -> Statistics | None:
        if given is not None:
            return statistics_of(name, given[name]) if name in given else None
        path = self.parents.paths.get(name)
        file = None if path is None else beside(path)
        return None if file is None else statistics_of(name, os.fspath(file))


def _check_count(row: Method, names: list[str], module: str | None) -> None:
    low, high = row.parents
    if low <= len(names) and (high is None or len(names) <= high):
        return
    want = f"exactly {low}" if low == high else f"at least {low}"
    where = "" if module is None else f" for {module!r}"
    raise ConfigError(
        f"adapters: got {len(names)} ({', '.join(names)}){where}, expected {want} with method {row.name!r}"
    )
