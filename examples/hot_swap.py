"""Requests are answered while a learner publishes, a bad adapter is swapped in, and taken back."""

import threading

import numpy as np

import microlora as ml

DIM, ROWS = 128, 256
rng = np.random.default_rng(3)
config = ml.LoraConfig(rank=8, target_modules=["q_proj", "v_proj"])
manager = ml.HotSwapManager(ml.MicroLoRA(config, hidden_dim=DIM))
x = rng.standard_normal((ROWS, DIM)).astype(np.float32)
answers: dict[int, set[bytes]] = {}
done = threading.Event()


def serve() -> None:
    """Reads two modules of one generation, again and again."""
    while not done.is_set():
        with manager.pin() as pinned:
            both = pinned.forward(x, "q_proj").tobytes() + pinned.forward(x, "v_proj").tobytes()
            answers.setdefault(pinned.number, set()).add(both)


def learn(events: int) -> int:
    """Learns in private and publishes, from the start again where somebody was faster."""
    while True:
        with manager.pin() as start:
            lora = ml.MicroLoRA(start.adapter)
        for _ in range(events):
            for module in lora:
                lora.instant(x[rng.integers(ROWS)], ml.Target(np.ones(DIM, np.float32)), module)
        try:
            return manager.compare_and_swap(start.number, lora)
        except ml.exceptions.SwapError as lost:
            print(f"generation {lost.generation} came first; learning again")


readers = [threading.Thread(target=serve) for _ in range(4)]
for reader in readers:
    reader.start()
manager.subscribe(lambda old, new: print(f"generation {old} -> {new}"))
for _ in range(5):
    learn(20)
good = manager.active
bad = ml.MicroLoRA(config.replace(rank=4, alpha=1000.0), hidden_dim=DIM, seed=9)
manager.prepare_standby(bad).result()
manager.swap()
manager.rollback()
done.set()
for reader in readers:
    reader.join()

assert manager.active == good
assert all(len(seen) == 1 for seen in answers.values()), "a generation gave two answers"
print(f"{len(answers)} generations were seen by readers, each with one answer")
