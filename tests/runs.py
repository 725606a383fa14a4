"""A small problem, configurations without EWC, and learners for the tests of the trainer."""

from itertools import pairwise

import numpy as np

import microlora as ml
from support import make, normal, rng

N = 16


class Sample:
    """A sample as the data room gives them, with feedback of its own."""

    def __init__(self, x, feedback, name, module=None, quality=1.0):
        self.input_embedding, self.feedback, self.id = x, feedback, name
        self.output_embedding, self.module, self.weight, self.quality = None, module, 1.0, quality


def problem(n=96, held=32, seed=0, rank=2, noise=0.05):
    """Training and validation arrays of a low-rank map with noise."""
    r = rng(seed)
    a, b = normal(r, N, rank) / 4, normal(r, rank, N)
    x = normal(r, n + held, N)
    y = x @ a @ b + noise * normal(r, n + held, N)
    return (x[:n], y[:n]), (x[n:], y[n:])


def permutation(n, seed, epoch):
    """The order of an epoch, as the documentation has it."""
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, epoch]))).permutation(n)


def config(training=None, **settings):
    base = {"ewc_lambda": 0.0, "learning_rate": 0.01, "batch_size": 8, "schedule": "cosine"}
    chosen = ml.TrainingConfig(**{**base, **(training or {})})
    return ml.AdapterTrainingConfig(training=chosen, **{"epochs": 3, "validation_interval": None, **settings})


def learner(seed=1, **settings):
    return make(N, N, 4, seed=seed, learned=False, **settings)


def chain(seed=0, layers=3, head="cross_entropy", **settings):
    r = rng(seed)
    sizes = [N] * layers + [4]
    pairs = [
        ((normal(r, o, i) / np.sqrt(i)).astype(np.float32), normal(r, o) / 10) for i, o in pairwise(sizes)
    ]
    return ml.LoraChain(pairs, rank=4, head=head, seed=seed, **settings)


def classes(n=128, held=32, seed=0):
    r = rng(seed)
    x = normal(r, n + held, N)
    y = (x @ normal(r, N, 4)).argmax(axis=1)
    return (x[:n], y[:n]), (x[n:], y[n:])


def comparable(result):
    """A result without its times."""
    import dataclasses

    def timeless(epoch):
        return dataclasses.replace(epoch, seconds=0.0)

    history = dataclasses.replace(result.history, epochs=tuple(map(timeless, result.history.epochs)))
    return dataclasses.replace(result, history=history)
