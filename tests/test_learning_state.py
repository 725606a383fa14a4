"""Accumulated steps, dropout, narrow storage, and what learning refuses."""

import itertools

import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

import microlora as ml
import reference as ref
from microlora.exceptions import ConfigError, FeedbackError, NonFiniteError, ShapeError
from support import (
    KINDS,
    bf16_bits,
    close,
    feedback_kinds,
    from_bf16,
    make,
    normal,
    rng,
    set_weights,
    state_of,
    twin,
)

seeds = st.integers(0, 2**32 - 1)
sizes = st.integers(2, 24)


def nlms(mu=None, train="b", **more):
    return ml.InstantConfig(rule="nlms", mu=mu, train=train, **more)


# -- adapt and apply --


@given(seed=seeds, n=st.integers(1, 12), kind=st.sampled_from(KINDS), lr=st.floats(1e-3, 1.0))
def test_adapt_and_apply_is_the_gradient_of_the_mean_loss(seed, n, kind, lr):
    r = rng(seed)
    lora = make(9, 7, 3, seed=seed)
    x, fbs, base = normal(r, n, 9), [feedback_kinds(r, 7)[kind] for _ in range(n)], normal(r, n, 7)
    want = twin(lora)
    for x_i, fb, b in zip(x, fbs, base, strict=True):
        want.adapt(x_i, fb, b)
        lora.adapt(x_i, fb, "m", base=b)
    want.apply_updates(lr)
    before = lora.version
    assert lora.apply_updates(lr) == n
    assert lora.version == before + 1
    close(lora["m"].lora_a, want.a, 1e-5)
    close(lora["m"].lora_b, want.b, 1e-5)
    assert lora["m"].pending == 0


@given(seed=seeds, n=st.integers(2, 12))
def test_the_order_of_events_inside_one_apply_does_not_matter(seed, n):
    r = rng(seed)
    events = [(normal(r, 9), ml.Target(normal(r, 7))) for _ in range(n)]
    results = []
    for order in (range(n), r.permutation(n)):
        lora = make(9, 7, 3, seed=seed)
        for i in order:
            lora.adapt(*events[i], "m")
        lora.apply_updates(0.1)
        results.append((lora["m"].lora_a, lora["m"].lora_b))
    close(results[0][0], results[1][0], 1e-6)
    close(results[0][1], results[1][1], 1e-6)


def test_apply_with_nothing_pending_is_a_no_op():
    for lora in (make(), make(learned=False)):
        before = state_of(lora)
        assert lora.apply_updates(0.5) == 0
        assert state_of(lora) == before
        lora.adapt(normal(rng(), 24), ml.Target(normal(rng(), 24)), "m")
        lora.apply_updates(0.1)
        before = state_of(lora)
        assert lora.apply_updates(0.5) == 0
        assert state_of(lora) == before


def test_adapt_changes_no_weight():
    lora, r = make(), rng(1)
    before, version = lora.export_weights(), lora.version
    for fb in feedback_kinds(r, 24).values():
        assert lora.adapt(normal(r, 24), fb, "m", base=normal(r, 24)).applied
    assert (lora.export_weights(), lora.version, lora["m"].pending) == (before, version, len(KINDS))


def test_apply_clips_by_the_global_norm_of_all_modules():
    lora, r = make(9, 7, 3, names=("a", "b")), rng(2)
    twins = {n: twin(lora, n) for n in "ab"}
    for name in "aab":
        x, t = normal(r, 9), ml.Target(normal(r, 7) * 10)
        lora.adapt(x, t, name)
        twins[name].adapt(x, t)
    norm2, start = 0.0, {n: (lora[n].lora_a, lora[n].lora_b) for n in "ab"}
    for t in twins.values():
        norm2 += sum((np.mean([g[i] for g in t.pending], 0) ** 2).sum() for i in (0, 1))
    for t in twins.values():
        t.apply_updates(0.5 * 2.0 / np.sqrt(norm2))
    lora.apply_updates(0.5, max_grad_norm=2.0)
    for n, t in twins.items():
        close(lora[n].lora_a, t.a, 1e-5)
        close(lora[n].lora_b, t.b, 1e-5)
    moved = sum(
        ((ref.f64(v) - w) ** 2).sum()
        for n in "ab"
        for v, w in zip((lora[n].lora_a, lora[n].lora_b), start[n], strict=True)
    )
    assert np.sqrt(moved) == pytest.approx(1.0, rel=1e-4)


@pytest.mark.parametrize("how", ["instant", "adapt"])
def test_learning_one_module_leaves_the_others(how):
    lora, r = make(8, 8, 2, names=("a", "b")), rng(1)
    other = [v.copy() for v in lora["b"].raw()]
    getattr(lora, how)(normal(r, 8), ml.Target(normal(r, 8)), "a")
    lora.apply_updates(0.3)
    for got, want in zip(lora["b"].raw(), other, strict=True):
        np.testing.assert_array_equal(got, want)


# -- dropout --


def test_dropout_is_only_in_adapt_and_unbiased():
    r, p = rng(1), 0.4
    lora, plain = make(12, 6, 3, dropout=p), make(12, 6, 3)
    x, t = normal(r, 12), ml.Target(normal(r, 6))
    np.testing.assert_array_equal(lora.forward(x, "m"), plain.forward(x, "m"))
    twin_g = ml.Gradient(normal(r, 6))
    a, b = ref.f64(lora["m"].lora_a), ref.f64(lora["m"].lora_b)
    n = 20_000
    for _ in range(n):
        lora.adapt(x, twin_g, "m")
    lora.apply_updates(1.0)
    ga, gb = ref.chain(x, a, b, lora["m"].scaling, twin_g.g)
    sd = np.sqrt(p / (1 - p) / n)
    assert np.abs(a - lora["m"].lora_a - ga).max() < 6 * sd * np.abs(ga).max()
    assert np.abs(b - lora["m"].lora_b - gb).max() < 6 * sd * np.abs(gb).max() * np.sqrt(12)
    one, two = make(12, 6, 3, dropout=p), make(12, 6, 3)
    one.instant(x, t, "m")
    two.instant(x, t, "m")
    np.testing.assert_array_equal(one["m"].lora_b, two["m"].lora_b)


def test_dropout_drops_and_scales_what_it_keeps():
    """The gradient of A is an outer product with the dropped input, so the mask shows in it."""
    lora, r = make(400, 6, 1, dropout=0.25), rng(1)
    a, x = lora["m"].lora_a, np.ones(400, np.float32)
    lora.adapt(x, ml.Gradient(normal(r, 6)), "m")
    lora.apply_updates(1.0)
    step = (ref.f64(a) - lora["m"].lora_a)[0]
    kept = np.abs(step) > 1e-7
    assert 0.65 < kept.mean() < 0.85
    full, r = make(400, 6, 1), rng(1)
    full.adapt(x, ml.Gradient(normal(r, 6)), "m")
    full.apply_updates(1.0)
    close(step[kept], (ref.f64(a) - full["m"].lora_a)[0][kept] / 0.75, 1e-4)


# -- narrow storage --


@pytest.mark.parametrize("dtype", ["f16", "bf16"])
def test_narrow_storage_learns_through_its_f32_master(dtype):
    """1,000 steps, each below half of the storage's resolution: lost in it alone, added up in the master."""
    r = rng(3)
    a, b = (np.copysign(r.uniform(0.5, 1, shape), normal(r, *shape)) for shape in ((4, 24), (16, 4)))
    narrow, full, stuck = make(24, 16, 4, dtype=dtype), make(24, 16, 4), make(24, 16, 4)
    set_weights(narrow, {"m": (a, b)})
    start = narrow["m"].lora_a, narrow["m"].lora_b
    for lora in (full, stuck):
        set_weights(lora, {"m": start})
    x, t = normal(r, 24), normal(r, 16)
    want = twin(full)
    first = want.adapt(x, ml.Target(t))
    lr = 1e-4 / max(np.abs(g).max() for g in want.pending[0])

    def rounded(v):
        return v.astype(np.float16).astype(np.float32) if dtype == "f16" else from_bf16(bf16_bits(v))

    for _ in range(1000):
        for lora in (narrow, full, stuck):
            lora.adapt(x, ml.Target(t), "m")
            lora.apply_updates(lr)
        set_weights(stuck, {"m": (rounded(stuck["m"].lora_a), rounded(stuck["m"].lora_b))})
    loss = [ref.mse(lora.forward(x, "m"), t)[0] for lora in (narrow, full, stuck)]
    assert loss[1] < 0.8 * first
    assert loss[0] == pytest.approx(loss[1], rel=0.01)
    assert loss[2] == pytest.approx(first, rel=1e-6)


# -- skipping and refusing --


def test_results_say_what_happened_and_why_not():
    lora, r = make(8, 6, 2, learned=False), rng(1)
    x, t = normal(r, 8), ml.Target(normal(r, 6))
    got = lora.instant(x, t, "m")
    assert (got.rule, got.applied, got.reason, got.version) == ("rls", True, None, 1)
    assert 0 < got.step < 1
    assert "applied=True" in repr(got)
    got = lora.instant(np.zeros(8, np.float32), t, "m")
    assert not got.applied
    assert "zero bottleneck" in got.reason
    assert (got.version, got.loss_after) == (1, None)
    empty = make(8, 6, 2, learned=False)
    for kind in ("cosine", "preference", "contrastive"):
        for how in ("instant", "adapt"):
            got = getattr(empty, how)(x, feedback_kinds(r, 6)[kind], "m")
            assert not got.applied
            assert "base=" in got.reason
    assert empty.counters == {"instant": 0, "adapt": 0, "apply": 0, "skipped": 6}
    assert not empty["m"].lora_b.any()


def test_rls_alone_refuses_what_it_cannot_use():
    lora, r = make(8, 6, 2, instant=ml.InstantConfig(rule="rls")), rng(1)
    for kind in KINDS[1:]:
        before = state_of(lora)
        with pytest.raises(FeedbackError, match="rls"):
            lora.instant(normal(r, 8), feedback_kinds(r, 6)[kind], "m")
        assert state_of(lora) == before


@pytest.mark.parametrize("how", ["instant", "adapt"])
def test_a_bare_number_raises_and_says_what_to_pass(how):
    lora = make(8, 6, 2)
    for number in (0.9, 1, np.float32(0.5), np.float64(1), True):
        with pytest.raises(FeedbackError, match=r"no direction.*Target.*ten times.*Reward\(r, response=e\)"):
            getattr(lora, how)(normal(rng(), 8), number, "m")
    with pytest.raises(FeedbackError, match="response"):
        ml.Reward(0.5)


RULES = {
    "rls": ml.InstantConfig(),
    "forgetful": ml.InstantConfig(forgetting=0.9),
    "nlms": nlms(),
    "both": nlms(train="both"),
    "full step": nlms(1.0, "both"),
}
exponents = st.floats(-44, 37)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("kind", KINDS)
@given(
    seed=seeds,
    steps=st.lists(
        st.tuples(exponents, exponents, exponents, st.booleans(), st.booleans()), min_size=1, max_size=6
    ),
    dtype=st.sampled_from(["f32", "f16", "bf16"]),
    learned=st.booleans(),
)
@settings(max_examples=25, phases=(Phase.explicit, Phase.reuse, Phase.generate))
def test_extreme_but_finite_events_never_leave_a_bad_number(rule, kind, seed, steps, dtype, learned):
    """Whatever the sizes, weights stay finite: an event is applied, skipped, or refused."""
    r = rng(seed)
    lora = make(9, 6, 3, instant=RULES[rule], learned=learned, dtype=dtype)
    for ex, ef, eb, based, accumulate in steps:
        x, base = (normal(r, n) * 10.0**e for n, e in ((9, ex), (6, eb)))
        big = min(ef, 17.0)
        fb = feedback_kinds(r, 6)[kind]
        if kind == "mse":
            fb = ml.Target(normal(r, 6) * 10.0**big)
        elif kind == "gradient":
            fb = ml.Gradient(normal(r, 6) * 10.0**big)
        elif kind == "reward":
            fb = ml.Reward(10.0**big, response=normal(r, 6))
        before = state_of(lora)
        try:
            if accumulate:
                lora.adapt(x, fb, "m", base=base if based else None)
                before = state_of(lora)
                lora.apply_updates(0.1)
            else:
                lora.instant(x, fb, "m", base=base if based else None)
        except NonFiniteError:
            assert state_of(lora) == before
        for v in (lora["m"].lora_a, lora["m"].lora_b):
            assert np.isfinite(v).all()
        assert np.isfinite(lora.forward(np.ones(9, np.float32), "m")).all()
        ml.Snapshot(lora.snapshot().to_bytes())


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("how", ["instant", "adapt"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_non_finite_inputs_are_refused_with_the_state_bit_identical(how, rule, bad):
    lora, r = make(9, 6, 3, instant=RULES[rule]), rng(1)
    lora.instant(normal(r, 9), ml.Target(normal(r, 6)), "m")
    lora.adapt(normal(r, 9), ml.Target(normal(r, 6)), "m")
    before = state_of(lora)
    for kind, i in itertools.product(KINDS, (0, 8)):
        x = normal(r, 9)
        x[i] = bad
        with pytest.raises(NonFiniteError, match=r"^x: contains NaN or infinity"):
            getattr(lora, how)(x, feedback_kinds(r, 6)[kind], "m")
        base = normal(r, 6)
        base[i % 6] = bad
        with pytest.raises(NonFiniteError, match=r"^base: contains NaN or infinity"):
            getattr(lora, how)(normal(r, 9), feedback_kinds(r, 6)[kind], "m", base=base)
    assert state_of(lora) == before


@pytest.mark.parametrize("lr", [np.nan, np.inf, -np.inf, -1e-3])
def test_a_bad_learning_rate_is_refused(lr):
    lora, r = make(9, 6, 3), rng(1)
    lora.adapt(normal(r, 9), ml.Target(normal(r, 6)), "m")
    before = state_of(lora)
    with pytest.raises(ConfigError, match=r"^lr: got "):
        lora.apply_updates(lr)
    for clip in (0.0, -1.0, np.nan, np.inf):
        with pytest.raises(ConfigError, match=r"^max_grad_norm: got "):
            lora.apply_updates(0.1, clip)
    with pytest.raises(NonFiniteError, match=r"^lr: .*overflow"):
        lora.apply_updates(1e30)
    assert state_of(lora) == before


def test_input_basis_refuses_what_it_cannot_use():
    lora, r = make(9, 6, 3, learned=False), rng(1)
    before = state_of(lora)
    x = normal(r, 20, 9)
    x[7, 3] = np.nan
    for bad, kind in [
        (normal(r, 2, 9), ShapeError),
        (normal(r, 20, 8), ShapeError),
        (np.zeros((20, 9), np.float32), FeedbackError),
        (x, NonFiniteError),
        (normal(r, 20, 9).astype(np.float64) * 1e300, NonFiniteError),
    ]:
        with pytest.raises(kind, match=r"X: "):
            lora.fit_input_basis(bad, "m")
    assert state_of(lora) == before
    lora.adapt(normal(r, 9), ml.Target(normal(r, 6)), "m")
    with pytest.raises(ConfigError, match="pending"):
        lora.fit_input_basis(normal(r, 20, 9), "m")
