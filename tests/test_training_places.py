"""Whose checkpoint it is: other learners and networks are refused, and no other run's is written over."""

import pytest

import microlora as ml
from microlora.exceptions import ConfigError
from microlora.training.checkpoint import FILE_NAME
from runs import N, chain, classes, config, learner, problem
from support import make, state_of
from test_training_checkpoint import run_to_checkpoint

Trainer = ml.AdapterTrainer


def test_a_checkpoint_of_another_learner_is_refused(tmp_path):
    made, data, held = run_to_checkpoint(tmp_path)
    other = make(N, N, 2, learned=False)
    before = state_of(other)
    with pytest.raises(ConfigError, match=rf"resume: .*{FILE_NAME} is of a learner m 16 -> 16 rank 4"):
        Trainer(made).train(other, data, held, resume=True)
    assert state_of(other) == before


def test_a_checkpoint_of_another_network_is_refused(tmp_path):
    """The frozen layers have a digest, which a chain says where it has one."""
    data, held = classes()
    settings = config(checkpoint_every=5, output_dir=str(tmp_path))
    net, other = chain(), chain(seed=9)
    Trainer(settings).train(net, data, held)
    with pytest.raises(ConfigError, match="is of a chain with a network"):
        Trainer(settings).train(other, data, held, resume=True)
    with pytest.raises(ConfigError, match="is of a chain with a network"):
        Trainer(settings).train(chain(activation="tanh"), data, held, resume=True)


def test_a_run_writes_over_no_other(tmp_path):
    made, data, held = run_to_checkpoint(tmp_path)
    whole = (tmp_path / FILE_NAME).read_bytes()
    lora = learner()
    before = state_of(lora)
    with pytest.raises(
        ConfigError, match=rf"output_dir: .*{FILE_NAME} .*resume=True .*or another output_dir"
    ):
        Trainer(made).train(lora, data, held)
    assert state_of(lora) == before
    assert (tmp_path / FILE_NAME).read_bytes() == whole
    elsewhere = made.replace(output_dir=str(tmp_path / "other"))
    trainer = Trainer(elsewhere)
    trainer.train(lora, data, held)
    trainer.train(lora, data, held)  # its own it may
    with pytest.raises(ConfigError, match="output_dir"):
        Trainer(elsewhere).train(lora, data, held, resume=tmp_path)
    Trainer(made.replace(checkpoint_every=None)).train(learner(), data, held)
    assert (tmp_path / FILE_NAME).read_bytes() == whole


def test_a_folder_stands_for_the_checkpoint_in_it(tmp_path):
    made, data, held = run_to_checkpoint(tmp_path)
    a, b = learner(), learner()
    Trainer(made.replace(output_dir=None, checkpoint_every=None)).train(a, data, held, resume=tmp_path)
    Trainer(made).train(b, data, held, resume=str(tmp_path))
    assert a.export_weights() == b.export_weights()
    with pytest.raises(OSError, match=FILE_NAME):
        Trainer(made).train(learner(), data, held, resume=tmp_path.parent)


def test_resuming_from_nothing_that_is_ever_written_is_refused(tmp_path):
    data, held = problem()
    settings = config(output_dir=str(tmp_path))
    with pytest.raises(ConfigError, match=r"resume: got True, but .* checkpoint_every=None never writes it"):
        Trainer(settings).train(learner(), data, held, resume=True)
    Trainer(settings.replace(checkpoint_every=5)).train(learner(), data, held, resume=True)
