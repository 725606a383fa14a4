"""Files with one fault each, by the check that should speak."""

from __future__ import annotations

import json
import struct

import numpy as np

import microlora as ml
from doctor_support import (
    PREFIX,
    RANK,
    WIDTH,
    paths,
    read_tensors_of,
    renamed,
    sound_config,
    sound_tensors,
    write_peft,
    write_tensors,
)
from microlora.doctor import CHECKS

CHECK = {c.code: c for c in CHECKS}
Q0 = "model.layers.0.self_attn.q_proj"
A0, B0 = f"{PREFIX}{Q0}.lora_A.weight", f"{PREFIX}{Q0}.lora_B.weight"


def without(tensors, *names):
    return {k: v for k, v in tensors.items() if k not in names}


def times(factor, name=B0, **more):
    tensors = sound_tensors(**more)
    tensors[name] = (tensors[name] * np.float32(factor)).astype(np.float32)
    return tensors


def put(name, value, tensors=None):
    return (tensors or sound_tensors()) | {name: np.asarray(value)}


def poisoned(value=np.nan, name=A0):
    tensors = sound_tensors()
    tensors[name][1, 2] = value
    return tensors


def all_zero():
    return {k: np.zeros_like(v) if "lora_B" in k else v for k, v in sound_tensors().items()}


def bfloats():
    return {k: (v.view("u4") & np.uint32(0xFFFF0000)).view("f4") for k, v in sound_tensors().items()}


def tensors_and(config=None, **changes):
    return lambda d: write_peft(d, None, sound_config(**(config or {}), **changes))


def weights(make):
    return lambda d: write_peft(d, make())


def _truncated(d):
    write_peft(d)
    file = d / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-7])


def _overlap(d):
    write_peft(d)
    header = {
        name: {"dtype": "F32", "shape": [2], "data_offsets": [at, at + 8]}
        for name, at in (("a", 0), ("b", 4))
    }
    text = json.dumps(header).encode()
    (d / "adapter_model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + b"\0" * 12)


def _pickle(d):
    write_peft(d)
    (d / "adapter_model.safetensors").rename(d / "x")
    (d / "x").unlink()
    (d / "adapter_model.bin").write_bytes(b"PK\x03\x04")


def _pickle_named(d):
    write_peft(d)
    (d / "adapter_model.safetensors").write_bytes(b"\x80\x04K\x01.")


def _beside(d):
    write_peft(d)
    (d / "optimizer.pt").write_bytes(b"PK\x03\x04")


def _link(d):
    write_peft(d / "real")
    d.mkdir(exist_ok=True)
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        (d / name).symlink_to(d / "real" / name)


def _executable(d):
    write_peft(d)
    (d / "adapter_config.json").chmod(0o755)


def _changed(d):
    write_peft(d)
    ml.save(ml.load(d), d)
    tensors = read_tensors_of(d)
    header = ml._core.scan_file(str(d / "adapter_model.safetensors")).header
    write_tensors(d / "adapter_model.safetensors", {k: v * np.float32(2) for k, v in tensors.items()}, header)


def _config_gone(d):
    write_peft(d, config=False)


def _no_weights(d):
    write_peft(d)
    (d / "adapter_model.safetensors").unlink()


def _config_text(text):
    def write(d):
        write_peft(d)
        (d / "adapter_config.json").write_text(text)

    return write


def rank_two_somewhere():
    tensors = sound_tensors()
    tensors[A0], tensors[B0] = tensors[A0][:2], tensors[B0][:, :2]
    return tensors


def _flat_silent(d):
    rng = np.random.default_rng(0)
    write_tensors(d, {"q.lora_a": rng.random((4, 16), "f4"), "q.lora_b": rng.random((8, 4), "f4")})


def _flat_square(d):
    write_tensors(d, {"lora_a": np.eye(4, dtype="f4"), "lora_b": np.eye(4, dtype="f4")})


def _npz_silent(d):
    with d.open("wb") as file:
        np.savez(file, **{"q.lora_a": np.ones((4, 16), "f4"), "q.lora_b": np.ones((8, 4), "f4")})


# code -> files that have the fault
BROKEN = {
    "damaged": [_truncated, _overlap],
    "unsaid": [_flat_silent, _flat_square, _npz_silent],
    "pickle": [_pickle, _pickle_named],
    "no_weights": [_no_weights],
    "pickle_beside": [_beside],
    "link": [_link],
    "executable": [_executable],
    "weights_changed": [_changed],
    "empty": [weights(lambda: {"model.embed.weight": np.ones((2, 2), "f4")})],
    "mixed_styles": [weights(lambda: put("lora_unet_down_blocks_0.lora_down.weight", np.ones((2, 2), "f4")))],
    "prefix_missing": [weights(lambda: renamed(sound_tensors(), PREFIX, ""))],
    "prefix_doubled": [weights(lambda: renamed(sound_tensors(), PREFIX, PREFIX * 2))],
    "adapter_name": [
        weights(lambda: renamed(sound_tensors(), "lora_A.weight", "lora_A.default.weight")),
        weights(lambda: renamed(sound_tensors(), ".weight", ".default.weight")),
    ],
    "other_adapter_name": [
        weights(lambda: renamed(sound_tensors(), "lora_B.weight", "lora_B.other.weight")),
    ],
    "duplicate": [
        weights(lambda: put(A0.replace(PREFIX, ""), sound_tensors()[A0])),
        weights(lambda: put(A0.replace("lora_A", "lora_A.default"), np.ones((RANK, WIDTH), "f4"))),
    ],
    "orphan": [weights(lambda: without(sound_tensors(), B0)), weights(lambda: without(sound_tensors(), A0))],
    "unused": [weights(lambda: put("step", np.ones((1,), "f4")))],
    "layer_gap": [
        weights(lambda: without(sound_tensors(), A0.replace("s.0", "s.2"), B0.replace("s.0", "s.2")))
    ],
    "bad_shape": [
        weights(lambda: put(B0, np.ones((WIDTH, RANK + 1), "f4"))),
        weights(lambda: put(A0, np.ones((RANK,), "f4"))),
    ],
    "rank_contradicts": [
        tensors_and(r=8),
        weights(rank_two_somewhere),
        tensors_and(rank_pattern={"q_proj": 2}),
    ],
    "nonfinite": [weights(poisoned), weights(lambda: poisoned(-np.inf, B0))],
    "dtype": [
        weights(lambda: {k: v.astype("f8") for k, v in sound_tensors().items()}),
        weights(lambda: put(A0, np.ones((RANK, WIDTH), "i4"))),
    ],
    "mixed_dtypes": [weights(lambda: put(A0, sound_tensors()[A0].astype("f2")))],
    "upcast": [
        weights(bfloats),
        weights(lambda: {k: v.astype("f2").astype("f4") for k, v in sound_tensors().items()}),
    ],
    "untrained": [weights(all_zero)],
    "zero_layer": [weights(lambda: times(0)), weights(lambda: times(0, A0))],
    "dead_layer": [weights(lambda: times(1e-5))],
    "outlier_layer": [weights(lambda: times(1e4))],
    "config_missing": [_config_gone],
    "config_broken": [_config_text("{"), _config_text("[]"), _config_text('{"r": 1, "r": 2}')],
    "not_lora": [tensors_and(peft_type="IA3"), tensors_and(peft_type=...)],
    "invalid_setting": [
        tensors_and(r=0),
        tensors_and(lora_alpha="x"),
        tensors_and(use_rslora="yes"),
        tensors_and(bias="some"),
        tensors_and(rank_pattern=[1]),
        tensors_and(alpha_pattern={"q_proj": None}),
    ],
    "pattern_refused": [tensors_and(alpha_pattern={"(?=q)q_proj": 4}), tensors_and(alpha_pattern={"q(": 4})],
    "pattern_unmatched": [
        tensors_and(alpha_pattern={"o_proj": 4}),
        tensors_and(rank_pattern={"layers.9.q": 4}),
    ],
    "target_uncovered": [tensors_and(target_modules=["q_proj"]), tensors_and(target_modules=r".*q_proj")],
    "target_unmatched": [tensors_and(target_modules=["q_proj", "v_proj", "o_proj"])],
    "base_mutating": [tensors_and(init_lora_weights="pissa"), tensors_and(init_lora_weights="olora")],
    "variant": [
        tensors_and(use_dora=True),
        tensors_and(alora_invocation_tokens=[]),
        weights(lambda: put(A0.replace("lora_A.weight", "lora_magnitude_vector"), np.ones(WIDTH, "f4"))),
        weights(lambda: put(f"{PREFIX}{Q0}.lora_B.bias", np.ones(WIDTH, "f4"))),
        weights(lambda: put(f"{PREFIX}model.embed.lora_embedding_A", np.ones((RANK, 3), "f4"))),
    ],
    "unknown_setting": [tensors_and(use_dorra=True)],
    "alpha": [tensors_and(lora_alpha=0), tensors_and(lora_alpha=-8), tensors_and(lora_alpha=65 * RANK)],
    "rslora_scaling": [tensors_and(lora_alpha=32, use_rslora=True)],
    "saved_modules_missing": [tensors_and(modules_to_save=["score"])],
    "transposed": [tensors_and(fan_in_fan_out=True)],
    "no_base_name": [tensors_and(base_model_name_or_path=None)],
    "no_peft_version": [tensors_and(peft_version=...)],
}
CONFIG = {
    "model_type": "llama",
    "hidden_size": WIDTH,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "intermediate_size": 32,
}
SHAPES = {f"{p}.weight": (WIDTH, WIDTH) for p in paths()}
# code -> (files, base)
AGAINST = {
    "base_names": [
        (write_peft, {k.replace("model.", "model.language_model."): v for k, v in SHAPES.items()}),
        (write_peft, {k.replace("q_proj", "query"): v for k, v in SHAPES.items()}),
        (weights(lambda: renamed(sound_tensors(), "model.layers", "layers")), CONFIG),
    ],
    "base_shapes": [
        (write_peft, SHAPES | {f"{Q0}.weight": (WIDTH, 8)}),
        (write_peft, CONFIG | {"num_key_value_heads": 2}),
        (write_peft, {"text_config": CONFIG | {"hidden_size": 32}}),
    ],
    "base_layers": [(write_peft, CONFIG | {"num_hidden_layers": 4})],
    "base_name": [(write_peft, CONFIG | {"_name_or_path": "acme/other"})],
}
