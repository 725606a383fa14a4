"""Blocks that are easy and blocks that are hard, for every test of the codecs."""

import numpy as np

KINDS = (
    "gaussian", "adapter", "uniform", "positive", "negative", "tiny", "large", "subnormal", "half_subnormal",
    "zero", "negative_zero", "equal", "outlier", "ties", "alternating", "few", "ramp", "heavy", "mixed",
    "near_top",
)  # fmt: skip


def blocks(kind, n, width, seed=0):
    """(n, width) float32 of one kind; every number finite, every scale one that f16 holds."""
    r = np.random.default_rng([seed, KINDS.index(kind)])
    g = r.standard_normal((n, width))
    match kind:
        case "gaussian":
            x = g
        case "adapter":
            x = g * 10.0 ** r.uniform(-4, 0, (n, 1))
        case "uniform":
            x = r.uniform(-1, 1, (n, width))
        case "positive":
            x = np.abs(g) + 0.5
        case "negative":
            x = -np.abs(g) - 0.5
        case "tiny":
            x = g * 10.0 ** r.uniform(-20, -5, (n, 1))
        case "large":
            x = r.uniform(-1, 1, (n, width)) * 10.0 ** r.uniform(2, 4.7, (n, 1))
        case "subnormal":
            x = g * 10.0 ** r.uniform(-45, -37, (n, 1))
        case "half_subnormal":
            x = g * 10.0 ** r.uniform(-8, -4, (n, 1))
        case "zero":
            x = np.zeros((n, width))
        case "negative_zero":
            x = np.where(r.random((n, width)) < 0.5, 0.0, -0.0)
        case "equal":
            x = np.ones((n, width)) * r.standard_normal((n, 1))
        case "outlier":
            x = g * 1e-3
            x[np.arange(n), r.integers(0, width, n)] = r.choice([-50.0, 7.0, 300.0], n)
        case "ties":
            x = r.integers(-254, 255, (n, width)) * 0.5
            x[:, 0] = r.choice([-127.0, 127.0, -8.0, 15.0], n)
        case "alternating":
            x = np.abs(g) * np.where(np.arange(width) % 2, -1.0, 1.0)
        case "few":
            x = r.choice([-1.0, 0.0, 0.25, 1.0], (n, width))
        case "ramp":
            x = np.linspace(-1, 1, width) * r.standard_normal((n, 1)) + r.standard_normal((n, 1))
        case "heavy":
            x = np.clip(g / np.abs(r.standard_normal((n, width))), -1e4, 1e4)
        case "mixed":
            x = g * 10.0 ** r.uniform(-6, 3, (n, width))
        case _:
            x = np.sign(g) * np.where(r.random((n, width)) < 0.9, 1.0, 0.999) * 60_000.0
    return x.astype(np.float32)


def every_kind(n, width, seed=0):
    return np.concatenate([blocks(kind, n, width, seed) for kind in KINDS])


def stored(bytes_per_block, halves, n, seed=0):
    """(n, bytes) of any codes at all, with finite f16 fields at the offsets ``halves``."""
    r = np.random.default_rng(seed)
    data = r.integers(0, 256, (n, bytes_per_block), dtype=np.uint8)
    for at in halves:
        field = data[:, at + 1]
        data[:, at + 1] = np.where(field & 0x7C == 0x7C, field & 0x83, field)
    return data
