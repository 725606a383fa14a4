"""The asyncio front: the same results, nothing that blocks the event loop, and cancelling without a trace."""

import asyncio
import logging
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

import microlora as ml
from microlora import exceptions as ex
from microlora.sona import AsyncSona
from microlora.training import AdapterTrainingConfig
from sona_support import WIDTH, Words, feed, loop, stream
from support import close


class Gated(Words):
    """An encoder that works as long as it is told to."""

    def __init__(self):
        super().__init__()
        self.inside, self.go, self.thread = threading.Event(), threading.Event(), None

    def encode(self, texts):
        self.thread = threading.current_thread()
        self.inside.set()
        assert self.go.wait(20)
        return super().encode(texts)


async def until(what, seconds=20):
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "it never came to it"
        await asyncio.sleep(0.002)


def test_vectors_learn_and_are_read_as_without_it():
    async def run():
        x, t = stream(40)
        plain, front = loop(), AsyncSona(loop())
        for row, target in zip(x, t, strict=True):
            a = plain.instant_adapt(row, ml.Target(target), 0.9)
            b = await front.instant_adapt(row, ml.Target(target), 0.9)
            assert (a.applied, a.loss_after) == (b.applied, b.loss_after)
        close(await front.forward(x[0]), plain.forward(x[0]), rtol=0)
        close(await front.forward(x, "q_proj"), plain.forward(x), rtol=0)
        result = await front.maybe_background(force=True)
        assert result.loop_type == "background"
        assert front.stats().background_count == 1
        assert await front.maybe_background() is None

    asyncio.run(run())


def test_an_encoder_works_beside_the_event_loop():
    async def run():
        words = Gated()
        front = AsyncSona(loop(encoder=words))
        task = asyncio.create_task(front.instant_adapt("how?", "so", 0.8))
        await until(words.inside.is_set)
        assert words.thread is not threading.main_thread()
        assert (await front.forward(np.ones(WIDTH, np.float32))).shape == (WIDTH,)
        words.go.set()
        assert (await task).applied
        assert (await front.embed(["how?", "what?"])).shape == (2, WIDTH)

    asyncio.run(run())


def test_text_and_vector_teach_the_same():
    async def run():
        plain, front = loop(encoder=Words()), AsyncSona(loop(encoder=Words()))
        for quality in (0.9, 0.1, 0.6):
            a = plain.instant_adapt("how?", "so", quality)
            b = await front.instant_adapt("how?", "so", quality)
            assert (a.applied, a.loss_after) == (b.applied, b.loss_after)
        for name in ("instant_count", "instant_applied", "accumulated_quality", "version"):
            assert getattr(plain.stats(), name) == getattr(front.stats(), name)
        with pytest.raises(ex.ConfigError, match="base: got one with a text"):
            await front.instant_adapt("how?", "so", 0.5, base=np.ones(WIDTH, np.float32))
        with pytest.raises(ex.NonFiniteError):
            await front.instant_adapt("how?", "so", float("nan"))

    asyncio.run(run())


def test_cancelling_while_a_text_is_encoded_learns_and_counts_nothing():
    async def run():
        words = Gated()
        sona = loop(encoder=words)
        front = AsyncSona(sona)
        task = asyncio.create_task(front.instant_adapt("how?", "so", 0.8))
        await until(words.inside.is_set)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        words.go.set()
        await until(lambda: len(words.asked) == 2)
        await asyncio.sleep(0.01)
        assert (sona.stats().instant_count, sona.lora.version) == (0, 0)
        assert (await front.instant_adapt("how?", "so", 0.8)).applied
        assert sona.stats().instant_count == 1

    asyncio.run(run())


def test_an_encoder_that_raises_after_cancelling_is_nobodys_trouble():
    class Raises(Gated):
        def encode(self, texts):
            super().encode(texts)
            raise OSError("gone")

    troubles = []

    async def run():
        asyncio.get_running_loop().set_exception_handler(lambda _, context: troubles.append(context))
        words = Raises()
        front = AsyncSona(loop(encoder=words))
        task = asyncio.create_task(front.instant_adapt("how?", "so", 0.8))
        await until(words.inside.is_set)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        words.go.set()
        await until(lambda: len(words.asked) == 2)
        await asyncio.sleep(0.02)

    asyncio.run(run())
    assert troubles == []


def test_the_task_consolidates_and_ends_with_the_block():
    async def run():
        sona = loop()
        async with AsyncSona(sona) as front:
            assert front.running
            front.start()
            feed(sona, 60)
            await until(lambda: sona.stats().background_count >= 1)
            assert "running" in repr(front)
        assert not front.running
        count = sona.stats().background_count
        feed(sona, 60, seed=1)
        await asyncio.sleep(0.02)
        assert sona.stats().background_count == count
        await front.stop()
        front.start()
        await until(lambda: sona.stats().background_count > count)
        await front.stop()
        assert [t for t in asyncio.all_tasks() if t.get_name() == "microlora-sona"] == []

    asyncio.run(run())


def test_the_task_outlives_a_consolidation_that_fails(monkeypatch, caplog):
    sona = loop()
    calls = []

    def fails(force=False):
        calls.append(threading.current_thread())
        if len(calls) <= 2:
            raise OSError("disk")

    monkeypatch.setattr(sona, "maybe_background", fails)

    async def run():
        async with AsyncSona(sona):
            await until(lambda: len(calls) >= 4)

    with caplog.at_level(logging.ERROR, "microlora.sona.background"):
        asyncio.run(run())
    assert len([r for r in caplog.records if "consolidation failed" in r.getMessage()]) == 2
    assert threading.main_thread() not in calls


def test_stopping_waits_for_what_is_under_way(monkeypatch):
    sona = loop()
    inside, go, over = threading.Event(), threading.Event(), []

    def works(force=False):
        inside.set()
        assert go.wait(20)
        over.append(True)

    monkeypatch.setattr(sona, "maybe_background", works)

    async def run():
        front = AsyncSona(sona)
        front.start()
        await until(inside.is_set)
        stopping = asyncio.create_task(front.stop())
        await asyncio.sleep(0.02)
        assert not stopping.done()
        go.set()
        await stopping
        assert over == [True]

    asyncio.run(run())


def test_cancelling_a_deep_run_stops_it_and_changes_nothing():
    async def run():
        sona = loop(training=AdapterTrainingConfig(epochs=2000, early_stopping_patience=0))
        feed(sona, 200)
        sona.maybe_background(force=True)
        before = sona.lora.version, sona.manager.generation
        front = AsyncSona(sona)
        begun = threading.Event()
        task = asyncio.create_task(front.deep_optimize(progress=lambda *_: begun.set()))
        await until(begun.is_set)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert (sona.lora.version, sona.manager.generation) == before
        assert not sona._deep_lock.locked()

    asyncio.run(run())


def test_a_deep_run_comes_back_with_its_result():
    async def run():
        sona = loop(training=AdapterTrainingConfig(epochs=1))
        feed(sona, 100)
        x, t = stream(50, 3)
        result = await AsyncSona(sona).deep_optimize((x, t), cancel=None)
        assert result.loop_type == "deep"
        with pytest.raises(ex.ConfigError, match="distill"):
            await AsyncSona(sona).deep_optimize(distill=True)

    asyncio.run(run())


def test_an_executor_of_ones_own():
    with ThreadPoolExecutor(1, thread_name_prefix="mine") as executor:

        async def run():
            words = Gated()
            words.go.set()
            await AsyncSona(loop(encoder=words), executor).instant_adapt("how?", "so", 0.8)
            return words.thread.name

        assert asyncio.run(run()).startswith("mine")


def test_only_loops_have_a_front():
    with pytest.raises(ex.DTypeError, match="sona: got int"):
        AsyncSona(3)
