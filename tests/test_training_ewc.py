"""Trainer and pipeline with the compiled penalties: earlier tasks are kept, and a run can be cut in two."""

import numpy as np
import pytest

import microlora as ml
from microlora.exceptions import CancelledError
from runs import N, chain, classes, comparable, config, learner
from support import normal, rng

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
