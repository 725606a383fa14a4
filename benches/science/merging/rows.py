"""One table of rows: every method at its default and at one setting that was fixed before the first run.

Factor methods: the default keeps the sum of the ranks, the other setting the rank of one parent; `cat` keeps
all, so its other setting is a weight. Element-wise methods: the default has the rank of one parent, the other
setting twice that, and more entries. Rows of `full` rank lose nothing to truncation.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

#: Splits, starts and batches of a run.
SEEDS = (20, 21, 22, 23, 24)
#: Rank and alpha of every adapter.
RANK, ALPHA = 8, 16.0
#: As rank of a merge: that of the smaller side of each module.
FULL = "full"
#: What `microlora.merge` needs to be told about each parent's data.
STATISTICS = frozenset({"regmean", "fisher"})


@dataclass(frozen=True)
class Row:
    """A way of getting one network from two adapters.

    Attributes:
        name: On the command line and in files.
        group: Which part of the table it stands in.
        title: What it is called there.
        method: Of `microlora.merge`, or a combination type of PEFT; empty for bounds.
        options: Settings beyond the defaults.
        like: Row whose weight changes it must equal.
    """

    name: str
    group: str
    title: str
    method: str = ""
    options: dict[str, Any] = field(default_factory=dict)
    like: str = ""

    @property
    def setting(self) -> str:
        """The settings in words."""
        if not self.method:
            return ""
        out = [f"{key} {value if isinstance(value, str) else f'{value:.3g}'}" for key, value in self._said()]
        return ", ".join(out) or "default"

    @property
    def random(self) -> bool:
        """Whether entries are dropped by chance."""
        return self.method.startswith(("dare", "della"))

    def _said(self) -> list[tuple[str, Any]]:
        names = {"weight": "w ="}
        return [(names.get(key, key), value) for key, value in self.options.items()]


BOUNDS, WRONG, PEFT, FACTOR, ELEMENT = "bounds", "factors averaged", "PEFT", "factor space", "element-wise"


def _factor(method: str, **options: Any) -> list[Row]:
    rows = [Row(method, FACTOR, f"`{method}`", method)]
    if options:
        rows.append(_row(FACTOR, method, options))
    rows.append(_row(FACTOR, method, {"rank": RANK}))
    return rows


def _element(method: str, *more: dict[str, Any]) -> list[Row]:
    rows = [Row(method, ELEMENT, f"`{method}`", method)]
    return rows + [_row(ELEMENT, method, options) for options in more]


def _row(group: str, method: str, options: dict[str, Any], like: str = "", prefix: str = "") -> Row:
    name = " ".join([prefix + method, *(f"{key}={value}" for key, value in options.items())])
    title = f"PEFT `{method}`" if group == PEFT else f"`{method}`"
    return Row(name, group, title, method, options, like)


def _peft(method: str, weight: float, like: str = "", **options: Any) -> Row:
    return _row(PEFT, method, {"weight": weight, **options}, like, "peft ")


_ALL = (
    Row("none", BOUNDS, "no adapter"),
    Row("other", BOUNDS, "the other domain's adapter"),
    Row("own", BOUNDS, "the domain's own adapter"),
    Row("joint", BOUNDS, "one adapter trained on both"),
    Row("ensemble", BOUNDS, "both adapters, mean of probabilities"),
    Row("factor average", WRONG, "mean A times mean B"),
    _peft("linear", 0.5),
    _peft("linear", 1.0),
    _peft("cat", 0.5, "linear"),
    _peft("svd", 0.5, f"linear rank={RANK}", rank=RANK),
    _peft("ties", 0.5, density=0.5),
    _peft("ties", 1.0, density=0.5),
    _peft("ties_svd", 1.0, density=0.5, rank=RANK),
    _peft("dare_linear", 0.5, density=0.5),
    _peft("dare_linear_svd", 0.5, density=0.5, rank=RANK),
    _peft("magnitude_prune", 0.5, density=0.5),
    _peft("magnitude_prune_svd", 0.5, density=0.5, rank=RANK),
    *_factor("average"),
    *_factor("linear", weight=0.7),
    *_factor("weighted"),
    *_factor("task_arithmetic", lam=0.4),
    Row("cat", FACTOR, "`cat`", "cat"),
    _row(FACTOR, "cat", {"weight": 0.7}),
    *_factor("slerp"),
    *_factor("nuslerp"),
    *_factor("multislerp"),
    *_factor("karcher"),
    *_factor("model_stock"),
    *_factor("regmean", rank=2 * RANK),
    *_element(
        "ties",
        {"density": 0.5, "rank": 2 * RANK},
        {"density": 0.5, "lam": 0.5, "rank": FULL},
        {"density": 0.5, "rank": FULL},
    ),
    *_element("dare_linear", {"density": 0.7, "weight": 0.7, "rank": 2 * RANK}),
    _row(ELEMENT, "dare_linear", {"density": 0.7, "weight": 0.7, "rank": FULL}),
    *_element("dare_ties", {"density": 0.7, "rank": 2 * RANK}),
    *_element("della", {"density": 0.7, "rank": 2 * RANK}),
    *_element("della_linear", {"density": 0.7, "weight": 0.7, "rank": 2 * RANK}),
    *_element("breadcrumbs", {"density": 0.7, "gamma": 0.02, "rank": 2 * RANK}),
    *_element("breadcrumbs_ties", {"density": 0.7, "gamma": 0.02, "rank": 2 * RANK}),
    *_element("magnitude_prune", {"density": 0.7, "rank": 2 * RANK}),
    *_element("sce", {"density": 0.5, "rank": 2 * RANK}),
    *_element("fisher", {"rank": 2 * RANK}, {"rank": FULL}),
)
ROWS = {row.name: row for row in _ALL}
