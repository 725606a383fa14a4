"""Diagnosis: every check fires on what it is for, is silent on a healthy loop, and names a real setting."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import microlora as ml
from microlora.config import InstantConfig, LoraConfig
from microlora.sona import Finding, SonaConfig, SonaLoop, SonaStats
from microlora.sona.diagnose import CHECKS, Facts, _rank, diagnose
from microlora.sona.spectrum import Fit, fit_of
from sona_support import WIDTH, feed, loop
from support import normal, rng

HEALTHY = {
    "instant_count": 500,
    "instant_applied": 440,
    "instant_p50_us": 5.0,
    "background_count": 40,
    "background_avg_latency_us": 2000.0,
    "accepted": 38,
    "refused": 2,
    "pending_samples": 3,
    "held_out_samples": 50,
    "heldout_loss_first": 1.0,
    "heldout_loss_last": 0.5,
    "heldout_loss_least": 0.4,
    "prequential_loss_first": 1.0,
    "prequential_loss": 0.5,
    "warmed_up": True,
}
NLMS = LoraConfig(target_modules=["q_proj"], instant=InstantConfig(rule="nlms"))
X = normal(rng(1), 60, WIDTH)


def rewards(values):
    e = normal(rng(2), WIDTH)
    return [(i, X[i % 60], ml.Reward(float(v), e), None, None, float(v), 1.0) for i, v in enumerate(values)]


def targets(t):
    return [(i, x, ml.Target(y), None, None, None, 1.0) for i, (x, y) in enumerate(zip(X, t, strict=False))]


def stub(stats=None, config=None, samples=(), running=True, lora=None, left=0.5, visited=False):
    """A loop that has measured just this."""
    config = {"hidden_dim": WIDTH, "lora": LoraConfig(target_modules=["q_proj"]), **(config or {})}
    config = SonaConfig(**config)
    lora = ml.MicroLoRA(config.learner, hidden_dim=WIDTH) if lora is None else lora
    return SimpleNamespace(
        config=config,
        stats=lambda: SonaStats(**{**HEALTHY, **(stats or {})}),
        samples=lambda held: list(samples),
        running=running,
        modules=lora.modules,
        adapter=lora.adapter,
        visited=visited,
        evaluate=lambda adapter=None: None if left is None else (left if adapter is None else 1.0),
    )


def codes(*args, **kwargs):
    return [(f.code, f.setting) for f in diagnose(stub(*args, **kwargs))]


def test_a_healthy_loop_has_nothing_to_say():
    assert codes() == []
    assert codes(samples=rewards(np.linspace(0, 1, 40))) == []


def learned(which):
    """A learner of two modules, of which some have learned."""
    lora = ml.MicroLoRA(LoraConfig(target_modules=["q_proj", "v_proj"]), hidden_dim=WIDTH)
    for module in which:
        lora.instant(X[0], ml.Target(X[1]), module)
    return lora


TWO = {"lora": LoraConfig(target_modules=["q_proj", "v_proj"])}
BIG, TINY = {"lora": NLMS.replace(rank=8)}, {"lora": NLMS.replace(rank=2)}
ROSE = {"heldout_loss_last": 1.2}
GONE = {"reservoir_capacity": 0}
# One row for each piece of advice, and what no list has.
LISTS = [
    # Adaptation not improving
    (
        "quality threshold too high",
        "below_threshold",
        "quality_threshold",
        {"stats": {"skipped": {"quality is under quality_threshold": 600}}},
    ),
    ("feedback always the same value", "constant_feedback", "quality", {"samples": rewards([0.85] * 40)}),
    (
        "increase the learning rate",
        "step_too_small",
        "instant_lr",
        {"stats": {"prequential_loss": 1.0}, "config": {"instant_lr": 0.01, "lora": NLMS}},
    ),
    (
        "try different target modules",
        "module_unused",
        "lora.target_modules",
        {"config": TWO, "lora": learned(["q_proj"])},
    ),
    # Catastrophic forgetting
    ("increase lambda", "heldout_rising", "ewc_lambda", {"stats": ROSE, "config": {"ewc_lambda": 0, **GONE}}),
    (
        "use EwcMerge",
        "heldout_rising",
        "consolidation",
        {"stats": ROSE, "config": {"consolidation": "Average"}},
    ),
    (
        "reduce the learning rate",
        "heldout_rising",
        "instant_lr",
        {"stats": {**ROSE, "nlms_steps": 221, "nlms_halvings": 9}},
    ),
    ("RLS has no rate", "heldout_rising", "feedback", {"stats": {**ROSE, "nlms_steps": 220}}),
    ("more diverse data", "heldout_rising", "reservoir_capacity", {"stats": ROSE, "config": GONE}),
    (
        "replay has no weight",
        "heldout_rising",
        "replay_ratio",
        {"stats": ROSE, "config": {"replay_ratio": 0}},
    ),
    ("it was better once", "heldout_rising", "feedback", {"stats": {"heldout_loss_least": 0.3}}),
    ("the gate rolls back", "rolled_back", "feedback", {"stats": {"refused": 3, "rolled_back": 3}}),
    (
        "a row of refusals",
        "nothing_learned",
        "feedback",
        {
            "stats": {"background_count": 9, "refused": 5, "refused_in_a_row": 5, "held_out_samples": 9},
            "left": 0.97,
        },
    ),
    ("nothing is learned", "nothing_learned", "feedback", {"stats": {"refused": 0}, "left": 1.02}),
    # High latency
    ("reduce rank", "high_latency", "lora.rank", {"stats": {"instant_p50_us": 1500.0}, "config": BIG}),
    (
        "fewer modules",
        "high_latency",
        "lora.target_modules",
        {"stats": {"instant_p50_us": 1500.0}, "config": TINY},
    ),
    (
        "longer interval",
        "high_latency",
        "background_interval_ms",
        {"stats": {"background_avg_latency_us": 60_000.0}},
    ),
    # And the rest of what is looked for
    (
        "one target for all",
        "constant_feedback",
        "feedback",
        {"samples": targets(np.ones((60, WIDTH), np.float32))},
    ),
    (
        "halved steps",
        "step_too_large",
        "instant_lr",
        {"stats": {"nlms_steps": 440, "nlms_halvings": 400}},
    ),
    (
        "refused steps",
        "step_too_large",
        "instant_lr",
        {"stats": {"nlms_steps": 440, "refused_steps": 50}},
    ),
    (
        "warm-up not reached",
        "warmup_not_reached",
        "warmup_inputs",
        {"stats": {"warmed_up": False, "warmup_left": 30}},
    ),
    (
        "nobody calls it",
        "background_never",
        "start()",
        {"stats": {"background_count": 0, "refused": 0, "pending_samples": 30}, "running": False},
    ),
    ("overflow", "pending_overflow", "max_pending_samples", {"stats": {"overflowed_samples": 1}}),
    ("blind gate", "gate_blind", "holdout", {"stats": {"held_out_samples": 3}}),
]


@pytest.mark.parametrize(("advice", "code", "setting", "seen"), LISTS, ids=[row[0] for row in LISTS])
def test_each_trouble_is_named_with_its_setting_and_nothing_else_is(advice, code, setting, seen):
    assert codes(**seen) == [(code, setting)]


SILENT = [
    {"stats": {"skipped": {"held out": 400}}},
    {"stats": {"skipped": {"quality is under quality_threshold": 490}}},
    {"stats": {"instant_count": 0, "skipped": {"quality": 19}}},
    {"samples": rewards([0.85] * 19)},
    {"samples": rewards([0.85] * 39 + [0.9])},
    {"stats": {"heldout_loss_last": 1.09, "heldout_loss_least": 0.8}},
    {"stats": {"refused": 38, "refused_in_a_row": 36, "accepted": 2}},
    {"stats": {"refused": 38, "refused_in_a_row": 36, "accepted": 2}, "left": 0.94},
    {"stats": {"refused": 38, "refused_in_a_row": 36, "accepted": 2}, "left": None},
    {"stats": {"held_out_samples": 19, "refused_in_a_row": 4}, "left": 1.5},
    {"stats": ROSE, "left": 0.01},
    {"stats": {"background_count": 9, "refused": 9, "refused_in_a_row": 4}, "left": 1.5},
    {"stats": {"refused": 2, "rolled_back": 2}},
    {"stats": {"nlms_steps": 19, "nlms_halvings": 19}},
    {"stats": {"nlms_steps": 440, "nlms_halvings": 200, "refused_steps": 20}},
    {"stats": {"held_out_samples": 3, "rolled_back": 1}},
    {"stats": {"instant_p50_us": 999.0}},
    {"stats": {"background_avg_latency_us": 40_000.0}},
    {"stats": {"background_avg_latency_us": 60_000.0}, "config": {"background_interval_ms": 0.0}},
    {"config": TWO, "lora": learned(["q_proj", "v_proj"])},
    {"config": TWO, "lora": learned([])},
    {"stats": {"warmed_up": False, "warmup_left": 30, "instant_count": 9}},
    {"stats": {"background_count": 0, "refused": 0, "pending_samples": 29}},
    {"stats": {"background_count": 0, "refused": 0, "pending_samples": 30}, "visited": True},
    {
        "stats": {
            "background_count": 0,
            "refused": 0,
            "pending_samples": 30,
            "warmed_up": False,
            "warmup_left": 3,
            "instant_count": 9,
        }
    },
]


@pytest.mark.parametrize("seen", SILENT)
def test_what_is_just_right_is_not_reported(seen):
    assert codes(**seen) == []


def test_every_check_has_a_row_above_and_every_setting_is_real():
    fired = {code for _, code, _, _ in LISTS} | {"rank_too_small"}
    assert fired == {row.code for row in CHECKS}
    names = {item.name for item in dataclasses.fields(SonaConfig)}
    names |= {f"lora.{item.name}" for item in dataclasses.fields(LoraConfig)}
    names |= {"start()", "quality", "feedback"}
    assert {setting for _, _, setting, _ in LISTS} <= names
    assert hasattr(SonaLoop, "start")


def test_nothing_ever_says_that_checkpointing_lowers_latency():
    for _, _, _, seen in LISTS:
        assert "checkpointing" not in " ".join(map(str, diagnose(stub(**seen))))


@pytest.mark.parametrize(("rank", "found"), [(1, True), (WIDTH, False)])
def test_a_rank_too_small_for_the_stream_is_measured(rank, found):
    w = normal(rng(5), WIDTH, WIDTH)
    config = {"lora": LoraConfig(rank=rank, target_modules=["q_proj"])}
    seen = diagnose(stub(config=config, samples=targets(X @ w)))
    assert [f.code for f in seen] == (["rank_too_small"] if found else [])
    if found:
        assert seen[0].setting == "lora.rank"
        assert seen[0].evidence["error_without_limit"] < 0.1 * seen[0].evidence["error_at_rank"]
        assert 0 < seen[0].evidence["energy"] < 0.6


def test_a_rank_that_leaves_nothing_to_learn_is_large_enough():
    fit = Fit(rank=1, energy=1.0, held=1e-4, whole=1e-8, nothing=1.0)
    for error, found in ((1e-4, []), (0.019, []), (0.021, ["lora.rank"])):
        facts = Facts(stub())
        facts.fits = {"q_proj": fit._replace(held=error)}
        assert [setting for setting, _, _ in _rank(facts)] == found


def world(rows, seed=3):
    """Events of a loop with the defaults, as they come: inputs of four directions, targets by ``rows``."""
    r = rng(seed)
    basis, w = normal(r, 4, 16), normal(r, 16, 16) / 4
    sona = SonaLoop(SonaConfig(hidden_dim=16, background_interval_ms=0.0, max_ms=None))
    for i in range(rows):
        x = normal(r, 4) @ basis
        yield sona, i, x, x @ w, r
        sona.maybe_background()


def test_a_stream_that_is_learned_has_no_finding():
    for sona, _, x, t, _ in world(500):
        sona.instant_adapt(x, ml.Target(t))
    assert sona.stats().kept == sona.stats().refused > 10
    assert sona.diagnose() == []


def test_targets_of_which_the_inputs_say_nothing_are_found():
    for sona, _, x, t, r in world(500):
        sona.instant_adapt(x, ml.Target(normal(r, len(t))))
    found = {f.code: f.setting for f in sona.diagnose()}
    assert found["nothing_learned"] == "feedback"
    assert "instant_lr" not in found.values()


def test_a_poisoned_stretch_is_found():
    for sona, i, x, t, _ in world(500):
        sona.instant_adapt(x, ml.Target(-t if 300 <= i < 364 else t))
    assert sona.stats().rolled_back >= 3
    assert "rolled_back" in [f.code for f in sona.diagnose()]


def test_noise_is_no_reason_for_a_larger_rank():
    config = {"lora": LoraConfig(rank=1, target_modules=["q_proj"])}
    assert codes(config=config, samples=targets(normal(rng(9), 60, WIDTH))) == []


def test_the_base_is_taken_off_the_targets():
    w = normal(rng(5), WIDTH, WIDTH)
    config = {"lora": LoraConfig(rank=1, target_modules=["q_proj"])}
    # What is wanted beyond the base is nothing at all.
    rows = [(i, x, ml.Target(x @ w), x @ w, None, None, 1.0) for i, x in enumerate(X)]
    assert codes(config=config, samples=rows) == []


@given(st.integers(1, 6), st.integers(0, 5), st.integers(8, 24))
def test_left_out_errors_are_those_of_refitting_without_the_sample(rank, seed, n):
    from microlora.sona.spectrum import _RIDGES

    r = np.random.default_rng(seed)
    x, a = r.standard_normal((n, 6)), r.standard_normal((rank, 6))
    t = x @ r.standard_normal((6, 3)) + 0.3 * r.standard_normal((n, 3))
    fit = fit_of(x, t, a)
    basis = np.linalg.qr(a.T)[0]

    def error(u):
        scale = (u**2).sum() / min(u.shape)
        best = np.inf
        for ridge in _RIDGES:
            total = 0.0
            for i in range(n):
                keep = np.arange(n) != i
                g = u[keep].T @ u[keep] + ridge * scale * np.eye(u.shape[1])
                total += ((t[i] - u[i] @ np.linalg.solve(g, u[keep].T @ t[keep])) ** 2).sum()
            best = min(best, total / n)
        return best

    assert fit.held == pytest.approx(error(x @ basis), rel=1e-6)
    assert fit.whole == pytest.approx(error(x), rel=1e-6)
    assert fit.nothing == pytest.approx((t**2).sum(1).mean())
    assert fit.energy == pytest.approx(((x @ basis) ** 2).sum() / (x**2).sum())


def test_inputs_or_an_a_of_zeros():
    t = np.ones((8, 2))
    fit = fit_of(np.zeros((8, 3)), t, np.zeros((2, 3)))
    assert fit == (2, 0.0, 2.0, 2.0, 2.0)


def test_findings_are_values_with_a_text():
    finding = Finding("code", "message", "setting", {"a": 1.0})
    assert str(finding) == "code (setting): message [a 1]"
    assert str(Finding("code", "message", "setting")) == "code (setting): message"


def test_a_live_loop_is_diagnosed_and_left_alone():
    sona = loop(quality_threshold=0.9, consolidation="average")
    feed(sona, 60, quality=0.5)
    before = sona.lora.version, str(sona.stats())
    found = {f.code: f for f in sona.diagnose()}
    assert found["below_threshold"].setting == "quality_threshold"
    assert (sona.lora.version, str(sona.stats())) == before
    quiet = loop()
    feed(quiet, 60)
    quiet.maybe_background(force=True)
    assert quiet.diagnose() == []


def test_a_live_loop_that_nobody_consolidates():
    sona = loop(max_pending_samples=40)
    feed(sona, 100)
    assert {"background_never", "pending_overflow"} <= {f.code for f in sona.diagnose()}
