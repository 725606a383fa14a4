"""Settings of the loops: defaults, presets, JSON both ways, and every value that is refused."""

import dataclasses
import json
import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

import microlora as ml
from microlora.config import InstantConfig, LoraConfig
from microlora.exceptions import ConfigError, FormatError
from microlora.sona import Consolidation, SonaConfig
from microlora.training import AdapterTrainingConfig, TrainingConfig

# Exactly what rust/src/sona/settings.rs reads, all of it always given.
CORE_KEYS = {
    "background_interval_ms",
    "background_min_samples",
    "deep_trigger_threshold",
    "consolidation",
    "seed",
    "max_pending_samples",
    "quality_threshold",
    "max_ms",
    "reservoir_capacity",
    "reservoir_max_bytes",
    "reservoir_dtype",
    "reservoir_balance",
    "holdout",
    "gate_tolerance",
    "gate_min_samples",
    "ewc_lambda",
    "logit_weight",
    "replay_ratio",
    "consolidation_steps",
    "best_share",
    "ensemble_size",
    "ensemble_temperature",
    "ensemble_hard",
    "patterns",
    "pattern_threshold",
    "warmup_inputs",
}


def test_defaults_are_those_that_are_documented():
    config = SonaConfig()
    assert (config.instant_lr, config.background_interval_ms, config.background_min_samples) == (
        None,
        100.0,
        10,
    )
    assert (config.deep_trigger_threshold, config.consolidation) == (100.0, "ewc_merge")
    assert (config.max_pending_samples, config.quality_threshold, config.max_ms) == (1000, 0.5, 10.0)
    assert (config.reservoir_capacity, config.holdout, config.gate_tolerance) == (512, 0.1, 0.01)
    assert (config.logit_weight, config.replay_ratio, config.warmup_inputs) == (0.5, 1.0, 64)
    assert (config.ewc_lambda, config.canonical_lambda) == (None, 100.0)


def test_the_core_is_given_every_key_and_no_other():
    values = json.loads(SonaConfig.for_hidden_dim(32).core_json())
    assert set(values) == CORE_KEYS
    assert values["ewc_lambda"] == 100.0
    assert values["max_ms"] == 10.0
    assert json.loads(SonaConfig(max_ms=None, ewc_lambda=0).core_json())["max_ms"] is None
    assert json.loads(SonaConfig(ewc_lambda=0).core_json())["ewc_lambda"] == 0.0


@pytest.mark.parametrize(
    ("preset", "rank", "modules", "interval", "unit"),
    [
        ("low_latency", 1, ("q_proj",), 200.0, 0.0),
        ("balanced", 2, ("q_proj", "v_proj"), 100.0, 0.1),
        ("high_quality", 4, ("q_proj", "k_proj", "v_proj", "o_proj"), 50.0, 0.5),
    ],
)
def test_presets_are_their_table_in_canonical_units(preset, rank, modules, interval, unit):
    before = SonaConfig.for_hidden_dim(64, seed=7, holdout=0.2)
    config = getattr(before, preset)()
    assert (config.lora.rank, config.lora.target_modules) == (rank, modules)
    assert config.lora.scaling() == 2.0
    assert config.background_interval_ms == interval
    # lambda of a Fisher summed over 100 samples and a penalty without 1/2, as a mean with 1/2.
    assert config.ewc_lambda == unit * 100 * 2
    changed = {"lora", "background_interval_ms", "ewc_lambda"}
    for item in dataclasses.fields(SonaConfig):
        if item.name not in changed:
            assert getattr(config, item.name) == getattr(before, item.name)


def test_minimal_memory_is_rank_one_on_one_module_with_100_pending():
    config = SonaConfig.for_hidden_dim(64, background_min_samples=200).minimal_memory()
    assert (config.lora.rank, config.lora.target_modules) == (1, ("q_proj",))
    assert (config.max_pending_samples, config.background_min_samples, config.warmup_inputs) == (100, 90, 64)
    assert config.learner.param_count(64) == 128


def test_presets_keep_what_the_adapter_learns_by_and_drop_ranks_of_modules():
    lora = LoraConfig(module_ranks={"v_proj": 3}, instant=InstantConfig(rule="nlms", mu=0.2))
    config = SonaConfig(lora=lora).low_latency()
    assert config.lora.instant == lora.instant
    assert dict(config.lora.module_ranks) == {}


def test_for_hidden_dim_takes_the_rank_that_suits_the_width():
    assert SonaConfig.for_hidden_dim(4096).lora.rank == LoraConfig.for_hidden_dim(4096).rank == 16
    assert SonaConfig.for_hidden_dim(4).lora.rank == 4
    assert SonaConfig.for_hidden_dim(64, seed=3).seed == 3
    assert SonaConfig.for_hidden_dim(64).hidden_dim == 64


def test_instant_lr_is_the_step_of_nlms():
    config = SonaConfig(instant_lr=0.25)
    assert config.lora.instant.mu is None
    assert config.learner.instant.mu == 0.25
    assert config.replace(instant_lr=0.5).learner.instant.mu == 0.5
    assert SonaConfig().learner.instant.mu is None
    same = SonaConfig(lora=LoraConfig(instant=InstantConfig(mu=0.25)), instant_lr=0.25)
    assert same.learner.instant.mu == 0.25


def test_a_deep_run_takes_the_penalty_and_the_threshold_of_the_loop():
    config = SonaConfig(ewc_lambda=20, quality_threshold=0.7)
    assert config.deep.training.ewc_lambda == 20.0
    assert config.deep.training.quality_threshold == 0.7
    own = AdapterTrainingConfig(training=TrainingConfig(ewc_lambda=3.0))
    assert SonaConfig(ewc_lambda=20, training=own).deep.training.ewc_lambda == 3.0
    # None stays None: each kind of penalty has its own default.
    assert SonaConfig().deep.training.ewc_lambda is None
    assert config.deep.epochs == config.training.epochs


@pytest.mark.parametrize("name", list(Consolidation))
def test_strategies_by_either_spelling(name):
    camel = "".join(part.title() for part in name.split("_"))
    for spelling in (name, str(name), camel, name.name):
        config = SonaConfig(consolidation=spelling)
        assert config.consolidation == name.value
        assert type(config.consolidation) is str


INSTANT_BOTH = LoraConfig(instant=InstantConfig(rule="nlms", train="both"))
BAD = [
    ({"lora": 3}, "lora: got 3, expected a LoraConfig"),
    ({"training": "quick"}, "training: got 'quick', expected a AdapterTrainingConfig"),
    ({"lora": INSTANT_BOTH}, "lora.instant.train: got 'both', expected 'b'"),
    ({"hidden_dim": 0}, "hidden_dim: got 0"),
    ({"hidden_dim": 8, "dims": {"q_proj": (8, 8)}}, "hidden_dim, dims: got both"),
    ({"hidden_dim": 4}, "rank: got 8"),
    ({"dims": {"q_proj": (8, 8)}}, "module 'v_proj' is missing"),
    ({"dims": {"q_proj": 8, "v_proj": (8, 8)}}, "dims['q_proj']: got 8"),
    ({"dims": {3: (8, 8)}}, "dims: got the module 3"),
    ({"dims": [8]}, "dims: got [8]"),
    ({"instant_lr": 0.0}, "instant_lr: got 0.0"),
    ({"instant_lr": 1.5}, "instant_lr: got 1.5"),
    (
        {"instant_lr": 0.1, "lora": LoraConfig(instant=InstantConfig(rule="rls"))},
        "instant_lr: got 0.1, expected None",
    ),
    (
        {"instant_lr": 0.1, "lora": LoraConfig(instant=InstantConfig(mu=0.2))},
        "instant_lr: got 0.1, expected None or",
    ),
    ({"background_interval_ms": -1}, "background_interval_ms: got -1"),
    ({"background_interval_ms": float("nan")}, "background_interval_ms: got nan"),
    ({"background_min_samples": 0}, "background_min_samples: got 0"),
    ({"background_min_samples": 2.0}, "background_min_samples: got 2.0"),
    ({"deep_trigger_threshold": 0}, "deep_trigger_threshold: got 0"),
    ({"consolidation": "ewc_murge"}, "consolidation: got 'ewc_murge'"),
    ({"consolidation": 3}, "consolidation: got 3"),
    ({"max_pending_samples": 9}, "max_pending_samples: got 9, expected room for background_min_samples (10)"),
    ({"max_pending_samples": 71}, "max_pending_samples: got 71, expected room for warmup_inputs (64)"),
    ({"quality_threshold": 1.0}, "quality_threshold: got 1.0"),
    ({"quality_threshold": True}, "quality_threshold: got True"),
    ({"max_ms": 0}, "max_ms: got 0"),
    ({"reservoir_capacity": -1}, "reservoir_capacity: got -1"),
    ({"reservoir_max_bytes": -1}, "reservoir_max_bytes: got -1"),
    ({"reservoir_dtype": "bf16"}, "reservoir_dtype: got 'bf16'"),
    ({"reservoir_balance": 1}, "reservoir_balance: got 1"),
    ({"holdout": 0.6}, "holdout: got 0.6"),
    ({"gate_tolerance": -0.1}, "gate_tolerance: got -0.1"),
    ({"gate_min_samples": 0}, "gate_min_samples: got 0"),
    ({"ewc_lambda": -1}, "ewc_lambda: got -1"),
    ({"logit_weight": float("inf")}, "logit_weight: got inf"),
    ({"replay_ratio": -0.5}, "replay_ratio: got -0.5"),
    ({"consolidation_steps": -1}, "consolidation_steps: got -1"),
    ({"best_share": 0}, "best_share: got 0"),
    ({"ensemble_size": 0}, "ensemble_size: got 0"),
    ({"ensemble_temperature": 0}, "ensemble_temperature: got 0"),
    ({"ensemble_hard": "yes"}, "ensemble_hard: got 'yes'"),
    ({"patterns": 0}, "patterns: got 0"),
    ({"pattern_threshold": 1.5}, "pattern_threshold: got 1.5"),
    ({"warmup_inputs": -1}, "warmup_inputs: got -1"),
    ({"seed": -1}, "seed: got -1"),
]


@pytest.mark.parametrize(("settings", "message"), BAD, ids=[str(list(row[0])) for row in BAD])
def test_bad_values_name_the_setting(settings, message):
    with pytest.raises(ConfigError) as caught:
        SonaConfig(**settings)
    assert message in str(caught.value)


def test_every_setting_has_a_row_of_bad_values_and_a_line_of_documentation():
    names = {item.name for item in dataclasses.fields(SonaConfig)}
    assert names == {name for settings, _ in BAD for name in settings}
    attributes = SonaConfig.__doc__.split("Attributes:")[1].split("Raises:")[0]
    assert {
        line.split(":")[0].strip() for line in attributes.splitlines() if line.startswith(" " * 8)
    } >= names


@st.composite
def sona_configs(draw):
    share = st.floats(0.0, 1.0, exclude_max=True)
    strength = st.floats(0.0, 1e6)
    fewest = draw(st.integers(1, 50))
    targets = draw(st.sampled_from([("q_proj",), ("q_proj", "up_proj")]))
    shape = draw(st.sampled_from([{}, {"hidden_dim": 32}, {"dims": {"q_proj": (32, 16), "up_proj": (8, 9)}}]))
    return SonaConfig(
        lora=LoraConfig(rank=draw(st.integers(1, 8)), target_modules=targets),
        training=AdapterTrainingConfig(epochs=draw(st.integers(1, 9))),
        **shape,
        instant_lr=draw(st.none() | st.floats(1e-6, 1.0)),
        background_interval_ms=draw(strength),
        background_min_samples=fewest,
        deep_trigger_threshold=draw(st.floats(1e-3, 1e6)),
        consolidation=draw(st.sampled_from(["EwcMerge", *Consolidation])),
        max_pending_samples=2 * max(fewest, 64) + draw(st.integers(0, 100)),
        quality_threshold=draw(share),
        max_ms=draw(st.none() | st.floats(1e-3, 1e3)),
        reservoir_capacity=draw(st.integers(0, 1000)),
        reservoir_max_bytes=draw(st.none() | st.integers(1, 10**9)),
        reservoir_dtype=draw(st.sampled_from(["f32", "f16"])),
        reservoir_balance=draw(st.booleans()),
        holdout=draw(st.floats(0.0, 0.5)),
        gate_tolerance=draw(strength),
        ewc_lambda=draw(st.none() | strength),
        ensemble_hard=draw(st.booleans()),
        pattern_threshold=draw(st.floats(-1.0, 1.0)),
        seed=draw(st.integers(0, 2**63 - 1)),
    )


@given(sona_configs())
def test_json_gives_back_the_same_config(config):
    again = SonaConfig.from_json(config.to_json())
    assert again == config
    assert again.to_json() == config.to_json()
    assert hash(again) == hash(config)
    assert pickle.loads(pickle.dumps(config)) == config
    assert set(json.loads(config.core_json())) == CORE_KEYS


def test_documents_of_others():
    assert SonaConfig.from_dict({}) == SonaConfig()
    assert SonaConfig.from_dict({"lora": {"rank": 4}}).lora.rank == 4
    with pytest.raises(ConfigError, match=r"sona config: unknown key 'holdaut' \(did you mean 'holdout'"):
        SonaConfig.from_dict({"holdaut": 0.1})
    with pytest.raises(FormatError, match="newer"):
        SonaConfig.from_dict({"schema_version": 2})
    with pytest.raises(ConfigError, match=r"lora\.instant\.train"):
        SonaConfig.from_dict({"lora": {"instant": {"rule": "nlms", "train": "both"}}})
    with pytest.raises(ConfigError, match="unknown key"):
        SonaConfig().replace(holdaut=0.1)


def test_the_room_is_loaded_when_it_is_used():
    assert ml.sona.SonaConfig is ml.SonaConfig is SonaConfig
    assert ml.SonaLoop is ml.sona.SonaLoop
