import copy
import dataclasses
import json
import math
import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from microlora import presets
from microlora.config import InstantConfig, LoraConfig, LoraConfigBuilder
from microlora.exceptions import ConfigError, FormatError, UnknownModuleError
from microlora.target import TargetModule
from strategies import configs, instants

NAN, INF = float("nan"), float("inf")

# -- construction --


def test_the_defaults_are_those_of_the_documentation():
    config = LoraConfig()
    assert (config.rank, config.alpha, config.target_modules) == (8, 16.0, ("q_proj", "v_proj"))
    assert (config.dropout, config.use_rslora, config.dtype) == (0.0, False, "f32")
    assert (config.name, config.description, config.tags) == ("", "", ())
    assert config.module_ranks == {}
    assert config.module_alphas == {}
    assert config.instant == InstantConfig(
        rule="auto",
        forgetting=1.0,
        rho=1.0,
        mu=None,
        train="b",
        kappa=0.3,
        baseline_rate=0.02,
        max_grad_norm=None,
    )


def test_values_are_normalised():
    config = LoraConfig(
        rank=np.int64(4),
        alpha=8,
        target_modules="up_proj, lm_head",
        dropout=-0.0,
        tags=["a", "b"],
        module_ranks={"up_proj": np.int32(2)},
    )
    assert type(config.rank) is int
    assert type(config.alpha) is float
    assert config.target_modules == ("up_proj", "lm_head")
    assert math.copysign(1, config.dropout) == 1.0
    assert config.tags == ("a", "b")
    assert type(config.module_ranks["up_proj"]) is int
    assert LoraConfig(target_modules=TargetModule.quality()) == LoraConfig()


INVALID = [
    *[("rank", value) for value in (0, -1, 65_537, 1.0, "8", True, None, NAN)],
    *[("alpha", value) for value in (0, -1.0, NAN, INF, 1e31, 1e-31, 10**400, "16", True, None, [1.0])],
    *[("target_modules", value) for value in ((), "", None, ["q_proj", "q_proj"], [1], ["a b"])],
    *[("dropout", value) for value in (-0.1, 1.0, NAN, INF, "0", None, False)],
    *[("use_rslora", value) for value in (1, 0, None, "yes")],
    *[("dtype", value) for value in ("float32", "f64", "", None, 32, np.float32)],
    *[("name", value) for value in (None, 1, b"x", "\ud800")],
    *[("description", value) for value in (None, 1, "\udfff")],
    *[("tags", value) for value in ("abc", None, 3, ["a", "a"], [""], [1], {"a": 1})],
    *[("module_ranks", value) for value in (None, 3, {"k_proj": 4}, {"q_proj": 0}, {"q_proj": 1.5}, {1: 2})],
    *[("module_alphas", value) for value in (None, [], {"k_proj": 4.0}, {"q_proj": NAN}, {"q_proj": "1"})],
    *[("instant", value) for value in (None, {}, "rls", InstantConfig)],
]


@pytest.mark.parametrize(("field", "value"), INVALID)
def test_every_bad_value_is_refused_by_name(field, value):
    with pytest.raises(ConfigError) as caught:
        LoraConfig(**{field: value})
    message = str(caught.value)
    assert message.startswith(field)
    assert "got " in message or "appears twice" in message
    assert "expected" in message


INVALID_INSTANT = [
    *[("rule", value) for value in ("RLS", "", None, 1)],
    *[("forgetting", value) for value in (0.0, -0.5, 1.0001, NAN, INF, "1", True, None, 1e-40)],
    *[("rho", value) for value in (0, -1.0, NAN, INF, 1e31, "1", None)],
    *[("mu", value) for value in (0, -0.1, 1.5, NAN, "0.3", True)],
    *[("train", value) for value in ("a", "", None)],
    *[("kappa", value) for value in (0, -1.0, NAN, None)],
    *[("baseline_rate", value) for value in (0, 2.0, NAN, None)],
    *[("max_grad_norm", value) for value in (0, -1.0, NAN, INF, "1")],
]


@pytest.mark.parametrize(("field", "value"), INVALID_INSTANT)
def test_every_bad_value_of_instant_is_refused_by_name(field, value):
    with pytest.raises(ConfigError, match=rf"^instant\.{field}: got .*, expected "):
        InstantConfig(**{field: value})


def test_rls_needs_a_frozen_a():
    with pytest.raises(ConfigError, match=r"instant\.train: got 'both' with instant\.rule 'rls'"):
        InstantConfig(rule="rls", train="both")


def test_a_misspelt_dtype_gets_the_nearest():
    with pytest.raises(ConfigError, match=r"got 'bf_16'.*did you mean 'bf16'"):
        LoraConfig(dtype="bf_16")


def test_a_long_value_is_shortened_in_the_message():
    with pytest.raises(ConfigError) as caught:
        LoraConfig(rank="x" * 10_000)
    assert len(str(caught.value)) < 200


def test_frozen_hashable_and_picklable():
    config = LoraConfig(module_ranks={"q_proj": 4}, module_alphas={"v_proj": 2.0}, tags=("x",))
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.rank = 3
    with pytest.raises(TypeError):
        config.module_ranks["q_proj"] = 5
    for other in (pickle.loads(pickle.dumps(config)), copy.deepcopy(config), copy.copy(config)):
        assert other == config
        assert hash(other) == hash(config)
        assert repr(other) == repr(config)
    assert len({config, config.replace(), LoraConfig()}) == 2


def test_the_order_of_a_pattern_does_not_matter():
    one = LoraConfig(module_ranks={"q_proj": 4, "v_proj": 2})
    two = LoraConfig(module_ranks={"v_proj": 2, "q_proj": 4})
    assert one == two
    assert hash(one) == hash(two)
    assert one.to_json() == two.to_json()


# -- per module --


def test_scaling():
    assert LoraConfig(rank=16, alpha=32.0).scaling() == 2.0
    assert LoraConfig(rank=16, alpha=32.0, use_rslora=True).scaling() == 8.0
    config = LoraConfig(rank=8, alpha=16.0, module_ranks={"q_proj": 4}, module_alphas={"v_proj": 8.0})
    assert config.scaling() == 2.0
    assert config.scaling("q_proj") == 4.0
    assert config.scaling("v_proj") == 1.0
    assert (config.rank_of("q_proj"), config.rank_of("v_proj")) == (4, 8)
    assert (config.alpha_of("q_proj"), config.alpha_of("v_proj")) == (16.0, 8.0)


@pytest.mark.parametrize("method", ["scaling", "rank_of", "alpha_of"])
def test_an_unknown_module_is_refused_with_the_nearest(method):
    with pytest.raises(
        UnknownModuleError, match=r"got 'q_prj', expected one of q_proj, v_proj.*did you mean 'q_proj'"
    ):
        getattr(LoraConfig(), method)("q_prj")
    with pytest.raises(UnknownModuleError, match="got 3"):
        getattr(LoraConfig(), method)(3)


@given(configs())
def test_the_scaling_of_any_config_is_a_normal_float32(config):
    tiny = float(np.finfo(np.float32).tiny)
    for module in config.target_modules:
        assert tiny <= config.scaling(module) <= float(np.finfo(np.float32).max)


# -- sizes --

# name: (parameters, f32 bytes, f16 bytes) of one layer of 768 features
EXACT = {
    "coder": (98_304, 393_216, 196_608),
    "researcher": (36_864, 147_456, 73_728),
    "security": (172_032, 688_128, 344_064),
    "architect": (73_728, 294_912, 147_456),
    "reviewer": (24_576, 98_304, 49_152),
}


@pytest.mark.parametrize("name", EXACT)
def test_exact_sizes_of_the_presets(name):
    config = presets.get(name)
    params, f32, f16 = EXACT[name]
    assert config.param_count(768) == params
    assert config.memory_bytes(768) == f32
    assert config.memory_bytes(768, dtype="f16") == config.memory_bytes(768, dtype="bf16") == f16
    assert config.replace(dtype="f16").memory_bytes(768) == f16


def test_exact_sizes_of_layers_that_are_not_square():
    dims = dict.fromkeys(TargetModule.attention(), (768, 768))
    dims |= {"gate_proj": (768, 3072), "up_proj": (768, 3072), "down_proj": (3072, 768)}
    assert presets.get("security").param_count(dims=dims) == 282_624
    assert presets.get("architect").param_count(dims=dims) == 129_024
    assert LoraConfig(rank=4, target_modules="up_proj").param_count(dims={"up_proj": (768, 3072)}) == 4 * 3840


def test_ranks_of_single_modules_count():
    config = LoraConfig(rank=8, module_ranks={"q_proj": 2})
    assert config.param_count(100) == 2 * 200 + 8 * 200


def test_resolve_dims():
    config = LoraConfig(target_modules=("v_proj", "q_proj"))
    assert config.resolve_dims(64) == {"v_proj": (64, 64), "q_proj": (64, 64)}
    table = {"q_proj": (64, 32), "v_proj": [64, 16], "unrelated": (1, 1)}
    resolved = config.resolve_dims(dims=table)
    assert resolved == {"v_proj": (64, 16), "q_proj": (64, 32)}
    assert list(resolved) == ["v_proj", "q_proj"]


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({}, "hidden_dim, dims: got neither"),
        ({"hidden_dim": 64, "dims": {}}, "hidden_dim, dims: got both"),
        ({"hidden_dim": 0}, "hidden_dim: got 0"),
        ({"hidden_dim": -1}, "hidden_dim: got -1"),
        ({"hidden_dim": 64.0}, "hidden_dim: got 64.0"),
        ({"hidden_dim": True}, "hidden_dim: got True"),
        ({"hidden_dim": 2**31}, "hidden_dim: got 2147483648"),
        ({"hidden_dim": 7}, "rank: got 8 for 'q_proj' with 7 x 7 features, expected at most 7"),
        ({"dims": [("q_proj", 64)]}, "dims: got"),
        ({"dims": {}}, "dims: module 'q_proj' is missing"),
        (
            {"dims": {"q_proj": (64, 64), "v_prj": (64, 64)}},
            "module 'v_proj' is missing.*did you mean 'v_prj'",
        ),
        ({"dims": {"q_proj": 64, "v_proj": 64}}, r"dims\['q_proj'\]: got 64"),
        ({"dims": {"q_proj": (64,), "v_proj": (64, 64)}}, r"dims\['q_proj'\]: got"),
        ({"dims": {"q_proj": (64, 64), "v_proj": (64, 0)}}, r"dims\['v_proj'\]\[1\]: got 0"),
        ({"dims": {"q_proj": ("64", 64), "v_proj": (64, 64)}}, r"dims\['q_proj'\]\[0\]: got '64'"),
        ({"dims": {"q_proj": (64, 64), "v_proj": (64, 4)}}, "rank: got 8 for 'v_proj' with 64 x 4"),
    ],
)
def test_dims_that_are_refused(arguments, reason):
    for method in (LoraConfig.resolve_dims, LoraConfig.param_count, LoraConfig.memory_bytes):
        with pytest.raises(ConfigError, match=reason):
            method(LoraConfig(), **arguments)


def test_a_module_rank_above_its_layer_is_refused_by_name():
    with pytest.raises(ConfigError, match=r"module_ranks\['q_proj'\]: got 9"):
        LoraConfig(module_ranks={"q_proj": 9}).resolve_dims(8)


def test_memory_of_an_unknown_dtype():
    with pytest.raises(ConfigError, match="dtype: got 'f8'"):
        LoraConfig().memory_bytes(64, dtype="f8")


# -- making --


def test_builder():
    builder = LoraConfig.builder("mine")
    config = (
        builder.rank(12)
        .alpha(24)
        .dropout(0.1)
        .target_modules(["q_proj", TargetModule.GATE_PROJ])
        .description("for one thing")
        .add_tag("x")
        .add_tag("y")
        .use_rslora()
        .dtype("f16")
        .instant(InstantConfig(rule="nlms"))
        .build()
    )
    assert config == LoraConfig(
        rank=12,
        alpha=24.0,
        dropout=0.1,
        target_modules=("q_proj", "gate_proj"),
        name="mine",
        description="for one thing",
        tags=("x", "y"),
        use_rslora=True,
        dtype="f16",
        instant=InstantConfig(rule="nlms"),
    )
    assert builder.build() == config
    assert builder.add_tag("z").build().tags == ("x", "y", "z")
    assert builder.tags(["only"]).build().tags == ("only",)
    assert builder.tags(["a"]).add_tag("b").build().tags == ("a", "b")
    assert LoraConfigBuilder().build() == LoraConfig()


@pytest.mark.parametrize(
    ("method", "value", "field"),
    [
        ("rank", 0, "rank"),
        ("alpha", NAN, "alpha"),
        ("dropout", 1, "dropout"),
        ("add_tag", "", "tags"),
        ("tags", "abc", "tags"),
    ],
)
def test_builder_refuses_as_the_config_does(method, value, field):
    builder = LoraConfig.builder("mine")
    getattr(builder, method)(value)
    with pytest.raises(ConfigError, match=f"^{field}"):
        builder.build()


def test_ready_ranks_keep_the_scaling():
    assert LoraConfig.low_rank().rank == 4
    assert LoraConfig.high_rank().rank == 16
    assert {c.scaling() for c in (LoraConfig(), LoraConfig.low_rank(), LoraConfig.high_rank())} == {2.0}


@given(st.integers(1, 100_000))
def test_for_hidden_dim_always_fits(features):
    config = LoraConfig.for_hidden_dim(features)
    assert config.rank == min(features, 8 if features < 2048 else 16)
    assert config.scaling() == 2.0
    assert config.param_count(features) == 2 * config.rank * 2 * features


def test_for_hidden_dim_refuses():
    with pytest.raises(ConfigError, match="hidden_dim: got 0"):
        LoraConfig.for_hidden_dim(0)


def test_replace():
    config = LoraConfig(name="a").replace(rank=4)
    assert (config.rank, config.name) == (4, "a")
    with pytest.raises(ConfigError, match="rank: got 0"):
        config.replace(rank=0)
    with pytest.raises(ConfigError, match=r"unknown key 'rnk'.*did you mean 'rank'"):
        config.replace(rnk=4)


# -- JSON --


@given(configs())
def test_json_round_trip_of_any_config(config):
    document = config.to_json()
    assert LoraConfig.from_json(document) == config
    assert LoraConfig.from_json(document.encode()) == config
    assert LoraConfig.from_json(config.to_json(indent=2)) == config
    assert LoraConfig.from_dict(config.to_dict()) == config
    assert LoraConfig.from_json(document).to_json() == document
    assert pickle.loads(pickle.dumps(config)) == config
    json.loads(document, parse_constant=pytest.fail)


@given(instants())
def test_dict_round_trip_of_any_instant(instant):
    assert InstantConfig.from_dict(instant.to_dict()) == instant


def test_keys_left_out_keep_their_default():
    assert LoraConfig.from_dict({"rank": 4, "instant": {"rule": "rls"}}) == LoraConfig(
        rank=4, instant=InstantConfig(rule="rls")
    )
    assert LoraConfig.from_json("{}") == LoraConfig()


@pytest.mark.parametrize(
    ("document", "error", "reason"),
    [
        (
            '{"rnak": 4}',
            ConfigError,
            r"config: unknown key 'rnak' \(did you mean 'rank' or 'name'\?\); known: rank, alpha",
        ),
        ('{"instant": {"roh": 1}}', ConfigError, r"instant: unknown key 'roh'.*'rho'"),
        ('{"instant": 3}', ConfigError, "instant: got 3"),
        ('{"rank": 0}', ConfigError, "rank: got 0"),
        ('{"rank": 4.0}', ConfigError, "rank: got 4.0"),
        ('{"schema_version": 2}', FormatError, "schema_version 2 is newer than 1"),
        ('{"schema_version": 2, "future": 1}', FormatError, "schema_version 2 is newer than 1"),
        ('{"schema_version": 0}', FormatError, "schema_version: got 0"),
        ('{"schema_version": "1"}', FormatError, "schema_version: got '1'"),
        ('{"schema_version": true}', FormatError, "schema_version: got True"),
        ("", FormatError, "config: not valid JSON"),
        ("{", FormatError, "config: not valid JSON"),
        ("[]", FormatError, "got a JSON list"),
        ('{"alpha": NaN}', FormatError, "NaN is not a JSON number"),
        ('{"alpha": Infinity}', FormatError, "Infinity is not a JSON number"),
        ('{"alpha": 1e999}', ConfigError, "alpha: got inf"),
        ('{"rank": 4, "rank": 8}', FormatError, "key 'rank' appears twice"),
        ("[" * 100_000, FormatError, "not valid JSON"),
        (b"\xff\xfe\xff", FormatError, "not valid JSON"),
        (None, FormatError, "not valid JSON"),
    ],
)
def test_documents_that_are_refused(document, error, reason):
    with pytest.raises(error, match=reason):
        LoraConfig.from_json(document)


def test_from_dict_wants_a_mapping():
    with pytest.raises(ConfigError, match=r"config: got \[\], expected a mapping"):
        LoraConfig.from_dict([])
    with pytest.raises(ConfigError, match="unknown key 3"):
        LoraConfig.from_dict({3: 4})
