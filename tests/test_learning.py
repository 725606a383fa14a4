"""What learning from feedback promises, as properties over random cases."""

import itertools

import numpy as np
import pytest
from hypothesis import Phase, assume, given, settings
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
    read_tensors,
    rng,
    set_weights,
    state_of,
    twin,
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
    """While the cap on P does not bind: ridge with weights phi^age, and a prior that fades too."""
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
    """Weights stay finite; an event is applied, skipped, or refused with the state kept."""
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
