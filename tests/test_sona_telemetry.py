"""Logging of the loops: names, fields, levels, and the variable of the environment."""

import logging
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

import microlora as ml
from microlora.exceptions import ConfigError
from microlora.sona import telemetry
from sona_support import Words, feed, loop, stream


@pytest.fixture(autouse=True)
def _levels():
    """Every logger as it was."""
    names = [
        "microlora",
        *(f"microlora.sona{n}" for n in ("", ".instant", ".background", ".deep", ".journal")),
    ]
    before = [
        (logging.getLogger(n), logging.getLogger(n).level, list(logging.getLogger(n).handlers)) for n in names
    ]
    yield
    for log, level, handlers in before:
        log.setLevel(level)
        log.handlers[:] = handlers


def records(caplog, name):
    return [r for r in caplog.records if r.name == f"microlora.sona.{name}"]


def test_a_consolidation_is_told_with_its_fields(caplog):
    with caplog.at_level(logging.INFO, "microlora"):
        sona = loop()
        feed(sona, 60)
        result = sona.maybe_background(force=True)
    (record,) = records(caplog, "background")
    assert record.levelno == logging.INFO
    for name in telemetry.FIELDS:
        assert getattr(record, name) == getattr(result, name) or name == "quality_delta"
    assert record.getMessage().startswith("background accepted: ")
    assert records(caplog, "instant") == []


def test_a_refused_one_is_a_warning_with_its_reason(caplog):
    sona = loop()
    feed(sona, 60)
    sona.maybe_background(force=True)
    x, t = stream(60, 3)
    for row, target in zip(x, t, strict=True):
        sona.instant_adapt(row, ml.Target(-20.0 * target))
    result = sona.maybe_background(force=True)
    assert result.outcome == "rolled_back"
    record = records(caplog, "background")[-1]
    assert record.levelno == logging.WARNING
    assert result.notes[0] in record.getMessage()
    with caplog.at_level(logging.INFO, "microlora.sona.background"):
        for row, target in zip(x, t, strict=True):
            sona.instant_adapt(row, ml.Target(-20.0 * target))
        assert sona.maybe_background(force=True).outcome == "rolled_back"
    assert records(caplog, "background")[-1].levelno == logging.INFO


def test_events_are_told_only_where_someone_listens(caplog):
    quiet = loop()
    feed(quiet, 3)
    with caplog.at_level(logging.DEBUG, "microlora.sona.instant"):
        feed(quiet, 3)
        assert records(caplog, "instant") == []
        assert quiet.observe()
        feed(quiet, 3)
        told = loop(encoder=Words())
        told.instant_adapt("how?", "so", 0.7)
    found = records(caplog, "instant")
    assert [r.event for r in found] == [7, 8, 9, 1]
    assert {r.levelno for r in found} == {logging.DEBUG}
    assert not quiet.observe()
    assert "instant_adapt" not in vars(quiet)


def test_a_level_above_makes_no_record(caplog):
    with caplog.at_level(logging.ERROR, "microlora.sona.background"):
        sona = loop()
        feed(sona, 60)
        sona.maybe_background(force=True)
    assert records(caplog, "background") == []


GOOD = [
    ("debug", {"microlora": logging.DEBUG}),
    (
        "microlora.sona=debug,microlora=info",
        {"microlora.sona": logging.DEBUG, "microlora": logging.INFO},
    ),
    (" microlora.sona.deep = WARN ", {"microlora.sona.deep": logging.WARNING}),
    ("microlora=off,microlora.sona=trace", {"microlora": 60, "microlora.sona": logging.DEBUG}),
]


@pytest.mark.parametrize(("spec", "levels"), GOOD)
def test_what_the_variable_may_say(spec, levels):
    assert telemetry.configure(spec) == levels
    for name, level in levels.items():
        assert logging.getLogger(name).level == level


BAD = [
    ("microlora.sona=loud", "'microlora.sona=loud'", "debug, info"),
    ("microlora.sona=debg", "'microlora.sona=debg'", "did you mean 'debug'"),
    ("ruvllm::lora=debug", "'ruvllm::lora=debug'", "microlora.sona.background"),
    ("microloras=debug", "'microloras=debug'", "microlora or a name below"),
    ("microlora=info,", "got ''", "name=level"),
    ("=info", "'=info'", "name=level"),
    ("microlora=info,microlora=debug", "'microlora=debug'", "microlora once"),
    ("microlora", "'microlora'", "name=level"),
]


@pytest.mark.parametrize(("spec", "part", "want"), BAD)
def test_what_it_may_not_say_is_named_and_sets_nothing(spec, part, want):
    before = logging.getLogger("microlora").level
    with pytest.raises(ConfigError) as caught:
        telemetry.configure(spec)
    assert "MICROLORA_LOG" in str(caught.value)
    assert part in str(caught.value)
    assert want in str(caught.value)
    assert logging.getLogger("microlora").level == before


@given(st.text(max_size=30))
def test_any_text_is_levels_or_a_config_error(spec):
    try:
        levels = telemetry.parse(spec)
    except ConfigError:
        return
    assert levels
    assert all(name == "microlora" or name.startswith("microlora.") for name in levels)


def script(code, **variables):
    import os

    from support import TESTS

    path = os.pathsep.join(filter(None, [str(TESTS), os.environ.get("PYTHONPATH")]))
    env = {k: v for k, v in os.environ.items() if k != "MICROLORA_LOG"} | {"PYTHONPATH": path, **variables}
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, env=env, check=False
    )


RUN = """
from sona_support import feed, loop
sona = loop()
feed(sona, 60)
sona.maybe_background(force=True)
"""


def test_the_variable_is_read_when_the_room_is_first_used():
    done = script(RUN, MICROLORA_LOG="microlora.sona=info")
    assert done.returncode == 0, done.stderr
    assert "INFO microlora.sona.background: background accepted" in done.stderr
    assert "instant" not in done.stderr
    done = script(RUN, MICROLORA_LOG="microlora.sona=debug")
    assert "DEBUG microlora.sona.instant: instant learned" in done.stderr
    assert script(RUN).stderr == script(RUN, MICROLORA_LOG=" ").stderr == ""
    assert script("import microlora", MICROLORA_LOG="nonsense").returncode == 0
    done = script("import microlora.sona", MICROLORA_LOG="nonsense")
    assert "ConfigError: MICROLORA_LOG: got 'nonsense'" in done.stderr


def test_a_program_with_its_own_handlers_writes_alone():
    setup = "import logging; logging.basicConfig(format='mine %(message)s')\n"
    done = script(setup + RUN, MICROLORA_LOG="microlora.sona.background=info")
    assert done.stderr.startswith("mine background accepted")
    assert done.stderr.count("background accepted") == 1
