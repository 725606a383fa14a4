"""Events that are taken out again: by replay, to rounding by downdate, gone from the disk; or refused."""

import os
import signal
import threading
import time
from contextlib import closing

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import microlora as ml
from microlora.exceptions import ConfigError, FeedbackError
from microlora.sona import JournalConfig, SonaLoop
from sona_core_support import (
    NAMES,
    STRATEGIES,
    WIDTH,
    Call,
    core_config,
    core_loop,
    digest,
    essence,
    feed,
    held_out,
    mixed,
    same_state,
    targets,
)
from support import close, feedback_kinds, normal, rng

JOURNAL = JournalConfig(segment_bytes=16384)
NOISELESS = {"holdout": 0.0, "max_ms": None}


def play(sona, steps, skip=None):
    """Calls, and turns (None); a call that is skipped is one whose number nobody has."""
    number = 0
    for step in steps:
        if step is None:
            sona.maybe_background(force=True)
            continue
        number += 1
        if number != skip:
            sona.instant_adapt(*step)
    return sona


def b_of(sona):
    """B of all members and modules."""
    return [a.lora_b(m) for a, _ in sona.ensemble() for m in sona.modules()]


def slow_of(sona):
    return [sona.consolidated().lora_b(m) for m in sona.modules()]


CHOSEN = st.fixed_dictionaries(
    {
        "consolidation": st.sampled_from(STRATEGIES),
        "dtype": st.sampled_from(["f32", "f16", "bf16"]),
        "warmup_inputs": st.sampled_from([0, 8]),
        "pattern_threshold": st.sampled_from([0.3, 0.6]),
    }
)


@given(CHOSEN, st.integers(0, 99), st.integers(1, 40), st.lists(st.booleans(), min_size=4, max_size=4))
def test_by_replay_is_a_loop_that_never_saw_it(tmp_path_factory, chosen, seed, event, turns):
    folder = tmp_path_factory.mktemp("forget")
    config = core_config(ensemble_size=3, **NOISELESS, **chosen)
    steps = []
    for i, turn in enumerate(turns):
        steps += [*targets(5, seed + i, quality=0.9), *mixed(5, 1000 + seed + i), *([None] if turn else [])]
    with closing(SonaLoop.open(folder / "a", config, journal=JOURNAL)) as sona:
        play(sona, steps)
        x = [step for step in steps if step is not None][event - 1].x
        assert on_disk(folder / "a", x)
        assert sona.forget(event) == "replay"
        assert not on_disk(folder / "a", x)
        twin = play(SonaLoop(config), steps, skip=event)
        for got, want in zip(b_of(sona) + slow_of(sona), b_of(twin) + slow_of(twin), strict=True):
            assert (got == want).all()
        assert sona.stats().events == 40
        assert event not in {line["event"] for line in sona.audit()}
        assert sum(line["kind"] == "event" for line in sona.audit()) == 39
        assert event not in {s[0] for s in sona.samples(False)}
        # And it goes on from there, also after a restart.
        feed(sona, targets(1, 500))
        now = digest(sona)
    with closing(SonaLoop.open(folder / "a", journal=JOURNAL)) as again:
        assert digest(again) == now
        with pytest.raises(FeedbackError, match=f"event {event} cannot be forgotten"):
            again.forget(event)
        assert digest(again) == now


def on_disk(folder, x):
    """Whether a file under the folder holds the bytes of x."""
    return any(x.tobytes() in f.read_bytes() for f in folder.rglob("*") if f.is_file())


@pytest.mark.parametrize("event", range(1, 31))
def test_held_out_events_keep_their_numbers(tmp_path, event):
    config = core_config(gate_tolerance=1e9, max_ms=None)
    steps = [*targets(20, 1), None, *targets(10, 2)]
    with closing(SonaLoop.open(tmp_path / "a", config, journal=JOURNAL)) as sona:
        play(sona, steps)
        whole = essence(sona)
        held = {s[0] for s in sona.samples(True)} | {
            line["event"] for line in sona.audit() if line["held_out"] and line["event"] > 20
        }
        sona.forget(event)
        left = {s[0] for s in sona.samples(True)} | {
            line["event"] for line in sona.audit() if line["held_out"] and line["event"] > 20
        }
        assert left == held - {event}
        assert (digest(sona) == digest(play(SonaLoop(config), steps))) == (event in held)
        # The same numbers were trained on as before.
        trained = {s[0] for s in sona.samples(False)}
        assert trained == set(range(1, 21)) - held - {event}
        assert essence(sona) != whole


def test_an_event_that_waits_goes_by_the_window(tmp_path):
    steps = [*mixed(20), None, *mixed(10, 1)]
    for event in (21, 25, 30):
        sona = play(core_loop(**NOISELESS), steps)
        assert sona.forget(event) == "replay"
        twin = play(core_loop(**NOISELESS), steps, skip=event)
        for got, want in zip(b_of(sona), b_of(twin), strict=True):
            assert (got == want).all()
        assert sona.stats().pending_samples == 9


def test_an_event_that_waited_when_the_journal_began(tmp_path):
    calls = targets(12)
    config = core_config(**NOISELESS)
    with closing(SonaLoop.open(tmp_path / "d", config)) as sona:
        feed(sona, calls[:8])
        sona.checkpoint()
    with closing(SonaLoop.open(tmp_path / "d", journal=JOURNAL)) as sona:
        feed(sona, calls[8:])
        sona.forget(3)
        twin = play(SonaLoop(config), calls, skip=3)
        assert all((p == q).all() for p, q in zip(b_of(sona), b_of(twin), strict=True))
        assert not on_disk(tmp_path / "d", calls[2].x)
        sona.forget(10)
        assert sona.stats().pending_samples == 10


@given(st.integers(0, 99), st.integers(2, 14), st.sampled_from(["f32", "bf16"]), st.booleans())
def test_by_downdate_to_rounding(seed, event, dtype, one_module):
    r = rng(seed)
    options = {"dtype": dtype, "quality_threshold": 0.2, **NOISELESS}
    calls = [
        c._replace(
            quality=float(r.uniform(0.3, 1.0)),
            base=normal(r, WIDTH) if i % 3 == 0 else None,
            module=NAMES[i % 2] if one_module and i > 1 else None,
        )
        for i, c in enumerate(targets(14, seed, noise=0.3))
    ]
    sona = play(core_loop(**options), calls)
    assert sona.forget(event, "downdate") == "downdate"
    twin = play(core_loop(**options), calls, skip=event)
    for m in NAMES:
        close(sona.lora[m].lora_b, twin.lora[m].lora_b, 1e-5 if dtype == "f32" else 1e-2)
    # P went with it: later events are learned as if it had never come.
    for both in (sona, twin):
        feed(both, targets(20, seed + 1))
    for m in NAMES:
        close(sona.lora[m].lora_b, twin.lora[m].lora_b, 1e-5 if dtype == "f32" else 1e-2)


def test_what_left_the_window_leaves_downdates_only():
    options = {"max_pending_samples": 20, "warmup_inputs": 0, "background_min_samples": 5, **NOISELESS}
    calls = targets(30)
    sona = play(core_loop(**options), [*calls[:10], None, *calls])
    with pytest.raises(FeedbackError, match="have left the window"):
        sona.forget(30, "replay")
    assert sona.forget(30) == "downdate"
    twin = play(core_loop(**options), [*calls[:10], None, *calls], skip=30)
    for got, want in zip(b_of(sona), b_of(twin), strict=True):
        close(got, want, 1e-5)


def refusals():
    r = rng(5)
    other = {k: Call(normal(r, WIDTH), f) for k, f in feedback_kinds(r, WIDTH).items() if k != "mse"}
    good = targets(6)
    yield "unknown", {}, good, 7, None, "the last one was 6"
    yield "zero", {}, good, 0, None, "the last one was 6"
    yield "consolidated", {}, [*good, None, *targets(3, 1)], 3, None, "left the window"
    yield "consolidated, downdate", {}, [*good, None], 3, "downdate", "not consolidated"
    yield "first", {}, good, 1, "downdate", "scale"
    one = [*(c._replace(module=NAMES[0]) for c in good), *good]
    yield "first of a module", {}, one, 7, "downdate", "scale"
    yield "nlms", {"instant": ml.InstantConfig(rule="nlms")}, good, 3, "downdate", "rls"
    yield "forgets", {"instant": ml.InstantConfig(forgetting=0.9)}, good, 3, "downdate", "forgetting"
    for kind, call in other.items():
        yield kind, {}, [*good, call], 7, "downdate", "squared-error"
        yield f"{kind} after it", {}, [*good, call, *good], 3, "downdate", "came after it"


REFUSALS = {row[0]: row[1:] for row in refusals()}


@pytest.mark.parametrize("name", REFUSALS)
def test_what_cannot_be_forgotten_is_refused_with_the_reason(name):
    options, steps, event, how, message = REFUSALS[name]
    sona = play(core_loop(**NOISELESS, **options), steps)
    before = sona.to_bytes()
    with pytest.raises(FeedbackError) as caught:
        sona.forget(event, how)
    assert f"event {event} cannot be forgotten" in str(caught.value)
    assert message in str(caught.value)
    assert sona.to_bytes() == before


def test_how_must_be_a_name():
    sona = play(core_loop(), targets(5))
    before = sona.to_bytes()
    with pytest.raises(ConfigError, match="expected replay, downdate or None"):
        sona.forget(3, "somehow")
    with pytest.raises(ConfigError, match="audit"):
        sona.audit()
    assert sona.to_bytes() == before


def test_refusals_of_a_journal_change_nothing(tmp_path):
    def files():
        return {p.name: p.stat().st_size for p in (tmp_path / "d").rglob("*") if p.is_file()}

    with closing(SonaLoop.open(tmp_path / "d", core_config(**NOISELESS), journal=JOURNAL)) as sona:
        play(sona, [*targets(20), None, *targets(5, 1)])
        sona.install(sona.consolidated(), 20, False)
        play(sona, targets(5, 2))
        before, disk = sona.to_bytes(), files()
        for event, how, message in [
            (3, None, "deep run"),
            (31, None, "the last one was 30"),
            (28, "downdate", "use replay"),
        ]:
            with pytest.raises(FeedbackError, match=message):
                sona.forget(event, how)
        assert (sona.to_bytes(), files()) == (before, disk)
        # What came after the run's window did not shape it.
        assert sona.forget(28) == "replay"
        assert sona.forget(22) == "replay"
        assert len(sona.audit()) == 30


def test_retention_bounds_what_can_be_forgotten(tmp_path):
    journal = JOURNAL.replace(retain_bytes=0)
    with closing(SonaLoop.open(tmp_path / "d", core_config(**NOISELESS), journal=journal)) as sona:
        play(sona, [*targets(20), None])
        sona.checkpoint()
        play(sona, [*targets(10, 1), None])
        assert next(line["event"] for line in sona.audit()) == 21
        before = digest(sona)
        with pytest.raises(FeedbackError, match="begins with event 21"):
            sona.forget(20)
        assert digest(sona) == before
        assert sona.forget(25) == "replay"
        twin = play(core_loop(**NOISELESS), [*targets(20), None, *targets(10, 1), None], skip=25)
        assert all((p == q).all() for p, q in zip(b_of(sona), b_of(twin), strict=True))


def test_choices_stay_what_was_shown(tmp_path):
    config = core_config(warmup_inputs=20, rank=2, max_ms=None)
    with closing(SonaLoop.open(tmp_path / "d", config, journal=JOURNAL)) as sona:
        play(sona, [*targets(40), None])
        r = rng(3)
        for _ in range(40):
            choice = sona.choose(normal(r, WIDTH), ["a", "b", "c"])
            sona.reward(choice.id, float(r.uniform()))
        open_choice = sona.choose(normal(r, WIDTH), ["b", "c"])
        shown = sona.choices()
        for event in [line["event"] for line in sona.audit() if line["held_out"] is False][:3]:
            sona.forget(event)
            assert sona.choices() == shown
        sona.reward(open_choice.id, 0.5)
        assert sona.choices()[-1] == (open_choice.name, open_choice.propensity, 0.5)
    with closing(SonaLoop.open(tmp_path / "d", journal=JOURNAL)) as again:
        assert again.choices()[:-1] == shown


def test_nothing_that_is_learned_meanwhile_is_lost(tmp_path):
    with closing(SonaLoop.open(tmp_path / "d", core_config(**NOISELESS), journal=JOURNAL)) as sona:
        play(sona, [*targets(60), None])
        told, stop = [], threading.Event()

        def learn():
            for call in targets(3000, 7):
                told.append(sona.instant_adapt(*call).event)
                if stop.is_set():
                    break

        thread = threading.Thread(target=learn)
        thread.start()
        while not told:
            pass
        forgotten = [3, 17, 40]
        for event in forgotten:
            sona.forget(event)
        stop.set()
        thread.join()
        assert told == list(range(61, 61 + len(told)))
        events = [line["event"] for line in sona.audit() if line["kind"] == "event"]
        assert events == [e for e in range(1, told[-1] + 1) if e not in forgotten]
        twin = core_loop(**NOISELESS)
        assert sona.stats().events == told[-1] > twin.stats().events
        now = essence(sona)
    with closing(SonaLoop.open(tmp_path / "d", journal=JOURNAL)) as again:
        same_state(again, now)


def test_a_process_that_is_killed_while_it_forgets_has_or_has_not(tmp_path):
    config, steps = core_config(**NOISELESS), [*targets(60), None, *mixed(60), None]
    with_it = digest(play(SonaLoop(config), steps))
    without = digest(play(SonaLoop(config), steps, skip=17))
    for round_ in range(16):
        folder = tmp_path / f"d{round_}"
        with closing(SonaLoop.open(folder, config, journal=JOURNAL)) as sona:
            play(sona, steps)
        ready, go = os.pipe()
        pid = os.fork()
        if pid == 0:
            try:
                sona = SonaLoop.open(folder, journal=JOURNAL)
                os.write(go, b"!")
                sona.forget(17)
                time.sleep(30)
            finally:
                os._exit(1)
        os.read(ready, 1)
        os.close(ready)
        os.close(go)
        time.sleep(0.004 * round_)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        with closing(SonaLoop.open(folder, journal=JOURNAL)) as again:
            gone = 17 not in {line["event"] for line in again.audit()}
            assert digest(again) == (without if gone else with_it)
            assert on_disk(folder, steps[16].x) != gone
            assert len(list(folder.glob("journal-*"))) == 1
            if not gone:
                assert again.forget(17) == "replay"
                assert digest(again) == without


def test_a_held_out_event_goes_without_a_trace_in_the_weights():
    sona = core_loop()
    results = feed(sona, targets(40))
    before = digest(sona)
    event = next(r.event for r in results if held_out(r))
    sona.forget(event)
    assert digest(sona) == before
    assert sona.stats().pending_samples == 39
    assert np.isfinite(sona.evaluate())
