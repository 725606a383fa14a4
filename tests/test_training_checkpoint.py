"""Checkpoints: a run that was cut short goes on bit for bit, lies are refused, a full disk loses nothing."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

import microlora as ml
from microlora.exceptions import CancelledError, ConfigError, FormatError
from microlora.training import checkpoint
from microlora.training.checkpoint import FILE_NAME, Checkpoint
from runs import chain, classes, comparable, config, learner, problem
from support import TESTS, make, read_tensors, state_of

Trainer = ml.AdapterTrainer

SETTINGS = {
    "plain": {},
    "validated": {"validation_interval": 7, "early_stopping_patience": 0},
    "stops early": {"validation_interval": 4, "early_stopping_patience": 2},
    "mixed": {"mixed_precision": "bf16", "validation_interval": 7},
    "last": {"save_best": False, "validation_interval": 7, "early_stopping_patience": 0},
}


@pytest.fixture
def no_sync(monkeypatch):
    """Waiting for the disk says nothing about what is in the file."""
    monkeypatch.setattr(checkpoint.os, "fsync", lambda _: None)


def target_of(kind):
    if kind in ("learner", "dropout"):
        return learner(dropout=0.2 if kind == "dropout" else 0.0)
    return chain(use_dora=kind == "dora")


def data_of(kind):
    return problem() if kind in ("learner", "dropout") else classes()


def weights_of(target):
    if isinstance(target, ml.MicroLoRA):
        return target.export_weights()
    arrays = [array for pair in target.factors().values() for array in pair] + target.magnitudes()
    return [array.tobytes() for array in arrays]


def stop_after(step, token):
    class Stop:
        def on_step(self, event):
            if event.step >= step:
                token.cancel()

    return Stop()


@pytest.mark.parametrize(
    ("kind", "name", "cut", "every"),
    [(kind, name, 17, 5) for kind in ("learner", "dropout", "chain", "dora") for name in SETTINGS]
    + [("learner", "validated", cut, 1) for cut in (1, 7, 12, 13, 36)],
)
def test_a_resumed_run_is_the_whole_run(kind, name, cut, every, tmp_path, no_sync):
    data, held = data_of(kind)
    training = {"optimizer": "momentum" if name == "plain" else "adamw"}
    settings = config(training, checkpoint_every=every, output_dir=str(tmp_path), **SETTINGS[name])
    whole, cut_short, later = (target_of(kind) for _ in range(3))
    want = Trainer(settings.replace(checkpoint_every=None)).train(whole, data, held)
    token = ml.CancelToken()
    if cut < want.total_steps:
        with pytest.raises(CancelledError):
            Trainer(settings).train(cut_short, data, held, cancel=token, callbacks=stop_after(cut, token))
    else:
        Trainer(settings).train(cut_short, data, held)
    got = Trainer(settings).train(later, data, held, resume=True)
    assert comparable(got) == comparable(want)
    assert weights_of(later) == weights_of(whole)


KILLED = """
import os, sys, time
sys.path.insert(0, {tests!r})
import microlora as ml
from runs import config, learner, problem
first, (data, held) = problem(seed=5)[0], problem(n=400)
lora = learner()

class Slow:
    def on_step(self, event):
        print(event.step, flush=True)
        if str(event.step) in sys.argv:  # waits for its end, where the run's own is near
            time.sleep(100)

settings = ml.AdapterTrainingConfig.from_json({settings!r})
trainer = ml.AdapterTrainer(settings)
trainer.config = settings.replace(checkpoint_every=None, output_dir=None)
trainer.train(lora, first)
trainer.config = settings
result = trainer.train(lora, data, held, callbacks=Slow(), resume=True)
print("done", result.task, result.total_steps, result.stop_reason, lora.export_weights().hex(), flush=True)
"""


def test_a_killed_process_goes_on_bit_for_bit(tmp_path):
    """SIGKILL in the middle of an epoch, several times over; each process takes up what the last one left."""
    settings = config(
        {"learning_rate": 0.02, "ewc_lambda": 1.0, "ewc_kind": "factor", "schedule": "constant"},
        epochs=4,
        checkpoint_every=3,
        validation_interval=5,
        early_stopping_patience=6,
        output_dir=str(tmp_path),
    )
    whole = learner()
    data, held = problem(n=400)
    trainer = Trainer(settings.replace(checkpoint_every=None, output_dir=None))
    trainer.train(whole, problem(seed=5)[0])
    want = trainer.train(whole, data, held)
    assert (want.task, want.stop_reason) == (1, "early_stopping")
    waiting = want.total_steps - 8  # so that the last cut has looks without improvement behind it
    assert waiting > 40
    code = KILLED.format(tests=str(TESTS), settings=settings.to_json())
    reached = 0
    for kill_at in (7, 30, 31, waiting):
        command = [sys.executable, "-c", code, str(waiting)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        try:
            for line in process.stdout:
                step = int(line)
                assert step >= reached - 3
                if step >= kill_at:
                    process.send_signal(signal.SIGKILL)
                    break
        finally:
            process.kill()
            process.communicate()
        assert process.returncode == -signal.SIGKILL
        reached = kill_at
    assert checkpoint.read(tmp_path / FILE_NAME).state["stopping"]["waited"] > 0
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    last = done.stdout.splitlines()[-1].split()
    assert last == ["done", "1", str(want.total_steps), want.stop_reason, whole.export_weights().hex()]


@pytest.mark.parametrize("patience", [3, 5])
def test_a_run_that_has_waited_stops_where_it_would_have(patience, tmp_path, no_sync):
    """The cut comes after looks without improvement: a patience that starts anew would stop later."""
    data, _ = problem(n=40)
    _, held = problem(n=8, seed=9)  # of another map, so that learning makes it worse
    settings = config(
        {"schedule": "constant"},
        epochs=10,
        validation_interval=1,
        early_stopping_patience=patience,
        checkpoint_every=1,
        output_dir=str(tmp_path),
    )
    want = Trainer(settings.replace(checkpoint_every=None, output_dir=None)).train(learner(), data, held)
    assert want.stop_reason == "early_stopping"
    cut, token = want.total_steps - 1, ml.CancelToken()
    with pytest.raises(CancelledError):
        Trainer(settings).train(learner(), data, held, cancel=token, callbacks=stop_after(cut, token))
    assert 0 < checkpoint.read(tmp_path / FILE_NAME).state["stopping"]["waited"] < patience
    got = Trainer(settings).train(learner(), data, held, resume=True)
    assert comparable(got) == comparable(want)


def run_to_checkpoint(tmp_path, **settings):
    data, held = problem()
    made = config(
        checkpoint_every=5,
        output_dir=str(tmp_path),
        validation_interval=5,
        early_stopping_patience=0,
        **settings,
    )
    token, lora = ml.CancelToken(), learner()
    with pytest.raises(CancelledError):
        Trainer(made).train(lora, data, held, cancel=token, callbacks=stop_after(17, token))
    return made, data, held


def test_a_finished_run_resumes_to_its_result(tmp_path):
    data, held = problem()
    settings = config(checkpoint_every=5, output_dir=str(tmp_path))
    first, second = learner(), learner()
    want = Trainer(settings).train(first, data, held)
    got = Trainer(settings).train(second, data, held, resume=tmp_path / FILE_NAME)
    assert got == want
    assert second.export_weights() == first.export_weights()


def test_resume_without_a_checkpoint_starts_anew(tmp_path):
    data, held = problem()
    a, b = learner(), learner()
    settings = config(checkpoint_every=50, output_dir=str(tmp_path / "new"))
    Trainer(settings).train(a, data, held, resume=True)
    Trainer(config()).train(b, data, held)
    assert a.export_weights() == b.export_weights()


def test_another_run_is_refused(tmp_path):
    made, data, held = run_to_checkpoint(tmp_path)
    lora = learner()
    before = state_of(lora)
    other = made.replace(epochs=4, training=made.training.replace(learning_rate=0.02))
    cases = [
        (
            r"epochs: the checkpoint has 3, these settings 4; "
            r"training\.learning_rate: the checkpoint has 0\.01, "
            r"these settings 0\.02",
            other,
            data,
            held,
        ),
        (r"other data \(dataset\)", made, (data[0][::-1].copy(), data[1]), held),
        (r"other data \(validation\)", made, data, (held[0][::-1].copy(), held[1])),
        (r"other data \(validation\)", made, data, None),
    ]
    for message, settings, x, v in cases:
        with pytest.raises(ConfigError, match=message):
            Trainer(settings).train(lora, x, v, resume=True)
        assert state_of(lora) == before
    moved = made.replace(checkpoint_every=9, output_dir=str(tmp_path / "elsewhere"))
    assert Trainer(moved).train(lora, data, held, resume=tmp_path / FILE_NAME).stop_reason == "completed"


def test_another_learner_is_refused(tmp_path):
    made, data, held = run_to_checkpoint(tmp_path)

    lora = make(16, 16, 5, learned=False)
    before = state_of(lora)
    with pytest.raises((ConfigError, ml.exceptions.ShapeError)):
        Trainer(made).train(lora, data, held, resume=True)
    assert state_of(lora)[0] == before[0]


def test_what_is_in_the_file(tmp_path):
    run_to_checkpoint(tmp_path)
    header, parts = read_tensors((tmp_path / FILE_NAME).read_bytes())
    assert header["__metadata__"]["format"] == "microlora-checkpoint"
    assert set(parts) == {"snapshot", "optimizer", "best"}
    state = json.loads(header["__metadata__"]["state"])
    assert state["config"]["epochs"] == 3
    assert state["place"]["step"] == 15
    best = ml.MicroLoRA(ml.Adapter(bytes(parts["best"])))
    assert best.export_weights() == ml.MicroLoRA(ml.load(tmp_path / "best.safetensors")).export_weights()


def test_files_that_lie_are_refused(tmp_path):
    run_to_checkpoint(tmp_path)
    whole = (tmp_path / FILE_NAME).read_bytes()
    path = tmp_path / "other"

    def refused(data, message):
        path.write_bytes(data)
        with pytest.raises(FormatError, match=message):
            checkpoint.read(path)

    for end in (0, 7, 8, 50, len(whole) // 2, len(whole) - 1):
        refused(whole[:end], "other")
    refused(whole + b"x", "expected")
    altered = bytearray(whole)
    altered[-100] ^= 1
    refused(bytes(altered), "digest")
    refused(whole.replace(b'"format_version": "1"', b'"format_version": "2"'), "format_version 2 is newer")
    refused(whole.replace(b'"format_version": "1"', b'"format_version": "x"'), "expected a number")
    refused(whole.replace(b"microlora-checkpoint", b"microlora-checkp0int"), "not a checkpoint")
    refused(ml.Adapter(learner().adapter()).to_bytes(), "not a checkpoint")
    refused((2**62).to_bytes(8, "little") + b"{}", "header of")
    with pytest.raises(OSError, match="nothing"):
        checkpoint.read(tmp_path / "nothing")


def test_a_state_without_its_parts_is_refused(tmp_path):
    made, data, held = run_to_checkpoint(tmp_path)
    read = checkpoint.read(tmp_path / FILE_NAME)
    state = dict(read.state)
    del state["place"]
    checkpoint.write(tmp_path / "short", Checkpoint(state, read.parts))
    with pytest.raises(FormatError, match="without place"):
        Trainer(made).train(learner(), data, held, resume=tmp_path / "short")


def altered(state, path, value):
    """A copy of a state with one value, deep inside it, replaced."""
    out = json.loads(json.dumps(state))
    at = out
    *parents, last = [int(key) if key.isdecimal() else key for key in path.split(".")]
    for key in parents:
        at = at[key]
    at[last] = value
    return out


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("place", 3, "place: got 3, expected a mapping with epoch, row"),
        ("place", {"epoch": 1}, "place: got {'epoch': 1}, expected a mapping with epoch, row"),
        ("place.epoch", "a", r"place\.epoch: got 'a', expected an integer"),
        ("place.epoch", True, r"place\.epoch: got True, expected an integer"),
        ("place.row", -8, r"place\.row: got -8, expected an integer, 0 or above"),
        ("place.row", 96, r"place\.row: got 96, expected a row of 96"),
        ("place.loss_sum", None, r"place\.loss_sum: got None, expected a finite number"),
        ("history", [], r"history: got \[\], expected a mapping"),
        ("history", {}, "history: got {}, expected a mapping with epochs, validations"),
        ("history.epochs", {}, r"history\.epochs: got {}, expected a list"),
        ("history.epochs", [], r"history\.epochs: got '0 epochs', expected 1"),
        ("history.epochs.0.steps", 1.5, r"history\.epochs\[0\]\.steps: got 1\.5, expected an integer"),
        ("history.validations.0", 7, r"history\.validations\[0\]: got 7, expected a mapping"),
        ("history.validations.0.improved", 1, r"improved: got 1, expected True or False"),
        ("best", {"loss": 1}, "best: got {'loss': 1}, expected a mapping with loss, epoch, step"),
        ("best.loss", "low", r"best\.loss: got 'low', expected a finite number"),
        ("stopping", 3, "stopping: got 3, expected a mapping with best, checks"),
        ("stopping.diverged", 0, r"stopping\.diverged: got 0, expected True or False"),
        ("config", "x", "config: got 'x', expected a mapping"),
        ("stop_reason", 5, "stop_reason: got 5, expected None or one of completed"),
        ("stop_reason", ["completed"], "stop_reason: got .'completed'., expected None"),
        ("ewc", 5, "ewc: got 5, expected a mapping or None"),
    ],
)
def test_an_odd_state_with_a_right_digest_is_refused(field, value, message, tmp_path):
    made, data, held = run_to_checkpoint(tmp_path)
    read = checkpoint.read(tmp_path / FILE_NAME)
    path = tmp_path / "odd"
    checkpoint.write(path, Checkpoint(altered(read.state, field, value), read.parts))
    lora = learner()
    before = state_of(lora)
    with pytest.raises(FormatError, match=message) as caught:
        Trainer(made).train(lora, data, held, resume=path)
    assert str(path) in str(caught.value)
    assert state_of(lora) == before


@pytest.mark.parametrize("part", ["snapshot", "optimizer", "best"])
def test_a_missing_or_wrong_part_is_refused(part, tmp_path):
    made, data, held = run_to_checkpoint(tmp_path)
    read = checkpoint.read(tmp_path / FILE_NAME)
    path, lora = tmp_path / "odd", learner()
    before = state_of(lora)
    left = {k: v for k, v in read.parts.items() if k != part}
    checkpoint.write(path, Checkpoint(read.state, left))
    with pytest.raises(FormatError, match=f"without the part {part}"):
        Trainer(made).train(lora, data, held, resume=path)
    if part != "best":
        checkpoint.write(path, Checkpoint(read.state, {**read.parts, part: b"odd"}))
        with pytest.raises(ml.exceptions.MicroLoraError):
            Trainer(made).train(lora, data, held, resume=path)
    assert state_of(lora) == before


FULL = """
import resource, signal, sys
sys.path.insert(0, {tests!r})
import microlora as ml
from runs import config, learner, problem
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
data, held = problem()
lora = learner()

class Fill:
    def on_step(self, event):
        if event.step == 8:  # the second checkpoint will not fit any more
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))

settings = config(checkpoint_every=5, output_dir=sys.argv[1])
try:
    ml.AdapterTrainer(settings).train(lora, data, held, callbacks=Fill())
except OSError as error:
    print("refused", error.errno is not None)
"""


def test_a_full_disk_keeps_the_checkpoint_before(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", FULL.format(tests=str(TESTS)), str(tmp_path)],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == ["refused", "True"]
    assert os.listdir(tmp_path) == [FILE_NAME]
    assert checkpoint.read(tmp_path / FILE_NAME).state["place"]["step"] == 5
    settings = config(checkpoint_every=5, output_dir=str(tmp_path))
    data, held = problem()
    resumed, whole = learner(), learner()
    Trainer(settings).train(resumed, data, held, resume=True)
    Trainer(config()).train(whole, data, held)
    assert resumed.export_weights() == whole.export_weights()


def test_a_reader_sees_the_older_file_until_the_newer_is_whole(tmp_path, monkeypatch):
    path = tmp_path / "c"
    old, new = Checkpoint({"a": 1}, {"p": b"old"}), Checkpoint({"a": 2}, {"p": b"new" * 1000})
    checkpoint.write(path, old)
    seen = []
    monkeypatch.setattr(checkpoint.os, "fsync", lambda _: seen.append(checkpoint.read(path)))
    checkpoint.write(path, new)
    assert seen[0] == old  # all is written by then, but under another name
    assert checkpoint.read(path) == new

    def pieces():
        for _ in range(100):
            yield bytes(100_000)  # more than any buffer holds back
            assert checkpoint.read(path) == new
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        checkpoint.write_atomic(path, pieces())
    assert checkpoint.read(path) == new
    assert os.listdir(tmp_path) == ["c"]


def test_a_process_killed_while_writing_leaves_the_older_file(tmp_path):
    path = tmp_path / "c"
    old = Checkpoint({"a": 1}, {"p": b"old"})
    checkpoint.write(path, old)
    code = (
        "import os, pathlib, signal, sys\n"
        "from microlora.training import checkpoint\n"
        "def pieces():\n"
        "    yield bytes(10_000_000)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "checkpoint.write_atomic(pathlib.Path(sys.argv[1]), pieces())\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], check=False)
    assert done.returncode == -signal.SIGKILL
    assert checkpoint.read(path) == old


def test_an_error_while_writing_leaves_the_older_file(tmp_path, monkeypatch):
    path = tmp_path / "c"
    checkpoint.write(path, Checkpoint({"a": 1}, {"p": b"old"}))

    def fail(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint.os, "fsync", fail)
    with pytest.raises(OSError, match="No space left"):
        checkpoint.write(path, Checkpoint({"a": 2}, {"p": b"new"}))
    monkeypatch.undo()
    assert checkpoint.read(path) == Checkpoint({"a": 1}, {"p": b"old"})
    assert os.listdir(tmp_path) == ["c"]


def test_the_best_adapter_is_a_file(tmp_path):
    data, held = problem()
    lora = learner()
    Trainer(config(output_dir=str(tmp_path))).train(lora, data, held)
    assert os.listdir(tmp_path) == ["best.safetensors"]
    loaded = ml.MicroLoRA.load(tmp_path / "best.safetensors")
    assert (loaded["m"].lora_b == lora["m"].lora_b).all()
    Trainer(config(output_dir=str(tmp_path / "no"), save_best=False)).train(learner(), data, held)
    assert not (tmp_path / "no").exists()


def test_what_a_killed_run_left_over_does_not_stay(tmp_path):
    (tmp_path / f".{FILE_NAME}.tmp").write_bytes(b"half a file")
    run_to_checkpoint(tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["best.safetensors", FILE_NAME]


def test_times_go_on(tmp_path):
    """Seconds of the part before the cut are counted too."""
    made, data, held = run_to_checkpoint(tmp_path)
    seconds = checkpoint.read(tmp_path / FILE_NAME).state["place"]["seconds"]
    started = time.perf_counter()
    result = Trainer(made).train(learner(), data, held, resume=True)
    assert seconds <= result.history.epochs[1].seconds <= seconds + time.perf_counter() - started
