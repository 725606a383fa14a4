"""Learning events, and breakthroughs told from noise."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import microlora as ml
from microlora.exceptions import ConfigError, DTypeError, NonFiniteError
from microlora.training import BreakthroughDetector, check_breakthrough
from runs import N, config, learner
from support import make, normal, rng

Event = ml.LearningEvent


def alarms(losses):
    """First alarm of each row, by the definition on whole arrays in float64; inf where there is none."""
    reference, rest = losses[:, :100], losses[:, 100:]
    z = (rest - reference.mean(axis=1, keepdims=True)) / reference.std(axis=1, ddof=1, keepdims=True)
    score, first = np.zeros(len(z)), np.full(len(z), np.inf)
    for t in range(z.shape[1]):
        score = np.maximum(0.0, score - z[:, t] - 0.5)
        first[(score > 12.0) & np.isinf(first)] = 100 + t
    return first


@given(st.integers(0, 2**32 - 1), st.floats(0.0, 2.0), st.floats(1e-3, 1e3), st.floats(-1e3, 1e3))
def test_the_detector_is_its_definition(seed, drop, scale, shift):
    losses = rng(seed).standard_normal(300)
    losses[150:] -= drop
    losses = shift + scale * losses
    first = alarms(losses[None])[0]
    found = check_breakthrough(losses)
    assert found == (None if math.isinf(first) else int(first))


def test_noise_alarms_at_most_as_often_as_stated():
    """Stated: fewer than 2 in 100 runs of 1,000 losses after the warm-up; 2,000 runs."""
    first = alarms(rng(20).standard_normal((2000, 1100)))
    assert np.isfinite(first).mean() < 0.02


@pytest.mark.parametrize("noise", ["uniform", "laplace", "exponential"])
def test_other_noise_alarms_rarely_too(noise):
    first = alarms(getattr(rng(21), noise)(size=(500, 600)))
    assert np.isfinite(first).mean() < 0.03


def test_a_real_drop_is_found_in_the_stated_time():
    """Stated: a drop by one standard deviation after 26 losses on average, within 55 in 95 of 100 runs."""
    losses = rng(22).standard_normal((2000, 400))
    losses[:, 100:] -= 1.0
    delay = alarms(losses) - 99
    assert np.isfinite(delay).all()
    assert 24 < delay.mean() < 28
    assert np.quantile(delay, 0.95) <= 55


def test_a_rise_is_no_breakthrough():
    losses = rng(23).standard_normal((200, 500))
    losses[:, 100:] += 1.0
    assert np.isinf(alarms(losses)).all()
    assert check_breakthrough(losses[0]) is None


def test_after_an_alarm_there_is_a_new_reference():
    r = rng(3)
    detector = BreakthroughDetector(warmup=50)
    losses = np.concatenate([10 + r.standard_normal(80), r.standard_normal(400), r.standard_normal(100) - 9])
    found = [i for i, loss in enumerate(losses) if detector.update(loss)]
    assert len(found) == 2
    assert found[0] - 80 < 5
    assert found[1] - 480 < 5


def test_run_length_and_extremes():
    assert BreakthroughDetector().average_run_length > 1e6
    assert BreakthroughDetector(threshold=5.0).average_run_length == pytest.approx(930, rel=0.02)  # Siegmund
    assert check_breakthrough([1.0] * 100 + [0.5]) == 100
    assert check_breakthrough([1.0] * 300) is None
    detector = BreakthroughDetector(warmup=10)
    for bad in (math.nan, math.inf):
        with pytest.raises(NonFiniteError, match="loss"):
            detector.update(bad)
    assert detector.seen == 0
    for settings in ({"warmup": 9}, {"drift": 0.0}, {"threshold": -1.0}):
        with pytest.raises(ConfigError, match=next(iter(settings))):
            BreakthroughDetector(**settings)


def test_events_are_checked_and_immutable():
    event = Event("request", loss=1, metrics={"rouge": 0.8, "entropy_delta": -0.2})
    assert (event.kind, event.loss, event.reward) == ("request", 1.0, None)
    assert event.metrics == {"rouge": 0.8, "entropy_delta": -0.2}
    assert event.id != Event().id
    assert event.timestamp > 0
    with pytest.raises(AttributeError):
        event.loss = 2.0
    for error, settings in [
        (ConfigError, {"kind": ""}),
        (ConfigError, {"loss": math.nan}),
        (ConfigError, {"reward": "good"}),
        (ConfigError, {"metrics": {"rouge": math.inf}}),
        (ConfigError, {"metrics": 3}),
        (ConfigError, {"x": np.ones(3, np.float32)}),
        (ConfigError, {"feedback": ml.Gradient(np.ones(3, np.float32))}),
        (DTypeError, {"x": np.ones(3, np.float32), "feedback": 0.5}),
    ]:
        with pytest.raises(error):
            Event(**settings)


@pytest.mark.parametrize(
    ("rouge", "entropy", "want"),
    [(0.71, -0.11, True), (0.7, -0.2, False), (0.9, -0.1, False), (None, -0.2, False), (0.9, None, False)],
)
def test_the_simple_rule(rouge, entropy, want):
    metrics = {k: v for k, v in (("rouge", rouge), ("entropy_delta", entropy)) if v is not None}
    assert Event(metrics=metrics).check_breakthrough() is want


def test_a_trainer_counts_events_and_finds_breakthroughs():
    trainer = ml.AdapterTrainer(config())
    r = rng(1)
    found = None
    for i in range(200):
        loss = 5 + r.standard_normal() - (4 if i >= 150 else 0)
        outcome = trainer.process_event(Event("request", loss=loss, id=f"e{i}"))
        assert outcome.step is None
        assert outcome.breakthrough is trainer.check_breakthrough()
        if outcome.breakthrough:
            found = i
    assert 150 < found < 160
    trainer.process_event(Event("note"))
    assert not trainer.check_breakthrough()
    stats = trainer.event_stats()
    assert (stats.events, stats.by_kind, stats.trained) == (201, {"request": 200, "note": 1}, 0)
    assert stats.breakthroughs == (f"e{found}",)
    trainer.reset()
    assert trainer.event_stats().events == 0
    with pytest.raises(DTypeError, match="expected a LearningEvent"):
        trainer.process_event({"loss": 1.0})


def test_events_with_feedback_teach():
    lora, same = make(), make()
    trainer = ml.AdapterTrainer(config({"schedule": "constant"}))
    pipeline = ml.TrainingPipeline(trainer.config.training).init_for_lora(same)
    r = rng(2)
    for i in range(16):
        x, target = normal(r, 24), ml.Target(normal(r, 24))
        outcome = trainer.process_event(Event("correction", x=x, feedback=target, quality=0.9), lora)
        step = pipeline.train_step(same, x, target, quality=0.9)
        assert outcome.step.applied is step.applied is (i % 8 == 7)
        assert outcome.loss == step.loss
    assert lora.export_weights() == same.export_weights()
    assert trainer.event_stats().trained == 16
    skipped = trainer.process_event(Event("correction", x=x, feedback=target, quality=0.1), lora)
    assert skipped.step.reason == "quality"
    assert trainer.event_stats().trained == 16
    before = lora.export_weights()
    trainer.process_event(Event("correction", x=x, feedback=target))
    assert lora.export_weights() == before
    with pytest.raises(NonFiniteError):
        trainer.process_event(Event("correction", x=np.full(24, np.nan, np.float32), feedback=target), lora)
    assert trainer.event_stats().events == 18


def test_default_settings_learn_from_events():
    """The default schedule needs a total, which a stream has not: the rate is constant there."""
    lora = learner()
    trainer = ml.AdapterTrainer()
    x = np.ones(N, np.float32)
    for _ in range(4):
        outcome = trainer.process_event(ml.LearningEvent(x=x, feedback=ml.Target(2 * x)), lora)
    assert outcome.step.applied
    assert outcome.step.learning_rate == trainer.config.training.learning_rate
    assert np.abs(lora["m"].lora_b).max() > 0
