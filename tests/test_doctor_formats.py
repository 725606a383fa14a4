"""The doctor on broken files of other writers: the fault is named as the reader names it, and no other."""

from __future__ import annotations

import json

import numpy as np
import pytest

import microlora as ml
from doctor_support import write_tensors
from microlora.exceptions import FormatError, UnrepairableError
from reference_gguf import adapter_file

RANK, WIDTH = 4, 64
RNG = np.random.default_rng(5)
A, B = RNG.standard_normal((RANK, WIDTH), dtype="f4"), RNG.standard_normal((WIDTH, RANK), dtype="f4")
ALPHA = np.array(8.0, "f4")
LAYER = "layers.0.q"


def _safetensors(path, tensors):
    write_tensors(path, tensors)
    return path


def _mlx(path, tensors):
    path.mkdir()
    write_tensors(path / "adapters.safetensors", tensors)
    scale = {"rank": RANK, "scale": 2.0, "dropout": 0.0}
    settings = {"fine_tune_type": "lora", "num_layers": 1, "lora_parameters": scale}
    (path / "adapter_config.json").write_text(json.dumps(settings))
    return path


def _npz(path, tensors):
    path = path.with_suffix(".npz")
    np.savez(path, **tensors)
    return path


def _gguf(path, tensors):
    path = path.with_suffix(".gguf")
    path.write_bytes(adapter_file("llama", tensors))
    return path


# format -> (writer, key of A, key of B, what else is in it, A and B as they lie)
STYLES = {
    "kohya": (
        _safetensors,
        "lora_unet_q.lora_down.weight",
        "lora_unet_q.lora_up.weight",
        {"lora_unet_q.alpha": ALPHA},
        (A, B),
    ),
    "old diffusers": (
        _safetensors,
        "unet.x.to_q.lora.down.weight",
        "unet.x.to_q.lora.up.weight",
        {},
        (A, B),
    ),
    "diffusers": (
        _safetensors,
        f"transformer.{LAYER}.lora_A.weight",
        f"transformer.{LAYER}.lora_B.weight",
        {},
        (A, B),
    ),
    "comfyui": (
        _safetensors,
        f"diffusion_model.{LAYER}.lora_A.weight",
        f"diffusion_model.{LAYER}.lora_B.weight",
        {},
        (A, B),
    ),
    "mlx": (_mlx, f"model.{LAYER}.lora_a", f"model.{LAYER}.lora_b", {}, (A.T, B.T)),
    "npz": (_npz, "q.lora_a", "q.lora_b", {"q.alpha": ALPHA}, (A, B)),
}
FAULTS = ("nan", "orphan")
#: A second name of the same factor, in the styles that have one.
TWINS = {
    "old diffusers": {
        "unet.x.processor.to_q_lora.down.weight": A,
        "unet.x.processor.to_q_lora.up.weight": B,
    },
}


def write(style, fault, path):
    if style == "gguf":
        bad = B.copy()
        bad[0, 0] = np.nan
        return _gguf(path, {"blk.0.attn_v": (A, {"": B, "nan": bad, "orphan": None}[fault])})
    writer, key_a, key_b, more, (a, b) = STYLES[style]
    tensors = {key_a: np.ascontiguousarray(a), key_b: np.array(b, order="C")} | more
    if fault == "nan":
        tensors[key_b][1, 1] = np.nan
    elif fault == "orphan":
        del tensors[key_b]
    elif fault == "duplicate":
        tensors |= TWINS[style]
    return writer(path, tensors)


def refusal(path):
    with pytest.raises(FormatError) as said:
        ml.AdapterFile.read(path)
    return str(said.value)


CASES = [(s, f) for s in (*STYLES, "gguf") for f in FAULTS] + [(s, "duplicate") for s in TWINS]


@pytest.mark.parametrize("style", [*STYLES, "gguf"])
def test_without_the_fault_the_file_is_sound(style, tmp_path):
    report = ml.inspect(write(style, "", tmp_path / "a"))
    assert report.ok, str(report)
    assert len(report.modules) == 1


@pytest.mark.parametrize(("style", "fault"), CASES)
def test_a_broken_file_has_its_own_fault_and_no_other(style, fault, tmp_path):
    path = write(style, fault, tmp_path / "a")
    report = ml.inspect(path)
    errors = [f for f in report.findings if f.severity == "error"]
    assert [f.code for f in errors] in (["refused"], [{"nan": "nonfinite"}.get(fault, fault)]), str(report)
    if errors[0].code == "refused":
        assert errors[0].message == refusal(path)
    else:
        assert errors[0].where
    assert all(f.repair == "no" for f in report.findings)


@pytest.mark.parametrize("style", ["gguf", "npz", "mlx"])
def test_the_format_is_told_of_a_broken_file(style, tmp_path):
    assert ml.inspect(write(style, "nan", tmp_path / "a")).format == style


@pytest.mark.parametrize(("style", "fault"), CASES)
def test_no_copy_is_promised_or_made_of_another_writers_file(style, fault, tmp_path):
    path = write(style, fault, tmp_path / "a")
    with pytest.raises(UnrepairableError, match="repairs are made of PEFT's and our own files"):
        ml.inspect(path, fix=tmp_path / "b", also=["nonfinite"])
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize("style", ["comfyui", "kohya", "diffusers"])
def test_tensors_too_many_are_what_the_reader_says(style, tmp_path):
    writer, key_a, key_b, more, (a, b) = STYLES[style]
    extra = key_a.split(".lora_")[0] + ".zzz"
    path = writer(tmp_path / "a", {key_a: a, key_b: b, extra: np.ones(3, "f4")} | more)
    report = ml.inspect(path)
    assert report.codes == ("refused",), str(report)
    assert extra in report.findings[0].message
    assert report.findings[0].message == refusal(path)


def test_kohya_ranks_that_differ_are_what_the_reader_says(tmp_path):
    writer, key_a, key_b, more, (a, b) = STYLES["kohya"]
    path = writer(tmp_path / "a", {key_a: a, key_b: b[:, :3]} | more)
    report = ml.inspect(path)
    assert report.codes == ("refused",), str(report)
    assert report.findings[0].message == refusal(path)


@pytest.mark.parametrize("keep", [10, 60, 200, 0.5, -4])
def test_a_torn_gguf_file_is_damaged_in_the_readers_words(keep, tmp_path):
    path = write("gguf", "", tmp_path / "a")
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep) if isinstance(keep, float) else keep])
    report = ml.inspect(path)
    assert report.codes == ("damaged",), str(report)
    assert report.findings[0].message == refusal(path)


def test_mlx_without_its_weights_has_none(tmp_path):
    path = write("mlx", "", tmp_path / "a")
    (path / "adapters.safetensors").unlink()
    assert "no_weights" in ml.inspect(path).codes


def test_a_file_of_no_known_names_is_still_empty(tmp_path):
    path = _safetensors(tmp_path / "a", {"x": np.ones((2, 2), "f4")})
    assert ml.inspect(path).codes == ("empty",)


@pytest.mark.parametrize(("old", "new"), [(b"lora", b"ctrl"), (b"GGUF\3", b"GGUF\x63")])
def test_a_gguf_file_of_another_kind_is_refused_in_the_readers_words(old, new, tmp_path):
    path = write("gguf", "", tmp_path / "a")
    path.write_bytes(path.read_bytes().replace(old, new, 1))
    report = ml.inspect(path)
    assert report.codes == ("refused",), str(report)
    assert report.findings[0].message == refusal(path)
