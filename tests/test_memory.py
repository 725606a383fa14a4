"""Bytes as documented: counted exactly, and found again in the memory of a process."""

import pytest

import microlora as ml
from support import DTYPES, make, normal, rng, run_python

SIZE = {"f32": 4, "f16": 2, "bf16": 2}


def line(n):
    return -(-n // 64) * 64


def documented(n_in, n_out, rank, dtype):
    """Rows of 16 columns, factors of whole cache lines; an f32 master beside narrow storage."""

    def factor(width, size):
        return line(rank * -(-width // 16) * 16 * size)

    stored = factor(n_in, SIZE[dtype]) + factor(n_out, SIZE[dtype])
    return stored, stored + (0 if dtype == "f32" else factor(n_in, 4) + factor(n_out, 4))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("n_in", "n_out", "rank"), [(768, 768, 16), (768, 3072, 8), (17, 1, 1), (100, 33, 5), (16, 16, 16)]
)
def test_counts_are_exact(n_in, n_out, rank, dtype):
    lora = make(n_in, n_out, rank, dtype=dtype, learned=False, names=("a", "b", "c"))
    stored, live = documented(n_in, n_out, rank, dtype)
    assert lora.param_count == 3 * rank * (n_in + n_out)
    assert lora.adapter().param_count == lora.param_count
    assert lora.adapter().memory_bytes == 3 * stored
    assert lora.memory_bytes == 3 * live
    dims = dict.fromkeys("abc", (n_in, n_out))
    assert lora.config.param_count(dims=dims) == lora.param_count
    assert lora.config.memory_bytes(dims=dims) == lora.param_count * SIZE[dtype]
    if n_in % 32 == 0 and n_out % 32 == 0:
        assert lora.adapter().memory_bytes == lora.config.memory_bytes(dims=dims)


def test_presets_have_their_documented_sizes():
    coder = ml.create_lora("coder", 768)
    assert coder.param_count == 98_304
    assert coder.memory_bytes == 98_304 * 4
    assert coder.adapter().memory_bytes == 98_304 * 4


def test_learning_state_is_counted_while_it_is_there():
    lora, r = make(32, 48, 8), rng()
    stored = lora.memory_bytes
    assert stored == 8 * (32 + 48) * 4
    lora.instant(normal(r, 32), ml.Target(normal(r, 48)), "m")
    state = 8 * 8 * 8  # P in float64; the rules' buffers belong to the thread
    assert lora.memory_bytes == stored + state
    lora.adapt(normal(r, 32), ml.Target(normal(r, 48)), "m")
    assert lora.memory_bytes == 2 * stored + state
    assert lora.adapter().memory_bytes == stored
    lora.restore(lora.adapter())
    assert lora.memory_bytes == stored


@pytest.mark.parametrize(("dtype", "learn"), [("f32", False), ("f32", True), ("f16", True), ("bf16", False)])
def test_a_thousand_adapters_take_the_documented_bytes(dtype, learn):
    """Every page is written once, so that the system has really given it."""
    out = run_python(
        """
import sys, gc, os
import numpy as np, microlora as ml
from support import make, normal, rng
dtype, learn = sys.argv[1], sys.argv[2] == "True"
def resident():
    with open("/proc/self/statm") as f:
        return int(f.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
r = rng()
t, b = ml.Target(normal(r, 768)), normal(r, 768)
cfg = ml.LoraConfig(rank=8, target_modules=["m"], dtype=dtype)
def new(i):
    lora = ml.MicroLoRA(cfg, hidden_dim=768, seed=i)
    if learn:
        lora.instant(b, t, "m")
    else:
        lora.restore(lora.snapshot())
        lora.forward(b)
    return lora
warm = [new(i) for i in range(50)]
gc.collect()
before = resident()
kept = [new(i) for i in range(1000)]
gc.collect()
print(resident() - before, sum(k.memory_bytes for k in kept))
""",
        dtype,
        learn,
        env={"MALLOC_ARENA_MAX": "1"},
    )
    grown, told = map(int, out.split())
    assert grown == pytest.approx(told, rel=0.05)


@pytest.mark.parametrize("kind", ["q8_0", "q4_k", "bf16"])
def test_a_thousand_quantised_adapters_take_the_bytes_that_they_tell(kind):
    """Each has run, so that numbers which a forward decoded and kept would be seen too."""
    out = run_python(
        """
import sys, gc, os
import numpy as np, microlora as ml
from support import normal, rng
kind = sys.argv[1]
def resident():
    with open("/proc/self/statm") as f:
        return int(f.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
r = rng()
x = normal(r, 2048)
plain = ml.Adapter.from_factors({"m": (normal(r, 16, 2048), normal(r, 2048, 16))}, alpha=32.0)
def new():
    made = ml.QuantizedAdapter.from_adapter(plain, {"m": (kind, kind)})
    made.forward(x)
    return made
warm = [new() for _ in range(50)]
gc.collect()
before = resident()
kept = [new() for _ in range(1000)]
gc.collect()
print(resident() - before, sum(k.memory_bytes for k in kept))
""",
        kind,
        env={"MALLOC_ARENA_MAX": "1"},
    )
    grown, told = map(int, out.split())
    assert grown == pytest.approx(told, rel=0.05)
