"""After a fork nothing hangs, and Ctrl-C stops long calls."""

import os
import signal
import subprocess
import sys
import time

import pytest

from support import TESTS, run_python

SETUP = """
import os, sys, signal, threading, time
import numpy as np
import microlora as ml
from support import make, normal, rng
if hasattr(ml, "set_num_threads"):
    ml.set_num_threads(2)
lora = make(512, 512, 16)
x = normal(rng(), 2000, 512)
want = lora.forward(x, "m")
"""

WAIT = """
def wait(pids, seconds=40):
    end = time.monotonic() + seconds
    while pids and time.monotonic() < end:
        for pid in list(pids):
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                assert status == 0, status
                pids.remove(pid)
        time.sleep(0.01)
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    assert not pids, "a child hangs"
"""

CHILD = """
def child():
    assert (lora.forward(x, "m") == want).all()
    t = ml.Target(np.ones(512, np.float32))
    assert lora.instant(x[0], t, "m").applied
    lora.adapt(x[1], t, "m")
    assert lora.apply_updates(0.01) == 1
    lora.restore(lora.snapshot())
    other = make(64, 64, 8, learned=False)
    other.fit_input_basis(normal(rng(), 700, 64), "m")
    assert np.isfinite(lora.forward(x, "m")).all()
"""

FORK = """
def fork():
    pid = os.fork()
    if pid == 0:
        try:
            child()
        except BaseException as e:
            sys.stderr.write(repr(e))
            os._exit(1)
        os._exit(0)
    return pid
"""


def test_a_child_reads_and_learns_after_a_fork():
    run_python(SETUP + WAIT + CHILD + FORK + "wait([fork() for _ in range(4)])\nchild()\n")


def test_a_child_of_a_busy_parent_does_not_hang():
    """Forked while other threads are inside batches that have let go of the GIL."""
    run_python(
        SETUP
        + WAIT
        + CHILD
        + FORK
        + """
import warnings
warnings.simplefilter("ignore", DeprecationWarning)  # newer Pythons warn of a fork beside threads
stop = threading.Event()
def read():
    while not stop.is_set():
        lora.forward(x, "m")
threads = [threading.Thread(target=read) for _ in range(3)]
for t in threads: t.start()
pids = []
for _ in range(10):
    pids.append(fork())
    time.sleep(0.01)
stop.set()
for t in threads: t.join(60)
wait(pids)
"""
    )


LONG = {
    "forward": "lora.forward(x, 'm')",
    "forward into out": "lora.forward(x, 'm', out)",
    "input basis": "make(1024, 64, 32, learned=False).fit_input_basis(x, 'm')",
}


@pytest.mark.parametrize("call", LONG)
def test_ctrl_c_stops_a_long_call(call):
    """The call would go on for many seconds; the signal comes while it runs and must end it soon."""
    code = f"""
import numpy as np, signal, sys, time
from support import make
# A shell that runs the tests in the background hands its children an ignored SIGINT.
signal.signal(signal.SIGINT, signal.default_int_handler)
lora = make(1024, 1024, 256)
x = np.ones((200_000 if "basis" in {call!r} else 60_000, 1024), np.float32)
x[::2] *= 0.5
out = np.empty((len(x), 1024), np.float32)
print("ready", flush=True)
try:
    while True:
        {LONG[call]}
        print("again", flush=True)
except KeyboardInterrupt:
    print("stopped", flush=True)
"""
    env = {**os.environ, "PYTHONPATH": str(TESTS)}
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=env)
    try:
        assert process.stdout.readline() == "ready\n"
        time.sleep(0.3)
        process.send_signal(signal.SIGINT)
        out, _ = process.communicate(timeout=30)
    finally:
        process.kill()
        process.communicate()
    assert out.endswith("stopped\n"), out
    assert process.returncode == 0
