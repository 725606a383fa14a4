"""Every row of every table: what is measured, and with which settings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from .plan import NO_GATE, Setting

#: Experiments in the order of the tables.
UPLIFT, SHARED, SWITCH, NOISE = "uplift", "shared", "switch", "noise"
STRATEGIES, POISON, SETTINGS = "strategies", "poison", "settings"


@dataclass(frozen=True)
class Row:
    """A row of a table.

    Attributes:
        experiment: Whose.
        name: Unique in the file.
        title: For people.
        setting: How the loop is made.
        options: Of the experiment.
        encoders: Encoders beside ``lsa`` that it runs on.
    """

    experiment: str
    name: str
    title: str
    setting: Setting = field(default_factory=Setting)
    options: Mapping[str, Any] = field(default_factory=dict)
    encoders: tuple[str, ...] = ()


LOOP = Setting()
INSTANT = replace(LOOP, background=False)
#: Nothing is held out and nothing runs in the background: the one-event rule alone.
BARE = INSTANT.but(holdout=0.0)
RANKS = (2, 8, 16, 32)


def _uplift() -> list[Row]:
    out = []
    for rank in RANKS:
        for basis in ("log", "random"):
            for title, setting in {"instant": BARE, "three loops": LOOP}.items():
                made = replace(setting, rank=rank, basis=basis)
                held = made.changes.get("holdout", 0.1)
                name = f"uplift {title} r={rank} A={basis} holdout={held:g}"
                row = Row(UPLIFT, name, title, made)
                out.append(replace(row, encoders=("minilm",)) if rank == 16 else row)
    extra = {
        "instant": INSTANT,
        "three loops": LOOP.but(holdout=0.0),
    }
    for title, setting in extra.items():
        held = setting.changes.get("holdout", 0.1)
        out.append(
            Row(UPLIFT, f"uplift {title} r=16 A=log holdout={held:g}", title, setting, encoders=("minilm",))
        )
    for title, setting in {"instant": BARE, "three loops": LOOP}.items():
        held = setting.changes.get("holdout", 0.1)
        made = replace(setting, basis="events", background=True)
        if title == "instant":
            # The background is called for the warm-up and has nothing else to do.
            made = made.but(background_min_samples=900)
        out.append(Row(UPLIFT, f"uplift {title} r=16 A=events holdout={held:g}", title, made))
    rules = {
        "NLMS, target": ("right", {"rule": "nlms"}),
        "NLMS, target by its cosine": ("cosine", {}),
        "RLS, document shown, weighted by quality": ("imitated", {}),
        "NLMS, quality alone (`Reward`)": ("rewarded", {}),
    }
    for title, (user, instant) in rules.items():
        made = replace(BARE, instant=instant)
        out.append(Row(UPLIFT, f"rule {title}", title, made, {"user": user}, ("minilm",)))
    out.append(
        Row(
            UPLIFT,
            "rule constant",
            "a constant gradient times quality",
            replace(BARE, constant=True, basis="random"),
            {"user": "rewarded"},
            ("minilm",),
        )
    )
    return out


def _shared() -> list[Row]:
    return [
        Row(SHARED, f"shared {title} r={rank}", title, replace(setting, rank=rank), encoders=("minilm",))
        for rank in (16, 32)
        for title, setting in {"instant": BARE, "three loops": LOOP}.items()
    ]


def _switch() -> list[Row]:
    rules = {
        "RLS, phi = 1": {},
        "RLS, phi = 0.98": {"forgetting": 0.98},
        "NLMS": {"rule": "nlms"},
    }
    return [
        Row(SWITCH, f"switch {rule}, {title}", f"{rule}, {title}", replace(setting, instant=instant))
        for rule, instant in rules.items()
        for title, setting in {"instant": BARE, "three loops": LOOP}.items()
    ]


PROTECTION = {
    "instant": INSTANT,
    "three loops, no gate": LOOP.but(gate_tolerance=NO_GATE),
    "three loops": LOOP,
}


def _noise() -> list[Row]:
    out = []
    for share in (0.0, 0.1, 0.3):
        for quality in ("", "rating"):
            for title, setting in PROTECTION.items():
                name = f"noise {share:g} {quality or 'none'}, {title}"
                options = {"share": share, "quality": quality}
                out.append(Row(NOISE, name, title, setting, options))
    for quality in ("", "rating", "ips"):
        for title, setting in PROTECTION.items():
            name = f"position {quality or 'none'}, {title}"
            out.append(Row(NOISE, name, title, setting, {"eta": 1.0, "quality": quality}))
    return out


STREAMS = ("domains", "ratings", "personas")


def _strategies() -> list[Row]:
    made = {"none: instant alone": INSTANT}
    names = ("ewc_merge", "average", "quality_weighted", "best_only", "ensemble")
    made |= {f"`{name}`": LOOP.but(consolidation=name) for name in names}
    out = [
        Row(STRATEGIES, f"{stream} {title}", title, setting, {"stream": stream})
        for title, setting in made.items()
        for stream in STREAMS
    ]
    for title in ("ewc_merge", "quality_weighted"):
        for threshold in (0.3, 0.5, 0.7):
            setting = LOOP.but(consolidation=title, quality_threshold=threshold)
            name = f"threshold {threshold:g} {title}"
            out.append(Row(STRATEGIES, name, f"`{title}`, {threshold:g}", setting, {"stream": "ratings"}))
    for preset in ("low_latency", "balanced", "high_quality"):
        row = Row(STRATEGIES, f"preset {preset}", f"`{preset}`", Setting(preset=preset), {"stream": "alone"})
        out.append(row)
    return out


#: The stream, and the events of it whose targets are turned round.
EVENTS, POISONED = 640, (320, 384)


def _poison() -> list[Row]:
    made = {
        "instant": INSTANT,
        "three loops, nothing held out": LOOP.but(holdout=0.0),
        "three loops, no gate": LOOP.but(gate_tolerance=NO_GATE),
        "three loops": LOOP,
        "NLMS, instant": replace(INSTANT, instant={"rule": "nlms"}),
        "three loops, windows of 50": LOOP.but(background_min_samples=50),
        "NLMS, three loops": replace(LOOP, instant={"rule": "nlms"}),
        "NLMS, three loops, no gate": replace(LOOP.but(gate_tolerance=NO_GATE), instant={"rule": "nlms"}),
        "NLMS, three loops, windows of 50": replace(
            LOOP.but(background_min_samples=50), instant={"rule": "nlms"}
        ),
    }
    return [Row(POISON, f"poison {title}", title, setting) for title, setting in made.items()]


#: The best of those that were tried together on the splits of `plan.TUNING`.
CHOSEN: Mapping[str, Any] = {"gate_tolerance": 0.05, "replay_ratio": 10.0, "gate_min_samples": 8}
#: One setting changed at a time, and a few together.
CHANGES: tuple[Mapping[str, Any], ...] = (
    {},
    {"gate_tolerance": 0.0},
    {"gate_tolerance": 0.05},
    {"gate_tolerance": 0.1},
    {"gate_tolerance": NO_GATE},
    {"gate_min_samples": 8},
    {"gate_min_samples": 16},
    {"holdout": 0.0},
    {"background_min_samples": 20},
    {"background_min_samples": 50},
    {"replay_ratio": 0.0},
    {"replay_ratio": 3.0},
    {"replay_ratio": 10.0},
    {"logit_weight": 0.0},
    {"logit_weight": 2.0},
    {"consolidation_steps": 0},
    {"reservoir_capacity": 0},
    {"gate_tolerance": 0.05, "replay_ratio": 10.0},
    CHOSEN,
    {"gate_tolerance": 0.05, "replay_ratio": 10.0, "gate_min_samples": 16},
)
#: Those that are measured with NLMS too, which moves much faster.
GATES = tuple(c for c in CHANGES if not c or "gate_tolerance" in c or c == {"gate_min_samples": 16})


def _settings() -> list[Row]:
    out = []
    for rule, instant, changes in (("RLS", {}, CHANGES), ("NLMS", {"rule": "nlms"}, GATES)):
        loop = replace(LOOP, instant=instant)
        alone = replace(loop, background=False)
        out.append(Row(SETTINGS, f"settings {rule} instant", "instant alone", alone, {"rule": rule}))
        for change in changes:
            said = ", ".join(f"`{k}` {'off' if v == NO_GATE else f'{v:g}'}" for k, v in change.items())
            title = said or "the defaults"
            name = f"settings {rule} {title.replace('`', '')}"
            out.append(Row(SETTINGS, name, title, loop.but(**change), {"rule": rule}))
    return out


_ALL = [*_uplift(), *_shared(), *_switch(), *_noise(), *_strategies(), *_poison(), *_settings()]
ROWS = {row.name: row for row in _ALL}
assert len(ROWS) == len(_ALL), "names are unique"
