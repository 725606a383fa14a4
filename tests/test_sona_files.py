"""A loop on disk: what comes back, what is refused, and that a save is whole or not at all."""

import json

import numpy as np
import pytest

import microlora as ml
from microlora import _core
from microlora import exceptions as ex
from microlora.sona import SonaLoop, state
from microlora.training import AdapterTrainingConfig, TrainingConfig
from sona_support import Words, feed, loop, stream
from support import close

QUICK = AdapterTrainingConfig(epochs=2, training=TrainingConfig(learning_rate=0.02))


def saved(tmp_path, **options):
    sona = loop(training=QUICK, **options)
    feed(sona, 60)
    sona.maybe_background(force=True)
    sona.save(tmp_path / "s")
    return sona


def files(folder):
    return sorted(item.name for item in folder.iterdir())


def test_a_loop_goes_on_bit_for_bit(tmp_path):
    sona = saved(tmp_path)
    again = SonaLoop.load(tmp_path / "s")
    assert again.config == sona.config
    assert (again.lora["q_proj"].lora_b == sona.lora["q_proj"].lora_b).all()
    for both in (sona, again):
        feed(both, 30, seed=5)
    assert (again.lora["q_proj"].lora_b == sona.lora["q_proj"].lora_b).all()
    heard = []
    assert SonaLoop.load(tmp_path / "s", on_event=heard.append).on_event == heard.append


def test_what_deep_runs_hold_on_to_comes_back(tmp_path):
    sona = saved(tmp_path)
    assert files(tmp_path / "s") == ["sona.json", "state-000001.safetensors"]
    x, t = stream(80, 3)
    assert sona.deep_optimize((x, t)).applied
    sona.save(tmp_path / "s")
    assert files(tmp_path / "s") == ["fisher-000002.safetensors", "sona.json", "state-000002.safetensors"]
    again = SonaLoop.load(tmp_path / "s")
    assert again._fisher == sona._fisher
    other, wanted = stream(80, 4)
    again.deep_optimize((other, -wanted))
    assert again._fisher != sona._fisher


@pytest.mark.parametrize("at", [1, 2, 3])
def test_a_save_that_fails_leaves_the_one_before(tmp_path, monkeypatch, at):
    sona = saved(tmp_path)
    sona._fisher = b"needed"
    before = sona.lora["q_proj"].lora_b.copy()
    feed(sona, 30, seed=9)
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
    close(SonaLoop.load(tmp_path / "s").lora["q_proj"].lora_b, before, rtol=0)
    sona.save(tmp_path / "s")
    assert len(files(tmp_path / "s")) == 3
    assert SonaLoop.load(tmp_path / "s")._fisher == b"needed"


def test_other_files_in_the_folder_stay(tmp_path):
    sona = saved(tmp_path)
    mine = ["notes.txt", "state-x.safetensors", "state-1.txt", "journal-000001.log"]
    for name in mine:
        (tmp_path / "s" / name).write_text("mine")
    sona.save(tmp_path / "s")
    assert set(mine) <= set(files(tmp_path / "s"))


def test_encoders_must_be_those_it_learned_with(tmp_path):
    sona = saved(tmp_path, encoder=Words())
    assert json.loads((tmp_path / "s" / "sona.json").read_text())["encoders"] == ["words", "words"]
    again = SonaLoop.load(tmp_path / "s", encoder=Words())
    assert again.instant_adapt("how?", "so", 0.9).applied
    other = Words()
    other.name = "others"
    with pytest.raises(ex.ConfigError, match=r"encoder: got .*others.*words"):
        SonaLoop.load(tmp_path / "s", encoder=other)
    bare = SonaLoop.load(tmp_path / "s")
    close(bare.forward(np.ones(12, np.float32)), sona.forward(np.ones(12, np.float32)), rtol=0)


def change(tmp_path, **fields):
    path = tmp_path / "s" / "sona.json"
    document = json.loads(path.read_text())
    document.update(fields)
    path.write_text(json.dumps(document))


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"schema_version": 2}, ex.FormatError, "newer"),
        ({"state": None}, ex.FormatError, "lacks state"),
        ({"config": None}, ex.FormatError, "lacks config"),
        ({"config": {"holdout": 3}}, ex.ConfigError, "holdout: got 3"),
        ({"state": "state-000009.safetensors"}, ex.FormatError, "is missing from the directory"),
        ({"state": "../s/state-000001.safetensors"}, ex.FormatError, "expected a file such as"),
        ({"state": "fisher-000001.safetensors"}, ex.FormatError, "expected a file such as"),
        ({"state": "/etc/passwd"}, ex.FormatError, "expected a file such as"),
        ({"state": 3}, ex.FormatError, "got 3"),
        ({"fisher": "fisher-1/../../x.safetensors"}, ex.FormatError, "expected a file such as"),
        ({"more": 1}, ex.ConfigError, "unknown key 'more'"),
    ],
)
def test_damaged_manifests(tmp_path, fields, error, message):
    saved(tmp_path)
    change(tmp_path, **fields)
    with pytest.raises(error) as caught:
        SonaLoop.load(tmp_path / "s")
    assert message in str(caught.value)


def test_not_a_loop_at_all(tmp_path):
    with pytest.raises(ex.FormatError, match=r"without sona\.json"):
        SonaLoop.load(tmp_path)
    with pytest.raises(FileNotFoundError):
        SonaLoop.load(tmp_path / "nothing")
    (tmp_path / "sona.json").write_text("{")
    with pytest.raises(ex.FormatError, match="not valid JSON"):
        SonaLoop.load(tmp_path)


@pytest.mark.parametrize("cut", [0, 1, 8, 100, -1])
def test_a_truncated_state(tmp_path, cut):
    saved(tmp_path)
    path = tmp_path / "s" / "state-000001.safetensors"
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(ex.FormatError):
        SonaLoop.load(tmp_path / "s")


def test_reading_is_what_was_written(tmp_path):
    sona = saved(tmp_path)
    parts = state.read(tmp_path / "s")
    assert parts.config == sona.config
    assert parts.state == sona.to_bytes()
    assert parts.fisher is None
    assert isinstance(ml.SonaLoop.load(tmp_path / "s"), SonaLoop)
