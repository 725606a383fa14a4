"""Fused weights come back bit for bit, tampering is seen, and work that stops leaves old files whole."""

import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as nps

import microlora as ml
import reference_fuse as ref
from base_models import CODES, adapter_of, folder_of, save, small_of, snapshot, weight
from microlora import _core
from microlora import exceptions as ex
from support import TESTS, normal, read_tensors, rng, run_python, to_bits, write_tensors


@pytest.fixture
def small(tmp_path):
    """A base with one weight of every dtype and others, and the adapter that fits it."""
    return small_of(tmp_path)


# -- the way back --

SHAPE = (4, 6)


@st.composite
def bases(draw):
    """Bits of a finite weight: any pattern, subnormals and both zeros included."""
    dtype = draw(st.sampled_from(sorted(CODES)))
    kind = ref.BITS[dtype]
    bits = draw(nps.arrays(kind, SHAPE, elements=st.integers(0, int(np.iinfo(kind).max))))
    exponent = {"F32": 0x7F80_0000, "F16": 0x7C00, "BF16": 0x7F80}[dtype]
    small = {"F32": 0x3F80_0000, "F16": 0x3C00, "BF16": 0x3F80}[dtype]
    # Infinity and NaN become numbers near one.
    bits = np.where(
        bits & kind(exponent) == exponent, bits & kind(~exponent & np.iinfo(kind).max) | kind(small), bits
    )
    return dtype, bits.astype(kind)


@given(
    bases(),
    nps.arrays(np.float32, (2, SHAPE[1]), elements=st.floats(-1e4, 1e4, width=32)),
    nps.arrays(np.float32, (SHAPE[0], 2), elements=st.floats(-1e4, 1e4, width=32)),
    st.sampled_from([1e-12, 1e-6, 1e-3, 1.0, 1e6]),
)
def test_any_weight_and_any_delta_come_back(base, a, b, alpha):
    dtype, bits = base
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        path = save(folder / "base", {"x.m.weight": (dtype, SHAPE, bits.tobytes())})
        adapter = ml.Adapter.from_factors({"x.m": (a, b)}, alpha=alpha)
        want = ref.fused(bits.tobytes(), dtype, a, b, adapter.info("x.m").scaling, "out_in")
        if not np.isfinite(ref.widen(want, dtype)).all():
            with pytest.raises(ex.NonFiniteError, match=r"fused tensor x.m.weight"):
                ml.fuse(path, adapter, out=folder / "out")
            assert [p.name for p in folder.iterdir()] == ["base"]
            return
        report = ml.fuse(path, adapter, out=folder / "out")
        assert bytes(read_tensors((folder / "out").read_bytes())[1]["x.m.weight"]) == want
        ml.unfuse(folder / "out", report.sidecar, out=folder / "back")
        assert (folder / "back").read_bytes() == path.read_bytes()


@pytest.mark.parametrize("dtype", CODES)
@pytest.mark.parametrize(("ratio", "share"), [(1e-3, 0.01), (1e-1, 0.12), (1e6, 1.01)])
def test_residuals_are_small_and_never_larger_than_the_weights(tmp_path, dtype, ratio, share):
    n = 256
    w = 0.02 * normal(rng(1), n, n)
    base = save(tmp_path / "base", {"x.m.weight": (dtype, (n, n), to_bits(w, CODES[dtype]))})
    scale = np.sqrt(0.02 * min(ratio, 1e6 if dtype != "F16" else 1e4) / 2)
    adapter = adapter_of({"x.m": (n, n)}, rank=4, alpha=4.0, scale=scale)
    report = ml.fuse(base, adapter, out=tmp_path / "out")
    assert report.residual_bytes <= share * report.touched_bytes + 16
    assert report.tensors[0].lossy > 0
    ml.unfuse(tmp_path / "out", report.sidecar, out=tmp_path / "back")
    assert (tmp_path / "back").read_bytes() == base.read_bytes()


def test_every_isa_and_thread_count_writes_the_same_bytes(tmp_path):
    tensors = {f"x.{d}.weight": weight(d, 300, 1100, seed=i) for i, d in enumerate(CODES)}
    base = save(tmp_path / "base", tensors)
    ml.save(adapter_of({f"x.{d}": (1100, 300) for d in CODES}, rank=9), tmp_path / "a.safetensors")
    code = """
import sys, microlora as ml
base, adapter, out, threads = sys.argv[1:]
ml.set_num_threads(int(threads))
ml.fuse(base, adapter, out=out)
"""
    seen = set()
    for isa in _core.available_isas():
        for threads in (1, 2):
            out = tmp_path / f"{isa}{threads}"
            run_python(code, base, tmp_path / "a.safetensors", out, threads, env={"MICROLORA_ISA": isa})
            seen.add((out.read_bytes(), (tmp_path / f"{out.name}.unfuse").read_bytes()))
            ml.unfuse(out, f"{out}.unfuse", out=tmp_path / "back")
            assert (tmp_path / "back").read_bytes() == base.read_bytes()
    assert len(seen) == 1


# -- tampering --


def flip(path, name, at, tmp_path):
    """A copy of a safetensors file with one bit of one tensor flipped."""
    header, tensors = read_tensors(path.read_bytes())
    tensors[name][at] ^= 1
    out = tmp_path / "tampered"
    out.write_bytes(write_tensors(header, tensors))
    return out


def test_tampered_files_are_refused_and_nothing_is_written(tmp_path, small):
    base, adapter = small
    report = ml.fuse(base, adapter, out=tmp_path / "out")
    other = ml.fuse(base, adapter_of({"model.layers.0.q_proj": (7, 10)}, seed=9), out=tmp_path / "other")
    car, fused = tmp_path / "out.unfuse", tmp_path / "out"
    header, tensors = read_tensors(car.read_bytes())

    def changed(**entries):
        path = tmp_path / "tampered"
        path.write_bytes(
            write_tensors({**header, "__metadata__": {**header["__metadata__"], **entries}}, tensors)
        )
        return path

    records = json.loads(header["__metadata__"]["records"])
    cases = [
        (
            lambda: flip(fused, "model.layers.0.k_proj.weight", 3, tmp_path),
            car,
            r"k_proj.weight.*changed after fusing",
        ),
        (fused, lambda: flip(car, "adapter", 400, tmp_path), "adapter was changed"),
        (fused, lambda: flip(car, "residual.0", len(tensors["residual.0"]) - 1, tmp_path), "tampered: "),
        (fused, lambda: changed(records=json.dumps(records[:2])), "header was changed"),
        (fused, lambda: changed(adapter_sha256="0" * 64), "header was changed"),
        (fused, lambda: changed(digest="0" * 64), "header was changed"),
        (fused, lambda: changed(format="pt"), "no side-car"),
        (fused, lambda: changed(format_version="2"), "upgrade"),
        (fused, lambda: changed(format_version="x"), "format_version"),
        (fused, other.sidecar, r"q_proj.weight.*another model"),
        (fused, base, "no side-car"),
        (fused, tmp_path / "out", "no side-car"),
        (base, car, "changed after fusing"),
    ]
    for source, sidecar, words in cases:
        source = source() if callable(source) else source
        sidecar = sidecar() if callable(sidecar) else sidecar
        before = snapshot(tmp_path)
        with pytest.raises(ex.FormatError, match=words):
            ml.unfuse(source, sidecar, out=tmp_path / "back")
        assert snapshot(tmp_path) == before
    assert report.tensors


def test_residuals_that_do_not_fit_are_refused(tmp_path, small):
    base, adapter = small
    ml.fuse(base, adapter, out=tmp_path / "out")
    car = tmp_path / "out.unfuse"
    header, tensors = read_tensors(car.read_bytes())
    block = tensors["residual.0"]
    assert len(block) < 10 * 7 * 4
    for raw in (
        b"",
        b"\x00",
        block + b"\x00\x00",
        block[:-1],
        b"\x02\x00",
        b"\x00" + b"\xff" * 12,
        b"\x01\x03abc",
    ):
        header["residual.0"]["shape"] = [len(raw)]
        path = tmp_path / "tampered"
        path.write_bytes(write_tensors(header, {**tensors, "residual.0": raw}))
        with pytest.raises(ex.FormatError, match=r"tampered: .*(residual|previous|takes)"):
            ml.unfuse(tmp_path / "out", path, out=tmp_path / "back")
        assert not (tmp_path / "back").exists()


def test_a_fused_model_without_its_tensor_is_refused(tmp_path, small):
    base, adapter = small
    ml.fuse(base, adapter, out=tmp_path / "out")
    header, tensors = read_tensors((tmp_path / "out").read_bytes())
    name = "model.layers.0.q_proj.weight"
    for shape, words in (([7, 10], "was fused"), (None, "no tensor")):
        changed = {k: dict(v) for k, v in header.items()}
        if shape is not None:
            changed[name]["shape"] = shape
        kept = {k: v for k, v in tensors.items() if shape is not None or k != name}
        (tmp_path / "odd").write_bytes(write_tensors(changed, kept))
        with pytest.raises(ex.FormatError, match=words):
            ml.unfuse(tmp_path / "odd", tmp_path / "out.unfuse", out=tmp_path / "back")


# -- stopping --


@pytest.mark.parametrize("is_dir", [False, True])
def test_progress_counts_bytes_and_cancelling_leaves_nothing(tmp_path, small, is_dir):
    base, adapter = folder_of(tmp_path / "base") if is_dir else small
    seen = []
    report = ml.fuse(base, adapter, out=tmp_path / "out", progress=lambda *a: seen.append(a))
    assert {what for _, _, what in seen} == {"fuse"}
    total = sum(p.stat().st_size for p in base.iterdir()) if is_dir else base.stat().st_size
    assert (seen[0], seen[-1]) == ((0, total, "fuse"), (total, total, "fuse"))
    assert [d for d, _, _ in seen] == sorted(d for d, _, _ in seen)
    before = snapshot(tmp_path)
    for stop in range(len(seen)):
        for way in ("cancel", "raise"):
            token = ml.CancelToken()

            def progress(done, total, what, token=token, way=way, stop=stop, calls=[0]):  # noqa: B006
                calls[0] += 1
                if calls[0] > stop:
                    token.cancel()
                    if way == "raise":
                        raise KeyError("mine")

            # A token that is set at the last tick is seen at none after it.
            if way == "cancel" and stop == len(seen) - 1:
                token.cancel()
            error = ex.CancelledError if way == "cancel" else KeyError
            with pytest.raises(error):
                ml.fuse(base, adapter, out=tmp_path / "new", progress=progress, cancel=token)
            assert snapshot(tmp_path) == before
    token = ml.CancelToken()
    token.cancel()
    with pytest.raises(ex.CancelledError, match="unfuse"):
        ml.unfuse(report.out, report.sidecar, out=tmp_path / "new", cancel=token)
    assert snapshot(tmp_path) == before


KILLED = """
import sys, time, microlora as ml
base, adapter, out = sys.argv[1:]
def progress(done, total, what):
    if done > total // 2:
        print("half", flush=True)
        time.sleep(100)
ml.fuse(base, adapter, out=out, progress=progress)
"""


@pytest.mark.parametrize("is_dir", [False, True])
def test_kill_9_leaves_old_files_whole(tmp_path, small, is_dir):
    base, adapter = folder_of(tmp_path / "base") if is_dir else small
    ml.save(adapter, tmp_path / "a.safetensors")
    out = tmp_path / "out"
    if is_dir:
        out.mkdir()
    else:
        out.write_bytes(b"an older model")
    before = snapshot(tmp_path)
    env = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, [str(TESTS), os.environ.get("PYTHONPATH")])),
    }
    command = [sys.executable, "-c", KILLED, str(base), str(tmp_path / "a.safetensors"), str(out)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=env) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"half\n"
        child.send_signal(signal.SIGKILL)
        assert child.wait(10) == -signal.SIGKILL
    after = snapshot(tmp_path)
    assert {k: v for k, v in after.items() if ".microlora-" not in k} == before
    assert any(k.startswith(".microlora-") for k in after)
    report = ml.fuse(base, adapter, out=out)
    assert report.tensors


MEMORY = """
import sys, microlora as ml
base, adapter, out, back, *small = sys.argv[1:]
adapter = ml.load(adapter)
ml.fuse(small[0], small[1], out=small[2])  # lazy modules are paid for here
def status(key):
    with open("/proc/self/status") as f:
        return next(int(line.split()[1]) for line in f if line.startswith(key)) * 1024
def peak(call):
    with open("/proc/self/clear_refs", "w") as f:
        f.write("5")
    start = status("VmRSS")
    report = call()
    print(status("VmHWM") - start, report.peak_bytes)
peak(lambda: ml.fuse(base, adapter, out=out))
peak(lambda: ml.unfuse(out, out + ".unfuse", out=back))
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="needs Linux")
def test_memory_is_a_few_blocks_whatever_the_tensor(tmp_path, small):
    n = 4096
    raw = to_bits(0.02 * normal(rng(1), n, n), "f32")
    base = save(tmp_path / "base", {"x.m.weight": ("F32", (n, n), raw), "x.other": ("F32", (n, n), raw)})
    ml.save(adapter_of({"x.m": (n, n)}, rank=16, scale=0.03), tmp_path / "a.safetensors")
    ml.save(small[1], tmp_path / "b.safetensors")
    paths = [base, tmp_path / "a.safetensors", tmp_path / "out", tmp_path / "back"]
    lines = run_python(MEMORY, *paths, small[0], tmp_path / "b.safetensors", tmp_path / "warm").split("\n")
    assert (tmp_path / "back").read_bytes() == base.read_bytes()
    for line in lines[:2]:
        grown, said = map(int, line.split())
        # Four blocks, the factors of one module twice as float32, and the adapter's own bytes.
        assert said <= 4 * (512 << 10) + 2 * 16 * 2 * n * 4 + (1 << 20)
        assert grown <= said + (4 << 20) < len(raw) / 4
