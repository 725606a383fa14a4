"""Everything that reference and native share for one seed, from one file.

Splits, the frozen network's weights, the first factors, the order of every batch and what replay remembers
and draws. Both read the same `.npz`; each line of the results carries its digest.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import domains, network
from .domains import Floats, Labels

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Setup:
    """Settings of the experiment; a plan belongs to one of them.

    Attributes:
        data: `rot` or `perm`.
        tasks: Length of the stream.
        epochs: Passes over each task.
        batch: Rows of a batch of new samples; replay adds as many old ones.
        lr: Adam's rate.
        rank: Rank of every layer's adapter; its scaling is 2.
        hidden: Widths between pixels and classes.
        train_share: Share of the samples that is trained on.
        base_epochs: Passes of the frozen network over the base domain.
        memories: Sizes of the replay memories.
    """

    data: str
    tasks: int = 5
    epochs: int = 5
    batch: int = 32
    lr: float = 2e-3
    rank: int = 8
    hidden: tuple[int, ...] = (256, 256)
    train_share: float = 0.8
    base_epochs: int = 0
    memories: tuple[int, ...] = (50, 200)

    @classmethod
    def of(cls, data: str) -> Setup:
        """The settings of the published rows."""
        return cls(data, base_epochs={"rot": 15, "perm": 40}[data])

    @property
    def widths(self) -> tuple[int, ...]:
        """Widths of all layers."""
        return (domains.SIZES[self.data][1], *self.hidden, domains.CLASSES)

    def digest(self) -> str:
        """Short name of these settings."""
        text = json.dumps([PLAN_VERSION, dataclasses.asdict(self)], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]


#: To be raised when a plan of the same settings would differ.
PLAN_VERSION = 1
SCALING = 2.0


@dataclass(frozen=True)
class Task:
    """One domain: rows to train on, rows to test on."""

    x: Floats
    y: Labels
    x_test: Floats
    y_test: Labels


@dataclass(frozen=True)
class Feed:
    """What one stretch of training reads: rows, the order of each epoch, rows of a batch."""

    x: Floats
    y: Labels
    orders: list[Ints]
    batch: int


class Plan:
    """One seed of one benchmark; see the module.

    Attributes:
        setup: Its settings.
        seed: Its seed.
        digest: First digits of the SHA-256 of its arrays.
    """

    def __init__(self, setup: Setup, seed: int, arrays: dict[str, NDArray[Any]], cache: Path) -> None:
        self.setup, self.seed, self._arrays, self._cache = setup, seed, arrays, cache
        sha = hashlib.sha256()
        for name in sorted(arrays):
            sha.update(name.encode() + np.ascontiguousarray(arrays[name]).tobytes())
        self.digest = sha.hexdigest()[:12]
        self._tasks: list[Task] | None = None

    @classmethod
    def load(cls, setup: Setup, seed: int, cache: Path | None = None) -> Plan:
        """The plan of the cache, made where it is missing."""
        cache = cache or domains.cache_dir()
        path = cache / f"plan-{setup.data}-{setup.digest()}-{seed}.npz"
        if not path.exists():
            arrays = _make(setup, seed, cache)
            domains.write(path, lambda file: np.savez(file, allow_pickle=False, **arrays))
        with np.load(path) as held:
            return cls(setup, seed, {name: held[name] for name in held.files}, cache)

    @property
    def weights(self) -> list[Floats]:
        """Frozen weights, each (in, out)."""
        return [self._arrays[f"w{i}"] for i in range(len(self.setup.widths) - 1)]

    @property
    def biases(self) -> list[Floats]:
        """Frozen biases."""
        return [self._arrays[f"b{i}"] for i in range(len(self.setup.widths) - 1)]

    @property
    def factors(self) -> list[Floats]:
        """First A of every layer, (in, r); every B starts at 0."""
        return [self._arrays[f"a{i}"] for i in range(len(self.setup.widths) - 1)]

    def tasks(self) -> list[Task]:
        """The stream, without the base domain."""
        if self._tasks is None:
            self._tasks = _tasks(self.setup, self._arrays, self._cache)[1:]
        return self._tasks

    def feed(self, task: int, memory: int = 0) -> Feed:
        """Rows and batches of one task; with `memory` every batch has as many remembered rows."""
        now, n = self.tasks()[task], len(self.tasks()[task].x)
        orders = list(self._arrays["order"][task].astype(np.int64))
        if not memory or not task:
            return Feed(now.x, now.y, orders, self.setup.batch)
        slots = self.slots(task - 1, memory)
        old = self.tasks()
        x = np.concatenate([now.x, np.stack([old[s // n].x[s % n] for s in slots])])
        y = np.concatenate([now.y, np.array([old[s // n].y[s % n] for s in slots])])
        draws = self._arrays[f"draws{memory}"][task].astype(np.int64) + n
        orders = [_interleave(o, d, self.setup.batch) for o, d in zip(orders, draws, strict=True)]
        return Feed(x, y, orders, 2 * self.setup.batch)

    def slots(self, task: int, memory: int) -> Ints:
        """Row of the stream in each slot of a memory after a task: ``task * n + i`` is row i of a task."""
        out: Ints = self._arrays[f"slots{memory}"][task].astype(np.int64)
        return out

    def joint(self) -> Feed:
        """All tasks at once."""
        x = np.concatenate([t.x for t in self.tasks()])
        y = np.concatenate([t.y for t in self.tasks()])
        return Feed(x, y, list(self._arrays["joint"].astype(np.int64)), self.setup.batch)


def _interleave(new: Ints, old: Ints, batch: int) -> Ints:
    """Batches of new rows, each followed by as many old ones."""
    parts = [part for k in range(0, len(new), batch) for part in (new[k : k + batch], old[k : k + batch])]
    return np.concatenate(parts)


def _tasks(setup: Setup, arrays: dict[str, NDArray[Any]], cache: Path) -> list[Task]:
    y = domains.labels(setup.data)
    train, test = arrays["train"], arrays["test"]
    every = domains.images(setup.data, arrays["permutations"], cache)
    return [Task(x[train], y[train], x[test], y[test]) for x in every]


def _make(setup: Setup, seed: int, cache: Path) -> dict[str, NDArray[Any]]:
    """Draws a plan; every part has a generator of its own."""
    rng = [np.random.default_rng([seed, part]) for part in range(6)]
    samples, pixels = domains.SIZES[setup.data]
    n = int(setup.train_share * samples)
    shuffled = rng[0].permutation(samples)
    turns = [np.arange(pixels), *(rng[1].permutation(pixels) for _ in range(setup.tasks))]
    out: dict[str, NDArray[Any]] = {
        "train": shuffled[:n],
        "test": shuffled[n:],
        "permutations": np.stack(turns),
    }
    base = _tasks(setup, out, cache)[0]
    weights, biases = network.pretrain(setup.widths, base.x, base.y, setup.base_epochs, rng[2])
    for i, (w, b) in enumerate(zip(weights, biases, strict=True)):
        bound = 1 / np.sqrt(len(w))
        out[f"w{i}"], out[f"b{i}"] = w, b
        out[f"a{i}"] = rng[3].uniform(-bound, bound, (len(w), setup.rank)).astype(np.float32)
    passes = range(setup.epochs)
    order = [[rng[4].permutation(n) for _ in passes] for _ in range(setup.tasks)]
    out["order"] = np.array(order, np.int32)
    out["joint"] = np.array([rng[4].permutation(n * setup.tasks) for _ in passes], np.int32)
    for memory in setup.memories:
        out[f"slots{memory}"] = _reservoir(n, setup.tasks, memory, rng[5])
        draws = rng[5].integers(0, memory, (setup.tasks, setup.epochs, n))
        out[f"draws{memory}"] = draws.astype(np.int32)
    return out


def _reservoir(n: int, tasks: int, memory: int, rng: np.random.Generator) -> NDArray[np.int32]:
    """Row `task * n + i` in each slot after each task: algorithm R (Vitter 1985) over rows as they come."""
    slots, after = np.arange(memory), []
    for task in range(tasks):
        for row in range(max(task * n, memory), (task + 1) * n):
            at = rng.integers(0, row + 1)
            if at < memory:
                slots[at] = row
        after.append(slots.copy())
    return np.array(after, np.int32)
