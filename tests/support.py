"""What several test files need: learners with given weights, comparisons, and scripts run apart."""

import json
import os
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np

import microlora as ml
import reference as ref

TESTS = Path(__file__).parent
DTYPES = ("f32", "f16", "bf16")


def rng(seed=0):
    return np.random.default_rng(seed)


def normal(r, *shape):
    return r.standard_normal(shape).astype(np.float32)


def read_tensors(data):
    """(header, {name: bytearray}) of safetensors bytes."""
    (n,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + n])
    body = data[8 + n :]
    spans = {k: v["data_offsets"] for k, v in header.items() if k != "__metadata__"}
    return header, {k: bytearray(body[a:b]) for k, (a, b) in spans.items()}


def write_tensors(header, tensors):
    """The bytes of `read_tensors`; offsets are made anew."""
    at, entries, body = 0, {k: v for k, v in header.items() if k == "__metadata__"}, b""
    for name, raw in tensors.items():
        entries[name] = {**header[name], "data_offsets": [at, at + len(raw)]}
        at += len(raw)
        body += bytes(raw)
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + body


def to_bits(values, dtype):
    """Bytes of float32 ``values`` rounded to nearest even into a storage dtype."""
    values = np.ascontiguousarray(values, np.float32)
    if dtype == "f32":
        return values.tobytes()
    if dtype == "f16":
        with np.errstate(over="ignore"):
            return values.astype(np.float16).tobytes()
    return bf16_bits(values).tobytes()


def bf16_bits(values):
    """uint16 bits of float32 values as bfloat16, rounded to nearest even."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32).astype(np.uint64)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def from_bf16(bits):
    return (np.asarray(bits, np.uint32) << 16).view(np.float32)


def set_weights(lora, weights):
    """Gives modules the factors ``{module: (a (rank, in), b (out, rank))}``, rounded to their dtype."""
    header, tensors = read_tensors(lora.export_weights())
    for module, pair in weights.items():
        for name, values in zip(("lora_a", "lora_b"), pair, strict=True):
            key = f"{module}.{name}"
            dtype = {"F32": "f32", "F16": "f16", "BF16": "bf16"}[header[key]["dtype"]]
            assert list(np.shape(values)) == header[key]["shape"]
            tensors[key] = bytearray(to_bits(values, dtype))
    lora.import_weights(write_tensors(header, tensors))
    return lora


def make(n_in=24, n_out=None, rank=4, *, alpha=None, seed=0, learned=True, names=("m",), **settings):
    """A learner with one shape for all its modules, with random A and B (B = 0 unless ``learned``)."""
    n_out = n_in if n_out is None else n_out
    cfg = ml.LoraConfig(
        rank=min(rank, n_in, n_out),
        alpha=2.0 * rank if alpha is None else alpha,
        target_modules=names,
        **settings,
    )
    lora = ml.MicroLoRA(cfg, dims=dict.fromkeys(names, (n_in, n_out)), seed=seed)
    if learned:
        r, k = rng(seed + 1), cfg.rank
        w = {n: (normal(r, k, n_in) / np.sqrt(n_in), normal(r, n_out, k) / np.sqrt(k)) for n in names}
        set_weights(lora, w)
    return lora


def twin(lora, module="m", **settings):
    return ref.Twin.of(lora[module], **settings)


def state_of(lora):
    """All that a refused call must leave as it was."""
    return lora.export_weights(), lora.snapshot().to_bytes(), lora.version, lora.enabled, lora.counters


def close(got, want, rtol=1e-5, atol=0.0):
    """Relative to the largest number: ``max|got - want| <= rtol max|want| + atol``."""
    got, want = ref.f64(got), ref.f64(want)
    assert got.shape == want.shape
    worst, scale = np.abs(got - want).max(initial=0.0), np.abs(want).max(initial=0.0)
    assert worst <= rtol * scale + atol, f"off by {worst:.3e} at a scale of {scale:.3e}, allowed {rtol:g}"


def feedback_kinds(r, n):
    """One of each kind for an output of width n."""
    v = lambda: normal(r, n)  # noqa: E731
    return {
        "mse": ml.Target(v()),
        "cosine": ml.Target(v(), loss="cosine"),
        "gradient": ml.Gradient(v()),
        "reward": ml.Reward(float(r.uniform(-1, 1)), response=v()),
        "preference": ml.Preference(v(), v(), p=0.8, beta=5.0),
        "contrastive": ml.Contrastive(v(), normal(r, 4, n), tau=0.2),
    }


KINDS = tuple(feedback_kinds(rng(), 3))


def run_python(code, *args, env=None, timeout=100):
    """Runs a script in a new interpreter, with this folder importable; returns its standard output."""
    path = os.pathsep.join(filter(None, [str(TESTS), os.environ.get("PYTHONPATH")]))
    full = {**os.environ, "PYTHONPATH": path, **(env or {})}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code, *map(str, args)],
        capture_output=True,
        text=True,
        env=full,
        timeout=timeout,
        check=False,
    )
    assert done.returncode == 0, f"exit {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def factors(lora, module="m"):
    return lora[module].lora_a, lora[module].lora_b


def scaling(lora, module="m"):
    return float(lora[module].scaling)


def move(lora, r, module="m", by=0.3):
    """Other weights nearby."""
    a, b = factors(lora, module)
    set_weights(lora, {module: (a + by * normal(r, *a.shape), b + by * normal(r, *b.shape))})


def event_args(r, n_in, n_out):
    return normal(r, n_in), normal(r, n_out)
