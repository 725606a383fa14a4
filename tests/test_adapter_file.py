"""A PEFT file's whole content: kept, refused, left out by name, written back; experts; making plain."""

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest

import microlora as ml
from microlora.exceptions import (
    ConfigError,
    DestinationExistsError,
    FormatError,
    NonFiniteError,
    ShapeError,
    UnsupportedVariantError,
)
from support import DTYPES, close, normal, read_tensors, rng, to_bits, write_tensors

NAMES = {"f32": "F32", "f16": "F16", "bf16": "BF16"}
PREFIX = "base_model.model."


def folder(path, tensors, dtype="f32", **config):
    """A directory as PEFT writes it, from ``{key without prefix: array}``."""
    path.mkdir()
    entries, raw = {"__metadata__": {"format": "pt"}}, {}
    for key, values in tensors.items():
        entries[PREFIX + key] = {"dtype": NAMES[dtype], "shape": list(np.shape(values))}
        raw[PREFIX + key] = to_bits(values, dtype)
    (path / "adapter_model.safetensors").write_bytes(write_tensors(entries, raw))
    full = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q", "v"], **config}
    (path / "adapter_config.json").write_text(json.dumps(full))
    return path


def factors(name="q", rank=2, seed=0):
    r = rng(seed)
    return {f"{name}.lora_A.weight": normal(r, rank, 6), f"{name}.lora_B.weight": normal(r, 5, rank)}


def rich(path, **config):
    """Several kinds at once."""
    r = rng(1)
    tensors = {
        **factors(),
        "emb.lora_embedding_A": normal(r, 2, 9),
        "emb.lora_embedding_B": normal(r, 6, 2),
        "q.lora_magnitude_vector": normal(r, 5),
        "head.weight": normal(r, 3, 6),
        "head.scale": np.float32(2),
    }
    settings = {"use_dora": True, "modules_to_save": ["head"], "target_modules": ["emb", "q"], **config}
    return folder(path, tensors, **settings)


RICH = ["dora", "modules_to_save", "embedding"]


def weights(path):
    return read_tensors((path / "adapter_model.safetensors").read_bytes())[1]


def settings(path):
    return json.loads((path / "adapter_config.json").read_text())


def test_all_of_a_file_is_kept(tmp_path):
    source = rich(tmp_path / "in")
    for mmap in (False, True):
        file = ml.AdapterFile.read(source, mmap=mmap)
        assert file.format == "peft"
        assert [(m.path, m.kind, m.shape_a, m.shape_b) for m in file.modules] == [
            ("emb", "embedding", (2, 9), (6, 2)),
            ("q", "linear", (2, 6), (5, 2)),
        ]
        assert list(dict.fromkeys(v.kind for v in file.variants)) == RICH
        assert file.config == settings(source)
        assert {v.at for v in file.variants} >= {PREFIX + "q.lora_magnitude_vector", "emb"}
        done = file.save(tmp_path / f"out{mmap}")
        assert (done.source, done.format, done.modules, done.dropped) == ("peft", "peft", 2, {})
        assert weights(tmp_path / f"out{mmap}") == weights(source)
        assert settings(tmp_path / f"out{mmap}") == settings(source)


def test_a_single_file_keeps_it_too_and_is_refused_the_same_way(tmp_path):
    source = rich(tmp_path / "in")
    ml.convert(source, tmp_path / "one.safetensors", format="safetensors")
    file = ml.AdapterFile.read(tmp_path / "one.safetensors")
    assert file.format == "safetensors"
    assert file.variants == ml.AdapterFile.read(source).variants
    file.save(tmp_path / "again", "peft")
    assert weights(tmp_path / "again") == weights(source)
    assert settings(tmp_path / "again") == settings(source)
    data = (tmp_path / "one.safetensors").read_bytes()
    for refused in (lambda: ml.load(tmp_path / "one.safetensors"), lambda: ml.Adapter(data)):
        with pytest.raises(UnsupportedVariantError, match="drop:dora"):
            refused()


def test_use_needs_every_variant_given_up_by_name(tmp_path):
    source = rich(tmp_path / "in")
    names = [f"drop:{kind}" for kind in RICH]
    with pytest.raises(UnsupportedVariantError) as caught:
        ml.load(source)
    message = str(caught.value)
    assert str(source) in message
    assert "adapter_config.json: use_dora" in message
    assert 'allow=["drop:dora", "drop:modules_to_save", "drop:embedding"]' in message
    for some in (names[:1], names[1:], ["drop:loha"]):
        with pytest.raises(UnsupportedVariantError):
            ml.load(source, allow=some)
    value = ml.load(source, allow=[*names, "drop:loha"])
    assert value.modules() == ["q"]
    assert not value.extra_tensors()
    x = normal(rng(), 3, 6)
    a, b = value.factors("q")
    close(ml.MicroLoRA(value).forward(x, "q"), 2 * x @ a.T @ b.T, 1e-5, 1e-6)
    # What is left is an adapter like any other.
    ml.save(value, tmp_path / "plain")
    assert ml.load(tmp_path / "plain").modules() == ["q"]
    assert settings(tmp_path / "plain")["use_dora"] is False
    for wrong in ("drop:dora", ["dora"], [1], ["drop:"]):
        with pytest.raises(ConfigError, match="allow"):
            ml.load(source, allow=wrong)
        with pytest.raises(ConfigError, match="allow"):
            ml.AdapterFile.read(source).adapter(allow=wrong)


@pytest.mark.parametrize(
    ("config", "kind"),
    [
        ({"use_qalora": True}, "qalora"),
        ({"use_bdlora": {"nblocks": 2}}, "bdlora"),
        ({"kasa_config": {"beta": 1}}, "kasa"),
    ],
)
def test_what_is_nothing_without_its_variant_says_so(tmp_path, config, kind):
    source = folder(tmp_path / "in", factors(), **config)
    for allow in ([], [f"drop:{kind}"]):
        with pytest.raises(UnsupportedVariantError, match="nothing is left"):
            ml.load(source, allow=allow)
    ml.AdapterFile.read(source).save(tmp_path / "out")
    assert weights(tmp_path / "out") == weights(source)


def test_missing_scalings_are_those_of_peft_and_said(tmp_path):
    source = folder(tmp_path / "in", factors(rank=8))
    config = settings(source)
    del config["r"], config["lora_alpha"]
    (source / "adapter_config.json").write_text(json.dumps(config))
    file = ml.AdapterFile.read(source)
    assert [(m.rank, m.alpha) for m in file.modules] == [(8, 8.0)]
    assert any("lora_alpha: missing" in note for note in file.notes)


@pytest.mark.parametrize(
    ("config", "word"),
    [
        ({"lora_alpha": "4"}, "lora_alpha"),
        ({"r": [2]}, "r: got"),
        ({"use_dora": 1}, "use_dora"),
        ({"modules_to_save": {"head": 1}}, "modules_to_save"),
        ({"target_parameters": "w"}, "target_parameters"),
        ({"target_modules": 3}, "target_modules"),
        ({"bias": True}, "bias"),
        ({"velora_config": 3}, "velora_config"),
    ],
)
def test_wrong_types_are_named(tmp_path, config, word):
    source = folder(tmp_path / "in", factors(), **config)
    with pytest.raises(FormatError, match=f"adapter_config.json: {word}"):
        ml.AdapterFile.read(source)


def test_broken_variants_are_broken_files(tmp_path):
    r, good = rng(), factors()
    nan = np.full(5, np.nan, np.float32)
    for name, more, word in [
        ("orphan", {"emb.lora_embedding_A": normal(r, 2, 9)}, "without its lora_embedding_B"),
        ("nan", {"q.lora_magnitude_vector": nan}, "lora_magnitude_vector.*NaN"),
        (
            "rank",
            {"emb.lora_embedding_A": normal(r, 3, 9), "emb.lora_embedding_B": normal(r, 6, 3)},
            "rank 2",
        ),
        ("twice", {"q.lora_B.bias": normal(r, 5), "q.lora_B.default.bias": normal(r, 5)}, "both"),
    ]:
        source = folder(tmp_path / name, {**good, **more})
        with pytest.raises(FormatError, match=word) as caught:
            ml.AdapterFile.read(source)
        assert not isinstance(caught.value, UnsupportedVariantError)
    source = folder(tmp_path / "latin", good)
    (source / "adapter_config.json").write_bytes(b'{"peft_type": "LORA", "base": "\xe9"}')
    with pytest.raises(FormatError, match="not UTF-8"):
        ml.AdapterFile.read(source)
    source = folder(tmp_path / "key", {**good, "x" * 4: normal(r, 1)})
    file = source / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes().replace(b"xxxx", b"x\xff\xfex"))
    with pytest.raises(FormatError, match="UTF-8"):
        ml.AdapterFile.read(source)


def test_a_destination_is_not_overwritten_unasked(tmp_path):
    file = ml.AdapterFile.read(rich(tmp_path / "in"))
    for dst in (tmp_path / "dir", tmp_path / "one.safetensors"):
        format = "safetensors" if dst.suffix else "peft"
        ml.convert(ml.AdapterFile.read(folder(tmp_path / f"old {format}", factors())), dst, format=format)
        before = [p.read_bytes() for p in sorted([dst, *dst.rglob("*")]) if p.is_file()]
        with pytest.raises(DestinationExistsError, match="overwrite=True"):
            file.save(dst, format)
        assert [p.read_bytes() for p in sorted([dst, *dst.rglob("*")]) if p.is_file()] == before
        file.save(dst, format, overwrite=True)
        assert set(ml.AdapterFile.read(dst).variants) == set(file.variants)
    value = file.adapter(allow=[f"drop:{k}" for k in RICH])
    ml.save(value, tmp_path / "dir")  # as ever: saving an adapter replaces
    assert ml.load(tmp_path / "dir").modules() == ["q"]


@pytest.mark.skipif(os.name == "nt", reason="links and pipes")
def test_links_to_nowhere_and_pipes_are_not_replaced(tmp_path):
    file = ml.AdapterFile.read(folder(tmp_path / "in", factors()))
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(DestinationExistsError, match="overwrite=True"):
        file.save(tmp_path / "link", "safetensors")
    with pytest.raises(DestinationExistsError, match="a link to nothing"):
        file.save(tmp_path / "link", "peft", overwrite=True)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(DestinationExistsError, match="neither a regular file nor a directory"):
        file.save(tmp_path / "pipe", "safetensors", overwrite=True)
    assert (tmp_path / "pipe").is_fifo()


def test_what_a_source_has_no_use_for_is_refused(tmp_path):
    file = ml.AdapterFile.read(folder(tmp_path / "in", factors()))
    for source in (file, file.adapter()):
        with pytest.raises(ConfigError, match=r"alpha: got 3"):
            ml.convert(source, tmp_path / "out", format="npz", alpha=3.0)
        with pytest.raises(ConfigError, match=r"orientation: got"):
            ml.convert(source, tmp_path / "out", format="npz", orientation="rank_first")
    wide = ml.Adapter.from_factors({"q": (np.ones((4, 64)), np.ones((64, 4)))}, alpha=4.0)
    with pytest.raises(ConfigError, match=r"alpha: got 3.0 for a QuantizedAdapter"):
        ml.convert(ml.quantize(wide, "q8_0").adapter, tmp_path / "out", format="npz", alpha=3.0)
    assert not (tmp_path / "out").exists()
    for read in (ml.load, ml.AdapterFile.read, ml.inspect):
        with pytest.raises(ConfigError, match="limits: got 5"):
            read(tmp_path / "in", limits=5)


def test_a_conversion_tells_progress_and_what_was_assumed(tmp_path):
    source, told = folder(tmp_path / "in", factors()), []
    for format in ("peft", "safetensors"):
        ml.convert(source, tmp_path / format, format=format, progress=lambda *args: told.append(args))
    assert told == [(1, 1, "writing")] * 2
    left = {k: v for k, v in settings(source).items() if k != "lora_alpha"}
    (source / "adapter_config.json").write_text(json.dumps(left))
    assert any("lora_alpha: missing" in n for n in ml.convert(source, tmp_path / "x", format="npz").notes)


def test_progress_is_told_when_the_weights_of_before_are_gone(tmp_path):
    source, place = folder(tmp_path / "in", factors()), tmp_path / "out"
    place.mkdir()
    (place / "adapters.safetensors").write_bytes(b"weights of before")

    def stop(*args):
        raise RuntimeError("told")

    with pytest.raises(RuntimeError, match="told"):
        ml.convert(source, place, format="peft", overwrite=True, progress=stop)
    assert sorted(p.name for p in place.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]


def test_names_of_kohyas_that_no_model_has_are_said(tmp_path):
    pair = {"lora_down.weight": normal(rng(0), 2, 4), "lora_up.weight": normal(rng(1), 4, 2)}
    keys = {f"lora_unet_a_to_q.{end}": values for end, values in pair.items()}
    entries = {key: {"dtype": "F32", "shape": list(values.shape)} for key, values in keys.items()}
    raw = {key: to_bits(values, "f32") for key, values in keys.items()}
    (tmp_path / "kohya").write_bytes(write_tensors(entries, raw))
    said = ml.convert(tmp_path / "kohya", tmp_path / "a", format="peft").notes
    assert any("module_names=" in note for note in said)
    for format, names in (("kohya", None), ("peft", ["unet.a.to_q"])):
        done = ml.convert(tmp_path / "kohya", tmp_path / f"b {format}", format=format, module_names=names)
        assert not any("module_names=" in note for note in done.notes)


@pytest.mark.skipif(os.name == "nt", reason="limits of a process")
def test_a_full_disk_leaves_what_was_there(tmp_path):
    source = folder(
        tmp_path / "in", {**factors(), "head.weight": normal(rng(), 200, 500)}, modules_to_save=["head"]
    )
    shutil.copytree(rich(tmp_path / "old"), tmp_path / "out")
    script = (
        "import resource, signal, sys, microlora as ml\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (65536, 65536))\n"
        "file = ml.AdapterFile.read(sys.argv[1])\n"
        "for format in ('peft', 'safetensors'):\n"
        "    for dst in ('out', 'new'):\n"
        "        try:\n"
        "            file.save(sys.argv[2] + '/' + dst, format, overwrite=True)\n"
        "        except OSError as e:\n"
        "            print(type(e).__name__)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(source), str(tmp_path)], capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["OSError", "OSError", "DestinationExistsError", "OSError"], done
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in", "old", "out"]
    assert weights(tmp_path / "out") == weights(tmp_path / "old")
    assert settings(tmp_path / "out") == settings(tmp_path / "old")


def test_names_in_memory_are_stored_as_peft_stores_them(tmp_path):
    tensors = {**factors(), "q.lora_magnitude_vector": normal(rng(), 5), "q.lora_B.bias": normal(rng(), 5)}
    plain = folder(tmp_path / "plain", tensors)
    suffixes = {"vector": "vector.default.weight", "bias": "default.bias", "weight": "default.weight"}
    renamed = {".".join([*k.split(".")[:-1], suffixes.get(k.rpartition(".")[2], k.rpartition(".")[2])]): v
               for k, v in tensors.items()}  # fmt: skip
    renamed["q.lora_magnitude_vector.default.weight"] = renamed.pop("q.lora_magnitude_vector")
    memory = folder(tmp_path / "memory", renamed)
    ml.AdapterFile.read(memory).save(tmp_path / "out")
    assert weights(tmp_path / "out") == weights(plain) != weights(memory)


def test_the_format_follows_the_file_or_the_name(tmp_path):
    file = ml.AdapterFile.from_adapter(ml.load(folder(tmp_path / "in", factors())))
    assert file.save(tmp_path / "a.safetensors").format == "safetensors"
    assert file.save(tmp_path / "b").format == "peft"
    single = ml.AdapterFile.read(tmp_path / "a.safetensors")
    assert single.save(tmp_path / "c").format == "safetensors"
    assert (tmp_path / "c").read_bytes() == (tmp_path / "a.safetensors").read_bytes()
    with pytest.raises(ConfigError, match="format"):
        single.save(tmp_path / "d", "zip")


def test_what_peft_cannot_hold_is_lost_only_by_name(tmp_path):
    tensors = factors()
    modules = json.dumps([{"path": "q", "rank": 2, "alpha": 4.0, "use_rslora": False}])
    variants = json.dumps([{"kind": "loha", "at": "k.hada_w1_a", "why": "a product of two pairs"}])
    raw = {
        "q.lora_a": tensors["q.lora_A.weight"],
        "q.lora_b": tensors["q.lora_B.weight"],
        "extra.k.hada_w1_a": normal(rng(), 2, 2),
    }
    entries = {name: {"dtype": "F32", "shape": list(value.shape)} for name, value in raw.items()}
    ours = {"format": "microlora", "format_version": "1", "modules": modules, "variants": variants}
    data = write_tensors({"__metadata__": ours, **entries}, {k: v.tobytes() for k, v in raw.items()})
    (tmp_path / "one").write_bytes(data)
    file = ml.AdapterFile.read(tmp_path / "one")
    with pytest.raises(UnsupportedVariantError, match=r'peft cannot hold loha.*allow=\["drop:loha"\]'):
        file.save(tmp_path / "out", "peft")
    assert not (tmp_path / "out").exists()
    done = file.save(tmp_path / "out", "peft", allow=["drop:loha"])
    assert done.dropped == {"loha": "k.hada_w1_a"}
    assert set(weights(tmp_path / "out")) == {PREFIX + k for k in tensors}
    with pytest.raises(UnsupportedVariantError, match="loha"):
        ml.load(tmp_path / "one")


# -- experts --


def test_experts_come_apart_and_are_packed_again(tmp_path):
    experts, rank, r = 3, 2, rng()
    a, b = normal(r, experts * rank, 4), normal(r, 5, rank * experts)
    tensors = {**factors(), "m.experts.lora_A.weight": a, "m.experts.lora_B.weight": b}
    source = folder(tmp_path / "in", tensors, target_parameters=["experts.w"])
    file = ml.AdapterFile.read(source)
    assert [m.path for m in file.modules] == ["q"]
    apart = file.unpack_experts()
    (i,) = (i for i, m in enumerate(apart.modules) if m.kind == "experts")
    m = apart.modules[i]
    assert (m.path, m.rank, m.shape_a, m.shape_b) == ("m.experts", rank, (3, 2, 4), (3, 5, 2))
    got_a, got_b = (np.frombuffer(t, np.float32) for t in apart.factor_bytes(i))
    np.testing.assert_array_equal(got_a.reshape(m.shape_a), a.reshape(experts, rank, 4))
    np.testing.assert_array_equal(got_b.reshape(m.shape_b), b.reshape(5, rank, experts).transpose(2, 0, 1))
    apart.save(tmp_path / "out", "peft")
    assert weights(tmp_path / "out") == weights(source)
    apart.save(tmp_path / "one", "safetensors")
    assert ml.AdapterFile.read(tmp_path / "one").modules == apart.modules
    assert ml.load(source, allow=["drop:target_parameters"]).modules() == ["q"]
    for wrong in (2, 0, "3"):
        with pytest.raises((ConfigError, TypeError), match="experts"):
            file.unpack_experts(wrong)
    with pytest.raises(ConfigError, match="packed experts"):
        ml.AdapterFile.read(rich(tmp_path / "other")).unpack_experts()


# -- adapters of a changed base --


def pissa(path, dtype="f32", seed=0, **config):
    tensors = {**factors("q", seed=seed), **factors("v", config.pop("rank_v", 2), seed=seed + 1)}
    return folder(path, tensors, dtype, **{"init_lora_weights": "pissa", **config})


def product(value, name):
    a, b = value.factors(name)
    return value.info(name).scaling * b.astype(np.float64) @ a.astype(np.float64)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "config",
    [
        {},
        {"use_rslora": True, "lora_alpha": 3},
        {"rank_pattern": {"v": 3}, "alpha_pattern": {"q": 1.5}, "rank_v": 3},
        {"init_lora_weights": "loftq"},
    ],
)
def test_plain_adapters_are_the_difference_to_the_start(tmp_path, config, dtype):
    kind = f"init:{config.get('init_lora_weights', 'pissa')}"
    trained = pissa(tmp_path / "in", dtype, **config)
    start = pissa(tmp_path / "start", dtype, 7, **{**config, "init_lora_weights": True})
    with pytest.raises(UnsupportedVariantError, match=f"convert_to_plain.*drop:{kind}"):
        ml.load(trained)
    plain = ml.convert_to_plain(trained, start, tmp_path / "out")
    one, zero, got = ml.load(trained, allow=[f"drop:{kind}"]), ml.load(start), plain.adapter()
    assert ml.load(tmp_path / "out") == got
    for name in ("q", "v"):
        info = got.info(name)
        assert (info.rank, info.dtype_a) == (2 * one.info(name).rank, dtype)
        assert abs(info.scaling - one.info(name).scaling) < 1e-12
        close(product(got, name), product(one, name) - product(zero, name), 1e-12, 1e-12)
    now, was = settings(tmp_path / "out"), settings(trained)
    assert now["init_lora_weights"] is True
    assert now["r"] == 2 * was["r"]
    assert now["lora_alpha"] == was["lora_alpha"] * (2**0.5 if config.get("use_rslora") else 2)
    assert now["rank_pattern"] == {k: 2 * v for k, v in was.get("rank_pattern", {}).items()}
    # The factors themselves, in any form, say the same.
    arrays = {name: zero.factors(name) for name in ("q", "v")}
    for form in (arrays, zero, ml.AdapterFile.read(start)):
        assert ml.convert_to_plain(ml.AdapterFile.read(trained), form).adapter() == got


@pytest.mark.parametrize("dtype", ["f16", "bf16"])
def test_initial_factors_that_do_not_fit_the_dtype_make_float32(tmp_path, dtype):
    trained = pissa(tmp_path / "in", dtype)
    start = {n: (np.full((2, 6), 1 / 3, np.float32), np.zeros((5, 2), np.float32)) for n in ("q", "v")}
    value = ml.convert_to_plain(trained, start).adapter()
    info = value.info("q")
    assert (info.dtype_a, info.dtype_b) == ("f32", dtype)
    np.testing.assert_array_equal(value.factors("q")[0][2:], start["q"][0])


def test_what_cannot_be_made_plain_is_refused_and_nothing_is_written(tmp_path):
    trained = pissa(tmp_path / "in")
    start = {n: (normal(rng(), 2, 6), normal(rng(), 5, 2)) for n in ("q", "v")}
    out = tmp_path / "out"
    nan = (np.full((2, 6), np.nan, np.float32), start["q"][1])
    for initial, error, word in [
        ({"q": start["q"]}, ConfigError, "'v'"),
        ({**start, "k": start["q"]}, ConfigError, "'k'"),
        ({**start, "q": (start["q"][0][:1], start["q"][1])}, ShapeError, r"'q'\].A0"),
        ({**start, "q": (start["q"][0], start["q"][1].T)}, ShapeError, r"'q'\].B0"),
        ({**start, "q": nan}, NonFiniteError, r"'q'\].A0"),
        ({**start, "q": start["q"][0]}, ConfigError, "a pair"),
        ({**start, "q": ("a", "b")}, ConfigError, "floats"),
        (pissa(tmp_path / "alpha", lora_alpha=5), ConfigError, "alpha 5"),
        (pissa(tmp_path / "rs", use_rslora=True), ConfigError, "use_rslora True"),
        (pissa(tmp_path / "rank", rank_pattern={"v": 3}, rank_v=3), ShapeError, "rank 3"),
        (tmp_path / "missing", OSError, "missing"),
    ]:
        with pytest.raises(error, match=word):
            ml.convert_to_plain(trained, initial, out)
        assert not out.exists()
    for config, error, word in [
        ({"init_lora_weights": True}, ConfigError, "init_lora_weights"),
        ({"use_dora": True}, UnsupportedVariantError, "dora"),
        ({"use_rslora": True, "rank_pattern": {"x": 2}}, UnsupportedVariantError, "rank_pattern"),
    ]:
        with pytest.raises(error, match=word):
            ml.convert_to_plain(pissa(tmp_path / word, **config), start, out)
        assert not out.exists()
    ml.convert_to_plain(trained, start, out)
    with pytest.raises(DestinationExistsError):
        ml.convert_to_plain(trained, start, out)
    ml.convert_to_plain(trained, start, out, overwrite=True)
    # Whole modules beside the factors go along.
    tensors = {**factors("q"), "head.weight": normal(rng(), 3, 6)}
    source = folder(tmp_path / "with head", tensors, init_lora_weights="olora", modules_to_save=["head"])
    plain = ml.convert_to_plain(source, {"q": start["q"]})
    assert {v.kind for v in plain.variants} == {"modules_to_save"}
    assert plain.extra_bytes(0) == tensors["head.weight"].tobytes()
