import copy
import dataclasses
import json
import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import microlora as ml
from microlora import MergeConfig
from microlora.exceptions import ConfigError, FormatError
from microlora.merging import methods
from microlora.merging.config import MISSING
from microlora.merging.methods import METHOD_SETTINGS
from strategies import full_texts

NAN, INF = float("nan"), float("inf")
NAMES = tuple(methods())

GOOD = {
    "weights": st.dictionaries(full_texts, st.floats(-9, 9), min_size=1, max_size=3) | st.just("performance"),
    "density": st.floats(0.3, 0.6),
    "lam": st.just(0.0) | st.floats(0.01, 9) | st.floats(-9, -0.01),
    "rank": st.integers(1, 65_536),
    "seed": st.integers(0, 2**64 - 1),
    "t": st.floats(0, 1),
    "epsilon": st.floats(0, 0.25),
    "gamma": st.floats(0, 0.1),
    "rho": st.floats(0, 1),
    "normalize": st.booleans(),
    "majority": st.sampled_from(["total", "frequency"]),
}


@st.composite
def own(draw):
    """A method and settings that it takes."""
    row = methods()[draw(st.sampled_from(NAMES))]
    taken = [name for name in METHOD_SETTINGS if row.takes(name)]
    chosen = draw(st.sets(st.sampled_from(taken)))
    return {"method": row.name, **{name: draw(GOOD[name]) for name in sorted(chosen)}}


@st.composite
def merge_configs(draw):
    settings = draw(own())
    patterns = draw(st.lists(full_texts, max_size=3, unique=True))
    overrides = {p: draw(own()) for p in patterns}
    return MergeConfig(
        **settings,
        dtype=draw(st.sampled_from([None, "f32", "f16", "bf16"])),
        report=draw(st.sampled_from(["default", "full"])),
        missing=draw(st.sampled_from(MISSING)),
        overrides=overrides,
    )


# -- values --


@given(merge_configs())
def test_json_both_ways(config):
    assert MergeConfig.from_json(config.to_json()) == config
    assert MergeConfig.from_dict(json.loads(config.to_json(indent=1))) == config


@given(merge_configs())
def test_equal_by_value_hashable_and_picklable(config):
    for twin in (copy.deepcopy(config), pickle.loads(pickle.dumps(config)), config.replace()):
        assert twin == config
        assert hash(twin) == hash(config)


def test_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        MergeConfig().method = "ties"


def test_a_document_of_a_newer_version_is_refused():
    with pytest.raises(FormatError, match="newer"):
        MergeConfig.from_dict({"schema_version": 99})


def test_unknown_keys_are_refused_with_the_nearest():
    with pytest.raises(ConfigError, match="density"):
        MergeConfig.from_dict({"method": "ties", "densitty": 0.5})
    with pytest.raises(ConfigError, match="density"):
        MergeConfig.ties(densitty=0.5)
    with pytest.raises(ConfigError, match="density"):
        MergeConfig(overrides={"*": {"densitty": 0.5}})
    with pytest.raises(ConfigError, match="density"):
        MergeConfig.ties().replace(densitty=0.5)


# -- the table --


def test_every_method_has_a_constructor_of_its_name():
    for name, row in methods().items():
        config = getattr(MergeConfig, name)()
        assert config == MergeConfig(method=name)
        assert config.method == row.name


def test_constructors_take_what_matters_first():
    assert MergeConfig.ties(0.3) == MergeConfig(method="ties", density=0.3)
    assert MergeConfig.slerp(0.3) == MergeConfig(method="slerp", t=0.3)
    assert MergeConfig.weighted({"a": 1}) == MergeConfig(method="weighted", weights={"a": 1.0})
    assert MergeConfig.dare(0.3, seed=4).value("seed") == 4
    assert MergeConfig.regmean(0.5, dtype="f16").value("rho") == 0.5


@pytest.mark.parametrize("name", NAMES)
def test_a_setting_that_the_method_does_not_take_is_refused(name):
    row = methods()[name]
    values = {
        "weights": {"a": 1.0},
        "density": 0.5,
        "lam": 2.0,
        "rank": 4,
        "seed": 1,
        "t": 0.5,
        "epsilon": 0.1,
        "gamma": 0.1,
        "rho": 0.5,
        "normalize": True,
        "majority": "frequency",
    }
    assert set(values) == set(METHOD_SETTINGS)
    for setting, value in values.items():
        if row.takes(setting):
            assert getattr(MergeConfig(method=name, **{setting: value}), setting) == value
        else:
            with pytest.raises(ConfigError, match=rf"^{setting}: .*{row.name}"):
                MergeConfig(method=name, **{setting: value})


def test_defaults_are_those_of_the_table():
    config = MergeConfig.ties()
    assert config.density is None
    assert (config.value("density"), config.value("majority"), config.value("normalize")) == (
        0.2,
        "total",
        True,
    )
    assert config.value("t") is None
    assert methods()["dare"] is methods()["dare_linear"]


def test_rows_say_where_they_are_from():
    for row in methods().values():
        assert row.formula
        assert row.paper
        assert row.when
        assert row.laws


# -- bad values --

INVALID = [
    *[("average", "method", v) for v in ("", "tiess", None, 3, "AVERAGE")],
    *[("ties", "density", v) for v in (0, 0.0, -0.1, 1.0001, NAN, INF, "0.5", True)],
    *[("slerp", "t", v) for v in (-0.01, 1.01, NAN, "0", False)],
    *[("average", "lam", v) for v in (NAN, INF, "1", True, 1e-13, -1e13)],
    *[("average", "rank", v) for v in (0, -1, 65_537, 1.0, "8", True)],
    *[("dare_linear", "seed", v) for v in (-1, 2**64, 1.0, "1", True)],
    *[("della", "epsilon", v) for v in (-0.1, 1.0, NAN, "0.1")],
    *[("breadcrumbs", "gamma", v) for v in (-0.1, 1.0, NAN)],
    *[("regmean", "rho", v) for v in (-0.1, 1.1, NAN, "1")],
    *[("linear", "normalize", v) for v in (0, 1, "yes")],
    *[("ties", "majority", v) for v in ("count", "", 1)],
    *[
        ("linear", "weights", v)
        for v in ({}, [0.5, 0.5], "best", 1.0, {"a": NAN}, {"a": "1"}, {1: 1.0}, {"": 1.0})
    ],
    *[("average", "semantics", v) for v in ("", "paper", None, 1)],
    *[("average", "dtype", v) for v in ("f64", "float32", "", 32)],
    *[("average", "report", v) for v in ("", "none", None, True)],
    *[("average", "missing", v) for v in ("", "ignore", None)],
    *[("average", "metric", v) for v in ("", "mrr", 1)],
    *[
        ("average", "overrides", v)
        for v in ("m", 3, {"": {"lam": 2.0}}, {"m": {}}, {"m": 2}, {1: {"lam": 2.0}})
    ],
    ("average", "overrides", {"m": {"semantics": "peft"}}),
    ("average", "overrides", {"m": {"density": 0.5}}),
    ("average", "overrides", {"m": {"method": "ties", "density": 1.5}}),
    ("average", "overrides", [("m", {"lam": 2.0}), ("m", {"lam": 3.0})]),
]


@pytest.mark.parametrize(("method", "field", "value"), INVALID)
def test_every_bad_value_is_refused_by_name(method, field, value):
    with pytest.raises(ConfigError) as caught:
        MergeConfig(**{"method": method, field: value})
    assert field in str(caught.value) or "density" in str(caught.value)
    assert "expected" in str(caught.value) or "known" in str(caught.value)


def test_values_that_are_wrong_together():
    with pytest.raises(ConfigError, match="density, gamma"):
        MergeConfig.breadcrumbs(1.0)
    assert MergeConfig.breadcrumbs(1.0, gamma=0.0).density == 1.0
    with pytest.raises(ConfigError, match="epsilon / 2"):
        MergeConfig.della(0.5, epsilon=0.99999, semantics="exact").replace(density=0.9)
    assert MergeConfig.della(0.5, epsilon=0.9).epsilon == 0.9
    with pytest.raises(ConfigError, match="epsilon above"):
        MergeConfig.della(0.5, epsilon=0.9, semantics="mergekit")


# -- overrides --


def test_the_first_pattern_that_matches_wins():
    config = MergeConfig.ties(
        0.5, weights={"a": 1, "b": 2}, overrides={"*.q_*": {"density": 0.25}, "*.0.*": {"method": "average"}}
    )
    assert config.for_module("layers.0.q_proj").density == 0.25
    assert config.for_module("layers.0.k_proj").method == "average"
    assert config.for_module("layers.1.k_proj") == config.replace(overrides=())
    turned = config.replace(overrides=list(reversed(config.pairs)))
    assert turned.for_module("layers.0.q_proj").method == "average"
    assert turned != config
    assert config.for_module("layers.0.q_PROJ").density == 0.25
    assert config.for_module("layers.1.Q_proj").density == 0.5


def test_an_override_that_names_a_method_begins_from_its_defaults():
    config = MergeConfig.ties(
        0.5,
        weights={"a": 1, "b": 2},
        lam=2.0,
        rank=4,
        majority="frequency",
        overrides={"x": {"method": "magnitude_prune"}, "y": {"method": "karcher"}, "z": {"method": "cat"}},
    )
    x, y, z = (config.for_module(m) for m in "xyz")
    assert (x.density, x.weights, x.lam, x.rank, x.majority) == (None, {"a": 1, "b": 2}, 2.0, 4, None)
    assert (y.weights, y.lam, y.rank) == (None, 2.0, 4)
    assert z.rank is None


def test_numbers_of_numpy_are_numbers():
    config = MergeConfig.ties(np.float32(0.5), rank=np.int64(4))
    assert type(config.density) is float
    assert type(config.rank) is int


def test_the_package_shows_it():
    assert ml.MergeConfig is MergeConfig
    assert repr(ml.AdapterMerger(MergeConfig())).startswith("AdapterMerger(MergeConfig(")
