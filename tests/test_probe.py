"""Probes of the machine that the benches use: they run and give plausible numbers."""

import numpy as np
import pytest

import microlora as ml
from microlora import _core


def test_isa_is_one_that_the_machine_has():
    available = _core.available_isas()
    assert available[0] == "scalar"
    assert set(available) <= {"scalar", "avx2", "avx512"}
    assert _core.isa() in available


def test_unknown_isa_is_refused(monkeypatch):
    monkeypatch.setenv("MICROLORA_ISA", "sse9")
    with pytest.raises(ml.exceptions.ConfigError, match="sse9"):
        ml.MicroLoRA(ml.LoraConfig(rank=2, target_modules=["q_proj"]), hidden_dim=8)


def test_probes_measure_something():
    assert _core.probe_read_gbps(1 << 14, 0.002) > 0.0
    assert _core.probe_fma_gflops(0.002) > 0.0
    lora = ml.MicroLoRA(ml.LoraConfig(rank=4, target_modules=["q_proj"]), hidden_dim=64)
    lora.instant(np.ones(64, np.float32), ml.Target(np.ones(64, np.float32)))
    before = lora.adapter()
    assert _core.probe_forward_ns(lora["q_proj"], 0.002) > 0.0
    assert lora.adapter() == before
