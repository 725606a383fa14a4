from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import microlora as ml
import reference_merge as twin
from merge_support import delta, deltas, distance, parents
from microlora.exceptions import ConfigError
from microlora.merging import performance_weights
from microlora.merging.performance import LOWER_IS_BETTER


def measured(**values):
    """Adapters a, b, ... with metrics: a=[(name, data, value), ...]."""
    of = parents(len(values))
    out = {}
    for (name, metrics), one in zip(values.items(), of.values(), strict=True):
        said = ml.AdapterMetadata(metrics=tuple(ml.Metric(*m) for m in metrics))
        out[name] = one.with_metadata(said)
    return out


def test_in_proportion_to_the_metric():
    of = measured(a=[("mrr", "d1", 0.2)], b=[("mrr", "d1", 0.6)])
    assert performance_weights(of) == pytest.approx({"a": 0.25, "b": 0.75})
    made = ml.merge(of, method="weighted", weights="performance").adapter
    assert distance(delta(made), twin.weighted(deltas(of), [0.25, 0.75])) < 1e-5


LOWER = ["loss", "val_loss", "Perplexity", "word error rate", "logloss", "valLoss", "nll", "NLL", "test_mse"]
LOWER += ["testMSE", "MSELoss", "RMSE", "mae", "ppl", "cross_entropy", "CrossEntropy", "cross entropy", "wer"]
LOWER += ["CER@1", "brier", "errors", "losses", "top1_error", "bpc", "MSEs", "kl_divergence"]
HIGHER = [
    "mrr",
    "acc",
    "answer_f1",
    "certainty",
    "power",
    "glossary_hits",
    "lossless",
    "apples",
    "maestro",
]


def test_the_words_that_say_lower_are_all_in_the_docs():
    page = (Path(__file__).parents[1] / "docs" / "merging.md").read_text(encoding="utf-8")
    assert [w for w in LOWER_IS_BETTER if w not in page.split("## Weights")[1].split("## ")[0]] == []


@pytest.mark.parametrize("name", HIGHER)
def test_higher_is_better(name):
    of = measured(a=[(name, "d1", 1.0)], b=[(name, "d1", 3.0)])
    assert performance_weights(of) == pytest.approx({"a": 0.25, "b": 0.75})


@pytest.mark.parametrize("name", LOWER)
def test_lower_is_better(name):
    of = measured(a=[(name, "d1", 1.0)], b=[(name, "d1", 3.0)])
    assert performance_weights(of) == pytest.approx({"a": 0.75, "b": 0.25})


def test_equal_metrics_are_the_default_weights():
    of = measured(a=[("acc", "d", 0.5)], b=[("acc", "d", 0.5)], c=[("acc", "d", 0.5)])
    for method in ("linear", "weighted", "task_arithmetic", "cat"):
        by = ml.merge(of, method=method, weights="performance").adapter
        assert distance(delta(by), delta(ml.merge(of, method=method).adapter)) < 1e-6, method


@given(st.lists(st.floats(1e-30, 1e30), min_size=2, max_size=5), st.booleans())
def test_weights_sum_to_one_and_rise_with_performance(values, lower):
    name = "loss" if lower else "acc"
    of = measured(**{f"p{i}": [(name, "d", v)] for i, v in enumerate(values)})
    got = np.array(list(performance_weights(of).values()))
    assert got.sum() == pytest.approx(1.0)
    assert (got >= 0).all()
    order = np.argsort(values)
    steps = np.diff(got[order])
    assert (steps <= 1e-12).all() if lower else (steps >= -1e-12).all()


def test_a_metric_by_its_name():
    of = measured(a=[("mrr", "d", 0.2), ("acc", "d", 0.5)], b=[("acc", "d", 1.5), ("mrr", "d", 0.6)])
    assert performance_weights(of, "acc") == pytest.approx({"a": 0.25, "b": 0.75})
    with pytest.raises(ConfigError, match="name one with metric="):
        performance_weights(of)
    got = ml.merge(of, method="linear", weights="performance", metric="mrr").report["m"].coefficients
    assert got == pytest.approx((0.25, 0.75))


def test_modules_that_some_lack_share_among_the_rest():
    of = measured(a=[("acc", "d", 1.0)], b=[("acc", "d", 3.0)])
    more = ml.Adapter.from_factors(
        {"m": of["a"].factors("m"), "n": (np.ones((1, 4)), np.ones((4, 1)))}, alpha=1.0
    ).with_metadata(of["a"].metadata)
    report = ml.merge({"a": more, "b": of["b"]}, method="linear", weights="performance").report
    assert report["m"].coefficients == pytest.approx((0.25, 0.75))
    assert report["n"].coefficients == pytest.approx((1.0,))


BAD = [
    ("none in the metadata of 'a', 'b'", {"a": [], "b": []}, None),
    ("none in the metadata of 'b'", {"a": [("acc", "d", 1.0)], "b": []}, None),
    ("different data", {"a": [("acc", "d1", 1.0)], "b": [("acc", "d2", 1.0)]}, None),
    ("all adapters have", {"a": [("acc", "d", 1.0)], "b": [("mrr", "d", 1.0)]}, None),
    ("the metric 'mrr'", {"a": [("acc", "d", 1.0)], "b": [("acc", "d", 1.0)]}, "mrr"),
    ("above 0", {"a": [("acc", "d", 0.0)], "b": [("acc", "d", 1.0)]}, None),
    ("above 0", {"a": [("acc", "d", 1.0)], "b": [("acc", "d", -1.0)]}, None),
    ("two values", {"a": [("acc", "d", 1.0), ("acc", "d", 2.0)], "b": [("acc", "d", 1.0)]}, None),
    (
        "one set of data",
        {"a": [("acc", "d", 1.0), ("acc", "e", 2.0)], "b": [("acc", "d", 1.0), ("acc", "e", 1.0)]},
        "acc",
    ),
]


@pytest.mark.parametrize(("message", "values", "metric"), BAD)
def test_what_cannot_be_compared_is_refused(message, values, metric):
    of = measured(**values)
    before = {n: one.to_bytes() for n, one in of.items()}
    with pytest.raises(ConfigError, match=message):
        ml.merge(of, method="linear", weights="performance", metric=metric)
    assert {n: one.to_bytes() for n, one in of.items()} == before
