"""Trainer and pipeline with the compiled penalties: earlier tasks are kept, and a run can be cut in two."""

import numpy as np
import pytest

import microlora as ml
from microlora.exceptions import CancelledError, ConfigError, FormatError, ShapeError
from microlora.training import engine
from microlora.training.checkpoint import FILE_NAME
from runs import N, Sample, chain, classes, comparable, config, learner
from support import make, normal, rng

Trainer = ml.AdapterTrainer

KINDS = ("delta", "factor", "l2", "si", "mas")


def tasks(seed=3, n=256):
    """Two linear maps of one rank; the inputs of each live in another half of the features."""
    r = rng(seed)
    out = []
    for half in range(2):
        x = 0.05 * normal(r, n, N)
        x[:, half * N // 2 : (half + 1) * N // 2] += normal(r, n, N // 2)
        out.append((x, x @ normal(r, N, 2) @ normal(r, 2, N) / N))
    return out


def loss(lora, data):
    return float(ml._core.evaluate(lora, *data).mean(dtype=np.float64))


def settings(kind="delta", strength=None, **more):
    training = {"ewc_lambda": strength, "ewc_kind": kind, "learning_rate": 0.01, "batch_size": 16}
    return config(training, epochs=30, **more)


@pytest.mark.parametrize("kind", KINDS)
def test_the_first_task_is_kept_better_than_without(kind):
    first, second = tasks()
    kept = {}
    for strength in (0.0, None):
        lora = learner()
        trainer = Trainer(settings(kind, strength))
        trainer.train(lora, first)
        assert loss(lora, first) < 0.2 * loss(learner(), first)
        trainer.train(lora, second)
        kept[strength] = loss(lora, first)
        if strength is None:
            assert trainer.ewc.task_count == 1
            assert trainer.ewc.penalty() > 0
    assert kept[None] < 0.7 * kept[0.0]


@pytest.mark.parametrize("kind", KINDS)
def test_a_pipeline_keeps_its_first_task(kind):
    first, second = tasks()
    kept = {}
    for strength in (0.0, None):
        lora = learner()
        training = settings(kind, strength).training.replace(epochs=30, schedule="constant")
        pipeline = ml.TrainingPipeline(training).init_for_lora(lora)
        pipeline.train_batch(lora, *first)
        pipeline.start_new_task(lora)
        pipeline.train_batch(lora, *second)
        kept[strength] = loss(lora, first)
    assert kept[None] < 0.7 * kept[0.0]


def test_a_chain_keeps_its_first_task():
    (x, y), _ = classes(n=512)
    r = rng(1)
    turned = x @ np.linalg.qr(normal(r, N, N))[0].astype(np.float32)
    kept = {}
    for strength in (0.0, None):
        net = chain()
        trainer = Trainer(settings(strength=strength).replace(epochs=8))
        trainer.train(net, (x, y))
        trainer.train(net, (turned, y))
        kept[strength] = net.loss(x, y)
    assert kept[None] < 0.8 * kept[0.0]


@pytest.mark.parametrize("strength", [0.0, None])
def test_a_first_task_knows_no_penalty(strength):
    lora, plain = learner(), learner()
    Trainer(settings(strength=strength)).train(lora, tasks()[0])
    Trainer(settings(strength=0.0)).train(plain, tasks()[0])
    assert lora.export_weights() == plain.export_weights()


@pytest.mark.parametrize("kind", KINDS)
def test_a_second_task_that_was_cut_goes_on_bit_for_bit(kind, tmp_path):
    first, second = tasks()
    how = settings(kind).replace(epochs=2, checkpoint_every=5, output_dir=str(tmp_path))
    whole, token = learner(), ml.CancelToken()
    trainer = Trainer(how.replace(checkpoint_every=None))
    trainer.train(whole, first)
    want = trainer.train(whole, second)
    final = trainer.ewc.export_state()

    class Stop:
        def on_step(self, event):
            if event.step >= 17:
                token.cancel()

    cut = learner()
    trainer = Trainer(how)
    trainer.train(cut, first)
    with pytest.raises(CancelledError):
        trainer.train(cut, second, cancel=token, callbacks=Stop())
    fresh, later = learner(), Trainer(how)
    assert comparable(later.train(fresh, second, resume=True)) == comparable(want)
    assert fresh.export_weights() == whole.export_weights()
    assert later.ewc.export_state() == final


def test_importance_does_not_grow_with_repeated_runs():
    first, _ = tasks()
    lora, trainer = learner(), Trainer(settings("factor"))
    trainer.train(lora, first)
    samples = trainer.ewc.n_samples
    trainer.train(lora, first)
    assert trainer.ewc.n_samples == samples == 256
    assert trainer.ewc.task_count == 0


def checkpointed(tmp_path, **penalty):
    """A second task that was cut short, with a penalty that was given: settings and data."""
    first, second = tasks()
    how = settings("factor").replace(epochs=2, checkpoint_every=5, output_dir=str(tmp_path))
    lora, token = learner(), ml.CancelToken()
    trainer = Trainer(how, ewc=ml.EwcPlusPlus(lora, **{**how.training.ewc_kwargs(), **penalty}))
    trainer.train(lora, first)

    class Stop:
        def on_step(self, event):
            if event.step >= 17:
                token.cancel()

    with pytest.raises(CancelledError):
        trainer.train(lora, second, cancel=token, callbacks=Stop())
    return how, second


@pytest.mark.parametrize(
    ("field", "theirs", "ours"),
    [
        ("ewc_lambda", 10.0, 7.0),
        ("gamma", 1.0, 0.5),
        ("fisher", "auto", "empirical"),
    ],
)
def test_a_checkpoint_is_refused_under_another_penalty(field, theirs, ours, tmp_path):
    how, second = checkpointed(tmp_path, ewc_lambda=10.0)
    lora = learner()
    other = ml.EwcPlusPlus(lora, **{**how.training.ewc_kwargs(), "ewc_lambda": 10.0, field: ours})
    weights, state = lora.export_weights(), other.export_state()
    with pytest.raises(ConfigError, match=rf"ewc\.{field}: got {ours!r}, expected {theirs!r}"):
        Trainer(how, ewc=other).train(lora, second, resume=True)
    assert lora.export_weights() == weights
    assert other.export_state() == state
    same = ml.EwcPlusPlus(lora, **{**how.training.ewc_kwargs(), "ewc_lambda": 10.0})
    assert Trainer(how, ewc=same).train(lora, second, resume=True).task == 1


def test_a_resume_that_fails_forgets_nothing(tmp_path):
    """The checkpoint is of another rank: task, importance and moments of the earlier run stay."""
    first, second = tasks()
    how = settings("factor").replace(epochs=2, checkpoint_every=5, output_dir=str(tmp_path))
    how = how.replace(training=how.training.replace(incremental_update=True))
    other = how.replace(output_dir=str(tmp_path / "other"))
    Trainer(other).train(make(N, N, 2, learned=False), second)
    refused = {}
    for fails in (False, True):
        lora, trainer = learner(), Trainer(how.replace(output_dir=str(tmp_path / str(fails))))
        trainer.train(lora, first)
        importance = trainer.ewc.export_state()
        if fails:
            with pytest.raises((ConfigError, ShapeError, FormatError)):
                trainer.train(lora, second, resume=tmp_path / "other" / FILE_NAME)
            assert trainer.ewc.export_state() == importance
        assert trainer.train(lora, second).task == 1
        refused[fails] = lora.export_weights()
    assert refused[True] == refused[False]


def test_a_run_that_cannot_begin_leaves_the_trainer_as_it_was(monkeypatch):
    first, second = tasks()

    def refuse(*_):
        raise ConfigError("no optimiser")

    lora, trainer = learner(), Trainer(settings(strength=10.0).replace(epochs=2))
    trainer.train(lora, first)
    with monkeypatch.context() as patched:
        patched.setattr(engine, "make_optimizer", refuse)
        with pytest.raises(ConfigError, match="no optimiser"):
            trainer.train(learner(), second)
    assert trainer.train(lora, second).task == 1


@pytest.mark.parametrize("kind", KINDS)
def test_events_are_held_by_what_was_trained_before(kind):
    first, second = tasks()
    kept = {}
    for strength in (0.0, None):
        lora = learner()
        how = settings(kind, strength)
        how = how.replace(training=how.training.replace(schedule="constant"))
        trainer = Trainer(how)
        trainer.train(lora, first)
        before = loss(lora, first)
        for _ in range(8):
            for x, y in zip(*second, strict=True):
                trainer.process_event(ml.LearningEvent(x=x, feedback=ml.Target(y)), lora)
        kept[strength] = loss(lora, first) - before
        if strength is None:
            assert trainer.ewc.task_count == 1
            assert trainer.ewc.penalty() > 0
            assert trainer.train(lora, second).task == 1
    assert kept[None] < 0.7 * kept[0.0]


def test_events_after_a_second_run_are_held_by_both():
    first, second = tasks()
    how = settings("factor").replace(epochs=2)
    trainer = Trainer(how.replace(training=how.training.replace(schedule="constant")))
    lora = learner()
    event = ml.LearningEvent(x=first[0][0], feedback=ml.Target(first[1][0]))
    trainer.train(lora, first)
    trainer.process_event(event, lora)
    assert trainer.train(lora, second).task == 1
    trainer.process_event(event, lora)
    assert trainer.ewc.task_count == 2
    other = learner()
    trainer.process_event(event, other)
    trainer.process_event(event, lora)
    assert trainer.ewc.task_count == 2


@pytest.mark.parametrize("path", ["arrays", "samples", "pipeline"])
def test_the_penalty_acts_in_every_nth_step(path, monkeypatch):
    """n reaches the optimiser on every path, and moves the weights elsewhere."""
    first, second = tasks(n=64)
    came = []

    real = ml._core.Optimizer

    class Recorded:
        def __init__(self, *args, **more):
            self.real = real(*args, **more)

        def __getattr__(self, name):
            return getattr(self.real, name)

        def train(self, *args, **more):
            came.append(more["ewc_every"])
            return self.real.train(*args, **more)

        def step(self, *args, **more):
            came.append(more["ewc_every"])
            return self.real.step(*args, **more)

    monkeypatch.setattr(engine._core, "Optimizer", Recorded)
    found = {}
    for n in (1, 3):
        lora, came[:] = learner(), []
        how = settings("factor").replace(epochs=2)
        how = how.replace(training=how.training.replace(ewc_every=n, epochs=2, schedule="constant"))
        if path == "pipeline":
            pipeline = ml.TrainingPipeline(how.training).init_for_lora(lora)
            pipeline.train_batch(lora, *first)
            pipeline.start_new_task(lora)
            pipeline.train_batch(lora, *second)
        else:
            trainer = Trainer(how)
            for data in (first, second):
                rows = zip(*data, strict=True)
                listed = [Sample(x, ml.Target(y), str(i)) for i, (x, y) in enumerate(rows)]
                trainer.train(lora, data if path == "arrays" else listed)
        assert set(came) == {n}
        found[n] = lora.export_weights()
    assert found[1] != found[3]
