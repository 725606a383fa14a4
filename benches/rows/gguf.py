"""Writing a GGUF adapter, beside a short script over the gguf package that writes the same file."""

from __future__ import annotations

import importlib.util
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

import microlora as ml
from report import Report, duration
from timing import Clock, shortest

RANK, BLOCKS = 16, 4
HEADS = 12


def run(report: Report, clock: Clock, *, smoke: bool) -> None:
    """Adds the rows."""
    del clock
    if importlib.util.find_spec("gguf") is None:
        return
    width = 96 if smoke else 768
    config = {
        "model_type": "llama", "num_hidden_layers": BLOCKS, "hidden_size": width, "intermediate_size": width,
        "num_attention_heads": HEADS, "num_key_value_heads": HEADS, "vocab_size": width,
    }  # fmt: skip
    names = ("q_proj", "k_proj", "v_proj", "o_proj")
    paths = [f"model.layers.{b}.self_attn.{n}" for b in range(BLOCKS) for n in names]
    rng = np.random.default_rng(0)
    factors = {
        p: (rng.standard_normal((RANK, width), np.float32), rng.standard_normal((width, RANK), np.float32))
        for p in paths
    }
    with tempfile.TemporaryDirectory() as folder:
        source, ours, theirs = (Path(folder) / n for n in ("a.safetensors", "ours.gguf", "theirs.gguf"))
        ml.save(ml.Adapter.from_factors(factors, alpha=32.0), source)
        size = source.stat().st_size
        report.section(
            f"{len(paths)} modules of {width} x {width}, rank {RANK} ({size / 1e6:.1f} MB) to GGUF"
        )
        for dtype in ("f32", "f16", "q8_0"):
            convert(report, source, ours, theirs, config, dtype, 0.02 if smoke else 1.0)


def convert(
    report: Report, source: Path, ours: Path, theirs: Path, config: dict[str, Any], dtype: str, budget: float
) -> None:
    """One dtype: both read the same file, write theirs, and give llama.cpp the same numbers."""

    def here() -> None:
        ml.convert(source, ours, format="gguf", base_config=config, dtype=dtype, overwrite=True)

    ns = shortest(here, budget)
    slow = shortest(lambda: script(source, theirs, config, dtype), budget)
    error = distance(ours, theirs)
    report.add(dtype, duration(ns), f"gguf script, not synced {duration(slow)}", slow / ns, error=error)


def script(source: Path, target: Path, config: dict[str, Any], dtype: str) -> None:
    """What one would write by hand: names, permutation and types of one llama adapter."""
    import gguf

    adapter = ml.load(source)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config["num_hidden_layers"])
    kinds = {
        "f32": gguf.GGMLQuantizationType.F32,
        "f16": gguf.GGMLQuantizationType.F16,
        "q8_0": gguf.GGMLQuantizationType.Q8_0,
    }
    writer = gguf.GGUFWriter(target, "llama")
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", adapter.info(adapter.modules()[0]).alpha)
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    for path in adapter.modules():
        name = names.get_name(f"{path}.weight", (".weight",))
        a, b = adapter.factors(path)
        if n := heads.get(path.rsplit(".", 1)[-1]):
            b = b.reshape(n, 2, -1, b.shape[1]).swapaxes(1, 2).reshape(b.shape)
        for suffix, factor in (("lora_a", a), ("lora_b", b)):
            fits = dtype != "q8_0" or factor.shape[1] % 32 == 0
            kind = kinds[dtype if fits else "f16"]
            data = gguf.quants.quantize(np.ascontiguousarray(factor), kind)
            writer.add_tensor(f"{name}.{suffix}", data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def distance(ours: Path, theirs: Path) -> float:
    """Largest relative difference of the numbers of the two files."""
    first, second = (ml.AdapterFile.read(path, names="gguf").adapter() for path in (ours, theirs))
    worst = 0.0
    for module in first.modules():
        for a, b in zip(first.factors(module), second.factors(module), strict=True):
            worst = max(worst, float(np.abs(a - b).max() / np.abs(b).max()))
    return worst
