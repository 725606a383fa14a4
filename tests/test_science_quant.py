"""The table of quantised adapters on scikit-learn's digits: one adapter, one seed, every row."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

import microlora as ml

sys.path.insert(0, str(Path(__file__).parent.parent / "benches" / "science"))
from continual.plan import Plan, Setup
from quant import adapters, profiles, run, table
from quant.rows import AS_IT_IS, ROWS, SEARCHED, SEEDS, WHOLE

SETUP = Setup("perm", tasks=1, epochs=5, base_epochs=20)


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    """The adapter of one seed, from a cache of its own."""
    pytest.importorskip("sklearn", reason="the digits come with scikit-learn")
    return adapters.Bench(Plan.load(SETUP, 10, tmp_path_factory.mktemp("cache")), 0)


def test_seeds_are_those_fixed_beforehand():
    assert SEEDS == (10, 11, 12, 13, 14)


def test_widths_filled_up_change_nothing(bench):
    assert bench.accuracy(bench.labels) > 0.8
    assert {n for widths in bench.whole.dims.values() for n in widths} == {256}
    x = bench.task.x_test
    want = bench.logits(adapters.Plain(bench.adapter), x)
    got = bench.logits(adapters.Plain(bench.whole), x)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4 * np.abs(want).max())
    without = ml.Adapter.from_factors(
        {
            m: (np.zeros_like(bench.adapter.lora_a(m)), bench.adapter.lora_b(m))
            for m in bench.adapter.modules()
        },
        alpha=1.0,
    )
    assert bench.accuracy(bench.predict(without)) < 0.5


@pytest.mark.parametrize("name", list(ROWS))
def test_every_row(bench, name):
    row = ROWS[name]
    line = json.loads(json.dumps(run.line(bench, row)))
    assert abs(line["change"]) < 3
    assert line["agreement"] > 0.95
    if row.group == WHOLE:
        assert not line["fell_back"]
        assert line["memory"][1] <= line["memory"][0]
    if row.group == AS_IT_IS:
        assert ("layers.0" in line["fell_back"]) == (row.kind in {"q6_k", "q4_k", "q4_k_m"})
        assert "layers.2" in line["fell_back"]
    if row.group == SEARCHED:
        assert line["output_error"] <= row.target_error
    if row.error is not None:
        assert line["delta_error"] <= row.error


def line(row, seed, change, **more):
    made = {"delta_error": 0.005, "output_error": 0.002, "agreement": 1.0, "accuracy": 0.9, "fell_back": {}}
    made |= {"memory": [400, 100], "settings": ROWS[row].settings, "plan": "p", "code": run.code()}
    return {"row": row, "seed": seed, "change": change, "environment": {"cpu": "x"}, **made, **more}


def test_summary_takes_the_last_line_and_judges_targets():
    lines = [line("whole q8_0", 10, 9.0), line("whole q8_0", 10, -0.1), line("whole q8_0", 11, 0.3)]
    lines += [line("whole q4_k", seed, -0.9, delta_error=0.2) for seed in (10, 11)]
    data = table.summary(lines)
    verdicts = {t["what"].split(",")[0]: t["verdict"] for t in data["targets"]}
    assert list(verdicts.values()) == ["met", "met", "not run", "not run", "MISSED", "MISSED"]
    assert data["groups"][0]["rows"][0][1] == "+0.10 ± 0.28"
    assert data["groups"][0]["rows"][0][-1] == "100 (25% of f32)"
    assert data["seeds"] == [10, 11]
    other = {**line("whole q8_0", 12, 5.0), "settings": {}}
    assert table.summary([*lines, other])["groups"] == data["groups"]
    with pytest.raises(SystemExit, match="different plans"):
        table.summary([*lines, line("whole q4_0", 10, 0.0, plan="q")])


def test_rows_in_the_file_are_not_repeated():
    rows = [ROWS["whole q8_0"], ROWS["whole q4_k"]]
    assert run.missing(rows, 10, [line("whole q8_0", 10, 0.0)]) == rows[1:]
    assert run.missing(rows, 11, [line("whole q8_0", 10, 0.0)]) == rows
    assert run.missing(rows, 10, [line("whole q8_0", 10, 0.0, code="old")]) == rows


def test_profiles_are_measured(bench):
    adapter = profiles.large()
    lines = [
        profiles.line(names, [bench], lambda profile: profiles.measured(profile, adapter, 2, 2))
        for names in profiles.PROFILES
    ]
    assert [made["recipe"] for made in lines] == ["q4_k_m", "q6_k", "q8_0", "q6_k"]
    for made in lines:
        kept, saved, speed, in_turn = made["measured"]
        assert 0.9 < kept < 1.1
        assert 0.4 < saved < 0.8
        assert speed > 0
        assert in_turn > 0
        assert len(made["cells"]) == len(profiles.HEAD)
