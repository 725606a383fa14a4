"""A broken adapter, what the doctor finds in it, and what is left of it after the repair."""

import contextlib
import json
import tempfile
from pathlib import Path

import numpy as np

import microlora as ml

rng = np.random.default_rng(0)
tensors = {}
for layer in range(4):
    for module in ("q_proj", "v_proj"):
        key = f"base_model.model.base_model.model.model.layers.{layer}.self_attn.{module}"  # wrapped twice
        tensors[f"{key}.lora_A.weight"] = rng.standard_normal((8, 64), np.float32)
        tensors[f"{key}.lora_B.weight"] = rng.standard_normal((64, 8), np.float32)
tensors[next(iter(tensors))][3, 5] = np.nan  # a layer that diverged
del tensors[key + ".lora_B.weight"]  # an upload that stopped

header, end = {}, 0
for name, value in tensors.items():
    header[name] = {"dtype": "F32", "shape": value.shape, "data_offsets": (end, end + value.nbytes)}
    end += value.nbytes
text = json.dumps(header).encode()
settings = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"]}
settings |= {"alpha_pattern": {"o_proj": 32}, "base_model_name_or_path": "acme/base"}  # there is no o_proj

with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
    Path("broken").mkdir()
    Path("broken/adapter_config.json").write_text(json.dumps(settings))
    data = len(text).to_bytes(8, "little") + text + b"".join(v.tobytes() for v in tensors.values())
    Path("broken/adapter_model.safetensors").write_bytes(data)
    print(ml.inspect("broken", fix="repaired", also=["nonfinite"]))
    assert ml.inspect("repaired").ok
    assert len(ml.load("repaired").modules()) == 7
