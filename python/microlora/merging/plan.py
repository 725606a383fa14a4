"""What the core is told to merge: one entry a module."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any

import numpy as np

import microlora._core as _core
from microlora._checks import check_keys, near
from microlora.exceptions import ConfigError, DTypeError
from microlora.merging.config import PERFORMANCE, MergeConfig
from microlora.merging.methods import Method, method
from microlora.merging.parents import Parents
from microlora.merging.performance import performance_weights
from microlora.merging.statistics import Statistics, beside, for_core, statistics_of

__all__ = ["Plan"]


class Plan:
    """What the core is told: every default and override resolved, everything checked before any work.

    Args:
        config: How to merge.
        parents: What to merge.
        statistics: ``{name: source}`` for the methods that need them.

    Raises:
        MicroLoraError: As :func:`microlora.merge`.
    """

    def __init__(self, config: MergeConfig, parents: Parents, statistics: Mapping[str, Any] | None) -> None:
        self.config, self.parents = config, parents
        self._names = list(parents.adapters)
        self._at = {name: i for i, name in enumerate(self._names)}
        self._zeros: dict[str, list[str]] = {}  # by adapter: the modules that a zero stands in for
        self._stands_in: dict[int, tuple[str, list[str]]] = {}  # the same by row
        self._rank_ignored = False
        self._less_rank: dict[tuple[int, str], list[str]] = {}  # by what was asked for: modules with less
        self._performance: dict[str | None, dict[str, float]] = {}
        self._check_parents()
        self.modules = [self._module(m, names) for m, names in self._taken().items()]
        self._check_patterns()
        self.rows: list[tuple[str, _core.Adapter]] = [(n, parents.adapters[n]) for n in self._names]
        self._add_zeros()
        self.statistics = self._statistics(statistics)

    def to_json(self) -> str:
        """The plan as the core reads it."""
        config = self.config
        document = {
            "semantics": config.semantics,
            "dtype": config.dtype,
            "full": config.report == "full",
            "modules": self.modules,
        }
        return json.dumps(document)

    def notes(self) -> tuple[str, ...]:
        """What the parents leave behind, and what could not be as asked for."""
        out = list(self.parents.notes())
        if self._rank_ignored:
            out.append("rank is ignored: PEFT turns every type into linear where there is one adapter")
        for (rank, name), modules in self._less_rank.items():
            more = "" if len(modules) < 4 else f", ... ({len(modules)} in all)"
            out.append(
                f"modules that not all have stay below rank {rank}, at the sum of their parents' ranks, at "
                f"which {name} is exact: {', '.join(modules[:3])}{more}"
            )
        return tuple(out)

    @property
    def _alone(self) -> bool:
        """Whether PEFT would turn any type into linear, at the rank of the one adapter."""
        return self.config.semantics == "peft" and len(self._names) == 1

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
        if self._alone:
            self._rank_ignored |= config.rank is not None
            return None
        if config.rank is None:
            if config.semantics == "peft":
                return None  # which the core decides as PEFT does
            # A zero that stands in for a missing module has a rank in memory, but adds nothing.
            zeros = self.config.missing == "zero" and len(present) < len(self._names)
            return (sum(ranks) if row.exact else max(ranks)) if zeros else None
        if row.exact and config.rank > sum(ranks):
            if len(present) < len(self._names):
                self._less_rank.setdefault((config.rank, row.name), []).append(f"{module} ({sum(ranks)})")
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
        if row.statistics == "importance" and min(values) < 0.0:
            shown = {n: table[n] for n in names}
            raise ConfigError(
                f"weights: got {shown}, expected numbers of 0 or above: they weigh an importance"
            )
        if divides and abs(sum(values)) <= 1e-12 * sum(map(abs, values)):
            shown = {n: table[n] for n in names}
            raise ConfigError(f"weights: got {shown} for {module!r}, expected a sum that is not 0")
        return values

    # -- zeros and statistics --

    def _add_zeros(self) -> None:
        """Adapters of zeros behind the real ones, for the modules that parents lack, of the others' dtype."""
        dims = self.parents.dims
        for name, lacks in self._zeros.items():
            of_dtype: dict[str, list[str]] = {}
            for module in lacks:
                of_dtype.setdefault(self.parents.dtype(module), []).append(module)
            for dtype, modules in of_dtype.items():
                at = len(self.rows)
                self._stands_in[at] = name, modules
                zeros = [
                    (m, np.zeros((1, dims[m][0]), "f4"), np.zeros((dims[m][1], 1), "f4"), 1.0)
                    for m in modules
                ]
                self.rows.append((name, _core.adapter_from_factors(zeros, False, dtype)))
                for entry in self.modules:
                    if entry["name"] in modules:
                        entry["parents"] = [at if i == self._at[name] else i for i in entry["parents"]]

    def _statistics(self, given: Mapping[str, Any] | None) -> list[dict[str, dict[str, Any]] | None]:
        needs: dict[str, list[str]] = {}
        for entry in self.modules:
            kind = method(entry["method"], self.config.semantics).statistics
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
