"""Exact sums by operators, and adapters one after another and side by side."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import microlora as ml
import reference_merge as twin
from merge_support import adapter, cases, delta, deltas, distance, parents, with_extra
from microlora.exceptions import ConfigError, DTypeError, ShapeError
from support import close, normal, rng

SQUARE = {"m": (10, 10, 3)}

# -- operators --


@given(cases(), st.sampled_from([0.5, -2.0, 1e-3, 7.25]))
def test_operators_are_exact_sums(of, c):
    one, two, *_ = of.values()
    a, b = delta(one), delta(two)
    size = max(np.linalg.norm(a), np.linalg.norm(b))
    for got, want in (
        (one + two, a + b),
        (one - two, a - b),
        (-one, -a),
        (c * one, c * a),
        (one * c, c * a),
        (one / c, a / c),
    ):
        low = "f32" not in (got.info("m").dtype_a, got.info("m").dtype_b)
        assert np.linalg.norm(delta(got) - want) <= (1e-2 if low else 1e-6) * max(size, np.linalg.norm(want))


def test_ranks_add_and_scalars_go_into_alpha():
    one, two = parents(2).values()
    assert (one + two).info("m").rank == 6
    half = 0.5 * one
    assert half.info("m").alpha == one.info("m").alpha / 2
    assert all(np.array_equal(x, y) for x, y in zip(half.raw("m"), one.raw("m"), strict=True))
    turned = -one
    assert np.array_equal(turned.lora_b("m"), -one.lora_b("m"))
    assert turned.info("m").alpha == one.info("m").alpha


def test_a_module_of_one_alone():
    a, b = adapter({"x": (6, 5, 2), "m": (12, 10, 3)}), adapter({"m": (12, 10, 3), "y": (4, 4, 1)}, 1)
    both = a - b
    assert both.modules() == ["x", "m", "y"]
    assert distance(delta(both, "x"), delta(a, "x")) < 1e-6
    assert distance(delta(both, "y"), -delta(b, "y")) < 1e-6


def test_zero_times_an_adapter_is_zero():
    assert not delta(0 * adapter()).any()
    one = adapter()
    assert distance(delta(one + -one), 0 * delta(one)) < 1e-6


def test_what_is_no_number_and_no_adapter():
    one = adapter()
    for wrong in ("2", None, [1.0], True):
        with pytest.raises(TypeError):
            one * wrong
        with pytest.raises(TypeError):
            one + wrong
        with pytest.raises(TypeError):
            one / wrong
    with pytest.raises(TypeError):
        one * one
    with pytest.raises(TypeError):
        1.0 / one
    with pytest.raises(ZeroDivisionError):
        one / 0
    for number in (float("nan"), float("inf")):
        with pytest.raises(ConfigError, match="factor"):
            one * number
    with pytest.raises(ShapeError, match="m: got"):
        one + adapter({"m": (12, 9, 3)})


def test_numbers_of_numpy():
    one = adapter()
    for c in (np.float64(0.5), np.float32(0.5), np.array(0.5)):
        assert isinstance(c * one, ml.Adapter)
        assert (one * c).info("m").alpha == one.info("m").alpha / 2


def test_parents_and_settings_of_a_sum(tmp_path):
    one, two = parents(2).values()
    both = one + two
    assert both.config.rank == 6
    assert both.metadata.created
    ml.save(both, tmp_path / "x")
    assert distance(delta(ml.load(tmp_path / "x")), delta(both)) < 1e-6


def test_operands_stay():
    one, two = parents(2).values()
    before = one.to_bytes(), two.to_bytes()
    _ = one + two, one - two, -one, 3 * one
    assert (one.to_bytes(), two.to_bytes()) == before


def test_tensors_that_are_left_out_are_told_once_a_call(tmp_path, caplog):
    a, b = with_extra(adapter(SQUARE), tmp_path / "x"), adapter(SQUARE, 1)
    calls = [lambda: a + b, lambda: b - a, lambda: -a, lambda: 2 * a, lambda: ml.compose_parallel([a, b])]
    for call in [*calls, lambda: ml.compose_sequential([a, b])]:
        caplog.clear()
        assert call().extra_tensors() == {}
        (record,) = caplog.records
        assert (record.levelname, record.name) == ("WARNING", "microlora.merging.compose")
        assert "head.weight" in record.message
    caplog.clear()
    _ = b + b
    assert not caplog.records


@pytest.mark.parametrize("call", [ml.compose_parallel, ml.compose_sequential, ml.RoutedEnsemble])
def test_what_is_no_list_of_adapters(call):
    more = (lambda x: x,) if call is ml.RoutedEnsemble else ()
    with pytest.raises(ConfigError, match="expected a list of at least one adapter"):
        call([], *more)
    for wrong in ({"a": adapter(SQUARE)}, {}, "ab", 3, {adapter(SQUARE)}):
        with pytest.raises(DTypeError, match="expected a list of adapters"):
            call(wrong, *more)


# -- one after another --


@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("k", [1, 2, 3, 4])
def test_a_sequence_is_its_twin(k, residual):
    of = parents(k, SQUARE)
    made = ml.compose_sequential(list(of.values()), residual=residual)
    assert distance(delta(made), twin.compose_sequential(deltas(of), residual=residual)) < 1e-5
    assert made.info("m").rank == (3 * k if residual else 3)


def test_a_sequence_does_what_the_adapters_do():
    a, b = parents(2, SQUARE).values()
    x = normal(rng(), 5, 10)

    def run(one, v):
        return ml.MicroLoRA(one).forward(v, "m")

    after = x + run(a, x)
    close(run(ml.compose_sequential([a, b]), x), after + run(b, after) - x, 1e-4)
    close(run(ml.compose_sequential([a, b], residual=False), x), run(b, run(a, x)), 1e-4)


def test_a_sequence_of_widths():
    a, b, c = (adapter({"m": shape}, i) for i, shape in enumerate([(8, 6, 2), (6, 4, 3), (4, 5, 1)]))
    made = ml.compose_sequential([a, b, c], residual=False)
    assert distance(delta(made), delta(c) @ delta(b) @ delta(a)) < 1e-5
    assert made.dims == {"m": (8, 5)}


def test_a_module_that_one_lacks_stays_as_it_is():
    a, b = adapter({"m": (10, 10, 3), "n": (6, 6, 2)}), adapter(SQUARE, 1)
    made = ml.compose_sequential([a, b])
    assert distance(delta(made, "n"), delta(a, "n")) < 1e-6
    with pytest.raises(ConfigError, match="n"):
        ml.compose_sequential([a, b], residual=False)


def test_sequences_that_do_not_fit():
    with pytest.raises(ShapeError, match="m"):
        ml.compose_sequential([adapter(), adapter(seed=1)])
    with pytest.raises(ShapeError, match="m"):
        ml.compose_sequential([adapter(), adapter(seed=1)], residual=False)


# -- side by side --


def test_an_average_and_a_sum_by_weights():
    of = parents(3)
    made = ml.compose_parallel(list(of.values()))
    assert distance(delta(made), twin.average(deltas(of))) < 1e-6
    made = ml.compose_parallel(list(of.values()), weights=[1.0, -0.5, 2])
    assert distance(delta(made), twin.task_arithmetic(deltas(of), [1.0, -0.5, 2.0])) < 1e-6
    assert made.info("m").rank == 9
    assert made.metadata.parents == ("0", "1", "2")


@pytest.mark.parametrize("compose", [ml.compose_parallel, ml.compose_sequential])
def test_no_adapters(compose):
    with pytest.raises(ConfigError, match="at least one"):
        compose([])
    for wrong in (3, "ab", None):
        with pytest.raises(DTypeError, match="adapters"):
            compose(wrong)
    with pytest.raises(DTypeError, match=r"adapters\['1'\]: got int"):
        compose([adapter(), 3])


@pytest.mark.parametrize(
    ("weights", "error"),
    [
        ([1.0], ShapeError),
        ([[1.0, 1.0]], ShapeError),
        (1.0, ShapeError),
        ([1.0, float("nan")], ConfigError),
        (["a", "b"], DTypeError),
    ],
)
def test_bad_weights(weights, error):
    with pytest.raises(error, match="weights"):
        ml.compose_parallel(list(parents(2).values()), weights=weights)
