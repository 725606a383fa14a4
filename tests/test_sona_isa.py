"""A journal of one instruction set, replayed on another: nearly the same weights, and it says so."""

import os
import subprocess
import sys

import numpy as np
import pytest

import microlora._core as _core

SCRIPT = """
import sys
import numpy as np
import microlora as ml
from microlora.sona import JournalConfig, SonaConfig, SonaLoop

folder, out, count = sys.argv[1], sys.argv[2], int(sys.argv[3])
lora = ml.LoraConfig(rank=4, target_modules=["q_proj"])
config = SonaConfig(lora=lora, hidden_dim=24, warmup_inputs=16, background_interval_ms=0.0)
loop = SonaLoop.open(folder, config, journal=JournalConfig())
rng = np.random.default_rng(5)
inputs, world = rng.standard_normal((4, 24)), rng.standard_normal((24, 24)) / 5
for i in range(count):
    x = (rng.standard_normal(4) @ inputs).astype(np.float32)
    loop.instant_adapt(x, ml.Target((x @ world).astype(np.float32)), quality=0.9)
    if i % 20 == 19:
        loop.maybe_background(force=True)
np.save(out, ml.MicroLoRA(loop.adapter()).delta_weight("q_proj"))
print(loop.opened.exact, loop.opened.replayed, *loop.opened.warnings, sep="|")
"""


def run(isa, folder, out, count):
    env = {**os.environ, "MICROLORA_ISA": isa}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(folder), str(out), str(count)],
        env=env,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip().split("|"), np.load(out)


@pytest.mark.parametrize("first", [isa for isa in _core.available_isas() if isa != "scalar"])
def test_another_instruction_set_is_told_and_near(tmp_path, first):
    said, written = run(first, tmp_path / "d", tmp_path / "a.npy", 150)
    assert said[0] == "True"
    said, same = run(first, tmp_path / "d", tmp_path / "b.npy", 0)
    assert said[0] == "True"
    assert int(said[1]) > 150
    assert (same == written).all()
    said, other = run("scalar", tmp_path / "d", tmp_path / "c.npy", 0)
    assert said[0] == "False"
    assert first in said[2]
    assert "scalar" in said[2]
    assert np.abs(other - written).max() <= 1e-5 * np.abs(written).max()
