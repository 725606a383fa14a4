"""Eight readers, a swapper and a learner: every result is one generation's, and torn reads are caught."""

import ctypes
import gc
import os
import sys
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest

import microlora as ml
from microlora.exceptions import SwapError
from support import make, normal, rng

N, RANK, ROWS = 256, 16, 512  # enough work per batch to let go of the GIL
MODULES = ("q_proj", "v_proj")
READERS = 8
SECONDS = 10.0 if os.environ.get("MICROLORA_TEST_PROFILE") == "slow" else 1.0
X = normal(rng(6), ROWS, N)


def answer(y):
    """A whole batch as one number."""
    return hash(y.tobytes())


def answers(lora):
    """What a version says to X, module by module."""
    return tuple(answer(lora.forward(X, m)) for m in MODULES)


def versions(count=8):
    """Versions of other A and B; ranks differ in ``adapter``, for the torn managers they are equal."""
    return [make(N, rank=RANK, seed=2 * i, names=MODULES).adapter() for i in range(count)]


class Real:
    """The manager, read through pins and handles."""

    def __init__(self, first):
        self.manager = ml.HotSwapManager(first)
        self.handles = [self.manager[m] for m in MODULES]

    def read(self, way):
        if way % 3 == 0:
            with self.manager.pin() as pinned:
                return pinned.number, tuple(answer(pinned.forward(X, m)) for m in MODULES)
        if way % 3 == 1:
            ys = self.manager.forward_all(X, MODULES)
            return None, tuple(answer(ys[m]) for m in MODULES)
        return None, (answer(self.handles[way % 2].forward(X)),)

    def change(self, adapter, answers, step, log):
        """A swap, or now and then a rollback; says in ``log`` what the new generation answers."""
        if step % 5 == 4:
            try:
                number = self.manager.rollback()
            except SwapError:  # right after another rollback
                return
            log[number] = number - 2  # what the generation before the last one answered
            return
        self.manager.prepare_standby(adapter, background=step % 2 == 0).result(30)
        log[self.manager.swap()] = answers

    def learn(self, step, known, log):
        """Learns in private, publishes if nobody was faster; whether it was published."""
        with self.manager.pin() as pinned:
            number, lora = pinned.number, ml.MicroLoRA(pinned.adapter)
        r = rng(step)
        for m in MODULES:
            lora.instant(normal(r, N), ml.Target(normal(r, N)), m)
        said = answers(lora)
        known.update([said, *((s,) for s in said)])
        try:
            new = self.manager.compare_and_swap(number, lora)
        except SwapError as e:
            faster = e.generation
        else:
            assert new == number + 1
            log[new] = said
            return True
        assert faster > number
        return False


class Torn:
    """The planted mistakes: B after A, or one module after the other, with readers in between."""

    def __init__(self, first, by_factor):
        self.layers = {m: [first.lora_a(m), first.lora_b(m)] for m in MODULES}
        self.first, self.by_factor = first, by_factor

    def read(self, way):
        out = []
        for m in MODULES:
            a, b = self.layers[m]
            one = ml.Adapter.from_factors({m: (a, b)}, alpha=self.first.info(m).alpha)
            out.append(answer(ml.MicroLoRA(one).forward(X)))
            time.sleep(0)
        return None, tuple(out)

    def change(self, adapter, answers, step, log):
        steps = [(m, f) for m in MODULES for f in (0, 1)]
        steps.sort(key=lambda s: s[1] if self.by_factor else 0)
        for i, (m, f) in enumerate(steps):
            if i == 2:
                time.sleep(0.002)
            self.layers[m][f] = (adapter.lora_a, adapter.lora_b)[f](m)

    def learn(self, step, known, log):
        return False


def under_load(served, adapters, seconds):
    """Reads, changes and learning at once; counts what was seen and what was wrong."""
    said = [answers(ml.MicroLoRA(a)) for a in adapters]
    known = {s for pair in said for s in (pair, (pair[0],), (pair[1],))}
    log, stop = {1: said[0]}, threading.Event()
    seen = [SimpleNamespace(reads=0, torn=0, backwards=0, numbered=[]) for _ in range(READERS)]
    count, failed = SimpleNamespace(changes=0, learned=0), []

    def read(i):
        mine, last, way = seen[i], 0, i
        while not stop.is_set():
            number, pair = served.read(way)
            mine.torn += pair not in known
            if number is not None:
                mine.backwards += number < last
                last = number
                mine.numbered.append((number, pair))
            mine.reads += 1
            way += 1

    def swap():
        step = 0
        while not stop.is_set():
            i = step * 5 % len(adapters)
            served.change(adapters[i], said[i], step, log)
            count.changes += 1
            step += 1
            # Now and then long enough for a learner that works among eight readers to be the faster one.
            end, before = time.monotonic() + (0.0005 if step % 8 else 0.1), count.learned
            while count.learned == before and time.monotonic() < end:
                time.sleep(0.0005)

    def learn():
        step = 0
        while not stop.is_set():
            count.learned += served.learn(step, known, log)
            step += 1
            time.sleep(0.0005)

    def guarded(work, *args):
        try:
            work(*args)
        except BaseException as e:
            failed.append(e)

    threads = [threading.Thread(target=guarded, args=(read, i)) for i in range(READERS)]
    threads += [threading.Thread(target=guarded, args=(w,)) for w in (swap, learn)]
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-4)
    try:
        for t in threads:
            t.start()
        time.sleep(seconds)
    finally:
        stop.set()
        for t in threads:
            t.join(60)
        sys.setswitchinterval(before)
    assert not any(t.is_alive() for t in threads)
    assert not failed, failed

    def of(number):
        while isinstance(log[number], int):
            number = log[number]
        return log[number]

    wrong = sum(pair != of(number) for s in seen for number, pair in s.numbered)
    return SimpleNamespace(
        reads=sum(s.reads for s in seen),
        torn=sum(s.torn for s in seen) + wrong,
        backwards=sum(s.backwards for s in seen),
        pinned={number for s in seen for number, _ in s.numbered},
        **vars(count),
    )


def resident():
    if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):  # what the allocator keeps for later is no leak
        libc.malloc_trim(0)
    with open("/proc/self/statm") as f:
        return int(f.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_every_result_is_exactly_one_generations_and_memory_returns():
    adapters = versions()
    under_load(Real(adapters[0]), adapters, 0.2)  # stacks and caches of the allocator are there then
    gc.collect()
    before, real = resident(), Real(adapters[0])
    found = under_load(real, adapters, SECONDS)
    assert found.torn == 0, f"{found.torn} of {found.reads} reads were no one generation's"
    assert found.backwards == 0
    assert found.reads >= 5 * READERS
    assert found.changes >= 10, found.changes
    assert found.learned >= 3, found.learned
    assert len(found.pinned) >= 3
    manager = real.manager
    assert manager.is_swapping is False
    assert manager.generation > found.changes // 2
    assert manager.live_generations <= 2
    manager.forget_previous()
    assert manager.live_generations == 1
    gc.collect()
    assert resident() - before < 16 << 20


def test_memory_stays_far_below_what_was_swapped():
    """64 generations of 4 MiB, of which none is another's, while others read them."""
    a, b = np.ones((1, 2**19), np.float32), np.ones((2**19, 1), np.float32)

    def heavy():
        return ml.Adapter.from_factors({"m": (a[:, :8], b[:8]), "big": (a, b)}, alpha=1.0)

    manager, stop = ml.HotSwapManager(heavy()), threading.Event()

    def read():
        while not stop.is_set():
            with manager.pin() as pinned:
                pinned.forward(np.ones(8, np.float32), "m")
            time.sleep(0.0005)

    threads = [threading.Thread(target=read) for _ in range(READERS)]
    for t in threads:
        t.start()
    try:
        manager.set_active(heavy())  # there are two from now on: the active one and the one before
        before, swapped = resident(), 0
        for _ in range(64):
            value = heavy()
            swapped += value.memory_bytes
            manager.set_active(value)
            del value
    finally:
        stop.set()
        for t in threads:
            t.join(60)
    assert manager.live_generations <= 2
    gc.collect()
    assert resident() - before < swapped // 10


@pytest.mark.parametrize("by_factor", [True, False])
def test_torn_reads_are_caught_by_the_same_checker(by_factor):
    adapters = versions()
    found = under_load(Torn(adapters[0], by_factor), adapters, 1.0)
    assert found.torn > 0, f"unseen in {found.reads} reads and {found.changes} changes"


def test_many_learners_lose_no_step():
    """Each adds its own part to B; after all of them B is the sum, whoever was faster."""
    manager = ml.HotSwapManager(make(16, rank=4, names=("m",), learned=False, alpha=4.0))
    a = manager.active.lora_a("m")

    def learn(i):
        for _ in range(20):
            while True:
                with manager.pin() as pinned:
                    b = pinned.adapter.lora_b("m").copy()
                    b[i] += 1
                    value = ml.Adapter.from_factors({"m": (a, b)}, alpha=4.0)
                    try:
                        manager.compare_and_swap(pinned.number, value)
                        break
                    except SwapError:
                        continue

    threads = [threading.Thread(target=learn, args=(i,)) for i in range(8)]
    for t in threads:
        t.start()
    for t in threads:
        t.join(60)
    want = np.zeros((16, 4), np.float32)
    want[:8] = 20
    np.testing.assert_array_equal(manager.active.lora_b("m"), want)
    assert manager.generation == 1 + 8 * 20


def test_swaps_from_many_threads_are_numbered_one_by_one():
    manager, told = ml.HotSwapManager(make(16, rank=4, names=("m",))), []
    value = manager.active
    manager.subscribe(lambda old, new: told.append((old, new)))

    def change(i):
        for _ in range(50):
            manager.set_active(value)

    threads = [threading.Thread(target=change, args=(i,)) for i in range(8)]
    for t in threads:
        t.start()
    for t in threads:
        t.join(60)
    assert manager.generation == 401
    assert sorted(told) == [(n, n + 1) for n in range(1, 401)]
