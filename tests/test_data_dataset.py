import json
import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import microlora as ml
from microlora.data import AdapterDataset, TrainingSample
from microlora.exceptions import ConfigError, DTypeError, LeakageError, NonFiniteError, ShapeError
from support import feedback_kinds, normal, rng
from test_data_sample import Words


def dataset(n=10, n_in=4, n_out=3, seed=0, **options):
    r = rng(seed)
    return AdapterDataset.from_arrays(normal(r, n, n_in), normal(r, n, n_out), **options)


def test_samples_and_arrays_are_two_views_of_one_thing():
    r = rng()
    x, y = normal(r, 5, 4), normal(r, 5, 3)
    samples = [TrainingSample(x[i], y[i], 0.5, id=f"s{i}", weight=i + 1.0, domain="d") for i in range(5)]
    made = AdapterDataset(samples)
    arrays = AdapterDataset.from_arrays(
        x, y, quality=0.5, weights=np.arange(1, 6), ids=[f"s{i}" for i in range(5)], domains="d"
    )
    assert made == arrays
    assert list(arrays) == samples
    assert made[-1] == samples[-1]
    for data in (made, arrays):
        got = data.arrays()
        for mine, want in zip(got, (x, y, np.arange(1, 6, dtype=np.float32)), strict=True):
            np.testing.assert_array_equal(mine, want)
            assert mine.dtype == np.float32
            assert mine.flags.c_contiguous
            assert not mine.flags.writeable
    assert (made.in_features, made.out_features, len(made.examples)) == (4, 3, 5)
    assert samples[2] in made
    assert made.index(samples[2]) == 2
    assert "5 examples" in repr(made)


def test_labels_and_targets_as_feedback_are_arrays_too():
    x = normal(rng(), 4, 3)
    labelled = AdapterDataset.from_arrays(x, [0, 1, 2, 1])
    assert labelled.arrays()[1].dtype == np.int64
    assert labelled[2].label == 2
    targets = AdapterDataset(TrainingSample(row, feedback=ml.Target(2 * row)) for row in x)
    np.testing.assert_array_equal(targets.arrays()[1], 2 * x)
    assert targets.has_arrays


@pytest.mark.parametrize("kind", [kind for kind in feedback_kinds(rng(), 3) if kind != "mse"])
def test_other_feedback_has_no_arrays_but_stays_itself(kind):
    feedback = [feedback_kinds(rng(i), 3)[kind] for i in range(6)]
    data = AdapterDataset(TrainingSample([1.0, i], feedback=f) for i, f in enumerate(feedback))
    assert [sample.feedback for sample in data] == feedback
    assert [sample.feedback for sample in data.shuffle(3)] == [feedback[i] for i in data.order(3)]
    joined = data[:3] + data[3:]
    assert [sample.feedback for sample in joined] == feedback
    assert not data.has_arrays
    with pytest.raises(ConfigError, match="feedback"):
        data.arrays()


def test_mixed_kinds_of_feedback_keep_their_places():
    feedback = list(feedback_kinds(rng(), 3).values())
    data = AdapterDataset(TrainingSample([1.0, i], feedback=f) for i, f in enumerate(feedback))
    assert [sample.feedback for sample in data.subset([4, 2, 0, 5, 1, 3])] == [
        feedback[i] for i in (4, 2, 0, 5, 1, 3)
    ]
    assert data[:1].has_arrays


def test_an_array_that_changes_later_changes_nothing():
    x, y = normal(rng(), 3, 2), normal(rng(1), 3, 2)
    data = AdapterDataset.from_arrays(x, y)
    shared = AdapterDataset.from_arrays(x, y, copy=False)
    assert shared.arrays()[0].base is not None
    assert np.shares_memory(shared.arrays()[0], x)
    before = data.arrays()[0].copy()
    x[:] = 7
    np.testing.assert_array_equal(data.arrays()[0], before)
    assert x.flags.writeable


def test_ids_are_made_of_contents():
    a, b = dataset(), dataset()
    assert a.texts("id") == b.texts("id")
    assert len(set(a.texts("id"))) == 10
    assert not set(a.texts("id")) & set(dataset(seed=1).texts("id"))
    twice = AdapterDataset([TrainingSample([1.0], [2.0])] * 3)
    first, second, third = twice.texts("id")
    assert second == f"{first}-2"
    assert third == f"{first}-3"
    assert len((a + dataset(seed=1)).texts("id")) == 20
    wide = [
        TrainingSample([1.0], feedback=ml.Target(np.eye(3000, dtype=np.float32)[i])) for i in (1500, 1501)
    ]
    assert AdapterDataset(wide).texts("id")[1][-2:] != "-2"


@given(st.integers(0, 2**40), st.integers(0, 1000), st.integers(0, 40))
def test_an_order_is_the_stated_permutation(seed, epoch, n):
    data = AdapterDataset.from_arrays(np.ones((n, 1)), np.ones((n, 1)))
    want = np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, epoch]))).permutation(n)
    got = data.order(seed, epoch)
    assert got.dtype == np.int64
    np.testing.assert_array_equal(got, want)
    np.testing.assert_array_equal(np.sort(got), np.arange(n))


def test_orders_of_epochs_differ_and_one_is_known():
    data = dataset(10)
    assert data.order(7, 0).tolist() != data.order(7, 1).tolist()
    assert data.shuffle(7).texts("id") == [data.texts("id")[i] for i in data.order(7, 0)]


@given(st.lists(st.tuples(st.floats(0, 1), st.sampled_from(["a", "b"])), max_size=30), st.floats(0, 1))
def test_a_filter_keeps_what_passes_and_is_idempotent(rows, least):
    data = AdapterDataset(
        TrainingSample([1.0], [1.0], q, domain=d, id=str(i)) for i, (q, d) in enumerate(rows)
    )
    got = data.filter(lambda s: int(s.id) % 3 > 0, min_quality=least, domain="a")
    want = [i for i, (q, d) in enumerate(rows) if q >= least and d == "a" and i % 3 > 0]
    assert [int(s.id) for s in got] == want
    assert got.filter(lambda s: int(s.id) % 3 > 0, min_quality=least, domain="a") == got


def test_a_filter_wants_a_number():
    for bad in (float("nan"), "0.5"):
        with pytest.raises(ConfigError, match="min_quality"):
            dataset().filter(min_quality=bad)


def test_a_subset_of_a_subset():
    data = dataset(10).subset([9, 7, 5, 3]).subset([-1, 1])
    assert data.texts("id") == [dataset(10).texts("id")[i] for i in (3, 7)]
    assert data[::-1].texts("id") == data.texts("id")[::-1]
    assert len(dataset(3).subset([True, False, True])) == 2
    for rows, error in (([10], ShapeError), ([0, 0], ConfigError), ([0.5], ShapeError), ([[1]], ShapeError)):
        with pytest.raises(error, match="rows"):
            dataset(10).subset(rows)
    with pytest.raises(IndexError):
        data[2]


@given(st.integers(0, 20), st.integers(1, 25), st.booleans())
def test_batches_join_to_the_arrays(n, size, shuffled):
    data = dataset(max(n, 1))[:n]
    order = data.order(3, 1) if shuffled else None
    parts = list(data.batches(size, order=order))
    assert [len(part[0]) for part in parts] == [min(size, n - s) for s in range(0, n, size)]
    for i, whole in enumerate(data.arrays()):
        want = whole if order is None else whole[order]
        got = np.concatenate([part[i] for part in parts]) if parts else want[:0]
        np.testing.assert_array_equal(got, want)


def test_concat_keeps_order_and_held_out_parts():
    a, b = dataset(30, seed=1).split(), dataset(30, seed=2).split()
    both = a + b
    assert both.texts("id") == a.texts("id") + b.texts("id")
    assert len(both.validation) == len(a.validation) + len(b.validation)
    with pytest.raises(ConfigError, match="twice"):
        a + a
    with pytest.raises(LeakageError):
        a.with_validation(None) + AdapterDataset(b.validation, validation=list(a)[:3])


def test_sorts_do_not_mix():
    x = TrainingSample([1.0, 2.0], [1.0], id="x")
    cases = [
        (TrainingSample([1.0], [1.0], id="y"), ShapeError, "'y': input_embedding: got width 1, expected 2"),
        (TrainingSample([1.0, 2.0], [1.0, 2.0], id="y"), ShapeError, "'y': output_embedding"),
        (TrainingSample([1.0, 2.0], label=1, id="y"), ConfigError, "'y': has no output_embedding"),
        (TrainingSample([1.0, 2.0], id="y"), ConfigError, "'y': has no output_embedding"),
        (TrainingSample(query="q", output_embedding=[1.0], id="y"), ConfigError, r"'y'.*encoded\(encoder\)"),
        (TrainingSample([1.0, 2.0], [3.0], id="x"), ConfigError, "id 'x' appears twice"),
        ("text", ConfigError, r"samples\[1\]"),
    ]
    for other, error, words in cases:
        with pytest.raises(error, match=words):
            AdapterDataset([x, other])
        if isinstance(other, TrainingSample):
            with pytest.raises((error, ConfigError)):
                AdapterDataset([x]) + AdapterDataset([other])
    wide = [ml.Target([1.0]), ml.Target([1.0, 2.0])]
    with pytest.raises(ShapeError, match="'1': feedback: got width 2, expected 1"):
        AdapterDataset(TrainingSample([1.0], feedback=f, id=str(i)) for i, f in enumerate(wide))


@pytest.mark.parametrize(
    ("x", "y", "options", "error", "words"),
    [
        (np.ones(3), np.ones(3), {}, ShapeError, "x: got shape"),
        (np.ones((3, 0)), np.ones((3, 1)), {}, ShapeError, "x: got shape"),
        (np.ones((3, 2)), np.ones((2, 2)), {}, ShapeError, "y: got shape"),
        (np.ones((3, 2)), [0, 1], {}, ShapeError, "2 labels"),
        (np.ones((3, 2)), np.ones((3, 2, 2)), {}, ShapeError, "y"),
        (np.ones((3, 2)), np.ones(3), {}, ShapeError, "y"),
        (np.ones((3, 2)), ["a", "b", "c"], {}, DTypeError, "y"),
        (np.ones((3, 2)), [0, -1, 1], {}, ConfigError, "labels"),
        (np.array([["a"]]), None, {}, DTypeError, "x"),
        (np.ones((3, 2)), None, {"quality": [0.1, 0.2]}, ConfigError, "quality"),
        (np.ones((3, 2)), None, {"quality": [0.1, np.nan, 1]}, ConfigError, r"quality\[1\]"),
        (np.ones((3, 2)), None, {"weights": [1, 0, 1]}, ConfigError, r"weights\[1\]"),
        (np.ones((3, 2)), None, {"ids": ["a", "b", "a"]}, ConfigError, "'a' appears twice"),
        (np.ones((3, 2)), None, {"ids": ["a", "b"]}, ConfigError, "3 strings"),
        (np.ones((3, 2)), None, {"ids": ["a", "b", ""]}, ConfigError, r"ids\[2\]"),
        (np.ones((3, 2)), None, {"domains": ["a", "b", None]}, ConfigError, r"domain\[2\]"),
        (np.ones((3, 2)), None, {"metadata": {"x": {1, 2}}}, ConfigError, "metadata"),
        (np.ones((3, 2)), None, {"metadata": {"x": float("nan")}}, ConfigError, "metadata"),
    ],
)
def test_arrays_that_cannot_be_a_dataset(x, y, options, error, words):
    with pytest.raises(error, match=words):
        AdapterDataset.from_arrays(x, y, **options)


def test_not_a_number_is_refused_with_the_samples_id():
    x = np.ones((5000, 2))
    x[4500, 1] = np.nan
    with pytest.raises(NonFiniteError, match=r"sample 'id4500'.*row 4500"):
        AdapterDataset.from_arrays(x, ids=[f"id{i}" for i in range(5000)])
    with pytest.raises(NonFiniteError, match="y: NaN"):
        AdapterDataset.from_arrays(np.ones((2, 2)), [[1.0], [1e300]])


def test_modules_are_kept_apart():
    data = AdapterDataset(
        TrainingSample([1.0], [i], module=m) for i, m in enumerate(["q_proj", None, "v_proj"])
    )
    assert data.modules == ("q_proj", None, "v_proj")
    with pytest.raises(ConfigError, match="for_module"):
        data.arrays()
    assert data.for_module("q_proj").texts("module") == ["q_proj", None]


def test_texts_become_a_dataset_of_vectors():
    samples = [TrainingSample(query=f"word {'e' * i}", response="x" * (i + 1)) for i in range(300)]
    data = AdapterDataset(samples, validation=[TrainingSample(query="held", response="out")])
    assert not data.has_arrays
    with pytest.raises(ConfigError, match="encoded"):
        data.arrays()
    got = data.encoded(Words())
    for i in (0, 255, 256, 299):
        assert got[i] == samples[i].encoded(Words()).replace(id=got[i].id)
    assert got.validation.arrays()[1].shape == (1, 3)
    assert got.arrays()[0].shape == (300, 3)
    with pytest.raises(ConfigError, match="has no query"):
        AdapterDataset([TrainingSample(response="x")]).encoded(Words())


def test_stats_count_what_is_there():
    data = AdapterDataset(
        [
            TrainingSample(
                [1.0], label=i % 2, quality=q, domain=d, session_id=s, token_count=5, latency_ms=10
            )
            for i, (q, d, s) in enumerate(
                [(0.05, "a", "s"), (0.95, "a", "t"), (1.0, "", "s"), (0.5, "b", "")]
            )
        ],
        validation=[TrainingSample([2.0], label=1)],
    )
    got = data.stats()
    assert (got.examples, got.validation, got.in_features, got.out_features, got.kind) == (
        4,
        1,
        1,
        None,
        "labels",
    )
    assert got.quality_histogram == (1, 0, 0, 0, 0, 1, 0, 0, 0, 2)
    assert got.domains == {"a": 2, "": 1, "b": 1}
    assert got.labels == {0: 2, 1: 2}
    assert (got.sessions, got.tokens, got.latency_ms_mean, got.weight_sum) == (2, 20, 10.0, 4.0)
    assert json.loads(json.dumps(got.to_dict()))["array_bytes"] == 16
    assert "4 to train on, 1 held out" in str(got)
    assert str(AdapterDataset().stats())


def test_an_empty_dataset_is_one_too():
    empty = AdapterDataset()
    assert len(empty) == 0
    assert list(empty) == []
    assert empty == AdapterDataset([])
    assert not empty.has_arrays
    assert empty + dataset() == dataset()
    assert len(dataset().filter(min_quality=1.0).filter(lambda s: False)) == 0


def test_it_pickles():
    data = dataset(20, metadata={"a": [1]}).split()
    again = pickle.loads(pickle.dumps(data))
    assert again == data
    assert again.metadata == {"a": [1]}
    with pytest.raises(TypeError):
        hash(data)
