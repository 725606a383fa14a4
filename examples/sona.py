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
world = rng.standard_normal((RANK, WIDTH)), rng.standard_normal((WIDTH, WIDTH)) / 8
config = SonaConfig(lora=ml.LoraConfig(rank=RANK, target_modules=["q_proj"]), hidden_dim=WIDTH)


def events(rng: np.random.Generator):
    while True:
        x = rng.standard_normal(RANK) @ world[0]
        yield x.astype(np.float32), ml.Target((x @ world[1]).astype(np.float32))


def serve(loop: SonaLoop, seed: int, count: int) -> None:
    for i, (x, wanted) in zip(range(count), events(np.random.default_rng(seed)), strict=False):
        loop.forward(x)  # the answer that is served
        loop.instant_adapt(x, wanted, quality=0.9)  # what the user said of it: a few microseconds
        if i % 250 == 249:
            loop.maybe_background(force=True)  # consolidate now; loop.start() does it every 100 ms by itself


def killed(folder: str) -> None:
    loop = SonaLoop.open(folder, config, journal=JournalConfig())
    serve(loop, 1, 3_000)
    os.kill(os.getpid(), signal.SIGKILL)  # no goodbye: nothing is saved, synced or closed


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        child = multiprocessing.get_context("spawn").Process(target=killed, args=(folder,))
        child.start()
        child.join()
        with SonaLoop.open(folder, config, journal=JournalConfig()) as loop:  # in a thread it consolidates, too
            print(f"ended by {signal.Signals(-child.exitcode).name}; {loop.opened.replayed} records replayed")
            serve(loop, 2, 500)
            stats = loop.stats()
            print(f"{stats.instant_count} events, {stats.accepted} consolidations accepted, {stats.refused} refused")
            print(f"loss of events before they teach: {stats.prequential_loss_first:.2f} -> {stats.prequential_loss:.1e}")
            loop.checkpoint()
