import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from microlora.data import AdapterDataset, TrainingSample
from microlora.exceptions import ConfigError, LeakageError
from support import run_python


def sessions(keys):
    return AdapterDataset(
        TrainingSample([1.0, i], [0.0], session_id=f"s{key}", id=str(i)) for i, key in enumerate(keys)
    )


@given(
    st.lists(st.integers(0, 12), min_size=2, max_size=60),
    st.floats(0.05, 0.95),
    st.sampled_from(["id", "session", "row"]),
    st.integers(-(2**63), 2**63 - 1),
)
def test_a_split_is_a_partition_that_keeps_keys_whole(keys, share, by, seed):
    data = sessions(keys)
    try:
        got = data.split(share, by, seed)
    except ConfigError:
        assume(False)
    train, held = got.texts("id"), got.validation.texts("id")
    assert sorted(train + held, key=int) == data.texts("id")
    assert train == sorted(train, key=int)
    assert got == data.split(share, by, seed)
    if by == "session":
        assert not set(got.texts("session_id")) & set(got.validation.texts("session_id"))


@given(st.integers(0, 100), st.sampled_from(["id", "session"]))
def test_a_sample_stays_on_its_side_when_others_come(seed, by):
    small, large = sessions(range(60)), sessions(range(200))
    held = set(small.split(0.3, by, seed).validation.texts("id"))
    more = set(large.split(0.3, by, seed).validation.texts("id"))
    assert held == {name for name in more if int(name) < 60}
    mixed = large.shuffle(seed).split(0.3, by, seed)
    assert set(mixed.validation.texts("id")) == more


def test_the_share_is_met_on_average():
    data = sessions(range(4000))
    for share in (0.1, 0.2, 0.5):
        got = [len(data.split(share, seed=seed).validation) / 4000 for seed in range(5)]
        assert abs(sum(got) / 5 - share) < 0.01  # four standard errors of 20,000 draws
    assert len({tuple(data.split(0.2, seed=s).validation.texts("id")) for s in range(5)}) == 5


def test_another_process_splits_alike():
    code = """
from microlora.data import AdapterDataset, TrainingSample
d = AdapterDataset(TrainingSample([1.0, i], [0.0], id=str(i)) for i in range(30))
print(",".join(d.split(0.3, seed=5).validation.texts("id")))
"""
    outputs = {run_python(code, env={"PYTHONHASHSEED": seed}).strip() for seed in ("0", "1")}
    data = AdapterDataset(TrainingSample([1.0, i], [0.0], id=str(i)) for i in range(30))
    assert outputs == {",".join(data.split(0.3, seed=5).validation.texts("id"))}


def test_a_variation_goes_with_its_parent():
    family = [TrainingSample([1.0, i], [0.0], id=f"v{i}", parent_id=f"p{i % 20}") for i in range(100)]
    parents = [TrainingSample([2.0, i], [0.0], id=f"p{i}") for i in range(20)]
    got = AdapterDataset(parents + family).split(0.3)
    roots = [{s.root_id for s in part} for part in (got, got.validation)]
    assert not roots[0] & roots[1]


@pytest.mark.parametrize(
    ("data", "arguments", "words"),
    [
        (sessions(range(5)), {"validation": 0.0}, "validation"),
        (sessions(range(5)), {"validation": 1.0}, "validation"),
        (sessions(range(5)), {"validation": float("nan")}, "validation"),
        (sessions(range(5)), {"by": "colour"}, "by"),
        (sessions(range(5)), {"seed": 0.5}, "seed"),
        (sessions([1, 1, 1, 1]), {"by": "session"}, "would be empty"),
        (sessions([1]), {}, "would be empty"),
        (AdapterDataset(), {}, "would be empty"),
        (AdapterDataset([TrainingSample([1.0], [1.0], id="x")]), {"by": "session"}, "'x': has no session_id"),
        (sessions(range(20)).split(), {}, "held-out part already"),
    ],
)
def test_a_split_that_cannot_be(data, arguments, words):
    with pytest.raises(ConfigError, match=words):
        data.split(**arguments)


def text(query, **fields):
    return TrainingSample(query=query, response="yes", label=None, **fields)


@pytest.mark.parametrize(
    ("train", "held", "words"),
    [
        (text("a", id="1"), text("b", id="1"), "the same sample, or a variation"),
        (text("a", id="1", parent_id="2"), text("b", id="2"), "'1' is the same sample, or a variation"),
        (text("a", id="1"), text("b", id="2", parent_id="1"), "variation"),
        (text("a", id="1", parent_id="0"), text("b", id="2", parent_id="0"), "variation"),
        (text("How  are you", id="1"), text("how are YOU ", id="2"), "the same text"),
    ],
)
def test_leakage_is_refused(train, held, words):
    other = text("something else", id="9")
    with pytest.raises(LeakageError, match=words):
        AdapterDataset([other, train]).with_validation(AdapterDataset([held]))
    with pytest.raises(LeakageError, match=words):
        AdapterDataset([other, train], validation=[held])


def test_what_only_looks_like_leakage_is_not():
    apart = [("a + b", "a - b"), ("ab", "a b")]
    for a, b in apart:
        assert AdapterDataset([text(a, id="1")], validation=[text(b, id="2")]).validation is not None
    same_question = TrainingSample(query="yes", response="why?", id="1")
    assert AdapterDataset([same_question], validation=[text("yes", id="2")]).validation is not None


def test_a_text_on_both_sides_is_found_by_the_split():
    data = AdapterDataset(text("again", id=str(i)) for i in range(40))
    with pytest.raises(LeakageError, match="the same text"):
        data.split()


def test_a_held_out_part_must_fit():
    data = sessions(range(5))
    for bad, error in ((AdapterDataset(), ConfigError), ([1], ConfigError)):
        with pytest.raises(error, match="validation"):
            data.with_validation(bad)
    with pytest.raises(ValueError, match="in_features"):
        data.with_validation(AdapterDataset([TrainingSample([1.0], [1.0])]))
    assert data.split(0.5).with_validation(None).validation is None
