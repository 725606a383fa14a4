"""A loop that serves, learns and consolidates is killed in mid-stream, and goes on where it was."""

import multiprocessing
import os
import signal
import tempfile

import numpy as np

import microlora as ml
from microlora.sona import JournalConfig, SonaConfig, SonaLoop

WIDTH, RANK = 64, 8
rng = np.random.default_rng(0)
inputs, world = rng.standard_normal((RANK, WIDTH)), rng.standard_normal((WIDTH, WIDTH)) / 8
config = SonaConfig(lora=ml.LoraConfig(rank=RANK, target_modules=["q_proj"]), hidden_dim=WIDTH)


def serve(loop: SonaLoop, seed: int, count: int) -> None:
    rng = np.random.default_rng(seed)
    for i in range(count):
        x = (rng.standard_normal(RANK) @ inputs).astype(np.float32)
        loop.forward(x)  # the answer that is served
        loop.instant_adapt(x, ml.Target((x @ world).astype(np.float32)), quality=0.9)  # what should have come
        if i % 250 == 249:
            loop.maybe_background(force=True)  # loop.start() does it every 100 ms by itself


def killed(folder: str) -> None:
    serve(SonaLoop.open(folder, config, journal=JournalConfig()), 1, 3_000)
    os.kill(os.getpid(), signal.SIGKILL)  # no goodbye: nothing is saved, synced or closed


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        child = multiprocessing.get_context("spawn").Process(target=killed, args=(folder,))
        child.start()
        child.join()
        with SonaLoop.open(folder, config, journal=JournalConfig()) as loop:  # a thread consolidates in here
            print(f"ended by signal {-child.exitcode}; {loop.opened.replayed} records replayed")
            serve(loop, 2, 500)
            print(loop.stats())
            loop.checkpoint()
