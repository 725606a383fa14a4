"""The core of the loops against float64 twins and the bare learner: instant, held out, gated, warmed up."""

import math

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

import microlora as ml
import reference as ref
from sona_core_support import (
    NAMES,
    STRATEGIES,
    WIDTH,
    Call,
    core_loop,
    feed,
    finish,
    held_out,
    mixed,
    same_state,
    targets,
    wanted,
    weights,
)
from support import DTYPES, KINDS, close, feedback_kinds, normal, read_tensors, rng, write_tensors

UNGATED = {"gate_min_samples": 10**6}


def bare_of(sona):
    """A learner as the loop's was made."""
    return ml.MicroLoRA(sona.config.learner, hidden_dim=WIDTH, seed=sona.config.seed)


def teach(lora, call):
    for module in NAMES if call.module is None else (call.module,):
        lora.instant(call.x, call.feedback, module=module, base=call.base)


# -- instant --


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", [*KINDS, "mixed"])
def test_an_event_is_the_bare_rule_bit_for_bit(kind, dtype):
    sona = core_loop(holdout=0.0, dtype=dtype)
    bare = bare_of(sona)
    r = rng(3)
    calls = mixed(40)
    if kind != "mixed":
        calls = [c._replace(feedback=feedback_kinds(r, WIDTH)[kind], quality=None) for c in calls]
    calls = [c._replace(quality=None) for c in calls]
    for call in calls:
        sona.instant_adapt(*call)
        teach(bare, call)
    assert sona.lora.snapshot().to_bytes() == bare.snapshot().to_bytes()
    x = normal(r, 3, WIDTH)
    assert (sona.forward(x, "v_proj") == bare.forward(x, module="v_proj")).all()


def test_targets_weigh_by_their_quality():
    sona = core_loop(holdout=0.0, target_modules=("q_proj",), quality_threshold=0.4)
    r = rng(1)
    calls = [c._replace(quality=float(r.uniform(0.2, 1.0))) for c in targets(60, noise=0.5)]
    first = next(c for c in calls if c.quality > 0.4)
    a, s = sona.lora["q_proj"].lora_a, float(sona.lora["q_proj"].scaling)
    results = feed(sona, calls)
    assert [r.applied for r in results] == [c.quality > 0.4 for c in calls]
    u = s * ref.f64([c.x for c in calls]) @ ref.f64(a).T
    weight = np.maximum([(c.quality - 0.4) / 0.6 for c in calls], 0.0)
    ridge = ref.f64(s * a @ first.x) @ ref.f64(s * a @ first.x)
    close(sona.lora["q_proj"].lora_b, ref.ridge(u, [c.feedback.t for c in calls], ridge, weight), 1e-4)
    stats = sona.stats()
    assert stats.skipped == {"quality is under quality_threshold": sum(r.event is None for r in results)}
    assert stats.instant_count + sum(stats.skipped.values()) == len(calls)


@pytest.mark.parametrize("kind", KINDS)
def test_only_targets_are_passed_over(kind):
    sona = core_loop(holdout=0.0)
    feed(sona, targets(5))
    call = Call(normal(rng(2), WIDTH), feedback_kinds(rng(2), WIDTH)[kind], 0.1)
    before = weights(sona)
    result = sona.instant_adapt(*call)
    passed = kind in ("mse", "cosine")
    assert (result.event is None) == passed
    assert result.applied != passed
    assert (weights(sona) == before) == passed
    assert ("quality is under quality_threshold" in result.notes) == passed
    assert sona.stats().pending_samples == (5 if passed else 6)


@given(st.sampled_from([0.0, 0.1, 0.2, 0.25, 0.34, 0.5]), st.integers(0, 2**40), st.integers(1, 4))
def test_one_event_of_every_block_is_held_out(holdout, seed, blocks):
    size = round(1 / holdout) if holdout else 10
    sona = core_loop(holdout=holdout, seed=seed)
    results = feed(sona, targets(size * blocks))
    held = [held_out(r) for r in results]
    assert [sum(held[i : i + size]) for i in range(0, len(held), size)] == [int(holdout > 0)] * blocks
    assert [r.event for r in results] == list(range(1, size * blocks + 1))
    assert [r.applied for r in results] == [not h for h in held]


def test_what_is_held_out_changes_no_weights_and_is_never_trained_on():
    plain, other = core_loop(**UNGATED), core_loop(**UNGATED)
    r = rng(8)
    for start in range(3):
        for call in targets(40, start):
            before = weights(plain)
            result = plain.instant_adapt(*call)
            if held_out(result):
                assert weights(plain) == before
                assert not result.applied
                assert math.isnan(result.quality_delta)
                call = call._replace(feedback=ml.Target(100.0 * normal(r, WIDTH)))
            other.instant_adapt(*call)
        finish(plain)
        finish(other)
    assert weights(plain) == weights(other)
    assert (plain.consolidated().lora_b("q_proj") == other.consolidated().lora_b("q_proj")).all()
    held = {s[0] for s in plain.samples(True)}
    trained = {s[0] for s in plain.samples(False)}
    assert len(held) == 12
    assert held | trained == set(range(1, 121))
    assert not held & trained
    assert plain.evaluate() < 1.0 < other.evaluate()


def test_gradients_have_no_loss_and_are_never_held_out():
    sona = core_loop()
    r = rng()
    results = feed(sona, [Call(normal(r, WIDTH), ml.Gradient(normal(r, WIDTH))) for _ in range(40)])
    assert all(r.applied and not held_out(r) and math.isnan(r.quality_delta) for r in results)


@pytest.mark.parametrize("kind", [k for k in KINDS if k != "gradient"])
def test_results_are_measured(kind):
    sona = core_loop(holdout=0.0, target_modules=("q_proj",))
    r = rng(4)
    feed(sona, targets(6))
    baseline = ref.Baseline()
    for _ in range(12):
        x, base, feedback = normal(r, WIDTH), normal(r, WIDTH), feedback_kinds(r, WIDTH)[kind]
        before, _ = ref.loss_of(feedback, sona.forward(x), base, baseline.value)
        result = sona.instant_adapt(x, feedback, base=base)
        after, _ = ref.loss_of(feedback, sona.forward(x), base, baseline.value)
        if kind == "reward":
            baseline.update(feedback.r)
        assert result.loss_before == pytest.approx(before, rel=2e-4, abs=1e-5)
        assert result.loss_after == pytest.approx(after, rel=2e-4, abs=1e-5)
        assert result.quality_delta == pytest.approx(result.loss_before - result.loss_after, abs=1e-12)
        assert result.version == sona.lora.version
        assert result.samples_used == result.applied
        assert 0.0 < result.latency_us < 1e6


# -- events that come while a consolidation is under way --


LOOSE = {"gate_tolerance": 1e9}
TURNS = [
    ("ewc_merge", {}, ("accepted", "rolled_back")),
    ("ewc_merge", LOOSE, ("accepted", "accepted")),
    ("average", {}, ("kept", "rolled_back")),
    ("average", LOOSE, ("accepted", "accepted")),
    ("quality_weighted", {}, ("accepted", "rolled_back")),
    ("best_only", {}, ("kept", "rolled_back")),
    ("best_only", LOOSE, ("accepted", "accepted")),
]


@pytest.mark.parametrize(("strategy", "options", "outcomes"), TURNS)
def test_events_of_meanwhile_are_learned_on_the_new_weights(strategy, options, outcomes):
    sona = core_loop(consolidation=strategy, rank=WIDTH, target_modules=("q_proj",), max_ms=1e-9, **options)
    lora = sona.lora["q_proj"]
    live, slow = ref.Twin.of(lora), ref.Twin.of(lora)

    def learn(twin, calls, results):
        for call, result in zip(calls, results, strict=True):
            if not held_out(result):
                twin.rls(call.x, call.feedback.t)

    for turn, (sign, outcome) in enumerate(zip((1, -1), outcomes, strict=True)):
        calls, meanwhile = targets(60, turn, sign * wanted()), targets(5, 10 + turn)
        learn(live, calls, feed(sona, calls))
        result, between = finish(sona, meanwhile)
        assert result.outcome == outcome, result
        now = slow if outcome == "rolled_back" else live
        accepted = ref.f64(sona.consolidated().lora_b("q_proj"))
        if outcome != "accepted":
            close(accepted, now.b, 1e-4)
        now.b = accepted
        slow.b, slow.p, slow.ridge = now.b, now.p, now.ridge
        live.b, live.p, live.ridge = now.b, now.p, now.ridge
        learn(live, meanwhile, between)
        close(lora.lora_b, live.b, 1e-4)
        assert np.abs(accepted - live.b).max() > 1e-6
        assert sona.stats().pending_samples == len(meanwhile)
    # And the rule goes on from there.
    learn(live, calls, feed(sona, calls))
    close(lora.lora_b, live.b, 1e-4)


def test_events_of_every_kind_meanwhile_are_the_bare_rule_again():
    calls, meanwhile = mixed(50), [c._replace(quality=None) for c in mixed(5, 1)]
    sona = core_loop(holdout=0.0, max_ms=1e-9)
    feed(sona, calls)
    before = sona.lora.snapshot()
    result, _ = finish(sona, meanwhile)
    assert result.outcome == "accepted"
    assert any("not gated" in note for note in result.notes)
    # Rewards' baselines and P are those of the moment when the consolidation began.
    bare = bare_of(sona)
    bare.restore(before)
    accepted = {m: sona.consolidated().lora_b(m) for m in NAMES}
    bare = with_b(bare, accepted)
    for call in meanwhile:
        teach(bare, call)
    for m in NAMES:
        assert (bare[m].lora_b == sona.lora[m].lora_b).all()


def with_b(lora, b):
    """The same learner, rules and all, with another B (f32)."""
    header, tensors = read_tensors(lora.snapshot().to_bytes())
    for module, values in b.items():
        (key,) = [k for k in tensors if k.startswith(f"{module}.") and k.endswith("lora_b")]
        assert header[key]["shape"] == list(values.shape)
        tensors[key] = bytearray(np.ascontiguousarray(values, np.float32).tobytes())
    lora.restore(ml.Snapshot(write_tensors(header, tensors)))
    return lora


def test_an_overflow_meanwhile_cancels():
    options = {"max_pending_samples": 20, "background_min_samples": 5, "rank": WIDTH}
    sona, bare = core_loop(max_ms=1e-9, **options), core_loop(**options)
    calls = targets(15) + targets(25, 1)
    feed(bare, calls)
    feed(sona, calls[:15])
    assert sona.maybe_background(force=True).outcome == "goes_on"
    feed(sona, calls[15:])
    before, accepted = weights(sona), sona.consolidated().lora_b("q_proj")
    result, _ = finish(sona)
    assert result.outcome == "cancelled"
    assert not result.applied
    assert any("max_pending_samples" in note for note in result.notes)
    assert weights(sona) == before == weights(bare)
    assert (sona.consolidated().lora_b("q_proj") == accepted).all()
    stats = sona.stats()
    assert (stats.pending_samples, stats.overflowed_samples) == (20, 20)
    assert stats.cancelled == 1
    assert stats.background_count == 0
    # The newest are those that wait, and the next turn takes them.
    assert finish(sona)[0].samples_used == 18
    assert {s[0] for s in sona.samples(False)} | {s[0] for s in sona.samples(True)} == set(range(21, 41))


def test_a_window_goes_back_as_far_as_there_is_room():
    sona = core_loop(max_ms=1e-9, max_pending_samples=30, background_min_samples=5, holdout=0.0)
    feed(sona, targets(20))
    assert sona.maybe_background(force=True).outcome == "goes_on"
    feed(sona, targets(12, 1))
    # Asking for it gives the consolidation up, whether it can be done or not.
    with pytest.raises(ml.exceptions.FeedbackError, match="scale"):
        sona.forget(32)
    stats = sona.stats()
    assert (stats.pending_samples, stats.overflowed_samples) == (30, 2)
    assert finish(sona)[0].samples_used == 30


# -- the gate --


def first_then(calls, **options):
    sona = core_loop(target_modules=("q_proj",), rank=WIDTH, **options)
    feed(sona, targets(80))
    result, _ = finish(sona)
    assert result.outcome == "accepted"
    feed(sona, calls)
    return sona


def test_a_poisoned_window_is_rolled_back():
    sona = first_then(targets(80, 1, w=-wanted()))
    accepted = sona.consolidated().lora_b("q_proj")
    poisoned = sona.evaluate()
    result, _ = finish(sona)
    assert result.outcome == "rolled_back"
    assert result.applied
    assert (sona.lora["q_proj"].lora_b == accepted).all()
    assert result.quality_delta == pytest.approx(result.loss_before - result.loss_after)
    assert result.quality_delta > 0
    assert sona.evaluate() < 0.2 * poisoned
    assert sona.stats().rolled_back == 1
    assert max(s[0] for s in sona.samples(False)) <= 80
    assert (sona.manager.active.lora_b("q_proj") == accepted).all()


def test_accepted_ones_lower_what_was_measured():
    sona, outcomes = core_loop(rank=WIDTH), []
    for i in range(5):
        feed(sona, targets(40, i, noise=0.3))
        before = sona.evaluate()
        result, _ = finish(sona)
        after = sona.evaluate()
        assert result.loss_before == pytest.approx(before, rel=1e-6)
        assert result.loss_after == pytest.approx(after, rel=1e-6)
        assert result.quality_delta == pytest.approx(before - after, rel=1e-5, abs=1e-9)
        outcomes.append(result.outcome)
        if result.outcome == "accepted":
            assert after <= before * 1.01
            assert (sona.consolidated().lora_b("q_proj") == sona.lora["q_proj"].lora_b).all()
    assert {"accepted"} <= set(outcomes) <= {"accepted", "kept"}


def test_a_candidate_that_is_worse_than_the_live_weights_leaves_them():
    sona = core_loop(consolidation="average", rank=WIDTH)
    feed(sona, targets(80))
    before, loss = weights(sona), sona.evaluate()
    result, _ = finish(sona)
    assert result.outcome == "kept"
    assert not result.applied
    assert weights(sona) == before
    assert result.quality_delta == 0.0
    assert result.loss_after == pytest.approx(loss, rel=1e-6)
    assert "refused" in result.notes[0]
    # The live weights count as accepted from now on.
    assert (sona.consolidated().lora_b("q_proj") == sona.lora["q_proj"].lora_b).all()


@pytest.mark.parametrize("options", [{"holdout": 0.0}, UNGATED])
def test_without_held_out_events_nothing_is_judged(options):
    sona = core_loop(**options)
    feed(sona, targets(40))
    result, _ = finish(sona)
    assert result.outcome == "accepted"
    assert any("not gated" in note for note in result.notes)
    assert sona.stats().unmeasured == 1
    assert math.isnan(result.quality_delta) == (options != UNGATED)
    sona = core_loop(background_min_samples=3, gate_min_samples=4)
    feed(sona, targets(15))
    assert sona.maybe_background() is None


# -- the warm-up --


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_is_chosen_from_the_first_inputs_and_they_are_learned_again(dtype):
    sona = core_loop(warmup_inputs=30, dtype=dtype)
    calls = mixed(60)
    calls = [c._replace(quality=None) for c in calls]
    results = feed(sona, calls[:20])
    assert sona.maybe_background(force=True) is None
    results += feed(sona, calls[20:])
    learned = [c for c, r in zip(calls, results, strict=True) if not held_out(r)]
    result = sona.maybe_background()
    assert result.outcome == "warmed_up"
    assert result.samples_used == len(learned)
    bare = bare_of(sona)
    for m in NAMES:
        x = np.array([c.x for c in learned if c.module in (None, m)])
        bare.fit_input_basis(x, module=m)
        assert (bare[m].lora_a == sona.lora[m].lora_a).all()
        spans = np.linalg.qr(ref.f64(sona.lora[m].lora_a).T)[0], ref.principal_rows(x, 4)[0].T
        close(*(v @ v.T for v in spans), 2e-2 if dtype == "bf16" else 2e-3)
    for call in learned:
        teach(bare, call)
    for m in NAMES:
        assert (bare[m].lora_b == sona.lora[m].lora_b).all()
    assert sona.stats().pending_samples == 60
    assert sona.stats().warmed_up
    assert sona.maybe_background().outcome != "warmed_up"


def test_a_warm_up_by_hand_equals_one_by_events():
    x = normal(rng(7), 50, WIDTH)
    sona = core_loop(warmup_inputs=20, holdout=0.0)
    calls = targets(10)
    feed(sona, calls)
    share = sona.warm_up(x)
    bare = bare_of(sona)
    least = min(bare.fit_input_basis(x, module=m) for m in NAMES)
    assert share == least
    for call in calls:
        teach(bare, call)
    assert weights_of(bare) == weights(sona)
    finish(sona)
    before = sona.to_bytes()
    with pytest.raises(ml.exceptions.ConfigError, match="warm_up"):
        sona.warm_up(x)
    assert sona.to_bytes() == before


def weights_of(lora):
    return b"".join(lora[m].lora_a.tobytes() + lora[m].lora_b.tobytes() for m in lora.modules())


# -- every strategy --

VARIANTS = {
    "plain": {},
    "f16": {"dtype": "f16"},
    "bf16": {"dtype": "bf16"},
    "reservoir in f16": {"reservoir_dtype": "f16"},
    "no reservoir": {"reservoir_capacity": 0},
    "balance": {"reservoir_balance": True, "reservoir_capacity": 30},
    "few bytes": {"reservoir_max_bytes": 9000},
    "warm-up": {"warmup_inputs": 30},
    "ungated": UNGATED,
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_strategy_takes_every_feedback(strategy, variant):
    sona = core_loop(consolidation=strategy, ensemble_size=3, pattern_threshold=0.2, **VARIANTS[variant])
    seen, outcomes = 0, []
    for i in range(4):
        others = [c._replace(feedback=o.feedback, base=o.base) if i % 5 == 0 else c
                  for i, (c, o) in enumerate(zip(targets(60, i), mixed(60, i), strict=True))]  # fmt: skip
        seen += len(feed(sona, others))
        result, _ = finish(sona)
        outcomes.append(result.outcome)
        assert result.outcome in ("accepted", "kept", "rolled_back", "warmed_up"), result
        for m in NAMES:
            y = sona.forward(normal(rng(i), 4, WIDTH), m)
            assert np.isfinite(y).all()
        if VARIANTS[variant] is UNGATED:
            assert (result.outcome, result.applied) == ("accepted", True)
            assert (result.samples_used > 0) == (strategy != "average")
    assert strategy == "average" or {"accepted", "kept"} & set(outcomes)
    stats = sona.stats()
    assert stats.instant_count == seen == 240
    assert stats.reservoir_samples <= (0 if variant == "no reservoir" else sona.config.reservoir_capacity)
    assert (stats.reservoir_samples == 0) == (not sona.samples(False))
    # What contradicts nothing is kept for the gate even where it was taken back.
    assert stats.held_out_samples > 0 or not {"accepted", "kept"} & set(outcomes)
    if variant == "few bytes":
        assert stats.reservoir_samples < 60
    restored = core_loop(consolidation=strategy, ensemble_size=3, pattern_threshold=0.2, **VARIANTS[variant])
    restored.restore(sona.to_bytes())
    same_state(restored, sona)


@given(st.integers(0, 1000), st.booleans())
def test_an_ensemble_answers_with_its_members(seed, hard):
    r = rng(seed)
    options = {"ensemble_hard": hard, "ensemble_size": 3, "ensemble_temperature": 0.2, "holdout": 0.0}
    sona = core_loop(consolidation="ensemble", pattern_threshold=0.3, **options)
    feed(sona, targets(60, seed, patterns=3))
    finish(sona)
    members = sona.ensemble()
    n = len(members)
    assume(n > 1)
    assert sona.stats().members == n
    centroids = np.array([c for _, c in members])
    close(np.linalg.norm(centroids, axis=1), np.ones(n), 1e-5)
    x = normal(r, 7, WIDTH)
    cosine = ref.unit(x) @ ref.f64(centroids).T
    mix = np.exp(cosine / 0.2)
    mix /= mix.sum(1, keepdims=True)
    if hard:
        mix = np.eye(n)[cosine.argmax(1)]
    for m in NAMES:
        s = float(sona.lora[m].scaling)
        parts = np.array([ref.forward(x, a.lora_a(m), a.lora_b(m), s) for a, _ in members])
        want = np.einsum("nk,kno->no", mix, parts)
        close(sona.forward(x, m), want, 1e-4)
        close(sona.forward(x[0], m), want[0], 1e-4, 1e-5)
        out = np.ones((7, WIDTH), np.float32)
        sona.forward_add(x, m, out)
        close(out, 1.0 + want, 1e-4)
    # An event teaches the nearest member, and no other.
    call = targets(1, seed + 1)[0]
    near = int((ref.f64(centroids) @ ref.f64(call.x)).argmax())
    feed(sona, [call])
    for i, ((old, _), (new, _)) in enumerate(zip(members, sona.ensemble(), strict=True)):
        assert (old.lora_b("q_proj") != new.lora_b("q_proj")).any() == (i == near)
