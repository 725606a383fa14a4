"""Files in the key styles of other programs, from a few lines each, and what their delta must be."""

import json
import struct

import numpy as np

import microlora as ml
from support import normal, rng

CODES = {"<f4": "F32", "<f2": "F16", "<f8": "F64", "<i8": "I64", "<u2": "BF16"}
PATHS = ("model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj", "model.layers.1.mlp.up_proj")


def safetensors(path, arrays, header=None):
    """A file of the format from ``{name: array}``; uint16 stands for the bits of bfloat16."""
    entries, body = {} if header is None else {"__metadata__": header}, b""
    for name, values in arrays.items():
        values = np.asarray(values, order="C")
        raw = values.tobytes()
        span = [len(body), len(body) + len(raw)]
        entries[name] = {"dtype": CODES[values.dtype.str], "shape": list(values.shape), "data_offsets": span}
        body += raw
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(struct.pack("<Q", len(text)) + text + body)
    return path


def read_safetensors(path):
    """(header, {name: (dtype, shape, bytes)})."""
    data = path.read_bytes()
    (n,) = struct.unpack("<Q", data[:8])
    entries, body = json.loads(data[8 : 8 + n]), data[8 + n :]
    header = entries.pop("__metadata__", {})
    spans = {k: (v["dtype"], tuple(v["shape"]), v["data_offsets"]) for k, v in entries.items()}
    return header, {k: (dtype, shape, body[a:b]) for k, (dtype, shape, (a, b)) in spans.items()}


def factors(paths=PATHS, rank=3, n_in=7, n_out=5, seed=0, dtype=np.float32):
    """``{path: (A (rank, in), B (out, rank))}``, all numbers different."""
    r = rng(seed)
    return {p: (normal(r, rank, n_in).astype(dtype), normal(r, n_out, rank).astype(dtype)) for p in paths}


def delta(a, b, scaling):
    """The float64 twin."""
    return scaling * (np.asarray(b, np.float64) @ np.asarray(a, np.float64))


def deltas(adapter):
    return {m: delta(*adapter.factors(m), adapter.info(m).scaling) for m in adapter.modules()}


def same_deltas(adapter, want, rtol=0.0):
    got = deltas(adapter)
    assert sorted(got) == sorted(want)
    for m, value in want.items():
        np.testing.assert_allclose(got[m], value, rtol=rtol, atol=rtol)


def kohya(path, fs, alpha=None, header=None, **extra):
    arrays = dict(extra)
    for name, (a, b) in fs.items():
        arrays |= {f"{name}.lora_down.weight": a, f"{name}.lora_up.weight": b}
        if alpha is not None:
            arrays[f"{name}.alpha"] = np.float32(alpha)
    return safetensors(path, arrays, header)


def diffusers(path, fs, ends=(".lora_A.weight", ".lora_B.weight"), header=None, **extra):
    arrays = dict(extra)
    for name, (a, b) in fs.items():
        arrays |= {name + ends[0]: a, name + ends[1]: b}
    return safetensors(path, arrays, header)


def mlx(path, fs, scale=20.0, rank=None, config=None, name="adapters.safetensors", **extra):
    """An MLX directory; A and B come in PEFT's orientation, 3-D ones as they are."""
    path.mkdir(exist_ok=True)
    arrays = dict(extra)
    for module, (a, b) in fs.items():
        flip = a.ndim == 2
        arrays |= {f"{module}.lora_a": a.T if flip else a, f"{module}.lora_b": b.T if flip else b}
    safetensors(path / name, arrays)
    parameters = {"rank": rank or next(iter(fs.values()))[0].shape[-2], "dropout": 0.0, "scale": scale}
    text = {"fine_tune_type": "lora", "num_layers": 16, "lora_parameters": parameters, "model": "org/tiny"}
    (path / "adapter_config.json").write_text(json.dumps(text | (config or {})))
    return path


def peft(path, fs, alpha=6.0, dtype="f32", use_rslora=False):
    """A PEFT directory that this project writes."""
    ml.save(ml.Adapter.from_factors(fs, alpha=alpha, use_rslora=use_rslora, dtype=dtype), path, "peft")
    return path


def peft_content(path):
    _, tensors = read_safetensors(path / "adapter_model.safetensors")
    return json.loads((path / "adapter_config.json").read_text()), tensors
