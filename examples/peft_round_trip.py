"""Save as a directory that Hugging Face PEFT loads, load it again, and fuse it into a weight."""

import json
import tempfile
from pathlib import Path

import numpy as np

import microlora as ml

rng = np.random.default_rng(3)
dims = {"q_proj": (64, 96), "v_proj": (64, 32)}
config = ml.LoraConfig(rank=4, alpha=8.0, target_modules=["q_proj", "v_proj"])
lora = ml.MicroLoRA(config, dims=dims, seed=0)

# Learn something on both modules.
for _ in range(20):
    x = rng.standard_normal(64, dtype=np.float32)
    for module, (_, width) in dims.items():
        lora.instant(x, ml.Target(rng.standard_normal(width, dtype=np.float32)), module)

# Short names become the paths of the modules in a model.
paths = {name: f"model.layers.0.self_attn.{name}" for name in dims}

with tempfile.TemporaryDirectory() as folder:
    path = Path(folder) / "adapter"
    ml.save(lora, path, "peft", layer_paths=paths)
    written = json.loads((path / "adapter_config.json").read_text())
    print("files:", *sorted(p.name for p in path.iterdir()))
    print("peft:", {k: written[k] for k in ("peft_type", "r", "lora_alpha")})
    adapter = ml.load(path)

assert sorted(adapter.modules()) == sorted(paths.values())
a, b = adapter.factors(paths["q_proj"])
assert np.array_equal(a, lora["q_proj"].lora_a)
assert np.array_equal(b, lora["q_proj"].lora_b)

# Fuse into the frozen weight, (out_features, in_features) as torch keeps it: no cost at inference.
weight = rng.standard_normal((96, 64), dtype=np.float32)
served = ml.MicroLoRA(adapter)
x = rng.standard_normal(64, dtype=np.float32)
beside = x @ weight.T + served.forward(x, paths["q_proj"])
fused = weight.copy()
served.fuse_into(fused, paths["q_proj"])
worst = float(np.abs(x @ fused.T - beside).max())
print(f"fused and beside differ by {worst:.1e}")
assert worst < 1e-4

served.unfuse_from(fused, paths["q_proj"])
assert np.abs(fused - weight).max() <= 1e-6 * max(np.abs(weight).max(), np.abs(fused).max())
