"""Every method obeys, before truncation, the laws that its row of the table names: exactly those."""

import numpy as np
import pytest

import microlora as ml
import reference_merge as twin
from merge_support import (
    GAUGE,
    METHODS,
    TOLERANCE,
    adapter,
    delta,
    deltas,
    dense_merge,
    distance,
    known,
    parents,
    some,
)
from microlora.merging import methods
from reference import f64
from support import rng

PAIRS = [(name, law) for name in METHODS for law in methods()[name].laws]


def law_identity(method, r):
    one = adapter(seed=3)
    got = dense_merge({"a": one}, method, **everything(method))
    return got, delta(one)


def law_idempotent(method, r):
    one = adapter(seed=3)
    of = {"a": one, "b": one}
    got = dense_merge(of, method, statistics=known(of, shared=True), **everything(method))
    return got, delta(one)


def law_permutation(method, r):
    of = some(method)
    weights = dict(zip(of, (0.5, 2.0, 1.0), strict=False))
    settings = {} if methods()[method].weights == "none" else {"weights": weights}
    turned = dict(reversed(of.items()))
    stats = known(of)
    return (
        dense_merge(turned, method, statistics=stats, **settings),
        dense_merge(of, method, statistics=stats, **settings),
    )


def law_scale(method, r):
    of = some(method)
    return dense_merge({n: 0.5 * a for n, a in of.items()}, method), 0.5 * dense_merge(of, method)


def law_weights_ratio(method, r):
    of = some(method)
    w = dict(zip(of, (0.5, 2.0, 1.0), strict=False))
    more = {n: 3.0 * x for n, x in w.items()}
    return dense_merge(of, method, weights=more), dense_merge(of, method, weights=w)


def law_weights_linear(method, r):
    of = some(method)
    v, w = ({n: float(x) for n, x in zip(of, r.standard_normal(3), strict=False)} for _ in range(2))
    both = {n: 2.0 * v[n] - w[n] for n in of}
    return (
        dense_merge(of, method, weights=both),
        2.0 * dense_merge(of, method, weights=v) - dense_merge(of, method, weights=w),
    )


def law_additive(method, r):
    of, more = some(method), some(method, seed=1)
    both = {n: of[n] + more[n] for n in of}
    return dense_merge(both, method), dense_merge(of, method) + dense_merge(more, method)


def law_endpoints(method, r):
    of = parents(2)
    (first, second), names = deltas(of), list(of)
    if methods()[method].takes("t"):
        at = lambda t: {"t": t}  # noqa: E731
    else:
        at = lambda t: {"weights": {names[0]: 1.0 - t, names[1]: t}}  # noqa: E731
    got = [dense_merge(of, method, **at(t)) for t in (0.0, 1.0)]
    return np.stack(got), np.stack([first, second])


def law_equal_statistics(method, r):
    of = some(method)
    w = dict(zip(of, (0.5, 2.0, 1.0), strict=False))
    got = dense_merge(of, method, weights=w, statistics=known(of, shared=True))
    return got, twin.weighted(deltas(of), list(w.values()))


def law_gauge(method, r):
    of = some(method)
    turned = {name: gauged(one, r) for name, one in of.items()}
    return dense_merge(turned, method), dense_merge(of, method)


LAWS = {name.removeprefix("law_"): f for name, f in list(globals().items()) if name.startswith("law_")}


def everything(method):
    """Settings under which nothing is dropped."""
    row, out = methods()[method], {}
    if row.takes("density"):
        out["density"] = 1.0
    if row.takes("gamma"):
        out["gamma"] = 0.0
    if row.takes("epsilon"):
        out["epsilon"] = 0.0
    return out


def gauged(one, r):
    """The same delta as (R A, B R^-1), cond(R) = 10."""
    a, b = map(f64, one.factors("m"))
    k = len(a)
    u, v = (np.linalg.qr(r.standard_normal((k, k)))[0] for _ in range(2))
    s = np.geomspace(1.0, 10.0, k)
    turn, back = (u * s) @ v, v.T @ (u / s).T
    return ml.Adapter.from_factors({"m": (turn @ a, b @ back)}, alpha=one.info("m").alpha)


@pytest.mark.parametrize(("method", "law"), PAIRS)
@pytest.mark.parametrize("seed", [0, 1])
def test_a_method_obeys_the_laws_of_its_row(method, law, seed):
    assert law in LAWS, f"the table names a law that nothing tests: {law}"
    got, want = LAWS[law](method, rng(seed))
    assert np.linalg.norm(want) > 1e-3
    assert distance(got, want) <= (GAUGE if law == "gauge" else TOLERANCE)[method]


def test_every_law_is_somebodys():
    assert {law for _, law in PAIRS} == set(LAWS)
