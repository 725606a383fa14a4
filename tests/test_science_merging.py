"""The merging benchmark on scikit-learn's digits: two orders of the pixels, one adapter each, one seed."""

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest

import microlora as ml
from microlora import _core

sys.path.insert(0, str(Path(__file__).parent.parent / "benches"))
sys.path.insert(0, str(Path(__file__).parent.parent / "benches" / "science"))
from continual.plan import Plan, Setup
from merging import engines, parents, personas, run, table
from merging.rows import BOUNDS, FACTOR, PEFT, RANK, ROWS, WRONG, Row

from microlora.demo.corpus import Split
from microlora.demo.evaluate import mrr, ranks_of

SETUP = Setup("perm", tasks=2, epochs=5, base_epochs=20)
NATIVE = [row.name for row in ROWS.values() if row.group not in (BOUNDS, PEFT, WRONG)]


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    """Both adapters of one seed, from a cache of its own."""
    pytest.importorskip("sklearn", reason="the digits come with scikit-learn")
    return run.Bench(Plan.load(SETUP, 20, tmp_path_factory.mktemp("cache")), (0, 1))


def retained(bench, name):
    return bench.line(ROWS[name])["retained"]


def deltas(bench, module):
    return [parents.delta(adapter, module) for adapter in bench.pair.adapters.values()]


def test_adapters_know_their_own_domain_only(bench):
    assert min(bench.own) > 0.8
    assert max(bench.bound("other")) < 0.5
    assert max(bench.bound("none")) < 0.5
    assert min(bench.bound("joint")) > 0.8
    assert retained(bench, "own") == 1.0


def test_network_of_the_benchmark_is_the_chain(bench):
    plan = bench.plan
    chain = parents.train(plan, plan.feed(0), 0)
    x = bench.pair.tasks[0].x_test[:50]
    want = chain.forward(x)
    got = parents.logits(plan, chain.lora.adapter(), x)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4 * np.abs(want).max())
    assert chain.lora.adapter() == bench.pair.both()[0], "the same plan trains the same adapter"
    read = parents.inputs(chain, x)
    w, b = chain.fuse()[-1]
    np.testing.assert_allclose(read[-1] @ w.T + b, want, rtol=1e-4, atol=1e-4 * np.abs(want).max())


def test_adapters_start_apart(bench):
    first, second = (parents.start(bench.plan, part) for part in (0, 1))
    assert all(abs(np.vdot(a, b)) < 0.3 * np.vdot(a, a) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("name", NATIVE)
def test_every_native_row_merges(bench, name):
    line = json.loads(json.dumps(bench.line(ROWS[name])))
    # Orthogonal parents make model_stock and sce shrink to almost nothing: these retain chance.
    assert 0.05 < line["retained"] < 1.05
    limit = {"layers.0": 64, "layers.1": 256, "layers.2": 10}
    asked = ROWS[name].options.get("rank")
    for rank, most in zip(line["ranks"], limit.values(), strict=True):
        assert rank <= (2 * RANK if asked != "full" else most)


def test_every_method_of_the_core_has_a_row():
    known = {row["name"] for row in _core.merge_methods() if "exact" in row["semantics"]}
    assert {ROWS[name].method for name in NATIVE} == known
    assert known <= {row.method for row in ROWS.values() if not row.options}, "each at its default"


def test_statistics_make_the_merge(bench):
    kept = {
        name: retained(bench, name) for name in ("regmean", "fisher rank=full", "linear", "factor average")
    }
    assert kept["regmean"] > 0.9
    assert kept["regmean"] > kept["linear"] + 0.05
    assert kept["linear"] > kept["factor average"] + 0.05
    assert kept["fisher rank=full"] > kept["linear"]


def test_linear_is_the_mean_of_weight_changes(bench):
    full, cut = (bench.merged(ROWS[name]).adapter for name in ("linear", f"linear rank={RANK}"))
    for module in full.modules():
        mean = sum(deltas(bench, module)) / 2
        size = np.linalg.norm(mean)
        assert np.linalg.norm(parents.delta(full, module) - mean) < 1e-5 * size
        u, s, v = np.linalg.svd(mean, full_matrices=False)
        best = (u[:, :RANK] * s[:RANK]) @ v[:RANK]
        assert np.linalg.norm(parents.delta(cut, module) - best) < 1e-4 * size


def test_average_of_factors_is_no_mean(bench):
    wrong = engines.factor_average(bench.pair.adapters)
    mean = sum(deltas(bench, "layers.0")) / 2
    assert np.linalg.norm(parents.delta(wrong.adapter, "layers.0") - mean) > 0.3 * np.linalg.norm(mean)


@pytest.mark.oracle
@pytest.mark.parametrize("name", [row.name for row in ROWS.values() if row.group == PEFT])
def test_peft_rows(bench, name):
    assert all(importlib.util.find_spec(package) for package in ("torch", "peft"))
    line = bench.line(ROWS[name])
    assert 0.2 < line["retained"] < 1.0
    if ROWS[name].like:
        assert line["difference"] < table.PARITY
    assert ROWS[name].random or line["reproduced"] < table.PARITY


def line(row, seed, value, **more):
    made = {"settings": ROWS[row].options, "plan": "p", "code": run.code(), "environment": {"cpu": "x"}}
    return {"row": row, "seed": seed, "accuracy": [value, value], "retained": value, **made, **more}


def test_summary_takes_the_last_line_and_judges_targets():
    peft = next(row.name for row in ROWS.values() if row.like)
    lines = [line("regmean", 20, 0.5), line("regmean", 20, 0.95), line("regmean", 21, 0.93)]
    lines += [line("linear", seed, 0.8) for seed in (20, 21)]
    lines += [line(peft, 20, 0.8, difference=1e-6, reproduced=1e-7)]
    lines += [line(peft, 21, 0.8, difference=2e-5, reproduced=1e-6)]
    data = table.summary(lines)
    verdicts = [t["verdict"] for t in data["targets"]]
    assert verdicts == ["met", "MISSED", "not run", "met"]
    assert data["means"]["regmean"] == pytest.approx(0.94)
    cells = next(g for g in data["groups"] if "factor space" in g["title"])["rows"]
    assert cells[-1][-1] == "**0.940 ± 0.014**"
    assert table.summary([*lines, {**line("regmean", 22, 0.1), "settings": {"rho": 0.5}}]) == data
    with pytest.raises(SystemExit, match="different plans"):
        table.summary([*lines, line("linear", 20, 0.8, plan="q")])


def test_rows_in_the_file_are_not_repeated():
    rows = [ROWS["linear"], ROWS["regmean"]]
    assert run.missing(rows, 20, [line("linear", 20, 0.8)]) == rows[1:]
    assert run.missing(rows, 21, [line("linear", 20, 0.8)]) == rows
    assert run.missing(rows, 20, [line("linear", 20, 0.8), line("linear", 20, 0.8, code="old")]) == rows


def test_setting_in_words():
    assert ROWS["linear weight=0.7"].setting == "w = 0.7"
    assert Row("x", FACTOR, "x", "x", {"rank": "full", "weight": 1 / 3}).setting == "rank full, w = 0.333"
    assert ROWS["linear"].setting == "default"


class ToyTask:
    """Three personas whose queries lie in subspaces of their own, and whose documents are turned queries."""

    def __init__(self):
        rng = np.random.default_rng(4)
        turn, _ = np.linalg.qr(rng.standard_normal((24, 24)))
        parts = []
        for k in range(3):
            x = 0.05 * rng.standard_normal((60, 24))
            x[:, 8 * k : 8 * k + 8] += rng.standard_normal((60, 8))
            parts.append(x / np.linalg.norm(x, axis=1, keepdims=True))
        self.dim, self.personas = 24, ("a", "b", "c")
        self.queries = np.concatenate(parts).astype(np.float32)
        self.documents = (self.queries @ turn).astype(np.float32)
        rows = {name: np.arange(60 * k, 60 * k + 60) for k, name in enumerate(self.personas)}
        self.split = Split({n: r[:40] for n, r in rows.items()}, {n: r[40:] for n, r in rows.items()})

    def mrr(self, lora, which):
        x = self.queries[which]
        return mrr(ranks_of(x if lora is None else x + lora.forward(x), self.documents, which))


def test_personas_are_kept_by_a_merge_that_knows_their_queries(tmp_path):
    search = personas.Search(ToyTask(), 0, tmp_path)
    mean = {
        name: np.mean(list(search.scores(personas.TABLE[name]).values()))
        for name in ("none", "others", "own", "joint", "linear", "regmean")
    }
    assert mean["own"] > mean["none"] + 0.3
    assert mean["others"] < mean["own"] - 0.3
    assert mean["regmean"] > 0.9 * mean["own"]
    assert mean["regmean"] > mean["linear"] + 0.02


def test_personas_cover_every_method_of_any_number_of_parents():
    rows = {row.method for row in personas.TABLE.values() if row.group not in (BOUNDS, PEFT, WRONG)}
    assert rows == {ROWS[name].method for name in NATIVE} - personas.OF_TWO


def test_merged_adapter_of_a_row_is_an_adapter(bench):
    assert isinstance(bench.merged(ROWS["ties"]).adapter, ml.Adapter)
