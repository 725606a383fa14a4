"""Runs over samples with feedback of their own, and what a run refuses."""

import math

import numpy as np
import pytest

import microlora as ml
from microlora.exceptions import (
    ConfigError,
    DTypeError,
    NonFiniteError,
    SampleError,
    ShapeError,
)
from runs import N, Sample, config, learner, permutation, problem
from support import close, feedback_kinds, make, normal, rng, state_of

Trainer = ml.AdapterTrainer


def test_targets_sample_by_sample_are_the_arrays():
    (x, y), (hx, hy) = problem(n=40)
    arrays, samples = learner(), learner()
    a = Trainer(config()).train(arrays, (x, y), (hx, hy))
    listed = [Sample(*row, str(i)) for i, row in enumerate(zip(x, map(ml.Target, y), strict=True))]
    held = [Sample(*row, f"h{i}") for i, row in enumerate(zip(hx, map(ml.Target, hy), strict=True))]
    b = Trainer(config()).train(samples, listed, held)
    close(samples["m"].lora_b, arrays["m"].lora_b, rtol=1e-5)
    assert b.history.train_losses == pytest.approx(a.history.train_losses, rel=1e-5)
    assert b.history.val_losses == pytest.approx(a.history.val_losses, rel=1e-5)
    assert b.best_step == a.best_step


def test_mixed_feedback_for_two_modules():
    r = rng(2)
    lora = make(N, N, 4, names=("q", "v"))
    listed = []
    for i in range(24):
        for j, feedback in enumerate(feedback_kinds(r, N).values()):
            listed.append(Sample(normal(r, N), feedback, f"{i}-{j}", module=("q", "v", None)[i % 3]))
    before = lora.export_weights()
    result = Trainer(config({"max_grad_norm": 1.0})).train(lora, listed)
    assert lora.export_weights() != before
    assert result.total_steps == 3 * 18
    assert math.isfinite(result.final_loss)


def test_quality_decides_over_samples():
    (x, y), _ = problem(n=40)
    q = np.linspace(0.0, 1.0, 40)
    listed = [
        Sample(a, ml.Target(b), str(i), quality=k) for i, (a, b, k) in enumerate(zip(x, y, q, strict=True))
    ]
    result = Trainer(config({"batch_size": 4})).train(learner(), listed)
    assert result.history.epochs[0].samples == (q > 0.5).sum() == 20
    with pytest.raises(ConfigError, match="no sample of quality"):
        Trainer(config()).train(learner(), listed[:10])


def test_the_validation_loss_is_one_number_on_both_paths():
    """Weighted by quality, over the sum of the weights; rows below the threshold have none."""
    (x, y), (hx, hy) = problem(n=40, held=20)
    q = np.linspace(0.3, 1.0, 20)
    weights = np.maximum(0.0, (q - 0.5) / 0.5).astype(np.float32)
    listed = [
        Sample(a, ml.Target(b), f"h{i}", quality=k) for i, (a, b, k) in enumerate(zip(hx, hy, q, strict=True))
    ]
    counts = weights > 0
    assert 0 < counts.sum() < 20
    found = {}
    for name, held in (("samples", listed), ("arrays", (hx[counts], hy[counts], weights[counts]))):
        lora = learner()
        result = Trainer(config(save_best=False)).train(lora, (x, y), held)
        found[name] = result.history.val_losses
    want = np.average(ml._core.evaluate(lora, hx, hy), weights=weights)
    assert found["samples"] == pytest.approx(found["arrays"], rel=1e-5)
    assert found["samples"][-1] == pytest.approx(want, rel=1e-5)


def test_bare_gradients_have_no_loss(tmp_path):
    r = rng(8)
    samples = [Sample(normal(r, N), ml.Gradient(normal(r, N)), str(i)) for i in range(12)]
    lora = learner()
    settings = config(checkpoint_every=1, output_dir=str(tmp_path))
    result = Trainer(settings).train(lora, samples)
    assert np.abs(lora["m"].lora_b).max() > 0
    assert result.final_loss is None
    assert result.history.train_losses == [None] * 3
    with pytest.raises(ConfigError, match="validation: got bare gradients alone"):
        Trainer(config()).train(lora, problem()[0], samples)
    mixed = [*samples, Sample(normal(r, N), ml.Target(normal(r, N)), "t")]
    assert Trainer(config()).train(learner(), mixed).final_loss > 0


# -- what is refused --


def test_refusals_change_nothing():
    lora, data = learner(), problem()[0]
    (x, y), trainer = data, Trainer(config())
    before = state_of(lora)
    bad = x.copy()
    bad[7, 3] = np.inf
    cases = [
        (DTypeError, "lora: got object", lambda: trainer.train(object(), data)),
        (DTypeError, "dataset: got int", lambda: trainer.train(lora, 3)),
        (ConfigError, "dataset: got no samples", lambda: trainer.train(lora, [])),
        (ConfigError, "dataset: got no samples", lambda: trainer.train(lora, (x[:0], y[:0]))),
        (ShapeError, r"dataset\[1\]: got 95 rows", lambda: trainer.train(lora, (x, y[:-1]))),
        (ShapeError, r"dataset\[0\]: got shape", lambda: trainer.train(lora, (x[0], y[0]))),
        (DTypeError, r"dataset\[0\]: got dtype int", lambda: trainer.train(lora, (x.astype(int), y))),
        (
            NonFiniteError,
            r"dataset\[0\]: got NaN or infinity in row 7",
            lambda: trainer.train(lora, (bad, y)),
        ),
        (NonFiniteError, "in row 7", lambda: trainer.train(lora, data, (bad[:20], y[:20]))),
        (ConfigError, "got labels", lambda: trainer.train(lora, (x, np.zeros(96, int)))),
        (ConfigError, "got the training data themselves", lambda: trainer.train(lora, data, data)),
        (ShapeError, "dataset: got widths 16 -> 3", lambda: trainer.train(lora, data, (x, y[:, :3]))),
        (DTypeError, "progress: got str", lambda: trainer.train(lora, data, progress="yes")),
        (ConfigError, "resume: got True without", lambda: trainer.train(lora, data, resume=True)),
        (OSError, "nowhere", lambda: trainer.train(lora, data, resume="nowhere")),
    ]
    for error, message, call in cases:
        with pytest.raises(error, match=message):
            call()
        assert state_of(lora) == before
    with pytest.raises(DTypeError, match="expected AdapterTrainingConfig"):
        Trainer(ml.TrainingConfig())
    with pytest.raises(ConfigError, match="ewc_lambda 0"):
        Trainer(config(), ewc=object())
    with pytest.raises(ConfigError, match=r"schedule\.warmup"):
        Trainer(config({"warmup": 36})).train(lora, data)


def test_shared_samples_are_refused():
    (x, y), _ = problem()
    listed = [Sample(a, ml.Target(b), f"s{i}") for i, (a, b) in enumerate(zip(x, y, strict=True))]
    with pytest.raises(
        ConfigError, match=r"got 5 samples that are training data too \('s30', 's31', 's32', ...\)"
    ):
        Trainer(config()).train(learner(), listed[:35], listed[30:])


def test_a_sample_that_cannot_be_learned_is_named():
    """Its step changes nothing, those before it stand."""
    (x, y), _ = problem(n=32)
    huge = y.copy()
    huge[24] = 1e25  # whose square leaves float32
    lora, clean = learner(), learner()
    settings = config({"schedule": "constant"}, epochs=1)
    order = permutation(32, 0, 0)
    done = int(np.flatnonzero(order == 24)[0]) // 8
    with pytest.raises(SampleError, match=rf"sample '24', after step {done}") as caught:
        Trainer(settings).train(lora, (x, huge))
    assert (caught.value.row, caught.value.sample_id, caught.value.steps_done) == (24, "24", done)
    short = settings.replace(training=settings.training.replace(max_steps=done))
    assert done == 3
    Trainer(short).train(clean, (x, y))
    assert lora.export_weights() == clean.export_weights()
