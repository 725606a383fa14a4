"""The trainer: what it reports is what it did, when it stops, which weights it leaves, what it refuses."""

import logging

import numpy as np
import pytest

import microlora as ml
from microlora.exceptions import (
    CancelledError,
    ConfigError,
    DTypeError,
    NonFiniteError,
    ShapeError,
    UnknownModuleError,
)
from microlora.training import AdamW, LearningRateSchedule
from numpy_trainer import NumpyOptimizer, evaluate, f64
from runs import N, chain, classes, comparable, config, learner, permutation, problem
from support import close, normal, rng

Trainer = ml.AdapterTrainer


def test_the_reported_losses_are_the_true_ones():
    """Against a float64 twin that follows the same order, schedule and steps."""
    data, held = problem(n=90)
    lora, shadow = learner(), learner()
    settings = config({"seed": 5, "warmup": 3, "optimizer": AdamW(weight_decay=0.01, lora_plus_ratio=4.0)})
    result = Trainer(settings).train(lora, data, held)
    twin = NumpyOptimizer(shadow, "adamw", weight_decay=0.01, lora_plus_ratio=4.0)
    schedule = LearningRateSchedule("cosine", base_lr=0.01, total=36, warmup=3)
    for epoch, record in enumerate(result.history.epochs):
        order = permutation(90, 5, epoch)
        lrs = schedule.lrs(np.arange(12 * epoch, 12 * epoch + 12))
        losses, norms = twin.train(shadow, *data, order, lrs, batch_size=8, max_grad_norm=1.0)
        sizes = np.array([8] * 11 + [2])
        assert record.train_loss == pytest.approx((f64(losses) * sizes).sum() / 90, rel=1e-4)
        assert record.grad_norm == pytest.approx(f64(norms).mean(), rel=1e-4)
        assert record.val_loss == pytest.approx(evaluate(shadow, *held).mean(), rel=1e-4)
        assert record.learning_rate == lrs[-1]
        assert (record.epoch, record.steps, record.samples) == (epoch, 12, 90)
        assert record.seconds > 0
        assert record.samples_per_second == 90 / record.seconds
    close(lora["m"].lora_b, shadow["m"].lora_b, rtol=1e-4)
    close(lora["m"].lora_a, shadow["m"].lora_a, rtol=1e-4)
    assert result.total_steps == 36
    assert result.epochs_completed == 3
    assert result.stop_reason == "completed"
    assert result.final_loss == result.history.train_losses[-1]
    assert result.best_val_loss == min(result.history.val_losses)
    assert result.history.learning_rates == [e.learning_rate for e in result.history.epochs]


def test_it_learns():
    data, held = problem()
    lora = learner()
    before = evaluate(lora, *held).mean()
    result = Trainer(config(epochs=60)).train(lora, data, held)
    assert result.best_val_loss < before / 50
    assert evaluate(lora, *held).mean() == pytest.approx(result.best_val_loss, rel=1e-4)


@pytest.mark.parametrize("target", ["learner", "chain", "dora"])
def test_the_same_call_gives_the_same_bits(target):
    data, held = problem() if target == "learner" else classes()
    runs = []
    for _ in range(2):
        made = learner() if target == "learner" else chain(use_dora=target == "dora")
        result = Trainer(config(validation_interval=5)).train(made, data, held)
        weights = made.export_weights() if target == "learner" else made.snapshot()
        runs.append((comparable(result), weights))
    assert runs[0] == runs[1]


def test_where_a_run_looks_does_not_change_what_it_learns():
    """Validation, checkpoints and callbacks cut the run into stretches; the weights are the same bits."""
    data, held = problem()
    plain, watched = learner(), learner()
    Trainer(config(save_best=False)).train(plain, data)

    class Watch:
        def on_step(self, event):
            assert len(event.losses) == 1

    settings = config(validation_interval=3, save_best=False, early_stopping_patience=0)
    Trainer(settings).train(watched, data, held, callbacks=[Watch()])
    assert plain.export_weights() == watched.export_weights()


def test_a_seed_is_an_order():
    data, _ = problem()
    weights = set()
    for seed in (0, 0, 1):
        lora = learner()
        Trainer(config({"seed": seed})).train(lora, data)
        weights.add(lora.export_weights())
    assert len(weights) == 2


def test_accumulation_equals_the_large_batch():
    data, _ = problem(n=100)
    large, small = learner(), learner()
    Trainer(config({"batch_size": 24})).train(large, data)
    Trainer(config({"batch_size": 6, "gradient_accumulation": 4})).train(small, data)
    close(small["m"].lora_a, large["m"].lora_a, rtol=1e-6)
    close(small["m"].lora_b, large["m"].lora_b, rtol=1e-6)


@pytest.mark.parametrize("dora", [False, True])
def test_a_chain_learns_classes(dora):
    data, held = classes(n=1024, held=200)
    net = chain(use_dora=dora)
    before = net.loss(*held)
    result = Trainer(config(epochs=8, early_stopping_patience=0)).train(net, data, held)
    assert result.best_val_loss < before / 2
    assert net.loss(*held) == pytest.approx(result.best_val_loss, rel=1e-5)
    assert result.peak_activation_bytes > 0


def test_checkpointed_activations_are_fewer_and_the_weights_the_same():
    data, _ = classes()
    results, weights = [], []
    for flag in (False, True):
        net = chain(layers=16, gradient_checkpointing=flag)
        results.append(Trainer(config(gradient_checkpointing=flag, epochs=1)).train(net, data))
        weights.append(net.snapshot())
    assert weights[0] == weights[1]
    assert results[1].peak_activation_bytes <= 0.5 * results[0].peak_activation_bytes
    with pytest.raises(ConfigError, match="gradient_checkpointing: got True for a chain"):
        Trainer(config(gradient_checkpointing=True)).train(chain(), data)
    lora = learner()
    assert Trainer(config(gradient_checkpointing=True)).train(lora, problem()[0]).peak_activation_bytes == 0


def test_every_module_that_fits_learns():
    r = rng(0)
    cfg = ml.LoraConfig(rank=2, target_modules=("q", "k", "up"))
    dims = {"q": (N, N), "k": (N, N), "up": (N, 2 * N)}
    data, _ = problem()
    lora = ml.MicroLoRA(cfg, dims=dims)
    Trainer(config()).train(lora, data)
    moved = {name: bool(np.abs(lora[name].lora_b).max() > 0) for name in dims}
    assert moved == {"q": True, "k": True, "up": False}
    lora = ml.MicroLoRA(cfg, dims=dims)
    Trainer(config()).train(lora, data, modules=["k"])
    assert [bool(np.abs(lora[n].lora_b).max() > 0) for n in dims] == [False, True, False]
    named = ml.MicroLoRA(cfg, dims=dims)
    Trainer(config()).train(named, data, modules="k")
    assert named.export_weights() == lora.export_weights()
    with pytest.raises(ShapeError, match=r"got widths 5 -> 7.*q 16 -> 16, k 16 -> 16, up 16 -> 32"):
        Trainer(config()).train(lora, (normal(r, 9, 5), normal(r, 9, 7)))
    with pytest.raises(ShapeError, match="expected those of up: 16 -> 32"):
        Trainer(config()).train(lora, data, modules=["up"])
    with pytest.raises(UnknownModuleError):
        Trainer(config()).train(lora, data, modules=["v"])


def test_weights_of_rows():
    (x, y), _ = problem()
    weights = np.where(np.arange(len(x)) % 2, 0.0, 1.0).astype(np.float32)
    settings = config({"optimizer": "sgd", "batch_size": len(x), "max_grad_norm": None})
    weighed, some = learner(), learner()
    Trainer(settings).train(weighed, (x, y, weights))
    half = settings.replace(training=settings.training.replace(batch_size=len(x) // 2, learning_rate=0.005))
    Trainer(half).train(some, (x[::2], y[::2]))
    close(weighed["m"].lora_b, some["m"].lora_b, rtol=1e-5)


# -- when it stops and what it leaves --


def overfitting():
    """Few noisy samples, a rate that is too high: the validation loss soon rises again."""
    data, held = problem(n=8, noise=2.0)
    return data, held, {"learning_rate": 0.05, "schedule": "constant", "max_grad_norm": None}


def test_early_stopping_leaves_the_best_weights():
    data, held, training = overfitting()
    lora = learner()
    seen = []

    class Watch:
        def on_validation(self, event):
            seen.append((event.record, lora.export_weights()))

    settings = config(training, epochs=200, early_stopping_patience=4, save_best=False)
    result = Trainer(settings).train(lora, data, held, callbacks=Watch())
    assert result.stop_reason == "early_stopping"
    assert result.epochs_completed < 200
    best = min(seen, key=lambda pair: pair[0].loss)
    assert (best[0].loss, best[0].step) == (result.best_val_loss, result.best_step)
    assert lora.export_weights() == best[1]
    assert result.restored_best
    improved = [record.improved for record, _ in seen]
    assert improved[-4:] == [False] * 4
    assert improved[-5]


@pytest.mark.parametrize("save_best", [False, True])
def test_save_best_says_which_weights_are_left(save_best):
    data, held, training = overfitting()
    lora = learner()
    seen = {}

    class Watch:
        def on_validation(self, event):
            seen[event.record.step] = lora.export_weights()

    settings = config(training, epochs=20, early_stopping_patience=0, save_best=save_best)
    result = Trainer(settings).train(lora, data, held, callbacks=Watch())
    assert result.stop_reason == "completed"
    assert result.best_step < result.total_steps
    assert lora.export_weights() == seen[result.best_step if save_best else result.total_steps]
    assert result.restored_best is save_best


def test_max_steps_ends_within_an_epoch():
    data, held = problem()
    result = Trainer(config({"max_steps": 17}, epochs=9)).train(learner(), data, held)
    assert (result.stop_reason, result.total_steps, result.epochs_completed) == ("max_steps", 17, 1)
    assert [e.steps for e in result.history.epochs] == [12, 5]
    assert result.history.validations[-1].step == 17
    assert result.history.epochs[-1].val_loss == result.history.validations[-1].loss


def test_looks_are_made_when_asked_for():
    data, held = problem()
    result = Trainer(config(validation_interval=5, early_stopping_patience=0)).train(learner(), data, held)
    assert [v.step for v in result.history.validations] == [5, 10, 12, 15, 20, 24, 25, 30, 35, 36]
    assert [v.epoch for v in result.history.validations] == [0, 0, 0, 1, 1, 1, 2, 2, 2, 2]


def test_no_validation_set_means_no_best():
    result = Trainer(config(early_stopping_patience=1)).train(learner(), problem()[0])
    assert (result.best_val_loss, result.best_epoch, result.restored_best) == (None, None, False)
    assert result.history.val_losses == [None] * 3
    assert result.stop_reason == "completed"


def test_a_loss_that_is_not_finite_restores_the_best(monkeypatch, caplog):
    data, held = problem()
    lora, weights = learner(), {}
    import microlora.training.feeds as feeds

    real, calls = feeds.evaluate, []

    def failing(*args, **kwargs):
        calls.append(1)
        weights[len(calls)] = lora.export_weights()
        return real(*args, **kwargs) if len(calls) < 3 else np.full(4, np.nan, np.float32)

    monkeypatch.setattr(feeds, "evaluate", failing)
    with caplog.at_level(logging.WARNING):
        result = Trainer(config(early_stopping_patience=0, save_best=False)).train(lora, data, held)
    assert result.stop_reason == "diverged"
    assert result.history.validations[-1].loss is None
    assert lora.export_weights() == weights[2]
    assert "diverged" in caplog.text


def test_divergence_at_the_first_look_restores_the_start(monkeypatch):
    data, held = problem()
    lora = learner()
    start = lora.export_weights()
    import microlora.training.feeds as feeds

    def diverged(*args, **kwargs):
        raise NonFiniteError("out of range")

    monkeypatch.setattr(feeds, "evaluate", diverged)
    result = Trainer(config()).train(lora, data, held)
    assert (result.stop_reason, result.best_val_loss) == ("diverged", None)
    assert lora.export_weights() == start


# -- cancelling, progress, callbacks --


@pytest.mark.parametrize("save_best", [False, True])
def test_cancelling_leaves_the_best_weights_so_far(save_best):
    data, held, training = overfitting()
    lora, token = learner(), ml.CancelToken()
    seen, looks = {}, []

    class Watch:
        def on_validation(self, event):
            looks.append(event.record)
            seen[event.record.step] = lora.export_weights()
            if event.record.step == 15:
                token.cancel()

    trainer = Trainer(config(training, epochs=200, early_stopping_patience=0, save_best=save_best))
    with pytest.raises(CancelledError, match="cancelled after step 15"):
        trainer.train(lora, data, held, callbacks=Watch(), cancel=token)
    best = min(looks, key=lambda record: record.loss).step
    assert best < 15
    assert lora.export_weights() == seen[best if save_best else 15]
    assert len(trainer.history().epochs) == 15


def test_a_token_that_is_set_stops_at_once():
    token, lora = ml.CancelToken(), learner()
    token.cancel()
    before = lora.export_weights()
    with pytest.raises(CancelledError):
        Trainer(config()).train(lora, problem()[0], cancel=token)
    assert lora.export_weights() == before


def test_ctrl_c_leaves_the_best_weights(monkeypatch):
    data, held, training = overfitting()
    lora, seen = learner(), {}

    def watch(event):
        if isinstance(event, ml.training.ValidationEvent):
            seen[event.record.step] = (event.record.loss, lora.export_weights())
            if event.record.step == 15:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Trainer(config(training, epochs=99, early_stopping_patience=0)).train(
            lora, data, held, callbacks=[watch]
        )
    assert lora.export_weights() == min(seen.values())[1]


def test_progress_counts_the_steps_of_the_run():
    calls = []
    Trainer(config(validation_interval=5)).train(learner(), *problem(), progress=lambda *a: calls.append(a))
    done = [c[0] for c in calls]
    assert done == sorted(done)
    assert (done[0], done[-1]) == (0, 36)
    assert {c[1] for c in calls} == {36}
    assert calls[-1][2] == "epoch 3 of 3"


@pytest.mark.parametrize("without", [(), ("tqdm.auto",), ("tqdm.auto", "rich.progress")])
def test_a_bar_is_shown_where_one_is_installed(without, monkeypatch, capsys):
    from microlora.training import bars

    real = bars._module
    monkeypatch.setattr(bars, "_module", lambda name: None if name in without else real(name))
    result = Trainer(config()).train(learner(), problem()[0], progress=True)
    assert result.total_steps == 36
    assert "epoch 3 of 3" in capsys.readouterr().err


def test_callbacks_get_what_happened():
    events = []

    class All:
        def on_steps(self, event):
            events.append(("steps", event.step, len(event.losses), len(event.learning_rates)))

        def on_validation(self, event):
            events.append(("validation", event.record.step))

        def on_epoch_end(self, event):
            events.append(("epoch", event.record.epoch, event.record.steps))

    plain = []
    Trainer(config(epochs=2, validation_interval=7)).train(
        learner(), *problem(), callbacks=(All(), plain.append)
    )
    assert events == [
        *[("steps", 7, 7, 7), ("validation", 7), ("steps", 12, 5, 5), ("validation", 12), ("epoch", 0, 12)],
        *[("steps", 14, 2, 2), ("validation", 14), ("steps", 21, 7, 7), ("validation", 21)],
        *[("steps", 24, 3, 3), ("validation", 24), ("epoch", 1, 12)],
    ]
    assert len(plain) == len(events)
    with pytest.raises(DTypeError, match=r"callbacks\[1\]: got int"):
        Trainer(config()).train(learner(), problem()[0], callbacks=[plain.append, 3])


def test_an_error_in_a_callback_reaches_the_caller():
    def fail(event):
        raise RuntimeError("mine")

    with pytest.raises(RuntimeError, match="mine"):
        Trainer(config()).train(learner(), problem()[0], callbacks=[fail])


# -- mixed precision --


@pytest.mark.parametrize("dtype", ["bf16", "f16"])
@pytest.mark.parametrize("kind", ["learner", "chain"])
def test_mixed_precision_is_for_the_run_alone(dtype, kind):
    data, held = problem() if kind == "learner" else classes()
    exact = learner() if kind == "learner" else chain()
    mixed = learner() if kind == "learner" else chain()
    lora = mixed if kind == "learner" else mixed.lora
    seen = []
    a = Trainer(config(epochs=5)).train(exact, data, held)
    b = Trainer(config(epochs=5, mixed_precision=dtype)).train(
        mixed, data, held, callbacks=[lambda _: seen.append({lora[n].dtype for n in lora.modules()})]
    )
    assert all(found == {dtype} for found in seen)
    assert {lora[n].dtype for n in lora.modules()} == {"f32"}
    assert b.best_val_loss != a.best_val_loss
    assert b.best_val_loss == pytest.approx(a.best_val_loss, rel=0.05)


def test_storage_comes_back_after_an_error():
    (x, y), _ = problem()
    lora = learner()

    def fail(event):
        raise RuntimeError

    with pytest.raises(RuntimeError):
        Trainer(config(mixed_precision=True)).train(lora, (x, y), callbacks=[fail])
    assert lora["m"].dtype == "f32"


# -- across runs --


def test_history_and_reset():
    data, held = problem()
    trainer = Trainer(config())
    assert trainer.history().epochs == ()
    result = trainer.train(learner(), data, held)
    assert trainer.history() == result.history
    assert result.to_dict()["history"]["epochs"][0]["steps"] == 12
    trainer.reset()
    assert trainer.history().epochs == ()


def test_incremental_update_keeps_the_moments():
    data, more = problem(n=32, held=32)
    ends = {}
    for keep in (False, True):
        lora = learner()
        trainer = Trainer(config({"incremental_update": keep, "schedule": "constant"}, epochs=1))
        trainer.train(lora, data)
        trainer.train(lora, more)
        ends[keep] = lora.export_weights()
    assert ends[True] != ends[False]


def test_dropout_acts_while_training_and_only_then(tmp_path):
    data, held = problem()
    weights = {}
    for share in (0.0, 1e-7, 0.3):
        lora = learner(dropout=share)
        result = Trainer(config()).train(lora, data, held)
        weights[share] = lora["m"].lora_b
        assert evaluate(lora, *held).mean() == pytest.approx(result.best_val_loss, rel=1e-5)
    close(weights[1e-7], weights[0.0], rtol=1e-5)
    assert np.abs(weights[0.3] - weights[0.0]).max() > 1e-3
    twice = [learner(dropout=0.3) for _ in range(2)]
    for lora in twice:
        Trainer(config()).train(lora, data, held)
    assert twice[0].export_weights() == twice[1].export_weights()
