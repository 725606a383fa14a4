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
from runs import N, chain, classes, comparable, config, learner, problem
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
import os, sys
sys.path.insert(0, {tests!r})
import microlora as ml
from runs import config, learner, problem
data, held = problem(n=400)
lora = learner()

class Slow:
    def on_step(self, event):
        print(event.step, flush=True)

settings = ml.AdapterTrainingConfig.from_json({settings!r})
ml.AdapterTrainer(settings).train(lora, data, held, callbacks=Slow(), resume=True)
print("done", lora.export_weights().hex(), flush=True)
"""


def test_a_killed_process_goes_on_bit_for_bit(tmp_path):
    """SIGKILL in the middle of an epoch, several times over; each process takes up what the last one left."""
    settings = config(
        {"learning_rate": 0.003},
        epochs=2,
        checkpoint_every=3,
        validation_interval=20,
        output_dir=str(tmp_path),
    )
    code = KILLED.format(tests=str(TESTS), settings=settings.to_json())
    reached = 0
    for kill_at in (7, 30, 31, 60):
        process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
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
    assert (tmp_path / FILE_NAME).exists()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    last = done.stdout.splitlines()[-1].split()
    whole = learner()
    data, held = problem(n=400)
    Trainer(settings.replace(checkpoint_every=None)).train(whole, data, held)
    assert last == ["done", whole.export_weights().hex()]


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
    from support import make

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


def test_a_checkpoint_of_another_learner_is_refused(tmp_path):
    made, data, held = run_to_checkpoint(tmp_path)
    other = make(N, N, 2, learned=False)
    before = state_of(other)
    with pytest.raises(ConfigError, match=rf"resume: .*{FILE_NAME} is of a learner m 16 -> 16 rank 4"):
        Trainer(made).train(other, data, held, resume=True)
    assert state_of(other) == before


def test_a_checkpoint_of_another_network_is_refused(tmp_path):
    """The frozen layers have a digest, which a chain says where it has one."""
    data, held = classes()
    settings = config(checkpoint_every=5, output_dir=str(tmp_path))
    net, other = chain(), chain(seed=9)
    if not getattr(net, "digest", ""):
        pytest.skip("chains have no digest here")
    Trainer(settings).train(net, data, held)
    with pytest.raises(ConfigError, match="is of a chain with a network"):
        Trainer(settings).train(other, data, held, resume=True)
    with pytest.raises(ConfigError, match="is of a chain with a network"):
        Trainer(settings).train(chain(activation="tanh"), data, held, resume=True)


def test_a_run_writes_over_no_other(tmp_path):
    made, data, held = run_to_checkpoint(tmp_path)
    whole = (tmp_path / FILE_NAME).read_bytes()
    lora = learner()
    before = state_of(lora)
    with pytest.raises(
        ConfigError, match=rf"output_dir: .*{FILE_NAME} .*resume=True .*or another output_dir"
    ):
        Trainer(made).train(lora, data, held)
    assert state_of(lora) == before
    assert (tmp_path / FILE_NAME).read_bytes() == whole
    elsewhere = made.replace(output_dir=str(tmp_path / "other"))
    trainer = Trainer(elsewhere)
    trainer.train(lora, data, held)
    trainer.train(lora, data, held)  # its own it may
    with pytest.raises(ConfigError, match="output_dir"):
        Trainer(elsewhere).train(lora, data, held, resume=tmp_path)
    Trainer(made.replace(checkpoint_every=None)).train(learner(), data, held)
    assert (tmp_path / FILE_NAME).read_bytes() == whole


def test_a_folder_stands_for_the_checkpoint_in_it(tmp_path):
    made, data, held = run_to_checkpoint(tmp_path)
    a, b = learner(), learner()
    Trainer(made.replace(output_dir=None, checkpoint_every=None)).train(a, data, held, resume=tmp_path)
    Trainer(made).train(b, data, held, resume=str(tmp_path))
    assert a.export_weights() == b.export_weights()
    with pytest.raises(OSError, match=FILE_NAME):
        Trainer(made).train(learner(), data, held, resume=tmp_path.parent)


def test_resuming_from_nothing_that_is_ever_written_is_refused(tmp_path):
    data, held = problem()
    settings = config(output_dir=str(tmp_path))
    with pytest.raises(ConfigError, match=r"resume: got True, but .* checkpoint_every=None never writes it"):
        Trainer(settings).train(learner(), data, held, resume=True)
    Trainer(settings.replace(checkpoint_every=5)).train(learner(), data, held, resume=True)
