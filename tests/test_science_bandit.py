"""The bandit benchmark: every shipped way to learn from a bare reward beats chance; the table judges."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "benches" / "science"))
from bandit import native, reference, run, table, task
from bandit.rows import NATIVE, ROWS


@pytest.fixture(scope="module", autouse=True)
def digits():
    pytest.importorskip("sklearn", reason="the digits come with scikit-learn")


def played(name, events=2000, seed=20, noise=0.0):
    return run.run(ROWS[name], "digits", seed, noise, events)


@pytest.mark.parametrize("name", [n for n, row in ROWS.items() if row.engine == NATIVE])
def test_every_shipped_scalar_path_beats_chance(name):
    line = json.loads(json.dumps(played(name)))
    assert line["reward"] > 0.2
    assert line["last"] > line["reward"]
    assert line["regret"] == round(2000 * (1 - line["reward"]))


@pytest.mark.parametrize("name", ["constant", "chance"])
def test_a_constant_gradient_stays_at_chance(name):
    assert played(name)["reward"] < 0.2


def test_a_constant_gradient_through_the_shipped_learner_stays_at_chance():
    class Constant(native.Greedy):
        def learn(self, reward, label):
            gradient = np.full(len(self.eye), 0.01 * reward**2, np.float32)
            self.instant(self.x, native.ml.Gradient(gradient))

    stream = task.Task.of("digits", 20, 2000)
    assert task.play(Constant(stream, feedback="value", mu=0.5), stream).reward < 0.2


def test_both_linucbs_earn_the_same():
    rewards = [
        np.mean([played(name, seed=seed)["reward"] for seed in (20, 21, 22)])
        for name in ("linucb", "linucb-native", "bottleneck-32")
    ]
    assert np.ptp(rewards) < 0.04


def test_flipped_rewards_are_told_but_not_counted():
    class Oracle:
        def __init__(self, labels):
            self.labels, self.told = iter(labels), []

        def choose(self, x):
            return next(self.labels)

        def learn(self, reward, label):
            self.told.append(reward)

    stream = task.Task.of("digits", 20, 1000, noise=0.1)
    oracle = Oracle(stream.labels.tolist())
    result = task.play(oracle, stream)
    assert (result.reward, result.regret) == (1.0, 0)
    assert 0.85 < np.mean(oracle.told) < 0.95


def test_gradients_of_the_reference_are_those_of_their_losses():
    """REINFORCE's expected gradient is that of the expected reward under the softmax."""
    stream = task.Task.of("digits", 0, 10)
    policy = reference.Reinforce(stream, rate=0.1, fitted=True)
    policy.y = np.linspace(-0.1, 0.2, 10).astype(np.float32)
    policy.p = policy.softmax().astype(np.float64)
    value = np.linspace(1, 0, 10) ** 2
    got = np.zeros(10)
    for arm in range(10):
        policy.arm = arm
        got += policy.p[arm] * policy.gradient(value[arm], value[arm], 0)
    want = -policy.p * (value - policy.p @ value)
    np.testing.assert_allclose(got, want, atol=1e-6)


def lines(**changes):
    """One run of each row and data; all targets are reached."""
    made = []
    for name, row in ROWS.items():
        for data in row.data:
            for noise in row.noises:
                reward = 0.7 if row.scalar else 0.1
                facts = {
                    "reward": reward,
                    "last": 0.8,
                    "regret": 1200,
                    "us": 2000.0 if "lin" in name else 10.0,
                }
                made.append(
                    {"row": name, "data": data, "seed": 20, "noise": noise, "events": 4000}
                    | {"settings": row.options, "environment": {}}
                    | facts
                    | changes.get(name.replace("-", "_"), {})
                )
    return made


def verdicts(made):
    return [t["verdict"] for t in table.summary(made)["targets"]]


def test_targets_are_judged():
    assert verdicts(lines()) == ["ok"] * 7
    assert verdicts(lines(bottleneck_32={"reward": 0.66}))[0] == "MISSED"
    assert verdicts(lines(linucb_native={"us": 199.0}))[1] == "MISSED"
    assert verdicts(lines(value={"reward": 0.6}))[2] == "MISSED"
    assert verdicts(lines(awr={"reward": 0.11}))[3:5] == ["MISSED"] * 2
    assert verdicts(lines(advantage={"reward": 0.19}))[3:6] == ["ok", "ok", "MISSED"]
    assert verdicts(lines(constant={"reward": 0.3}))[6] == "MISSED"
    none = [line for line in lines() if line["data"] == "digits"]
    assert verdicts(none)[:2] == ["not run"] * 2


def test_the_later_line_of_the_same_settings_wins():
    other = [
        line | {"settings": {"rank": 3}, "reward": 0.0} for line in lines() if line["row"] == "bottleneck-16"
    ]
    later = [line | {"reward": 0.5} for line in lines() if line["row"] == "bottleneck-16"]
    found = table.latest([*lines(), *other, *later])
    assert found["bottleneck-16", "digits", 0.0][0]["reward"] == 0.5


def test_runs_that_are_there_are_not_made_again():
    have = [
        {"row": row.name, "data": data, "seed": seed, "noise": noise, "events": 4000}
        | {"code": run.code(row.engine), "settings": row.options}
        for row, data, seed, noise in run.jobs()
    ]
    assert run.missing(have) == []
    have[0]["code"] = "another"
    assert len(run.missing(have)) == 1
    assert len(run.missing([])) == len(have)
