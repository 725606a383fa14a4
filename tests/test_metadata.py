import dataclasses
import pickle
from datetime import datetime, timedelta

import pytest
from hypothesis import given

from microlora.exceptions import ConfigError, FormatError
from microlora.metadata import AdapterMetadata, Metric, utc_now
from strategies import metadata

METRIC = Metric("mrr@10", "sha256:00", 0.25)


def test_the_defaults_are_empty():
    empty = AdapterMetadata()
    assert empty.to_dict() == {
        "schema_version": 1,
        "name": "",
        "version": "",
        "base_model": "",
        "base_fingerprint": "",
        "task_types": [],
        "training_size": 0,
        "metrics": [],
        "created": "",
        "parents": [],
    }


@given(metadata)
def test_json_round_trip_of_any_metadata(value):
    document = value.to_json()
    assert AdapterMetadata.from_json(document) == value
    assert AdapterMetadata.from_json(document).to_json() == document
    assert AdapterMetadata.from_dict(value.to_dict()) == value
    assert pickle.loads(pickle.dumps(value)) == value
    assert hash(AdapterMetadata.from_json(document)) == hash(value)


def test_frozen_and_replaced():
    value = AdapterMetadata(name="a", metrics=[METRIC])
    assert value.metrics == (METRIC,)
    with pytest.raises(dataclasses.FrozenInstanceError):
        value.name = "b"
    assert value.replace(name="b").metrics == (METRIC,)
    with pytest.raises(ConfigError, match=r"unknown key 'nmae'.*'name'"):
        value.replace(nmae="b")
    with pytest.raises(ConfigError, match="training_size: got -1"):
        value.replace(training_size=-1)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *[
            (name, None)
            for name in ("name", "version", "base_model", "base_fingerprint", "created", "parents")
        ],
        ("name", "\ud800"),
        ("task_types", "chat"),
        ("task_types", ["chat", "chat"]),
        ("task_types", [""]),
        ("training_size", -1),
        ("training_size", 1.5),
        ("training_size", True),
        ("training_size", 2**63),
        ("metrics", "x"),
        ("metrics", 3),
        ("metrics", [{"name": "a"}]),
        ("parents", "abc"),
        ("created", "yesterday"),
        ("created", "2026-01-31"),
        ("created", "2026-01-31T12:00:00"),
        ("created", "2026-01-31T12:00:00+02:00"),
        ("created", "2026-13-31T12:00:00Z"),
    ],
)
def test_every_bad_value_is_refused_by_name(field, value):
    with pytest.raises(ConfigError, match=rf"^{field}.*: got .*, expected "):
        AdapterMetadata(**{field: value})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("name", ""),
        ("name", 1),
        ("data_hash", ""),
        ("data_hash", None),
        ("value", float("nan")),
        ("value", "1"),
    ],
)
def test_every_bad_value_of_a_metric_is_refused_by_name(field, value):
    with pytest.raises(ConfigError, match=rf"^metric\.{field}: got .*, expected "):
        dataclasses.replace(METRIC, **{field: value})


@pytest.mark.parametrize(
    ("document", "error", "reason"),
    [
        ('{"schema_version": 3}', FormatError, "metadata: schema_version 3 is newer than 2"),
        (
            '{"training_sise": 2}',
            ConfigError,
            "metadata: unknown key 'training_sise'.*did you mean 'training_size'",
        ),
        ('{"metrics": {}}', ConfigError, "metrics: got {}, expected a list"),
        ('{"metrics": [3]}', ConfigError, "metric: got 3"),
        ('{"metrics": [{"name": "a", "data_hash": "b"}]}', ConfigError, "metric: key 'value' is missing"),
        (
            '{"metrics": [{"name": "a", "data_hash": "b", "value": 1, "unit": 1}]}',
            ConfigError,
            "unknown key 'unit'",
        ),
        ('{"name": 3}', ConfigError, "name: got 3"),
        ("null", FormatError, "metadata: got a JSON NoneType"),
        ("{", FormatError, "metadata: not valid JSON"),
    ],
)
def test_documents_that_are_refused(document, error, reason):
    with pytest.raises(error, match=reason):
        AdapterMetadata.from_json(document)


def test_utc_now_is_a_legal_time():
    stamp = AdapterMetadata(created=utc_now()).created
    when = datetime.fromisoformat(stamp)
    assert abs(datetime.now(when.tzinfo) - when) < timedelta(minutes=1)
