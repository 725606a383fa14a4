"""Arguments of another kind than wanted, for every function over files: errors that name the argument."""

from __future__ import annotations

import hashlib
import inspect
import json
from pathlib import Path

import numpy as np
import pytest

import microlora as ml
import microlora._core as core
from doctor_support import sound_config, sound_tensors, write_peft
from microlora import trust
from microlora.exceptions import ConfigError, MicroLoraError, MissingPathError, UnsupportedVariantError

PATHS = (b"bytes", 5, None, [], True, "", "a\0b", 1.5)
MAYBE_PATHS = tuple(v for v in PATHS if v is not None)
FLAGS = (1, 0, None, "no", "yes", [])
NUMBERS = ("8", True, [], b"8", float("nan"), float("inf"), 1j)
WORDS = (5, b"x", [], ["peft"], True, "nonsense")
CONFIGS = ([1], 5, b"x", True, "", "nobase")
LISTS = (5, "drop:dora", b"x", [5], [None], {"drop:dora": 1}, ["dora"], ["drop:"], ["drop:foo"])
LIMITS = (5, "much", {"rank": 4}, (1, 2, 3, 4))
CALLS = (5, "x", [])
NAMES = (5, b"x", [5], [""], {"a": 1}, "no model")
READ = {
    "alpha": NUMBERS,
    "orientation": WORDS,
    "names": WORDS,
    "base_config": CONFIGS,
}
FACTORS = {"q": (np.ones((4, 64), np.float32), np.ones((64, 4), np.float32))}


@pytest.fixture
def place(tmp_path):
    """A folder with an adapter to read, and everything that functions over files are given."""
    write_peft(tmp_path / "in")
    (tmp_path / "m.json").write_text(json.dumps(trust.manifest(tmp_path / "in")))
    return tmp_path


# Each function with arguments that are in order, and values that are not, by argument.
TABLE = {
    "load": (
        lambda p: (ml.load, {"path": p / "in"}),
        {"path": PATHS, "mmap": FLAGS, "strict": FLAGS, "limits": LIMITS, "allow": (*LISTS, None), **READ},
    ),
    "save": (
        lambda p: (ml.save, {"adapter": ml.load(p / "in"), "path": p / "out"}),
        {
            "adapter": (None, 5, "in", b"x"),
            "path": PATHS,
            "format": WORDS,
            "layer_paths": (5, "q", [1], {"q": 5}),
        },
    ),
    "AdapterFile.read": (
        lambda p: (ml.AdapterFile.read, {"path": p / "in"}),
        {"path": PATHS, "mmap": FLAGS, "strict": FLAGS, "limits": LIMITS, "module_names": NAMES, **READ},
    ),
    "AdapterFile.from_adapter": (
        lambda p: (ml.AdapterFile.from_adapter, {"adapter": ml.load(p / "in")}),
        {"adapter": (None, 5, "in", b"x")},
    ),
    "AdapterFile.with_module_names": (
        lambda p: (ml.AdapterFile.read(p / "in").with_module_names, {"module_names": ["unet.a"]}),
        {"module_names": (*NAMES, None)},
    ),
    "AdapterFile.adapter": (
        lambda p: (ml.AdapterFile.read(p / "in").adapter, {}),
        {"allow": (*LISTS, None)},
    ),
    "AdapterFile.unpack_experts": (
        lambda p: (ml.AdapterFile.read(p / "in").unpack_experts, {}),
        {"experts": ("8", 1.5, True, 0, [])},
    ),
    "AdapterFile.save": (
        lambda p: (ml.AdapterFile.read(p / "in").save, {"dst": p / "out"}),
        {
            "dst": PATHS,
            "format": WORDS,
            "base_config": CONFIGS,
            "allow": (*LISTS, None),
            "overwrite": FLAGS,
            "progress": CALLS,
            "cancel": CALLS,
        },
    ),
    "convert": (
        lambda p: (ml.convert, {"src": p / "in", "dst": p / "out", "format": "peft"}),
        {
            "src": PATHS,
            "dst": PATHS,
            "format": (*WORDS, None),
            "allow": (*LISTS, None),
            "overwrite": FLAGS,
            "dtype": WORDS,
            "module_names": NAMES,
            "progress": CALLS,
            "cancel": CALLS,
            **READ,
        },
    ),
    "convert_to_plain": (
        lambda p: (ml.convert_to_plain, {"file": p / "in", "initial": p / "in", "dst": p / "out"}),
        {"file": PATHS, "dst": MAYBE_PATHS, "overwrite": FLAGS},
    ),
    "quantize": (
        lambda p: (ml.quantize, {"adapter": p / "in", "type": "f16"}),
        {
            "adapter": PATHS,
            "type": (5, b"x", [], ["q8_0"], True, "nonsense", {}, {"q": 5}, {5: "q8_0"}),
            "calibration": ("x", 5, [1], {"q": "x"}, {5: np.ones((1, 4))}, b"x", np.ones((2, 3), int)),
            "b_along_rank": FLAGS,
            "progress": CALLS,
            "cancel": CALLS,
        },
    ),
    "quantize to an error": (
        lambda p: (ml.quantize, {"adapter": p / "in"}),
        {"target_error": (*NUMBERS, 0.0, 1.0, -0.5)},
    ),
    "quantization_profile": (
        lambda p: (ml.quantization_profile, {"adapter_type": "intent_classifier", "device": "mobile"}),
        {"adapter_type": (5, b"x", None, [], ""), "device": (5, b"x", None, [], "")},
    ),
    "QuantizedAdapter.save": (
        lambda p: (
            ml.quantize(ml.Adapter.from_factors(FACTORS, alpha=8), "q8_0").adapter.save,
            {"dst": p / "out"},
        ),
        {
            "dst": PATHS,
            "format": WORDS,
            "base_config": CONFIGS,
            "allow": (*LISTS, None),
            "overwrite": FLAGS,
            "progress": CALLS,
            "cancel": CALLS,
        },
    ),
    "QuantizedAdapter.from_adapter": (
        lambda p: (
            ml.QuantizedAdapter.from_adapter,
            {"adapter": ml.Adapter.from_factors(FACTORS, alpha=8), "types": {"q": ("q8_0", "q8_0")}},
        ),
        {
            "adapter": (None, 5, "in"),
            "types": (
                5,
                None,
                "q8_0",
                [],
                {"q": "q8_0"},
                {"q": ("q8_0",)},
                {"q": 5},
                {5: ("q8_0", "q8_0")},
                {},
            ),
            "b_along_rank": FLAGS,
        },
    ),
    "Adapter.from_factors": (
        lambda p: (ml.Adapter.from_factors, {"factors": FACTORS, "alpha": 8.0}),
        {
            "factors": (
                5,
                None,
                {},
                [("q", FACTORS["q"])],
                {"q": FACTORS["q"][0]},
                {"q": FACTORS["q"][:1]},
                {5: FACTORS["q"]},
            ),
            "alpha": (*NUMBERS, None, {}, {"q": "8"}, {"q": 8.0, "z": 1.0}),
            "use_rslora": FLAGS,
            "dtype": (5, None, "f8", []),
        },
    ),
    "Adapter.with_metadata": (
        lambda p: (ml.load(p / "in").with_metadata, {}),
        {"metadata": (5, None, "x", {"name": "x"})},
    ),
    "QuantizedAdapter.with_metadata": (
        lambda p: (ml.quantize(ml.Adapter.from_factors(FACTORS, alpha=8), "q8_0").adapter.with_metadata, {}),
        {"metadata": (5, None, "x", {"name": "x"})},
    ),
    "inspect": (
        lambda p: (ml.inspect, {"path": p / "in"}),
        {
            "path": PATHS,
            "base": ([1], 5, b"x", True, "", "nobase"),
            "limits": LIMITS,
            "fix": MAYBE_PATHS,
            "also": (5, None, [5], "nonsense", b"x"),
        },
    ),
    "Report.plot": (
        lambda p: (ml.inspect(p / "in").plot, {}),
        {"path": (*PATHS, "map.gif")},
    ),
    "fingerprint": (
        lambda p: (ml.fingerprint, {"source": p / "in"}),
        {"source": PATHS, "limits": LIMITS},
    ),
    "manifest": (lambda p: (trust.manifest, {"path": p / "in"}), {"path": PATHS}),
    "verify": (
        lambda p: (ml.verify, {"path": p / "in", "manifest": p / "m.json"}),
        {
            "path": PATHS,
            "sha256": (5, b"x", "", "deadbeef", [], True),
            "manifest": (5, b"x", [], {}, {"a": 5}, {5: "0" * 64}, {"../a": "0" * 64}, "nofile", ""),
            "limits": LIMITS,
            "signature": (5, b"x", [], "", "x.sig"),
        },
    ),
    "verify a signature": (
        lambda p: (ml.verify, {"path": p / "in"}),
        {"public_key": (5, b"x", [], "deadbeef", "", True)},
    ),
    "sign": (
        lambda p: (ml.sign, {"path": p / "in", "private_key": "00" * 32}),
        {
            "path": PATHS,
            "private_key": (5, None, b"x", [], "deadbeef", "", True),
            "out": MAYBE_PATHS,
            "password": (5, "text", []),
            "overwrite": FLAGS,
        },
    ),
    "Limits": (
        lambda p: (ml.Limits, {}),
        {
            name: ("8", 0, -1, 1.5, True, None, [])
            for name in ("header_bytes", "tensors", "total_bytes", "rank")
        },
    ),
}
ROWS = [
    (name, arg, value) for name, (_, bad) in TABLE.items() for arg, values in bad.items() for value in values
]


def content(place):
    return {p.relative_to(place): p.read_bytes() for p in place.rglob("*") if p.is_file()}


@pytest.mark.parametrize(("name", "arg", "value"), ROWS, ids=[f"{n}-{a}-{v!r:.20}" for n, a, v in ROWS])
def test_another_kind_of_argument_is_refused_by_name(place, monkeypatch, name, arg, value):
    monkeypatch.chdir(place)
    if name in ("sign", "verify a signature"):
        pytest.importorskip("cryptography")
    make, _ = TABLE[name]
    call, good = make(place)
    before = content(place)
    with pytest.raises(MicroLoraError) as caught:
        call(**{**good, arg: value})
    message = str(caught.value)
    assert message.startswith((f"{arg}: ", f"{arg}[", f"{arg},", f"limits.{arg}:", "lora_")), message
    assert ": got " in message, message
    assert content(place) == before


@pytest.mark.parametrize("name", TABLE)
def test_the_table_has_every_argument(place, name):
    call, good = TABLE[name][0](place)
    told = {a for n, (_, bad) in TABLE.items() if n.split(" ")[0] == name.split(" ")[0] for a in bad}
    free = {"initial", "target_error", "calibration"}  # each has a test of its own
    assert set(inspect.signature(call).parameters) - free <= told | {"self", "args", "kwargs"}
    assert not set(good) - set(inspect.signature(call).parameters)


def test_what_is_in_order_is_taken(place):
    """The arguments that the table calls good are."""
    for name in (
        "load",
        "save",
        "AdapterFile.read",
        "convert",
        "quantize",
        "inspect",
        "fingerprint",
        "verify",
    ):
        make, _ = TABLE[name]
        for old in place.glob("out*"):
            for file in old.rglob("*"):
                file.unlink()
            old.rmdir()
        call, good = make(place)
        call(**good)
    one = ml.AdapterFile.read(place / "in", alpha=None, mmap=True, strict=False)
    assert isinstance(one.file, str)
    assert ml.load(str(place / "in")) == ml.load(Path(place / "in"))
    assert ml.convert(ml.load(place / "in"), place / "c.npz", format="npz", allow=("drop:dora",)).modules


# -- losses by name ---------------------------------------


def test_a_kind_that_there_is_not_is_refused_everywhere(place):
    write_peft(place / "dora", sound_tensors(), sound_config(use_dora=True))
    wide = ml.Adapter.from_factors(FACTORS, alpha=8.0)
    ml.save(ml.quantize(wide, "q8_0").adapter, place / "q.safetensors")
    before = content(place)
    for source in ("in", "dora"):
        file = ml.AdapterFile.read(place / source)
        for call in (
            lambda source=source: ml.load(place / source, allow=["drop:dorra"]),
            lambda source=source: ml.convert(
                place / source, place / "x", format="peft", allow=["drop:dorra"]
            ),
            lambda source=source: ml.convert(place / source, place / "x", format="mlx", allow=["drop:dorra"]),
            lambda file=file: file.save(place / "x", allow=["drop:dorra"]),
            lambda file=file: file.adapter(allow=["drop:dora", "drop:dorra"]),
            lambda: ml.load(place / "q.safetensors", allow=["drop:dorra"]),
        ):
            with pytest.raises(
                ConfigError, match=r"allow: got 'drop:dorra', expected .*\(did you mean 'dora'"
            ) as e:
                call()
            assert "'drop:' and one of alora, arrow, " in str(e.value)
    assert content(place) == before


def test_a_known_kind_that_a_file_lacks_is_no_error(place):
    every = [f"drop:{kind}" for kind in core.adapter_file_kinds()]
    assert ml.load(place / "in", allow=every).modules()
    assert ml.AdapterFile.read(place / "in").adapter(allow=every).modules()
    for format in ("peft", "safetensors", "npz", "mlx"):
        done = ml.convert(place / "in", place / f"to-{format}", format=format, allow=every)
        assert done.dropped == {}


def test_the_kinds_that_there_are_are_those_that_files_show(place):
    kinds = core.adapter_file_kinds()
    assert kinds == sorted(set(kinds))
    for kind in ("dora", "loha", "lokr", "init:pissa", "row_order", "extra", "experts", "conv"):
        assert kind in kinds
    write_peft(place / "dora", sound_tensors(), sound_config(use_dora=True))
    with pytest.raises(UnsupportedVariantError, match=r'allow=\["drop:dora"\]'):
        ml.load(place / "dora")
    assert ml.load(place / "dora", allow=["drop:dora"]).modules()


def test_a_base_config_without_effect_is_refused(place):
    config = {"model_type": "llama", "hidden_size": 16, "num_attention_heads": 4, "num_hidden_layers": 5}
    before = content(place)
    for format in ("peft", "safetensors", "mlx", "kohya", "diffusers", "flat", "npz"):
        for source in (place / "in", ml.load(place / "in")):
            with pytest.raises(ConfigError, match=f"base_config: got one for .* to {format}, expected None"):
                ml.convert(source, place / "out", format=format, base_config=config)
    assert content(place) == before


# -- what is not there ---------------------------------------


@pytest.mark.parametrize(
    ("arg", "call"),
    [
        ("base_config", lambda p: ml.convert(p / "in", p / "x.gguf", format="gguf", base_config=p / "no")),
        ("base_config", lambda p: ml.load(p / "in", base_config=p / "in" / "no")),
        ("base_config", lambda p: ml.load(p / "in", base_config=p)),  # no config.json in it
        ("base", lambda p: ml.inspect(p / "in", base=p / "no")),
        ("manifest", lambda p: ml.verify(p / "in", manifest=p / "no.json")),
        ("public_key", lambda p: ml.verify(p / "in", public_key="deadbeef")),
        ("private_key", lambda p: ml.sign(p / "in", p / "no.pem")),
        ("module_names", lambda p: ml.AdapterFile.read(p / "in", module_names=p / "no")),
        ("out", lambda p: ml.sign(p / "in", "00" * 32, out=p / "no" / "x.sig")),
        ("path", lambda p: ml.inspect(p / "in").plot(p / "no" / "x.png")),
    ],
)
def test_what_is_not_there_is_named_with_its_argument(place, arg, call):
    if arg in ("public_key", "private_key", "out"):
        pytest.importorskip("cryptography")
    before = content(place)
    with pytest.raises(MissingPathError, match=f"^{arg}: got .*expected ") as caught:
        call(place)
    assert isinstance(caught.value, FileNotFoundError)
    assert content(place) == before


def test_a_file_that_is_to_be_read_is_named(place):
    for call in (ml.load, ml.AdapterFile.read, ml.inspect, ml.verify, ml.fingerprint):
        with pytest.raises(FileNotFoundError, match="nothing here"):
            call(place / "nothing here")
    whole = hashlib.sha256(b"").hexdigest()
    with pytest.raises(ConfigError, match=r"sha256: got .*manifest= for a directory"):
        ml.verify(place / "in", sha256=whole)
