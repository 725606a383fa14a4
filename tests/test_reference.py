"""The float64 twin against finite differences, then the core against the twin."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import microlora as ml
import reference as ref
from support import KINDS, close, feedback_kinds, make, normal, rng, twin


def central(f, v, h=1e-6):
    """Gradient of a scalar function by central differences."""
    v, out = ref.f64(v).copy(), np.empty(np.shape(v))
    for i in np.ndindex(v.shape):
        at = v[i]
        v[i] = at + h
        up = f(v)
        v[i] = at - h
        out[i] = (up - f(v)) / (2 * h)
        v[i] = at
    return out


@pytest.mark.parametrize("kind", [k for k in KINDS if k != "gradient"])
@given(seed=st.integers(0, 10_000))
def test_gradients_of_the_twin_match_finite_differences(kind, seed):
    r = rng(seed)
    fb, base, dy = feedback_kinds(r, 5)[kind], normal(r, 5), normal(r, 5)
    loss = lambda v: ref.loss_of(fb, v, base, 0.1)[0]  # noqa: E731
    _, g = ref.loss_of(fb, dy, base, 0.1)
    close(central(loss, dy), g, 1e-6, 1e-7)


@given(seed=st.integers(0, 10_000))
def test_chain_rule_of_the_twin_matches_finite_differences(seed):
    r = rng(seed)
    a, b, x, t, s = normal(r, 2, 4), normal(r, 3, 2), normal(r, 4), normal(r, 3), 1.7
    _, g = ref.mse(ref.forward(x, a, b, s), t)
    da, db = ref.chain(x, a, b, s, g)
    close(central(lambda a: ref.mse(ref.forward(x, a, b, s), t)[0], a), da, 1e-6, 1e-7)
    close(central(lambda b: ref.mse(ref.forward(x, a, b, s), t)[0], b), db, 1e-6, 1e-7)


def test_closed_form_of_a_step_on_both_factors():
    """y(eta) = y - eta p + eta^2 q, with p and q as the concepts page has them."""
    r = rng(3)
    a, b, x, t, s, eta = normal(r, 3, 8), normal(r, 6, 3), normal(r, 8), normal(r, 6), 0.7, 0.013
    y = ref.forward(x, a, b, s)
    g, u0 = y - t, ref.f64(a) @ x
    p = s**2 * (u0 @ u0 * g + x @ x * (g @ b) @ ref.f64(b).T)
    q = s**2 * (x @ x) * (g @ y) * g
    da, db = ref.chain(x, a, b, s, g)
    close(ref.forward(x, a - eta * da, b - eta * db, s), y - eta * p + eta**2 * q, 1e-6)


def terms_of(fb, dy, base):
    """Size of what is added up to dL/dy: where the terms cancel, the sum is only as exact as they are."""
    y = np.linalg.norm(dy + base)
    match type(fb).__name__:
        case "Reward":
            return np.linalg.norm(dy) + abs(fb.r)
        case "Preference":
            return fb.beta / y
        case "Contrastive":
            return 1 / fb.tau / y
    return 1 / y if fb.__class__ is ml.Target and fb.loss == "cosine" else 0.0


@pytest.mark.parametrize("kind", KINDS)
@given(seed=st.integers(0, 10_000), n_in=st.integers(1, 40), n_out=st.integers(4, 40), rank=st.integers(1, 9))
def test_gradients_of_the_core_match_the_twin(kind, seed, n_in, n_out, rank):
    r = rng(seed)
    lora = make(n_in, n_out, rank, seed=seed)
    fb, x, base = feedback_kinds(r, n_out)[kind], normal(r, n_in), normal(r, n_out)
    want = twin(lora)
    before, g = ref.loss_of(fb, want.forward(x), base)
    old_a, old_b = lora["m"].lora_a, lora["m"].lora_b
    want.adapt(x, fb, base)
    result = lora.adapt(x, fb, "m", base=base)
    assert result.applied
    assert lora["m"].pending == 1
    if before is None:
        assert result.loss_before is None
    else:
        close(result.loss_before, before, 1e-5, 1e-6)
    ga, gb = want.pending[0]
    size = want.s * np.linalg.norm(x) * (np.linalg.norm(g) + terms_of(fb, want.forward(x), base))
    size_a, size_b = size * np.linalg.norm(want.b), size * np.linalg.norm(want.a)
    close(result.grad_norm_a, np.linalg.norm(ga), 1e-5, 2e-6 * size_a)
    close(result.grad_norm_b, np.linalg.norm(gb), 1e-5, 2e-6 * size_b)
    lora.apply_updates(1.0)
    # The step is read off the weights, so their own rounding is part of the difference.
    noise = 2e-7 * max(np.abs(old_a).max(), np.abs(old_b).max(), np.abs(ga).max(), np.abs(gb).max())
    close(ref.f64(old_a) - lora["m"].lora_a, ga, 1e-5, noise + 2e-6 * size_a)
    close(ref.f64(old_b) - lora["m"].lora_b, gb, 1e-5, noise + 2e-6 * size_b)


@pytest.mark.parametrize("train", ["b", "both"])
@pytest.mark.parametrize("rule", ["auto", "nlms"])
@pytest.mark.parametrize("kind", KINDS)
def test_instant_follows_the_twin(kind, rule, train):
    """Thirty events in turn, so that a difference would grow."""
    r = rng(11)
    lora = make(20, 12, 4, instant=ml.InstantConfig(rule=rule, train=train))
    want = twin(lora, rule=rule, train=train)
    for _ in range(30):
        fb, x, base = feedback_kinds(r, 12)[kind], normal(r, 20), normal(r, 12)
        before, after = want.instant(x, fb, base)
        got = lora.instant(x, fb, "m", base=base)
        assert got.applied, got
        if kind != "gradient":
            close(got.loss_before, before, 1e-4, 1e-6)
            close(got.loss_after, after, 1e-4, 1e-6)
        close(lora["m"].lora_b, want.b, 1e-4)
        close(lora["m"].lora_a, want.a, 1e-4)


def test_reward_baseline_is_a_running_mean_and_then_a_moving_average():
    lora, want = make(6, 6, 2), ref.Baseline()
    r = rng(5)
    for _ in range(120):
        reward, seen = float(np.float32(r.uniform(-1, 1))), want.value
        got = lora.instant(normal(r, 6), ml.Reward(reward, response=normal(r, 6)), "m")
        assert got.baseline == pytest.approx(seen, abs=1e-6)
        want.update(reward)
    assert lora.instant(normal(r, 6), ml.Target(normal(r, 6)), "m").baseline is None


@pytest.mark.parametrize("phi", [1.0, 0.97])
def test_rls_follows_the_twin_with_and_without_forgetting(phi):
    r = rng(2)
    lora = make(32, 16, 6, learned=False, instant=ml.InstantConfig(forgetting=phi, rho=0.5))
    want = twin(lora, phi=phi, rho=0.5)
    for _ in range(200):
        x, t = normal(r, 32), normal(r, 16)
        before, after = want.instant(x, ml.Target(t))
        got = lora.instant(x, ml.Target(t), "m")
        close(got.loss_before, before, 1e-4, 1e-6)
        close(got.loss_after, after, 1e-4, 1e-6)
    close(lora["m"].lora_b, want.b, 1e-4)
    assert lora["m"].ridge == pytest.approx(want.ridge, rel=1e-5)


@pytest.mark.parametrize(("n", "rank"), [(50, 6), (5, 5), (700, 8)])
def test_input_basis_spans_the_top_singular_directions(n, rank):
    """Exact through the Gram matrix up to 512 inputs, by subspace iteration beyond."""
    r = rng(4)
    x = (normal(r, n, 40) * np.geomspace(4, 0.05, 40)).astype(np.float32)
    lora = make(40, 24, rank, learned=False)
    held = lora.fit_input_basis(x, "m")
    rows, energy = ref.principal_rows(x, rank)
    assert held == pytest.approx(energy[:rank].sum() / energy.sum(), rel=1e-3)
    a = ref.f64(lora["m"].lora_a)
    q = np.linalg.qr(a.T)[0]
    close(q @ (q.T @ rows.T), rows.T, 1e-3)
    u = lora["m"].scaling * x @ a.T
    assert (u**2).sum(1).mean() == pytest.approx(1.0, rel=1e-3)


def test_input_basis_keeps_what_was_learned_where_it_can():
    """Inputs inside the span of A: the new basis can express the old delta."""
    lora, r = make(16, 10, 3), rng(8)
    x = normal(r, 30, 3) @ lora["m"].lora_a
    old = lora.delta_weight("m")
    lora.fit_input_basis(x, "m")
    close(lora.delta_weight("m"), old, 1e-4)


def test_input_basis_refuses_to_forget():
    lora, r = make(16, 10, 3), rng(8)
    with pytest.raises(ml.exceptions.ConfigError, match="B is not zero"):
        lora.fit_input_basis(normal(r, 30, 16), "m")


def test_rls_starts_anew_after_an_apply_that_moved_a():
    """P was measured with the old A: it goes, and its prior is taken from the next event."""
    r = rng(12)
    lora = make(20, 12, 4)
    want = twin(lora)
    for _ in range(3):
        for _ in range(10):
            x, t = normal(r, 20), ml.Target(normal(r, 12))
            want.instant(x, t)
            lora.instant(x, t, "m")
        assert lora["m"].ridge == pytest.approx(want.ridge, rel=1e-4)
        x, t = normal(r, 20), ml.Target(normal(r, 12))
        want.adapt(x, t)
        lora.adapt(x, t, "m")
        want.apply_updates(0.01)
        lora.apply_updates(0.01)
        assert lora["m"].ridge is None
        close(lora["m"].lora_a, want.a, 1e-4)
        close(lora["m"].lora_b, want.b, 1e-4)
