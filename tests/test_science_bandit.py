"""What the bandit is for: every shipped way to learn from a bare reward beats chance."""

import numpy as np
import pytest

import microlora as ml
from microlora import _core
from support import make, rng


def digits(events):
    datasets = pytest.importorskip("sklearn.datasets", reason="the digits come with scikit-learn")
    x, y = datasets.load_digits(return_X_y=True)
    x = np.hstack([x / 16, np.ones((len(x), 1))])
    x = (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)
    r = rng(0)
    order = np.concatenate([r.permutation(len(y)) for _ in range(2)])[:events]
    return x, y, order


def earned(decide, x, y, order):
    """Mean reward of ``decide(x) -> (arm, what takes the reward)``: 1 where the arm is the label."""
    total = 0.0
    for i in order:
        arm, learn = decide(x[i])
        reward = float(arm == y[i])
        learn(reward)
        total += reward
    return total / len(order)


def scalar_paths(lora, x, order, r):
    """Every shipped way to learn from a bare reward, and the constant gradient that learns nothing."""
    lora.fit_input_basis(x[order[:200]], "m")
    eye = np.eye(64, dtype=np.float32)
    names = [str(i) for i in range(10)]
    bandit = _core.Bandit(lora, "m")

    def linucb(x):
        choice = bandit.choose(x, names)
        return choice.arm, lambda reward: bandit.reward(choice, reward)

    def greedy(feedback):
        def decide(x):
            y = lora.forward(x, "m")[:10]
            best = int(y.argmax() if y.any() and r.random() > 0.1 else r.integers(10))
            return best, lambda reward: lora.instant(x, feedback(y, best, reward), "m")

        return decide

    return {
        "bottleneck LinUCB": linucb,
        "value regression": greedy(lambda y, a, reward: ml.Gradient(eye[a] * np.float32(y[a] - reward))),
        "advantage regression": greedy(lambda y, a, reward: ml.Reward(reward, response=eye[a])),
        "constant gradient": greedy(
            lambda y, a, reward: ml.Gradient(np.full(64, 0.01 * reward**2, np.float32))
        ),
    }


@pytest.mark.parametrize(
    ("path", "learns"),
    [
        ("bottleneck LinUCB", True),
        ("value regression", True),
        ("advantage regression", True),
        ("constant gradient", False),
    ],
)
def test_every_shipped_scalar_path_beats_chance(path, learns):
    x, y, order = digits(2000)
    lora = make(x.shape[1], 64, 16, learned=False, instant=ml.InstantConfig(rule="nlms", mu=0.5))
    reward = earned(scalar_paths(lora, x, order, rng(1))[path], x, y, order)
    assert (reward > 0.2) == learns, reward
