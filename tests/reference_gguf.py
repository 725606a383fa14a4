"""GGUF adapters in a few lines of their own: what the tests hold the crate's reader and writer against."""

import hashlib
import json
import struct

import numpy as np

TYPES = {np.dtype(np.float32): 0, np.dtype(np.float16): 1}
ALIGNMENT = 32


def text(value):
    raw = value if isinstance(value, bytes) else value.encode()
    return struct.pack("<Q", len(raw)) + raw


def value(v):
    """A value with its type; a tuple (type, bytes) as it is."""
    if isinstance(v, tuple):
        return struct.pack("<I", v[0]) + v[1]
    if isinstance(v, (str, bytes)):
        return struct.pack("<I", 8) + text(v)
    if isinstance(v, float):
        return struct.pack("<If", 6, v)
    if isinstance(v, int):
        return struct.pack("<II", 4, v)
    return struct.pack(f"<IIQ{len(v)}I", 9, 4, len(v), *v)


def encode(keys, tensors, *, version=3, magic=b"GGUF", alignment=ALIGNMENT):
    """A file from (key, value) pairs and (name, dims fastest first, type, bytes) rows."""
    out = magic + struct.pack("<IQQ", version, len(tensors), len(keys))
    out += b"".join(text(k) + value(v) for k, v in keys)
    offset = 0
    for name, dims, kind, data in tensors:
        out += text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)
        offset += -(-len(data) // alignment) * alignment
    out += bytes(-len(out) % alignment)
    return out + b"".join(data + bytes(-len(data) % alignment) for *_, data in tensors)


def keys(architecture="llama", *, alpha=8.0, general="adapter", kind="lora", tokens=None, more=()):
    found = [
        ("general.architecture", architecture),
        ("general.type", general),
        ("adapter.type", kind),
        ("adapter.lora.alpha", alpha),
        ("adapter.alora.invocation_tokens", tokens),
        *more,
    ]
    return [(k, v) for k, v in found if v is not None]


def rows(modules, extra=None):
    """Tensor rows of {base tensor: (A, B)}; None leaves a factor out."""
    found = {
        f"{n}.weight.lora_{s}": t for n, pair in modules.items() for s, t in zip("ab", pair, strict=True)
    }
    found |= extra or {}
    return [
        (name, tuple(reversed(t.shape)), TYPES[t.dtype], t.tobytes())
        for name, t in ((n, np.ascontiguousarray(t)) for n, t in found.items() if t is not None)
    ]


def adapter_file(architecture, modules, *, extra=None, **settings):
    modules = {
        n: tuple(None if t is None else np.asarray(t, np.float32) for t in p) for n, p in modules.items()
    }
    return encode(keys(architecture, **settings), rows(modules, extra))


def weights_sha256(modules, alpha=8.0):
    """The fingerprint of a file of these factors in float32, as docs/doctor.md states it."""
    lines = {}
    for name, (a, b) in modules.items():
        scaling = np.array([alpha, 0.0], "<f8")
        for end, kind, t in (
            ("lora_a", "F32", np.asarray(a, "<f4")),
            ("lora_b", "F32", np.asarray(b, "<f4")),
            ("scaling", "F64", scaling),
        ):
            key = f"{name}.{end}"
            digest = hashlib.sha256(np.ascontiguousarray(t).tobytes()).hexdigest()
            lines[key] = f"{json.dumps(key)} {kind} {list(t.shape)} {digest}\n"
    text = "microlora weights 1\n" + "".join(lines[key] for key in sorted(lines))
    return hashlib.sha256(text.encode()).hexdigest()


def interleaved(weight, heads):
    """Rows of q or k of transformers in llama.cpp's order."""
    return weight.reshape(heads, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)
