"""Samples of five made-up tasks whose best possible adapter is known: `SyntheticDataGenerator`.

A task is one row of `TASKS`. Its inputs are ``x = sqrt(d / k) z U`` with k orthonormal rows U in d features:
they lie in a k-dimensional part of the space that is the task's own, and ``E|x|^2 = d``, as after a layer
norm. The code z has k entries; each is zero except in a share ``density`` of the draws, and else normal,
with variances that fall like ``(j + 1)^(-2 decay)`` and a mean of 1.

The wanted output is ``t = M x + e``. M has rank r; it reads r directions of the code and writes r orthonormal
directions, all its singular values are equal, and ``E|M x|^2 = GAIN^2 d``. The noise e is normal with
standard deviation `SIGMA` in every feature. In the unit ``1/2 |y - t|^2`` a sample costs ``1/2 SIGMA^2 d`` at
best and ``1/2 (GAIN^2 + SIGMA^2) d`` without an adapter.

Numbers are computed in float64 and rounded once, in blocks of fixed size from a generator of each block's
own: more samples extend fewer, bit for bit.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from microlora._checks import choice, integer
from microlora.data.arrays import Floats, frozen
from microlora.data.columns import SCALARS, Columns, MemoryTexts
from microlora.data.dataset import AdapterDataset
from microlora.data.optimum import Optimum

__all__ = ["GAIN", "SIGMA", "TASKS", "SyntheticDataGenerator", "TaskSpec"]

GAIN = 0.25
SIGMA = 0.05
HELD_OUT = 5
"""One sample in so many is held out."""

_BLOCK = 256
_MAX_DIM = 65_536
_MAX_COUNT = 2**31 - 1
Doubles = npt.NDArray[np.float64]


@dataclass(frozen=True)
class TaskSpec:
    """What a task is drawn from.

    Attributes:
        name: That of the preset it is for.
        rank: Rank r of the true map; at most half the preset's, so that its adapter reaches it with ease.
        latent: Dimension k of the part of the space its inputs lie in.
        density: Share of the entries of the code that are not zero.
        decay: How fast the variances of the code fall.
    """

    name: str
    rank: int
    latent: int
    density: float
    decay: float


TASKS: dict[str, TaskSpec] = {
    spec.name: spec
    for spec in (
        TaskSpec("coder", rank=8, latent=32, density=0.5, decay=0.0),
        TaskSpec("researcher", rank=4, latent=24, density=1.0, decay=0.25),
        TaskSpec("security", rank=8, latent=32, density=0.25, decay=0.0),
        TaskSpec("architect", rank=6, latent=24, density=1.0, decay=0.0),
        TaskSpec("reviewer", rank=4, latent=16, density=0.5, decay=0.25),
    )
}
"""The five tasks by name, in the order of the presets."""


class SyntheticDataGenerator:
    """Makes learnable samples for the five preset tasks; see this module for how.

    The same dimension, seed and task give the same samples in every process; more of them extend fewer.

    Args:
        hidden_dim: Features d of inputs and of outputs, 2 to 65,536.
        seed: 0 to 2^63 - 1; another seed is another set of tasks.

    Raises:
        ConfigError: a value out of its range.

    Example:
        >>> data = SyntheticDataGenerator(64, seed=42).generate("coder", 1000)
        >>> len(data.examples), len(data.validation), data.optimum.rank, round(data.optimum.best_loss, 3)
        (800, 200, 8, 0.08)
    """

    def __init__(self, hidden_dim: int = 768, seed: int = 42) -> None:
        self.hidden_dim = integer("hidden_dim", hidden_dim, 2, _MAX_DIM)
        self.seed = integer("seed", seed, 0, 2**63 - 1)

    def __repr__(self) -> str:
        return f"SyntheticDataGenerator({self.hidden_dim}, seed={self.seed})"

    def generate(self, task: str, n: int) -> AdapterDataset:
        """Samples of one task: every fifth is held out, so 80 in 100 are to train on.

        Args:
            task: ``"coder"``, ``"researcher"``, ``"security"``, ``"architect"`` or ``"reviewer"``.
            n: Samples in all, 5 or more.

        Returns:
            A dataset with targets, its ``validation`` and its ``optimum``.

        Raises:
            ConfigError: an unknown task, or too few samples.
        """
        spec = TASKS[choice("task", task, tuple(TASKS))]
        n = integer("n", n, HELD_OUT, _MAX_COUNT)
        maps = self._maps(spec)
        x, t = np.empty((n, self.hidden_dim), np.float32), np.empty((n, self.hidden_dim), np.float32)
        for block, start in enumerate(range(0, n, _BLOCK)):
            stop = min(start + _BLOCK, n)
            for out, values in zip((x, t), self._block(spec, maps, block), strict=True):
                out[start:stop] = values[: stop - start]
        scalars: dict[str, Any] = {m: frozen(np.full(n, v, d)) for m, (d, v) in SCALARS.items()}
        ids: list[str | None] = [f"{spec.name}-{self.seed}-{row}" for row in range(n)]
        texts = MemoryTexts({"id": ids, "domain": [spec.name] * n}, n)
        columns = Columns(texts, inputs=frozen(x), targets=frozen(t), **scalars)
        held = np.arange(n) % HELD_OUT == HELD_OUT - 1
        more: dict[str, Any] = {
            "metadata": {"task": spec.name, "hidden_dim": self.hidden_dim, "seed": self.seed},
            "optimum": self.optimum(task),
        }
        validation = AdapterDataset.of(columns, np.flatnonzero(held), **more)
        return AdapterDataset.of(columns, np.flatnonzero(~held), validation=validation, **more)

    def generate_all(self, n: int) -> list[tuple[str, AdapterDataset]]:
        """``(name, dataset)`` for every task, n samples each."""
        return [(name, self.generate(name, n)) for name in TASKS]

    def optimum(self, task: str) -> Optimum:
        """The true map of a task and the losses that go with it."""
        spec = TASKS[choice("task", task, tuple(TASKS))]
        basis, read, write = self._maps(spec)
        d = self.hidden_dim
        best = 0.5 * SIGMA**2 * d
        # x = sqrt(d/k) z U, so U x sqrt(k/d) is the code again.
        a = (read.T @ basis) * np.sqrt(len(basis) / d)
        return Optimum(_f32(a), _f32(write.T), SIGMA, best, best + 0.5 * GAIN**2 * d)

    # -- drawing --

    def _rng(self, spec: TaskSpec, *stream: int) -> np.random.Generator:
        entropy = [self.seed, self.hidden_dim, zlib.crc32(spec.name.encode()), *stream]
        return np.random.Generator(np.random.PCG64(np.random.SeedSequence(entropy)))

    def _maps(self, spec: TaskSpec) -> tuple[Doubles, Doubles, Doubles]:
        """U (k, d); what the map reads of the code, (k, r); what it writes, (r, d), with its gain."""
        rng, d = self._rng(spec, 0), self.hidden_dim
        k = min(spec.latent, d)
        r = min(spec.rank, k)
        basis = _orthonormal(rng.standard_normal((k, d)))
        read = _orthonormal(rng.standard_normal((r, k))).T
        write = _orthonormal(rng.standard_normal((r, d)))
        power = float((_variances(spec, k)[:, None] * read**2).sum())  # E|code read|^2
        return basis, read, write * (GAIN * np.sqrt(d / power))

    def _block(
        self, spec: TaskSpec, maps: tuple[Doubles, Doubles, Doubles], block: int
    ) -> tuple[Doubles, Doubles]:
        """Inputs and targets of one block of rows, float64."""
        basis, read, write = maps
        rng, (k, d) = self._rng(spec, 1, block), basis.shape
        code = rng.standard_normal((_BLOCK, k)) * np.sqrt(_variances(spec, k) / spec.density)
        code *= rng.random((_BLOCK, k)) < spec.density
        noise = SIGMA * rng.standard_normal((_BLOCK, d))
        return np.sqrt(d / k) * (code @ basis), code @ read @ write + noise


def _f32(array: Doubles) -> Floats:
    return np.ascontiguousarray(array, np.float32)


def _variances(spec: TaskSpec, k: int) -> Doubles:
    falling = np.arange(1, k + 1, dtype=np.float64) ** (-2.0 * spec.decay)
    out: Doubles = falling * (k / falling.sum())
    return out


def _orthonormal(rows: Doubles) -> Doubles:
    """Gram and Schmidt, twice: unlike a library's QR its signs are the same everywhere."""
    out = rows.copy()
    for i in range(len(out)):
        for _ in range(2):
            out[i] -= out[:i].T @ (out[:i] @ out[i])
        out[i] /= np.sqrt(out[i] @ out[i])
    return out
