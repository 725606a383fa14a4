import dataclasses
import json
import math
import re
import sys

import numpy as np
import pytest
from hypothesis import given

import microlora as ml
import reference_merge as twin
from merge_support import FACTOR, METHODS, adapter, cases, delta, deltas, expected, merge, parents
from microlora.exceptions import ConfigError, FormatError, MissingExtraError, UnknownModuleError
from microlora.merging import MergeReport, ModuleReport, methods
from microlora.merging.plot import columns
from support import run_python


def made(**changes):
    """A report of given numbers."""
    values = {
        "name": "model.layers.0.self_attn.q_proj",
        "method": "ties",
        "parents": ("a", "b"),
        "rank_in": (8, 8),
        "rank_out": 8,
        "norm": 2.0,
        "norms": (1.0, 3.0),
        "energy_kept": 0.75,
        "error": 0.5,
        "cosines": ((1.0, 0.25), (0.25, 1.0)),
        "interference": (0.1, 0.9),
        "coefficients": None,
        "sign_conflict": None,
        "seconds": 0.002,
        "peak_bytes": 2048,
        "notes": (),
    }
    return ModuleReport(**{**values, **changes})


# -- figures --


@given(cases())
def test_figures_are_those_of_the_dense_deltas(of):
    result, report = merge(of, "linear")
    row, dense = report["m"], deltas(of)
    want = twin.linear(dense)
    size = max(map(twin.norm, dense))
    assert row.parents == tuple(of)
    assert row.rank_in == tuple(one.info("m").rank for one in of.values())
    assert row.rank_out == result.info("m").rank
    assert row.norms == pytest.approx([twin.norm(d) for d in dense], rel=1e-5)
    assert row.norm == pytest.approx(twin.norm(want), rel=1e-4, abs=1e-5 * size)
    np.testing.assert_allclose(np.array(row.cosines), twin.cosines(dense), atol=1e-5)
    for d, got in zip(dense, row.interference, strict=True):
        assert got == pytest.approx(twin.interference(want, d), rel=1e-2, abs=1e-2)
    assert row.coefficients == pytest.approx([1 / len(of)] * len(of))
    assert row.seconds >= 0
    assert row.peak_bytes > 0


@pytest.mark.parametrize("method", METHODS)
def test_truncation_is_measured(method):
    of = parents(2, {"m": (30, 24, 4)})
    result, report = merge(of, method, **({"rank": 4} if methods()[method].takes("rank") else {}))
    row, want = report["m"], expected(of, method)
    assert row.error == pytest.approx(twin.norm(delta(result) - want) / twin.norm(want), rel=2e-2, abs=1e-4)
    assert row.energy_kept == pytest.approx(1 - row.error**2, abs=1e-6)
    assert row.norm == pytest.approx(twin.norm(want), rel=1e-3)
    for d, got in zip(deltas(of), row.interference, strict=True):
        assert got == pytest.approx(twin.interference(delta(result), d), rel=2e-2, abs=2e-3)


@pytest.mark.parametrize("method", METHODS)
def test_a_full_report_counts_conflicts_of_sign(method):
    of = parents(2, {"m": (30, 24, 4)})
    assert merge(of, method).report["m"].sign_conflict is None
    a, b = deltas(of)
    got = merge(of, method, report="full").report["m"].sign_conflict
    assert got == pytest.approx((np.sign(a) != np.sign(b)).mean(), abs=2e-3)


def test_opposites_and_zeros():
    one = adapter()
    row = ml.merge({"a": one, "b": -one}, method="average").report["m"]
    assert row.cosine_range == pytest.approx((-1.0, -1.0))
    assert row.interference == pytest.approx((1.0, 1.0), abs=1e-5)
    row = ml.merge({"a": one, "b": 0.0 * one}, method="average").report["m"]
    assert row.cosines[0][1] is None
    assert row.interference == (pytest.approx(0.5, abs=1e-5), None)
    assert row.cosine_range is None


def test_coefficients_are_those_of_the_paper():
    of = parents(2)
    for method in FACTOR:
        row = merge(of, method).report["m"]
        if row.coefficients is not None:
            made = sum(c * d for c, d in zip(row.coefficients, deltas(of), strict=True))
            assert twin.norm(made - expected(of, method)) < 1e-5 * twin.norm(made), method


def test_what_is_left_behind_is_said(tmp_path):
    one = adapter({"q_proj": (8, 8, 2)})
    ml.save(one, tmp_path / "p")
    file = tmp_path / "p" / "adapter_model.safetensors"
    from support import read_tensors, write_tensors

    header, tensors = read_tensors(file.read_bytes())
    header["classifier.weight"] = {"dtype": "F32", "shape": [2]}
    tensors["classifier.weight"] = bytearray(8)
    file.write_bytes(write_tensors(header, tensors))
    with pytest.warns(ml.exceptions.UnusedTensorWarning):
        loaded = ml.load(tmp_path / "p", strict=False)
    report = ml.merge({"a": loaded, "b": one}).report
    assert "classifier.weight" in report.notes[0]
    assert "note: tensors of 'a'" in str(report)


# -- text --


def test_a_table_that_fits():
    rows = [made(name=f"model.language_model.layers.{i}.self_attn.q_proj" + 60 * "x") for i in range(3)]
    report = MergeReport("exact", 0.006, 4096, tuple(rows), ("something",))
    lines = str(report).splitlines()
    assert max(map(len, lines)) <= 110
    assert lines[0].split() == [
        "module",
        "method",
        "rank",
        "energy",
        "error",
        "cosine",
        "interference",
        "ms",
        "KiB",
    ]
    assert "2x8 -> 8" in lines[1]
    assert "0.25" in lines[1]
    assert "0.10..0.90" in lines[1]
    assert lines[1].startswith("model.")
    assert lines[-1] == "note: something"
    assert "3 modules, 6.00 ms, relative truncation error 5.0e-01, peak 4 KiB" in lines[-2]


def test_columns_are_aligned():
    report = MergeReport("exact", 0.0, 0, (made(name="q"), made(name="longer", rank_in=(8, 16), rank_out=24)))
    head, one, two, *_ = str(report).splitlines()
    assert head.index("method") == one.index("ties") == two.index("ties")
    assert len(one) == len(two) == len(head)


@pytest.mark.parametrize(
    ("ranks", "text"), [((8, 8), "2x8"), ((8,), "8"), ((4, 8, 2), "4+8+2"), ((1, 2, 3, 4), "10 of 4")]
)
def test_ranks_in_short(ranks, text):
    assert f" {text} -> 8 " in str(MergeReport("exact", 0.0, 0, (made(rank_in=ranks),)))


def test_a_full_table_has_signs():
    report = MergeReport("exact", 0.0, 0, (made(sign_conflict=0.125),))
    assert "signs" in str(report).splitlines()[0]
    assert "12.5%" in str(report)


def test_notes_name_their_modules():
    rows = tuple(made(name=f"m{i}", notes=("parallel",)) for i in range(4))
    assert "note: parallel [m0, m1, ... (4 modules)]" in str(MergeReport("exact", 0.0, 0, rows))


def test_the_error_of_all_modules():
    rows = (made(norm=3.0, error=0.0), made(name="x", norm=4.0, error=0.5))
    assert MergeReport("exact", 0.0, 0, rows).error == pytest.approx(2 / 5)
    assert MergeReport("exact", 0.0, 0, ()).error == 0.0


# -- JSON --


def test_json_both_ways():
    of = parents(2)
    report = ml.merge({"a": of["a"], "b": 0.0 * of["b"]}).report
    assert MergeReport.from_json(report.to_json()) == report
    assert json.loads(report.to_json())["modules"][0]["name"] == "m"
    assert hash(report) == hash(MergeReport.from_json(report.to_json(indent=2)))
    with pytest.raises(dataclasses.FrozenInstanceError):
        report.seconds = 1.0


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"schema_version": 99}, FormatError),
        ({"more": 1}, ConfigError),
        ({"modules": 3}, ConfigError),
        ({"modules": [3]}, ConfigError),
        ({"modules": [{"name": "q"}]}, ConfigError),
    ],
    ids=str,
)
def test_documents_that_are_none(change, error):
    good = MergeReport("exact", 0.0, 0, (made(),)).to_dict()
    with pytest.raises(error):
        MergeReport.from_dict({**good, **change})
    for key in ("modules", "seconds", "semantics"):
        with pytest.raises(ConfigError, match=key):
            MergeReport.from_dict({k: v for k, v in good.items() if k != key})


def test_a_module_by_its_name():
    report = MergeReport("exact", 0.0, 0, (made(name="q_proj"),))
    assert report["q_proj"].norm == 2.0
    with pytest.raises(UnknownModuleError, match=re.escape("did you mean 'q_proj'")):
        report["q_prj"]


# -- picture --


def test_what_the_picture_shows():
    rows = (
        made(),
        made(name="x", parents=("b",), rank_in=(8,), norms=(1.0,), cosines=((1.0,),), interference=(None,)),
    )
    head, values = columns(MergeReport("exact", 0.0, 0, rows))
    assert head == ["error", "interference a", "interference b", "cos a, b"]
    assert values[0] == [0.5, 0.1, 0.9, 0.25]
    assert values[1][0] == 0.5
    assert all(math.isnan(v) for v in values[1][1:])


@pytest.mark.parametrize("ending", ["png", "svg", "pdf"])
def test_a_picture(tmp_path, ending):
    pytest.importorskip("matplotlib")
    path = tmp_path / f"report.{ending}"
    ml.merge(parents(3), method="linear").report.picture(path)
    assert path.stat().st_size > 1000
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_pictures_that_cannot_be(tmp_path):
    report = MergeReport("exact", 0.0, 0, (made(),))
    with pytest.raises(ConfigError, match="path"):
        report.picture(tmp_path / "x.txt")
    with pytest.raises(ConfigError, match="at least one"):
        MergeReport("exact", 0.0, 0, ()).picture(tmp_path / "x.png")
    assert list(tmp_path.iterdir()) == []


def test_without_matplotlib(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingExtraError, match=r"microlora\[plot\]"):
        MergeReport("exact", 0.0, 0, (made(),)).picture(tmp_path / "x.png")


def test_merging_loads_no_plotting():
    run_python(
        "import sys, microlora as ml; ml.merge; assert 'matplotlib' not in sys.modules; "
        "assert 'microlora.merging.plot' not in sys.modules"
    )


def test_importing_the_package_loads_no_merging():
    run_python("import sys, microlora; assert 'microlora.merging' not in sys.modules")
