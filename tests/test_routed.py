import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import microlora as ml
import reference_merge as twin
from merge_support import adapter, parents
from microlora import CentroidRouter, RoutedEnsemble
from microlora.exceptions import (
    ConfigError,
    DTypeError,
    FormatError,
    LayoutError,
    NonFiniteError,
    ShapeError,
    UnknownModuleError,
)
from support import close, normal, rng

SHAPES = {"m": (12, 10, 3)}


def members(k=3):
    return list(parents(k, SHAPES).values())


def outputs(adapters, x, module="m"):
    return [ml.MicroLoRA(a).forward(x, module) for a in adapters]


def fixed(*weights):
    """A router that gives every row these weights."""
    return lambda x: np.tile(np.float32(weights), (len(x), 1))


# -- weights --


@given(st.integers(1, 5), st.integers(1, 9), st.floats(0.05, 10.0), st.booleans(), st.integers(0, 99))
def test_centroids_are_their_twin(k, d, temperature, hard, seed):
    r = rng(seed)
    centroids, x = normal(r, k, d), normal(r, 6, d)
    router = CentroidRouter(centroids, temperature=temperature, hard=hard)
    got, want = router.weights(x), twin.route(x, centroids, temperature, hard)
    np.testing.assert_allclose(got, want, atol=2e-4)
    np.testing.assert_allclose(got.sum(1), 1.0, atol=1e-6)
    assert got.dtype == np.float32
    np.testing.assert_allclose(router.weights(x[2]), got[2], atol=2e-4)
    alike = router.weights(0 * x[0])
    assert np.array_equal(alike, np.eye(k)[0] if hard else np.full(k, np.float32(1 / k)))


def test_small_temperatures_go_to_the_nearest():
    x, centroids = normal(rng(), 8, 4), normal(rng(1), 3, 4)
    near = CentroidRouter(centroids, temperature=1e-6).weights(x)
    np.testing.assert_allclose(near, CentroidRouter(centroids, hard=True).weights(x), atol=1e-6)


def test_a_router_is_a_value():
    router = CentroidRouter(normal(rng(), 3, 4), temperature=0.3, hard=True)
    again = CentroidRouter.from_json(router.to_json())
    assert again == router
    assert hash(again) == hash(router)
    assert again.centroids.tobytes() == router.centroids.tobytes()
    assert router != router.replace(hard=False)
    assert "3 centroids of 4" in repr(router)
    with pytest.raises(ValueError, match="read-only"):
        router.centroids[0] = 1.0


# -- laws --


@pytest.mark.parametrize("n", [None, 1, 7])
def test_one_member_is_that_adapter(n):
    one = members(1)
    x = normal(rng(), 12) if n is None else normal(rng(), n, 12)
    got = RoutedEnsemble(one, CentroidRouter(np.ones((1, 12)))).forward(x, "m")
    assert np.array_equal(got, outputs(one, x)[0])


def test_one_hot_is_the_member_itself():
    of, x = members(), normal(rng(), 9, 12)
    router = CentroidRouter(normal(rng(1), 3, 12), hard=True)
    pi, each = router.weights(x), outputs(of, x)
    got = RoutedEnsemble(of, router).forward(x, "m")
    for i, k in enumerate(pi.argmax(1)):
        close(got[i], each[k][i], 1e-6)


def test_equal_weights_are_the_concatenated_adapter():
    of, x = members(), normal(rng(), 9, 12)
    got = ml.compose_parallel(of, weights=fixed(1 / 3, 1 / 3, 1 / 3)).forward(x, "m")
    close(got, ml.MicroLoRA(ml.compose_parallel(of)).forward(x, "m"), 1e-5)


@given(st.integers(0, 99), st.floats(0.05, 2.0))
def test_outputs_are_mixed_by_weights(seed, temperature):
    of, x = members(), normal(rng(seed), 5, 12)
    router = CentroidRouter(normal(rng(seed + 1), 3, 12), temperature=temperature)
    got = RoutedEnsemble(of, router).forward(x, "m")
    want = sum(router.weights(x)[:, k, None].astype(float) * y for k, y in enumerate(outputs(of, x)))
    close(got, want, 1e-5)
    close(RoutedEnsemble(of, router).forward(x[1], "m"), want[1], 1e-5)


def test_only_members_with_weight_are_evaluated(monkeypatch):
    of, x = members(), normal(rng(), 6, 12)
    seen = []
    forward = ml.MicroLoRA.forward
    monkeypatch.setattr(
        ml.MicroLoRA, "forward", lambda self, v, *a: seen.append(len(v)) or forward(self, v, *a)
    )
    pi = np.zeros((6, 3), np.float32)
    pi[:4, 0], pi[4:, 2] = 1.0, 1.0
    RoutedEnsemble(of, lambda _: pi).forward(x, "m")
    assert seen == [4, 2]


@pytest.mark.filterwarnings("error")
def test_what_float32_cannot_hold_is_refused_without_a_warning():
    ensemble = RoutedEnsemble(members(1), lambda x: np.full((len(x), 1), 1e300))
    with pytest.raises(NonFiniteError, match="router"):
        ensemble.forward(np.ones(12), "m")
    with pytest.raises(NonFiniteError, match="x"):
        ensemble.forward(np.full(12, 1e300), "m")


# -- use --


def test_a_router_object_or_a_function():
    class Mine:
        def weights(self, x):
            return np.full((len(x), 3), 1 / 3)

    of, x = members(), normal(rng(), 4, 12)
    made = ml.compose_parallel(of, weights=Mine())
    assert isinstance(made, RoutedEnsemble)
    assert isinstance(made.router, Mine)
    close(made.forward(x), ml.compose_parallel(of, weights=fixed(1 / 3, 1 / 3, 1 / 3)).forward(x), 1e-6)


def test_out_is_filled_and_returned():
    of, x = members(), normal(rng(), 4, 12)
    ensemble = RoutedEnsemble(of, fixed(0.5, 0.25, 0.25))
    want, out = ensemble.forward(x, "m"), np.full((4, 10), 7, np.float32)
    assert ensemble.forward(x, "m", out) is out
    assert np.array_equal(out, want)


def test_modules_of_some_members():
    a, b = adapter({"m": (12, 10, 3), "n": (12, 5, 2)}), adapter(SHAPES, 1)
    ensemble = RoutedEnsemble([a, b], fixed(0.5, 0.5))
    assert ensemble.modules() == ["m", "n"]
    assert ensemble.dims == {"m": (12, 10), "n": (12, 5)}
    x = normal(rng(), 4, 12)
    close(ensemble.forward(x, "n"), 0.5 * outputs([a], x, "n")[0], 1e-6)
    assert len(ensemble) == 2
    assert "2 members" in repr(ensemble)
    with pytest.raises(ConfigError, match="module"):
        ensemble.forward(x)


def test_learners_are_taken_as_they_stand():
    lora = ml.MicroLoRA(adapter())
    ensemble = RoutedEnsemble([lora], fixed(1.0))
    x = normal(rng(), 12)
    before = ensemble.forward(x)
    lora.instant(x, ml.Target(normal(rng(1), 10)), "m")
    assert np.array_equal(ensemble.forward(x), before)
    assert ensemble.adapters[0] != lora.adapter()


# -- files --


def test_saved_and_loaded(tmp_path):
    of, x = members(), normal(rng(), 4, 12)
    ensemble = RoutedEnsemble(of, CentroidRouter(normal(rng(1), 3, 12), temperature=0.3))
    ensemble.save(tmp_path / "e")
    again = RoutedEnsemble.load(tmp_path / "e")
    assert again.adapters == ensemble.adapters
    assert again.router == ensemble.router
    assert np.array_equal(again.forward(x), ensemble.forward(x))
    names = sorted(p.name for p in (tmp_path / "e").iterdir())
    assert names == ["ensemble.json", *(f"member_{i}.safetensors" for i in range(3))]


def test_a_function_cannot_be_saved(tmp_path):
    with pytest.raises(ConfigError, match="CentroidRouter"):
        RoutedEnsemble(members(), fixed(1, 0, 0)).save(tmp_path / "e")
    assert not (tmp_path / "e").exists()


@pytest.mark.parametrize(
    "change",
    [
        {"members": ["../x.safetensors"]},
        {"members": "member_0.safetensors"},
        {"members": ["member_0.safetensors"]},
        {"members": []},
        {"router": {}},
        {"router": {"centroids": [["a"]]}},
        {"router": {"centroids": [[0.0], [0.0], [0.0]]}},
        {"more": 1},
        {"schema_version": 99},
    ],
    ids=str,
)
def test_a_directory_that_is_none(tmp_path, change):
    RoutedEnsemble(members(), CentroidRouter(normal(rng(), 3, 12))).save(tmp_path)
    file = tmp_path / "ensemble.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    with pytest.raises(FormatError):
        RoutedEnsemble.load(tmp_path)


# -- bad input --


def test_bad_routers():
    with pytest.raises(DTypeError, match="router"):
        RoutedEnsemble(members(), 3)
    with pytest.raises(ShapeError, match="2 centroids, expected 3"):
        RoutedEnsemble(members(), CentroidRouter(np.ones((2, 12))))
    for centroids in ([1.0], [[[1.0]]], np.ones((0, 3))):
        with pytest.raises(ShapeError, match="centroids"):
            CentroidRouter(centroids)
    with pytest.raises(NonFiniteError, match="centroids"):
        CentroidRouter([[np.nan]])
    with pytest.raises(ConfigError, match=r"centroids\[1\]"):
        CentroidRouter([[1.0], [0.0]])
    for temperature in (0.0, -1.0, np.nan, "1"):
        with pytest.raises(ConfigError, match="temperature"):
            CentroidRouter([[1.0]], temperature=temperature)
    with pytest.raises(ConfigError, match="hard"):
        CentroidRouter([[1.0]], hard=1)


def test_bad_members():
    with pytest.raises(ConfigError, match="at least one"):
        RoutedEnsemble([], fixed(1))
    with pytest.raises(DTypeError, match="adapters"):
        RoutedEnsemble("ab", fixed(1))
    with pytest.raises(ShapeError, match="m: got"):
        RoutedEnsemble([adapter(), adapter({"m": (12, 9, 1)})], fixed(1, 0))


def test_bad_weights_of_a_router_leave_out_alone():
    of, x, out = members(), normal(rng(), 4, 12), np.full((4, 10), 7, np.float32)
    for weights, error in (((1, 0), ShapeError), ((np.nan, 0, 0), NonFiniteError)):
        with pytest.raises(error, match="router"):
            RoutedEnsemble(of, fixed(*weights)).forward(x, "m", out)
    assert (out == 7).all()


def test_bad_calls():
    ensemble, x = RoutedEnsemble(members(), fixed(0.5, 0.5, 0)), normal(rng(), 4, 12)
    with pytest.raises(UnknownModuleError, match="mm"):
        ensemble.forward(x, "mm")
    for wrong in (x[:, :5], x[None], np.float32(1.0)):
        with pytest.raises(ShapeError, match="x"):
            ensemble.forward(wrong, "m")
    with pytest.raises(DTypeError, match="x"):
        ensemble.forward(np.ones((4, 12), int), "m")
    bad = x.copy()
    bad[2, 3] = np.nan
    with pytest.raises(NonFiniteError, match="x"):
        ensemble.forward(bad, "m")
    with pytest.raises(ShapeError, match="out"):
        ensemble.forward(x, "m", np.zeros((4, 9), np.float32))
    with pytest.raises(DTypeError, match="out"):
        ensemble.forward(x, "m", np.zeros((4, 10)))
    with pytest.raises(LayoutError, match="out"):
        ensemble.forward(x, "m", np.zeros((10, 4), np.float32).T)
