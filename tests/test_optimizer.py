"""The compiled loop over a MicroLoRA: the same steps as adapt + apply_updates, batches, weights, bytes."""

import threading

import numpy as np
import pytest

import microlora as ml
from microlora import _core, exceptions

F = np.float32


def lora_of(dtype="f32", modules=("q_proj",), hidden=12, seed=0):
    config = ml.LoraConfig(rank=3, target_modules=modules, dtype=dtype)
    lora = ml.MicroLoRA(config, hidden_dim=hidden, seed=seed)
    rng = np.random.default_rng(seed)
    for module in modules:
        for _ in range(3):
            lora.adapt(
                rng.standard_normal(hidden).astype(F), ml.Gradient(rng.standard_normal(hidden)), module
            )
    lora.apply_updates(0.05)
    return lora


def data(n=20, hidden=12, seed=1):
    rng = np.random.default_rng(seed)
    return (rng.standard_normal((n, hidden)).astype(F) for _ in range(2))


def factors(lora):
    return [w for m in lora.modules() for w in (lora[m].lora_a, lora[m].lora_b)]


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_a_batch_is_the_mean_of_its_events(dtype):
    x, t = data()
    base = next(iter(data(seed=2)))
    one, two, three = (lora_of(dtype) for _ in range(3))
    for row, target, b in zip(x, t, base, strict=True):
        one.adapt(row, ml.Target(target), base=b)
        two.adapt(row, ml.Target(target), base=b)
    one.apply_updates(0.1)
    events, norm = _core.Optimizer(two, "sgd").step(two, 0.1)
    losses, norms = _core.Optimizer(three, "sgd").train(
        three, x, t, np.arange(20), [0.1], batch_size=20, base=base
    )
    assert events == 20
    assert norms[0] == pytest.approx(norm, rel=0.02 if dtype == "bf16" else 1e-4)
    for a, b, c in zip(factors(one), factors(two), factors(three), strict=True):
        assert np.array_equal(a, b)
        np.testing.assert_allclose(a, c, atol=1e-2 if dtype == "bf16" else 1e-5)
    assert losses[0] == pytest.approx(float(_core.evaluate(lora_of(dtype), x, t, base=base).mean()), rel=1e-5)


def test_pending_gradients_are_used_once_and_survive_a_refusal():
    lora = lora_of()
    x, t = data(3)
    optimizer = _core.Optimizer(lora, "adamw")
    assert optimizer.step(lora, 0.1) == (0, 0.0)
    for row, target in zip(x, t, strict=True):
        lora.adapt(row, ml.Target(target))
    before = factors(lora)
    with pytest.raises(exceptions.ConfigError, match="lr"):
        optimizer.step(lora, -1.0)
    with pytest.raises(exceptions.ConfigError, match="max_grad_norm"):
        optimizer.step(lora, 1.0, max_grad_norm=0.0)
    with pytest.raises(exceptions.NonFiniteError):
        optimizer.step(lora, 1e300)
    assert lora["q_proj"].pending == 3
    assert all(np.array_equal(a, b) for a, b in zip(before, factors(lora), strict=True))
    assert optimizer.steps == 0
    assert optimizer.step(lora, 0.1)[0] == 3
    assert (lora["q_proj"].pending, optimizer.steps) == (0, 1)
    assert optimizer.step(lora, 0.1)[0] == 0


def test_one_event_is_clipped_by_its_closed_form_norm():
    x, t = data(1)
    lora = lora_of()
    was = factors(lora)
    result = lora.adapt(x[0], ml.Target(t[0]))
    norm = float(np.hypot(result.grad_norm_a, result.grad_norm_b))
    _, seen = _core.Optimizer(lora, "sgd").step(lora, 1.0, max_grad_norm=norm / 8)
    assert seen == pytest.approx(norm, rel=1e-6)
    moved = np.sqrt(sum(float(((a - b) ** 2).sum()) for a, b in zip(factors(lora), was, strict=True)))
    assert moved == pytest.approx(norm / 8, rel=1e-4)


def test_weights_of_rows_scale_their_losses():
    x, t = data(6)
    w = np.array([0, 1, 2, 0.5, 1, 0], F)
    weighted, repeated = lora_of(), lora_of()
    losses, _ = _core.Optimizer(weighted, "sgd").train(
        weighted, x, t, np.arange(6), [0.1], batch_size=6, weights=w
    )
    want = _core.evaluate(repeated, x, t) * w
    assert losses[0] == pytest.approx(float(want.mean()), rel=1e-5)
    for row, target, scale in zip(x, t, w, strict=True):
        y = repeated.forward(row)
        repeated.adapt(row, ml.Gradient(scale * (y - target)))
    repeated.apply_updates(0.1)
    for a, b in zip(factors(weighted), factors(repeated), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
    with pytest.raises(exceptions.ConfigError, match=r"weights\[1\]"):
        _core.evaluate(weighted, x, t, weights=-w)
    with pytest.raises(exceptions.ShapeError, match="weights"):
        _core.evaluate(weighted, x, t, weights=w[:3])


def test_modules_learn_on_their_own():
    x, t = data(8)
    both = lora_of(modules=("q_proj", "v_proj"))
    one = lora_of(modules=("q_proj", "v_proj"))
    _core.Optimizer(both, "sgd").train(both, x, t, np.arange(8), [0.1], batch_size=8)
    _core.Optimizer(one, "sgd").train(one, x, t, np.arange(8), [0.1], batch_size=8, modules=["v_proj"])
    start = lora_of(modules=("q_proj", "v_proj"))
    assert np.array_equal(one["v_proj"].lora_b, both["v_proj"].lora_b)
    assert np.array_equal(one["q_proj"].lora_b, start["q_proj"].lora_b)
    assert not np.array_equal(both["q_proj"].lora_b, start["q_proj"].lora_b)
    wide = ml.MicroLoRA(ml.LoraConfig(rank=2, target_modules=["up_proj"]), dims={"up_proj": (12, 30)})
    with pytest.raises(exceptions.ShapeError, match="up_proj 12 -> 30"):
        _core.evaluate(wide, x, t)
    with pytest.raises(exceptions.UnknownModuleError):
        _core.evaluate(both, x, t, modules=["k_proj"])
    with pytest.raises(exceptions.ConfigError, match="shapes"):
        _core.Optimizer(wide, "sgd").train(both, x, t, [0], [0.1], batch_size=1)
    with pytest.raises(exceptions.ConfigError, match="labels"):
        _core.evaluate(both, x, np.zeros(8, np.int64))


def test_bytes_of_an_optimizer_fail_closed():
    x, t = data()
    lora = lora_of()
    optimizer = _core.Optimizer(lora, "adamw")
    optimizer.train(lora, x, t, np.arange(20), [0.01] * 5, batch_size=4)
    data_ = optimizer.to_bytes()
    assert optimizer.memory_bytes == 2 * 4 * 3 * (16 + 16)
    for bad in (b"", data_[:-1], data_ + b"x", lora.export_weights()):
        with pytest.raises(exceptions.FormatError):
            optimizer.restore(bad)
    with pytest.raises(exceptions.ConfigError, match="optimizer"):
        _core.Optimizer(lora, "sgd").restore(data_)
    with pytest.raises(exceptions.ConfigError, match="shapes"):
        _core.Optimizer(lora_of(hidden=16), "adamw").restore(data_)
    newer = data_.replace(b'\\"version\\":1', b'\\"version\\":2')
    with pytest.raises(exceptions.FormatError, match="version 2"):
        optimizer.restore(newer)
    assert optimizer.to_bytes() == data_
    assert (optimizer.kind, optimizer.steps) == ("adamw", 5)


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"kind": "rmsprop"}, "kind"),
        ({"momentum": 1.0, "kind": "momentum"}, "momentum"),
        ({"betas": (0.9, 1.0)}, r"betas\[1\]"),
        ({"eps": 0.0}, "eps"),
        ({"weight_decay": -0.1}, "weight_decay"),
        ({"lora_plus_ratio": 0.0}, "lora_plus_ratio"),
    ],
)
def test_settings_out_of_range_are_named(settings, name):
    with pytest.raises(exceptions.ConfigError, match=name):
        _core.Optimizer(lora_of(), settings.pop("kind", "adamw"), **settings)


@pytest.mark.parametrize("step", ["gradient", "proximal"])
def test_a_penalty_of_every_nth_step_acts_n_fold(step):
    x, t = data(8)

    def run(every, lrs):
        lora = lora_of()
        ewc = ml.EwcPlusPlus(lora, 0.3, kind="factor", fisher="empirical", step=step)
        ewc.accumulate_fisher(x, t)
        ewc.start_new_task()
        lora.adapt(x[0], ml.Gradient(t[0]))
        lora.apply_updates(0.2)
        optimizer = _core.Optimizer(lora, "sgd")
        for lr in lrs:
            lora.adapt(x[1], ml.Gradient(1e-30 * t[1]))
            optimizer.step(lora, lr, ewc=ewc, ewc_every=every)
        return factors(lora), ewc

    for every, lrs, same in ((3, [0.01], [0.03]), (3, [0.01] * 3, [0.03]), (2, [0.0, 0.01], [])):
        (some, _), (want, _) = run(every, lrs), run(1, same)
        for a, b in zip(some, want, strict=True):
            np.testing.assert_allclose(a, b, atol=1e-6)
    moved, still = run(1, [0.03])[0], run(1, [])[0]
    assert max(np.abs(a - b).max() for a, b in zip(moved, still, strict=True)) > 1e-3
    with pytest.raises(exceptions.ConfigError, match="ewc_every"):
        _core.Optimizer(lora_of(), "sgd").step(lora_of(), 0.1, ewc_every=0)


def test_a_cancelled_call_keeps_its_finished_steps():
    x, t = data()
    lora, token = lora_of(), ml.CancelToken()
    optimizer = _core.Optimizer(lora, "sgd")
    seen = []

    def progress(done, total, what):
        seen.append((done, total, what))
        if done >= 64:
            token.cancel()

    with pytest.raises(exceptions.CancelledError):
        optimizer.train(
            lora, x, t, np.arange(20).repeat(20), [1e-3] * 400, batch_size=1, progress=progress, cancel=token
        )
    assert seen[0] == (0, 400, "training")
    assert 64 <= optimizer.steps <= 128


def test_readers_see_whole_versions_while_it_trains():
    """With one value in every weight, a forward of mixed versions would show unequal outputs."""
    lora = ml.MicroLoRA(ml.LoraConfig(rank=2, alpha=2.0, target_modules=["q_proj"]), hidden_dim=64)
    ones = {"q_proj": (np.full((2, 64), 0.01, F), np.full((64, 2), 0.01, F))}
    lora.restore(ml.Adapter.from_factors(ones, alpha=2.0))
    x, t = np.ones((8, 64), F), np.ones((8, 64), F)
    stop, torn = threading.Event(), []

    def read():
        while not stop.is_set():
            y = lora.forward(x[0])
            if np.ptp(y) > 1e-6 * abs(float(y[0])):
                torn.append(y)

    threads = [threading.Thread(target=read) for _ in range(2)]
    for thread in threads:
        thread.start()
    _core.Optimizer(lora, "sgd").train(lora, x, t, np.arange(8).repeat(500), [1e-4] * 500, batch_size=8)
    stop.set()
    for thread in threads:
        thread.join()
    assert not torn
    assert float(lora.forward(x[0])[0]) > 0.02
