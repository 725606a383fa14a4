"""Readers, writers, the background, saves and forks at once: whole versions, nothing lost, no deadlock."""

import logging
import os
import signal
import threading
import time
from contextlib import closing, suppress

import numpy as np
import pytest

import microlora as ml
from microlora.sona import JournalConfig, SonaLoop
from sona_core_support import (
    NAMES,
    WIDTH,
    core_config,
    core_loop,
    digest,
    essence,
    feed,
    held_out,
    mixed,
    targets,
)
from support import normal, rng

SECONDS = 2.0
PATIENCE = 60.0


class Crowd:
    """Threads that repeat an action until it is time; their errors are raised by the test."""

    def __init__(self):
        self.stop, self.errors, self.threads = threading.Event(), [], []

    def add(self, act, times=1):
        for i in range(times):
            thread = threading.Thread(target=self._run, args=(act, i), daemon=True)
            self.threads.append(thread)

    def _run(self, act, i):
        try:
            while not self.stop.is_set():
                act(i)
        except BaseException as error:
            self.errors.append(error)
            self.stop.set()

    def run(self, seconds=SECONDS):
        for thread in self.threads:
            thread.start()
        self.stop.wait(seconds)
        self.stop.set()
        until = time.monotonic() + PATIENCE
        for thread in self.threads:
            thread.join(max(0.0, until - time.monotonic()))
        assert not any(t.is_alive() for t in self.threads), "a thread hangs"
        if self.errors:
            raise self.errors[0]


def level(r):
    """An event whose target is one number over and over: so is every output of a whole version."""
    return normal(r, WIDTH), ml.Target(np.full(WIDTH, 20.0 * r.standard_normal(), np.float32))


def one_version(y):
    """Rows of a single version hold one number each."""
    y = np.atleast_2d(y)
    assert np.isfinite(y).all()
    spread = np.ptp(y, axis=1)
    assert (spread <= 1e-3 + 1e-4 * np.abs(y).max()).all(), y[spread.argmax()]


@pytest.mark.parametrize("strategy", ["ewc_merge", "average", "ensemble"])
@pytest.mark.parametrize("journal", [None, JournalConfig(segment_bytes=65536)])
def test_readers_writers_the_background_and_saves_at_once(tmp_path, strategy, journal):
    config = core_config(
        consolidation=strategy,
        max_ms=0.05,
        background_interval_ms=1.0,
        ensemble_size=3,
        pattern_threshold=0.3,
        warmup_inputs=30,
        max_pending_samples=300,
    )
    sona = SonaLoop.open(tmp_path / "d", config, journal=journal)
    told, outcomes = [[], []], []
    writers, probe = [rng(1), rng(2)], normal(rng(3), 1, WIDTH)
    same = np.repeat(probe, 40, axis=0)
    sona.on_event = lambda done: done.loop_type == "background" and outcomes.append(done.outcome)

    def write(i):
        told[i].append(sona.instant_adapt(*level(writers[i])))
        time.sleep(0.0002)

    def read(i):
        m = NAMES[i % 2]
        one_version(sona.forward(probe[0], m))
        y = sona.forward(same, m)
        one_version(y)
        # All rows of a batch are of the same version, but for an ensemble, which answers row by row.
        if strategy != "ensemble":
            assert np.ptp(y, axis=0).max() <= 1e-4 * (1 + np.abs(y).max())
        out = np.zeros((3, WIDTH), np.float32)
        sona.forward_add(same[:3], m, out)
        one_version(out)

    def look(_):
        sona.stats()
        sona.evaluate()
        sona.samples(True)
        sona.diagnose()
        one_version(sona.consolidated().lora_b("q_proj").T)
        sona.adapter()
        time.sleep(0.002)

    def save(_):
        sona.checkpoint()
        sona.to_bytes()
        time.sleep(0.05)

    crowd = Crowd()
    crowd.add(read, 4)
    crowd.add(write, 2)
    crowd.add(look)
    crowd.add(save)
    sona.start()
    try:
        crowd.run()
    finally:
        sona.stop()
    for _ in range(1000):  # a machine under load may have given the background no turn that ended
        if sona.stats().background_count:
            break
        sona.maybe_background(force=True)
    events = sorted(r.event for some in told for r in some)
    assert events == list(range(1, len(events) + 1))
    stats = sona.stats()
    assert stats.instant_count == stats.events == len(events)
    held = [r for some in told for r in some if held_out(r)]
    assert stats.skipped["held out"] == len(held)
    assert abs(len(held) - len(events) / 10) <= 1
    assert stats.instant_applied == sum(r.applied for some in told for r in some)
    ends = ("accepted", "kept", "rolled_back")
    assert stats.background_count == sum(outcomes.count(o) for o in ends) == stats.accepted + stats.refused
    assert stats.background_count > 0
    assert all(np.isfinite(r.latency_us) for some in told for r in some)
    for m in NAMES:
        one_version(sona.forward(same, m))
    sona.checkpoint()
    now = essence(sona)
    sona.close()
    with closing(SonaLoop.open(tmp_path / "d", journal=journal)) as again:
        assert essence(again) == now


def test_two_backgrounds_choices_forgetting_and_deep_runs_at_once(tmp_path):
    config = core_config(max_ms=0.05, background_interval_ms=0.5, warmup_inputs=20)
    journal = JournalConfig(fsync="interval", every=0.01, segment_bytes=65536)
    sona = SonaLoop.open(tmp_path / "d", config, journal=journal)
    feed(sona, targets(40))
    r, count = rng(5), [0]

    def learn(i):
        feed(sona, mixed(3, i + count[0]))
        count[0] += 3

    def choose(_):
        choice = sona.choose(normal(r, WIDTH), ["a", "b"], module="q_proj")
        sona.reward(choice.id, 0.5)
        time.sleep(0.003)

    def forget(_):
        event = sona.stats().events - 3
        with suppress(ml.exceptions.FeedbackError):
            sona.forget(event)
        time.sleep(0.3)

    def deep(_):
        sona.install(sona.adapter(), 3, True)
        time.sleep(0.4)

    crowd = Crowd()
    for act in (learn, choose, forget, deep, lambda _: sona.maybe_background(), lambda _: sona.sync()):
        crowd.add(act)
    crowd.add(lambda _: (sona.audit(), sona.choices(), time.sleep(0.02)))
    sona.start()
    try:
        crowd.run()
    finally:
        sona.stop()
    assert sona.stats().events == 40 + count[0]
    sona.maybe_background()
    while sona.stats().consolidating:
        sona.maybe_background()
    now, choices = essence(sona), sona.choices()
    sona.close()
    with closing(SonaLoop.open(tmp_path / "d", journal=journal)) as again:
        assert essence(again) == now
        assert again.choices() == choices


def in_child(act):
    """Runs in a forked child that may take ten seconds; returns its exit code."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            signal.alarm(10)
            act()
            code = 0
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_a_fork_finds_no_lock_held(monkeypatch):
    # CPython leaves the lock of a file that another thread was writing held in the child: no handler here.
    monkeypatch.setattr(logging.getLogger("microlora"), "propagate", False)
    monkeypatch.setattr(logging.getLogger("microlora"), "handlers", [logging.NullHandler()])
    sona = core_loop(background_interval_ms=0.1, max_ms=0.05)
    feed(sona, targets(300))
    crowd = Crowd()
    r = rng(7)
    crowd.add(lambda _: sona.instant_adapt(*level(r)))
    looks = (sona.evaluate, sona.stats, sona.to_bytes, lambda: sona.samples(False), sona.consolidated)
    for look in looks:
        crowd.add(lambda _, look=look: look())
    results = []

    def child():
        before = sona.stats().events
        assert not sona.running
        feed(sona, targets(5))
        assert sona.stats().events == before + 5
        assert np.isfinite(sona.forward(normal(rng(8), 3, WIDTH), "q_proj")).all()
        while sona.maybe_background(force=True).outcome == "goes_on":
            pass
        sona.evaluate()
        sona.to_bytes()
        with sona:
            assert sona.running
            feed(sona, targets(20))
            # A child of the child.
            assert in_child(lambda: (feed(sona, targets(2)), sona.evaluate())) == 0

    def fork(_):
        results.append(in_child(child))
        time.sleep(0.005)

    crowd.add(fork)
    with sona:
        crowd.run()
        assert sona.running
    assert len(results) > 1
    assert not any(results), results
    feed(sona, targets(20))
    assert sona.maybe_background(force=True) is not None


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_a_fork_leaves_the_parents_journal_alone(tmp_path):
    journal = JournalConfig(segment_bytes=16384)
    sona = SonaLoop.open(tmp_path / "d", core_config(background_interval_ms=0.1), journal=journal)
    sona.start()
    for i in range(10):
        feed(sona, targets(20, i))

        def child():
            with pytest.raises((OSError, ml.exceptions.MicroLoraError)):
                feed(sona, targets(5))
            sona.forward(np.ones(WIDTH, np.float32), "q_proj")

        assert in_child(child) == 0
    sona.stop()
    kept, n = digest(sona), sona.stats().events
    assert n == 200
    sona.close()
    with closing(SonaLoop.open(tmp_path / "d", journal=journal)) as again:
        assert again.opened.warnings == ()
        assert (digest(again), again.stats().events) == (kept, n)


def test_a_result_says_what_the_next_forward_sees():
    """A writer that reads its own write sees it, whatever the background does."""
    sona = core_loop(
        target_modules=("q_proj",), rank=WIDTH, background_interval_ms=0.1, max_ms=0.05, holdout=0.0
    )
    r = rng(1)
    with sona:
        for _ in range(300):
            x, feedback = level(r)
            result = sona.instant_adapt(x, feedback)
            assert result.applied
            assert sona.version >= result.version
            one_version(sona.forward(x))
