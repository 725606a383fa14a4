"""Adapter files to break: a small sound PEFT directory, and ways to write it wrongly."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from microlora import _core

PREFIX = "base_model.model."
NAMES = {np.dtype("f8"): "F64", np.dtype("f4"): "F32", np.dtype("f2"): "F16", np.dtype("i4"): "I32"}
RANK, WIDTH = 4, 16


def paths(layers=5, parts=("q_proj", "v_proj")):
    return [f"model.layers.{i}.self_attn.{p}" for i in range(layers) for p in parts]


def sound_tensors(modules=None, rank=RANK, width=WIDTH, seed=0):
    """``{key: array}`` of a trained adapter."""
    r = np.random.default_rng(seed)
    out = {}
    for path in modules or paths():
        out[f"{PREFIX}{path}.lora_A.weight"] = r.standard_normal((rank, width), dtype=np.float32)
        out[f"{PREFIX}{path}.lora_B.weight"] = r.standard_normal((width, rank), dtype=np.float32)
    return out


def sound_config(**changes):
    config = {
        "peft_type": "LORA",
        "peft_version": "0.21.2",
        "base_model_name_or_path": "acme/base",
        "r": RANK,
        "lora_alpha": 8,
        "target_modules": ["q_proj", "v_proj"],
        "bias": "none",
    }
    return {k: v for k, v in (config | changes).items() if v is not ...}


def write_tensors(path, tensors, header=None):
    rows = [(k, NAMES[v.dtype], list(v.shape), np.ascontiguousarray(v).tobytes()) for k, v in tensors.items()]
    _core.write_safetensors(str(path), rows, {"format": "pt"} if header is None else header)


def write_peft(folder, tensors=None, config=None):
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_tensors(folder / "adapter_model.safetensors", sound_tensors() if tensors is None else tensors)
    if config is not False:
        (folder / "adapter_config.json").write_text(json.dumps(config or sound_config()))
    return folder


def renamed(tensors, old, new):
    return {k.replace(old, new): v for k, v in tensors.items()}


def read_tensors_of(folder):
    """``{key: array}`` of a directory's weights, float types only."""
    scan = _core.scan_file(str(Path(folder) / "adapter_model.safetensors"))
    kinds = {v: k for k, v in NAMES.items()}
    out = {}
    for i, (name, dtype, shape, _) in enumerate(scan.rows()):
        if dtype == "BF16":
            bits = np.frombuffer(scan.data(i), "<u2").astype("<u4") << 16
            out[name] = bits.view("<f4").reshape(shape)
        else:
            out[name] = np.frombuffer(scan.data(i), kinds[dtype]).reshape(shape)
    return out
