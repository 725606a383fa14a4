"""The trainer and the pipeline on datasets of the data room."""

import numpy as np
import pytest

import microlora as ml
from microlora import data
from microlora.exceptions import ConfigError, LeakageError
from runs import N, chain, classes, config, learner, problem
from support import close, make, normal, rng

Trainer = ml.AdapterTrainer


def dataset(n=96, held=32, **options):
    (x, y), (hx, hy) = problem(n, held)
    made = data.AdapterDataset.from_arrays(x, y, **options)
    return made.with_validation(data.AdapterDataset.from_arrays(hx, hy))


def test_a_dataset_is_its_arrays_and_its_order():
    made, (x, y) = dataset(), problem()
    lora, same = learner(), learner()
    a = Trainer(config({"seed": 3})).train(lora, made)
    b = Trainer(config({"seed": 3})).train(same, x, y)
    assert lora.export_weights() == same.export_weights()
    assert a.best_val_loss == b.best_val_loss
    assert [v.step for v in a.history.validations] == [12, 24, 36]


def test_a_validation_set_that_is_given_wins():
    made = dataset()
    other = data.AdapterDataset.from_arrays(*problem(seed=9)[1])
    result = Trainer(config()).train(learner(), made, other)
    assert result.best_val_loss != Trainer(config()).train(learner(), made).best_val_loss


def test_quality_and_weights_of_rows():
    (x, y), _ = problem()
    q = np.linspace(0.0, 1.0, len(x))
    lora, same = learner(), learner()
    plain = config({"quality_threshold": 0.5})
    result = Trainer(plain).train(lora, data.AdapterDataset.from_arrays(x, y, quality=q, weights=2.0))
    assert result.history.epochs[0].samples == (q > 0.5).sum()
    samples = [
        data.TrainingSample(a, b, quality=k, weight=2.0, id=str(i))
        for i, (a, b, k) in enumerate(zip(x, y, q, strict=True))
    ]
    Trainer(plain).train(same, data.AdapterDataset(samples))
    close(same["m"].lora_b, lora["m"].lora_b, rtol=1e-5)


def test_feedback_and_modules_of_samples():
    r = rng(4)
    lora = make(N, N, 4, names=("q", "v"), learned=False)
    samples = [
        data.TrainingSample(
            normal(r, N), feedback=ml.Preference(normal(r, N), normal(r, N)), module="v", id=f"s{i}"
        )
        for i in range(20)
    ]
    lora.instant(normal(r, N), ml.Target(normal(r, N)), "v")
    before = {m: lora[m].lora_b.copy() for m in ("q", "v")}
    Trainer(config()).train(lora, data.AdapterDataset(samples))
    assert (lora["q"].lora_b == before["q"]).all()
    assert (lora["v"].lora_b != before["v"]).any()


def test_labels_train_a_chain():
    (x, y), (hx, hy) = classes(n=512)
    made = data.AdapterDataset.from_arrays(x, y).with_validation(data.AdapterDataset.from_arrays(hx, hy))
    net = chain()
    before = net.loss(hx, hy)
    assert Trainer(config(epochs=6)).train(net, made).best_val_loss < before


def test_a_mapped_dataset_trains_the_same(tmp_path):
    made = dataset()
    made.save(tmp_path / "d")
    lora, same = learner(), learner()
    Trainer(config()).train(lora, made)
    Trainer(config()).train(same, data.AdapterDataset.load(tmp_path / "d", mmap=True))
    assert lora.export_weights() == same.export_weights()


def test_a_synthetic_task_is_learned_to_its_optimum():
    made = data.SyntheticDataGenerator(32, seed=1).generate("coder", 600)
    lora = ml.create_lora("coder", 32)
    result = Trainer(config({"learning_rate": 0.02, "batch_size": 16}, epochs=25)).train(
        lora, made, modules=["q_proj"]
    )
    floor = made.optimum.best_loss
    assert floor < result.best_val_loss < 1.5 * floor


def test_the_pipeline_takes_samples():
    made = dataset(n=16)
    lora, same = learner(), learner()
    settings = config({"schedule": "constant"}).training
    a = ml.TrainingPipeline(settings).init_for_lora(lora).train_batch(lora, made)
    b = ml.TrainingPipeline(settings).init_for_lora(same).train_batch(same, *problem(n=16)[0])
    assert a == b
    assert lora.export_weights() == same.export_weights()


def test_texts_are_refused_with_what_to_do():
    texts = data.AdapterDataset([data.TrainingSample(query="a", response="b", id="t")])
    with pytest.raises(ConfigError, match="encoded"):
        Trainer(config()).train(learner(), texts)


def test_leaks_are_refused():
    """The same text under another name, and a variation of a training sample."""
    r = rng(0)

    def sample(name, **options):
        return data.TrainingSample(normal(r, N), normal(r, N), id=name, **options)

    train = data.AdapterDataset([sample("a", query="how?", response="so"), sample("b")])
    for leak in (sample("c", query="how?", response="so"), sample("d", parent_id="b"), sample("b")):
        with pytest.raises(LeakageError):
            Trainer(config()).train(learner(), train, data.AdapterDataset([leak]))
