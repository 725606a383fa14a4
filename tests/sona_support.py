"""What the tests of the loops share: streams, encoders and loops of small modules."""

import numpy as np

import microlora as ml
from microlora.sona import SonaConfig, SonaLoop
from support import normal, rng

WIDTH = 12


def config(**changes):
    settings = {
        "lora": ml.LoraConfig(rank=WIDTH, alpha=2.0 * WIDTH, target_modules=["q_proj"]),
        "hidden_dim": WIDTH,
        "warmup_inputs": 0,
        "background_interval_ms": 0.0,
    }
    return SonaConfig(**{**settings, **changes})


def loop(encoder=None, response_encoder=None, lora=None, on_event=None, lora_config=None, **changes):
    if lora_config is not None:
        changes["lora"] = lora_config
    return SonaLoop(config(**changes), encoder, response_encoder, lora, on_event)


def stream(n, seed=0, width=WIDTH, rank=2, noise=0.0):
    """Inputs and targets of a linear map of a rank that the adapter can hold."""
    r = rng(seed)
    w = normal(rng(99), width, rank) @ normal(rng(98), rank, width) / width
    x = normal(r, n, width)
    return x, x @ w + noise * normal(r, n, width)


def feed(sona, n, seed=0, quality=None, **options):
    x, t = stream(n, seed, **options)
    for row, target in zip(x, t, strict=True):
        sona.instant_adapt(row, ml.Target(target), quality)
    return x, t


class Words:
    """An encoder that gives each text a direction of its own."""

    name = "words"

    def __init__(self, dim=WIDTH):
        self.dim, self.asked = dim, []

    def encode(self, texts):
        self.asked += texts
        rows = [
            np.random.default_rng(sum(text.encode()) + len(text)).standard_normal(self.dim) for text in texts
        ]
        return np.array(rows, np.float32)
