"""The hash of the weights in the header of every format: right, checked, and never another file's."""

from __future__ import annotations

import numpy as np
import pytest

import microlora as ml
from doctor_support import sound_config, write_peft
from microlora import _core
from microlora.exceptions import FormatError, VerificationError
from styles_support import safetensors

BASE = {
    "model_type": "llama", "num_hidden_layers": 1, "hidden_size": 32, "intermediate_size": 48,
    "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 20,
}  # fmt: skip
PATH = "model.layers.0.self_attn.q_proj"
ENDINGS = {"gguf": ".gguf", "npz": ".npz", "safetensors": ".safetensors"}
FORMATS = ("safetensors", "peft", "gguf", "mlx", "kohya", "diffusers", "flat", "npz")


def of(format):
    """What only GGUF asks for."""
    return {"base_config": BASE} if format == "gguf" else {}


def small(seed=0, alpha=8.0):
    r = np.random.default_rng(seed)
    pair = r.standard_normal((4, 32), np.float32), r.standard_normal((32, 4), np.float32)
    return ml.Adapter.from_factors({PATH: pair}, alpha=alpha)


def blocks(seed=0):
    r = np.random.default_rng(seed)
    pair = r.standard_normal((32, 32), np.float32), r.standard_normal((32, 32), np.float32)
    made = ml.Adapter.from_factors({PATH: pair}, alpha=8.0)
    return ml.QuantizedAdapter.from_adapter(made, {PATH: ("q8_0", "q4_1")}, b_along_rank=True)


def experts(tmp_path):
    """A PEFT directory with two experts in one pair."""
    tensors = {
        "base_model.model.mlp.experts.lora_A.weight": np.ones((4, 6), "f4"),
        "base_model.model.mlp.experts.lora_B.weight": np.ones((5, 4), "f4"),
    }
    settings = {"target_modules": [], "target_parameters": ["mlp.experts.w1"], "r": 2, "lora_alpha": 4}
    return write_peft(tmp_path / "packed", tensors, sound_config(**settings))


def written(kind, tmp_path, source=None):
    """A file of that kind, and where its weights lie: the file, and first and last byte of them."""
    path = tmp_path / ("x" + ENDINGS.get(kind.removeprefix("blocks."), ""))
    if kind == "packed":
        ml.AdapterFile.read(experts(tmp_path)).unpack_experts().save(path, "peft")
    elif kind.startswith("blocks."):
        to = kind.removeprefix("blocks.")
        ml.convert(source or blocks(), path, format=to, **of(to))
    else:
        pytest.importorskip("gguf") if kind == "gguf" else None
        ml.convert(source or small(), path, format=kind, **of(kind))
    place = path if path.is_file() else next(path.glob("*.safetensors"))
    data = place.read_bytes()
    if "gguf" in kind:
        ends = [(data.index(raw), len(raw)) for raw in (t.tobytes() for t in gguf_tensors(place))]
    elif kind == "npz":
        # A zip's own checksum finds the rest.
        raws = [t.tobytes() for t in small().raw(PATH)]
        ends = [(data.index(raw), len(raw)) for raw in raws]
    else:
        start = 8 + int.from_bytes(data[:8], "little")
        ends = [(start, len(data) - start)]
    return path, place, ends


def gguf_tensors(path):
    gguf = pytest.importorskip("gguf")
    return [np.array(t.data) for t in gguf.GGUFReader(path).tensors]


@pytest.mark.parametrize("kind", [*FORMATS, "packed", "blocks.gguf", "blocks.safetensors"])
def test_a_flipped_byte_of_the_weights_is_found_in_every_format(kind, tmp_path):
    if "gguf" in kind:
        pytest.importorskip("gguf")
    path, place, spans = written(kind, tmp_path)
    result = ml.verify(path)
    assert result.checked == ("weights",)
    assert result.fingerprint == ml.fingerprint(path) == ml.AdapterFile.read(path).weights_sha256
    whole = place.read_bytes()
    assert whole.count(result.fingerprint.encode()) == 1
    for start, size in spans:
        assert size >= 32
        for at in {start, start + 1, start + size // 2, start + size - 1, *range(start, start + size, 41)}:
            place.write_bytes(whole[:at] + bytes([whole[at] ^ 0x11]) + whole[at + 1 :])
            with pytest.raises((VerificationError, FormatError)):
                ml.verify(path)
    place.write_bytes(whole)
    ml.verify(path)
    if kind not in ("packed", "npz"):
        # A change that no parser sees: the least bit of a number, which is finite before and after.
        at = spans[0][0] + (4 if kind.startswith("blocks") else 0)
        place.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        with pytest.raises(VerificationError, match="its header says"):
            ml.verify(path)
        assert "weights_changed" in ml.inspect(path).codes


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("to", FORMATS)
def test_the_hash_of_another_file_is_never_carried_over(kind, to, tmp_path):
    if "gguf" in (kind, to):
        pytest.importorskip("gguf")
    path, *_ = written(kind, tmp_path)
    named = {"base_config": BASE} if kind == "gguf" else {}
    file = ml.AdapterFile.read(path, **named)
    stale = ml.verify(path).fingerprint
    a, b = (np.frombuffer(t, np.float32) for t in file.factor_bytes(0))
    m = file.modules[0]
    pair = ("F32", [4, 32], (2 * a).tobytes()), ("F32", [32, 4], b.tobytes())
    core = _core.AdapterFile.build(
        [(m.path, "linear", m.alpha, False, *pair)], [], None, None, file.peft_config
    )
    changed = tmp_path / "changed"
    ml.convert(ml.AdapterFile.wrap(core), changed, format=to, **of(to))
    ml.convert(file, tmp_path / "same", format=to, **of(to))
    for place in (changed, tmp_path / "same"):
        again = place if place.is_file() else next(place.glob("*.safetensors"))
        assert again.read_bytes().count(ml.verify(place).fingerprint.encode()) == 1
    again = changed if changed.is_file() else next(changed.glob("*.safetensors"))
    assert stale.encode() not in again.read_bytes()


@pytest.mark.parametrize("to", FORMATS)
def test_a_hash_that_came_with_other_entries_of_a_header_stays_out(to, tmp_path):
    if to == "gguf":
        pytest.importorskip("gguf")
    tensors = {
        f"{PATH}.lora_A.weight": np.ones((4, 32), "f4"),
        f"{PATH}.lora_B.weight": np.ones((32, 4), "f4"),
    }
    header = {"microlora.weights_sha256": "ab" * 32, "weights_sha256": "cd" * 32, "note": "kept"}
    path = safetensors(tmp_path / "a.safetensors", tensors, header)
    with pytest.raises(VerificationError, match="its header says abab"):
        ml.verify(path)
    ml.convert(path, tmp_path / "b", format=to, **of(to))
    place = tmp_path / "b"
    ml.verify(place)
    data = b"".join(f.read_bytes() for f in place.iterdir()) if place.is_dir() else place.read_bytes()
    assert b"abab" not in data
    assert b"cdcd" not in data
    assert b"kept" in data


@pytest.mark.parametrize("claim", ["", "ü" * 64, "AB" * 32, "0" * 10_000])
def test_a_claim_that_is_no_hash_is_a_wrong_one(claim, tmp_path):
    tensors = {
        f"{PATH}.lora_A.weight": np.ones((4, 32), "f4"),
        f"{PATH}.lora_B.weight": np.ones((32, 4), "f4"),
    }
    path = safetensors(tmp_path / "a.safetensors", tensors, {"microlora.weights_sha256": claim})
    with pytest.raises(VerificationError, match="its header says") as e:
        ml.verify(path)
    assert len(str(e.value)) < 1000
    assert "weights_changed" in ml.inspect(path).codes


def test_names_that_were_given_leave_no_hash_to_compare(tmp_path):
    pytest.importorskip("gguf")
    path, *_ = written("gguf", tmp_path)
    assert ml.AdapterFile.read(path).weights_sha256 == ml.fingerprint(path)
    named = ml.AdapterFile.read(path, base_config=BASE)
    assert named.weights_sha256 is None
    assert named.fingerprint() == ml.fingerprint(small())
    packed, *_ = written("packed", tmp_path)
    assert ml.AdapterFile.read(packed).unpack_experts().weights_sha256 is None
