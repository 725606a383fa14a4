"""What a penalty does to training, what it refuses, keeps and weighs."""

import threading

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import microlora as ml
import reference as ref
import reference_ewc as twin
from microlora import exceptions
from support import factors, make, move, normal, rng, scaling, set_weights

seeds = st.integers(0, 2**32 - 1)
sizes = st.integers(2, 20)
KINDS = ("delta", "factor", "l2", "si", "mas")


# -- penalties --


@pytest.mark.parametrize("kind", KINDS)
@given(seed=seeds)
def test_a_penalty_begins_at_zero_rises_with_lambda_and_has_its_slope(kind, seed):
    r = rng(seed)
    lora = make(8, 6, 2, seed=seed % 2**30)
    all_ = [ml.EwcPlusPlus(lora, lam, kind, fisher="empirical") for lam in (0.0, 1.0, 2.0)]
    opt = ml._core.Optimizer(lora, "sgd")
    x, g = normal(r, 9, 8), normal(r, 9, 6)
    if kind == "si":
        lora.adapt(x[0], ml.Target(g[0]))
        opt.step(lora, 0.05, ewc=all_[1])
        all_[2].import_state(all_[1].export_state())
    for ewc in all_:
        ewc.accumulate_fisher(x, g)
        assert ewc.penalty() == 0.0
        ewc.start_new_task()
        assert ewc.penalty() == 0.0
        assert not any(v.any() for v in ewc.penalty_grad()["m"])
    move(lora, r)
    zero, one, two = (e.penalty() for e in all_)
    assert zero == 0.0
    assert not any(v.any() for v in all_[0].penalty_grad()["m"])
    assert one > 0.0
    assert two == pytest.approx(2 * one, rel=1e-6)
    a, b = factors(lora)
    da, db = normal(r, *a.shape), normal(r, *b.shape)
    h, values = 2.0**-6, []
    for sign in (1, -1):
        set_weights(lora, {"m": (a + sign * h * da, b + sign * h * db)})
        values.append(all_[1].penalty())
    set_weights(lora, {"m": (a, b)})
    ga, gb = (ref.f64(v) for v in all_[1].penalty_grad()["m"])
    slope = (ga * da).sum() + (gb * db).sum()
    size = np.sqrt((ga**2).sum() + (gb**2).sum()) * np.sqrt((da**2).sum() + (db**2).sum())
    assert abs((values[0] - values[1]) / (2 * h) - slope) <= 2e-3 * size


@given(seed=seeds, kind=st.sampled_from(KINDS), optimizer=st.sampled_from(["sgd", "momentum", "adamw"]))
def test_lambda_zero_is_bit_for_bit_no_penalty(seed, kind, optimizer):
    r = rng(seed)
    x, y = normal(r, 20, 8), normal(r, 20, 8)
    states = []
    for with_ewc in (False, True):
        lora = make(8, seed=seed % 2**30)
        ewc = ml.EwcPlusPlus(lora, 0.0, kind, fisher="empirical") if with_ewc else None
        if ewc:
            ewc.accumulate_fisher(x, y)
            ewc.start_new_task()
        opt = ml._core.Optimizer(lora, optimizer)
        opt.train(lora, x, y, np.arange(20), [0.01] * 5, batch_size=4, ewc=ewc, accumulate_fisher=with_ewc)
        states.append(lora.export_weights())
        if ewc:
            assert ewc.n_samples == 20
    assert states[0] == states[1]


@pytest.mark.parametrize("kind", ["factor", "l2", "mas"])
def test_a_proximal_step_holds_at_any_lambda_where_a_gradient_step_breaks(kind):
    r = rng(11)
    x, y = normal(r, 64, 8), normal(r, 64, 8)

    def run(step, lam):
        lora = make(8, seed=2)
        ewc = ml.EwcPlusPlus(lora, lam, kind, fisher="empirical", step=step)
        ewc.accumulate_fisher(x, y)
        ewc.start_new_task()
        start = factors(lora)
        opt = ml._core.Optimizer(lora, "sgd")
        opt.train(lora, x, y, np.arange(64), [0.01] * 64, batch_size=1, ewc=ewc)
        return [np.abs(a - b).max() for a, b in zip(factors(lora), start, strict=True)]

    free, held = run("proximal", 0.0), run("proximal", 1e12)
    assert max(held) < 1e-5 < 1e-3 < min(free)
    lam = 1e5
    assert max(run("proximal", lam)) < max(free)
    with pytest.raises(exceptions.NonFiniteError):
        run("gradient", lam)


def test_delta_holds_the_function_and_not_the_factors():
    r = rng(12)
    lora = make(9, 7, 3)
    delta, factor = (ml.EwcPlusPlus(lora, kind=kind, fisher="empirical") for kind in ("delta", "factor"))
    for ewc in (delta, factor):
        ewc.accumulate_fisher(normal(r, 20, 9), normal(r, 20, 7))
        ewc.start_new_task()
    a, b = factors(lora)
    q = r.standard_normal((3, 3))
    set_weights(lora, {"m": (np.linalg.inv(q) @ a, b @ q)})
    s, w = scaling(lora), delta.moments("m")
    scale = 100 * twin.delta_penalty(2 * a, b, (a, b), s, w[0], w[1])
    assert delta.penalty() < 1e-9 * scale
    assert factor.penalty() > 1.0


# -- what start_new_task asks for, caps and settings --


def test_a_task_without_samples_is_refused():
    lora = make(6)
    for kind in KINDS:
        ewc = ml.EwcPlusPlus(lora, kind=kind)
        if kind in ("l2", "si"):
            ewc.start_new_task()
            assert ewc.task_count == 1
            continue
        with pytest.raises(exceptions.ConfigError, match="start_new_task"):
            ewc.start_new_task()
        assert ewc.task_count == 0


def test_the_cap_counts_what_it_ignores():
    r = rng(13)
    lora = make(6)
    ewc = ml.EwcPlusPlus(lora, fisher="empirical", fisher_samples=10)
    ewc.accumulate_fisher(normal(r, 8, 6), normal(r, 8, 6))
    ewc.accumulate_fisher(normal(r, 8, 6), normal(r, 8, 6))
    ewc.adapt(normal(r, 6), ml.Target(normal(r, 6)))
    assert (ewc.n_samples, ewc.ignored_samples) == (10, 7)
    ewc.start_new_task()
    assert (ewc.n_samples, ewc.ignored_samples) == (0, 0)


@pytest.mark.parametrize(
    "bad",
    [
        {"ewc_lambda": -1.0},
        {"ewc_lambda": float("nan")},
        {"ewc_lambda": "10"},
        {"ewc_lambda": True},
        {"kind": "ewc"},
        {"kind": 3},
        {"gamma": 1.5},
        {"gamma": -0.1},
        {"fisher": "batched"},
        {"fisher_normalize": "sum"},
        {"fisher_decay": 0.0},
        {"fisher_decay": 1.0},
        {"fisher_decay": 0.9, "kind": "l2"},
        {"fisher_decay": 0.9, "gamma": 0.5},
        {"fisher_decay": 0.9, "anchors": "separate"},
        {"step": "proximal"},
        {"step": "implicit"},
        {"anchors": "all"},
        {"fisher_samples": 0},
        {"fisher_samples": 1.5},
        {"seed": -1},
        {"kind": "l2", "gamma": 0.5},
        {"kind": "l2", "fisher_normalize": "max"},
    ],
    ids=str,
)
def test_settings_out_of_range_are_refused(bad):
    with pytest.raises(exceptions.ConfigError, match=next(iter(bad)) if len(bad) == 1 else None):
        ml.EwcPlusPlus(make(6), **bad)


def test_defaults_are_stated_once():
    lora = make(6)
    for kind, lam in zip(KINDS, (100.0, 10.0, 1.0, 0.2, 0.03), strict=True):
        ewc = ml.EwcPlusPlus(lora, kind=kind)
        assert (ewc.ewc_lambda, ewc.kind) == (lam, kind)
        assert f"{lam:g}" in ml.EwcPlusPlus.__doc__
    with pytest.raises(exceptions.DTypeError, match="lora"):
        ml.EwcPlusPlus(lora.adapter())


def test_bad_arrays_are_refused_and_change_nothing():
    r = rng(14)
    lora = make(6, 5)
    ewc = ml.EwcPlusPlus(lora, kind="factor", fisher="empirical")
    x, g = normal(r, 4, 6), normal(r, 4, 5)
    ewc.accumulate_fisher(x, g)
    ewc.adapt(x[0], ml.Target(g[0]))
    before = ewc.export_state(), lora.snapshot().to_bytes()
    broken = x.copy()
    broken[2, 1] = np.nan
    huge = np.full_like(x, 1e25)
    cases = [
        (broken, g, exceptions.NonFiniteError),
        (x, np.full_like(g, np.inf), exceptions.NonFiniteError),
        (huge, g, exceptions.NonFiniteError),
        (x[:3], g, exceptions.ShapeError),
        (x[:, :5], g, exceptions.ShapeError),
        (x, g[:, :4], exceptions.ShapeError),
        (x, np.ones((4, 5), int), exceptions.DTypeError),
        (x, "no", exceptions.DTypeError),
        (x, None, exceptions.ConfigError),
        (x, np.ones((1, 1, 4, 5)), exceptions.ShapeError),
        (x, np.stack([g, np.full_like(g, np.nan)]), exceptions.NonFiniteError),
    ]
    for xs, gs, error in cases:
        with pytest.raises(error):
            ewc.accumulate_fisher(xs, gs)
    for call in (ewc.adapt, ewc.accumulate_fisher):
        with pytest.raises(exceptions.NonFiniteError):
            call(broken[2], ml.Target(g[0]))
        with pytest.raises(exceptions.NonFiniteError):
            call(x[0], ml.Target(g[0]), base=np.full(5, np.nan, np.float32))
        with pytest.raises(exceptions.UnknownModuleError):
            call(x[0], ml.Target(g[0]), module="k_proj")
    assert (ewc.export_state(), lora.snapshot().to_bytes()) == before


# -- memory --


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("anchors", ["online", "separate"])
def test_memory_is_the_documented_formula(kind, anchors):
    n_in, n_out, rank = 21, 34, 3
    lora = make(n_in, n_out, rank, names=("m", "n"))
    ewc = ml.EwcPlusPlus(lora, kind=kind, anchors=anchors, fisher="empirical")
    r, d = rng(15), n_in + n_out
    t = 16 * -(-n_in // 16) + 16 * -(-n_out // 16)
    p = 4 * rank * t
    always = 16 * d + 4 * t + {"factor": 2 * p, "mas": 2 * p, "si": 2 * p}.get(kind, 0)
    assert ewc.memory_bytes == 2 * always
    for task in range(1, 4):
        for m in ("m", "n"):
            ewc.accumulate_fisher(normal(r, 5, n_in), normal(r, 5, n_out), m)
        ewc.start_new_task()
        kept = 1 if anchors == "online" else task
        held = (p + 4 * d) * kept if kind == "delta" else 2 * p
        assert ewc.memory_bytes == 2 * (always + held)
    ewc.adapt(normal(r, n_in), ml.Target(normal(r, n_out)), "n")
    assert ewc.memory_bytes == 2 * (always + held) + 128 * d + 256 * rank + 128


# -- threads --


def test_learning_training_and_reading_at_once_neither_lock_nor_lose():
    r = rng(16)
    lora = make(16, learned=False)
    ewc = ml.EwcPlusPlus(lora, kind="factor", fisher="empirical")
    x, y = normal(r, 64, 16), normal(r, 64, 16)
    ewc.accumulate_fisher(x, y)
    ewc.start_new_task()
    opt = ml._core.Optimizer(lora, "sgd")
    errors = []

    def guarded(work):
        try:
            for _ in range(60):
                work()
        except Exception as e:
            errors.append(e)

    def train():
        opt.train(
            lora, x, y, np.arange(64), [1e-4] * 16, batch_size=4, ewc=ewc, progress=lambda *_: ewc.penalty()
        )

    works = [
        train,
        lambda: ewc.adapt(x[0], ml.Target(y[0])),
        lambda: ewc.accumulate_fisher(x[1], ml.Target(y[1])),
        lambda: (ewc.penalty(), ewc.penalty_grad(), ewc.export_state(), ewc.memory_bytes),
    ]
    threads = [threading.Thread(target=guarded, args=(w,)) for w in works]
    for t in threads:
        t.start()
    for t in threads:
        t.join(60)
    assert not any(t.is_alive() for t in threads)
    assert errors == []
    assert ewc.n_samples == 120
