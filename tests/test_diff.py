import math

import numpy as np
import pytest
from hypothesis import given

import microlora as ml
import reference_merge as twin
from merge_support import adapter, cases, delta, parents
from microlora.exceptions import ConfigError, ShapeError
from microlora.merging import DiffReport

SHAPES = {"q": (12, 10, 3), "k": (8, 6, 2)}


@given(cases(most=2))
def test_figures_are_those_of_the_dense_deltas(of):
    one, two = of.values()
    row = ml.diff(one, two)["m"]
    a, b = delta(one), delta(two)
    assert row.cosine == pytest.approx(twin.cosine(a, b), abs=1e-5)
    assert row.norm_a == pytest.approx(twin.norm(a), rel=1e-5)
    assert row.norm_b == pytest.approx(twin.norm(b), rel=1e-5)
    assert row.norm_diff == pytest.approx(twin.norm(a - b), rel=1e-5, abs=1e-5 * row.norm_a)
    (read_a, write_a), (read_b, write_b) = one.factors("m"), two.factors("m")
    # Arcs near 0 are known to the root of rounding of what spans them.
    np.testing.assert_allclose(row.angles_in, twin.angles(read_a, read_b), atol=2e-3)
    np.testing.assert_allclose(row.angles_out, twin.angles(write_a.T, write_b.T), atol=2e-3)


def test_with_itself():
    one = adapter(SHAPES)
    for row in ml.diff(one, one).modules:
        assert row.cosine == pytest.approx(1.0)
        assert row.norm_diff <= 1e-6 * row.norm_a
        assert max(row.angles_in) < 1e-3
        assert max(row.angles_out) < 1e-3


def test_with_its_opposite_and_its_double():
    one = adapter(SHAPES)
    assert ml.diff(one, -one)["q"].cosine == pytest.approx(-1.0)
    row = ml.diff(one, 2.0 * one)["q"]
    assert (row.cosine, row.norm_b / row.norm_a) == (pytest.approx(1.0), pytest.approx(2.0))


def test_subspaces_that_are_known():
    eye = np.eye(6, dtype=np.float32)
    a = ml.Adapter.from_factors({"m": (eye[:2], eye[:, :2])}, alpha=2.0)
    b = ml.Adapter.from_factors({"m": (eye[1:3], eye[:, 4:6])}, alpha=2.0)
    row = ml.diff(a, b)["m"]
    assert row.angles_in == pytest.approx([0.0, math.pi / 2], abs=1e-6)
    assert row.angles_out == pytest.approx([math.pi / 2] * 2, abs=1e-6)
    assert row.cosine == pytest.approx(0.0, abs=1e-7)


def test_modules_of_one_alone():
    a = adapter({"q": SHAPES["q"], "x": (4, 4, 1)})
    b = adapter({"y": (4, 4, 1), "q": SHAPES["q"]}, 1)
    report = ml.diff(a, b)
    assert [m.name for m in report.modules] == ["q"]
    assert (report.only_a, report.only_b) == (("x",), ("y",))
    assert "only in a: x" in str(report)


def test_printed_and_as_json():
    report = ml.diff(*parents(2, SHAPES).values())
    assert DiffReport.from_json(report.to_json()) == report
    lines = str(report).splitlines()
    assert lines[0].split()[:2] == ["module", "cosine"]
    assert max(map(len, lines)) <= 110
    assert "°" in lines[1]


def test_a_delta_of_zero_has_no_direction():
    one = adapter()
    row = ml.diff(one, 0.0 * one)["m"]
    assert row.cosine is None
    assert row.norm_b == 0.0


def test_paths(tmp_path):
    of = parents(2)
    ml.save(of["a"], tmp_path / "a")
    assert ml.diff(tmp_path / "a", of["b"]).modules == ml.diff(of["a"], of["b"]).modules


def test_bad_input():
    with pytest.raises(ShapeError, match="m: got 12 -> 10 in 'a', 12 -> 9 in 'b'"):
        ml.diff(adapter(), adapter({"m": (12, 9, 3)}))
    with pytest.raises(ConfigError, match="common"):
        ml.diff(adapter({"x": (4, 4, 1)}), adapter({"y": (4, 4, 1)}))
