"""Base models on disk for the tests of fusing, and adapters that fit them."""

import json

import numpy as np

import microlora as ml
import reference_fuse as ref
from support import normal, read_tensors, rng, to_bits, write_tensors

CODES = {"F32": "f32", "F16": "f16", "BF16": "bf16"}


def save(path, tensors, metadata=None):
    """A safetensors file of ``{name: (dtype, shape, bytes)}``, in this order."""
    header = {} if metadata is None else {"__metadata__": metadata}
    header |= {k: {"dtype": d, "shape": list(s)} for k, (d, s, _) in tensors.items()}
    path.write_bytes(write_tensors(header, {k: raw for k, (_, _, raw) in tensors.items()}))
    return path


def weight(dtype, *shape, seed=0, scale=0.1):
    return dtype, shape, to_bits(scale * normal(rng(seed), *shape), CODES[dtype])


def adapter_of(shapes, rank=3, alpha=5.0, seed=1, scale=0.3, **settings):
    """``{module: (in, out)}`` to an adapter."""
    r = rng(seed)
    factors = {m: (scale * normal(r, rank, i), scale * normal(r, o, rank)) for m, (i, o) in shapes.items()}
    return ml.Adapter.from_factors(factors, alpha=alpha, **settings)


def snapshot(folder):
    """Every path below a folder with its bytes."""
    return {
        str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in sorted(folder.rglob("*"))
    }


def check(base, out, adapter, report):
    """Touched tensors are the twin's, everything else is the base's, byte for byte."""
    (header, before), (header_out, after) = read_tensors(base.read_bytes()), read_tensors(out.read_bytes())
    assert list(header.items()) == list(header_out.items())
    touched = {t.tensor: t for t in report.tensors}
    for name in before:
        if name not in touched:
            assert before[name] == after[name]
            continue
        t = touched[name]
        a, b = adapter.factors(t.module)
        info = adapter.info(t.module)
        want = ref.fused(before[name], header[name]["dtype"], a, b, info.scaling, t.layout)
        assert bytes(after[name]) == want
        assert want != bytes(before[name])


def small_of(tmp_path):
    """A base with one weight of every dtype and others, and the adapter that fits it."""
    tensors = {
        "z.odd": ("U8", (5,), b"12345"),
        "model.layers.0.q_proj.weight": weight("F32", 10, 7),
        "model.layers.0.q_proj.bias": weight("F32", 10),
        "model.layers.0.k_proj.weight": weight("F16", 6, 7, seed=2),
        "model.mask": ("F32", (3,), to_bits([-np.inf, np.nan, 1.0], "f32")),
        "model.layers.0.v_proj.weight": weight("BF16", 9, 7, seed=3),
        "model.ids": ("I64", (2, 1), bytes(16)),
        "empty": ("F32", (0, 3), b""),
    }
    base = save(tmp_path / "base.safetensors", tensors, {"format": "pt", "ä": "ö"})
    shapes = {f"model.layers.0.{n}_proj": (7, o) for n, o in (("q", 10), ("k", 6), ("v", 9))}
    return base, adapter_of(shapes)


def folder_of(path, shards=2, dtype="BF16"):
    """A model folder with shards, an index, settings, and things that are no part of it."""
    path.mkdir()
    names = [f"model.layers.{i}.q_proj" for i in range(2 * shards)]
    place = {}
    for s in range(shards):
        tensors = {f"{n}.weight": weight(dtype, 5, 4, seed=i) for i, n in enumerate(names) if i % shards == s}
        tensors[f"norm.{s}"] = weight(dtype, 3)
        file = f"model-{s + 1:05}-of-{shards:05}.safetensors"
        save(path / file, tensors, {"format": "pt"})
        place |= dict.fromkeys(tensors, file)
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": place}))
    (path / "config.json").write_text('{"tie_word_embeddings": false}')
    (path / "tokenizer.json").write_bytes(b"\x00any bytes")
    return path, adapter_of(dict.fromkeys(names, (4, 5)))


def loaded_with_bias(tmp_path):
    """An adapter with a tensor that nothing knows."""
    path = tmp_path / "extra.safetensors"
    ml.save(adapter_of({"a.q": (4, 5)}), path)
    header, tensors = read_tensors(path.read_bytes())
    header["a.q.bias"] = {"dtype": "F32", "shape": [5]}
    path.write_bytes(write_tensors(header, {**tensors, "a.q.bias": bytes(20)}))
    return ml.load(path, strict=False)
