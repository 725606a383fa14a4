"""The core's table of merge methods, as Python sees it: a method is one row there and nothing here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import microlora._core as _core
from microlora._checks import FrozenMap, near, wrong

__all__ = ["METHOD_SETTINGS", "Method", "method", "methods"]

#: Settings that some methods take and others do not.
METHOD_SETTINGS = (
    *("weights", "density", "lam", "rank", "seed", "t", "epsilon", "gamma", "rho"),
    *("normalize", "majority"),
)


@dataclass(frozen=True)
class Method:
    """One row of the table.

    Attributes:
        name: What ``method=`` says.
        family: ``"factor space"`` (exact) or ``"element-wise"`` (on the entries of the delta, streamed).
        formula: The result, in words of the deltas D_i, weights w_i and m parents.
        paper: Where it is from.
        when: What it is good for.
        laws: Names of the laws that it obeys before truncation.
        defaults: Settings that it takes, with their defaults.
        weights: Weights where none are given: ``"equal"`` (1/m), ``"one"``, or ``"none"`` where it takes
            none.
        parents: Fewest and most parents.
        statistics: ``"gram"``, ``"importance"`` or None: what it needs to know of every parent.
        semantics: The values of ``semantics=`` that it knows.
    """

    name: str
    family: str
    formula: str
    paper: str
    when: str
    laws: tuple[str, ...]
    defaults: Mapping[str, float | bool | str | None]
    weights: str
    parents: tuple[int, int | None]
    statistics: str | None
    semantics: tuple[str, ...]

    def takes(self, setting: str) -> bool:
        """Whether a setting of :data:`METHOD_SETTINGS` has a meaning for it."""
        return self.weights != "none" if setting == "weights" else setting in self.defaults

    @property
    def exact(self) -> bool:
        """Whether the result is known in factors, so that no rank above the parents' sum has a meaning."""
        return self.family == "factor space"


@cache
def methods(semantics: str = "exact") -> Mapping[str, Method]:
    """Every method of one semantics by its name, in the order of the table; other names come last."""
    rows = [row for row in map(_method, _core.merge_methods()) if semantics in row.semantics]
    table = {row.name: row for row in rows}
    return table | {alias: table[name] for alias, name in _ALIASES.items() if name in table}


def method(name: object, semantics: str = "exact") -> Method:
    """The row of a method.

    Raises:
        ConfigError: There is none of that name; the message carries the nearest ones.
    """
    table = methods(semantics)
    if isinstance(name, str) and name in table:
        return table[name]
    elsewhere = [s for s in ("exact", "peft", "mergekit") if s != semantics and name in methods(s)]
    if isinstance(name, str) and elsewhere:
        raise wrong("method", name, f"semantics={elsewhere[0]!r} with it, not {semantics!r}")
    known = ", ".join(map(repr, table))
    by = "" if semantics == "exact" else f" with semantics {semantics!r}"
    raise wrong("method", name, f"one of {known}{by}{near(name, table) if isinstance(name, str) else ''}")


def _method(row: Mapping[str, Any]) -> Method:
    defaults: dict[str, Any] = {}
    for name, value in row["params"].items():
        kind = _KINDS.get(name, float)
        defaults[name] = kind(value)
    if row["name"] != "cat":  # whose rank is the sum of its parents'
        defaults["rank"] = None
    return Method(
        name=row["name"],
        family=row["family"],
        formula=row["formula"],
        paper=row["paper"],
        when=row["when"],
        laws=tuple(row["laws"]),
        defaults=FrozenMap(defaults),
        weights=row["default_weights"],
        parents=tuple(row["parents"]),
        statistics=_STATISTICS.get(row["name"]),
        semantics=tuple(row.get("semantics", ("exact", "mergekit"))),
    )


# The core keeps all defaults as numbers.
_KINDS: Mapping[str, Any] = {
    "seed": int,
    "normalize": bool,
    "majority": lambda value: ("total", "frequency")[int(value)],
}

_STATISTICS: Mapping[str, str] = {"regmean": "gram", "fisher": "importance"}
_ALIASES: Mapping[str, str] = {"dare": "dare_linear"}
