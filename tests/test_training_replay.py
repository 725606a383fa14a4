"""The trainer's memory of earlier tasks: when it takes rows, that runs resume with it, and what it is for."""

import logging

import numpy as np
import pytest

import microlora as ml
from microlora import training
from microlora.exceptions import CancelledError, ConfigError, FormatError
from microlora.training import checkpoint
from microlora.training.checkpoint import FILE_NAME
from runs import Sample, chain, classes, comparable, config, learner, problem
from support import make, state_of

Trainer, Replay = ml.AdapterTrainer, ml.ReplayConfig


def run(training=None, replay=None, **more):
    """Settings with replay, and without EWC unless a lambda is named."""
    how = {"ewc_lambda": None, "optimizer": "adamw", **(training or {})}
    return config(how, replay=Replay(capacity=20) if replay is None else replay, **more)


def target_of(kind):
    return learner() if kind == "learner" else chain()


def data_of(kind, seed):
    return (problem(seed=seed) if kind == "learner" else classes(seed=seed))[0]


def weights_of(target):
    if isinstance(target, ml.MicroLoRA):
        return target.export_weights()
    return [w.tobytes() for pair in target.factors().values() for w in pair]


@pytest.mark.parametrize("kind", ["learner", "chain"])
def test_rows_are_kept_when_a_task_ends(kind):
    target, trainer = target_of(kind), Trainer(run())
    assert trainer.replay is None
    (x, y), (later, _) = data_of(kind, 1), data_of(kind, 2)
    trainer.train(target, (x, y))
    kept = trainer.replay
    assert isinstance(kept, training.ReplayMemory)
    assert (len(kept), kept.seen, kept.capacity) == (20, len(x), 20)
    np.testing.assert_array_equal(kept.x, x[kept.places])
    np.testing.assert_array_equal(kept.y, y[kept.places])
    answers = target.forward(kept.x, "m") if kind == "learner" else target.forward(kept.x)
    np.testing.assert_allclose(kept.outputs, answers, atol=1e-5)
    trainer.train(target, (later, y))
    assert trainer.replay.seen == 2 * len(x)
    assert 0 < (trainer.replay.places < len(x)).sum() < 20
    trainer.reset()
    assert trainer.replay is None


def test_the_same_data_again_are_kept_once():
    target, trainer = learner(), Trainer(run())
    first, second = problem(seed=1)[0], problem(seed=2)[0]
    for data in (first, first, second, second):
        trainer.train(target, data)
    assert trainer.replay.seen == 2 * 96
    trainer.train(target, first)
    assert trainer.replay.seen == 3 * 96


def test_another_learner_has_a_memory_of_its_own():
    trainer = Trainer(run())
    trainer.train(learner(), problem(seed=1)[0])
    trainer.train(learner(), problem(seed=2)[0])
    assert trainer.replay.seen == 96


def test_a_cancelled_run_leaves_no_rows_behind():
    lora, trainer, token = learner(), Trainer(run()), ml.CancelToken()
    with pytest.raises(CancelledError):
        trainer.train(lora, problem(seed=1)[0], cancel=token, callbacks=[lambda _: token.cancel()])
    assert len(trainer.replay) == 0


@pytest.mark.parametrize("kind", ["learner", "chain"])
@pytest.mark.parametrize("weak", [{"capacity": 0}, {"logit_weight": 0, "label_weight": 0}])
def test_replay_without_a_say_is_no_replay(kind, weak):
    found = []
    for replay in (None, Replay(**weak)):
        target, trainer = target_of(kind), Trainer(config({"ewc_lambda": 2.0}).replace(replay=replay))
        results = [comparable(trainer.train(target, data_of(kind, seed))) for seed in (1, 2)]
        assert trainer.replay is None
        found.append((weights_of(target), results))
    assert found[0] == found[1]


@pytest.mark.parametrize("kind", ["learner", "chain"])
def test_an_earlier_task_is_held(kind):
    first = data_of(kind, 1)
    losses = {}
    for name, replay in (("none", Replay(capacity=0)), ("labels", Replay(40, 0.0)), ("dark", Replay(40))):
        target = target_of(kind)
        trainer = Trainer(run({"ewc_lambda": 0.0, "schedule": "constant"}, replay, epochs=12))
        for seed in (1, 2):
            trainer.train(target, data_of(kind, seed))
        losses[name] = float(training.evaluate(target, *first).mean())
    assert losses["labels"] < 0.8 * losses["none"]
    assert losses["dark"] < 0.8 * losses["none"]
    assert losses["dark"] != losses["labels"]


def test_ewc_is_off_unless_it_is_asked_for():
    for given, on in ((None, False), (0.0, False), (3.0, True)):
        trainer = Trainer(run({"ewc_lambda": given}))
        trainer.train(learner(), problem()[0])
        assert (trainer.ewc is not None) == on
    assert Trainer(config({"ewc_lambda": None})).config.learning.ewc
    lora = learner()
    ewc = ml.EwcPlusPlus(lora, 3.0)
    trainer = Trainer(run(), ewc=ewc)
    trainer.train(lora, problem(seed=1)[0])
    assert trainer.ewc is ewc
    assert trainer.train(lora, problem(seed=2)[0]).task == 1
    assert trainer.replay.seen == 2 * 96


def test_rows_below_the_threshold_are_not_kept_and_weights_are():
    x, y = problem()[0]
    weights = np.linspace(0.1, 2.0, len(x)).astype(np.float32)
    trainer = Trainer(run())
    trainer.train(learner(), (x, y, weights))
    np.testing.assert_array_equal(trainer.replay.weights, weights[trainer.replay.places])
    samples = [
        ml.TrainingSample(
            id=str(i), input_embedding=x[i], output_embedding=y[i], quality=0.1 if i % 2 else 1.0
        )
        for i in range(len(x))
    ]
    trainer = Trainer(run(replay=Replay(capacity=96)))
    trainer.train(learner(), ml.AdapterDataset(samples))
    assert sorted(map(bytes, trainer.replay.x)) == sorted(map(bytes, x[::2]))


@pytest.mark.parametrize("kind", ["learner", "chain"])
@pytest.mark.parametrize("ewc", [None, 2.0])
@pytest.mark.parametrize("cut", [3, 17])
def test_a_resumed_run_is_the_whole_run(kind, ewc, cut, tmp_path, monkeypatch):
    """The second of two tasks is cut short; a trainer that knows neither goes on from its checkpoint."""
    monkeypatch.setattr(checkpoint.os, "fsync", lambda _: None)
    settings = run({"ewc_lambda": ewc}, checkpoint_every=1, output_dir=str(tmp_path))
    plain = settings.replace(checkpoint_every=None, output_dir=None)
    first, second, third = (data_of(kind, seed) for seed in (1, 2, 3))
    whole, other, later = (target_of(kind) for _ in range(3))
    trainer = Trainer(plain)
    trainer.train(whole, first)
    want = trainer.train(whole, second)

    one, token = Trainer(settings), ml.CancelToken()
    one.train(other, first)

    class Stop:
        def on_step(self, event):
            if event.step >= cut:
                token.cancel()

    with pytest.raises(CancelledError):
        one.train(other, second, cancel=token, callbacks=Stop())
    two = Trainer(settings)
    got = two.train(later, second, resume=True)
    assert comparable(got) == comparable(want)
    assert weights_of(later) == weights_of(whole)
    assert two.replay.to_bytes() == trainer.replay.to_bytes()
    two.train(later, third)
    trainer.train(whole, third)
    assert weights_of(later) == weights_of(whole)


def test_checkpoints_with_and_without_replay_are_told_apart(tmp_path):
    data, lora = problem()[0], learner()
    folders = {name: tmp_path / name for name in ("with", "without")}
    how = {
        name: run({"ewc_lambda": 0.0}, checkpoint_every=5, output_dir=str(folder))
        for name, folder in folders.items()
    }
    how["without"] = how["without"].replace(replay=None)
    for name, settings in how.items():
        Trainer(settings).train(learner(), data)
        state = checkpoint.read(folders[name] / FILE_NAME)
        assert ("replay" in state.parts) == (name == "with")
        assert ("replay" in state.state["config"]) == (name == "with")
    before = state_of(lora)
    with pytest.raises(ConfigError, match="replay"):
        Trainer(how["with"]).train(lora, data, resume=folders["without"])
    with pytest.raises(ConfigError, match="replay"):
        Trainer(how["without"]).train(lora, data, resume=folders["with"])
    path = folders["with"] / FILE_NAME
    found = checkpoint.read(path)
    checkpoint.write(path, checkpoint.Checkpoint(found.state, {**found.parts, "replay": b"nothing"}))
    with pytest.raises(FormatError, match="replay"):
        Trainer(how["with"]).train(lora, data, resume=True)
    parts = {k: v for k, v in found.parts.items() if k != "replay"}
    checkpoint.write(path, checkpoint.Checkpoint(found.state, parts))
    with pytest.raises(FormatError, match="without the part replay"):
        Trainer(how["with"]).train(lora, data, resume=True)
    assert state_of(lora) == before


def test_a_resume_that_fails_leaves_the_memory(tmp_path):
    settings = run(checkpoint_every=5, output_dir=str(tmp_path))
    lora, trainer = learner(), Trainer(settings)
    first, second = problem(seed=1)[0], problem(seed=2)[0]
    trainer.train(lora, first)
    path = tmp_path / FILE_NAME
    found = checkpoint.read(path)
    checkpoint.write(path, checkpoint.Checkpoint(found.state, {**found.parts, "snapshot": b"nothing"}))
    kept = trainer.replay.to_bytes()
    with pytest.raises(FormatError):
        trainer.train(lora, first, resume=True)
    assert trainer.replay.to_bytes() == kept
    trainer._written.add(path)
    trainer.train(lora, second)
    assert trainer.replay.seen == 2 * 96


def test_what_cannot_be_replayed_is_refused_before_anything_happens():
    x, y = problem()[0]
    samples = [Sample(row, ml.Target(t), str(i)) for i, (row, t) in enumerate(zip(x, y, strict=True))]
    lora = learner()
    before = state_of(lora)
    trainer = Trainer(run())
    with pytest.raises(ConfigError, match="replay: got one with samples"):
        trainer.train(lora, samples)
    with pytest.raises(ConfigError, match="replay: got one with samples"):
        trainer.train(learner(dropout=0.2), (x, y))
    assert state_of(lora) == before
    two = make(16, 16, 4, names=("q", "v"))
    trainer.train(two, (x, y), modules="q")
    before, kept = state_of(two), trainer.replay.to_bytes()
    with pytest.raises(ConfigError, match=r"replay: got rows of 16 .* for q, v, expected .* for q, as are"):
        trainer.train(two, problem(seed=2)[0])
    assert (state_of(two), trainer.replay.to_bytes()) == (before, kept)
    # The same task may go on otherwise: nothing is remembered of the ones before.
    trainer.train(two, (x, y))
    assert trainer.replay.outputs.shape == (20, 32)


def test_a_stored_row_that_overflows_ends_the_run_as_diverged(caplog):
    x, y = problem(seed=1)[0]
    trainer = Trainer(run({"ewc_lambda": 0.0, "learning_rate": 1e-30}, epochs=1))
    lora = make(16, 16, 4, names=("m",))
    lora_before = state_of(lora)
    trainer.train(lora, (np.full_like(x, 1e10), np.zeros_like(y)))
    trainer._replay = training.ReplayMemory(capacity=4, label_weight=1.0, logit_weight=1.0, seed=0)
    trainer._replay.offer(lora, np.full((4, 16), 1e19, np.float32), np.zeros((4, 16), np.float32))
    with caplog.at_level(logging.WARNING):
        result = trainer.train(lora, (x, y))
    assert result.stop_reason == "diverged"
    assert "stored row" in caplog.text
    assert lora_before is not None


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"capacity": -1}, "capacity: got -1"),
        ({"capacity": 2.0}, r"capacity: got 2\.0"),
        ({"capacity": True}, "capacity: got True"),
        ({"logit_weight": -0.5}, r"logit_weight: got -0\.5"),
        ({"logit_weight": float("nan")}, "logit_weight: got nan"),
        ({"label_weight": 2e6}, r"label_weight: got 2000000\.0"),
        ({"label_weight": "1"}, "label_weight: got '1'"),
        ({"seed": -1}, "seed: got -1"),
    ],
)
def test_bad_settings(fields, message):
    with pytest.raises(ConfigError, match=message):
        Replay(**fields)


def test_settings():
    assert Replay() == Replay(capacity=200, logit_weight=0.5, label_weight=1.0, seed=0)
    assert Replay.from_json(Replay(seed=3).to_json()) == Replay(seed=3)
    assert ml.AdapterTrainingConfig(replay={"capacity": 3}).replay == Replay(3)
    with pytest.raises(ConfigError, match="replay: got 200"):
        ml.AdapterTrainingConfig(replay=200)
    assert ml.AdapterTrainingConfig().replay is None
    quick = ml.AdapterTrainingConfig.quick(replay=Replay())
    assert quick.replays
    assert not quick.learning.ewc
    assert quick.training.ewc
