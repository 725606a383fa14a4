"""Settings of training: presets, JSON both ways, what is refused; optimisers as settings."""

import math
import pickle
from pathlib import Path

import pytest
from hypothesis import given

import microlora as ml
from microlora.exceptions import ConfigError, FormatError
from microlora.training import SGD, AdamW, LearningRateSchedule, Momentum
from microlora.training.optimizers import as_optimizer
from strategies import run_configs, training_configs

Config, RunConfig = ml.TrainingConfig, ml.AdapterTrainingConfig


@given(training_configs())
def test_training_json_and_back(config):
    assert Config.from_json(config.to_json()) == config
    assert pickle.loads(pickle.dumps(config)) == config
    assert hash(config) == hash(Config.from_dict(config.to_dict()))
    assert config.replace() == config


@given(run_configs())
def test_run_json_and_back(config):
    assert RunConfig.from_json(config.to_json(2)) == config
    assert pickle.loads(pickle.dumps(config)) == config
    assert config.replace(epochs=config.epochs) == config


def test_presets():
    plain = Config()
    assert (plain.batch_size, plain.epochs, plain.learning_rate) == (4, 1, 2e-3)
    assert (plain.quality_threshold, plain.max_grad_norm, plain.optimizer) == (0.5, 1.0, AdamW())
    assert (Config.fast().batch_size, Config.fast().epochs) == (8, 1)
    assert (Config.thorough().batch_size, Config.thorough().epochs) == (4, 3)
    little = Config.incremental()
    assert little.incremental_update
    assert little.learning_rate < plain.learning_rate
    assert little.ewc
    assert Config.fast(seed=3, batch_size=16) == Config(seed=3, batch_size=16)

    run = RunConfig()
    assert (run.epochs, run.validation_interval, run.early_stopping_patience) == (3, None, 3)
    assert run.min_improvement == 1e-4
    quick = RunConfig.quick()
    assert (quick.epochs, quick.training.learning_rate, quick.early_stopping_patience) == (1, 0.005, 1)
    assert quick.training.schedule.name == "constant"
    stable = RunConfig.stable()
    assert (stable.epochs, stable.training.learning_rate, stable.early_stopping_patience) == (5, 0.0005, 5)
    assert (stable.training.max_grad_norm, stable.training.weight_decay) == (0.5, 0.02)
    assert stable.training.ewc_lambda == 250.0
    assert RunConfig.stable(epochs=2).epochs == 2
    assert RunConfig.stable().validation_interval is None


def test_presets_take_training_fields_by_name():
    made = RunConfig.stable(batch_size=16, ewc_lambda=0, save_best=False)
    assert (made.training.batch_size, made.training.ewc_lambda, made.save_best) == (16, 0.0, False)
    assert made.training == RunConfig.stable().training.replace(batch_size=16, ewc_lambda=0.0)
    quick = RunConfig.quick(training=Config(seed=3), batch_size=2)
    assert quick.training == Config(seed=3, batch_size=2)
    with pytest.raises(ConfigError, match=r"unknown key 'batch_sise'.*did you mean 'batch_size'"):
        RunConfig.quick(batch_sise=2)
    with pytest.raises(ConfigError, match="training: got 3"):
        RunConfig.quick(training=3)


def test_epochs_of_the_training_settings_are_followed():
    assert RunConfig(training=Config.thorough()).epochs == 3
    assert RunConfig(training=Config(epochs=10)).epochs == 10
    assert RunConfig(training=Config(epochs=10), epochs=2).epochs == 2
    assert RunConfig(training=Config()).epochs == 3
    assert RunConfig.stable(training=Config(epochs=10)).epochs == 10
    assert RunConfig.stable(training=Config(epochs=10), epochs=4).epochs == 4
    assert RunConfig.from_json(RunConfig(training=Config(epochs=10), epochs=3).to_json()).epochs == 3


@pytest.mark.parametrize("name", ["cosine", "linear", "one_cycle", "step"])
def test_a_stream_has_a_rate_without_an_end(name):
    config = Config(schedule=name)
    assert config.for_stream().bound_schedule(None).lrs([0, 10**6]).tolist() == [2e-3, 2e-3]
    assert config.replace(max_steps=9).for_stream() == config.replace(max_steps=9)
    assert Config(epoch_decay=0.5).for_stream() == Config()
    warm = Config(schedule="cosine", warmup=2).for_stream()
    assert warm.bound_schedule(None).lrs([0, 1, 2]).tolist() == [1e-3, 2e-3, 2e-3]


def test_the_optimizer_of_a_config():
    config = Config(optimizer="momentum", weight_decay=0.1)
    assert config.optimizer == Momentum()
    assert config.optimizer_kwargs() == {"momentum": 0.9, "weight_decay": 0.1, "lora_plus_ratio": 1.0}
    assert Config(optimizer=SGD(weight_decay=0.3)).optimizer_kwargs()["weight_decay"] == 0.3
    assert Config(optimizer={"kind": "adamw", "betas": [0.5, 0.6]}).optimizer == AdamW(betas=(0.5, 0.6))
    assert as_optimizer("sgd") == SGD()


def test_the_schedule_of_a_config():
    config = Config(learning_rate=0.1, schedule="cosine", warmup=2, max_steps=10)
    bound = config.bound_schedule(None)
    assert (bound.base_lr, bound.total, bound.warmup) == (0.1, 10, 2)
    assert config.bound_schedule(7).total == 7
    assert config.bound_schedule(70).total == 10
    decayed = Config(epoch_decay=0.95).bound_schedule(30, epoch_steps=10)
    assert decayed.lrs([9, 10, 20]).tolist() == pytest.approx([2e-3, 2e-3 * 0.95, 2e-3 * 0.95**2])
    own = Config(schedule=LearningRateSchedule("linear", total=50, min_lr=1e-5))
    assert own.bound_schedule(7).total == 50
    with pytest.raises(ConfigError, match=r"schedule\.total"):
        Config(schedule="cosine").bound_schedule(None)
    with pytest.raises(ConfigError, match=r"schedule\.warmup: got 9"):
        Config(schedule="cosine", warmup=9).bound_schedule(9)


def test_mixed_precision_and_paths_are_read():
    assert RunConfig(mixed_precision=True).mixed_precision == "bf16"
    assert RunConfig(mixed_precision=False).mixed_precision is None
    assert RunConfig(output_dir=Path("a") / "b").output_dir == str(Path("a") / "b")
    assert RunConfig(training={"batch_size": 9}).training.batch_size == 9


BAD = [
    ({"batch_size": 0}, "batch_size: got 0"),
    ({"batch_size": True}, "batch_size: got True"),
    ({"batch_size": 2.0}, r"batch_size: got 2\.0"),
    ({"epochs": 0}, "epochs: got 0"),
    ({"max_steps": 0}, "max_steps: got 0"),
    ({"learning_rate": 0.0}, r"learning_rate: got 0\.0"),
    ({"learning_rate": math.nan}, "learning_rate: got nan"),
    ({"schedule": "cosin"}, r"schedule\.name: got 'cosin'.*'cosine'"),
    ({"schedule": 3}, "schedule: got 3"),
    ({"schedule": LearningRateSchedule(base_lr=0.1)}, r"schedule\.base_lr.*learning_rate is it"),
    ({"schedule": LearningRateSchedule("linear", warmup=1)}, r"schedule\.warmup.*warmup is it"),
    ({"schedule": LearningRateSchedule(epoch_decay=0.5)}, r"schedule\.epoch_decay.*epoch_decay is it"),
    ({"schedule": LearningRateSchedule("linear", min_lr=1.0)}, r"schedule\.min_lr: got 1\.0"),
    ({"warmup": 3}, r"schedule\.warmup.*warmup_constant"),
    ({"schedule": "warmup_constant"}, r"schedule\.warmup: got 0"),
    ({"epoch_decay": 1.5}, r"epoch_decay: got 1\.5"),
    ({"optimizer": "adam"}, "optimizer: got 'adam'.*did you mean 'adamw'"),
    ({"optimizer": {"kind": "sgd", "beta": 1}}, "optimizer: unknown key 'beta'"),
    ({"optimizer": 3}, "optimizer: got 3"),
    ({"weight_decay": -0.1}, r"weight_decay: got -0\.1"),
    ({"gradient_accumulation": 0}, "gradient_accumulation: got 0"),
    ({"max_grad_norm": 0.0}, r"max_grad_norm: got 0\.0"),
    ({"quality_threshold": 1.0}, r"quality_threshold: got 1\.0"),
    ({"ewc_lambda": -1.0}, r"ewc_lambda: got -1\.0"),
    ({"ewc_lambda": math.inf}, "ewc_lambda: got inf"),
    ({"ewc_every": 0}, "ewc_every: got 0"),
    ({"ewc_kind": "ewc"}, "ewc_kind: got 'ewc'"),
    ({"online_ewc_gamma": 1.1}, r"online_ewc_gamma: got 1\.1"),
    ({"fisher": "exac"}, "fisher: got 'exac'.*'exact'"),
    ({"fisher_samples": 0}, "fisher_samples: got 0"),
    ({"incremental_update": 1}, "incremental_update: got 1"),
    ({"seed": -1}, "seed: got -1"),
]


@pytest.mark.parametrize(("settings", "message"), BAD)
def test_bad_training_values(settings, message):
    with pytest.raises(ConfigError, match=message):
        Config(**settings)
    with pytest.raises(ConfigError, match=message):
        Config().replace(**settings)


BAD_RUN = [
    ({"training": 3}, "training: got 3"),
    ({"epochs": 0}, "epochs: got 0"),
    ({"validation_interval": 0}, "validation_interval: got 0"),
    ({"early_stopping_patience": -1}, "early_stopping_patience: got -1"),
    ({"min_improvement": 1.0}, r"min_improvement: got 1\.0"),
    ({"gradient_checkpointing": None}, "gradient_checkpointing: got None"),
    ({"mixed_precision": "f8"}, "mixed_precision: got 'f8'"),
    ({"mixed_precision": 16}, "mixed_precision: got 16"),
    ({"save_best": 0}, "save_best: got 0"),
    ({"output_dir": ""}, "output_dir: got ''"),
    ({"output_dir": 3}, "output_dir: got 3"),
    ({"checkpoint_every": 5}, "checkpoint_every: got 5, expected an output_dir"),
    ({"checkpoint_every": 0, "output_dir": "x"}, "checkpoint_every: got 0"),
]


@pytest.mark.parametrize(("settings", "message"), BAD_RUN)
def test_bad_run_values(settings, message):
    with pytest.raises(ConfigError, match=message):
        RunConfig(**settings)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: AdamW(betas=(0.9,)), r"optimizer\.betas"),
        (lambda: AdamW(betas=(0.9, 1.0)), r"optimizer\.betas\[1\]: got 1\.0"),
        (lambda: AdamW(eps=0.0), r"optimizer\.eps"),
        (lambda: Momentum(momentum=1.0), r"optimizer\.momentum"),
        (lambda: SGD(weight_decay=-1.0), r"optimizer\.weight_decay"),
        (lambda: SGD(lora_plus_ratio=0.0), r"optimizer\.lora_plus_ratio"),
    ],
)
def test_bad_optimizer_values(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


@pytest.mark.parametrize("cls", [Config, RunConfig])
def test_documents_that_are_refused(cls):
    with pytest.raises(ConfigError, match=r"unknown key 'epoch'.*did you mean 'epochs'"):
        cls.from_json('{"epoch": 3}')
    with pytest.raises(ConfigError, match="unknown key 'lr'"):
        cls().replace(lr=3)
    with pytest.raises(FormatError, match="newer than 1"):
        cls.from_json('{"schema_version": 2}')
    with pytest.raises(FormatError, match="not valid JSON"):
        cls.from_json('{"epochs": NaN}')
    assert cls.from_json("{}") == cls()
