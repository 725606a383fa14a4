"""Runs over samples with feedback of their own, and what a run refuses."""

import math

import numpy as np
import pytest

import microlora as ml
from microlora.exceptions import (
    ConfigError,
    DTypeError,
    FeedbackError,
    NonFiniteError,
    SampleError,
    ShapeError,
)
from runs import N, Sample, chain, classes, config, learner, permutation, problem
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
    good = Sample(x[0], ml.Target(y[0]), "good")
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
        (
            DTypeError,
            r"dataset\[0\]: got tuple, expected a Tr",
            lambda: trainer.train(lora, list(zip(x, y, strict=True))),
        ),
        (DTypeError, r"dataset\[0\]: got int, expected a Training", lambda: trainer.train(lora, [1, 2])),
        (DTypeError, r"dataset\[1\]: got str", lambda: trainer.train(lora, [good, "no"])),
        (DTypeError, r"validation\[0\]: got NoneType", lambda: trainer.train(lora, data, [None])),
        (DTypeError, "cancel: got int, expected a CancelToken", lambda: trainer.train(lora, data, cancel=5)),
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


def samples_of(x, y, **fields):
    return [ml.TrainingSample(a, b, **fields) for a, b in zip(x, y, strict=True)]


def test_lists_without_ids_are_told_apart_by_content():
    data, held = problem()
    a = Trainer(config()).train(learner(), samples_of(*data), samples_of(*held))
    assert a.stop_reason == "completed"
    (x, y), own = data, (held[0].copy(), held[1].copy())
    own[0][3], own[1][3] = x[5], y[5]
    for train, validation in (
        (data, own),
        (samples_of(*data), samples_of(*own)),
        (data, samples_of(*own)),
        (ml.AdapterDataset.from_arrays(*data), own),
    ):
        with pytest.raises(ConfigError, match=r"got 1 rows with inputs .* of training data \(first: row 3\)"):
            Trainer(config()).train(learner(), train, validation)
    own[1][3] += 1.0  # the same input with another target is another sample
    Trainer(config()).train(learner(), data, own)


def preferences(n, seed=0, module=None):
    """Outputs turned by a fixed rotation are liked better than the plain ones."""
    r = rng(seed)
    turn = np.linalg.qr(normal(rng(99), N, N))[0].astype(np.float32)
    x = normal(r, n, N)
    return [Sample(a, ml.Preference(a @ turn, a), f"{seed}-{i}", module) for i, a in enumerate(x)]


@pytest.mark.parametrize("kind", ["preference", "contrastive", "cosine"])
def test_feedback_without_a_direction_says_so(kind):
    r, lora = rng(0), learner()
    made = {
        "preference": lambda: ml.Preference(normal(r, N), normal(r, N)),
        "contrastive": lambda: ml.Contrastive(normal(r, N), [normal(r, N)]),
        "cosine": lambda: ml.Target(normal(r, N), loss="cosine"),
    }[kind]
    listed = [Sample(normal(r, N), made(), str(i)) for i in range(20)]
    before = lora.export_weights()
    with pytest.raises(FeedbackError, match=r"dataset: all 20 samples .*all zeros.*base='input'"):
        Trainer(config()).train(lora, listed)
    assert lora.export_weights() == before
    with pytest.raises(FeedbackError, match=r"dataset: all 16 samples"):
        Trainer(config({"max_steps": 2})).train(lora, listed)
    result = Trainer(config()).train(lora, listed, base="input")
    assert math.isfinite(result.final_loss)
    assert lora.export_weights() != before


def test_validation_without_a_direction_says_so():
    data = problem()[0]
    settings = config({"learning_rate": 1e-30}, epochs=1)
    with pytest.raises(FeedbackError, match=r"validation: all 5 samples .*all zeros.*base='input'"):
        Trainer(settings).train(
            make(N, N, 4, names=("m",), learned=False), data_of_zero(data), preferences(5)
        )


def data_of_zero(data):
    """Targets that a new learner meets already, so that it stays at zero."""
    return data[0], np.zeros_like(data[1])


def test_preferences_are_learned_over_the_input():
    train, held = preferences(200), preferences(50, seed=1)
    lora = learner()
    settings = config({"ewc_lambda": None}, epochs=20)
    trainer = Trainer(settings)
    result = trainer.train(lora, train, held, base="input")
    assert result.history.val_losses[-1] < 0.5 * result.history.val_losses[0]
    assert trainer.ewc.n_samples == 200


@pytest.mark.parametrize("dropout", [0.0, 1e-7])
def test_base_input_is_the_target_less_the_input(dropout):
    """For squared errors base + dY to t is dY to t - x: arrays and samples alike."""
    (x, y), (hx, hy) = problem(n=40)
    ends = {}
    for name, data, held, base in (
        ("plain", (x, y - x), (hx, hy - hx), None),
        ("arrays", (x, y), (hx, hy), "input"),
        ("samples", samples_of(x, y), samples_of(hx, hy), "input"),
    ):
        lora, trainer = learner(dropout=dropout), Trainer(config({"ewc_lambda": None}))
        result = trainer.train(lora, data, held, base=base)
        ends[name] = (lora["m"].lora_b, result.history.val_losses, trainer.ewc.n_samples)
    for name in ("arrays", "samples"):
        close(ends[name][0], ends["plain"][0], rtol=1e-4)
        assert ends[name][1] == pytest.approx(ends["plain"][1], rel=1e-4)
        assert ends[name][2] == ends["plain"][2]


def test_a_base_that_cannot_be_is_refused():
    (x, y), _ = problem()
    lora = make(N, 2 * N, 4, learned=False)
    wide = np.concatenate([y, y], axis=1)
    with pytest.raises(ShapeError, match="base: got 'input' for widths 16 -> 32"):
        Trainer(config()).train(lora, (x, wide), base="input")
    with pytest.raises(ShapeError, match="base: got 'input' for widths 16 -> 32"):
        Trainer(config()).train(lora, samples_of(x, wide), base="input")
    with pytest.raises(ConfigError, match="base: got 'output'"):
        Trainer(config()).train(learner(), (x, y), base="output")
    with pytest.raises(ConfigError, match="with a chain"):
        Trainer(config()).train(chain(), classes()[0], base="input")


# -- when numbers leave float32 --

WILD = {"learning_rate": 1000.0, "optimizer": "sgd", "max_grad_norm": None, "schedule": "constant"}


def test_a_gradient_that_overflows_ends_the_run(caplog):
    (x, y), held = problem(n=300)
    lora = learner()
    start = lora.export_weights()
    result = Trainer(config(WILD)).train(lora, (x, y))
    assert result.stop_reason == "diverged"
    assert lora.export_weights() == start
    assert result.total_steps > 0
    assert "learning_rate" in caplog.text
    assert f"step {result.total_steps}" in caplog.text
    assert [e.steps for e in result.history.epochs] == [0]
    seen = {}

    class Watch:
        def on_validation(self, event):
            seen[event.record.step] = lora.export_weights()

    result = Trainer(config(WILD, validation_interval=1, early_stopping_patience=0)).train(
        lora, (x, y), held, callbacks=Watch()
    )
    assert result.stop_reason == "diverged"
    assert lora.export_weights() == seen[result.best_step]


def test_a_run_that_diverged_is_over(tmp_path):
    data, _ = problem(n=300)
    settings = config(WILD, checkpoint_every=1, output_dir=str(tmp_path))
    lora, later = learner(), learner()
    want = Trainer(settings).train(lora, data)
    got = Trainer(settings).train(later, data, resume=True)
    assert (got.stop_reason, got.total_steps) == (want.stop_reason, want.total_steps)
    assert later.export_weights() == lora.export_weights()


def test_a_sample_that_overflows_in_wild_weights_says_so():
    (x, y), held = problem(n=300)
    lora = learner()
    seen = {}

    class Watch:
        def on_validation(self, event):
            seen[event.record.loss] = lora.export_weights()

    with pytest.raises(SampleError, match="weights have grown too large; lower the learning_rate") as caught:
        Trainer(config(WILD, validation_interval=1, early_stopping_patience=0)).train(
            lora, samples_of(x, y), held, callbacks=Watch()
        )
    assert caught.value.sample_id == str(caught.value.row)  # without an id its place is its name
    assert lora.export_weights() == seen[min(seen)]
