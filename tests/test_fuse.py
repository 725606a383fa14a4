"""Adapters fused into base weights: the float64 twin, layouts, names and folders."""

import hashlib
import json

import numpy as np
import pytest

import microlora as ml
from base_models import CODES, adapter_of, check, folder_of, save, small_of, snapshot, weight
from microlora import exceptions as ex
from support import make, read_tensors


@pytest.fixture
def small(tmp_path):
    """A base with one weight of every dtype and others, and the adapter that fits it."""
    return small_of(tmp_path)


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
