"""Each limit of `ml.Limits` holds in each format, and the defaults read what they should."""

import json
import struct

import numpy as np
import pytest

import microlora as ml
from microlora.exceptions import ConfigError, FormatError

A, B = np.ones((3, 8), np.float32), np.ones((6, 3), np.float32)
NAMES = ["model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj"]
FORMATS = [name for name, _ in ml._core.adapter_file_formats()]


@pytest.fixture(params=FORMATS)
def adapter_file(request, tmp_path):
    """An adapter of two modules of rank 3 in each format that needs no base to be written."""
    path = tmp_path / "adapter"
    adapter = ml.Adapter.from_factors(dict.fromkeys(NAMES, (A, B)), alpha=3.0)
    if request.param == "gguf":
        path.write_bytes(gguf())
    else:
        ml.convert(adapter, path, format=request.param)
    return path


def gguf():
    """The smallest adapter of llama.cpp: one module of an architecture without a row order."""

    def text(s):
        return struct.pack("<Q", len(s)) + s.encode()

    def key(name, value):
        return text(name) + struct.pack("<I", 8) + text(value)

    def info(name, dims, offset):
        return text(name) + struct.pack("<IQQIQ", 2, *dims, 0, offset)

    head = b"GGUF" + struct.pack("<IQQ", 3, 2, 4)
    head += (
        key("general.type", "adapter") + key("adapter.type", "lora") + key("general.architecture", "gemma3")
    )
    head += text("adapter.lora.alpha") + struct.pack("<If", 6, 3.0)
    head += info("blk.0.ffn_up.weight.lora_a", (8, 3), 0) + info("blk.0.ffn_up.weight.lora_b", (3, 6), 96)
    head += bytes(-len(head) % 32)
    return head + A.tobytes() + B.tobytes() + bytes(24)


def test_defaults_read(adapter_file):
    assert ml.load(adapter_file).info(ml.load(adapter_file).modules()[0]).rank == 3


@pytest.mark.parametrize(
    ("limits", "words"),
    [
        (ml.Limits(rank=2), "rank of .* of 3, the limit is 2 .limits: rank"),
        (ml.Limits(tensors=1), "tensor count of .*, the limit is 1 .limits: tensors"),
        (ml.Limits(header_bytes=16), "header of .* the limit is 16 .limits: header_bytes"),
        (ml.Limits(total_bytes=100), "100 that are copied to memory .limits: total_bytes"),
    ],
    ids=["rank", "tensors", "header_bytes", "total_bytes"],
)
def test_each_limit_holds(adapter_file, limits, words):
    with pytest.raises(FormatError, match=words):
        ml.load(adapter_file, limits=limits)
    with pytest.raises(FormatError, match=words):
        ml.AdapterFile.read(adapter_file, limits=limits)


def test_limits_that_just_hold(adapter_file):
    size = max(p.stat().st_size for p in [adapter_file, *adapter_file.glob("*")] if p.is_file())
    ml.load(adapter_file, limits=ml.Limits(rank=3, tensors=8, header_bytes=4096, total_bytes=size))


def test_a_mapped_file_is_not_copied(adapter_file):
    ml.load(adapter_file, mmap=True, limits=ml.Limits(total_bytes=100))


@pytest.mark.parametrize("field", ["header_bytes", "tensors", "total_bytes", "rank"])
@pytest.mark.parametrize("value", [0, -1, 1.5, True, "1", None, 2**63])
def test_bad_limits(field, value):
    with pytest.raises(ConfigError, match=f"limits.{field}"):
        ml.Limits(**{field: value})


def test_a_header_beyond_the_formats_own_limit_is_refused():
    with pytest.raises(ConfigError, match=r"limits\.header_bytes"):
        ml.Limits(header_bytes=100_000_001)


def test_a_million_tensors_are_refused_by_what_they_would_take(tmp_path):
    one = {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}
    header = json.dumps({f"{i:x}": one for i in range(1 << 17)}).encode()
    path = tmp_path / "bomb.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header)
    with pytest.raises(FormatError, match="bytes of memory"):
        ml.load(path)


@pytest.mark.parametrize("read", [ml.load, ml.AdapterFile.read, ml.inspect])
def test_limits_of_another_type_are_refused_by_name(tmp_path, read):
    ml.save(ml.Adapter.from_factors({"q": (np.ones((2, 4)), np.ones((4, 2)))}, alpha=2.0), tmp_path / "a")
    with pytest.raises(ConfigError, match=r"limits: got .*expected a microlora.Limits"):
        read(tmp_path / "a", limits={"rank": 4})
