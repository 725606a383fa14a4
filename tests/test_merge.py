"""Every method against its float64 twin; random masks, ranks, dtypes, modules, and the ways in."""

import json

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

import microlora as ml
import reference_merge as twin
from merge_support import (
    ELEMENT,
    FACTOR,
    METHODS,
    TOLERANCE,
    TWO,
    adapter,
    cases,
    delta,
    deltas,
    dense_merge,
    distance,
    expected,
    factors,
    from_delta,
    known,
    merge,
    parents,
    some,
    stable,
)
from microlora.exceptions import CancelledError, ConfigError
from microlora.merging import methods
from microlora.progress import CancelToken
from support import rng

# -- twins --


@pytest.mark.parametrize("method", METHODS)
@given(of=cases(), data=st.data())
def test_a_method_is_its_twin(method, of, data):
    row = methods()[method]
    if method in TWO:
        of = dict(list(of.items())[:2])
    settings = {"lam": data.draw(st.sampled_from([1.0, -1.0, 0.0]) | st.floats(0.01, 2.0))}
    if row.takes("density"):
        settings["density"] = data.draw(st.sampled_from([0.3, 0.5, 0.8]))
    if row.takes("majority"):
        settings["majority"] = data.draw(st.sampled_from(["total", "frequency"]))
    weights = None
    if row.weights != "none" and data.draw(st.booleans()):
        # Elections by number end in draws, which only powers of two tell in every precision.
        sizes = st.sampled_from([0.25, 0.5, 1.0, 2.0])
        sizes = sizes if settings.get("majority") == "frequency" else sizes | st.floats(0.25, 4.0)
        weights = {name: data.draw(sizes) for name in of}
    if row.takes("normalize"):
        settings["normalize"] = data.draw(st.booleans())
    if row.takes("t"):
        settings["t"] = data.draw(st.sampled_from([0.0, 0.5, 1.0]) | st.floats(0.01, 0.99))
    assume(stable(of, method, weights=weights, **settings))
    got = dense_merge(of, method, weights=weights, **settings)
    want = expected(of, method, weights=weights, **settings)
    scale = max(np.linalg.norm(d) for d in deltas(of))
    assert np.linalg.norm(got - want) <= TOLERANCE[method] * max(scale, np.linalg.norm(want))


# The sketch of a full rank takes long at 768, and tests nothing that smaller shapes do not.
SIZES = [(96, 200, 8), (1, 7, 1), (7, 1, 1)]


@pytest.mark.parametrize(
    ("method", "shape"), [(m, s) for m in METHODS for s in SIZES + [(768, 768, 16)] * (m in FACTOR)]
)
def test_a_method_is_its_twin_at_other_sizes(method, shape):
    of = some(method, shapes={"m": shape})
    got, want = dense_merge(of, method), expected(of, method)
    assert distance(got, want) <= TOLERANCE[method] or np.linalg.norm(want) == 0


@pytest.mark.parametrize("method", [m for m in METHODS if "mergekit" in methods()[m].semantics])
def test_mergekit_is_its_twin(method):
    of = some(method)
    got = dense_merge(of, method, semantics="mergekit")
    assert distance(got, expected(of, method, semantics="mergekit")) < 1e-4
    if method in ("dare_linear", "dare_ties", "della", "della_linear", "sce"):
        assert distance(got, expected(of, method)) > 1e-2


def test_an_element_wise_result_is_nearly_the_best_of_its_rank():
    of = parents(3, {"m": (96, 64, 8)})
    for method in ELEMENT:
        made, report = merge(of, method, rank=8)
        want = expected(of, method)
        assert distance(delta(made), want) <= 1.001 * twin.best_error(want, 8) + 1e-6, method
        assert report["m"].error == pytest.approx(distance(delta(made), want), rel=2e-2, abs=1e-5), method


@given(cases(), st.integers(1, 8))
def test_a_truncated_sum_is_the_best_of_its_rank(of, rank):
    ranks = sum(one.info("m").rank for one in of.values())
    assume(rank <= ranks)
    made, report = ml.merge(of, method="average", rank=rank, dtype="f32")
    want = twin.average(deltas(of))
    scale = np.linalg.norm(want)
    assert made.info("m").rank == rank
    best = twin.resize(want, rank=rank)
    assert np.linalg.norm(delta(made) - want) <= best.error * scale * (1 + 1e-4) + 2e-5 * scale
    assert report["m"].energy_kept == pytest.approx(best.energy, abs=1e-5)


# -- random masks --

RANDOM = [name for name in METHODS if methods()[name].takes("seed")]


@pytest.mark.parametrize("method", RANDOM)
def test_a_seed_decides_and_another_decides_otherwise(method):
    of = parents(2, {"m": (40, 30, 4)})
    one, same, other = (dense_merge(of, method, seed=s) for s in (1, 1, 2))
    assert np.array_equal(one, same)
    assert not np.array_equal(one, other)


@pytest.mark.parametrize("method", RANDOM)
def test_a_mask_hangs_on_the_names_of_parent_and_module(method):
    one = adapter({"m": (40, 30, 4)})
    here = dense_merge({"a": one}, method, density=0.5)
    assert not np.array_equal(here, dense_merge({"b": one}, method, density=0.5))
    both = adapter({"n": (40, 30, 4), "m": (40, 30, 4)})
    made = ml.merge({"a": both}, method=method, density=0.5, rank=30).adapter
    kept = [np.abs(delta(made, m)) > 1e-3 * np.abs(delta(both, m)) for m in "mn"]
    assert not np.array_equal(*kept)


def test_masks_do_not_depend_on_the_number_of_threads():
    of = parents(2, {"m": (300, 200, 4)})
    before = ml.num_threads()
    try:
        made = []
        for n in (1, 4):
            ml.set_num_threads(n)
            made.append(delta(ml.merge(of, method="dare_linear", rank=8).adapter))
    finally:
        ml.set_num_threads(before)
    assert np.array_equal(*made)


def test_dare_is_right_in_the_mean():
    of = parents(2, {"m": (8, 6, 2)})
    total = sum(dense_merge(of, "dare_linear", density=0.5, seed=s) for s in range(300)) / 300
    want = twin.average(deltas(of))
    # One entry's deviation is |w D| sqrt((1 - p) / p / 300).
    assert np.abs(total - want).max() < 5 * np.abs(np.stack(deltas(of))).max() / np.sqrt(300)


def test_the_share_that_dare_keeps():
    one = adapter({"m": (100, 80, 4)})
    got = dense_merge({"a": one}, "dare_linear", density=0.3)
    share = (np.abs(got) > 1e-3 * np.abs(delta(one))).mean()
    assert abs(share - 0.3) < 4 * np.sqrt(0.3 * 0.7 / 8000)
    assert distance(dense_merge({"a": one}, "dare_linear", density=1.0), delta(one)) < 1e-4


# -- ranks, dtypes, exactness --


def test_the_default_rank_is_the_sum_or_the_largest():
    of = {"a": adapter({"m": (20, 16, 2)}), "b": adapter({"m": (20, 16, 5)}, 1)}
    for method in METHODS:
        rank = merge(of, method).adapter.info("m").rank
        assert rank == (7 if method in FACTOR else 5), method


@pytest.mark.parametrize(
    ("one", "two", "want"),
    [("f16", "f16", "f16"), ("bf16", "bf16", "bf16"), ("f16", "bf16", "f32"), ("f32", "bf16", "f32")],
)
def test_the_dtype_is_the_widest(one, two, want):
    of = {"a": adapter(dtype=one), "b": adapter(seed=1, dtype=two)}
    for method in ("linear", "ties"):
        info = ml.merge(of, method=method).adapter.info("m")
        assert (info.dtype_a, info.dtype_b) == (want, want)
    assert ml.merge(of, method="linear", dtype="bf16").adapter.info("m").dtype_a == "bf16"


def test_a_zero_that_stands_in_has_no_say_in_the_dtype():
    shapes = {"m": (12, 10, 3), "n": (12, 10, 3), "o": (12, 10, 3)}
    low, odd = adapter(shapes, dtype="bf16"), adapter({"o": (12, 10, 3)}, 2, dtype="f16")
    other = adapter({"m": (12, 10, 3)}, 1, dtype="bf16")
    for method in ("linear", "ties"):
        made = ml.merge({"a": low, "b": other, "c": odd}, method=method, missing="zero").adapter
        assert [made.info(m).dtype_a for m in shapes] == ["bf16", "bf16", "f32"]
        assert distance(delta(made, "n"), 0 * delta(low, "n")) > 0.1


def test_a_sum_leaves_a_untouched():
    of = parents(2)
    made = ml.merge(of, method="cat", weights={"a": 2.0, "b": -3.0}).adapter
    stacked = np.vstack([one.lora_a("m") for one in of.values()])
    assert np.array_equal(made.lora_a("m"), stacked)
    assert not made.info("m").use_rslora


@pytest.mark.parametrize("method", METHODS)
def test_parents_of_zero_give_zero(method):
    a, b = factors(rng(), 12, 10, 3)
    zero = ml.Adapter.from_factors({"m": (a, 0 * b)}, alpha=6.0)
    of = {"a": zero, "b": zero}
    assert np.array_equal(dense_merge(of, method, statistics=known(of, shared=True)), np.zeros((10, 12)))


@pytest.mark.parametrize("method", METHODS)
def test_one_parent_of_zero_is_never_nan(method):
    a, b = factors(rng(), 12, 10, 3)
    of = {"a": adapter(), "b": ml.Adapter.from_factors({"m": (a, 0 * b)}, alpha=6.0)}
    assert np.isfinite(dense_merge(of, method)).all()


def test_opposites_and_duplicates():
    one = adapter()
    for method in FACTOR:
        for other in (one, -one, 2.0 * one):
            assert np.isfinite(dense_merge({"a": one, "b": other}, method)).all(), method
    assert distance(dense_merge({"a": one, "b": -one}, "average"), 0 * delta(one)) < 1e-6


def test_subtracting_what_was_added():
    of = parents(2)
    both = ml.merge(of, method="task_arithmetic").adapter
    left = ml.merge({"ab": both, "b": of["b"]}, method="task_arithmetic", weights={"ab": 1, "b": -1}).adapter
    assert distance(delta(left), delta(of["a"])) < 1e-5


def test_ranks_that_are_deficient():
    a, b = factors(rng(), 12, 10, 4)
    a[3] = a[0]
    one = ml.Adapter.from_factors({"m": (a, b)}, alpha=4.0)
    made, report = ml.merge({"a": one, "b": one}, method="average", rank=3)
    assert distance(delta(made), delta(one)) < 1e-5
    assert report["m"].error < 1e-3


@pytest.mark.parametrize("seed", range(40))
def test_more_rows_than_the_shape_holds(seed):
    """Ranks that add up to more than a width: Grams are singular, the result is exact all the same."""
    r = rng(seed)
    n_in, n_out, m = (int(r.integers(low, high)) for low, high in ((2, 9), (2, 9), (2, 5)))
    of = {}
    for i in range(m):
        rank = int(r.integers(1, min(n_in, n_out, 6) + 1))
        of[f"p{i}"] = adapter({"m": (n_in, n_out, rank)}, int(r.integers(2**16)), alpha=r.uniform(0.1, 32.0))
    made, report = ml.merge(of, method="average")
    want, size = twin.average(deltas(of)), max(np.linalg.norm(d) for d in deltas(of))
    assert np.linalg.norm(delta(made) - want) <= 1e-5 * size
    assert report["m"].norm == pytest.approx(np.linalg.norm(want), abs=1e-5 * size)


# -- modules --

SHAPES = {"q": (12, 10, 3), "k": (12, 8, 2), "v": (9, 9, 2)}


def three():
    return {
        "a": adapter({"q": SHAPES["q"], "k": SHAPES["k"]}, 1),
        "b": adapter({"q": SHAPES["q"], "v": SHAPES["v"]}, 2),
        "c": adapter({"q": SHAPES["q"], "k": SHAPES["k"]}, 3),
    }


@pytest.mark.parametrize("method", ["average", "linear", "task_arithmetic", "multislerp", "karcher"])
@pytest.mark.parametrize("missing", ["skip", "zero", "common"])
def test_policies_for_missing_modules(method, missing):
    of = three()
    dense = {n: {m: delta(one, m) for m in one.modules()} for n, one in of.items()}
    made = ml.merge(of, method=method, missing=missing).adapter
    for module in SHAPES:
        there = twin.present(dense, module, missing)
        if there is None:
            assert module not in made.modules()
            continue
        want = getattr(twin, method)([d for _, d in there])
        assert distance(delta(made, module), want) < 1e-5, module
        ranks = [one.info(module).rank for one in of.values() if module in one.modules()]
        assert made.info(module).rank == sum(ranks)


def test_modules_come_in_the_order_of_first_appearance():
    assert ml.merge(three()).adapter.modules() == ["q", "k", "v"]


def test_a_rank_that_some_modules_cannot_have_is_noted():
    made, report = ml.merge(three(), method="linear", rank=6)
    assert [made.info(m).rank for m in "qkv"] == [6, 4, 2]
    (note,) = report.notes
    assert "below rank 6" in note
    assert note.endswith("linear is exact: k (4), v (2)")
    assert note.split(":")[0] in str(report).replace("\n", " ")
    assert ml.merge(three(), method="linear", rank=2).report.notes == ()


@pytest.mark.parametrize("method", list(methods("peft")))
def test_peft_turns_every_type_into_linear_where_there_is_one_adapter(method):
    one = adapter({"m": (12, 10, 3)})
    rank = {} if method == "cat" else {"rank": 7}
    made, report = ml.merge({"a": one}, method=method, semantics="peft", weights={"a": 0.5}, **rank)
    assert distance(delta(made), 0.5 * delta(one)) < 1e-6
    assert made.info("m").rank == 3
    assert any("rank is ignored" in n for n in report.notes) == (method != "cat")


def test_what_only_one_has_goes_through_every_other_method():
    of = {n: a for n, a in three().items() if n != "c"}
    alone = {"b": ml.Adapter.from_factors({"v": of["b"].factors("v")}, alpha=of["b"].info("v").alpha)}
    for method in set(METHODS) - {"slerp", "nuslerp", "model_stock", "regmean", "fisher"}:
        weights = None if methods()[method].weights == "none" else {"a": 1.0, "b": 0.5}
        made = ml.merge(of, method=method, weights=weights).adapter
        weights = weights and {"b": 0.5}
        assert (
            distance(delta(made, "v"), delta(ml.merge(alone, method=method, weights=weights).adapter, "v"))
            < 1e-6
        ), method
    assert distance(delta(ml.merge(of, method="ties").adapter, "v"), delta(of["b"], "v")) > 0.1


def test_peft_merges_what_only_some_have_at_their_rank():
    a, b = adapter({"m": (20, 16, 4), "n": (20, 16, 4)}), adapter({"m": (20, 16, 4)}, 1)
    for method in methods("peft"):
        made = ml.merge({"a": a, "b": b}, method=method, semantics="peft").adapter
        assert made.info("n").rank == 4, method


@pytest.mark.parametrize("method", ["slerp", "nuslerp", "model_stock", "regmean", "fisher"])
def test_what_only_one_has_is_taken_as_it_is(method):
    of = {n: a for n, a in three().items() if n != "c"}
    stats = known(of) if methods()[method].statistics else None
    made = ml.merge(of, method=method, statistics=stats, lam=0.5).adapter
    assert distance(delta(made, "v"), 0.5 * delta(of["b"], "v")) < 1e-5


def test_overrides_by_pattern():
    of = {n: a for n, a in three().items() if n != "b"}
    rules = {"q": {"method": "slerp", "t": 0.25}, "*": {"lam": 0.5}}
    made, report = ml.merge(of, method="linear", overrides=rules)
    assert distance(delta(made, "q"), twin.slerp(deltas(of, "q"), 0.25)) < 1e-5
    assert distance(delta(made, "k"), 0.5 * twin.average(deltas(of, "k"))) < 1e-5
    assert [m.method for m in report.modules] == ["slerp", "linear"]


# -- ways in --


def test_learners_paths_and_pairs(tmp_path):
    of = parents(2)
    ml.save(of["a"], tmp_path / "a.safetensors")
    ml.save(of["b"], tmp_path / "b")
    want = delta(ml.merge(of).adapter)
    for sources in (
        list(of.items()),
        {n: ml.MicroLoRA(one) for n, one in of.items()},
        {"a": tmp_path / "a.safetensors", "b": str(tmp_path / "b")},
    ):
        assert distance(delta(ml.merge(sources).adapter), want) < 1e-6


def test_statistics_lie_beside_parents_that_were_given_by_path(tmp_path):
    of = parents(2)
    stats = known(of)
    for name, one in of.items():
        ml.save(one, tmp_path / f"{name}.safetensors")
        ewc = ml.EwcPlusPlus(ml.MicroLoRA(one))
        ewc.grams = dict(stats[name].grams)
        ewc.save(tmp_path / f"{name}.safetensors")
    paths = {n: tmp_path / f"{n}.safetensors" for n in of}
    got = delta(ml.merge(paths, method="regmean").adapter)
    assert np.array_equal(got, delta(ml.merge(of, method="regmean", statistics=stats).adapter))
    assert np.array_equal(got, delta(ml.merge(of, method="regmean", statistics=paths).adapter))


def test_a_merger_is_the_function():
    of = parents(2)
    config = ml.MergeConfig.ties(0.5, rank=3)
    merger = ml.AdapterMerger(config)
    assert merger.config is config
    got = merger.merge(of)
    assert (
        delta(got.adapter).tolist()
        == delta(ml.merge(of, method="ties", density=0.5, rank=3).adapter).tolist()
    )


def test_the_result_says_what_it_is(tmp_path):
    of = parents(2)
    said = ml.AdapterMetadata(base_model="m-1", base_fingerprint="f", task_types=("x",), training_size=5)
    of = {n: one.with_metadata(said) for n, one in of.items()}
    made = ml.merge(of, method="weighted", weights={"a": 1, "b": 3}).adapter
    assert made.metadata.parents == ("a", "b")
    assert (made.metadata.base_model, made.metadata.base_fingerprint) == ("m-1", "f")
    assert (made.metadata.task_types, made.metadata.training_size) == (("x",), 10)
    assert made.metadata.created.endswith("Z")
    recipe = made.config.description.removeprefix("merge ")
    assert ml.MergeConfig.from_json(recipe) == ml.MergeConfig.weighted({"a": 1, "b": 3})
    for path in (tmp_path / "x.safetensors", tmp_path / "peft"):
        ml.save(made, path)
        assert distance(delta(ml.load(path)), delta(made)) < 1e-6
    assert ml.load(tmp_path / "x.safetensors").config == made.config


def test_a_known_base_outlives_a_parent_that_knows_none():
    said = [ml.AdapterMetadata(base_fingerprint=f) for f in ("", "A", "B")]
    a, b, c = (one.with_metadata(m) for one, m in zip(parents(3).values(), said, strict=True))
    plain = adapter(seed=9)
    for both in (a + b, b + a, plain + b, ml.merge({"a": a, "b": b}).adapter, ml.compose_parallel([b, a])):
        assert both.metadata.base_fingerprint == "A"
        with pytest.raises(ConfigError, match="different base weights"):
            both + c


# -- long work --


def test_progress_and_cancel():
    of, seen = three(), []
    ml.merge(of, progress=lambda done, total, what: seen.append((done, total, what)))
    assert seen[0][0] == 0
    assert seen[-1][:2] == (3, 3)
    token = CancelToken()
    with pytest.raises(CancelledError):
        ml.merge(of, cancel=token, progress=lambda *_: token.cancel())
    with pytest.raises(CancelledError):
        ml.merge(of, cancel=token)


def test_an_exception_of_the_callback_comes_out():
    def stop(*_):
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        ml.merge(three(), progress=stop)


def test_from_delta_is_what_it_says():
    d = rng().standard_normal((5, 7))
    assert distance(delta(from_delta(d)), d) < 1e-6


def test_settings_reach_the_core_as_json():
    text = ml.MergeConfig.ties(0.5).to_json()
    assert json.loads(text)["density"] == 0.5
