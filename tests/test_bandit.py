"""Bottleneck LinUCB from Python: against its float64 twin, its laws, another A, bad input."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import microlora as ml
from microlora import _core
from microlora import exceptions as ex
from reference_bandit import ARMS, Twin, bottleneck, off_policy, taught
from support import factors, make, move, normal, rng, scaling, set_weights


def context(lora, x, module="m"):
    return bottleneck(factors(lora, module)[0], scaling(lora, module), x)


def play(bandit, twin, lora, r, events, arms=ARMS):
    """Random inputs and rewards through both; whatever the bandit chooses is what the twin learns."""
    for _ in range(events):
        x = normal(r, lora["m"].in_features)
        if twin.unit is None:
            # The prior's unit comes from this one, which cancellation in float32 must not have made tiny.
            x = max(normal(r, 16, len(x)), key=lambda x: np.linalg.norm(context(lora, x)))
        u = context(lora, x)
        twin.context(u)
        choice = bandit.choose(x, arms)
        want = twin.scores(u, arms)
        np.testing.assert_allclose(choice.scores, want, rtol=2e-4, atol=2e-5)
        assert choice.scores[choice.arm] == max(choice.scores) or bandit.settings["epsilon"] > 0
        assert choice.name == arms[choice.arm]
        reward = float(r.uniform(-1, 1))
        assert bandit.reward(choice.id, reward) == pytest.approx(
            twin.reward(choice.name, u, reward), rel=2e-4, abs=2e-4
        )


@given(
    rank=st.integers(1, 20),
    alpha=st.sampled_from([0.0, 0.3, 2.0]),
    ridge=st.sampled_from([0.1, 1.0, 30.0]),
    epsilon=st.sampled_from([0.0, 0.4]),
    seed=st.integers(0, 999),
)
def test_scores_and_expectations_are_those_of_the_float64_twin(rank, alpha, ridge, epsilon, seed):
    lora = make(24, 24, rank, seed=seed)
    bandit = _core.Bandit(lora, alpha=alpha, ridge=ridge, epsilon=epsilon, seed=seed)
    play(bandit, Twin(alpha, ridge, epsilon), lora, rng(seed), 25)


def test_the_first_choice_is_drawn_evenly_and_says_so():
    counts = np.zeros(3)
    for seed in range(600):
        choice = _core.Bandit(make(), seed=seed).choose(np.ones(24, np.float32), ARMS)
        assert choice.propensity == pytest.approx(1 / 3)
        counts[choice.arm] += 1
    assert ((counts - 200) ** 2 / 200).sum() < 13.8  # chi-square, 2 degrees, p = 0.001


def test_exploration_is_drawn_as_the_propensities_say():
    lora, x = make(), np.ones(24, np.float32)
    bandit = _core.Bandit(lora, epsilon=0.3, alpha=0.0, history=0)
    for name, reward in zip(ARMS, (0.2, 0.9, 0.5), strict=True):
        bandit.reward(bandit.choose(x, [name]), reward)
    n, counts = 4000, np.zeros(3)
    for _ in range(n):
        choice = bandit.choose(x, ARMS)
        assert choice.propensity == pytest.approx(0.8 if choice.name == "long" else 0.1)
        counts[choice.arm] += 1
    want = n * np.array([0.1, 0.8, 0.1])
    assert ((counts - want) ** 2 / want).sum() < 13.8


def test_the_same_history_gives_the_same_choices():
    def run(seed):
        lora, r = make(), rng(1)
        bandit = _core.Bandit(lora, epsilon=0.5, seed=seed)
        choices = []
        for _ in range(60):
            choices.append(bandit.choose(normal(r, 24), ARMS))
            bandit.reward(choices[-1], float(r.uniform()))
        return choices

    assert run(3) == run(3)
    assert [c.arm for c in run(3)] != [c.arm for c in run(4)]


def test_rewards_may_come_late_and_in_any_order():
    lora, r = make(), rng(2)
    bandit, twin = _core.Bandit(lora), Twin()
    xs, waiting = normal(r, 12, 24), []
    for x in xs:
        twin.context(context(lora, x))
        waiting.append((bandit.choose(x, ARMS), x))
    assert bandit.waiting == 12
    for i in r.permutation(12):
        choice, x = waiting[i]
        bandit.reward(choice, i / 12)
        twin.reward(choice.name, context(lora, x), i / 12)
    u = context(lora, xs[0])
    np.testing.assert_allclose(bandit.choose(xs[0], ARMS).scores, twin.scores(u, ARMS), rtol=1e-4, atol=1e-5)


def test_arms_come_as_they_are_named_and_count_their_rewards():
    lora, x = make(), np.ones(24, np.float32)
    bandit = _core.Bandit(lora, max_arms=3)
    bandit.reward(bandit.choose(x, ["a"]), 1.0)
    bandit.reward(bandit.choose(x, ("a",)), 0.0)
    bandit.choose(x, ["b", "ç 名"])
    arms = bandit.arms()
    assert arms["a"] == (2, 0.5)
    assert arms["b"][0] == arms["ç 名"][0] == 0
    assert np.isnan(arms["b"][1])
    before = bandit.to_bytes()
    with pytest.raises(ex.ConfigError, match="at most 3 arms"):
        bandit.choose(x, ["a", "d"])
    assert bandit.to_bytes() == before


def test_the_oldest_waiting_choice_is_given_up():
    bandit, x = _core.Bandit(make(), max_open=3), np.ones(24, np.float32)
    choices = [bandit.choose(x, ARMS) for _ in range(5)]
    assert (bandit.waiting, bandit.dropped) == (3, 2)
    for choice in choices[:2]:
        with pytest.raises(ex.UnknownChoiceError, match="max_open"):
            bandit.reward(choice, 1.0)
    for choice in choices[2:]:
        bandit.reward(choice, 1.0)
    assert bandit.waiting == 0


def test_log_is_bounded_and_memory_flat():
    bandit, r = _core.Bandit(make(), history=16, epsilon=0.2), rng(3)
    sizes = []
    for i in range(400):
        choice = bandit.choose(normal(r, 24), ARMS)
        bandit.reward(choice, i)
        if i >= 100:
            sizes.append(bandit.memory_bytes)
    log = bandit.log()
    assert [(e[0], e[3]) for e in log] == [(i + 1, float(i)) for i in range(384, 400)]
    assert all(name in ARMS and 0 < p <= 1 for _, name, p, _ in log)
    assert len(set(sizes)) == 1


def test_inputs_without_length_teach_nothing():
    bandit, twin, lora = _core.Bandit(make()), Twin(), make()
    zero = np.zeros(24, np.float32)
    choice = bandit.choose(zero, ARMS)
    assert choice.scores == [0.0] * 3
    assert bandit.reward(choice, 5.0) == 0.0
    play(bandit, twin, lora, rng(17), 10)
    assert bandit.choose(zero, ARMS).scores == [0.0] * 3


@pytest.mark.parametrize("scale", [1e-15, 1e15])
def test_the_scale_of_the_inputs_does_not_matter(scale):
    def run(scale):
        lora, r = make(), rng(18)
        bandit = _core.Bandit(lora)
        for _ in range(30):
            x = normal(r, 24)
            choice = bandit.choose(x * np.float32(scale), ARMS)
            bandit.reward(choice, float(x[0] > 0))
        return np.array(bandit.choose(x * np.float32(scale), ARMS).scores)

    np.testing.assert_allclose(run(scale), run(1.0), rtol=1e-3)


def test_extreme_inputs_and_rewards_stay_finite():
    lora, r = make(), rng(19)
    bandit = _core.Bandit(lora)
    for i in range(200):
        x = normal(r, 24) * np.float32(10.0 ** r.uniform(-30, 30))
        bandit.reward(bandit.choose(x, ARMS), float(r.choice([-1e18, 1e18, 1e-300, 0.0])))
        assert np.isfinite(bandit.choose(x, ARMS).scores).all(), i


# --- Another A ---------------------------------------------------------------------------------------------


def relearned(lora, seen, waiting=(), unit=None):
    """The twin of a bandit that saw these in the present bottleneck."""
    twin = Twin(epsilon=0.3)
    us = [context(lora, x) for x, _, _ in seen]
    twin.unit = unit or np.mean([u @ u for u in us + [context(lora, x) for x in waiting]])
    for u, (_, name, reward) in zip(us, seen, strict=True):
        twin.reward(name, u, reward)
    return twin


@pytest.mark.parametrize("history", [1000, 10])
def test_another_a_makes_the_arms_learn_again(history):
    lora, r = make(learned=False), rng(4)
    bandit, seen = taught(lora, r, history=history)
    late = normal(r, 24)
    open_choice = bandit.choose(late, ARMS)
    lora.fit_input_basis(normal(r, 64, 24) @ normal(r, 24, 24))
    x = normal(r, 24)
    choice = bandit.choose(x, ARMS)
    assert bandit.restarts == 1
    twin, u = relearned(lora, seen[-history:], unit=1.0), context(lora, x)
    np.testing.assert_allclose(choice.scores, twin.scores(u, ARMS), rtol=1e-4, atol=1e-5)
    bandit.reward(open_choice, 0.7)
    twin.reward(open_choice.name, context(lora, late), 0.7)
    np.testing.assert_allclose(bandit.choose(x, ARMS).scores, twin.scores(u, ARMS), rtol=1e-4, atol=1e-5)
    assert bandit.restarts == 1


def test_without_a_fitted_basis_the_unit_is_the_mean_of_what_is_kept():
    lora, r = make(), rng(5)
    bandit, seen = taught(lora, r)
    late = normal(r, 24)
    bandit.choose(late, ARMS)
    move(lora, r)
    x = normal(r, 24)
    want = relearned(lora, seen, waiting=[late]).scores(context(lora, x), ARMS)
    np.testing.assert_allclose(bandit.choose(x, ARMS).scores, want, rtol=1e-4, atol=1e-5)


def test_a_refused_choice_does_not_make_the_arms_learn_again():
    lora, r = make(), rng(5)
    bandit, _ = taught(lora, r)
    move(lora, r)
    before = bandit.to_bytes()
    for arms in ([], ["a", "a"], [""]):
        with pytest.raises(ex.ConfigError):
            bandit.choose(normal(r, 24), arms)
    assert (bandit.restarts, bandit.to_bytes()) == (0, before)


def test_what_leaves_the_numbers_of_a_does_not_make_the_arms_learn_again():
    lora, r = make(dtype="bf16"), rng(6)
    bandit, _ = taught(lora, r)
    x = normal(r, 24)
    want = bandit.choose(x, ARMS).scores
    before = lora.snapshot()
    lora.instant(normal(r, 24), ml.Target(normal(r, 24)))
    lora.restore(before)
    lora.restore(ml.Snapshot(before.to_bytes()))
    lora.set_storage("f32")
    lora.enabled = False
    assert bandit.choose(x, ARMS).scores == want
    assert bandit.restarts == 0


def test_one_other_number_in_a_is_noticed():
    lora, r = make(), rng(7)
    for at in [(0, 0), (3, 23), (1, 7)]:
        bandit, _ = taught(lora, r)
        a, b = (f.copy() for f in factors(lora))
        a[at] = np.nextafter(a[at], np.float32(np.inf))
        set_weights(lora, {"m": (a, b)})
        bandit.choose(normal(r, 24), ARMS)
        assert bandit.restarts == 1


def test_every_step_that_moves_a_is_noticed():
    lora, r = make(), rng(7)
    bandit, _ = taught(lora, r)
    for step in range(1, 4):
        lora.adapt(normal(r, 24), ml.Target(normal(r, 24)))
        lora.apply_updates(0.1)
        bandit.choose(normal(r, 24), ARMS)
        assert bandit.restarts == step


def test_nothing_kept_means_starting_from_nothing():
    lora, r = make(), rng(8)
    bandit, _ = taught(lora, r, history=0)
    assert bandit.log() == []
    waiting = bandit.choose(normal(r, 24), ARMS)
    move(lora, r)
    scores = bandit.choose(normal(r, 24), ARMS).scores
    assert len(set(scores)) == 1
    bandit.reward(waiting, 1.0)  # its input is gone: it counts, and teaches nothing
    assert len(set(bandit.choose(normal(r, 24), ARMS).scores)) == 1


def test_a_learner_that_moves_a_is_refused():
    lora = make(instant=ml.InstantConfig(rule="nlms", train="both"))
    with pytest.raises(ex.ConfigError, match=r"instant.train: got both, expected b"):
        _core.Bandit(lora)


# --- Off-policy evaluation ---------------------------------------------------------------------------------


@given(n=st.integers(1, 60), seed=st.integers(0, 999))
def test_off_policy_is_its_formula(n, seed):
    r = rng(seed)
    p, rewards, q = r.uniform(0.01, 1, n), r.normal(size=n), r.uniform(0, 1, n)
    got, want = _core.off_policy(p, rewards, q), off_policy(p, rewards, q)
    assert set(got) == set(want)
    for key, value in want.items():
        assert got[key] == pytest.approx(value, rel=1e-9, abs=1e-12), key


def test_the_policy_that_logged_is_worth_its_mean():
    p, rewards = [0.2, 0.7, 0.1], [1.0, 0.0, 0.5]
    got = _core.off_policy(p, rewards, p)
    assert got["ips"] == got["snips"] == pytest.approx(0.5)
    assert (got["weight"], got["effective"]) == (1.0, 3.0)


def test_off_policy_meets_the_truth_on_simulated_logs():
    """Means over 300 logs of 200 choices of a bandit that learns meanwhile: within 4 standard errors."""
    lora, truth = make(8, 8, 2), np.array([0.2, 0.5, 0.8])
    target = np.array([0.1, 0.2, 0.7])
    values, snips, errors = [], [], []
    r = rng(20)
    for seed in range(300):
        bandit = _core.Bandit(lora, epsilon=0.5, seed=seed)
        for _ in range(200):
            choice = bandit.choose(normal(r, 8), ARMS)
            bandit.reward(choice, float(r.random() < truth[choice.arm]))
        log = bandit.log()
        q = [target[ARMS.index(name)] for _, name, _, _ in log]
        value = _core.off_policy([e[2] for e in log], [e[3] for e in log], q)
        values.append(value["ips"])
        snips.append(value["snips"])
        errors.append(value["ips_error"])
        assert value["weight"] == pytest.approx(1.0, abs=1.0)
    for estimates in (values, snips):
        error = np.std(estimates) / np.sqrt(len(estimates))
        assert abs(np.mean(estimates) - target @ truth) < 4 * error
        assert error < 0.01
    # The stated error is the spread that there is.
    assert np.mean(errors) == pytest.approx(np.std(values), rel=0.2)


@pytest.mark.parametrize(
    ("args", "error", "words"),
    [
        (([], [], []), ex.ShapeError, "rewards: got shape (0,)"),
        (([0.5], [1.0, 0.0], [1.0, 1.0]), ex.ShapeError, "propensities: got shape (1,), expected (2,)"),
        (([0.5], [1.0], []), ex.ShapeError, "probabilities: got shape (0,), expected (1,)"),
        (([0.5, 0.0], [1.0, 0.0], [1.0, 1.0]), ex.ConfigError, "propensities: got 0 in row 1"),
        (([1.5], [1.0], [1.0]), ex.ConfigError, "propensities: got 1.5 in row 0"),
        (([float("nan")], [1.0], [1.0]), ex.ConfigError, "propensities: got NaN in row 0"),
        (([0.5], [1.0], [-0.1]), ex.ConfigError, "probabilities: got -0.1 in row 0"),
        (([0.5], [float("inf")], [0.5]), ex.NonFiniteError, "rewards: contains NaN or infinity"),
        (([0.5], [1.0], [0.0]), ex.ConfigError, "probabilities: got zeros alone"),
        (("a", [1.0], [0.0]), ex.DTypeError, "propensities: got <class 'str'>"),
    ],
)
def test_off_policy_refuses(args, error, words):
    with pytest.raises(error) as caught:
        _core.off_policy(*args)
    assert words in str(caught.value)
