"""Everything that fusing refuses: a typed error that says what, and nothing written."""

import json
import os
import shutil

import numpy as np
import pytest

import microlora as ml
from base_models import adapter_of, folder_of, loaded_with_bias, save, small_of, snapshot, weight
from microlora import exceptions as ex
from support import to_bits


def model(tmp_path, name, dtype="F32", shape=(5, 4), raw=None, tensors=("a.q", "a.k")):
    """A base with these weights."""
    made = weight(dtype, *shape) if raw is None else (dtype, shape, raw)
    return save(tmp_path / name, {f"{t}.weight": made for t in tensors})


def with_index(tmp_path, name, change):
    """A folder with another index."""
    path, _ = folder_of(tmp_path / name)
    index = path / "model.safetensors.index.json"
    text = json.loads(index.read_text())
    change(text)
    index.write_text(json.dumps(text))
    return path


def files(tmp_path):
    """Bases and places by name."""
    made = {name: model(tmp_path, name) for name in ("good",)}
    made["folder"], _ = folder_of(tmp_path / "folder")
    made["two"] = model(tmp_path, "two", tensors=("x.a.q", "y.a.q"))
    made["3d"] = model(tmp_path, "3d", shape=(5, 4, 1))
    made["int"] = model(tmp_path, "int", "I64", raw=bytes(160))
    made["nan"] = model(tmp_path, "nan", raw=to_bits(np.where(np.arange(20) == 13, np.nan, 1), "f32"))
    raw = to_bits(np.where(np.arange(20) == 4, -np.inf, 1), "bf16")
    made["inf"] = model(tmp_path, "inf", "BF16", raw=raw)
    made["large"] = model(tmp_path, "large", "F16", raw=to_bits(np.full(20, 6e4), "f16"))
    for name in ("full", "nothing"):
        made[name] = tmp_path / name
        made[name].mkdir()
    (made["full"] / "x").write_bytes(b"")
    made["car"] = tmp_path / "car"
    made["car"].write_bytes(b"older")
    made["link"] = tmp_path / "link"
    made["link"].symlink_to(made["good"])
    made["cut"] = tmp_path / "cut"
    made["cut"].write_bytes(made["good"].read_bytes()[:-1])
    made["pickle"] = tmp_path / "pickle"
    made["pickle"].write_bytes(b"\x80\x02" + bytes(90))
    made["both"], _ = folder_of(tmp_path / "both")
    shutil.copy(made["good"], made["both"] / "model.safetensors")
    second = "model-00002-of-00002.safetensors"
    for name, change in {
        "moved": lambda t: t["weight_map"].update({FIRST: second}),
        "gone": lambda t: t["weight_map"].update({"no.such": second}),
        "outside": lambda t: t["weight_map"].update({FIRST: "../good.safetensors"}),
        "missing": lambda t: t["weight_map"].update({FIRST: "model-9.safetensors"}),
        "empty": lambda t: t.update(weight_map={}),
        "no map": lambda t: t.pop("weight_map"),
    }.items():
        made[name] = with_index(tmp_path, name, change)
    made["twice"], _ = folder_of(tmp_path / "twice")
    shutil.copy(made["twice"] / "model-00001-of-00002.safetensors", made["twice"] / second)
    return made


FIRST = "model.layers.0.q_proj.weight"
FIT = {"a.q": (4, 5)}
IN_FOLDER = {f"model.layers.{i}.q_proj": (4, 5) for i in range(4)}

#: base, modules of the adapter, settings of the call (paths by name), error, words of the message.
CASES = {
    "no such module": ("good", {"a.v": (4, 5)}, {}, ex.ConfigError, ['"a.v"', "a.q.weight", "a.k.weight"]),
    "short name": ("good", {"q": (4, 5)}, {}, ex.ConfigError, ["layer_paths", "a.q.weight"]),
    "two prefixes": ("two", FIT, {}, ex.ConfigError, ["several ways", "layer_paths"]),
    "one of two": ("good", {**FIT, "a.z": (4, 5)}, {}, ex.ConfigError, ['"a.z"']),
    "unknown name": ("good", FIT, {"layer_paths": {"no": ["a.q"]}}, ex.UnknownModuleError, ["no"]),
    "no path": ("good", FIT, {"layer_paths": {}}, ex.ConfigError, ["layer_paths"]),
    "path twice": ("good", FIT, {"layer_paths": {"a.q": ["a.q"] * 2}}, ex.ConfigError, ["each path once"]),
    "shape": ("good", {"a.q": (4, 6)}, {}, ex.ShapeError, ["a.q.weight", "[5, 4]", "(6, 4)"]),
    "dimensions": ("3d", FIT, {}, ex.ShapeError, ["a.q.weight"]),
    "dtype": ("int", FIT, {}, ex.DTypeError, ["a.q.weight", "I64"]),
    "nan": ("nan", FIT, {}, ex.NonFiniteError, ["base tensor a.q.weight", "[3, 1]"]),
    "infinity": ("inf", FIT, {}, ex.NonFiniteError, ["base tensor a.q.weight", "[1, 0]"]),
    "overflow": ("large", FIT, {"scale": 1e3}, ex.NonFiniteError, ["fused tensor a.q.weight", "f16"]),
    "out is base": ("good", FIT, {"out": "good"}, ex.ConfigError, ["out", "base"]),
    "out is a link to base": ("good", FIT, {"out": "link"}, ex.ConfigError, ["out"]),
    "out is the folder": ("folder", IN_FOLDER, {"out": "folder"}, ex.ConfigError, ["out"]),
    "out has files": ("folder", IN_FOLDER, {"out": "full"}, ex.ConfigError, ["empty"]),
    "out is a file": ("folder", IN_FOLDER, {"out": "car"}, ex.ConfigError, ["folder"]),
    "out is a folder": ("good", FIT, {"out": "full"}, OSError, ["full"]),
    "no parent": ("good", FIT, {"out": "no/out"}, OSError, ["No such"]),
    "no parent of a folder": ("folder", IN_FOLDER, {"out": "no/out"}, OSError, ["No such"]),
    "old side-car": ("good", FIT, {"sidecar": "car"}, ex.ConfigError, ["sidecar", "exists"]),
    "side-car is base": ("good", FIT, {"sidecar": "good"}, ex.ConfigError, ["sidecar"]),
    "side-car is out": ("good", FIT, {"sidecar": "out"}, ex.ConfigError, ["sidecar"]),
    "side-car in out": ("folder", IN_FOLDER, {"sidecar": "out/car"}, ex.ConfigError, ["outside"]),
    "sidecar=True": ("good", FIT, {"sidecar": True}, ex.ConfigError, ["sidecar"]),
    "sidecar=1": ("good", FIT, {"sidecar": 1}, ex.DTypeError, ["sidecar"]),
    "fan_in_fan_out": ("good", FIT, {"fan_in_fan_out": 1}, ex.ConfigError, ["fan_in_fan_out"]),
    "no weights": ("nothing", FIT, {}, ex.ConfigError, ["model.safetensors"]),
    "no base": ("nowhere", FIT, {}, FileNotFoundError, ["nowhere"]),
    "cut short": ("cut", FIT, {}, ex.FormatError, ["truncated"]),
    "pickle": ("pickle", FIT, {}, ex.UnsupportedVariantError, ["pickle"]),
    "both": ("both", IN_FOLDER, {}, ex.ConfigError, ["both"]),
    "moved": ("moved", IN_FOLDER, {}, ex.FormatError, [FIRST, "00001"]),
    "gone": ("gone", IN_FOLDER, {}, ex.FormatError, ["no.such", "no shard"]),
    "outside": ("outside", IN_FOLDER, {}, ex.FormatError, ["weight_map", "../good"]),
    "missing": ("missing", IN_FOLDER, {}, FileNotFoundError, ["model-9"]),
    "empty index": ("empty", IN_FOLDER, {}, ex.FormatError, ["weight_map"]),
    "no map": ("no map", IN_FOLDER, {}, ex.FormatError, ["weight_map"]),
    "twice": ("twice", IN_FOLDER, {}, ex.FormatError, ["as well"]),
}


@pytest.mark.parametrize("name", CASES)
def test_bad_input_is_refused_and_nothing_is_written(tmp_path, name):
    base, modules, given, error, words = CASES[name]
    made, given = files(tmp_path), dict(given)
    adapter = adapter_of(modules, scale=given.pop("scale", 0.3))
    given.setdefault("out", "out")
    given |= {k: tmp_path / v for k, v in given.items() if k in ("out", "sidecar") and isinstance(v, str)}
    before = snapshot(tmp_path)
    with pytest.raises(error) as raised:
        ml.fuse(made.get(base, tmp_path / base), adapter, **given)
    assert [w for w in words if w not in str(raised.value)] == [], raised.value
    assert snapshot(tmp_path) == before


def test_arguments_that_are_no_paths_or_adapters(tmp_path):
    base, adapter = model(tmp_path, "base"), adapter_of(FIT)
    before = snapshot(tmp_path)
    out = tmp_path / "out"
    with pytest.raises(ex.DTypeError, match="adapter: got int"):
        ml.fuse(base, 3, out=out)
    with pytest.raises(ex.DTypeError, match="out: got int"):
        ml.fuse(base, adapter, out=3)
    with pytest.raises(ex.DTypeError, match="base: got bytes"):
        ml.fuse(os.fsencode(base), adapter, out=out)
    with pytest.raises(ex.ConfigError, match="out: got ''"):
        ml.fuse(base, adapter, out="")
    with pytest.raises(ex.DTypeError, match="sidecar: got bool"):
        ml.unfuse(base, False, out=out)
    with pytest.raises(FileNotFoundError, match="none"):
        ml.unfuse(base, tmp_path / "none", out=out)
    assert snapshot(tmp_path) == before


def test_an_adapter_with_more_than_factors_is_refused(tmp_path):
    base = model(tmp_path, "base")
    with pytest.warns(ex.UnusedTensorWarning):
        adapter = loaded_with_bias(tmp_path)
    before = snapshot(tmp_path)
    with pytest.raises(ex.UnsupportedVariantError, match=r"a\.q\.bias"):
        ml.fuse(base, adapter, out=tmp_path / "out")
    assert snapshot(tmp_path) == before


@pytest.fixture
def small(tmp_path):
    """A base with one weight of every dtype and others, and the adapter that fits it."""
    return small_of(tmp_path)


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
