"""One adapter on embeddings: a click, a score and a preference each make it better at once."""

import tempfile
from pathlib import Path

import numpy as np

import microlora as ml

DIM = 384
rng = np.random.default_rng(0)
lora = ml.MicroLoRA(ml.LoraConfig(rank=8, target_modules=["q_proj"]), hidden_dim=DIM, seed=0)
items = rng.standard_normal((3, DIM), dtype=np.float32)
query, clicked, other = items / np.linalg.norm(items, axis=1, keepdims=True)  # embeddings of unit length


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    """Cosine of two vectors."""
    return float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))


def adapted() -> np.ndarray:
    """The query with its adapter's part; the frozen layer of an embedding is the identity."""
    return query + lora.forward(query)


# Nothing is learned yet, so the adapter adds exact zeros.
assert not lora.forward(query).any()
print(f"before              cos to the clicked item {cosine(adapted(), clicked):+.3f}")

# Weak feedback: one item was preferred to another, and an answer earned a score.
start = lora.snapshot()
lora.instant(query, ml.Feedback.preference(chosen=clicked, rejected=other), base=query)
lora.instant(query, ml.Feedback.success(0.9, response=clicked), base=query)
print(f"after two weak ones cos to the clicked item {cosine(adapted(), clicked):+.3f}")

# A snapshot takes back what they did, bit for bit.
lora.restore(start)
assert not lora.forward(query).any()

# The best feedback is the output that was wanted: learned in closed form, no learning rate.
step = lora.instant(query, ml.Target(clicked), base=query)
assert step.applied
print(f"after one click     cos to the clicked item {cosine(adapted(), clicked):+.3f}  ({step.rule})")

# One file holds the weights, the settings and the metadata.
with tempfile.TemporaryDirectory() as folder:
    path = Path(folder) / "user-42.safetensors"
    lora.save(path)
    again = ml.MicroLoRA.load(path)
    assert np.array_equal(again.forward(query), lora.forward(query))
    print(f"saved and loaded    {path.stat().st_size:,} bytes, the same outputs")
