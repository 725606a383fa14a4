"""Adapters to merge, and how far a result is from the best possible one."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

import microlora as ml

Wide = NDArray[np.float64]
#: Name of the one module.
MODULE = "q_proj"


def adapters(width: int, rank: int, n: int, seed: int = 0) -> dict[str, ml.Adapter]:
    """`n` adapters of one square module, both factors random: no method finds a spectrum that helps it."""
    rng = np.random.default_rng([seed, width, rank, n])
    out = {}
    for i in range(n):
        a = rng.standard_normal((rank, width), dtype=np.float32) / np.float32(np.sqrt(width))
        b = rng.standard_normal((width, rank), dtype=np.float32)
        out[f"p{i}"] = ml.Adapter.from_factors({MODULE: (a, b)}, alpha=2.0 * rank)
    return out


def statistics(parents: dict[str, ml.Adapter], rows: int = 512) -> dict[str, Any]:
    """Importance and Gram of every parent, on inputs and gradients of its own."""
    rng, out = np.random.default_rng(1), {}
    for name, adapter in parents.items():
        n_in, n_out = adapter.dims[MODULE]
        lora = ml.MicroLoRA(ml.LoraConfig(rank=1, alpha=1.0, target_modules=(MODULE,)), dims=adapter.dims)
        ewc = ml.EwcPlusPlus(lora, kind="delta", fisher="empirical")
        x = rng.standard_normal((rows, n_in), dtype=np.float32) * rng.random(n_in, np.float32)
        ewc.accumulate_fisher(x, rng.standard_normal((rows, n_out), dtype=np.float32))
        ewc.grams[MODULE] = ml.collect_gram(lora, x)
        out[name] = ewc
    return out


def factors(adapter: ml.Adapter, module: str = MODULE) -> tuple[Wide, Wide]:
    """float64 (rank, in) and (out, rank), the scaling in the latter."""
    a, b = (v.astype(np.float64) for v in adapter.factors(module))
    return a, adapter.info(module).scaling * b


def weighted_sum(parents: dict[str, ml.Adapter], weight: float) -> tuple[Wide, Wide]:
    """Factors of the sum of all parents."""
    pairs = [factors(adapter) for adapter in parents.values()]
    return np.concatenate([a for a, _ in pairs]), np.concatenate([weight * b for _, b in pairs], axis=1)


def best(a: Wide, b: Wide, rank: int) -> tuple[Wide, Wide]:
    """Factors of the best approximation of a given rank (Eckart & Young 1936), in float64."""
    qa, ra = np.linalg.qr(a.T)
    qb, rb = np.linalg.qr(b)
    u, s, v = np.linalg.svd(rb @ ra.T)
    return v[:rank] @ qa.T, qb @ (u[:, :rank] * s[:rank])


def distance(mine: tuple[Wide, Wide], other: tuple[Wide, Wide]) -> float:
    """Frobenius norm of the difference of two products, relative to the second; no product is made."""

    def norm(a: Wide, b: Wide) -> float:
        return float(np.linalg.norm(np.linalg.qr(b)[1] @ np.linalg.qr(a.T)[1].T))

    apart = np.concatenate([mine[0], other[0]]), np.concatenate([mine[1], -other[1]], axis=1)
    return norm(*apart) / norm(*other)


def residual(target: NDArray[np.float32], a: NDArray[Any], b: NDArray[Any]) -> float:
    """Frobenius norm of a dense matrix (out, in) minus b a, relative to the matrix; in blocks of rows."""
    left = total = 0.0
    a32, b32 = np.asarray(a, np.float32), np.asarray(b, np.float32)
    for i in range(0, len(target), 256):
        rows = target[i : i + 256]
        left += float(np.square(rows - b32[i : i + 256] @ a32, dtype=np.float64).sum())
        total += float(np.square(rows, dtype=np.float64).sum())
    return float(np.sqrt(left / total))
