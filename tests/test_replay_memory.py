"""Replay in the compiled loop: the joint gradient, what is kept, and that nothing else moves."""

import json
import struct
from itertools import pairwise

import numpy as np
import pytest

import microlora as ml
from microlora import _core
from microlora.exceptions import ConfigError, FormatError, NonFiniteError, SampleError, ShapeError
from reference_chain import Twin
from runs import N, chain, classes, learner, problem
from support import make, normal, read_tensors, rng

F = np.float32


def memory(capacity=1, label=0.7, logit=1.3, seed=0):
    return _core.ReplayMemory(capacity=capacity, label_weight=label, logit_weight=logit, seed=seed)


def targets(seed=0, n=40):
    """x and float targets as wide as a chain of `runs.chain` answers."""
    r = rng(seed)
    return normal(r, n, N), normal(r, n, 4)


def stirred(target):
    """The same learner, with factors that are nowhere zero."""
    r = rng(5)
    if isinstance(target, ml.LoraChain):
        pairs = target.factors()
        target.set_factors(
            {k: (normal(r, *a.shape) / 3, normal(r, *b.shape) / 3) for k, (a, b) in pairs.items()}
        )
        return target
    lora = make(N, N, 4, names=target.modules(), seed=3)
    return lora


def arrays(target):
    if isinstance(target, ml.LoraChain):
        return [w.copy() for pair in target.factors().values() for w in pair]
    return [w.copy() for m in target.modules() for w in (target[m].lora_a, target[m].lora_b)]


def descend(target, x, y, lr=1e-3, steps=1, **more):
    """The gradient of one step of plain descent; with `steps` above 1 the weights alone matter."""
    before = arrays(target)
    order = np.arange(len(x))
    log = _core.Optimizer(target, "sgd").train(
        target, x, y, order, [lr] * steps, batch_size=-(-len(x) // steps), **more
    )
    return [(b - a) / lr for a, b in zip(arrays(target), before, strict=True)], log


class Joint(Twin):
    """The twin whose mean loss has the replayed row's terms in it."""

    old, label, logit = None, 0.0, 0.0

    def losses(self, x, y):
        own = super().losses(x, y)
        if self.old is None:
            return own
        row, wanted, stored, weight = self.old
        loss = weight * super().losses(row, wanted)[0]
        return own + self.label * loss + self.logit * 0.5 * ((self.forward(row) - stored) ** 2).sum()


@pytest.mark.parametrize("head", ["cross_entropy", "mse"])
@pytest.mark.parametrize("how", ["lora", "dora", "checkpointing", "tanh", "weighted"])
def test_the_gradient_of_a_chain_is_that_of_the_joint_loss(head, how):
    more = {"dora": {"use_dora": True}, "checkpointing": {"gradient_checkpointing": True}}.get(how, {})
    if how == "tanh":
        more = {"activation": "tanh"}
    net = stirred(chain(head=head, **more))
    data = targets if head == "mse" else lambda seed: classes(seed=seed)[0]
    (x, y), (old, wanted) = data(seed=1), data(seed=2)
    weights = np.full(len(old), 0.4, F) if how == "weighted" else None
    kept = memory()
    kept.offer(net, old, wanted, weights=weights)
    assert len(kept) == 1
    net.set_factors({k: (1.2 * a, 0.7 * b) for k, (a, b) in net.factors().items()})
    twin = Joint(
        chain_layers(), net.factors().values(), 2.0, more.get("activation", "relu"),
        head, net.magnitudes() or None,
    )  # fmt: skip
    twin.scaling = scaling_of(net)
    twin.norms = [np.linalg.norm(w + twin.scaling * b @ a, axis=1) for (w, _), (a, b) in twin.pairs()]
    twin.old = (kept.x, kept.y, kept.outputs, kept.weights[0])
    twin.label, twin.logit = 0.7, 1.3
    np.testing.assert_allclose(twin.forward(x), net.forward(x), rtol=1e-3, atol=1e-4)
    got, (losses, _) = descend(net, x, y, replay=kept)
    flat = [w for pair in twin.factors for w in pair]
    for g, w in zip(got, flat, strict=True):
        want = twin.gradient(x, y, w)
        np.testing.assert_allclose(g, want, atol=4e-3 * np.abs(want).max())
    twin.old = None
    assert losses[0] == pytest.approx(twin.losses(x, y).mean(), rel=1e-4), (
        "the loss is that of the data alone"
    )


def chain_layers():
    """Frozen weights and biases of `runs.chain`."""
    r = rng(0)
    sizes = [N] * 3 + [4]
    return [((normal(r, o, i) / np.sqrt(i)).astype(F), normal(r, o) / 10) for i, o in pairwise(sizes)]


def scaling_of(net):
    return net._lora["layers.0"].scaling


@pytest.mark.parametrize("based", [False, True])
def test_the_gradient_of_modules_is_that_of_the_joint_loss(based):
    lora = make(N, N, 4, names=("q", "v"), seed=3)
    (x, y), (old, wanted) = problem(seed=1)[0], problem(seed=2)[0]
    weights = np.linspace(0.2, 2.0, len(x)).astype(F)
    base = x if based else None
    kept = memory()
    kept.offer(lora, old, wanted, base=old if based else None, weights=weights)
    assert kept.outputs.shape == (1, 2 * N)
    place = int(kept.places[0])
    np.testing.assert_allclose(kept.y[0], wanted[place] - (old[place] if based else 0), atol=1e-6)
    assert kept.weights[0] == weights[place]
    for at, name in enumerate(("q", "v")):
        answer = lora.forward(old[place], name)
        np.testing.assert_allclose(kept.outputs[0, at * N : (at + 1) * N], answer, atol=1e-5)
    descend(lora, x, y, lr=0.05)
    state = [w.astype(float) for w in arrays(lora)]
    got, (losses, _) = descend(lora, x, y, replay=kept, weights=weights, base=base)
    mean = 0.0
    for at in range(2):
        a, b = state[2 * at : 2 * at + 2]
        s = lora[("q", "v")[at]].scaling
        a_in, b_out = (a.T, b.T) if a.shape[0] == 4 else (a, b)
        if b_out.shape[0] != 4:
            b_out = b_out.T
        u, row = s * x @ a_in, kept.x[0].astype(float)
        g = (u @ b_out - y + (x if based else 0)) * weights[:, None] / len(x)
        mean += 0.5 * ((u @ b_out - y + (x if based else 0)) ** 2 * weights[:, None]).sum(1).mean() / 2
        answer = s * row @ a_in @ b_out
        pull = 0.7 * kept.weights[0] * (answer - kept.y[0])
        pull = pull + 1.3 * (answer - kept.outputs[0, at * N : (at + 1) * N])
        da = s * (x.T @ (g @ b_out.T) + np.outer(row, pull @ b_out.T))
        db = u.T @ g + s * np.outer(row @ a_in, pull)
        for mine, want in ((got[2 * at], da), (got[2 * at + 1], db)):
            want = want if mine.shape == want.shape else want.T
            np.testing.assert_allclose(mine, want, atol=2e-3 * np.abs(want).max())
    assert losses[0] == pytest.approx(mean, rel=1e-4)


def test_as_many_rows_are_drawn_as_a_batch_has():
    """What replay adds to the gradient is a sum of the rows' own gradients, each a whole number of times."""
    lora = make(N, N, 4, names=("q",), seed=3)
    (x, y), (old, wanted) = problem(n=16, seed=1)[0], problem(n=4, seed=2)[0]
    kept = memory(4, label=1.0, logit=0.0)
    kept.offer(lora, old, wanted)
    plain, _ = descend(lora.copy(), x, y)
    each = [descend(lora.copy(), kept.x[i : i + 1].copy(), kept.y[i : i + 1].copy())[0] for i in range(4)]
    columns = np.array([np.concatenate([g.ravel() for g in one]) for one in each]).T
    seen = set()
    for _ in range(5):
        joint, _ = descend(lora.copy(), x, y, replay=kept)
        added = np.concatenate([(a - b).ravel() for a, b in zip(joint, plain, strict=True)])
        counts = 16 * np.linalg.lstsq(columns, added, rcond=None)[0]
        np.testing.assert_allclose(counts, counts.round(), atol=0.05)
        assert counts.sum() == pytest.approx(16, abs=0.1)
        seen.add(tuple(counts.round()))
    assert len(seen) > 1, "draws go on from step to step"


def test_short_batches_and_accumulation_are_means_too():
    """With one kept row every batching adds the same: 20 rows at once, as 8 + 8 + 4, on one step."""
    lora = make(N, N, 4, names=("q",), seed=3)
    (x, y), (old, wanted) = problem(n=20, seed=1)[0], problem(n=4, seed=2)[0]
    kept = memory()
    kept.offer(lora, old, wanted)
    found = []
    for size, accumulation in ((20, 1), (8, 3)):
        one = lora.copy()
        order = np.arange(20)
        _core.Optimizer(one, "sgd").train(
            one, x, y, order, [0.1], batch_size=size, accumulation=accumulation, replay=kept
        )
        found.append(arrays(one))
    for a, b in zip(*found, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-6)


@pytest.mark.parametrize("kind", ["learner", "chain"])
@pytest.mark.parametrize(
    "silent", [{"capacity": 0}, {"capacity": 9, "label": 0.0, "logit": 0.0}, {"capacity": 9, "empty": True}]
)
def test_replay_without_a_say_changes_no_bit(kind, silent):
    silent = dict(silent)
    empty = silent.pop("empty", False)
    target, other = (stirred(learner() if kind == "learner" else chain()) for _ in range(2))
    (x, y), (old, wanted) = (problem(seed=s)[0] if kind == "learner" else classes(seed=s)[0] for s in (1, 2))
    kept = memory(**silent)
    if not empty:
        kept.offer(target, old, wanted)
    assert len(kept) == (9 if silent["capacity"] and not empty else 0)
    got = descend(target, x, y, steps=4, replay=kept)[1]
    want = descend(other, x, y, steps=4)[1]
    assert all((a == b).all() for a, b in zip(arrays(target), arrays(other), strict=True))
    assert all((a == b).all() for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("kind", ["learner", "chain"])
def test_without_a_logit_weight_it_does_not_matter_what_was_answered(kind):
    def moved(logit, stir):
        target = stirred(learner() if kind == "learner" else chain())
        (x, y), (old, wanted) = (
            problem(seed=s)[0] if kind == "learner" else classes(seed=s)[0] for s in (1, 2)
        )
        source = target
        if stir:
            source = chain(seed=0) if kind == "chain" else make(N, N, 4, names=target.modules(), seed=8)
        kept = memory(9, logit=logit)
        kept.offer(source, old, wanted)
        descend(target, x, y, lr=1e-4, steps=4, replay=kept)
        return arrays(target)

    def same(a, b):
        return all((x == y).all() for x, y in zip(a, b, strict=True))

    assert same(moved(0.0, False), moved(0.0, True))
    assert not same(moved(1.0, False), moved(1.0, True))


@pytest.mark.parametrize("kind", ["delta", "factor", "mas"])
@pytest.mark.parametrize("on", ["learner", "chain"])
def test_importance_is_that_of_the_data_alone(kind, on):
    states = []
    for replayed in (False, True):
        target = stirred(learner() if on == "learner" else chain())
        (x, y), (old, wanted) = (
            problem(seed=s)[0] if on == "learner" else classes(seed=s)[0] for s in (1, 2)
        )
        kept = memory(9)
        kept.offer(target, old, wanted)
        ewc = ml.EwcPlusPlus(target, 1.0, kind=kind, fisher="empirical")
        _core.Optimizer(target, "sgd").train(
            target, x, y, np.arange(len(x)), [0.0] * 4, batch_size=-(-len(x) // 4), ewc=ewc,
            accumulate_fisher=True, replay=kept if replayed else None,
        )  # fmt: skip
        ewc.start_new_task()
        states.append(read_tensors(ewc.export_state()))
    assert states[0][1].keys() == states[1][1].keys()
    dtypes = {"F32": np.float32, "F64": np.float64}
    numbers = [
        {k: np.frombuffer(v, dtypes[header[k]["dtype"]]) for k, v in state.items()}
        for header, state in states
    ]
    assert any(np.abs(v).max() > 0 for v in numbers[0].values())
    for name, want in numbers[0].items():
        # Longer batches sum in another order.
        np.testing.assert_allclose(numbers[1][name], want, rtol=1e-4, atol=1e-4 * np.abs(want).max())


def test_every_row_of_the_stream_is_kept_with_the_same_probability():
    lora = learner()
    x = normal(rng(0), 60, N)
    counts, runs, capacity = np.zeros(60), 1500, 10
    for seed in range(5000, 5000 + runs):
        kept = memory(capacity, seed=seed)
        for part in np.split(np.arange(60), [25, 26, 40]):
            kept.offer(lora, x, x, part)
        assert (kept.seen, len(kept)) == (60, capacity)
        assert len(set(kept.places.tolist())) == capacity
        counts[kept.places] += 1
    expected = runs * capacity / 60
    # Kept without replacement: a variance of (1 - 1/6) of a multinomial's, 59 degrees of freedom.
    chi = ((counts - expected) ** 2 / expected).sum() / (1 - 1 / 6)
    assert 32 < chi < 98, "outside a few times in a thousand"


def test_parts_of_a_stream_are_kept_like_the_whole():
    lora = learner()
    x, y = problem()[0]
    whole, parts = memory(7), memory(7)
    whole.offer(lora, x, y)
    for part in np.split(np.arange(len(x)), [3, 7, 50]):
        parts.offer(lora, x, y, part)
    assert whole.to_bytes() == parts.to_bytes()
    np.testing.assert_array_equal(whole.x, x[whole.places])
    np.testing.assert_array_equal(whole.y, y[whole.places])
    assert whole.memory_bytes == 7 * (4 * 3 * N + 4 + 8)


def test_answers_stay_those_of_their_time():
    lora = make(N, N, 4, names=("q",), seed=3)
    (x, y), (later, wanted) = problem(seed=1)[0], problem(seed=2)[0]
    kept = memory(12)
    kept.offer(lora, x, y)
    first = {int(p): out for p, out in zip(kept.places, kept.outputs, strict=True)}
    descend(lora, later, wanted, lr=0.1)
    kept.offer(lora, later, wanted)
    old = [int(p) for p in kept.places if p < len(x)]
    assert 0 < len(old) < 12
    for place, row, out in zip(kept.places.tolist(), kept.x, kept.outputs, strict=True):
        if place < len(x):
            np.testing.assert_array_equal(out, first[place])
            assert np.abs(lora.forward(row, "q") - out).max() > 1e-4
        else:
            np.testing.assert_allclose(out, lora.forward(row, "q"), atol=1e-5)


@pytest.mark.parametrize("kind", ["learner", "chain"])
def test_bytes_go_on_bit_for_bit(kind):
    target = stirred(learner() if kind == "learner" else chain())
    (x, y), (old, wanted) = (problem(seed=s)[0] if kind == "learner" else classes(seed=s)[0] for s in (1, 2))
    kept = memory(9)
    kept.offer(target, old, wanted)
    descend(target, x, y, steps=3, replay=kept)
    other = memory(9)
    other.restore(kept.to_bytes())
    assert other.to_bytes() == kept.to_bytes() == kept.copy().to_bytes()
    results = []
    snapshot = target.snapshot()
    for one in (kept, other):
        target.restore(snapshot)
        descend(target, x, y, steps=3, replay=one)
        one.offer(target, x, y)
        results.append((arrays(target), one.to_bytes()))
    assert all((a == b).all() for a, b in zip(results[0][0], results[1][0], strict=True))
    assert results[0][1] == results[1][1]
    empty = memory(9)
    empty.restore(memory(9).to_bytes())
    assert len(empty) == 0


def altered(data, tensor, change):
    """The bytes with one tensor's numbers changed."""
    length = struct.unpack("<Q", data[:8])[0]
    start, end = json.loads(data[8 : 8 + length])[tensor]["data_offsets"]
    out = bytearray(data)
    part = out[8 + length + start : 8 + length + end]
    out[8 + length + start : 8 + length + end] = change(bytes(part))
    return bytes(out)


def test_damaged_bytes_are_refused_and_change_nothing():
    net = chain()
    x, y = classes()[0]
    kept = memory(9)
    kept.offer(net, x, y)
    good = kept.to_bytes()
    nan = struct.pack("<f", float("nan"))
    bad = [
        b"",
        good[:-1],
        good + b"x",
        net.snapshot(),
        good.replace(b"microlora-replay", b"microlora-rehear"),
    ]
    bad += [altered(good, name, lambda part: nan + part[4:]) for name in ("x", "outputs", "weights")]
    bad.append(altered(good, "labels", lambda part: struct.pack("<q", 4) + part[8:]))
    bad.append(altered(good, "labels", lambda part: struct.pack("<q", -1) + part[8:]))
    bad.append(altered(good, "places", lambda part: struct.pack("<q", len(x)) + part[8:]))
    bad.append(good.replace(b'\\"seen\\":128', b'\\"seen\\":8  '))
    for data in bad:
        with pytest.raises(FormatError):
            kept.restore(data)
    with pytest.raises(FormatError, match="version 2"):
        kept.restore(good.replace(b'\\"version\\":1', b'\\"version\\":2'))
    with pytest.raises(ConfigError, match="replay"):
        memory(9, seed=1).restore(good)
    assert kept.to_bytes() == good


def test_rows_that_do_not_fit_are_refused():
    lora, net = make(N, N, 4, names=("q", "v"), seed=3), chain()
    x, y = problem()[0]
    kept = memory(9)
    kept.offer(lora, x, y, modules=["q"])
    state = kept.to_bytes()
    optimizer = _core.Optimizer(lora, "sgd")
    for call in (
        lambda: kept.offer(lora, x, y),
        lambda: kept.check(lora, x, y, modules=["v"]),
        lambda: optimizer.train(lora, x, y, [0], [0.1], batch_size=1, replay=kept),
        lambda: kept.offer(net, *classes()[0]),
    ):
        with pytest.raises(
            ConfigError, match=r"replay: got rows of 16 with .*expected rows of 16 with targets"
        ):
            call()
    with pytest.raises(ConfigError, match="rows: got 96"):
        kept.offer(lora, x, y, [0, 96], modules=["q"])
    with pytest.raises(ConfigError, match="rows: got -1"):
        kept.offer(lora, x, y, [-1], modules=["q"])
    with pytest.raises(ShapeError, match="y"):
        kept.offer(lora, x, y[:5], modules=["q"])
    broken = x.copy()
    broken[:] = np.nan
    with pytest.raises(SampleError, match="NaN"):
        kept.offer(lora, broken, y, modules=["q"])
    assert kept.to_bytes() == state
    for bad in ({"label": -1.0}, {"logit": np.nan}, {"logit": 1e7}):
        with pytest.raises(ConfigError, match="_weight"):
            memory(**bad)


@pytest.mark.parametrize("kind", ["learner", "chain"])
def test_a_stored_row_that_overflows_changes_nothing(kind):
    if kind == "learner":
        target = make(N, N, 4, names=("q",), seed=3)
        (x, y), _ = problem()
        old, wanted = np.full((4, N), 1e19, F), np.zeros((4, N), F)
    else:
        target = stirred(chain(head="mse"))
        x, y = targets()
        old, wanted = np.full((4, N), 1e19, F), np.zeros((4, 4), F)
    kept = memory(4)
    kept.offer(target, old, wanted)
    before = arrays(target)
    with pytest.raises(NonFiniteError, match=r"replay.*stored row"):
        descend(target, x, y, replay=kept)
    assert all((a == b).all() for a, b in zip(arrays(target), before, strict=True))
