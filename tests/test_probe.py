"""Probes of the machine that the benches use: they run and give plausible numbers."""

import os
import subprocess
import sys

import numpy as np
import pytest

import microlora as ml
from microlora import _core


def test_isa_is_one_that_the_machine_has():
    available = _core.available_isas()
    assert available[0] == "scalar"
    assert set(available) <= {"scalar", "avx2", "avx512"}
    assert _core.isa() in available


def in_new_process(isa, code):
    """The choice is made once per process."""
    return subprocess.run(
        [sys.executable, "-c", "import microlora as ml\n" + code],
        env=os.environ | {"MICROLORA_ISA": isa},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("isa", _core.available_isas())
def test_environment_forces_an_isa(isa):
    done = in_new_process(isa, "print(ml._core.isa())")
    assert done.stdout.strip() == isa, done.stderr


def test_unknown_isa_is_refused():
    done = in_new_process("sse9", "ml.MicroLoRA(ml.LoraConfig(rank=2), hidden_dim=8)")
    assert done.returncode != 0
    assert "ConfigError: MICROLORA_ISA" in done.stderr
    assert "sse9" in done.stderr


def test_probes_measure_something():
    assert _core.probe_read_gbps(1 << 14, 0.002) > 0.0
    assert _core.probe_fma_gflops(0.002) > 0.0
    lora = ml.MicroLoRA(ml.LoraConfig(rank=4, target_modules=["q_proj"]), hidden_dim=64)
    lora.instant(np.ones(64, np.float32), ml.Target(np.ones(64, np.float32)))
    before = lora.adapter()
    assert _core.probe_forward_ns(lora["q_proj"], 0.002) > 0.0
    for swapping in (True, False):
        found = _core.probe_swap(before, 2, swapping, 0.02)
        assert found["read_p99"] >= found["read"] > 0.0
        assert (found["swap"] > 0.0, found["swaps_per_second"] > 0.0) == (swapping, swapping)
    assert lora.adapter() == before
