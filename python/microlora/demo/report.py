"""The demo's runs, as plain values that JSON can hold; the terminal and the plot draw from the same."""

from __future__ import annotations

import math
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from microlora.demo.evaluate import best_hits
from microlora.demo.experiment import SGD_RATE, PersonaResult, learn, run_persona, start
from microlora.demo.session import Session
from microlora.demo.task import Api, Learner
from microlora.exceptions import ConfigError
from microlora.progress import CancelToken, Progress

__all__ = ["answer", "choose_personas", "run"]


def _number(value: float) -> float | None:
    """JSON knows no nan: it stands as null."""
    return float(value) if math.isfinite(value) else None


def choose_personas(session: Session, persona: str | None) -> tuple[str, ...]:
    """All personas, or the one named.

    Raises:
        ConfigError: it is not among them; the message lists them.
    """
    names = session.task.personas
    if persona is None:
        return names
    if persona not in names:
        raise ConfigError(f"persona is {persona!r}; one of {', '.join(names)} is wanted")
    return (persona,)


def _header(session: Session, rank: int, seed: int) -> dict[str, Any]:
    return {
        "python": platform.python_version(),
        "numpy": np.__version__,
        "pairs": len(session.corpus),
        "encoder": {
            "name": session.encoder.name,
            "dim": session.encoder.dim,
            "seconds": session.encoder_seconds,
            "from_cache": session.encoder_cached,
        },
        "rank": rank,
        "seed": seed,
    }


def _row(result: PersonaResult) -> dict[str, Any]:
    us = result.event_ns / 1000.0
    return {
        "persona": result.persona,
        "clicks": result.clicks,
        "held_out": result.held_out,
        "before": result.before,
        "after_10": result.early,
        "after_all": result.after,
        "uplift": result.uplift,
        "others_change": _number(result.others_after - result.others_before),
        "us_p50": float(np.percentile(us, 50)),
        "us_p99": float(np.percentile(us, 99)),
    }


def _overall(results: Sequence[PersonaResult]) -> dict[str, Any]:
    us = np.concatenate([r.event_ns for r in results]) / 1000.0

    def mean(values: Sequence[float]) -> float | None:
        return _number(float(np.mean(values)))

    return {
        "personas": len(results),
        "personas_up": sum(r.uplift > 0 for r in results),
        "clicks": sum(r.clicks for r in results),
        "clicks_mean": mean([r.clicks for r in results]),
        "before": mean([r.before for r in results]),
        "after_10": mean([r.early for r in results]),
        "after_all": mean([r.after for r in results]),
        "uplift": mean([r.uplift for r in results]),
        "others_change": mean([r.others_after - r.others_before for r in results]),
        "us_p50": float(np.percentile(us, 50)),
        "us_p99": float(np.percentile(us, 99)),
        "sgd_rate": SGD_RATE,
        "sgd_after_10": mean([r.sgd_early for r in results]),
        "sgd_after_all": mean([r.sgd_after for r in results]),
    }


def _save(session: Session, learners: dict[str, Learner], folder: Path, api: Api) -> dict[str, Any]:
    """Write each adapter and read it back; the reloaded one must rank every held-out query the same."""
    folder.mkdir(parents=True, exist_ok=True)
    sizes, same = [], True
    for persona, learner in learners.items():
        path = folder / f"{persona}.safetensors"
        learner.save(path)
        sizes.append(path.stat().st_size)
        held_out = session.task.split.held_out[persona]
        again = session.task.ranks(api.load(path), held_out)
        same = same and bool((again == session.task.ranks(learner, held_out)).all())
    parameters = next(iter(learners.values())).param_count
    return {
        "folder": str(folder),
        "files": len(sizes),
        "file_bytes": max(sizes),
        "parameters": parameters,
        "weight_bytes": 4 * parameters,
        "reloaded_ranks_equal": same,
    }


def run(
    session: Session,
    personas: Sequence[str],
    rank: int,
    seed: int,
    save_dir: Path,
    api: Api,
    *,
    progress: Progress | None = None,
    cancel: CancelToken | None = None,
) -> dict[str, Any]:
    """Let every persona learn, save its adapter, and gather the figures.

    Args:
        session: the encoded task.
        personas: those to run.
        rank: of the adapters.
        seed: of their random start.
        save_dir: folder of the adapters, made if need be; one file for each persona.
        api: makes learners and feedback.
        progress: called with (personas done, personas in all, what).
        cancel: looked at before each click.

    Returns:
        A dict of plain values: the setting, a row for each persona, their mean, and what was saved.

    Raises:
        ConfigError: ``rank`` is out of range.
        CancelledError: ``cancel`` was set; no adapter was saved.
        OSError: ``save_dir`` cannot be written.
    """
    results: list[PersonaResult] = []
    learners: dict[str, Learner] = {}
    for n, persona in enumerate(personas):
        if progress is not None:
            progress(n, len(personas), f"{persona} clicks")
        result, learners[persona] = run_persona(session.task, persona, rank, seed, api, cancel=cancel)
        results.append(result)
    if progress is not None:
        progress(len(personas), len(personas), "all personas have clicked")
    return {
        **_header(session, rank, seed),
        "personas": [_row(result) for result in results],
        "overall": _overall(results),
        "saved": _save(session, learners, save_dir, api),
    }


def answer(
    session: Session,
    query: str,
    personas: Sequence[str],
    rank: int,
    seed: int,
    api: Api,
    *,
    hits: int = 5,
    cancel: CancelToken | None = None,
) -> dict[str, Any]:
    """The best hits for ``query`` without an adapter, and through the adapter of each of ``personas``.

    Raises:
        ConfigError: ``rank`` is out of range, or no word of ``query`` is known to the encoder.
        CancelledError: ``cancel`` was set.
    """
    task, pairs = session.task, session.corpus.pairs
    x = session.encoder.encode([query])[0]
    if not x.any():
        raise ConfigError(f"ask is {query!r}, of which the encoder knows no word; other words are wanted")

    def top(learner: Learner | None) -> list[dict[str, Any]]:
        moved = x if learner is None else x + learner.forward(x[None, :])[0]
        return [
            {"where": pairs[i].where, "query": pairs[i].query, "module": pairs[i].module, "score": score}
            for i, score in best_hits(moved, task.documents, hits)
        ]

    answers = []
    for persona in personas:
        learner = start(task, rank, seed, api)
        learn(learner, task, task.split.stream[persona], api, cancel=cancel)
        answers.append({"persona": persona, "hits": top(learner)})
    return {**_header(session, rank, seed), "ask": query, "without": top(None), "with": answers}
