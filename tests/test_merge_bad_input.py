"""Whatever cannot be merged is refused by name, before any work, and parents stay as they are."""

import json

import numpy as np
import pytest

import microlora as ml
from merge_support import METHODS, adapter, known, parents
from microlora import _core
from microlora.exceptions import (
    ConfigError,
    DTypeError,
    FormatError,
    MicroLoraError,
    NonFiniteError,
    ShapeError,
    UnsupportedVariantError,
)
from microlora.gram import Gram
from microlora.merging import Statistics, methods
from microlora.merging.statistics import read, statistics_of
from support import normal, rng


@pytest.fixture
def refused(monkeypatch):
    """Expects an error of a merge that never reaches the core, with parents as they were."""

    def check(error, match, of, **settings):
        before = {n: one.to_bytes() for n, one in of.items() if isinstance(one, ml.Adapter)}
        with monkeypatch.context() as patch:
            patch.setattr(_core, "merge_adapters", lambda *_: pytest.fail("the core was asked"))
            with pytest.raises(error, match=match) as caught:
                ml.merge(of, **settings)
        assert isinstance(caught.value, MicroLoraError | OSError)
        assert {n: one.to_bytes() for n, one in of.items() if isinstance(one, ml.Adapter)} == before

    return check


# -- parents --


def test_no_common_modules(refused):
    of = {"a": adapter({"x": (4, 4, 1)}), "b": adapter({"y": (4, 4, 1)})}
    refused(ConfigError, "no module that two of them have", of)
    of = {"a": adapter({"m": (4, 4, 1)}), "b": adapter({"m": (4, 4, 1)}), "c": adapter({"y": (4, 4, 1)})}
    refused(ConfigError, "no module that all of them have", of, missing="common")
    refused(ConfigError, "no module 'm' in 'c'", of, missing="error")


def test_incompatible_shapes_name_the_module(refused):
    of = {"a": adapter({"x": (4, 4, 1), "y": (6, 5, 1)}), "b": adapter({"x": (4, 4, 1), "y": (5, 6, 1)})}
    refused(ShapeError, "y: got 6 -> 5 in 'a', 5 -> 6 in 'b'", of)


def test_none_and_names(refused):
    refused(ConfigError, "at least one", {})
    refused(ConfigError, "name", {"": adapter(), "b": adapter()})
    with pytest.raises(ConfigError, match="'a' came twice"):
        ml.merge([("a", adapter()), ("a", adapter())])
    for wrong in (3, "ab", None, [adapter()], [("a",)]):
        with pytest.raises(DTypeError, match="adapters"):
            ml.merge(wrong)
    refused(DTypeError, r"adapters\['b'\]: got int", {"a": adapter(), "b": 3})
    refused(OSError, "nowhere", {"a": adapter(), "b": "/nowhere/b"})


@pytest.mark.parametrize("method", ["slerp", "nuslerp"])
@pytest.mark.parametrize("m", [1, 3])
def test_methods_of_two(refused, method, m):
    refused(ConfigError, f"got {m} .*exactly 2 with method '{method}'", parents(m), method=method)


def test_methods_of_several(refused):
    refused(ConfigError, "got 1 .*at least 2", parents(1), method="model_stock")
    refused(ConfigError, "for 'm', expected exactly 2", parents(3), overrides={"m": {"method": "slerp"}})


def test_nan_names_the_parent():
    a, b = (np.ones(s, np.float32) for s in ((2, 8), (8, 2)))
    with pytest.raises(NonFiniteError):
        ml.Adapter.from_factors({"m": (np.nan * a, b)}, alpha=2.0)
    big = np.float32(3e38)
    of = {"a": adapter({"m": (8, 8, 2)}), "b": ml.Adapter.from_factors({"m": (big * a, big * b)}, alpha=2.0)}
    for method in METHODS:
        stats = known({n: adapter({"m": (8, 8, 2)}) for n in of}) if methods()[method].statistics else None
        try:
            made = ml.merge(of, method=method, rank=2, statistics=stats) if method != "cat" else ml.merge(of)
        except (NonFiniteError, ConfigError):
            continue
        assert all(np.isfinite(f).all() for f in made.adapter.factors("m")), method


def test_a_modified_base_is_refused(tmp_path, refused):
    one = adapter({"q_proj": (8, 8, 2)})
    ml.save(one, tmp_path / "p")
    file = tmp_path / "p" / "adapter_config.json"
    for kind in ("pissa", "olora", "corda", "pissa_niter_4"):
        file.write_text(json.dumps({**json.loads(file.read_text()), "init_lora_weights": kind}))
        refused(UnsupportedVariantError, kind, {"a": one, "b": tmp_path / "p"})


def test_other_base_weights_are_refused(refused):
    a, b = (
        one.with_metadata(ml.AdapterMetadata(base_fingerprint=f))
        for one, f in zip(parents(2).values(), ("f1", "f2"), strict=True)
    )
    refused(ConfigError, "different base weights.*'a': f1, 'b': f2", {"a": a, "b": b})
    assert ml.merge({"a": a, "b": adapter()}).adapter.metadata.base_fingerprint == "f1"


def test_a_file_that_is_none(tmp_path, refused):
    (tmp_path / "x.safetensors").write_bytes(b"no adapter")
    refused(FormatError, "x.safetensors", {"a": adapter(), "b": tmp_path / "x.safetensors"})


# -- settings --


@pytest.mark.parametrize("density", [0, 0.0, -0.5, 1.5, float("nan")])
def test_density_out_of_range(refused, density):
    refused(ConfigError, "density: got", parents(2), method="ties", density=density)


@pytest.mark.parametrize("t", [-0.1, 1.1, float("nan")])
def test_t_out_of_range(refused, t):
    refused(ConfigError, "t: got", parents(2), method="slerp", t=t)


@pytest.mark.parametrize("method", [m for m in METHODS if methods()[m].exact and methods()[m].takes("rank")])
def test_a_rank_above_the_sum_of_an_exact_method(refused, method):
    of = parents(2)
    stats = known(of) if methods()[method].statistics else None
    refused(
        ConfigError, "rank: got 7, expected at most 6 for 'm'", of, method=method, rank=7, statistics=stats
    )


def test_a_rank_above_the_width_of_an_element_wise_method(refused):
    refused(ConfigError, "rank: got 11, expected at most 10", parents(2), method="ties", rank=11)


def test_a_rank_where_none_has_a_meaning(refused):
    refused(ConfigError, "rank: got 3, expected none with method 'cat'", parents(2), method="cat", rank=3)


def test_unknown_names(refused):
    refused(ConfigError, "did you mean 'slerp'", parents(2), method="slrp")
    refused(ConfigError, "semantics", parents(2), semantics="merge-kit")
    refused(ConfigError, "dtype", parents(2), dtype="f64")
    refused(ConfigError, "missing", parents(2), missing="drop")


# -- weights --


def test_weights_that_sum_to_zero_where_normalised(refused):
    w = {"a": 1.0, "b": -1.0}
    for method in METHODS:
        row = methods()[method]
        if row.weights == "none":
            continue
        of = parents(2)
        stats = known(of) if row.statistics else None
        if row.takes("normalize"):
            refused(
                ConfigError, "weights.*sum", of, method=method, weights=w, normalize=True, statistics=stats
            )
        elif "weights_ratio" in row.laws:
            refused(ConfigError, "weights.*(sum|importance)", of, method=method, weights=w, statistics=stats)
        else:
            ml.merge(of, method=method, weights=w, statistics=stats)
    assert ml.merge(parents(2), method="linear", weights=w)
    assert ml.merge(parents(2), method="task_arithmetic", weights=w)


def test_weights_of_others(refused):
    of = parents(2)
    refused(ConfigError, "weights: unknown key 'c'", of, method="linear", weights={"a": 1, "b": 1, "c": 1})
    refused(ConfigError, "weights: got none for 'b'", of, method="linear", weights={"a": 1})
    refused(ConfigError, "weights", of, method="linear", weights=[0.5, 0.5])
    stats, turned = known(of), {"a": 1, "b": -0.5}
    refused(ConfigError, "of 0 or above", of, method="fisher", weights=turned, statistics=stats)
    refused(ConfigError, "weights", of, method="linear", weights={"a": float("nan"), "b": 1})
    refused(ConfigError, "weights: got .* expected none with method 'average'", of, weights={"a": 1, "b": 1})


# -- overrides --


def test_a_pattern_that_decides_nothing(refused):
    of = parents(2)
    refused(ConfigError, r"overrides: got the pattern 'q_\*'", of, overrides={"q_*": {"lam": 2.0}})
    behind = {"*": {"lam": 2.0}, "m": {"lam": 3.0}}
    refused(ConfigError, "overrides: got the pattern 'm'", of, overrides=behind)


# -- statistics --


def test_statistics_that_are_not_there(refused):
    of = parents(2)
    refused(ConfigError, r"statistics\['a'\]: got nothing, expected the Gram", of, method="regmean")
    refused(ConfigError, r"statistics\['a'\].*importance", of, method="fisher")
    some = known(of)
    refused(ConfigError, r"statistics\['b'\]", of, method="regmean", statistics={"a": some["a"]})
    refused(
        ConfigError, "statistics: unknown key 'c'", of, method="regmean", statistics={**some, "c": some["a"]}
    )
    refused(ConfigError, "no method here has a use", of, statistics=some)
    refused(DTypeError, "statistics", of, method="regmean", statistics=[some])
    refused(DTypeError, r"statistics\['a'\]", of, method="regmean", statistics={"a": 3, "b": some["b"]})


def test_statistics_of_other_widths(refused):
    of = parents(2)
    wide = known({n: adapter({"m": (13, 10, 2)}) for n in of})
    refused(ShapeError, "Gram of 13 features, expected 12", of, method="regmean", statistics=wide)
    refused(ShapeError, "got 13 and 10 numbers, expected 12 and 10", of, method="fisher", statistics=wide)


def test_importances_that_are_none(refused):
    of, good = parents(2), (np.ones(12), np.ones(10))
    for pair, error in (
        ((np.ones(12), np.full(10, -1.0)), NonFiniteError),
        ((np.full(12, np.nan), np.ones(10)), NonFiniteError),
        ((np.ones((3, 4)), np.ones(10)), ShapeError),
        ((np.ones(12),), DTypeError),
    ):
        stats = {"a": {"m": pair}, "b": {"m": good}}
        refused(error, r"statistics\['a'\]\['m'\]", of, method="fisher", statistics=stats)


# -- statistics out of a file --


def consolidation(decay=None, tasks=2):
    lora = ml.MicroLoRA(ml.LoraConfig(rank=2, target_modules=["q", "k"]), dims={"q": (9, 7), "k": (9, 5)})
    ewc = ml.EwcPlusPlus(lora, fisher_decay=decay, kind="delta")
    r = rng(3)
    for task in range(tasks):
        for module, n_out in (("q", 7), ("k", 5)):
            ewc.accumulate_fisher(normal(r, 20, 9), normal(r, 20, n_out), module)
        if task + 1 < tasks:
            ewc.start_new_task()
    ewc.grams = {m: ml.collect_gram(lora, normal(r, 30, 9), m) for m in ("q", "k")}
    return ewc


@pytest.mark.parametrize("decay", [None, 0.9])
@pytest.mark.parametrize("tasks", [1, 2, 3])
def test_a_file_says_what_its_consolidation_says(decay, tasks, tmp_path):
    ewc = consolidation(decay, tasks)
    live = statistics_of("a", ewc)
    saved = read(ewc.export_state())
    assert saved.grams == live.grams
    for module in ("q", "k"):
        for got, want in zip(saved.importance[module], live.importance[module], strict=True):
            np.testing.assert_allclose(got, want, rtol=1e-6)
    path = ewc.save(tmp_path / "x.safetensors")
    assert statistics_of("a", path).grams == live.grams
    assert statistics_of("a", tmp_path / "x.safetensors").grams == live.grams


def test_a_consolidation_without_samples_has_no_importance():
    lora = ml.MicroLoRA(ml.LoraConfig(rank=2, target_modules=["q"]), hidden_dim=6)
    ewc = ml.EwcPlusPlus(lora)
    assert statistics_of("a", ewc) == Statistics({}, {})
    assert read(ewc.export_state()) == Statistics({}, {})


def test_a_chain_has_statistics():
    w = normal(rng(), 5, 4)
    chain = ml.LoraChain([(w, None)], rank=2, head="mse")
    ewc = ml.EwcPlusPlus(chain)
    ewc.accumulate_fisher(normal(rng(1), 8, 4), normal(rng(2), 8, 5))
    assert set(statistics_of("a", ewc).importance) == {"layers.0"}


def test_files_that_are_none(tmp_path):
    good = consolidation().export_state()
    for data in (b"", b"x", good[:50], good[:-5], good.replace(b"moment_x", b"moment_y", 1)):
        with pytest.raises(FormatError):
            read(data)
    with pytest.raises(FormatError):
        read(ml.MicroLoRA(adapter()).export_weights())
    with pytest.raises(OSError, match="nowhere"):
        statistics_of("a", tmp_path / "nowhere.safetensors")


def test_grams_of_both_kinds_reach_the_core():
    one = adapter({"m": (12, 10, 3)})
    r = rng()
    low, diag = normal(r, 2, 12), np.full(12, 5.0, np.float32)
    thin = Gram(9, diag, low=low)
    full = Gram(9, diag, dense=thin.matrix())
    of = {"a": one, "b": adapter(seed=1)}
    made = [
        ml.merge(of, method="regmean", statistics={n: {"m": g} for n in of}).adapter for g in (thin, full)
    ]
    from merge_support import delta, distance

    assert distance(delta(made[0]), delta(made[1])) < 1e-4


def test_a_quantised_adapter_is_told_how_to_become_plain():
    pair = (np.ones((32, 32), np.float32), np.ones((32, 32), np.float32))
    plain = ml.Adapter.from_factors({"q": pair}, alpha=8.0)
    quantised = ml.quantize(plain, "q8_0").adapter
    with pytest.raises(DTypeError, match=r"\.dequantize\(\)"):
        ml.merge({"a": quantised, "b": plain})
