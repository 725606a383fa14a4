"""Narrow storage with a float32 master learns as float32 does; without the master it stalls."""

import numpy as np
import pytest

import microlora as ml
from microlora import _core

F = np.float32
STEPS, RATE = 1000, 1e-4


def task():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((256, 16)).astype(F)
    m = rng.standard_normal((16, 4)) @ rng.standard_normal((4, 16)) / 8
    return x, (x @ m).astype(F)


def fresh():
    return ml.MicroLoRA(ml.LoraConfig(rank=4, target_modules=["q_proj"]), hidden_dim=16, seed=1)


def order():
    return np.random.default_rng(1).integers(0, 256, STEPS * 8)


def rounded(a):
    """Nearest bfloat16, ties to even."""
    bits = np.ascontiguousarray(a, F).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) & np.uint32(0xFFFF0000)).view(F)


def train(lora):
    x, t = task()
    _core.Optimizer(lora, "adamw").train(lora, x, t, order(), [RATE] * STEPS, batch_size=8)
    return float(_core.evaluate(lora, x, t).mean())


@pytest.mark.parametrize("dtype", ["bf16", "f16"])
def test_with_a_master_it_tracks_float32(dtype):
    x, t = task()
    start = float(_core.evaluate(fresh(), x, t).mean())
    exact = train(fresh())
    lora = fresh()
    lora.set_storage(dtype)
    narrow = train(lora)
    assert exact < 0.8 * start
    assert narrow == pytest.approx(exact, rel=0.01)
    lora.set_storage("f32")
    assert float(_core.evaluate(lora, x, t).mean()) == pytest.approx(exact, rel=0.01)


def test_without_a_master_bf16_stalls():
    x, t = task()
    exact = train(fresh())
    start = float(_core.evaluate(fresh(), x, t).mean())
    lora, optimizer, rows = fresh(), None, order().reshape(STEPS, 8)
    optimizer = _core.Optimizer(lora, "adamw")
    for step in range(STEPS):
        optimizer.train(lora, x, t, rows[step], [RATE], batch_size=8)
        handle = lora["q_proj"]
        factors = {"q_proj": (rounded(handle.lora_a), rounded(handle.lora_b))}
        lora.restore(ml.Adapter.from_factors(factors, alpha=16.0))
    stalled = float(_core.evaluate(lora, x, t).mean())
    assert start - stalled < 0.8 * (start - exact)


def test_storage_does_not_change_what_is_learned_from_events():
    x, t = task()
    exact, narrow = fresh(), fresh()
    narrow.set_storage("bf16")
    for lora in (exact, narrow):
        for row, target in zip(x[:50], t[:50], strict=True):
            lora.instant(row, ml.Target(target))
    narrow.set_storage("f32")
    np.testing.assert_array_equal(narrow["q_proj"].lora_b, exact["q_proj"].lora_b)
