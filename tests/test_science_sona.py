"""The bench of the three loops: every experiment on three small personas whose vectors are made up."""

import dataclasses
import json
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "benches" / "science"))
from sona import measure, plan, rows, run, streams, table

from microlora.demo.corpus import split_corpus
from microlora.demo.task import Task
from microlora.sona.consolidation import Consolidation

DIM = 24
NAMES = ("a", "b", "c", "d")
ROWS = rows.ROWS


@pytest.fixture
def bench(monkeypatch):
    """Three personas of 40 clicks and a module that is nobody's; a query is a turned, noisy document."""
    monkeypatch.setattr(measure, "EVENTS", 120)
    for module in (measure, table):
        monkeypatch.setattr(module, "POISONED", (60, 80))
    r = np.random.default_rng(0)
    documents = r.standard_normal((320, DIM)) * np.linspace(2.0, 0.3, DIM)
    turn = np.linalg.qr(r.standard_normal((DIM, DIM)))[0]
    queries = documents @ (0.6 * turn + 0.4 * np.eye(DIM)) + 0.2 * r.standard_normal((320, DIM))
    unit = [
        np.asarray(v / np.linalg.norm(v, axis=1, keepdims=True), np.float32) for v in (queries, documents)
    ]
    split = split_corpus([NAMES[i % 4] for i in range(320)], 0)
    return plan.Bench(Task(*unit, split, NAMES[:3]), 10)


def small(row):
    """The row with a rank that the vectors hold."""
    return dataclasses.replace(row, setting=dataclasses.replace(row.setting, rank=min(row.setting.rank, 8)))


@pytest.mark.parametrize("name", list(ROWS))
def test_every_row_is_measured_and_repeats(bench, name):
    row = small(ROWS[name])
    if row.experiment == rows.SETTINGS and name != "settings RLS the defaults":
        row.setting.config(DIM, 0)  # made of experiments that are run here anyway
        return
    found = measure.EXPERIMENTS[row.experiment](row, bench)
    assert np.isfinite(found["all"])
    json.dumps(found)
    if row.experiment in (rows.SWITCH, rows.POISON):
        again = measure.EXPERIMENTS[row.experiment](row, dataclasses.replace(bench))
        assert again == found


def test_what_learns_learns_and_the_constant_gradient_does_not(bench):
    gains = {
        name: measure.uplift(small(ROWS[name]), bench)["all"]
        for name in ("uplift instant r=16 A=log holdout=0", "rule NLMS, target", "rule constant")
    }
    first, second, constant = gains.values()
    assert first > 0.1
    assert second > 0.1
    assert abs(constant) < 0.01


def test_a_warm_loop_is_the_same_for_every_persona(bench):
    setting = small(ROWS["uplift three loops r=16 A=log holdout=0.1"]).setting
    first, second = bench.loop(setting), bench.loop(setting)
    assert first.adapter() == second.adapter()
    random = bench.loop(dataclasses.replace(setting, basis="random"))
    assert random.adapter() != first.adapter()


def test_nothing_of_the_streams_is_held_out_by_the_task(bench):
    split = bench.task.split
    for name in NAMES:
        assert not set(split.stream[name]) & set(split.held_out[name])
    assert set(bench.unrelated) <= set(split.stream["d"])


def said(bench, user, times=4000):
    r = np.random.default_rng(1)
    x = bench.task.queries[5]
    return [user(bench, r, 5, x) for _ in range(times)]


def clicked(bench, feedback):
    return int(np.flatnonzero((bench.task.documents == feedback.t).all(axis=1))[0])


def test_wrong_clicks_come_as_often_as_is_said_and_are_rated_lower(bench):
    told = said(bench, streams.noisy(0.3, True))
    wrong = np.array([clicked(bench, f) != 5 for f, _ in told])
    quality = np.array([q for _, q in told])
    assert wrong.mean() == pytest.approx(0.3, abs=0.03)
    assert (quality[wrong] > 0.5).mean() == pytest.approx(0.16, abs=0.04)
    assert (quality[~wrong] < 0.5).mean() == pytest.approx(0.10, abs=0.03)
    assert all(q is None for _, q in said(bench, streams.noisy(0.3, False), 10))


def test_clicks_fall_by_the_propensity_of_the_rank(bench):
    best = streams.shown(bench, bench.task.queries[5])
    none = [told for told in said(bench, streams.biased(1.0, "ips")) if told is not None]
    ranks = np.array([int(np.flatnonzero(best == clicked(bench, f))[0]) for f, _ in none])
    place = int(np.flatnonzero(best == 5)[0]) if 5 in best else None
    clicks = np.bincount(ranks, minlength=10) / 4000
    left, want = 1.0, []
    for k in range(10):
        p = (1.0 if k == place else streams.SLIP) / (k + 1)
        want.append(left * p)
        left *= 1 - p
    np.testing.assert_allclose(clicks, want, atol=0.03)
    np.testing.assert_allclose([q for _, q in none], 0.5 + 0.5 * 0.1 * (ranks + 1), rtol=1e-6)


def test_poison_turns_targets_round_and_only_then(bench):
    at = streams.flipped(3, 5)
    said = [at(n)(bench, None, 7, None)[0].t @ bench.task.documents[7] for n in range(7)]
    np.testing.assert_allclose(said, [1, 1, 1, -1, -1, 1, 1], rtol=1e-5)


def test_rows_differ_in_what_they_ask_for():
    asked = [(row.experiment, json.dumps(run.asked(row), sort_keys=True)) for row in ROWS.values()]
    double = {a for a in asked if asked.count(a) > 1}
    # The middle threshold is the default, measured under both names.
    assert all(experiment == rows.STRATEGIES for experiment, _ in double)
    assert {row.setting.config(384, 0).consolidation for row in ROWS.values()} == set(Consolidation)


def test_tables_have_every_row_that_was_measured(bench):
    lines = [
        {
            **run.line(small(ROWS[name]), dataclasses.replace(bench, seed=seed)),
            "settings": run.asked(ROWS[name]),
        }
        for name in (
            "uplift instant r=16 A=log holdout=0",
            "rule constant",
            "shared instant r=16",
            "switch NLMS, instant",
            "noise 0.3 rating, three loops",
            "position ips, instant",
            "personas `ensemble`",
            "threshold 0.3 quality_weighted",
            "preset balanced",
            "poison three loops",
            "settings RLS the defaults",
        )
        for seed in (10, 11)
    ]
    data = table.summary(lines)
    assert all(data["blocks"].values())
    for tables in data["blocks"].values():
        for made in tables:
            assert made["rows"]
            assert all(len(row) == len(made["head"]) for row in made["rows"])
    stale = [{**line, "settings": {}} for line in lines]
    assert not any(table.summary(stale)["blocks"].values())
    assert table.gain([0.1, 0.2]) == "+0.150 ± 0.071"
    assert table.events([10, None]) == "10 (1 of 2 splits)"
    assert table.events([None]) == "never"


def test_lines_of_other_code_are_measured_again(bench):
    row = ROWS["rule constant"]
    line = {"row": row.name, "seed": 10, "encoder": "lsa", "code": run.code(), "settings": run.asked(row)}
    assert run.missing([row], 10, "lsa", [line]) == []
    assert run.missing([row], 11, "lsa", [line]) == [row]
    assert run.missing([row], 10, "lsa", [{**line, "code": "other"}]) == [row]
    assert run.seeds_of(row) == plan.SEEDS
    assert run.seeds_of(ROWS["settings RLS the defaults"])[:2] == plan.TUNING
