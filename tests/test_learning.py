"""What learning from feedback promises, as properties over random cases."""

import itertools

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

import microlora as ml
import reference as ref
from support import (
    KINDS,
    close,
    feedback_kinds,
    make,
    normal,
    read_tensors,
    rng,
    set_weights,
)

seeds = st.integers(0, 2**32 - 1)
sizes = st.integers(2, 24)


def nlms(mu=None, train="b", **more):
    return ml.InstantConfig(rule="nlms", mu=mu, train=train, **more)


# -- (3), (4), (5): single steps --


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("how", ["instant", "adapt"])
def test_the_first_step_changes_b_only(kind, how):
    lora, r = make(12, 9, 3, learned=False, instant=nlms(train="both")), rng(1)
    a = lora["m"].raw()[0].copy()
    event = normal(r, 12), feedback_kinds(r, 9)[kind], "m", normal(r, 9)
    assert getattr(lora, how)(*event).applied
    lora.apply_updates(0.1)
    np.testing.assert_array_equal(lora["m"].raw()[0], a)
    assert lora["m"].lora_b.any()
    getattr(lora, how)(*event)
    lora.apply_updates(0.1)
    assert (lora["m"].lora_a != a).any()


@given(
    seed=seeds, n_in=sizes, n_out=sizes, rank=st.integers(1, 6), mu=st.floats(0.01, 1.0), based=st.booleans()
)
def test_b_only_nlms_leaves_one_minus_mu_of_the_error(seed, n_in, n_out, rank, mu, based):
    r = rng(seed)
    lora = make(n_in, n_out, rank, seed=seed, instant=nlms(mu))
    x, t, base = normal(r, n_in), normal(r, n_out), normal(r, n_out) if based else np.zeros(n_out, np.float32)
    error = ref.f64(lora.forward(x, "m")) + base - t
    result = lora.instant(x, ml.Target(t), "m", base=base)
    left = ref.f64(lora.forward(x, "m")) + base - t
    scale = np.abs(t).max() + np.abs(base).max() + np.abs(error).max()
    close(left, (1 - mu) * error, 1e-5, 2e-6 * scale)
    assert result.step == pytest.approx(mu, rel=1e-3)
    assert (result.rule, result.halvings) == ("nlms", 0)
    close(result.loss_before, 0.5 * error @ error, 1e-4, 1e-9)


def event_loss(lora, x, fb, base, result):
    seen = result.baseline or 0.0
    return ref.loss_of(fb, ref.forward(x, lora["m"].lora_a, lora["m"].lora_b, lora["m"].scaling), base, seen)[
        0
    ]


def check_safe_step(seed, kind, train, scale, mu):
    r = rng(seed)
    n_in, n_out, rank = r.integers(2, 20), r.integers(2, 20), r.integers(1, 6)
    lora = make(int(n_in), int(n_out), int(rank), seed=seed % 2**30, instant=nlms(mu, train))
    a, b = lora["m"].lora_a, lora["m"].lora_b
    set_weights(lora, {"m": (a * scale, b * np.float32(10.0 ** r.uniform(-2, 2)))})
    x, base = normal(r, n_in) * np.float32(10.0 ** r.uniform(-2, 2)), normal(r, n_out)
    fb = feedback_kinds(r, n_out)[kind]
    old = event_loss(lora, x, fb, base, type("R", (), {"baseline": 0.0}))
    before = lora.export_weights()
    result = lora.instant(x, fb, "m", base=base)
    new = event_loss(lora, x, fb, base, result)
    if not result.applied:
        assert result.reason
        assert lora.export_weights() == before
        return
    # What float32 can resolve of the loss at this size of output, with both sides made from float32 weights.
    y = np.linalg.norm(lora.forward(x, "m")) + np.linalg.norm(base)
    spread = np.linalg.norm(x) * np.linalg.norm(lora["m"].lora_a) * np.linalg.norm(lora["m"].lora_b)
    noise = 2e-6 * (lora["m"].scaling * spread + y)
    slope = np.sqrt(2 * old) if kind in ("mse", "reward") else terms(fb) / (np.linalg.norm(base) * 0.1)
    assert new <= old + slope * noise + noise**2, (result, old, new)
    if result.loss_after is not None:
        assert result.loss_after <= result.loss_before


def terms(fb):
    return {"Preference": lambda: 2 * fb.beta, "Contrastive": lambda: 2 / fb.tau}.get(
        type(fb).__name__, lambda: 2
    )()


@pytest.mark.parametrize("kind", [k for k in KINDS if k != "gradient"])
@given(
    seed=seeds,
    train=st.sampled_from(["b", "both"]),
    scale=st.floats(0.1, 10),
    mu=st.none() | st.floats(0.01, 1.0),
)
def test_a_safe_step_never_increases_the_loss_of_its_event(kind, seed, train, scale, mu):
    check_safe_step(seed, kind, train, scale, mu)


@pytest.mark.slow
def test_a_safe_step_never_increases_the_loss_in_ten_thousand_cases():
    r = rng(0)
    kinds = [k for k in KINDS if k != "gradient"]
    for seed, kind, train in zip(
        range(10_000), itertools.cycle(kinds), itertools.cycle(["b", "both", "both"])
    ):
        mu = None if seed % 4 else 1.0
        check_safe_step(seed, kind, train, float(10.0 ** r.uniform(-1, 1)), mu)


@pytest.mark.parametrize("train", ["b", "both"])
def test_a_step_that_would_overshoot_is_halved(train):
    """Large weights and mu = 1: the quadratic term of the closed form explodes without the line check."""
    halvings, r = 0, rng(4)
    for seed in range(40):
        lora = make(6, 6, 3, seed=seed, instant=nlms(1.0, train))
        result = lora.instant(normal(r, 6) * 3, ml.Target(normal(r, 6) * 30), "m")
        assert result.applied
        assert result.loss_after < result.loss_before
        halvings += result.halvings
    assert (halvings > 0) == (train == "both")


@given(seed=seeds, rank=st.integers(1, 5))
def test_a_gradient_step_is_the_closed_form(seed, rank):
    r = rng(seed)
    lora, g, x = make(11, 7, rank, seed=seed, instant=nlms(0.3)), normal(r, 7), normal(r, 11)
    before = ref.f64(lora.forward(x, "m"))
    result = lora.instant(x, ml.Gradient(g), "m")
    close(lora.forward(x, "m"), before - 0.3 * g, 1e-5, 2e-6 * (np.abs(before).max() + 1))
    assert (result.loss_before, result.loss_after, result.applied) == (None, None, True)


def test_max_grad_norm_shortens_the_gradient_of_the_output():
    r = rng(3)
    x, g, unclipped = normal(r, 8), normal(r, 5) * 100, make(8, 5, 2, instant=nlms(0.5))
    clipped = make(8, 5, 2, instant=nlms(0.5, max_grad_norm=2.0))
    start = ref.f64(clipped.forward(x, "m"))
    clipped.instant(x, ml.Gradient(g), "m")
    unclipped.instant(x, ml.Gradient(g), "m")
    close(start - clipped.forward(x, "m"), 0.5 * 2.0 * g / np.linalg.norm(g), 1e-4)
    close(start - unclipped.forward(x, "m"), 0.5 * g, 1e-4)


# -- (6) RLS --


def test_rls_equals_ridge_on_all_events():
    """1,000 noisy events in turn against one solve in float64, at the documented constant."""
    r = rng(0)
    lora = make(48, 20, 8, learned=False, instant=ml.InstantConfig(rho=2.0))
    a, s = ref.f64(lora["m"].lora_a), lora["m"].scaling
    x, b = normal(r, 1000, 48), normal(r, 20, 8)
    t = (s * x @ a.T @ b.T + 0.3 * normal(r, 1000, 20)).astype(np.float32)
    base = normal(r, 1000, 20)
    assert lora["m"].ridge is None
    for x_i, t_i, base_i in zip(x, t, base, strict=True):
        lora.instant(x_i, ml.Target(t_i + base_i), "m", base=base_i)
    u = s * x @ a.T
    assert lora["m"].ridge == pytest.approx(2.0 * (u[0] @ u[0]), rel=1e-5)
    close(lora["m"].lora_b, ref.ridge(u, t, lora["m"].ridge), 1e-4)


def test_rls_after_an_input_basis_has_one_unit_of_prior():
    r = rng(1)
    lora = make(48, 20, 8, learned=False, instant=ml.InstantConfig(rho=2.0))
    x = normal(r, 300, 48)
    lora.fit_input_basis(x[:50], "m")
    t = normal(r, 300, 20)
    for x_i, t_i in zip(x, t, strict=True):
        lora.instant(x_i, ml.Target(t_i), "m")
    assert lora["m"].ridge == 2.0
    close(lora["m"].lora_b, ref.ridge(lora["m"].scaling * x @ ref.f64(lora["m"].lora_a).T, t, 2.0), 1e-4)


def test_rls_with_forgetting_weighs_events_by_their_age():
    """While the cap on P does not bind: ridge with weights phi^age and a prior that fades too."""
    r, phi, n = rng(2), 0.98, 150
    lora = make(24, 10, 4, learned=False, instant=ml.InstantConfig(forgetting=phi, rho=0.1))
    x, t = normal(r, n, 24), normal(r, n, 10)
    for x_i, t_i in zip(x, t, strict=True):
        lora.instant(x_i, ml.Target(t_i), "m")
    u, age = lora["m"].scaling * x @ ref.f64(lora["m"].lora_a).T, np.arange(n)[::-1]
    close(lora["m"].lora_b, ref.ridge(u, t, lora["m"].ridge * phi**n, phi**age), 1e-3)


def test_rls_forgets_an_old_map_only_when_told_to():
    x, old, new = normal(rng(3), 400, 16), normal(rng(4), 8, 4), normal(rng(5), 8, 4)
    error = {}
    for phi in (1.0, 0.95):
        lora = make(16, 8, 4, learned=False, instant=ml.InstantConfig(forgetting=phi))
        u = lora["m"].scaling * x @ ref.f64(lora["m"].lora_a).T
        for i in range(400):
            lora.instant(x[i], ml.Target(u[i] @ (old if i < 200 else new).T), "m")
        error[phi] = np.abs(lora["m"].lora_b - new).max()
    assert error[0.95] < 0.01 * error[1.0]


def constant_events(count, phi):
    lora = make(16, 8, 4, learned=False, instant=ml.InstantConfig(forgetting=phi))
    x, fb = normal(rng(1), 16), ml.Target(normal(rng(2), 8))
    for _ in range(count):
        lora.instant(x, fb, "m")
    assert np.isfinite(lora["m"].lora_b).all()
    return lora, x


def trace_of(lora):
    _, tensors = read_tensors(lora.snapshot().to_bytes())
    p = np.frombuffer(next(v for k, v in tensors.items() if k.endswith("/p")), np.float64)
    p = p.reshape(lora["m"].rank, -1)
    np.testing.assert_array_equal(p, p.T)
    assert (np.linalg.eigvalsh(p) >= 0).all()
    return np.trace(p)


def check_no_windup(count, phi):
    lora, _ = constant_events(count, phi)
    assert trace_of(lora) <= lora["m"].rank / lora["m"].ridge * (1 + 1e-9)
    x, t = normal(rng(7), 16), normal(rng(8), 8)
    for _ in range(3):  # a direction not seen for long must neither explode nor be dead
        result = lora.instant(x, ml.Target(t), "m")
        assert result.applied
        assert result.loss_after < result.loss_before
    assert np.abs(lora["m"].lora_b).max() < 1e3


def test_forgetting_does_not_wind_up():
    check_no_windup(3_000, 0.9)


@pytest.mark.slow
@pytest.mark.parametrize("phi", [0.9, 0.999])
def test_forgetting_does_not_wind_up_in_two_hundred_thousand_events(phi):
    check_no_windup(200_000, phi)


@given(seed=seeds, rank=st.integers(1, 6))
def test_alpha_cancels_out_of_rls_and_nlms(seed, rank):
    r = rng(seed)
    x, t = normal(r, 5, 12), normal(r, 5, 8)
    for instant in (ml.InstantConfig(), nlms()):
        outputs = []
        for alpha in (0.25, 64.0):
            lora = make(12, 8, rank, alpha=alpha, learned=False, instant=instant)
            for x_i, t_i in zip(x, t, strict=True):
                lora.instant(x_i, ml.Target(t_i), "m")
            outputs.append(lora.forward(x, "m"))
        close(outputs[0], outputs[1], 1e-3)


# -- (7), (9): rewards --


@given(seed=seeds, kappa=st.floats(0.01, 3))
def test_a_reward_that_was_expected_teaches_nothing(seed, kappa):
    """kappa (R - b) = <e, dY>: zero gradient."""
    r = rng(seed)
    lora = make(10, 8, 3, seed=seed, instant=ml.InstantConfig(kappa=kappa))
    x, e = normal(r, 10), normal(r, 8)
    score = float(ref.unit(e) @ ref.f64(lora.forward(x, "m")))
    assume(abs(score) > 1e-3)
    result = lora.adapt(x, ml.Reward(score / kappa, response=e), "m")
    other = lora.adapt(x, ml.Gradient(ref.unit(e) * np.linalg.norm(lora.forward(x, "m"))), "m")
    assert result.grad_norm_b <= 2e-5 * other.grad_norm_b
    assert result.grad_norm_a <= 2e-5 * max(other.grad_norm_a, other.grad_norm_b)


@pytest.mark.parametrize("how", ["instant", "adapt"])
@given(seed=seeds, size=st.floats(0.05, 1))
def test_opposite_rewards_move_the_score_in_opposite_directions(how, seed, size):
    r = rng(seed)
    x, e, moved = normal(r, 10), normal(r, 8), []
    for sign in (1, -1):
        lora = make(10, 8, 3, learned=False, seed=seed)
        getattr(lora, how)(x, ml.Reward(sign * size, response=e), "m")
        lora.apply_updates(0.5)
        moved.append(ref.unit(e) @ ref.f64(lora.forward(x, "m")))
    assert moved[0] > 0 > moved[1]
    assert moved[0] == pytest.approx(-moved[1], rel=1e-4)


def test_names_people_know_move_the_score_the_way_they_say():
    r = rng(1)
    x, e = normal(r, 10), normal(r, 8)
    for fb, sign in [(ml.Feedback.success(0.9, response=e), 1), (ml.Feedback.failure(-0.8, response=e), -1)]:
        lora = make(10, 8, 3, learned=False)
        lora.instant(x, fb, "m")
        assert sign * float(lora.forward(x, "m") @ e) > 0
    lora = make(10, 8, 3, learned=False)
    lora.instant(x, ml.Feedback.preference(e, -e), "m", base=normal(r, 8))
    assert float(lora.forward(x, "m") @ e) > 0


def test_rewards_do_not_look_at_the_base():
    r = rng(2)
    x, fb, one, two = normal(r, 10), ml.Reward(0.7, response=normal(r, 8)), make(10, 8, 3), make(10, 8, 3)
    one.instant(x, fb, "m")
    two.instant(x, fb, "m", base=normal(r, 8))
    np.testing.assert_array_equal(one["m"].lora_b, two["m"].lora_b)


# -- (8) learning for real --


class ConstantStub:
    """What adds a constant to every output per unit of quality: it must not pass for learning."""

    def __init__(self, width, step=0.01):
        self.bias, self.step = np.zeros(width, np.float32), np.float32(step)

    def forward(self, x):
        return np.broadcast_to(self.bias, (*np.shape(x)[:-1], len(self.bias)))

    def instant(self, x, feedback):
        del x
        self.bias = self.bias + self.step * np.sign(feedback.t - self.bias).mean()

    adapt = instant

    def apply_updates(self, lr):
        del lr


class MeanStub(ConstantStub):
    """The best constant there is: the mean of all targets."""

    seen = 0

    def instant(self, x, feedback):
        del x
        self.seen += 1
        self.bias = self.bias + (feedback.t - self.bias) / self.seen

    adapt = instant


def check_learns_instantly(learner, a, s, n_out, seed=0, events=500):
    """y = s x A B* on the learner's own A, no noise: loss on unseen inputs falls 100 times."""
    r = rng(seed)
    target = normal(r, n_out, len(a))
    x, held_out = normal(r, events, a.shape[1]), normal(r, 200, a.shape[1])
    wanted = ref.forward(held_out, a, target, s)
    loss = lambda: ((learner.forward(held_out.astype(np.float32)) - wanted) ** 2).sum()  # noqa: E731
    before = loss()
    for x_i in x:
        learner.instant(x_i, ml.Target(ref.forward(x_i, a, target, s)))
    assert loss() * 100 < before


def check_learns_by_gradient(learner, n_in, n_out, seed=0, rounds=400, lr=0.05):
    """Any map of low rank by adapt + apply_updates: loss on unseen inputs falls 100 times."""
    r = rng(seed)
    w = (normal(r, n_out, 2) @ normal(r, 2, n_in)) / np.sqrt(n_in)
    held_out = normal(r, 200, n_in)
    loss = lambda: ((learner.forward(held_out) - held_out @ w.T) ** 2).sum()  # noqa: E731
    before = loss()
    for _ in range(rounds):
        for x in normal(r, 16, n_in):
            learner.adapt(x, ml.Target(w @ x))
        learner.apply_updates(lr)
    assert loss() * 100 < before


def test_learns_a_map_on_its_own_a_in_500_events():
    for seed in range(3):
        lora = make(64, 40, 8, learned=False, seed=seed)
        check_learns_instantly(lora, ref.f64(lora["m"].lora_a), lora["m"].scaling, 40, seed)


def test_learns_any_low_rank_map_by_adapt_and_apply():
    check_learns_by_gradient(make(24, 16, 4, learned=False), 24, 16)


def test_a_frozen_a_cannot_learn_an_arbitrary_map():
    """Why the map of the instant test lies on the learner's own A; this is how much a frozen A leaves."""
    lora, r = make(64, 40, 4, learned=False), rng(0)
    w = (normal(r, 40, 2) @ normal(r, 2, 64)) / 8
    for x in normal(r, 500, 64):
        lora.instant(x, ml.Target(w @ x))
    x = normal(r, 100, 64)
    assert ((lora.forward(x) - x @ w.T) ** 2).sum() > 0.5 * ((x @ w.T) ** 2).sum()


@pytest.mark.parametrize("stub", [ConstantStub, MeanStub])
def test_a_stub_that_adds_a_constant_fails_both(stub):
    lora = make(64, 40, 8, learned=False)
    with pytest.raises(AssertionError):
        check_learns_instantly(stub(40), ref.f64(lora["m"].lora_a), lora["m"].scaling, 40)
    with pytest.raises(AssertionError):
        check_learns_by_gradient(stub(16), 24, 16, rounds=50)


@pytest.mark.parametrize("kind", ["cosine", "preference", "contrastive"])
def test_repeated_feedback_of_every_direction_is_followed(kind):
    r = rng(9)
    lora, fb, x, base = (
        make(16, 12, 4, learned=False),
        feedback_kinds(r, 12)[kind],
        normal(r, 16),
        normal(r, 12),
    )
    first = lora.instant(x, fb, "m", base=base).loss_before
    for _ in range(400):
        last = lora.instant(x, fb, "m", base=base)
        assert last.applied or last.loss_before < 1e-5, last
    assert last.loss_before < 0.7 * first
