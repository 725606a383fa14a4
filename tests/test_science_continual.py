"""The continual-learning benchmark: its formulas, and one seed of two tasks."""

import dataclasses
import itertools
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "benches" / "science"))
from continual import methods, penalties, plan, reference, run, table
from continual.network import Network, Views, residual, softmax

METHODS = methods.METHODS
DARK = dataclasses.replace(METHODS["der++"], name="der++50", memory=50)
SETUP = plan.Setup("perm", tasks=2, epochs=3, base_epochs=20, memories=(50,))


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A plan of one seed, two tasks, from a cache of its own."""
    pytest.importorskip("sklearn", reason="the digits come with scikit-learn")
    return plan.Plan.load(SETUP, 20, tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def none(small):
    return reference.run(small, METHODS["none"])


@pytest.fixture
def tiny():
    """A net of 7-6-5-4 whose factors are nowhere zero."""
    rng = np.random.default_rng(3)
    widths = (7, 6, 5, 4)
    weights = [rng.standard_normal(s, np.float32) for s in itertools.pairwise(widths)]
    net = Network(weights, [rng.standard_normal(o, np.float32) for o in widths[1:]], 2.0)
    f = Views(widths, 3)
    f.flat[:] = 0.4 * rng.standard_normal(len(f.flat))
    return net, f, rng.standard_normal((150, 7), np.float32), rng


def per_sample(net, f, row, label):
    """Gradient of one sample."""
    out = f.like()
    trace = net.forward(row[None], f)
    net.backward(trace, residual(trace.z, np.array([label])), f, out)
    return out.flat


def test_gradient_is_that_of_the_loss(tiny):
    net, f, x, rng = tiny
    y = rng.integers(0, 4, len(x))

    def loss():
        return -np.log(softmax(net.forward(x, f).z.astype(np.float64))[np.arange(len(x)), y]).mean()

    grad = f.like()
    net.backward(net.forward(x, f), residual(net.forward(x, f).z, y), f, grad)
    direction = rng.standard_normal(len(f.flat)).astype(np.float32)
    kept, change = f.flat.copy(), []
    for sign in (1, -1):
        f.flat[:] = kept + np.float32(sign * 1e-3) * direction
        change.append(loss())
    assert (change[0] - change[1]) / 2e-3 == pytest.approx(float(direction @ grad.flat), rel=1e-2)


def test_moments_are_means_of_per_sample_squares_over_classes(tiny):
    net, f, x, _ = tiny
    m = penalties.Moments(net, f, x, squares=True)
    p = softmax(net.forward(x, f).z)
    want = sum(p[i, c] * per_sample(net, f, x[i], c) ** 2 for i in range(len(x)) for c in range(4)) / len(x)
    np.testing.assert_allclose(m.squares.flat, want, rtol=2e-4, atol=1e-6)
    np.testing.assert_allclose(m.a[0], (x**2).mean(axis=0), rtol=1e-5)
    # At the last layer g = p - e_c, so E[g^2] is p (1 - p).
    np.testing.assert_allclose(m.c[2], (p * (1 - p)).mean(axis=0), rtol=1e-4)


def test_squares_of_a_batch_are_sums_over_its_samples(tiny):
    net, f, x, rng = tiny
    y = rng.integers(0, 4, len(x))
    grad, squares, trace = f.like(), f.like(), net.forward(x, f)
    net.backward(trace, residual(trace.z, y), f, grad, squares)
    each = np.array([per_sample(net, f, row, label) for row, label in zip(x, y, strict=True)])
    np.testing.assert_allclose(grad.flat, each.mean(axis=0), rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(squares.flat, (each**2).sum(axis=0), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", [penalties.DeltaEwc, penalties.DeltaEwcOnline])
def test_delta_penalty_is_the_dense_one(tiny, kind):
    net, f, x, rng = tiny
    penalty, tasks = kind(net, f, 100.0), []
    for rows in (x[:70], x[70:]):
        f.flat += 0.3 * rng.standard_normal(len(f.flat)).astype(np.float32)
        penalty.end_task(f, rows)
        m = penalties.Moments(net, f, rows, squares=False)
        tasks.append((m.a, m.c, [a @ b for a, b in zip(f.a, f.b, strict=True)]))
    if kind is penalties.DeltaEwcOnline:
        (a0, c0, _), (a1, c1, anchor) = tasks
        summed = [p + q for p, q in zip(a0, a1, strict=True)]
        tasks = [(summed, [(p + q) / 2 for p, q in zip(c0, c1, strict=True)], anchor)]
    f.flat += 0.3 * rng.standard_normal(len(f.flat)).astype(np.float32)
    grad = f.like()
    penalty.add_gradient(f, grad)
    for i in range(3):
        # d/dW of strength / 2 s^2 sum a_i c_j (W - W*)_ij^2 at W = A B.
        dense = sum(400.0 * np.outer(a[i], c[i]) * (f.a[i] @ f.b[i] - w[i]) for a, c, w in tasks)
        np.testing.assert_allclose(grad.a[i], dense @ f.b[i].T, rtol=1e-3, atol=1e-3 * np.abs(dense).max())
        np.testing.assert_allclose(grad.b[i], f.a[i].T @ dense, rtol=1e-3, atol=1e-3 * np.abs(dense).max())


@pytest.mark.parametrize("name", [m.name for m in METHODS.values() if m.penalty is not penalties.Penalty])
def test_penalty_is_flat_at_its_first_anchor(tiny, name):
    net, f, x, rng = tiny
    penalty = METHODS[name].penalty(net, f.copy(), METHODS[name].strength["perm"])
    if penalty.squares:
        squares = f.like()
        squares.flat[:] = rng.random(len(squares.flat))
        penalty.seen(squares, 8)
    if penalty.path:
        penalty.moved(np.ones_like(f.flat), f.flat + 1, f.flat)
    penalty.end_task(f, x)
    grad = f.like()
    penalty.add_gradient(f, grad)
    assert np.abs(grad.flat).max() < 1e-4
    f.flat += 0.1
    penalty.add_gradient(f, grad)
    assert np.abs(grad.flat).max() > 1e-2


def test_plan_is_kept_and_split_cleanly(small):
    cache = small._cache
    assert plan.Plan.load(SETUP, 20, cache).digest == small.digest
    assert plan.Plan.load(SETUP, 21, cache).digest != small.digest
    train, test = small._arrays["train"], small._arrays["test"]
    assert not set(train) & set(test)
    assert len(set(train) | set(test)) == 1797


def test_replay_adds_as_many_old_rows_as_new(small):
    feed, new = small.feed(1, memory=50), small.feed(1)
    n = len(new.x)
    assert len(feed.x) == n + 50
    assert feed.batch == 2 * new.batch
    for order, plain in zip(feed.orders, new.orders, strict=True):
        first = order[: feed.batch]
        assert (first[:32] < n).all()
        assert (first[32:] >= n).all()
        assert (order[order < n] == plain).all()
    first_task = small.tasks()[0].x
    assert all((first_task == row).all(axis=1).any() for row in feed.x[n:])


def test_dark_replay_adds_the_distance_to_what_was_answered(small):
    """The gradient of a batch and of its old half, each a mean: by differences of the joint loss."""
    one, rng = reference.Learner(small, DARK), np.random.default_rng(5)
    one.stored[:] = rng.standard_normal(one.stored.shape)
    rows, y = np.array([7, 9, 100, 103]), np.array([1, 2, 3, 0])
    z = rng.standard_normal((4, 10))

    def loss(z):
        each = -np.log(np.exp(z)[range(4), y] / np.exp(z).sum(axis=1))
        far = ((z[2:] - one.stored[[0, 3]]) ** 2).sum(axis=1)
        return each[:2].mean() + each[2:].mean() + DARK.logit_weight["perm"] * far.mean() / 2

    g = residual(z.astype(np.float32), y)
    one._darken(g, z.astype(np.float32), rows, 100)
    step = 1e-6
    for at in np.ndindex(4, 10):
        shift = np.zeros((4, 10))
        shift[at] = step
        assert (loss(z + shift) - loss(z - shift)) / (2 * step) == pytest.approx(g[at] / 4, abs=1e-4)


def test_reference_stores_what_was_answered_when_a_task_ended(small):
    one = reference.Learner(small, DARK)
    answers = []
    for task in small.tasks():
        one.f.flat += 0.05
        one.end_task(task)
        answers.append([one.net.forward(t.x, one.f).z for t in small.tasks()])
    n = len(small.tasks()[0].x)
    slots = small.slots(1, 50)
    assert {0, 1} == set(slots // n)
    want = [answers[s // n][s // n][s % n] for s in slots]
    np.testing.assert_allclose(one.stored, want, rtol=1e-4, atol=1e-4)


def test_native_keeps_what_dark_replay_keeps_too(small, none):
    """Both draw rows of their own, so that only what becomes of the first task can be compared."""
    from continual import native

    ours, theirs = native.run(small, DARK), reference.run(small, DARK)
    plain = reference.run(small, METHODS["replay50"])
    assert ours.r[0] == pytest.approx(none.r[0], abs=0.03), "the first task is learned freely"
    assert ours.r[1, 0] > plain.r[1, 0]
    np.testing.assert_allclose(ours.r, theirs.r, atol=0.08)


@pytest.mark.parametrize("name", ["ewc", "ewc-online", "delta", "delta-online", "replay50"])
def test_first_task_is_kept_better_than_without(small, none, name):
    kept = reference.run(small, METHODS[name])
    assert none.r[0, 0] > 0.8
    assert kept.r[0, 0] == pytest.approx(none.r[0, 0], abs=1e-9), "the first task is learned freely"
    assert kept.r[1, 0] > none.r[1, 0] + 0.02


@pytest.mark.parametrize("name", [m.name for m in METHODS.values() if m.memory != 200])
def test_native_equals_reference(small, name):
    from continual import native

    ours, theirs = native.run(small, METHODS[name]), reference.run(small, METHODS[name])
    # 360 test rows a task; both round differently, so a few rows near a boundary may differ.
    np.testing.assert_allclose(ours.r, theirs.r, atol=0.03)


def test_strengths_stand_beside_the_name():
    assert METHODS["replay200"].label() == "replay, 200 rows"
    assert METHODS["mas"].label() == "MAS (0.03 / 0.01)"
    assert METHODS["der++"].label() == "DER++, 200 rows (0.5)"
    assert METHODS["der++delta"].label() == "DER++, 200 rows, with ΔW-EWC online (0.5; 10)"


def test_scores():
    r = np.array([[0.9, 0.1], [0.5, 0.8]])
    assert methods.scores(r) == pytest.approx({"ACC": 0.65, "BWT": -0.4, "LA": 0.85})
    assert methods.scores(r[1:], joint=True) == pytest.approx({"ACC": 0.65, "BWT": 0.0, "LA": 0.65})


def line(method, engine, seed, acc, plan_digest="p"):
    scores = {"ACC": acc, "BWT": -0.2, "LA": 0.9}
    seconds = {"train": 2.0 if engine == "reference" else 1.0, "consolidate": 0.0, "evaluate": 0.0}
    head = {"data": "rot", "method": method, "engine": engine, "seed": seed}
    made = {
        "plan": plan_digest,
        "settings": run.settings("rot", METHODS[method]),
        "code": run.code("reference"),
    }
    return {**head, **scores, "seconds": seconds, **made, "environment": {}}


def test_summary_pairs_by_seed_and_says_what_was_missed():
    lines = [line("none", e, s, 0.5 + s / 100) for s in (1, 2, 3) for e in ("native", "reference")]
    lines += [line("ewc", "native", s, 0.55 + s / 90) for s in (1, 2, 3)]
    lines += [line("ewc", "reference", s, 0.59 + s / 90) for s in (1, 2, 3)]
    data = table.summary(lines)
    found = {t["what"]: t for t in data["targets"]}
    assert found["rotated MNIST-5k: EWC minus none"]["verdict"] == "MISSED"
    assert found["rotated MNIST-5k: none, native against NumPy"]["verdict"] == "met"
    assert "-4.0" in found["rotated MNIST-5k: native and NumPy, worst row"]["measured"]
    pair = table.Paired.of({1: 1.0, 2: 3.0, 3: 2.0, 4: 9.0}, {1: 0.0, 2: 1.0, 3: 2.0})
    assert (pair.mean, pair.sd, pair.wins, pair.n) == (1.0, 1.0, 2, 3)
    assert pair.t == pytest.approx(3**0.5)
    with pytest.raises(SystemExit, match="different plans"):
        table.summary([*lines, line("l2", "native", 1, 0.5, "other")])


def test_runs_in_the_file_are_not_repeated():
    done = line("ewc", "reference", 20, 0.6)
    jobs = [("rot", 20, "ewc", "reference"), ("rot", 21, "ewc", "reference")]
    assert run.missing(jobs, [done]) == jobs[1:]
    assert run.missing(jobs, [done, {**done, "code": "older"}]) == jobs
    assert run.missing(jobs, [{**done, "settings": {**done["settings"], "strength": 1.0}}, done]) == jobs[1:]
    assert run.seeds("20-22,25") == [20, 21, 22, 25]


def test_a_line_cut_off_is_left_out(tmp_path):
    path = tmp_path / "runs.jsonl"
    assert run.read(path) == []
    path.write_text('{"a": 1}\n{"a": 2', encoding="utf-8")
    assert run.read(path) == [{"a": 1}]
