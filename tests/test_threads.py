"""Many threads read while one learns: every batch is one whole version."""

import sys
import threading
import time

import numpy as np
import pytest

import microlora as ml
from support import close, make, normal, rng, set_weights

N, RANK, ROWS = 256, 16, 512  # enough work per batch to let go of the GIL
VERSIONS = 40


class TornLora:
    """The planted mistake: B is rewritten row by row while readers read it."""

    def __init__(self, lora):
        self.a, self.b, self.s = lora["m"].lora_a.copy(), lora["m"].lora_b.copy(), lora["m"].scaling

    def forward(self, x):
        half = len(self.b) // 2
        u = self.s * x @ self.a.T
        first = u @ self.b[:half].T
        return np.hstack([first, u @ self.b[half:].T])

    def move_to(self, b):
        for i, row in enumerate(b):
            self.b[i] = row
            if i % 16 == 0:
                time.sleep(0)


class Whole:
    """The learner with the same two methods."""

    def __init__(self, lora):
        self.lora = lora

    def forward(self, x):
        return self.lora.forward(x, "m")

    def move_to(self, value):
        self.lora.restore(value)


def check_whole_versions(reader, writer, versions, x, want, readers=4):
    """Readers run batches while the writer changes versions; every result must be one of ``want``."""
    stop, torn, seen = threading.Event(), [], [0] * readers
    sums = np.stack([w.sum(0, dtype=np.float64) for w in want])
    scale = np.abs(sums).max()

    def read(i):
        while not stop.is_set():
            y = reader.forward(x)
            error = np.abs(sums - y.sum(0, dtype=np.float64)).max(1).min()
            seen[i] += 1
            if error > 1e-4 * scale:
                torn.append(error / scale)

    threads = [threading.Thread(target=read, args=(i,)) for i in range(readers)]
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        for t in threads:
            t.start()
        end = time.monotonic() + 20
        while (min(seen) < 25) and time.monotonic() < end:
            for v in versions:
                writer.move_to(v)
    finally:
        stop.set()
        for t in threads:
            t.join(60)
        sys.setswitchinterval(before)
    assert not any(t.is_alive() for t in threads)
    assert min(seen) >= 25, seen
    assert not torn, f"{len(torn)} of {sum(seen)} batches mixed two versions"


def versions_of(lora):
    """Well separated versions: B is k times a pattern of its own."""
    r = rng(5)
    out = []
    for _ in range(VERSIONS):
        set_weights(lora, {"m": (lora["m"].lora_a, normal(r, N, RANK))})
        out.append(lora.adapter())
    return out


@pytest.fixture(scope="module")
def scene():
    lora = make(N, N, RANK)
    versions = versions_of(lora)
    x = normal(rng(6), ROWS, N)
    return lora, versions, x, [ml.MicroLoRA(v).forward(x) for v in versions]


def test_every_batch_is_one_whole_version(scene):
    lora, versions, x, want = scene
    whole = Whole(lora)
    check_whole_versions(whole, whole, versions, x, want)


def test_a_torn_version_is_caught_by_the_same_check(scene):
    lora, versions, x, want = scene
    torn = TornLora(lora)
    with pytest.raises(AssertionError, match="mixed two versions"):
        check_whole_versions(torn, torn, [v.lora_b("m") for v in versions], x, want)


@pytest.mark.parametrize("rows", [1, ROWS])
@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_readers_see_only_versions_that_were_learned(rows, dtype):
    """One thread learns with every rule; what readers saw is found again among the recorded versions."""
    lora = make(N, N, RANK, learned=False, dtype=dtype)
    r = rng(7)
    probe = normal(r, rows, N)
    x = probe[0] if rows == 1 else probe
    recorded, seen, stop = [], [], threading.Event()

    def read():
        mine = []
        while not stop.is_set():
            y = lora.forward(x, "m")
            mine.append(y if y.ndim == 1 else y[[0, 1, -2, -1]])
        seen.extend(mine[:: max(1, len(mine) // 40)])

    threads = [threading.Thread(target=read) for _ in range(3)]
    for t in threads:
        t.start()
    for i in range(120):
        recorded.append(lora.adapter())
        if i % 3 == 2:
            lora.adapt(normal(r, N), ml.Target(normal(r, N)), "m")
            lora.apply_updates(1e-3)
        else:
            lora.instant(normal(r, N), ml.Target(normal(r, N)), "m")
        time.sleep(0)
    recorded.append(lora.adapter())
    stop.set()
    for t in threads:
        t.join(60)
    assert seen
    few = x if rows == 1 else np.ascontiguousarray(x[[0, 1, -2, -1]])
    want = np.stack([ml.MicroLoRA(v).forward(few, "m") for v in recorded]).astype(np.float64)
    scale = np.abs(want).max()
    for y in seen:
        assert np.abs(want - y).reshape(len(want), -1).max(1).min() <= 1e-6 * scale


def test_snapshots_taken_while_another_thread_learns_are_of_one_version():
    """Weights and RLS state fit together: going on from a snapshot gives what the learner itself did next."""
    lora = make(64, 32, 8, learned=False)
    r = rng(8)
    x, t = normal(r, 64), [ml.Target(normal(r, 32)) for _ in range(400)]
    taken, done = [], threading.Event()

    def take():
        while not done.is_set():
            taken.append(lora.snapshot())

    thread = threading.Thread(target=take)
    thread.start()
    outputs = []
    for fb in t:
        lora.instant(x, fb, "m")
        outputs.append(lora.forward(x, "m"))
        time.sleep(0)
    done.set()
    thread.join(60)
    fresh = make(64, 32, 8, learned=False)
    for s in taken[:: max(1, len(taken) // 50)]:
        if 0 < s.version < len(t):
            fresh.restore(s)
            np.testing.assert_array_equal(fresh.forward(x, "m"), outputs[s.version - 1])
            fresh.instant(x, t[s.version], "m")
            np.testing.assert_array_equal(fresh.forward(x, "m"), outputs[s.version])


def test_an_input_basis_fitted_while_others_read_and_learn():
    """The long part runs without the lock, and starts again where somebody learned meanwhile."""
    lora, r = make(128, 32, 8, names=("a", "b"), learned=False), rng(9)
    inputs = normal(r, 400, 128)
    stop = threading.Event()

    def learn():
        while not stop.is_set():
            lora.instant(normal(rng(1), 128), ml.Target(np.ones(32, np.float32)), "b")
            lora.forward(inputs, "b")

    thread = threading.Thread(target=learn)
    thread.start()
    held = lora.fit_input_basis(inputs, "a")
    stop.set()
    thread.join(60)
    alone = make(128, 32, 8, names=("a", "b"), learned=False)
    assert alone.fit_input_basis(inputs, "a") == pytest.approx(held, rel=1e-6)
    close(lora["a"].lora_a, alone["a"].lora_a, 1e-5)


def test_many_threads_may_learn_too():
    """Adapt from eight threads: sums in any order are the same sums."""
    lora, r = make(32, 16, 4), rng(2)
    events = [(normal(r, 32), ml.Target(normal(r, 16))) for _ in range(400)]
    alone = make(32, 16, 4)
    for x, fb in events:
        alone.adapt(x, fb, "m")

    def work(part):
        for x, fb in part:
            lora.adapt(x, fb, "m")

    threads = [threading.Thread(target=work, args=(events[i::8],)) for i in range(8)]
    for t in threads:
        t.start()
    for t in threads:
        t.join(60)
    assert lora["m"].pending == 400
    assert lora.apply_updates(0.1) == alone.apply_updates(0.1) == 400
    close(lora["m"].lora_b, alone["m"].lora_b, 1e-5)
    close(lora["m"].lora_a, alone["m"].lora_a, 1e-5)
