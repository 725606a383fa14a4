"""Schedules: the laws of each name, the rates worked out by hand, and what is refused."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from microlora.exceptions import ConfigError
from microlora.training.schedule import SCHEDULES, LearningRateSchedule

WARM = [name for name, row in SCHEDULES.items() if "warmup" in row.uses]
REACHES_LOW = ("linear", "cosine", "exponential")


@st.composite
def schedules(draw, names=tuple(SCHEDULES)):
    name = draw(st.sampled_from(names))
    total = draw(st.integers(2, 3000))
    base = draw(st.floats(1e-6, 10.0))
    kwargs = {}
    if name in WARM:
        low = 1 if name == "warmup_constant" else 0
        kwargs["warmup"] = draw(st.integers(low, total - 1))
        kwargs["min_lr"] = base * draw(st.floats(1e-3, 1.0))
    if name == "exponential" and draw(st.booleans()):
        kwargs["decay"] = draw(st.floats(0.9, 1.0))
    if name == "step" and draw(st.booleans()):
        kwargs["milestones"] = tuple(sorted(draw(st.sets(st.integers(1, total), min_size=1, max_size=5))))
    return LearningRateSchedule(name, base_lr=base, total=total, **kwargs)


def all_lrs(s, beyond=0):
    return s.lrs(np.arange(s.total + 1 + beyond))


@given(schedules())
def test_rates_are_finite_and_between_their_bounds(s):
    rates = all_lrs(s, 5)
    low = s.base_lr / 25 / 1e4 if s.name == "one_cycle" else min(s.min_lr, s.base_lr)
    assert np.isfinite(rates).all()
    assert (rates <= s.base_lr * (1 + 1e-12)).all()
    assert (rates >= low * (1 - 1e-12)).all()


@given(schedules(), st.integers(0, 5000))
def test_one_rate_is_that_of_many(s, t):
    assert s.lr(t) == s.lrs([t])[0] == s.lrs(np.arange(t + 1))[t]


@given(schedules(), st.integers(1, 100_000))
def test_steps_beyond_the_total_stay_where_it_ended(s, more):
    assert s.lr(s.total + more) == s.lr(s.total)


@given(schedules(WARM))
def test_warm_up_rises_to_the_base_rate(s):
    rates = all_lrs(s)[: s.warmup]
    if s.warmup:
        assert (np.diff(rates) >= 0).all()
        assert rates[-1] == pytest.approx(s.base_lr, rel=1e-12)


@given(schedules(WARM))
def test_after_the_warm_up_nothing_rises(s):
    rates = all_lrs(s)[s.warmup :]
    assert (np.diff(rates) <= s.base_lr * 1e-12).all()


@given(schedules(REACHES_LOW))
def test_ends_are_the_base_rate_and_the_lowest_one(s):
    assert s.lr(s.warmup) == pytest.approx(s.base_lr, rel=1e-12)
    if s.decay is None:
        assert s.lr(s.total) == pytest.approx(s.min_lr, rel=1e-9)


@given(schedules(("constant",)))
def test_constant_is_the_same_everywhere(s):
    assert set(all_lrs(s).tolist()) == {s.base_lr}


@given(schedules(("warmup_constant",)))
def test_warmup_constant_stays_at_the_base_rate(s):
    assert set(all_lrs(s)[s.warmup :].tolist()) == {s.base_lr}


@given(schedules(("step",)))
def test_step_is_constant_between_milestones(s):
    marks = s.milestones or (int(0.5 * s.total), int(0.75 * s.total))
    rates = all_lrs(s)
    for t in range(max(1, s.warmup + 1), s.total + 1):
        assert (rates[t] == rates[t - 1]) or t in marks
    passed = sum(m <= s.total for m in marks)
    assert rates[-1] == pytest.approx(max(s.min_lr, s.base_lr * 0.1**passed))


@given(st.integers(1, 300), st.floats(1e-6, 10.0))
def test_one_cycle_has_one_peak_and_no_restart(tens, base):
    s = LearningRateSchedule("one_cycle", base_lr=base, total=10 * tens)
    rates = all_lrs(s)
    peak = 3 * tens - 1
    assert rates[peak] == pytest.approx(base, rel=1e-12)
    assert (np.diff(rates[: peak + 1]) >= 0).all()
    assert (np.diff(rates[peak:]) <= 0).all()
    assert rates[-1] == rates[-2] == pytest.approx(base / 25e4, rel=1e-9)
    assert rates[0] == pytest.approx(base / 25 if tens > 1 else rates[0], rel=1e-9)


@given(schedules(), st.floats(0.5, 1.0), st.integers(1, 400))
def test_epoch_decay_multiplies_every_epoch(s, decay, per_epoch):
    import dataclasses

    decayed = dataclasses.replace(s, epoch_decay=decay, epoch_steps=per_epoch)
    t = np.arange(s.total + 1)
    np.testing.assert_allclose(decayed.lrs(t), s.lrs(t) * decay ** (t // per_epoch), rtol=1e-12)


def test_hand_worked_rates():
    cosine = LearningRateSchedule("cosine", base_lr=1.0, total=12, warmup=2, min_lr=0.2)
    np.testing.assert_allclose(cosine.lrs([0, 1, 2, 7, 12, 40]), [0.6, 1.0, 1.0, 0.6, 0.2, 0.2])
    linear = LearningRateSchedule("linear", base_lr=1.0, total=10, min_lr=0.5)
    np.testing.assert_allclose(linear.lrs([0, 5, 10]), [1.0, 0.75, 0.5])
    exponential = LearningRateSchedule("exponential", base_lr=1.0, total=2, min_lr=0.01)
    np.testing.assert_allclose(exponential.lrs([0, 1, 2]), [1.0, 0.1, 0.01])
    step = LearningRateSchedule("step", base_lr=1.0, milestones=(2, 4), gamma=0.5)
    np.testing.assert_allclose(step.lrs([0, 1, 2, 3, 4, 9]), [1, 1, 0.5, 0.5, 0.25, 0.25])
    half = LearningRateSchedule("constant", base_lr=0.1, epoch_decay=0.95, epoch_steps=3)
    np.testing.assert_allclose(half.lrs([0, 2, 3, 6]), [0.1, 0.1, 0.095, 0.1 * 0.95**2])


@pytest.mark.parametrize("name", ["linear", "cosine", "exponential", "step", "one_cycle"])
def test_a_schedule_without_its_total_is_refused_when_asked(name):
    low = 0.01 if name in WARM else 0.0
    s = LearningRateSchedule(name, base_lr=1.0, min_lr=low)
    with pytest.raises(ConfigError, match=r"schedule\.total: got None"):
        s.lr(0)
    assert math.isfinite(s.bind(base_lr=9.0, total=100).lr(0))
    assert s.bind(base_lr=9.0, total=100).base_lr == 1.0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "cosin"}, r"schedule\.name: got 'cosin'.*did you mean 'cosine'"),
        ({"base_lr": 0.0}, r"schedule\.base_lr: got 0\.0"),
        ({"base_lr": math.nan}, r"schedule\.base_lr"),
        ({"total": 0}, r"schedule\.total: got 0"),
        ({"total": 2.5}, r"schedule\.total: got 2\.5"),
        ({"name": "linear", "total": 5, "warmup": 5}, r"schedule\.warmup: got 5, expected fewer steps"),
        ({"name": "linear", "warmup": -1}, r"schedule\.warmup: got -1"),
        ({"warmup": 3}, r"schedule\.warmup.*'constant'.*use 'warmup_constant'"),
        ({"name": "warmup_constant", "warmup": 0}, r"schedule\.warmup: got 0"),
        ({"name": "one_cycle", "warmup": 3}, r"schedule\.warmup.*'one_cycle'"),
        ({"name": "one_cycle", "min_lr": 0.1}, r"schedule\.min_lr.*'one_cycle'"),
        ({"name": "linear", "decay": 0.9}, r"schedule\.decay.*'linear'"),
        ({"name": "exponential", "decay": 1.1}, r"schedule\.decay: got 1\.1"),
        ({"name": "cosine", "milestones": (1,)}, r"schedule\.milestones.*'cosine'"),
        ({"name": "step", "milestones": (3, 2)}, r"schedule\.milestones: got \(3, 2\)"),
        ({"name": "step", "milestones": 3}, r"schedule\.milestones: got 3"),
        ({"name": "step", "gamma": 0.0}, r"schedule\.gamma: got 0\.0"),
        ({"name": "linear", "base_lr": 0.1, "min_lr": 0.2}, r"schedule\.min_lr: got 0\.2"),
        ({"epoch_decay": 0.0}, r"schedule\.epoch_decay"),
    ],
)
def test_what_is_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        LearningRateSchedule(**settings)


def test_what_is_refused_when_a_rate_is_asked_for():
    with pytest.raises(ConfigError, match="base_lr"):
        LearningRateSchedule().lr(0)
    with pytest.raises(ConfigError, match="epoch_steps"):
        LearningRateSchedule(base_lr=1.0, epoch_decay=0.5).lr(0)
    with pytest.raises(ConfigError, match=r"schedule\.min_lr.*exponential"):
        LearningRateSchedule("exponential", base_lr=1.0, total=5).lr(0)
    s = LearningRateSchedule(base_lr=1.0)
    for steps in ([-1], [0.5], ["0"]):
        with pytest.raises(ConfigError, match="steps"):
            s.lrs(steps)
    with pytest.raises(ConfigError, match="step"):
        s.lr(-1)
    assert s.lrs([]).shape == (0,)


@given(schedules())
def test_a_dict_and_back(s):
    assert LearningRateSchedule.from_dict(s.to_dict()) == s
    with pytest.raises(ConfigError, match=r"unknown key 'totl'.*did you mean 'total'"):
        LearningRateSchedule.from_dict({"totl": 3})


def test_json_and_back():
    made = LearningRateSchedule("step", base_lr=0.1, milestones=(3, 7), gamma=0.5)
    assert LearningRateSchedule.from_json(made.to_json()) == made
    with pytest.raises(ConfigError, match="unknown key 'nane'"):
        LearningRateSchedule.from_json('{"nane": "step"}')
