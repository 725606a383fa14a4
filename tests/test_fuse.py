"""Adapters fused into base weights: the float64 twin, layouts, names, folders, and the way back bit for bit."""

import hashlib
import json
import os
import shutil
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
from microlora import _core
from microlora import exceptions as ex
from support import TESTS, make, normal, read_tensors, rng, run_python, to_bits, write_tensors

CODES = {"F32": "f32", "F16": "f16", "BF16": "bf16"}
SIZES = {"F32": 4, "F16": 2, "BF16": 2, "I64": 8, "U8": 1}


def save(path, tensors, metadata=None):
    """A safetensors file of ``{name: (dtype, shape, bytes)}``, in this order."""
    header = {} if metadata is None else {"__metadata__": metadata}
    header |= {k: {"dtype": d, "shape": list(s)} for k, (d, s, _) in tensors.items()}
    path.write_bytes(write_tensors(header, {k: raw for k, (_, _, raw) in tensors.items()}))
    return path


def weight(dtype, *shape, seed=0, scale=0.1):
    return dtype, shape, to_bits(scale * normal(rng(seed), *shape), CODES[dtype])


def adapter_of(shapes, rank=3, alpha=5.0, seed=1, scale=0.3, **settings):
    """``{module: (in, out)}`` to an adapter."""
    r = rng(seed)
    factors = {m: (scale * normal(r, rank, i), scale * normal(r, o, rank)) for m, (i, o) in shapes.items()}
    return ml.Adapter.from_factors(factors, alpha=alpha, **settings)


def snapshot(folder):
    """Every path below a folder with its bytes."""
    return {
        str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in sorted(folder.rglob("*"))
    }


def check(base, out, adapter, report):
    """Touched tensors are the twin's, everything else is the base's, byte for byte."""
    (header, before), (header_out, after) = read_tensors(base.read_bytes()), read_tensors(out.read_bytes())
    assert list(header.items()) == list(header_out.items())
    touched = {t.tensor: t for t in report.tensors}
    for name in before:
        if name not in touched:
            assert before[name] == after[name]
            continue
        t = touched[name]
        a, b = adapter.factors(t.module)
        info = adapter.info(t.module)
        want = ref.fused(before[name], header[name]["dtype"], a, b, info.scaling, t.layout)
        assert bytes(after[name]) == want
        assert want != bytes(before[name])


@pytest.fixture
def small(tmp_path):
    """A base with one weight of every dtype and others, and the adapter that fits it."""
    tensors = {
        "z.odd": ("U8", (5,), b"12345"),
        "model.layers.0.q_proj.weight": weight("F32", 10, 7),
        "model.layers.0.q_proj.bias": weight("F32", 10),
        "model.layers.0.k_proj.weight": weight("F16", 6, 7, seed=2),
        "model.mask": ("F32", (3,), to_bits([-np.inf, np.nan, 1.0], "f32")),
        "model.layers.0.v_proj.weight": weight("BF16", 9, 7, seed=3),
        "model.ids": ("I64", (2, 1), bytes(16)),
        "empty": ("F32", (0, 3), b""),
    }
    base = save(tmp_path / "base.safetensors", tensors, {"format": "pt", "ä": "ö"})
    shapes = {f"model.layers.0.{n}_proj": (7, o) for n, o in (("q", 10), ("k", 6), ("v", 9))}
    return base, adapter_of(shapes)


@pytest.mark.parametrize("settings", [{}, {"use_rslora": True}, {"dtype": "f16"}, {"dtype": "bf16"}])
def test_weights_are_those_of_the_float64_twin(tmp_path, small, settings):
    base, adapter = small
    adapter = adapter_of({m: adapter.dims[m] for m in adapter.modules()}, **settings)
    before = snapshot(tmp_path)
    report = ml.fuse(base, adapter, out=tmp_path / "out.safetensors")
    check(base, tmp_path / "out.safetensors", adapter, report)
    assert snapshot(tmp_path).items() >= before.items()
    back = ml.unfuse(report.out, report.sidecar, out=tmp_path / "back.safetensors")
    assert (tmp_path / "back.safetensors").read_bytes() == base.read_bytes()
    assert [t.tensor for t in back.tensors] == [t.tensor for t in report.tensors]


def test_report_says_what_is_in_the_files(tmp_path, small):
    base, adapter = small
    report = ml.fuse(str(base), adapter, out=str(tmp_path / "out"))
    car = tmp_path / "out.unfuse"
    assert report.sidecar == str(car)
    header, tensors = read_tensors(car.read_bytes())
    assert bytes(tensors["adapter"]) == adapter.to_bytes()
    assert ml.Adapter(bytes(tensors["adapter"])) == adapter
    assert report.adapter_sha256 == hashlib.sha256(adapter.to_bytes()).hexdigest()
    assert header["__metadata__"]["adapter_sha256"] == report.adapter_sha256
    assert report.adapter_bytes == len(adapter.to_bytes())
    assert report.sidecar_bytes == car.stat().st_size
    records = json.loads(header["__metadata__"]["records"])
    _, before = read_tensors(base.read_bytes())
    _, after = read_tensors((tmp_path / "out").read_bytes())
    for i, (record, tensor) in enumerate(zip(records, report.tensors, strict=True)):
        assert record["original_sha256"] == hashlib.sha256(before[tensor.tensor]).hexdigest()
        assert record["fused_sha256"] == hashlib.sha256(after[tensor.tensor]).hexdigest()
        assert len(tensors[f"residual.{i}"]) == tensor.residual_bytes
    assert report.touched_bytes == sum(len(before[t.tensor]) for t in report.tensors)
    assert report.model_bytes == base.stat().st_size
    assert report.residual_bytes == sum(t.residual_bytes for t in report.tensors)
    assert {t.layout for t in report.tensors} == {"out_in"}
    assert {t.layout_from for t in report.tensors} == {"shape"}
    for word in (f"{report.sidecar_bytes:,}", "3 tensors", str(car)):
        assert word in str(report)


def test_sidecar_can_be_left_out_or_put_elsewhere(tmp_path, small):
    base, adapter = small
    none = ml.fuse(base, adapter, out=tmp_path / "a", sidecar=False)
    assert (none.sidecar, none.sidecar_bytes, none.adapter_sha256) == (None, 0, "")
    assert not (tmp_path / "a.unfuse").exists()
    (tmp_path / "cars").mkdir()
    other = ml.fuse(base, adapter, out=tmp_path / "b", sidecar=tmp_path / "cars" / "b")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert other.sidecar_bytes == (tmp_path / "cars" / "b").stat().st_size
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b", "base.safetensors", "cars"]


def test_adapters_come_as_values_learners_and_files(tmp_path):
    base = save(tmp_path / "base", {"x.m.weight": weight("F32", 8, 12)})
    lora = make(12, 8, names=("x.m",))
    lora.save(tmp_path / "a.safetensors")
    files = []
    for i, adapter in enumerate([lora, lora.adapter(), lora.snapshot(), tmp_path / "a.safetensors"]):
        ml.fuse(base, adapter, out=tmp_path / f"out{i}", sidecar=False)
        files.append((tmp_path / f"out{i}").read_bytes())
    assert len(set(files)) == 1
    _, tensors = read_tensors(files[0])
    want = np.frombuffer(base.read_bytes()[-8 * 12 * 4 :], "f4").reshape(8, 12) + lora.delta_weight("x.m")
    np.testing.assert_allclose(
        np.frombuffer(tensors["x.m.weight"], "f4").reshape(8, 12), want, rtol=1e-5, atol=1e-6
    )


def test_a_zero_adapter_changes_no_number(tmp_path):
    base = save(tmp_path / "base", {"x.m.weight": weight("BF16", 8, 12)})
    lora = ml.MicroLoRA(ml.LoraConfig(rank=2, target_modules=("x.m",)), dims={"x.m": (12, 8)})
    report = ml.fuse(base, lora, out=tmp_path / "out")
    assert (tmp_path / "out").read_bytes() == base.read_bytes()
    assert report.tensors[0].lossy == 0


# -- layouts --


def with_peft(adapter, tmp_path, fan_in_fan_out):
    """The same adapter, read from a PEFT folder with this setting."""
    folder = tmp_path / f"peft-{fan_in_fan_out}"
    ml.save(adapter, folder, "peft")
    config = json.loads((folder / "adapter_config.json").read_text())
    config["fan_in_fan_out"] = fan_in_fan_out
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return ml.load(folder)


@pytest.mark.parametrize("dtype", CODES)
def test_transposed_layers_and_embeddings_are_told_by_shape(tmp_path, dtype):
    tensors = {
        "h.0.attn.c_attn.weight": weight(dtype, 8, 24),  # Conv1D: (in, out)
        "h.0.attn.c_attn.bias": weight(dtype, 24),
        "wte.weight": weight(dtype, 50, 8),  # embedding: (vocabulary, hidden) = (in, out)
        "lm_head.weight": weight(dtype, 50, 8),  # Linear: (out, in)
    }
    base = save(tmp_path / "base", tensors)
    adapter = adapter_of({"h.0.attn.c_attn": (8, 24), "wte": (50, 8), "lm_head": (8, 50)})
    report = ml.fuse(base, adapter, out=tmp_path / "out")
    assert {t.module: t.layout for t in report.tensors} == {
        "h.0.attn.c_attn": "in_out",
        "wte": "in_out",
        "lm_head": "out_in",
    }
    check(base, tmp_path / "out", adapter, report)
    ml.unfuse(tmp_path / "out", report.sidecar, out=tmp_path / "back")
    assert (tmp_path / "back").read_bytes() == base.read_bytes()


def test_square_weights_follow_the_argument_then_peft_then_linear(tmp_path):
    base = save(tmp_path / "base", {"h.c_proj.weight": weight("F32", 6, 6)})
    plain = adapter_of({"h.c_proj": (6, 6)})
    cases = [
        (plain, None, "out_in", "default"),
        (plain, True, "in_out", "argument"),
        (plain, False, "out_in", "argument"),
        (with_peft(plain, tmp_path, True), None, "in_out", "peft_config"),
        (with_peft(plain, tmp_path, False), None, "out_in", "peft_config"),
        (with_peft(plain, tmp_path, True), False, "out_in", "argument"),
    ]
    for i, (adapter, flag, layout, who) in enumerate(cases):
        out = tmp_path / f"out{i}"
        report = ml.fuse(base, adapter, out=out, fan_in_fan_out=flag)
        assert (report.tensors[0].layout, report.tensors[0].layout_from) == (layout, who)
        assert any("square" in note and who in note for note in report.notes)
        check(base, out, adapter, report)
        ml.unfuse(out, report.sidecar, out=tmp_path / f"back{i}")
        assert (tmp_path / f"back{i}").read_bytes() == base.read_bytes()


def test_a_square_weight_among_contradictions_must_be_told(tmp_path):
    conv = {"c_attn.weight": weight("F32", 6, 18), "c_attn.bias": weight("F32", 18)}
    square = {"c_proj.weight": weight("F32", 6, 6)}
    linear = {"head.weight": weight("F32", 30, 6)}
    plain = adapter_of({"c_attn": (6, 18), "c_proj": (6, 6)})
    base = save(tmp_path / "gpt2", conv | square)
    with pytest.raises(ex.ConfigError, match=r"fan_in_fan_out: .*c_proj.weight.*c_attn.weight"):
        ml.fuse(base, plain, out=tmp_path / "out")
    report = ml.fuse(base, with_peft(plain, tmp_path, True), out=tmp_path / "out")
    assert {t.layout for t in report.tensors} == {"in_out"}
    both = adapter_of({"head": (6, 30), "c_proj": (6, 6)})
    with pytest.raises(ex.ConfigError, match="fan_in_fan_out"):
        ml.fuse(save(tmp_path / "b", linear | square), with_peft(both, tmp_path, True), out=tmp_path / "x")
    told = ml.fuse(tmp_path / "b", both, out=tmp_path / "x", fan_in_fan_out=True)
    assert {t.module: t.layout for t in told.tensors} == {"head": "out_in", "c_proj": "in_out"}


# -- names --


@pytest.mark.parametrize(
    ("modules", "tensors", "note"),
    [
        (["model.a.q", "model.b.q"], ["model.a.q", "model.b.q"], None),
        (["a.q", "b.q"], ["model.a.q", "model.b.q"], 'behind the prefix "model."'),
        (["model.a.q", "model.b.q"], ["a.q", "b.q"], 'without the prefix "model."'),
        (["model.a.q", "head"], ["language.model.a.q", "language.head"], 'behind the prefix "language."'),
        # The full names win over names that end alike.
        (["a.q", "b.q"], ["a.q", "b.q", "vision.a.q", "vision.b.q"], None),
        # Only one prefix fits all of them.
        (["a.q", "b.q"], ["x.a.q", "y.a.q", "y.b.q"], 'behind the prefix "y."'),
        (["m.base_layer.out"], ["m.out"], None),
    ],
)
def test_modules_find_their_tensor(tmp_path, modules, tensors, note):
    base = save(
        tmp_path / "base", {f"{t}.weight": weight("F32", 5, 4, seed=i) for i, t in enumerate(tensors)}
    )
    adapter = adapter_of(dict.fromkeys(modules, (4, 5)))
    report = ml.fuse(base, adapter, out=tmp_path / "out")
    assert len(report.tensors) == len(modules)
    assert [n for n in report.notes if "prefix" in n] == (
        [] if note is None else [f"the base has every module {note}"]
    )
    check(base, tmp_path / "out", adapter, report)


def test_layer_paths_send_one_module_to_many_layers(tmp_path):
    names = [f"model.layers.{i}.q_proj" for i in range(3)]
    base = save(tmp_path / "base", {f"{n}.weight": weight("F16", 5, 4, seed=i) for i, n in enumerate(names)})
    adapter = adapter_of({"q_proj": (4, 5)})
    report = ml.fuse(base, adapter, out=tmp_path / "out", layer_paths={"q_proj": names})
    assert [t.tensor for t in report.tensors] == [f"{n}.weight" for n in names]
    check(base, tmp_path / "out", adapter, report)
    ml.unfuse(tmp_path / "out", report.sidecar, out=tmp_path / "back")
    assert (tmp_path / "back").read_bytes() == base.read_bytes()
    one = ml.fuse(base, adapter, out=tmp_path / "one", layer_paths={"q_proj": names[1]})
    assert [t.tensor for t in one.tensors] == [f"{names[1]}.weight"]


# -- folders --


def folder_of(path, shards=2, dtype="BF16"):
    """A model folder with shards, an index, settings, and things that are no part of it."""
    path.mkdir()
    names = [f"model.layers.{i}.q_proj" for i in range(2 * shards)]
    place = {}
    for s in range(shards):
        tensors = {f"{n}.weight": weight(dtype, 5, 4, seed=i) for i, n in enumerate(names) if i % shards == s}
        tensors[f"norm.{s}"] = weight(dtype, 3)
        file = f"model-{s + 1:05}-of-{shards:05}.safetensors"
        save(path / file, tensors, {"format": "pt"})
        place |= dict.fromkeys(tensors, file)
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": place}))
    (path / "config.json").write_text('{"tie_word_embeddings": false}')
    (path / "tokenizer.json").write_bytes(b"\x00any bytes")
    return path, adapter_of(dict.fromkeys(names, (4, 5)))


@pytest.mark.parametrize("dtype", CODES)
def test_folders_keep_their_shape_and_come_back(tmp_path, dtype):
    base, adapter = folder_of(tmp_path / "base", shards=3, dtype=dtype)
    (base / "pytorch_model.bin").write_bytes(b"stale weights")
    (base / "stray.safetensors").write_bytes(b"stale weights")
    (base / "onnx").mkdir()
    before = snapshot(base)
    report = ml.fuse(base, adapter, out=tmp_path / "out/")
    assert report.sidecar == str(tmp_path / "out.unfuse")
    assert snapshot(base) == before
    wanted = set(before) - {"pytorch_model.bin", "stray.safetensors", "onnx"}
    assert set(snapshot(tmp_path / "out")) == wanted
    assert any("pytorch_model.bin" in n and "stray" in n and "onnx" in n for n in report.notes)
    assert len(report.tensors) == 6
    for shard in sorted(base.glob("model-*.safetensors")):
        mine = [t for t in report.tensors if t.tensor in read_tensors(shard.read_bytes())[0]]
        check(shard, tmp_path / "out" / shard.name, adapter, report._replace(tensors=tuple(mine)))
    back = ml.unfuse(tmp_path / "out", report.sidecar, out=tmp_path / "back")
    assert snapshot(tmp_path / "back") == {k: v for k, v in before.items() if k in wanted}
    assert back.notes == ()
    assert (tmp_path / "out").stat().st_mode & 0o777 == base.stat().st_mode & 0o777


def test_a_folder_of_links_gives_files(tmp_path):
    real, adapter = folder_of(tmp_path / "blobs")
    (tmp_path / "cache").mkdir()
    for p in real.iterdir():
        (tmp_path / "cache" / p.name).symlink_to(p)
    ml.fuse(tmp_path / "cache", adapter, out=tmp_path / "out")
    assert not any(p.is_symlink() for p in (tmp_path / "out").iterdir())
    assert len(list((tmp_path / "out").iterdir())) == len(list(real.iterdir()))


def test_a_fused_model_that_was_sharded_anew_still_comes_back(tmp_path):
    base, adapter = folder_of(tmp_path / "base")
    report = ml.fuse(base, adapter, out=tmp_path / "out")
    tensors = {}
    for shard in (tmp_path / "out").glob("model-*.safetensors"):
        header, raw = read_tensors(shard.read_bytes())
        tensors |= {k: (header[k]["dtype"], header[k]["shape"], v) for k, v in raw.items()}
    single = save(tmp_path / "single", dict(sorted(tensors.items(), reverse=True)))
    ml.unfuse(single, report.sidecar, out=tmp_path / "back")
    _, back = read_tensors((tmp_path / "back").read_bytes())
    for shard in base.glob("model-*.safetensors"):
        for name, raw in read_tensors(shard.read_bytes())[1].items():
            assert back[name] == raw


def test_a_folder_with_one_file_and_an_empty_out(tmp_path):
    base = tmp_path / "base"
    base.mkdir()
    save(base / "model.safetensors", {"model.embed_tokens.weight": weight("F32", 9, 4)})
    (base / "config.json").write_text('{"tie_word_embeddings": true}')
    (tmp_path / "out").mkdir()
    report = ml.fuse(base, adapter_of({"model.embed_tokens": (9, 4)}), out=tmp_path / "out")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["config.json", "model.safetensors"]
    assert any("ties" in note for note in report.notes)


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


# -- refusals --


def refused(tmp_path):
    """Name of the case, base, call, error, words."""
    good = save(tmp_path / "good", {"a.q.weight": weight("F32", 5, 4), "a.k.weight": weight("F32", 5, 4)})
    adapter = adapter_of({"a.q": (4, 5)})
    out = tmp_path / "out"

    def bad_base(name, tensors):
        return save(tmp_path / name, tensors)

    nan = to_bits(np.where(np.arange(20) == 13, np.nan, 1.0), "f32")
    inf = to_bits(np.where(np.arange(20) == 4, -np.inf, 1.0), "bf16")
    large = to_bits(np.full(20, 6e4), "f16")
    folder, in_folder = folder_of(tmp_path / "folder")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_bytes(b"")
    (tmp_path / "car").write_bytes(b"older")
    (tmp_path / "link").symlink_to(good)
    (tmp_path / "nothing").mkdir()
    (tmp_path / "cut").write_bytes(good.read_bytes()[:-1])
    (tmp_path / "pickle").write_bytes(b"\x80\x02" + bytes(90))
    both = folder_of(tmp_path / "both")[0]
    save(both / "model.safetensors", {"x": weight("F32", 1)})
    index = folder_of(tmp_path / "index")[0]
    loose = json.loads((index / "model.safetensors.index.json").read_text())

    def with_index(name, change):
        path, _ = folder_of(tmp_path / name)
        text = json.loads(json.dumps(loose))
        change(text)
        (path / "model.safetensors.index.json").write_text(json.dumps(text))
        return path

    first = "model.layers.0.q_proj.weight"
    moved = with_index("moved", lambda t: t["weight_map"].update({first: "model-00002-of-00002.safetensors"}))
    gone = with_index(
        "gone", lambda t: t["weight_map"].update({"no.such": "model-00002-of-00002.safetensors"})
    )
    outside = with_index("outside", lambda t: t["weight_map"].update({first: "../good.safetensors"}))
    missing = with_index("missing", lambda t: t["weight_map"].update({first: "model-9.safetensors"}))
    empty = with_index("emptyindex", lambda t: t.update(weight_map={}))
    twice = folder_of(tmp_path / "twice")[0]
    shutil.copy(twice / "model-00001-of-00002.safetensors", twice / "model-00002-of-00002.safetensors")

    with pytest.warns(ex.UnusedTensorWarning):
        extra = loaded_with_bias(tmp_path)
    return [
        (
            "no such module",
            good,
            lambda b: ml.fuse(b, adapter_of({"a.v": (4, 5)}), out=out),
            ex.ConfigError,
            ["'a.v'".replace("'", '"'), "a.q.weight", "a.k.weight"],
        ),
        (
            "short name",
            good,
            lambda b: ml.fuse(b, adapter_of({"q": (4, 5)}), out=out),
            ex.ConfigError,
            ["layer_paths", "a.q.weight"],
        ),
        (
            "two prefixes",
            bad_base("two", {"x.a.q.weight": weight("F32", 5, 4), "y.a.q.weight": weight("F32", 5, 4)}),
            lambda b: ml.fuse(b, adapter, out=out),
            ex.ConfigError,
            ["several ways", "layer_paths"],
        ),
        (
            "one of two",
            good,
            lambda b: ml.fuse(b, adapter_of({"a.q": (4, 5), "a.z": (4, 5)}), out=out),
            ex.ConfigError,
            ['"a.z"'],
        ),
        (
            "unknown in layer_paths",
            good,
            lambda b: ml.fuse(b, adapter, out=out, layer_paths={"no": ["a.q"]}),
            ex.UnknownModuleError,
            ["no"],
        ),
        (
            "no path",
            good,
            lambda b: ml.fuse(b, adapter, out=out, layer_paths={}),
            ex.ConfigError,
            ["layer_paths"],
        ),
        (
            "path twice",
            good,
            lambda b: ml.fuse(b, adapter, out=out, layer_paths={"a.q": ["a.q", "a.q"]}),
            ex.ConfigError,
            ["each path once"],
        ),
        (
            "shape",
            good,
            lambda b: ml.fuse(b, adapter_of({"a.q": (4, 6)}), out=out),
            ex.ShapeError,
            ["a.q.weight", "[5, 4]", "(6, 4)"],
        ),
        (
            "dimensions",
            bad_base("3d", {"a.q.weight": weight("F32", 5, 4, 1)}),
            lambda b: ml.fuse(b, adapter, out=out),
            ex.ShapeError,
            ["a.q.weight"],
        ),
        (
            "dtype",
            bad_base("int", {"a.q.weight": ("I64", (5, 4), bytes(160))}),
            lambda b: ml.fuse(b, adapter, out=out),
            ex.DTypeError,
            ["a.q.weight", "I64"],
        ),
        (
            "nan",
            bad_base("nan", {"a.q.weight": ("F32", (5, 4), nan)}),
            lambda b: ml.fuse(b, adapter, out=out),
            ex.NonFiniteError,
            ["base tensor a.q.weight", "[3, 1]"],
        ),
        (
            "infinity",
            bad_base("inf", {"a.q.weight": ("BF16", (5, 4), inf)}),
            lambda b: ml.fuse(b, adapter, out=out),
            ex.NonFiniteError,
            ["base tensor a.q.weight", "[1, 0]"],
        ),
        (
            "overflow",
            bad_base("large", {"a.q.weight": ("F16", (5, 4), large)}),
            lambda b: ml.fuse(b, adapter_of({"a.q": (4, 5)}, scale=1e3), out=out),
            ex.NonFiniteError,
            ["fused tensor a.q.weight", "f16"],
        ),
        (
            "extra tensors",
            good,
            lambda b: ml.fuse(b, extra, out=out),
            ex.UnsupportedVariantError,
            ["a.q.bias"],
        ),
        ("out is base", good, lambda b: ml.fuse(b, adapter, out=b), ex.ConfigError, ["out", "base"]),
        (
            "out is a link to base",
            good,
            lambda b: ml.fuse(b, adapter, out=tmp_path / "link"),
            ex.ConfigError,
            ["out"],
        ),
        ("out is the folder", folder, lambda b: ml.fuse(b, in_folder, out=b), ex.ConfigError, ["out"]),
        (
            "out has files",
            folder,
            lambda b: ml.fuse(b, in_folder, out=tmp_path / "full"),
            ex.ConfigError,
            ["empty"],
        ),
        (
            "out is a file",
            folder,
            lambda b: ml.fuse(b, in_folder, out=tmp_path / "car"),
            ex.ConfigError,
            ["folder"],
        ),
        ("out is a folder", good, lambda b: ml.fuse(b, adapter, out=tmp_path / "full"), OSError, ["full"]),
        ("no parent", good, lambda b: ml.fuse(b, adapter, out=tmp_path / "no" / "out"), OSError, ["No such"]),
        (
            "old side-car",
            good,
            lambda b: ml.fuse(b, adapter, out=out, sidecar=tmp_path / "car"),
            ex.ConfigError,
            ["sidecar", "exists"],
        ),
        (
            "side-car is base",
            good,
            lambda b: ml.fuse(b, adapter, out=out, sidecar=b),
            ex.ConfigError,
            ["sidecar"],
        ),
        (
            "side-car is out",
            good,
            lambda b: ml.fuse(b, adapter, out=out, sidecar=out),
            ex.ConfigError,
            ["sidecar"],
        ),
        (
            "side-car in out",
            folder,
            lambda b: ml.fuse(b, in_folder, out=out, sidecar=out / "car"),
            ex.ConfigError,
            ["outside"],
        ),
        (
            "sidecar=True",
            good,
            lambda b: ml.fuse(b, adapter, out=out, sidecar=True),
            ex.ConfigError,
            ["sidecar"],
        ),
        (
            "fan_in_fan_out",
            good,
            lambda b: ml.fuse(b, adapter, out=out, fan_in_fan_out=1),
            ex.ConfigError,
            ["fan_in_fan_out"],
        ),
        ("adapter", good, lambda b: ml.fuse(b, 3, out=out), ex.DTypeError, ["adapter", "int"]),
        ("out", good, lambda b: ml.fuse(b, adapter, out=3), ex.DTypeError, ["out", "int"]),
        ("empty out", good, lambda b: ml.fuse(b, adapter, out=""), ex.ConfigError, ["out"]),
        (
            "bytes",
            good,
            lambda b: ml.fuse(os.fsencode(b), adapter, out=out),
            ex.DTypeError,
            ["base", "bytes"],
        ),
        (
            "no base",
            tmp_path / "nowhere",
            lambda b: ml.fuse(b, adapter, out=out),
            FileNotFoundError,
            ["nowhere"],
        ),
        (
            "no weights",
            tmp_path / "nothing",
            lambda b: ml.fuse(b, adapter, out=out),
            ex.ConfigError,
            ["model.safetensors"],
        ),
        (
            "cut short",
            tmp_path / "cut",
            lambda b: ml.fuse(b, adapter, out=out),
            ex.FormatError,
            ["truncated"],
        ),
        (
            "pickle",
            tmp_path / "pickle",
            lambda b: ml.fuse(b, adapter, out=out),
            ex.UnsupportedVariantError,
            ["pickle"],
        ),
        ("both", both, lambda b: ml.fuse(b, in_folder, out=out), ex.ConfigError, ["both"]),
        ("moved", moved, lambda b: ml.fuse(b, in_folder, out=out), ex.FormatError, [first, "00001"]),
        ("gone", gone, lambda b: ml.fuse(b, in_folder, out=out), ex.FormatError, ["no.such", "no shard"]),
        (
            "outside",
            outside,
            lambda b: ml.fuse(b, in_folder, out=out),
            ex.FormatError,
            ["weight_map", "../good"],
        ),
        ("missing", missing, lambda b: ml.fuse(b, in_folder, out=out), FileNotFoundError, ["model-9"]),
        ("empty index", empty, lambda b: ml.fuse(b, in_folder, out=out), ex.FormatError, ["weight_map"]),
        ("twice", twice, lambda b: ml.fuse(b, in_folder, out=out), ex.FormatError, ["as well"]),
        (
            "no side-car",
            good,
            lambda b: ml.unfuse(b, tmp_path / "none", out=out),
            FileNotFoundError,
            ["none"],
        ),
        ("side-car type", good, lambda b: ml.unfuse(b, False, out=out), ex.DTypeError, ["sidecar"]),
    ]


def loaded_with_bias(tmp_path):
    """An adapter with a tensor that nothing knows."""
    path = tmp_path / "extra.safetensors"
    ml.save(adapter_of({"a.q": (4, 5)}), path)
    header, tensors = read_tensors(path.read_bytes())
    header["a.q.bias"] = {"dtype": "F32", "shape": [5]}
    path.write_bytes(write_tensors(header, {**tensors, "a.q.bias": bytes(20)}))
    return ml.load(path, strict=False)


def test_bad_input_is_refused_and_nothing_is_written(tmp_path):
    cases = refused(tmp_path)
    before = snapshot(tmp_path)
    for name, base, call, error, words in cases:
        with pytest.raises(error) as raised:
            call(base)
        text = str(raised.value)
        assert [w for w in words if w not in text] == [], f"{name}: {text}"
        assert snapshot(tmp_path) == before, name


def test_unfuse_refuses_places_that_are_needed(tmp_path, small):
    base, adapter = small
    report = ml.fuse(base, adapter, out=tmp_path / "out")
    before = snapshot(tmp_path)
    for place in (report.out, report.sidecar):
        with pytest.raises(ex.ConfigError, match="out"):
            ml.unfuse(report.out, report.sidecar, out=place)
    assert snapshot(tmp_path) == before


def test_a_call_that_is_repeated_says_why_it_is_refused(tmp_path, small):
    base, adapter = small
    ml.fuse(base, adapter, out=tmp_path / "out")
    with pytest.raises(ex.ConfigError, match="only way back"):
        ml.fuse(base, adapter, out=tmp_path / "out")
