import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import microlora as ml
from microlora import presets
from microlora.data import TASKS, AdapterDataset, Optimum, SyntheticDataGenerator
from microlora.data.synthetic import GAIN, SIGMA
from microlora.exceptions import ConfigError, NonFiniteError, ShapeError
from support import run_python

NAMES = list(TASKS)
DIM = 64


@pytest.fixture(scope="module")
def everything():
    return dict(SyntheticDataGenerator(DIM, seed=42).generate_all(1000))


def test_the_tasks_are_the_presets(everything):
    assert list(presets.names()) == NAMES
    assert list(everything) == NAMES
    for name, spec in TASKS.items():
        assert spec.rank <= presets.get(name).rank
        data = everything[name]
        assert (len(data.examples), len(data.validation)) == (800, 200)
        assert data.in_features == data.out_features == DIM
        assert set(data.texts("domain")) == {name}


@given(
    st.sampled_from(NAMES),
    st.integers(2, 24),
    st.integers(0, 2**63 - 1),
    st.integers(5, 300),
    st.integers(0, 600),
)
@settings(max_examples=20)
def test_more_samples_extend_fewer(task, dim, seed, few, more):
    generator = SyntheticDataGenerator(dim, seed)
    small, large = generator.generate(task, few), generator.generate(task, few + more)
    assert list(large[: len(small)]) == list(small)
    assert list(large.validation[: len(small.validation)]) == list(small.validation)
    assert small.optimum == large.optimum


def test_the_same_in_another_process_and_other_for_another_seed():
    code = """
import hashlib
from microlora.data import SyntheticDataGenerator
for task in ("coder", "security"):
    x, y, _ = SyntheticDataGenerator(32, 7).generate(task, 300).arrays()
    print(hashlib.sha256(x.tobytes() + y.tobytes()).hexdigest())
"""
    first, second = run_python(code).split()
    assert run_python(code, env={"OPENBLAS_NUM_THREADS": "1"}).split() == [first, second]
    assert first != second
    a, b = (SyntheticDataGenerator(32, seed).generate("coder", 50) for seed in (1, 2))
    assert not np.array_equal(a.arrays()[0], b.arrays()[0])


@pytest.mark.parametrize("task", NAMES)
def test_the_stated_scales_are_met(task):
    data = SyntheticDataGenerator(96, 5).generate(task, 6000)
    x, t, _ = data.arrays()
    o = data.optimum
    spec = TASKS[task]
    x, t = x.astype(np.float64), t.astype(np.float64)
    assert np.linalg.matrix_rank(o.delta_weight().astype(np.float64), tol=1e-4) == spec.rank == o.rank
    values = np.linalg.svd(x, compute_uv=False)
    assert (values > 1e-3 * values[0]).sum() == spec.latent  # the inputs lie in so many dimensions
    assert (x**2).sum(1).mean() / 96 == pytest.approx(1.0, rel=0.05)
    assert o.best_loss == pytest.approx(0.5 * SIGMA**2 * 96)
    assert o.zero_loss == pytest.approx(0.5 * (SIGMA**2 + GAIN**2) * 96)
    # The noise is sigma^2 chi^2 of 96 per sample: 4,800 samples are within 1 % by many standard errors.
    assert o.loss(x, t) == pytest.approx(o.best_loss, rel=0.01)
    assert 0.5 * (t**2).sum(1).mean() == pytest.approx(o.zero_loss, rel=0.06)
    noise = t - x @ o.delta_weight().T.astype(np.float64)
    assert noise.std() == pytest.approx(SIGMA, rel=0.01)
    assert abs(noise.mean()) < 5 * SIGMA / np.sqrt(noise.size)


def adam(data, rank, seed, rate=3e-3, batch=32, epochs=5):
    """A plain low-rank fit: LoRA's start, scaling 2, Adam with a cosine; the map it found."""
    x, t, _ = data.arrays()
    r = np.random.default_rng(seed)
    p = [r.uniform(-1, 1, (x.shape[1], rank)) / np.sqrt(x.shape[1]), np.zeros((rank, t.shape[1]))]
    m, v, step = [0.0, 0.0], [0.0, 0.0], 0
    steps = epochs * -(-len(x) // batch)
    for epoch in range(epochs):
        order = data.order(seed, epoch)
        for start in range(0, len(x), batch):
            rows = order[start : start + batch]
            u = 2 * x[rows] @ p[0]
            g = (u @ p[1] - t[rows]) / len(rows)
            step += 1
            for i, gradient in enumerate((2 * x[rows].T @ (g @ p[1].T), u.T @ g)):
                m[i] = 0.9 * m[i] + 0.1 * gradient
                v[i] = 0.999 * v[i] + 0.001 * gradient**2
                fall = 0.5 * (1 + np.cos(np.pi * step / steps))
                p[i] -= rate * fall * m[i] / (1 - 0.9**step) / (np.sqrt(v[i] / (1 - 0.999**step)) + 1e-8)
    return 2 * p[0] @ p[1]


def test_an_adapter_of_the_presets_rank_comes_near_the_optimum_on_its_task_alone(everything):
    maps = {name: adam(data, presets.get(name).rank, seed=1) for name, data in everything.items()}
    for task, data in everything.items():
        x, t, _ = data.validation.arrays()
        loss = {name: 0.5 * ((x @ w - t) ** 2).sum(1).mean() for name, w in maps.items()}
        assert loss[task] < 1.15 * data.optimum.best_loss
        assert min(loss, key=loss.get) == task
        assert min(value for name, value in loss.items() if name != task) > 5 * loss[task]


def test_our_own_adapter_learns_it(everything):
    data = everything["reviewer"]
    lora = ml.create_lora("reviewer", DIM)
    xv, tv, _ = data.validation.arrays()

    def loss():
        return 0.5 * ((lora.forward(xv, "q_proj") - tv) ** 2).sum(1).mean()

    before = loss()
    for sample in data:
        lora.instant(sample.input_embedding, ml.Target(sample.output_embedding), "q_proj")
    assert before == pytest.approx(0.5 * (tv**2).sum(1).mean(), rel=1e-5)
    assert loss() < 0.7 * before


@pytest.mark.parametrize(
    ("arguments", "task", "n", "words"),
    [
        ((1,), "coder", 10, "hidden_dim"),
        ((8.5,), "coder", 10, "hidden_dim"),
        ((8, -1), "coder", 10, "seed"),
        ((8,), "codr", 10, r"task.*did you mean 'coder'"),
        ((8,), "coder", 4, "n: got 4"),
        ((8,), "coder", True, "n: got True"),
    ],
)
def test_what_cannot_be_generated(arguments, task, n, words):
    with pytest.raises(ConfigError, match=words):
        SyntheticDataGenerator(*arguments).generate(task, n)


def test_an_optimum_is_checked():
    a, b = np.ones((2, 3)), np.ones((4, 2))
    assert Optimum(a, b, 0.1, 1, 2) == Optimum(a, b, 0.1, 1.0, 2.0)
    assert Optimum(a, b, 0.1, 1, 2) != Optimum(a, 2 * b, 0.1, 1, 2)
    assert hash(Optimum(a, b, 0.1, 1, 2)) == hash(Optimum(a, b, 0.1, 1, 2))
    assert Optimum(a, b, 0.1, 1, 2).scaling == 1.0
    with pytest.raises(ShapeError, match="lora_b"):
        Optimum(a, b.T, 0.1, 1, 2)
    with pytest.raises(NonFiniteError, match="lora_a"):
        Optimum(a * np.nan, b, 0.1, 1, 2)
    with pytest.raises(ConfigError, match="sigma"):
        Optimum(a, b, float("nan"), 1, 2)


def test_one_optimum_for_all_parts_of_a_task(everything):
    data = everything["coder"]
    assert data.validation.optimum is data.optimum
    assert data[:10].optimum is data.optimum
    joined = AdapterDataset.concat([data, everything["reviewer"]])
    assert joined.optimum is None
    assert len(joined.validation) == 400
