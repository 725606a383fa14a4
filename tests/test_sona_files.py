"""A loop on disk: what comes back, what is refused, and that a save is whole or not at all."""

import contextlib
import json
import logging
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import microlora as ml
from microlora import _core
from microlora import exceptions as ex
from microlora.sona import JournalConfig, SonaLoop, state
from microlora.training import AdapterTrainingConfig, TrainingConfig
from sona_support import Words, config, feed, loop, stream
from support import TESTS, close

QUICK = AdapterTrainingConfig(epochs=2, training=TrainingConfig(learning_rate=0.02))


def saved(tmp_path, **options):
    sona = loop(training=QUICK, **options)
    feed(sona, 60)
    sona.maybe_background(force=True)
    sona.save(tmp_path / "s")
    return sona


def weights(sona):
    return sona.lora["q_proj"].lora_b.copy()


def files(folder):
    return sorted(item.name for item in folder.iterdir())


def test_a_loop_goes_on_bit_for_bit(tmp_path):
    sona = saved(tmp_path)
    again = SonaLoop.load(tmp_path / "s")
    assert again.config == sona.config
    assert (weights(again) == weights(sona)).all()
    assert (again.consolidated().lora_b("q_proj") == sona.consolidated().lora_b("q_proj")).all()
    for both in (sona, again):
        feed(both, 30, seed=5)
    assert (weights(again) == weights(sona)).all()
    heard = []
    assert SonaLoop.load(tmp_path / "s", on_event=heard.append).on_event == heard.append


def test_what_deep_runs_hold_on_to_comes_back(tmp_path):
    sona = saved(tmp_path)
    assert files(tmp_path / "s") == ["state.safetensors"]
    x, t = stream(80, 3)
    assert sona.deep_optimize((x, t)).applied
    sona.save(tmp_path / "s")
    assert files(tmp_path / "s") == ["fisher.safetensors", "state.safetensors"]
    again = SonaLoop.load(tmp_path / "s")
    assert again._fisher == sona._fisher is not None
    # What the loaded one knows of the first run acts in its next.
    other, wanted = stream(80, 4)
    assert again.deep_optimize((other, wanted)).training.task == 1
    loop().save(tmp_path / "s")
    assert files(tmp_path / "s") == ["state.safetensors"]


@pytest.mark.parametrize("at", [1, 2])
def test_a_save_that_fails_leaves_the_one_before(tmp_path, monkeypatch, at):
    sona = saved(tmp_path)
    x, t = stream(80, 3)
    before = weights(sona)
    sona.deep_optimize((x, t))
    real, calls = _core.write_file, []

    def write(path, data):
        calls.append(path)
        if len(calls) == at:
            raise OSError("no space left on device")
        real(path, data)

    monkeypatch.setattr(_core, "write_file", write)
    with pytest.raises(OSError, match="no space"):
        sona.save(tmp_path / "s")
    monkeypatch.undo()
    close(weights(SonaLoop.load(tmp_path / "s")), before, rtol=0)
    sona.save(tmp_path / "s")
    close(weights(SonaLoop.load(tmp_path / "s")), weights(sona), rtol=0)


def test_other_files_in_the_folder_stay_and_journals_are_not_overrun(tmp_path):
    sona = saved(tmp_path)
    (tmp_path / "s" / "notes.txt").write_text("mine")
    sona.save(tmp_path / "s")
    assert (tmp_path / "s" / "notes.txt").read_text() == "mine"
    (tmp_path / "s" / "journal-1").mkdir()
    with pytest.raises(ex.ConfigError, match="has a journal"):
        sona.save(tmp_path / "s")


def test_encoders_must_be_those_it_learned_with(tmp_path):
    sona = saved(tmp_path, encoder=Words())
    again = SonaLoop.load(tmp_path / "s", encoder=Words())
    assert again.instant_adapt("how?", "so", 0.9).applied
    other = Words()
    other.name = "others"
    for make in (SonaLoop.load, SonaLoop.open):
        with pytest.raises(ex.ConfigError, match=r"encoder: got .*others.*words"):
            make(tmp_path / "s", encoder=other)
    for arg in ("encoder", "response_encoder"):
        fitted = Words()
        # Of the same name and width; one of its texts has moved by a little more than rounding explains.
        fitted.encode = lambda texts: _turned(Words().encode(texts), 0.005)
        given = {"encoder": Words(), arg: fitted}
        for make in (SonaLoop.load, SonaLoop.open):
            with pytest.raises(ex.ConfigError, match=rf"^{arg}: got .*differ by 0\.00"):
                make(tmp_path / "s", **given)
        fitted.encode = lambda texts: _turned(Words().encode(texts), 0.0005)
        SonaLoop.load(tmp_path / "s", **given)
    bare = SonaLoop.load(tmp_path / "s")
    close(bare.forward(np.ones(12, np.float32)), sona.forward(np.ones(12, np.float32)), rtol=0)


def _turned(vectors, by):
    """Each vector scaled to length 1, and turned by a small angle in the plane of two coordinates."""
    vectors = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    a, b = vectors[:, 0].copy(), vectors[:, 1].copy()
    vectors[:, 0], vectors[:, 1] = np.cos(by) * a - np.sin(by) * b, np.sin(by) * a + np.cos(by) * b
    return vectors


def test_an_encoder_that_gives_no_vectors_stops_no_save(tmp_path):
    mute = Words()
    sona = saved(tmp_path, encoder=mute)
    mute.encode = lambda texts: 1 / 0
    again = SonaLoop.load(tmp_path / "s", encoder=mute)
    again.save(tmp_path / "t")
    assert state.read(tmp_path / "t").probes is None
    assert SonaLoop.load(tmp_path / "t", encoder=Words()).encoder.name == sona.encoder.name


GOOD = {"schema_version": 1, "config": config().to_dict(), "encoders": None}


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        (json.dumps({**GOOD, "schema_version": 2}), ex.FormatError, "newer"),
        (json.dumps({"schema_version": 1}), ex.FormatError, "lacks config"),
        (json.dumps({**GOOD, "config": {"holdout": 3}}), ex.ConfigError, "holdout: got 3"),
        (json.dumps({**GOOD, "probes": [1, "a"]}), ex.FormatError, "probes are no vectors"),
        (json.dumps({**GOOD, "probes": [[1.0], [1.0]]}), ex.FormatError, "probes are no vectors"),
        (json.dumps({**GOOD, "more": 1}), ex.ConfigError, "unknown key 'more'"),
        ("{", ex.FormatError, "not valid JSON"),
        ("[]", ex.FormatError, "got a JSON list"),
    ],
)
def test_settings_that_cannot_be_read(tmp_path, text, error, message):
    sona = loop()
    (tmp_path / "state.safetensors").write_bytes(sona.to_bytes(text))
    for make in (SonaLoop.load, SonaLoop.open):
        with pytest.raises(error) as caught:
            make(tmp_path)
        assert message in str(caught.value)


def test_not_a_loop_at_all(tmp_path):
    with pytest.raises(ex.FormatError, match=r"without state\.safetensors"):
        SonaLoop.load(tmp_path)
    with pytest.raises(FileNotFoundError):
        SonaLoop.load(tmp_path / "nothing")
    (tmp_path / "state.safetensors").write_bytes(loop().adapter().to_bytes())
    with pytest.raises(ex.FormatError):
        SonaLoop.load(tmp_path)


@pytest.mark.parametrize("cut", [0, 1, 8, 100, -1])
def test_a_truncated_state(tmp_path, cut):
    saved(tmp_path)
    path = tmp_path / "s" / "state.safetensors"
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(ex.FormatError):
        SonaLoop.load(tmp_path / "s")


@pytest.mark.parametrize("cut", [0, 8, -1])
def test_a_truncated_fisher_is_named(tmp_path, cut):
    sona = saved(tmp_path)
    x, t = stream(80, 3)
    assert sona.deep_optimize((x, t)).applied
    sona.save(tmp_path / "s")
    path = tmp_path / "s" / "fisher.safetensors"
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(ex.FormatError, match=r"fisher\.safetensors"):
        SonaLoop.load(tmp_path / "s")


# -- a loop that lives in a directory --


def test_a_new_directory_and_one_that_is_gone_on_with(tmp_path):
    with SonaLoop.open(tmp_path / "d", config(training=QUICK)) as sona:
        assert not sona.opened.found
        assert sona.opened.path == tmp_path / "d"
        feed(sona, 60)
        sona.maybe_background(force=True)
        assert sona.checkpoint() == (tmp_path / "d" / "state.safetensors").stat().st_size
        kept = weights(sona)
    assert sona.opened is None
    assert not sona.running
    with pytest.raises(ex.ConfigError, match="checkpoint"):
        sona.checkpoint()
    again = SonaLoop.open(tmp_path / "d")
    assert again.opened.found
    assert again.opened.exact
    assert again.config == sona.config
    close(weights(again), kept, rtol=0)
    again.close()
    with pytest.raises(ex.ConfigError, match="other settings than the state"):
        SonaLoop.open(tmp_path / "d", config(seed=3))
    SonaLoop.open(tmp_path / "d", config(training=QUICK)).close()


def test_a_deep_run_writes_what_it_holds_on_to_at_once(tmp_path):
    sona = SonaLoop.open(tmp_path / "d", config(training=QUICK))
    x, t = stream(80, 3)
    assert sona.deep_optimize((x, t)).applied
    assert (tmp_path / "d" / "fisher.safetensors").read_bytes() == sona._fisher
    sona.checkpoint()
    sona.close()
    again = SonaLoop.open(tmp_path / "d")
    assert again._fisher == sona._fisher
    again.close()


KILLED = """
import os, signal, sys
import microlora as ml
from microlora.sona import JournalConfig, SonaLoop
from sona_support import config, stream
sona = SonaLoop.open(sys.argv[1], config(), journal=JournalConfig())
x, t = stream(300, 1)
for i in range(300):
    sona.instant_adapt(x[i], ml.Target(t[i]))
    if i % 100 == 60:
        sona.maybe_background(force=True)
    if i == 150:
        sona.checkpoint()
open(sys.argv[2], "wb").write(sona.lora["q_proj"].lora_b.tobytes())
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_killed_process_is_gone_on_with_bit_for_bit(tmp_path):
    code = [sys.executable, "-c", KILLED, str(tmp_path / "d"), str(tmp_path / "b")]
    path = os.pathsep.join(filter(None, [str(TESTS), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(code, env={**os.environ, "PYTHONPATH": path}, check=False)
    assert done.returncode == -signal.SIGKILL
    with SonaLoop.open(tmp_path / "d", journal=JournalConfig()) as sona:
        assert sona.opened.found
        assert sona.opened.replayed > 100
        assert sona.opened.exact
        assert weights(sona).tobytes() == (tmp_path / "b").read_bytes()
        assert sona.stats().instant_count == 300
        assert [line["event"] for line in sona.audit() if line["kind"] == "event"][-1] == 300
        x, t = stream(1, 9)
        before = weights(sona)
        event = sona.instant_adapt(x[0], ml.Target(t[0])).event
        assert event == 301
        sona.forget(event)
        close(weights(sona), before, rtol=1e-4, atol=1e-5)


def test_one_process_at_a_time(tmp_path):
    with SonaLoop.open(tmp_path / "d", config()):
        with pytest.raises(BlockingIOError, match="in use"):
            SonaLoop.open(tmp_path / "d")
        SonaLoop.load(tmp_path / "d")
    SonaLoop.open(tmp_path / "d").close()


def test_a_forked_child_does_not_write_into_its_parents_journal(tmp_path):
    with SonaLoop.open(tmp_path / "d", config(), journal=JournalConfig()) as sona:
        feed(sona, 10)
        pid = os.fork()
        if pid == 0:
            with contextlib.suppress(Exception):
                feed(sona, 5, seed=3)
            os._exit(0)
        assert os.waitpid(pid, 0)[1] == 0
        feed(sona, 10, seed=1)
        kept = weights(sona)
        lines = sona.audit()
        assert [line["event"] for line in lines if line["kind"] == "event"] == list(range(1, 21))
    again = SonaLoop.open(tmp_path / "d")
    (warning,) = again.opened.warnings
    assert warning.startswith("opened without a journal")
    assert (weights(again) == kept).all()
    again.close()


def test_without_a_journal_the_end_of_the_block_saves(tmp_path):
    with SonaLoop.open(tmp_path / "d", config()) as sona:
        feed(sona, 60)
    assert (weights(SonaLoop.load(tmp_path / "d")) == weights(sona)).all()
    with SonaLoop.open(tmp_path / "d") as again:
        assert again.opened.found
        assert again.opened.warnings == ()
        assert again.stats().instant_count == 60
        feed(again, 5, seed=2)
    last = SonaLoop.open(tmp_path / "d")
    assert last.stats().instant_count == 65
    feed(last, 1, seed=3)
    last.close()
    last.close()
    assert SonaLoop.load(tmp_path / "d").stats().instant_count == 66


def test_opening_without_a_journal_ends_the_one_that_was_there(tmp_path):
    with contextlib.closing(SonaLoop.open(tmp_path / "d", config(), journal=JournalConfig())) as sona:
        feed(sona, 30)
        assert sona.maybe_background(force=True).loop_type == "background"
    with contextlib.closing(SonaLoop.open(tmp_path / "d")) as again:
        assert [text.split(":")[0] for text in again.opened.warnings] == ["opened without a journal"]
        assert (weights(again) == weights(sona)).all()
        with pytest.raises(ex.ConfigError, match="journal"):
            again.audit()
    with contextlib.closing(SonaLoop.open(tmp_path / "d", journal=JournalConfig())) as once_more:
        assert once_more.opened.warnings == ()
        assert [line for line in once_more.audit() if line["kind"] == "event"] == []
        with pytest.raises(ex.FeedbackError, match="event"):
            once_more.forget(3)


def test_what_was_found_is_logged(tmp_path, monkeypatch, caplog):
    found = {"found": True, "replayed": 3, "exact": False, "warnings": ["record 7 is damaged"]}
    monkeypatch.setattr(_core.Sona, "open_dir", lambda *_: json.dumps(found), raising=False)
    with caplog.at_level(logging.INFO, "microlora.sona.journal"):
        sona = SonaLoop.open(tmp_path / "d", config())
    assert sona.opened == (tmp_path / "d", True, 3, False, ("record 7 is damaged",))
    levels = [(r.levelname, r.name) for r in caplog.records]
    assert levels == [("WARNING", "microlora.sona.journal"), ("INFO", "microlora.sona.journal")]
    assert "record 7 is damaged" in caplog.text


def test_bad_arguments_of_open(tmp_path):
    with pytest.raises(ex.DTypeError, match="journal: got bool"):
        SonaLoop.open(tmp_path / "d", config(), journal=True)
    with pytest.raises(ex.ConfigError, match="config: got neither"):
        SonaLoop.open(tmp_path / "d")
    assert not (tmp_path / "d").exists()


@pytest.mark.parametrize(
    ("settings", "core"),
    [
        ({}, ("never", 0.0, 16 << 20, None)),
        ({"fsync": "always", "segment_bytes": 4096}, ("always", 0.0, 4096, None)),
        ({"fsync": "events", "every": 32, "retain_bytes": 0}, ("events", 32.0, 16 << 20, 0)),
        ({"fsync": "interval", "every": 0.5}, ("interval", 0.5, 16 << 20, None)),
    ],
)
def test_journal_settings(settings, core):
    journal = JournalConfig(**settings)
    assert journal.core() == core
    assert JournalConfig.from_json(journal.to_json()) == journal


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"fsync": "sometimes"}, "fsync: got 'sometimes'"),
        ({"every": 3}, "every: got 3, expected None with fsync 'never'"),
        ({"fsync": "events"}, "every: got None"),
        ({"fsync": "events", "every": 0}, "every: got 0"),
        ({"fsync": "events", "every": 1.5}, "every: got 1.5"),
        ({"fsync": "interval", "every": 0}, "every: got 0"),
        ({"fsync": "interval", "every": float("nan")}, "every: got nan"),
        ({"segment_bytes": 100}, "segment_bytes: got 100"),
        ({"retain_bytes": -1}, "retain_bytes: got -1"),
    ],
)
def test_bad_journal_settings(settings, message):
    with pytest.raises(ex.ConfigError) as caught:
        JournalConfig(**settings)
    assert message in str(caught.value)


@given(st.sampled_from(["events", "interval"]), st.integers(1, 10**6), st.none() | st.integers(0, 10**12))
def test_journal_settings_as_json(fsync, every, retain):
    journal = JournalConfig(fsync=fsync, every=every, retain_bytes=retain)
    assert JournalConfig.from_json(journal.to_json()) == journal


def test_reading_is_what_was_written(tmp_path):
    sona = saved(tmp_path)
    parts = state.read(tmp_path / "s")
    assert parts.config == sona.config
    assert parts.fisher is None
    assert parts.encoders is None
