"""The thread of a loop, and one thread for many: start, stop, failures, forks, the end of the process."""

import gc
import logging
import threading
import time
import weakref

import pytest

import microlora as ml
from microlora import exceptions as ex
from microlora.sona import Background, background
from sona_support import feed, loop
from support import run_python


def wait(what, seconds=20):
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "it never came to it"
        time.sleep(0.002)


def threads():
    return [t for t in threading.enumerate() if t.name == "microlora-sona"]


def test_a_started_loop_consolidates_by_itself():
    heard = []
    sona = loop()
    sona.on_event = lambda result: heard.append((result.loop_type, threading.current_thread().name))
    with sona as same:
        assert same is sona
        assert sona.running
        assert sona.start() is sona
        assert len(threads()) == 1
        feed(sona, 60)
        wait(lambda: sona.stats().background_count >= 1)
    assert not sona.running
    assert threads() == []
    assert ("background", "microlora-sona") in heard
    count = sona.stats().background_count
    feed(sona, 60)
    time.sleep(0.02)
    assert sona.stats().background_count == count
    sona.stop()
    sona.start()
    wait(lambda: sona.stats().background_count > count)
    sona.stop()


def test_one_thread_serves_many_loops():
    loops = [loop(seed=i) for i in range(5)]
    served = Background(*loops[:4], interval_ms=1.0)
    served.add(loops[4])
    served.add(loops[4])
    assert served.loops == tuple(loops)
    assert repr(served) == "Background(5 loops, not running)"
    with served:
        assert len(threads()) == 1
        for sona in loops:
            feed(sona, 60)
        wait(lambda: all(sona.stats().background_count for sona in loops))
        served.remove(loops[0])
        served.remove(loops[0])
        time.sleep(0.01)
        before = loops[0].stats().background_count
        feed(loops[0], 60)
        feed(loops[1], 60, seed=1)
        wait(lambda: loops[1].stats().pending_samples == 0)
        assert loops[0].stats().background_count == before
    assert not served.running
    assert threads() == []


def test_a_loop_added_later_wakes_a_thread_that_had_none():
    sona = loop()
    feed(sona, 60)
    with Background() as served:
        time.sleep(0.01)
        served.add(sona)
        wait(lambda: sona.stats().background_count == 1)


def test_the_thread_holds_neither_loop_nor_owner():
    sona = loop()
    sona.start()
    feed(sona, 60)
    ref = weakref.ref(sona)
    del sona
    wait(lambda: gc.collect() is not None and ref() is None)
    wait(lambda: threads() == [])
    served = Background(kept := loop(), interval_ms=1.0)
    served.start()
    del served
    wait(lambda: threads() == [])
    assert kept.stats().background_count == 0


class Fails:
    """A loop whose consolidations fail."""

    def __init__(self, times):
        self.times, self.calls = times, 0
        self.config = loop().config

    def maybe_background(self):
        self.calls += 1
        if self.calls <= self.times:
            raise OSError("disk")

    def __repr__(self):
        return "Fails()"


def test_a_failing_loop_is_logged_left_alone_for_a_while_and_stops_no_other(caplog):
    bad, good = Fails(3), loop()
    feed(good, 60)
    with caplog.at_level(logging.ERROR, "microlora.sona.background"), Background(bad, good, interval_ms=1.0):
        wait(lambda: good.stats().background_count == 1)
        wait(lambda: bad.calls >= 5)
    told = [r for r in caplog.records if "Fails()" in r.getMessage()]
    assert len(told) == 3
    assert "disk" in told[0].exc_text
    waits = [float(r.getMessage().split()[-2]) for r in told]
    assert waits == sorted(waits)


def test_the_pause_after_a_failure_doubles_and_ends_with_a_success(monkeypatch):
    now = [1000.0]
    monkeypatch.setattr("microlora.sona.background.time.monotonic", lambda: now[0])
    bad, failures = Fails(2), {}
    state = background._State([weakref.ref(bad)], 100.0)

    def calls_at(when):
        now[0] = when
        background._round(state, failures)
        return bad.calls

    assert calls_at(1000.0) == 1
    assert calls_at(1000.1) == 1
    assert calls_at(1000.21) == 2
    assert calls_at(1000.6) == 2
    assert calls_at(1000.62) == 3
    assert failures == {}
    assert calls_at(1000.62) == 4


def test_what_goes_on_is_called_again_at_once():
    class Long(Fails):
        def maybe_background(self):
            self.calls += 1
            return type("R", (), {"outcome": "goes_on" if self.calls < 6 else "accepted"})()

    long = Long(0)
    start = time.monotonic()
    with Background(long, interval_ms=60_000.0):
        wait(lambda: long.calls == 6)
        time.sleep(0.02)
    assert long.calls == 6
    assert time.monotonic() - start < 30


@pytest.mark.parametrize("interval", [0, -1.0, float("nan"), "fast", True])
def test_bad_intervals(interval):
    with pytest.raises(ex.ConfigError, match="interval_ms"):
        Background(interval_ms=interval)


def test_only_loops_are_visited():
    with pytest.raises(ex.DTypeError, match="loop: got int"):
        Background(3)


def test_stopping_from_within_a_hook_does_not_wait_for_itself():
    sona = loop()
    sona.on_event = lambda result: sona.stop() if result.loop_type == "background" else None
    sona.start()
    feed(sona, 60)
    wait(lambda: not sona.running)
    wait(lambda: threads() == [])


SETUP = """
import os, sys, time
import microlora as ml
from sona_support import feed, loop
sona = loop()
"""


def test_the_process_ends_with_the_thread_running_and_stops_it_first():
    # What was registered before our room runs after it.
    first = "import atexit\natexit.register(lambda: print('running', sona.running))\n"
    out = run_python(first + SETUP + "sona.start(); feed(sona, 60); print('end', sona.running)")
    assert out.split() == ["end", "True", "running", "False"]


def test_a_fork_with_the_thread_running():
    code = """
sona.start()
for turn in range(8):
    feed(sona, 30, seed=turn)
    pid = os.fork()
    if pid == 0:
        try:
            assert not sona.running
            before = sona.stats().background_count
            feed(sona, 60, seed=50)
            assert sona.maybe_background(force=True) is not None
            sona.start()
            assert sona.running
            feed(sona, 60, seed=51)
            end = time.monotonic() + 20
            while sona.stats().background_count < before + 2:
                assert time.monotonic() < end
                time.sleep(0.005)
            sona.stop()
        except BaseException as error:
            sys.stderr.write(repr(error))
            os._exit(1)
        os._exit(0)
    end = time.monotonic() + 40
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            break
        assert time.monotonic() < end, "the child hangs"
        time.sleep(0.005)
    assert status == 0, status
    assert sona.running
feed(sona, 60, seed=60)
end = time.monotonic() + 20
while sona.stats().pending_samples:
    assert time.monotonic() < end
    time.sleep(0.005)
sona.stop()
print("ok")
"""
    assert "ok" in run_python(SETUP + code)


def test_a_fork_pauses_every_loop_and_resumes_it_on_both_sides(monkeypatch):
    import os

    calls = []
    sona = loop()
    monkeypatch.setattr(type(sona), "pause", lambda self: self is sona and calls.append("pause"))
    monkeypatch.setattr(type(sona), "resume", lambda self, child: self is sona and calls.append("resume"))
    pid = os.fork()
    if pid == 0:
        os._exit(calls != ["pause", "resume"])
    _, status = os.waitpid(pid, 0)
    assert status == 0
    assert calls == ["pause", "resume"]


def test_locks_that_other_threads_hold_do_not_block_the_child():
    code = """
locks = sona._deep_lock, sona._install_lock, sona._background._lock
assert all(lock.acquire() for lock in locks)
pid = os.fork()
if pid == 0:
    feed(sona, 60)
    sona.start()
    sona.stop()
    os._exit(not sona.deep_optimize().training.total_steps)
assert os.waitpid(pid, 0)[1] == 0
for lock in locks:
    lock.release()
print("ok")
"""
    assert "ok" in run_python(SETUP + code, timeout=40)


def test_subscribers_hear_of_what_the_thread_accepted():
    sona, heard = loop(), []
    sona.manager.subscribe(lambda old, new: heard.append((old, new)))
    with sona:
        feed(sona, 60)
        wait(lambda: heard)
    assert heard[0] == (1, 2)
    assert isinstance(sona.manager.active, ml.Adapter)


def test_force_waits_for_the_warm_up_alone():
    sona = loop(warmup_inputs=64, background_interval_ms=1e6)
    assert not sona.visited
    feed(sona, 50)
    assert sona.maybe_background(force=True) is None
    assert sona.visited
    assert sona.stats().warmup_left == 64 - 45
    feed(sona, 30, seed=1)
    assert sona.maybe_background() is not None  # the warm-up is due whatever the interval
    assert sona.maybe_background(force=True) is not None or sona.stats().background_count == 1
