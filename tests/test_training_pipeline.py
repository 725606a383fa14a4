"""The pipeline: batches of events, quality, accumulation, what is refused. EWC has its own file."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import microlora as ml
from microlora.exceptions import (
    ConfigError,
    DTypeError,
    FeedbackError,
    NonFiniteError,
    SampleError,
    UnknownModuleError,
)
from microlora.training import SGD, AdamW
from numpy_trainer import NumpyOptimizer, gradients
from runs import Sample
from support import close, feedback_kinds, make, normal, rng, state_of

N = 24


def config(**settings):
    return ml.TrainingConfig(**{"ewc_lambda": 0.0, "learning_rate": 0.01, "batch_size": 4, **settings})


def pipeline_of(lora, **settings):
    return ml.TrainingPipeline(config(**settings)).init_for_lora(lora)


def data(n=32, seed=0, n_in=N, n_out=N):
    r = rng(seed)
    return normal(r, n, n_in), normal(r, n, n_out)


def learn(lora, x, y, **settings):
    pipeline = pipeline_of(lora, **settings)
    return pipeline, [pipeline.train_step(lora, a, ml.Target(b)) for a, b in zip(x, y, strict=True)]


def test_every_batch_makes_one_step():
    lora, (x, y) = make(), data(10)
    before = lora.export_weights()
    pipeline, outcomes = learn(lora, x, y)
    assert [o.applied for o in outcomes] == [False, False, False, True] * 2 + [False] * 2
    assert [o.learning_rate for o in outcomes] == [None, None, None, 0.01] * 2 + [None] * 2
    assert lora.export_weights() != before
    stats = pipeline.stats()
    assert (stats.steps, stats.events, stats.pending, stats.learning_rate) == (2, 10, 2, 0.01)
    assert stats.mean_loss == pytest.approx(np.mean([o.loss for o in outcomes]))
    assert stats.last_loss == outcomes[-1].loss == outcomes[-1].result.loss_before
    assert pipeline.flush(lora)
    assert not pipeline.flush(lora)
    assert (pipeline.stats().steps, pipeline.stats().pending) == (3, 0)


@pytest.mark.parametrize("optimizer", ["sgd", "momentum", "adamw"])
@pytest.mark.parametrize(("batch", "accumulation"), [(1, 12), (3, 4), (4, 3), (12, 1)])
def test_micro_batches_equal_the_large_batch(optimizer, batch, accumulation):
    x, y = data(36)
    one, many = make(seed=3), make(seed=3)
    learn(one, x, y, optimizer=optimizer, batch_size=12)
    learn(many, x, y, optimizer=optimizer, batch_size=batch, gradient_accumulation=accumulation)
    close(many["m"].lora_a, one["m"].lora_a, rtol=1e-6)
    close(many["m"].lora_b, one["m"].lora_b, rtol=1e-6)


@pytest.mark.parametrize("optimizer", [SGD(), SGD(weight_decay=0.1), "momentum", AdamW(weight_decay=0.1)])
@pytest.mark.parametrize("clip", [None, 0.5])
def test_steps_are_those_of_the_twin(optimizer, clip):
    lora, (x, y) = make(seed=5), data(24)
    settings = config(optimizer=optimizer, max_grad_norm=clip, learning_rate=0.003)
    twin = NumpyOptimizer(lora, settings.optimizer.kind, **settings.optimizer_kwargs())
    now = {"m": (lora["m"].lora_a.astype(np.float64), lora["m"].lora_b.astype(np.float64))}
    scale = {"m": lora["m"].scaling}
    pipeline = ml.TrainingPipeline(settings).init_for_lora(lora)
    for i in range(0, 24, 4):
        grads, _ = gradients(now, scale, x, y, np.arange(i, i + 4))
        twin.apply(now, grads, 0.003, clip)
    for a, b in zip(x, y, strict=True):
        pipeline.train_step(lora, a, ml.Target(b))
    close(lora["m"].lora_a, now["m"][0], rtol=2e-5)
    close(lora["m"].lora_b, now["m"][1], rtol=2e-5)


def test_the_schedule_is_followed():
    lora, (x, y) = make(), data(16)
    _, outcomes = learn(lora, x, y, schedule="linear", max_steps=4, learning_rate=0.4)
    assert [o.learning_rate for o in outcomes if o.applied] == pytest.approx([0.4, 0.3, 0.2, 0.1])


def test_max_steps_ends_learning():
    lora, (x, y) = make(), data(16)
    pipeline, outcomes = learn(lora, x, y, max_steps=2)
    assert [o.reason for o in outcomes] == [None] * 8 + ["max_steps"] * 8
    assert pipeline.stats().events == 8


def test_clipping_bounds_a_step():
    free, clipped = make(seed=2), make(seed=2)
    x, y = data(4)
    learn(free, x, 100 * y, optimizer="sgd", max_grad_norm=None, learning_rate=1e-4)
    learn(clipped, x, 100 * y, optimizer="sgd", max_grad_norm=1.0, learning_rate=1e-4)
    start = make(seed=2)
    far = np.linalg.norm(free["m"].lora_b - start["m"].lora_b)
    near = np.hypot(
        np.linalg.norm(clipped["m"].lora_b - start["m"].lora_b),
        np.linalg.norm(clipped["m"].lora_a - start["m"].lora_a),
    )
    assert far > 10 * near
    assert near == pytest.approx(1e-4, rel=1e-2)


# -- quality --


@given(st.floats(0.0, 1.0), st.floats(0.0, 0.99))
def test_quality_weighs_a_target(q, threshold):
    """A step of one event is (q - threshold) / (1 - threshold) of the full one."""
    x, y = data(1)
    start, full, part = make(seed=1), make(seed=1), make(seed=1)
    settings = {"optimizer": "sgd", "batch_size": 1, "max_grad_norm": None, "quality_threshold": threshold}
    pipeline_of(full, **settings).train_step(full, x[0], ml.Target(y[0]), quality=1.0)
    pipeline = pipeline_of(part, **settings)
    outcome = pipeline.train_step(part, x[0], ml.Target(y[0]), quality=q)
    share = max(0.0, (q - threshold) / (1 - threshold))
    moved = part["m"].lora_b.astype(np.float64) - start["m"].lora_b
    whole = full["m"].lora_b.astype(np.float64) - start["m"].lora_b
    np.testing.assert_allclose(moved, share * whole, atol=1e-6 * np.abs(start["m"].lora_b).max())
    assert (outcome.reason == "quality") == (share == 0.0)
    assert pipeline.stats().skipped_quality == (share == 0.0)


@pytest.mark.parametrize("loss", ["mse", "cosine"])
def test_a_weight_is_a_factor_of_the_gradient(loss):
    """Two events of half weight in one batch are one event at full weight in a batch of two with nothing."""
    x, y = data(1, seed=4)
    settings = {"optimizer": "sgd", "batch_size": 1, "max_grad_norm": None, "learning_rate": 0.02}
    half, full = make(seed=1), make(seed=1)
    target, base = ml.Target(y[0], loss=loss), normal(rng(9), N)
    a = pipeline_of(half, **settings).train_step(half, x[0], target, base=base, weight=0.5)
    b = pipeline_of(full, **{**settings, "learning_rate": 0.01}).train_step(full, x[0], target, base=base)
    assert a.loss == pytest.approx(b.loss, rel=1e-5)
    close(half["m"].lora_b, full["m"].lora_b, rtol=1e-6)
    close(half["m"].lora_a, full["m"].lora_a, rtol=1e-6)


@pytest.mark.parametrize("kind", ["gradient", "reward", "preference", "contrastive"])
def test_other_feedback_is_never_dropped(kind):
    lora = make()
    pipeline = pipeline_of(lora, batch_size=1)
    event = feedback_kinds(rng(3), N)[kind]
    outcome = pipeline.train_step(lora, normal(rng(4), N), event, quality=0.0)
    assert outcome.applied
    assert outcome.reason is None
    assert pipeline.stats().skipped_quality == 0


def test_the_threshold_itself_is_passed_over():
    lora, (x, y) = make(), data(3)
    pipeline = pipeline_of(lora, batch_size=1)
    target = ml.Target(y[0])
    reasons = [
        pipeline.train_step(lora, x[0], target, quality=q).reason for q in (0.49, 0.5, 0.51, 1.0, None)
    ]
    assert reasons == ["quality", "quality", None, None, None]
    assert (pipeline.stats().skipped_quality, pipeline.stats().events) == (2, 3)


def test_an_event_that_teaches_nothing_is_counted_apart():
    lora = make(learned=False)
    pipeline = pipeline_of(lora)
    cosine = ml.Target(np.ones(N, np.float32), loss="cosine")
    outcome = pipeline.train_step(lora, np.ones(N, np.float32), cosine)
    assert outcome.reason is not None
    assert (pipeline.stats().skipped_other, pipeline.stats().events, pipeline.stats().pending) == (1, 0, 0)


# -- batches --


def test_a_batch_of_arrays_is_its_events():
    x, y = data(13)
    one, other = make(), make()
    learn(one, x, y)
    pipeline = pipeline_of(other)
    outcome = pipeline.train_batch(other, x, y)
    assert other.export_weights() == one.export_weights()
    assert (outcome.events, outcome.steps, outcome.skipped, outcome.learning_rate) == (13, 3, 0, 0.01)
    assert pipeline.stats().pending == 1


def test_epochs_repeat_a_batch():
    x, y = data(8)
    once, thrice = make(), make()
    pipeline = pipeline_of(once)
    for _ in range(3):
        last = pipeline.train_batch(once, x, y)
    outcome = pipeline_of(thrice, epochs=3).train_batch(thrice, x, y)
    assert once.export_weights() == thrice.export_weights()
    assert (outcome.events, outcome.steps) == (24, 6)
    assert outcome.loss == last.loss


def test_pairs_samples_and_arrays_are_the_same():
    class Sample:
        def __init__(self, x, y, quality):
            self.input_embedding, self.output_embedding, self.quality = x, y, quality
            self.feedback, self.module, self.weight, self.id = None, None, 1.0, "s"

    x, y = data(8)
    q = np.linspace(0.3, 1.0, 8)
    arrays, samples, pairs = make(), make(), make()
    outcome = pipeline_of(arrays).train_batch(arrays, x, y, quality=q)
    same = pipeline_of(samples).train_batch(samples, [Sample(*row) for row in zip(x, y, q, strict=True)])
    assert outcome == same
    assert outcome.skipped == 3  # 0.3, 0.4 and the threshold itself
    assert arrays.export_weights() == samples.export_weights()
    pipeline_of(pairs).train_batch(pairs, [(a, ml.Target(b)) for a, b in zip(x, y, strict=True)])
    plain = make()
    pipeline_of(plain).train_batch(plain, x, y)
    assert pairs.export_weights() == plain.export_weights()


def test_base_is_added_to_the_output():
    x, y = data(4)
    shifted, plain = make(), make()
    base = normal(rng(7), 4, N)
    pipeline_of(shifted).train_batch(shifted, x, y + base, base=base)
    pipeline_of(plain).train_batch(plain, x, y)
    close(shifted["m"].lora_b, plain["m"].lora_b, rtol=1e-4)


def test_learning_brings_the_loss_down():
    r = rng(11)
    x, a, b = normal(r, 200, N), normal(r, N, 2) / 5, normal(r, 2, N) / 1.5
    lora = make(rank=4, learned=False)
    pipeline = pipeline_of(lora, epochs=20, learning_rate=0.01)
    first = float(np.mean([0.5 * row @ row for row in x @ a @ b]))
    assert pipeline.train_batch(lora, x, x @ a @ b).loss < first / 50


# -- what is refused --


def test_refusals_change_nothing():
    lora, (x, y) = make(names=("m", "n")), data(2)
    pipeline = pipeline_of(lora)
    pipeline.train_step(lora, x[0], ml.Target(y[0]), "m")
    before, stats = state_of(lora), pipeline.stats()
    bad = np.full(N, np.nan, np.float32)
    target = ml.Target(y[0])
    cases = [
        (NonFiniteError, lambda: pipeline.train_step(lora, bad, target, "m")),
        (NonFiniteError, lambda: pipeline.train_step(lora, x[0], target, "m", quality=math.nan)),
        (FeedbackError, lambda: pipeline.train_step(lora, x[0], target, "m", quality=1.5)),
        (FeedbackError, lambda: pipeline.train_step(lora, x[0], target, "m", quality="good")),
        (ConfigError, lambda: pipeline.train_step(lora, x[0], target, "m", weight=0.0)),
        (ConfigError, lambda: pipeline.train_step(lora, x[0], ml.Gradient(y[0]), "m", weight=0.5)),
        (UnknownModuleError, lambda: pipeline.train_step(lora, x[0], target, "o")),
        (NonFiniteError, lambda: pipeline.train_step(lora, bad, target, "m", quality=0.7)),
        (ConfigError, lambda: pipeline.train_step(make(), x[0], target)),
        (ConfigError, lambda: pipeline.train_batch(lora, x, y[:1], module="m")),
        (ConfigError, lambda: pipeline.train_batch(lora, [(x[0], target)], base=y, module="m")),
    ]
    for error, call in cases:
        with pytest.raises(error):
            call()
        assert state_of(lora) == before
        assert pipeline.stats() == stats


def test_a_bad_row_of_a_batch_is_named():
    lora, clean, (x, y) = make(), make(), data(12)
    bad = x.copy()
    bad[9, 3] = math.nan
    pipeline = pipeline_of(lora)
    with pytest.raises(SampleError, match=r"\(row 9\)") as caught:
        pipeline.train_batch(lora, bad, y)
    assert (caught.value.row, caught.value.steps_done, caught.value.sample_id) == (9, 2, None)
    learn(clean, x[:9], y[:9])
    assert state_of(lora) == state_of(clean)
    assert pipeline.stats().pending == 1
    samples = [Sample(a, ml.Target(b), f"s{i}") for i, (a, b) in enumerate(zip(bad, y, strict=True))]
    with pytest.raises(SampleError, match=r"\(row 9, sample 's9'\)") as caught:
        pipeline_of(clean).train_batch(clean, iter(samples))
    assert caught.value.sample_id == "s9"


def test_samples_of_no_kind_are_refused():
    lora = make()
    pipeline = pipeline_of(lora)
    before = state_of(lora)
    for samples, message in [
        (3, "samples: got int"),
        ("text", "samples: got str"),
        ([3], r"samples\[0\]: got int, expected a TrainingSample"),
        ([(1, 2)], r"samples\[0\]: got \(int, int\), expected a TrainingSample or \(x, feedback\)"),
        ([(1,)], r"samples\[0\]: got \(int\)"),
    ]:
        with pytest.raises(DTypeError, match=message):
            pipeline.train_batch(lora, samples)
    assert state_of(lora) == before


def test_set_up_is_needed_and_checked():
    lora, (x, y) = make(), data(1)
    pipeline = ml.TrainingPipeline(config())
    assert pipeline.stats().steps == 0
    assert pipeline.ewc is None
    with pytest.raises(ConfigError, match=r"expected init_for_lora\(lora\) first"):
        pipeline.train_step(lora, x[0], ml.Target(y[0]))
    with pytest.raises(ConfigError, match=r"schedule\.total"):
        pipeline_of(lora, schedule="cosine")
    with pytest.raises(ConfigError, match="ewc_lambda 0"):
        pipeline.init_for_lora(lora, ewc=object())
    with pytest.raises(DTypeError, match="expected a MicroLoRA"):
        pipeline.init_for_lora(object())
    with pytest.raises(DTypeError, match="got a LoraChain"):
        pipeline.init_for_lora(ml.LoraChain([np.ones((3, 2), np.float32)], rank=1))
    with pytest.raises(DTypeError, match="expected TrainingConfig"):
        ml.TrainingPipeline({"batch_size": 3})


def test_a_new_task_starts_the_moments_afresh():
    """Also without EWC; with incremental_update they go on."""
    x, y = data(8)
    outcomes = {}
    for keep in (False, True):
        lora = make(seed=8)
        pipeline = pipeline_of(lora, incremental_update=keep)
        pipeline.train_batch(lora, x, y)
        pipeline.start_new_task(lora)
        pipeline.train_batch(lora, x, y)
        outcomes[keep] = lora.export_weights()
        assert pipeline.stats().tasks == 1
    through = make(seed=8)
    pipeline_of(through, epochs=2).train_batch(through, x, y)
    assert outcomes[True] == through.export_weights()
    assert outcomes[False] != outcomes[True]


def test_a_batch_takes_what_the_trainer_takes():
    x, y = data(10)
    weights = np.linspace(0.5, 2.0, 10).astype(np.float32)
    pair, plain, weighed, samples = make(), make(), make(), make()
    pipeline_of(pair).train_batch(pair, (x, y))
    pipeline_of(plain).train_batch(plain, x, y)
    assert pair.export_weights() == plain.export_weights()
    pipeline_of(weighed).train_batch(weighed, (x, y, weights))
    dataset = ml.AdapterDataset.from_arrays(x, y, weights=weights)
    pipeline_of(samples).train_batch(samples, dataset)
    close(weighed.adapter().lora_b("m"), samples.adapter().lora_b("m"), rtol=1e-6)
    for bad, message in (
        ([1, 2], r"samples\[0\]: got int"),
        ([(x[0], y[0])], r"samples\[0\]: got \(ndarray, ndarray\), expected a TrainingSample"),
        (3, "samples: got int"),
        ("text", "samples: got str"),
    ):
        with pytest.raises(DTypeError, match=message):
            pipeline_of(plain).train_batch(plain, bad)
    with pytest.raises(ConfigError, match="y: got shape"):
        pipeline_of(plain).train_batch(plain, (x, y[:3]))


def test_a_batch_that_taught_nothing_says_why():
    r = rng(0)
    lora = make(learned=False)
    pairs = [(normal(r, N), ml.Preference(normal(r, N), normal(r, N))) for _ in range(5)]
    outcome = pipeline_of(lora).train_batch(lora, pairs)
    assert (outcome.events, outcome.skipped_other) == (0, 5)
    assert "all zeros" in outcome.reason
    x, y = data(4)
    mixed = pipeline_of(lora).train_batch(lora, [*pairs, (x[0], ml.Target(y[0]))])
    assert (mixed.events, mixed.skipped_other, mixed.reason) == (1, 5, None)
    low = pipeline_of(lora).train_batch(lora, x, y, quality=np.full(4, 0.1))
    assert (low.events, low.skipped, low.reason) == (0, 4, "quality")
