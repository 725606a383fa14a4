"""pytest-benchmark of the hot paths, to compare changes of one's own (`make bench` prints the table of peers)."""

import numpy as np
import pytest

import microlora as ml
from peers import learned, numbers

pytest.importorskip("pytest_benchmark")


@pytest.fixture(params=[(768, 2), (768, 16), (4096, 16)], ids=lambda p: f"{p[0]}-r{p[1]}")
def shape(request):
    return request.param


@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16"])
def test_forward_into_a_buffer(benchmark, shape, dtype):
    hidden, rank = shape
    handle = learned(hidden, rank, dtype)["q_proj"]
    benchmark(handle.forward, numbers(hidden), np.empty(hidden, np.float32))


@pytest.mark.parametrize("rows", [4, 32, 256])
def test_forward_of_rows(benchmark, rows):
    handle = learned(768, 16)["q_proj"]
    benchmark(handle.forward, numbers(rows, 768), np.empty((rows, 768), np.float32))


def test_instant(benchmark, shape):
    hidden, rank = shape
    lora = learned(hidden, rank)
    benchmark(lora.instant, numbers(hidden) / hidden**0.5, ml.Target(numbers(hidden)))


def test_adapt_and_apply(benchmark, shape):
    hidden, rank = shape
    lora, x, target = learned(hidden, rank), numbers(hidden) / hidden**0.5, ml.Target(numbers(hidden))

    def step():
        lora.adapt(x, target)
        lora.apply_updates(1e-6)

    benchmark(step)


def test_snapshot_and_restore(benchmark):
    lora = learned(768, 16)
    benchmark(lambda: lora.restore(lora.snapshot()))


def test_delta_weight(benchmark):
    benchmark(learned(768, 16)["q_proj"].delta_weight)
