"""What the tests of the loops' core share: streams of every feedback, small loops, state without clocks."""

import hashlib
import json
from typing import NamedTuple

import numpy as np

import microlora as ml
from microlora.sona import SonaConfig, SonaLoop
from support import feedback_kinds, normal, read_tensors, rng

WIDTH = 10
NAMES = ("q_proj", "v_proj")
STRATEGIES = ("ewc_merge", "average", "quality_weighted", "best_only", "ensemble")


class Call(NamedTuple):
    """One call of `instant_adapt`."""

    x: np.ndarray
    feedback: object
    quality: float | None = None
    module: str | None = None
    base: np.ndarray | None = None


def core_config(**changes):
    """Settings of two small modules without a warm-up; keys of `LoraConfig` go there."""
    keys = ("rank", "dtype", "instant", "target_modules")
    lora = {"rank": 4, "target_modules": NAMES, **{k: changes.pop(k) for k in keys if k in changes}}
    settings = {
        "lora": ml.LoraConfig(alpha=2.0 * lora["rank"], **lora),
        "hidden_dim": WIDTH,
        "warmup_inputs": 0,
        "background_interval_ms": 0.0,
        "max_ms": None,
    }
    return SonaConfig(**{**settings, **changes})


def core_loop(**changes):
    return SonaLoop(core_config(**changes))


def wanted(seed=99, width=WIDTH, rank=2):
    """A linear map (in, out) of low rank."""
    r = rng(seed)
    return normal(r, width, rank) @ normal(r, rank, width) / width


def targets(n, seed=0, w=None, noise=0.0, patterns=0, quality=None):
    """Events of a linear map; with ``patterns`` the inputs lie around so many directions."""
    r = rng(seed)
    x = normal(r, n, WIDTH)
    if patterns:
        centres = 4.0 * normal(rng(5), patterns, WIDTH)
        x = (x + centres[np.arange(n) % patterns]) / 3.0
    t = x @ (wanted() if w is None else w) + noise * normal(r, n, WIDTH)
    return [Call(x, ml.Target(t), quality) for x, t in zip(x, t, strict=True)]


def mixed(n, seed=0):
    """Events of every kind, for one module or both, with and without quality and base."""
    r = rng(seed)
    out = []
    for i in range(n):
        kinds = feedback_kinds(r, WIDTH)
        kind = list(kinds)[int(r.integers(len(kinds)))]
        base = normal(r, WIDTH) if r.uniform() < 0.6 else None
        quality = (None, float(r.uniform(0.5, 1.0)))[i % 2]
        out.append(Call(normal(r, WIDTH), kinds[kind], quality, (None, *NAMES)[i % 3], base))
    return out


def feed(sona, calls):
    return [sona.instant_adapt(*call) for call in calls]


def held_out(result):
    return any(note.startswith("held out") for note in result.notes)


def finish(sona, calls=()):
    """Forces a consolidation and goes on with it to its end; half of ``calls`` between each two turns."""
    calls, results, half = list(calls), [], -(-len(calls) // 2)
    result = sona.maybe_background(force=True)
    while result.outcome == "goes_on":
        results += feed(sona, calls[:half])
        del calls[:half]
        result = sona.maybe_background()
    assert not calls, "the consolidation was over before its events"
    return result, results


def weights(sona):
    """A and B of all members and modules, as bytes."""
    parts = [adapter for adapter, _ in sona.ensemble()]
    return b"".join(p.lora_a(m).tobytes() + p.lora_b(m).tobytes() for p in parts for m in sona.modules())


def digest(sona):
    return hashlib.sha256(weights(sona)).hexdigest()


def essence(sona):
    """Everything of a loop's state but what counts how it came there: ``{name: bytes}``."""
    _, tensors = read_tensors(sona.to_bytes())
    out = {}
    for name, raw in tensors.items():
        name = name.removeprefix("extra.")
        if name.startswith(("sona/live/", "sona/accepted/")):
            for inner, data in read_tensors(bytes(raw))[1].items():
                if inner.removeprefix("extra.") == "learner/state":
                    state = json.loads(bytes(data))
                    data = json.dumps(state["modules"])
                out[f"{name}/{inner}"] = bytes(data, "utf8") if isinstance(data, str) else bytes(data)
        elif name == "sona/document":
            document = json.loads(bytes(raw))
            keep = ("next", "warm", "complete", "bandit", "enabled", "members", "accepted", "held_out")
            out[name] = json.dumps({k: document[k] for k in keep}).encode()
        else:
            out[name] = bytes(raw)
    return out


def same_state(a, b, but=()):
    a, b = (essence(s) if isinstance(s, SonaLoop) else s for s in (a, b))
    other = sorted(k for k in {*a, *b} - set(but) if a.get(k) != b.get(k))
    assert not other, f"differ: {other}"
