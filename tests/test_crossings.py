"""Cases that cross rooms: order of modules, bytes of the wrong kind, too large sizes, late refusals."""

import sys

import numpy as np
import pytest

import microlora as ml
from microlora.exceptions import FormatError, NonFiniteError


def pair(first, second):
    config = ml.LoraConfig(rank=2, target_modules=(first, second))
    return ml.MicroLoRA(config, dims={"q_proj": (8, 6), "v_proj": (4, 10)})


def taught(*order):
    lora = pair(*order)
    for name, (n_in, n_out) in {"q_proj": (8, 6), "v_proj": (4, 10)}.items():
        lora.instant(np.arange(1, n_in + 1, dtype=np.float32), ml.Target(np.ones(n_out, np.float32)), name)
    return lora


def test_restore_goes_by_name_whatever_the_order_of_modules():
    source, target = taught("q_proj", "v_proj"), pair("v_proj", "q_proj")
    target.restore(source.snapshot())
    for name, width in (("q_proj", 8), ("v_proj", 4)):
        x = np.ones(width, np.float32)
        assert np.array_equal(source.forward(x, name), target.forward(x, name))
    again = ml.Snapshot(source.snapshot().to_bytes())
    other = pair("v_proj", "q_proj")
    other.restore(again)
    step = ml.Target(np.zeros(6, np.float32))
    x = np.linspace(-1, 1, 8, dtype=np.float32)
    assert other.instant(x, step, "q_proj").loss_after == source.instant(x, step, "q_proj").loss_after


def test_restore_of_a_plain_adapter_starts_the_counters_afresh():
    lora = taught("q_proj", "v_proj")
    assert lora.counters["instant"] == 2
    lora.restore(lora.adapter())
    assert lora.counters == {"instant": 0, "adapt": 0, "apply": 0, "skipped": 0}


def test_the_bytes_of_a_snapshot_are_an_adapter_without_its_learner(tmp_path):
    lora = taught("q_proj", "v_proj")
    data = lora.snapshot().to_bytes()
    value = ml.Adapter(data)
    assert value == lora.adapter()
    assert value.extra_tensors() == {}
    learner = ml.MicroLoRA(value)
    assert ml.Snapshot(learner.snapshot().to_bytes()) == learner.snapshot()
    learner.save(tmp_path / "peft")
    assert ml.load(tmp_path / "peft").modules() == ["q_proj", "v_proj"]


def test_a_snapshot_with_nan_in_its_master_is_refused():
    config = ml.LoraConfig(rank=2, target_modules=("q_proj",), dtype="f16")
    lora = ml.MicroLoRA(config, hidden_dim=4)
    lora.instant(np.ones(4, np.float32), ml.Target(np.full(4, 0.3, np.float32)))
    data = lora.snapshot().to_bytes()
    refused = 0
    for at in range(len(data) - 4, len(data) // 2, -4):
        broken = data[:at] + np.float32(np.nan).tobytes() + data[at + 4 :]
        try:
            snapshot = ml.Snapshot(broken)
        except FormatError:
            refused += 1
            continue
        twin = ml.MicroLoRA(config, hidden_dim=4)
        twin.restore(snapshot)
        result = twin.instant(np.ones(4, np.float32), ml.Target(np.ones(4, np.float32)))
        assert np.isfinite(result.loss_after)
    assert refused


def test_a_late_row_that_is_refused_leaves_out_as_it_was():
    config = ml.LoraConfig(rank=64, alpha=1e20, target_modules=("q_proj",))
    lora = ml.MicroLoRA(config, hidden_dim=1024)
    lora.adapt(np.full(1024, 1e-3, np.float32), ml.Gradient(np.full(1024, 1e-20, np.float32)))
    lora.apply_updates(1.0)
    x = np.full((16_000, 1024), 1e-3, np.float32)
    x[-1] = 1e25
    out = np.full((16_000, 1024), 7, np.float32)
    with pytest.raises(NonFiniteError, match="row 15999"):
        lora.forward_add(x, "q_proj", out)
    assert (out == 7).all()
    lora.forward_add(x[:8], "q_proj", out[:8])
    assert not (out[:8] == 7).any()


LIMITED = """
import resource, sys
import numpy as np
import microlora as ml
resource.setrlimit(resource.RLIMIT_AS, (8 << 30, 8 << 30))
which = sys.argv[1]
try:
    if which == "make":
        ml.MicroLoRA(ml.LoraConfig(rank=65_536, target_modules="q_proj"), hidden_dim=2**31 - 1)
    else:
        lora = ml.MicroLoRA(ml.LoraConfig(rank=1, target_modules="q_proj"), hidden_dim=2**20)
        lora.delta_weight() if which == "delta" else lora["q_proj"].delta_weight()
except MemoryError as e:
    print("refused:", e)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="address-space limits are a matter of Linux")
@pytest.mark.parametrize("which", ["make", "delta", "handle"])
def test_sizes_beyond_the_machine_are_a_memory_error(which):
    from support import run_python

    assert "refused:" in run_python(LIMITED, which)


def test_the_input_basis_reports_progress_to_its_end_and_can_be_cancelled():
    lora = ml.MicroLoRA(ml.LoraConfig(rank=4, target_modules="q_proj"), hidden_dim=16)
    for rows in (100, 900):
        seen = []
        x = np.random.default_rng(0).standard_normal((rows, 16), dtype=np.float32)
        lora.fit_input_basis(x, progress=lambda done, total, _what, seen=seen: seen.append((done, total)))
        done = [d for d, _ in seen]
        assert done == sorted(done)
        assert seen[-1][0] == seen[-1][1]
        assert len({total for _, total in seen}) == 1
    token, before = ml.CancelToken(), lora.export_weights()
    token.cancel()
    with pytest.raises(ml.exceptions.CancelledError):
        lora.fit_input_basis(x, cancel=token)
    assert lora.export_weights() == before


def test_the_prior_is_measured_again_after_a_moved():
    lora = ml.MicroLoRA(ml.LoraConfig(rank=2, target_modules="q_proj"), hidden_dim=8)
    x = np.random.default_rng(1).standard_normal((50, 8), dtype=np.float32)
    lora.fit_input_basis(x)
    lora.instant(x[0], ml.Target(x[1]))
    assert lora["q_proj"].ridge == 1.0
    lora.adapt(x[0], ml.Target(x[1]))
    lora.apply_updates(0.1)
    lora.instant(x[2], ml.Target(x[1]))
    handle = lora["q_proj"]
    u = handle.scaling * handle.lora_a.astype(np.float64) @ x[2]
    assert handle.ridge == pytest.approx(u @ u, rel=1e-4)


@pytest.mark.slow
@pytest.mark.skipif(sys.version_info[:2] != (3, 11), reason="the corpus is the library of Python 3.11")
@pytest.mark.parametrize(("rank", "least"), [(16, 0.035), (32, 0.045)])
def test_twelve_personas_learn_on_the_real_corpus(rank, least, tmp_path):
    from microlora.demo.experiment import run_persona
    from microlora.demo.session import make_encoder, prepare
    from microlora.demo.task import default_api

    task = prepare(make_encoder("lsa"), 12, 10, tmp_path).task
    results = [run_persona(task, name, rank, 10, default_api())[0] for name in task.personas]
    assert np.mean([r.uplift for r in results]) >= least
    assert sum(r.uplift > 0 for r in results) >= 10
