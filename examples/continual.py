"""Two tasks, one adapter: with and without holding on to the first."""

import numpy as np
from numpy.typing import NDArray

import microlora as ml

rng = np.random.default_rng(0)
layers = [(rng.standard_normal((o, i)) / np.sqrt(i)).astype(np.float32) for i, o in ((20, 64), (64, 4))]
centres = rng.standard_normal((4, 20))


Data = tuple[NDArray[np.float32], NDArray[np.int64]]


def task(turn: NDArray[np.float64]) -> Data:
    """Four classes; the second task sees them from elsewhere."""
    label = rng.integers(0, 4, 800)
    x = centres[label] @ turn + 0.7 * rng.standard_normal((800, 20))
    return x.astype(np.float32), label


def accuracy(chain: ml.LoraChain, data: Data) -> float:
    """Share of right answers."""
    return float((chain.predict(data[0]) == data[1]).mean())


turn, _ = np.linalg.qr(rng.standard_normal((20, 20)))
first, second = task(np.eye(20)), task(turn)

for name, strength in (("none", 0.0), ("delta EWC", None)):
    chain = ml.LoraChain(layers, rank=4)
    training = ml.TrainingConfig(batch_size=16, learning_rate=5e-3, ewc_lambda=strength)
    trainer = ml.AdapterTrainer(ml.AdapterTrainingConfig(training=training, epochs=5))
    trainer.train(chain, first)
    fresh = accuracy(chain, first)
    trainer.train(chain, second)
    after = accuracy(chain, first)
    print(f"{name:10s} task 1: {fresh:.2f} -> {after:.2f}, task 2: {accuracy(chain, second):.2f}")
