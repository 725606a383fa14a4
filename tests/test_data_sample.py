import copy
import pickle
from datetime import UTC, datetime

import numpy as np
import pytest

import microlora as ml
from microlora.data import TrainingSample
from microlora.exceptions import ConfigError, DTypeError, MicroLoraError, NonFiniteError, ShapeError
from support import feedback_kinds, normal, rng, run_python


def full(**changes):
    fields = {
        "input_embedding": [1.0, 2.0],
        "output_embedding": [0.5],
        "quality": 0.9,
        "query": "what?",
        "response": "that",
        "weight": 2.0,
        "domain": "code",
        "latency_ms": 150.0,
        "token_count": 7,
        "session_id": "s",
        "timestamp": 1.5e9,
        "id": "a",
        "module": "q_proj",
        "parent_id": "p",
    }
    return TrainingSample(**{**fields, **changes})


def test_the_originals_words_work():
    got = (
        ml.TrainingSample.new([1.0, 0.0], [0.0, 1.0], 0.9)
        .with_query("what is it?")
        .with_response("it is that")
        .with_latency(150.0)
        .with_session("session-123")
    )
    assert got.query == "what is it?"
    assert got.response == "it is that"
    assert (got.latency_ms, got.session_id, got.quality) == (150.0, "session-123", 0.9)
    assert got == TrainingSample(
        np.float32([1, 0]), np.float32([0, 1]), 0.9, query="what is it?", response="it is that",
        latency_ms=150.0, session_id="session-123",
    )  # fmt: skip
    assert TrainingSample.new([1.0], [0.0]).quality == 1.0


def test_arrays_are_read_only_copies():
    x = np.ones(3, np.float32)
    sample = TrainingSample(x)
    x[:] = 5
    assert sample.input_embedding.tolist() == [1, 1, 1]
    assert sample.input_embedding.dtype == np.float32
    with pytest.raises(ValueError, match="read-only"):
        sample.input_embedding[0] = 1
    with pytest.raises(AttributeError):
        sample.quality = 0.1


@pytest.mark.parametrize("field", ["input_embedding", "output_embedding", "query", "quality", "id", "module"])
def test_equal_by_value(field):
    other = {"input_embedding": [1.0, 2.5], "output_embedding": [0.0], "quality": 0.8}
    assert full() == full()
    assert hash(full()) == hash(full())
    assert full() != full(**{field: other.get(field, "z")})
    assert full() != "a"
    for again in (copy.copy(full()), copy.deepcopy(full()), pickle.loads(pickle.dumps(full()))):
        assert again == full()
        assert not again.input_embedding.flags.writeable


@pytest.mark.parametrize("kind", feedback_kinds(rng(), 4))
def test_feedback_is_kept(kind):
    f = feedback_kinds(rng(1), 4)[kind]
    sample = TrainingSample([1.0], feedback=f)
    assert sample.feedback == f
    assert sample.has_target
    assert pickle.loads(pickle.dumps(sample)) == sample


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"input_embedding": [1.0, np.nan]}, NonFiniteError, "'a': input_embedding.*index 1"),
        ({"output_embedding": [np.inf]}, NonFiniteError, "'a': output_embedding"),
        ({"input_embedding": [1e39]}, NonFiniteError, "'a': input_embedding"),
        ({"input_embedding": []}, (ShapeError, DTypeError), "input_embedding"),
        ({"input_embedding": [[1.0]]}, ShapeError, "input_embedding"),
        ({"input_embedding": [[1.0], [1.0, 2.0]]}, ShapeError, "input_embedding"),
        ({"input_embedding": "text"}, DTypeError, "input_embedding"),
        ({"input_embedding": [1j]}, DTypeError, "input_embedding"),
        ({"quality": np.nan}, ConfigError, "'a': quality"),
        ({"quality": 1.01}, ConfigError, "quality"),
        ({"quality": None}, ConfigError, "quality"),
        ({"weight": 0.0}, ConfigError, "weight"),
        ({"weight": -1}, ConfigError, "weight"),
        ({"weight": np.inf}, ConfigError, "weight"),
        ({"latency_ms": -1.0}, ConfigError, "latency_ms"),
        ({"latency_ms": np.nan}, ConfigError, "latency_ms"),
        ({"token_count": 1.5}, ConfigError, "token_count"),
        ({"token_count": -1}, ConfigError, "token_count"),
        ({"timestamp": "now"}, ConfigError, "timestamp"),
        ({"timestamp": datetime(2026, 1, 1)}, ConfigError, "time zone"),
        ({"query": 3}, ConfigError, "query"),
        ({"query": "\ud800"}, ConfigError, "surrogate"),
        ({"session_id": None}, ConfigError, "session_id"),
        ({"id": 3}, ConfigError, "id"),
        ({"module": ""}, ConfigError, "module"),
        ({"label": 1}, ConfigError, "output_embedding and label"),
        ({"output_embedding": None, "label": -1}, ConfigError, "label"),
        ({"output_embedding": None, "label": True}, ConfigError, "label"),
        ({"output_embedding": None, "feedback": 0.5}, ConfigError, "feedback"),
    ],
)
def test_what_is_wrong_is_named(changes, error, words):
    with pytest.raises(error, match=words) as caught:
        full(**changes)
    assert isinstance(caught.value, MicroLoraError)


def test_an_unknown_field_is_refused():
    with pytest.raises(ConfigError, match="colour"):
        full().replace(colour="red")


def test_a_time_with_a_zone_becomes_seconds():
    assert TrainingSample(timestamp=datetime(1970, 1, 2, tzinfo=UTC)).timestamp == 86400.0


class Words:
    name = "words"
    dim = 3

    def encode(self, texts):
        return np.array([[len(t), t.count("e"), 1.0] for t in texts], np.float32)


def test_texts_become_vectors_where_there_are_none():
    got = TrainingSample(query="abce", response="e", id="a").encoded(Words())
    np.testing.assert_allclose(got.input_embedding, np.array([4, 1, 1]) / np.sqrt(18), rtol=1e-6)
    np.testing.assert_allclose(got.output_embedding, np.full(3, 3**-0.5), rtol=1e-6)
    kept = TrainingSample([1.0], query="abc", response="e", label=1)
    assert kept.encoded(Words()) is kept
    with pytest.raises(ConfigError, match="'a'"):
        TrainingSample(response="e", id="a").encoded(Words())


def test_the_package_loads_the_room_when_it_is_used():
    code = """
import sys, microlora as ml
assert not [m for m in sys.modules if m.startswith("microlora.data")]
assert "pyarrow" not in sys.modules
assert ml.TrainingSample is ml.data.TrainingSample and ml.AdapterDataset and ml.SyntheticDataGenerator
assert "pyarrow" not in sys.modules
"""
    run_python(code)


def test_inputs_stay_bit_for_bit():
    x = normal(rng(), 50)
    assert TrainingSample(x).input_embedding.tobytes() == x.tobytes()
