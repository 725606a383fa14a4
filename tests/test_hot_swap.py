"""The manager by itself: what each call promises, and that a refused one changes nothing."""

import gc
import logging
import os
import threading
import weakref

import numpy as np
import pytest

import microlora as ml
from hot_swap_support import ROWS, N, X, adapter, in_service, state
from microlora import exceptions as ex
from microlora.hot_swap import Generation
from support import DTYPES, close, make, normal, rng, run_python


def delta(value, x, module):
    """float64 twin of a forward."""
    a, b = (f.astype(np.float64) for f in value.factors(module))
    return value.info(module).scaling * (x.astype(np.float64) @ a.T) @ b.T


@pytest.fixture
def manager():
    return in_service()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("use_rslora", [False, True])
def test_reads_are_those_of_the_float64_twin(dtype, use_rslora):
    value = adapter(3, rank=7, n_out=40, dtype=dtype, use_rslora=use_rslora)
    m = ml.HotSwapManager(value)
    for x in (X, ROWS):
        for name in value.modules():
            want = delta(value, x, name)
            with m.pin() as pinned:
                ways = [m.forward(x, name), m[name].forward(x), pinned.forward(x, name)]
                ways += [m.forward_all(x, ["v_proj", "q_proj"])[name], m.forward_all(x)[name]]
                ways += [pinned.forward_all(x)[name]]
                for source in (m, pinned):
                    out = np.full(want.shape, 7, np.float32)
                    assert source.forward(x, name, out) is out
                    ways.append(out)
                    base = np.ones(want.shape, np.float32)
                    source.forward_add(x, name, base)
                    ways.append(base - 1)
                base = np.ones(want.shape, np.float32)
                m[name].forward_add(x, base)
                ways.append(base - 1)
            for y in ways:
                close(y, want, 1e-5)


def test_reads_equal_those_of_a_learner_bit_for_bit():
    lora = make(N, 40, 5, names=("q_proj", "v_proj"))
    m = ml.HotSwapManager(lora)
    for x in (X, ROWS):
        np.testing.assert_array_equal(m.forward(x, "q_proj"), lora.forward(x, "q_proj"))
        np.testing.assert_array_equal(m["v_proj"].forward(x), lora["v_proj"].forward(x))
        for name, y in lora.forward_all(x).items():
            np.testing.assert_array_equal(m.forward_all(x)[name], y)


def test_a_handle_serves_every_later_generation():
    values = [
        adapter(1),
        adapter(2, rank=9, alpha=3.0),
        adapter(3, names=("k_proj", "v_proj", "q_proj"), dtype="f16", use_rslora=True),
        adapter(4, names=[f"layers.{i}.up_proj" for i in range(30)] + ["q_proj"]),
    ]
    m = ml.HotSwapManager(values[0])
    q, v = m["q_proj"], m["v_proj"]
    for i, value in enumerate(values):
        assert i == 0 or m.set_active(value) == i + 1
        info = value.info("q_proj")
        assert (q.rank, q.in_features, q.out_features) == (info.rank, info.in_features, info.out_features)
        assert q.scaling == pytest.approx(info.scaling)
        close(q.forward(X), delta(value, X, "q_proj"))
        close(m.forward(X, "q_proj"), delta(value, X, "q_proj"))
        np.testing.assert_array_equal(q.lora_a, value.lora_a("q_proj"))
        np.testing.assert_array_equal(q.lora_b, value.lora_b("q_proj"))
        close(q.delta_weight(), info.scaling * value.lora_b("q_proj").astype("f8") @ value.lora_a("q_proj"))
        assert q.name == "q_proj"
        assert f"generation {i + 1}" in repr(q)
        assert (list(m), len(m), m.modules()) == (value.modules(), len(value.modules()), value.modules())
    for call in (lambda: v.forward(X), lambda: v.forward_add(X, X.copy()), lambda: v.rank, v.delta_weight):
        with pytest.raises(ex.UnknownModuleError, match=r'"v_proj".*the modules of generation 4'):
            call()
    assert "not in it" in repr(v)
    assert "v_proj" not in m
    m.rollback()
    close(v.forward(X), delta(values[2], X, "v_proj"))


def test_an_empty_manager_waits_for_its_first_adapter():
    m = ml.HotSwapManager()
    assert (m.generation, m.active, m.standby, m.previous, m.modules()) == (0, None, None, None, [])
    for call in (lambda: m.forward(X, "q_proj"), lambda: m.forward(X), lambda: m["q_proj"]):
        with pytest.raises(ex.UnknownModuleError, match="generation 0"):
            call()
    with m.pin() as pinned:
        assert (pinned.number, pinned.adapter, pinned.modules()) == (0, None, [])
    m.prepare_standby(adapter(1), background=False)
    assert m.swap() == 1
    with pytest.raises(ex.SwapError, match="no earlier generation"):
        m.rollback()  # generation 0 is nothing to go back to
    assert m.forward(X, "q_proj").shape == (N,)
    assert "no adapter" in repr(ml.HotSwapManager())


def test_the_only_module_needs_no_name():
    m = ml.HotSwapManager(adapter(1, names=("embed",)))
    np.testing.assert_array_equal(m.forward(X), m.forward(X, "embed"))
    np.testing.assert_array_equal(m.pin().forward(X), m.forward(X, "embed"))


def test_a_pin_reads_one_version_for_as_long_as_it_is_held(manager):
    with manager.pin() as pinned:
        assert isinstance(pinned, Generation)
        value = pinned.adapter
        before = pinned.forward(X, "q_proj")
        manager.swap()
        manager.set_active(adapter(9, names=("v_proj",)))
        np.testing.assert_array_equal(pinned.forward(X, "q_proj"), before)
        assert (pinned.number, pinned.adapter, pinned.modules()) == (2, value, ["q_proj", "v_proj"])
        assert manager.live_generations == 3
        assert repr(pinned) == "Generation(2)"
    assert manager.live_generations == 2
    assert pinned.released
    assert pinned.number == 2
    out = np.ones(N, np.float32)
    uses = [
        lambda: pinned.forward(X, "q_proj"),
        lambda: pinned.forward_add(X, "q_proj", out),
        lambda: pinned.forward_all(X),
        lambda: pinned.adapter,
        pinned.modules,
    ]
    for use in uses:
        with pytest.raises(ex.SwapError, match="generation 2: was released") as e:
            use()
        assert e.value.generation == 4
    assert (out == 1).all()
    pinned.release()
    assert "released" in repr(pinned)


def test_a_generation_is_freed_with_its_last_reader():
    m = ml.HotSwapManager(adapter(0))
    first, second = m.pin(), m.pin()
    for i in range(1, 5):
        m.set_active(adapter(i))
    assert m.live_generations == 3  # active, previous, and the first
    first.release()
    assert m.live_generations == 3
    del second
    assert m.live_generations == 2
    assert m.forget_previous()
    assert m.live_generations == 1
    assert not m.forget_previous()
    with pytest.raises(ex.SwapError, match="no earlier generation"):
        m.rollback()
    m.keep_previous = False
    m.set_active(adapter(7))
    assert (m.live_generations, m.previous, m.keep_previous) == (1, None, False)
    with pytest.raises(ex.SwapError, match="keep_previous is off"):
        m.rollback()
    m.keep_previous = True
    m.set_active(adapter(8))
    assert m.live_generations == 2
    m.keep_previous = False
    assert (m.live_generations, m.previous) == (1, None)
    assert ml.HotSwapManager(adapter(0), keep_previous=False).keep_previous is False


def test_handles_do_not_keep_generations_but_keep_the_manager():
    q = ml.HotSwapManager(adapter(1))["q_proj"]
    gc.collect()
    close(q.forward(X), delta(adapter(1), X, "q_proj"))
    m = ml.HotSwapManager(adapter(1))
    gone = weakref.ref(m)
    m.subscribe(m.prepare_standby)  # a cycle
    del m
    gc.collect()
    assert gone() is None


def test_a_rollback_goes_back_once_under_a_new_number(manager):
    old, standby = manager.previous, manager.standby
    assert manager.rollback() == 3
    assert manager.active == old
    assert manager.standby == standby
    assert manager.live_generations == 1
    with pytest.raises(ex.SwapError, match="no earlier generation") as e:
        manager.rollback()
    assert e.value.generation == 3
    assert isinstance(e.value, RuntimeError)


def test_swap_without_a_standby_is_an_error(manager):
    assert manager.swap() == 3
    assert manager.standby is None
    before = state(manager)
    with pytest.raises(ex.SwapError, match="standby: there is none") as e:
        manager.swap()
    assert e.value.generation == 3
    assert state(manager) == before
    manager.prepare_standby(adapter(8), background=False)
    assert manager.discard_standby()
    assert not manager.discard_standby()
    with pytest.raises(ex.SwapError, match="standby"):
        manager.swap()


def test_learners_publish_without_losing_work():
    m = ml.HotSwapManager(make(N, rank=4, names=("q_proj",)))
    one, other = (ml.MicroLoRA(m.active, seed=s) for s in (1, 2))
    for lora in (one, other):
        lora.instant(X, ml.Target(normal(rng(3), N)), "q_proj")
    assert m.compare_and_swap(1, one) == 2
    with pytest.raises(ex.SwapError, match="got generation 1, but 2 is active") as e:
        m.compare_and_swap(1, other)
    assert e.value.generation == 2
    np.testing.assert_array_equal(m.forward(X), one.forward(X))
    published = m.forward(X)
    one.instant(-X, ml.Target(normal(rng(4), N)), "q_proj")
    np.testing.assert_array_equal(m.forward(X), published)  # what is learned later is private
    assert m.compare_and_swap(e.value.generation, other.adapter()) == 3
    assert m.compare_and_swap(np.int64(3), one) == 4


def test_a_standby_comes_from_files_learners_and_adapters(tmp_path, manager):
    value = adapter(5)
    ml.save(value, tmp_path / "one.safetensors")
    ml.save(value, tmp_path / "peft")
    lora = ml.MicroLoRA(value)
    for source in (tmp_path / "one.safetensors", str(tmp_path / "peft"), lora, value, lora.snapshot()):
        for background in (True, False):
            future = manager.prepare_standby(source, background=background)
            ready = future.result(30)
            assert type(ready) is ml.Adapter or isinstance(source, ml.Snapshot)
            assert future.done()
            assert not manager.is_swapping
            np.testing.assert_array_equal(manager.standby.lora_b("v_proj"), value.lora_b("v_proj"))
    number = manager.generation
    assert manager.swap() == number + 1
    close(manager.forward(X, "v_proj"), delta(value, X, "v_proj"))


def test_a_learner_is_taken_when_preparing_starts(manager):
    lora, gate = ml.MicroLoRA(adapter(5)), threading.Event()
    before = lora.adapter()
    future = manager.prepare_standby(lora, validate=lambda a: gate.wait(30))
    lora.instant(X, ml.Target(np.ones(N, np.float32)), "q_proj")
    gate.set()
    assert future.result(30) == before
    assert manager.standby == before


def test_is_swapping_is_seen_true(manager):
    seen, gate, inside = [], threading.Event(), threading.Event()

    def wait(value):
        inside.set()
        gate.wait(30)

    assert manager.is_swapping is False
    future = manager.prepare_standby(adapter(6), validate=wait)
    assert manager.is_swapping is True
    assert inside.wait(30)
    assert manager.is_swapping is True
    assert manager.standby == adapter(3)  # the old one, until the new one is ready
    unsubscribe = manager.subscribe(lambda old, new: seen.append(manager.is_swapping))
    assert manager.swap() == 3  # readers and swaps go on meanwhile
    gate.set()
    future.result(30)
    assert manager.is_swapping is False
    for change in (manager.swap, manager.rollback, lambda: manager.set_active(adapter(1))):
        change()
        assert manager.is_swapping is False
    manager.compare_and_swap(manager.generation, adapter(1))
    unsubscribe()
    assert seen == [True] * 5
    for fails in (manager.swap, lambda: manager.compare_and_swap(0, adapter(1))):
        with pytest.raises(ex.SwapError):
            fails()
        assert manager.is_swapping is False
    with pytest.raises(FileNotFoundError):
        manager.prepare_standby("nowhere.safetensors").result(30)
    assert manager.is_swapping is False


def test_of_two_preparations_the_later_one_wins(manager):
    gates = [threading.Event() for _ in range(2)]
    first = manager.prepare_standby(adapter(6), validate=lambda a: gates[0].wait(30))
    second = manager.prepare_standby(adapter(7), validate=lambda a: gates[1].wait(30))
    gates[1].set()
    second.result(30)
    gates[0].set()
    with pytest.raises(ex.SwapError, match="started later"):
        first.result(30)
    assert manager.standby == adapter(7)
    # Where the later one fails, the earlier one is what there is.
    gates = [threading.Event() for _ in range(2)]
    first = manager.prepare_standby(adapter(8), validate=lambda a: gates[0].wait(30))
    second = manager.prepare_standby(adapter(9), validate=lambda a: False)
    with pytest.raises(ex.SwapError, match="validate: returned False"):
        second.result(30)
    gates[0].set()
    assert first.result(30) == manager.standby == adapter(8)


def test_progress_and_cancel_of_a_preparation(manager):
    calls, token = [], ml.CancelToken()
    manager.prepare_standby(adapter(5), background=False, progress=lambda *a: calls.append(a))
    assert [(done, total) for done, total, _ in calls] == [(0, 2), (1, 2), (2, 2)]
    before = state(manager)

    def stop(done, total, what):
        if done == 1:
            token.cancel()

    for background in (False, True):
        with pytest.raises(ex.CancelledError):
            manager.prepare_standby(adapter(6), background=background, progress=stop, cancel=token).result(30)
        assert state(manager) == before
    with pytest.raises(ZeroDivisionError):
        manager.prepare_standby(adapter(6), progress=lambda *a: 1 / 0).result(30)
    assert state(manager) == before
    with pytest.raises(ValueError, match="my own"):
        manager.prepare_standby(adapter(6), validate=_refuse).result(30)
    assert state(manager) == before


def _refuse(value):
    raise ValueError(f"my own reason against {value.modules()}")


def test_subscribers_are_told_after_each_change(manager, caplog):
    told, other = [], []
    unsubscribe = manager.subscribe(lambda old, new: told.append((old, new, manager.generation)))
    manager.subscribe(lambda old, new: 1 / 0)
    manager.subscribe(lambda old, new: other.append(new))
    with caplog.at_level(logging.ERROR):
        assert manager.swap() == 3
    assert "ZeroDivisionError" in caplog.text
    assert "generation 2 to 3" in caplog.text
    manager.rollback()
    manager.set_active(adapter(5))
    manager.compare_and_swap(5, adapter(6))
    assert told == [(2, 3, 3), (3, 4, 4), (4, 5, 5), (5, 6, 6)]
    with pytest.raises(ex.SwapError):
        manager.compare_and_swap(5, adapter(7))
    unsubscribe()
    unsubscribe()
    manager.set_active(adapter(8))
    assert len(told) == 4
    assert other == [3, 4, 5, 6, 7]


def test_a_subscriber_may_swap_again(manager):
    def back(old, new):
        if new == 3:
            manager.rollback()

    manager.subscribe(back)
    assert manager.swap() == 3
    assert manager.generation == 4


def test_other_widths_only_where_they_are_wanted(manager):
    narrow = adapter(4, n_in=16, n_out=8)
    q = manager["q_proj"]
    assert manager.set_active(narrow, reshape=True) == 3
    assert (q.in_features, q.out_features, q.forward(X[:16]).shape) == (16, 8, (8,))
    with pytest.raises(ex.ShapeError, match="x: got shape"):
        q.forward(X)
    # The standby was made for the widths of before; what is active now decides.
    before = state(manager)
    with pytest.raises(ex.ShapeError, match=r"q_proj.*generation 3"):
        manager.swap()
    assert state(manager) == before
    manager.prepare_standby(adapter(3), background=False, reshape=True)
    assert manager.swap() == 4
    assert manager.rollback() == 5
    assert q.forward(X[:16]).shape == (8,)
    assert manager.compare_and_swap(5, adapter(3), reshape=True) == 6
    assert manager.set_active(adapter(5, names=("o_proj",), n_in=3)) == 7


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_child_goes_on_by_itself():
    out = run_python(
        """
import os, sys, threading, warnings
import numpy as np
import microlora as ml
from support import make, normal, rng
warnings.simplefilter("ignore", DeprecationWarning)  # newer Pythons warn of a fork beside threads
x = normal(rng(), 4096, 256)
value = [make(256, 256, 16, seed=s, names=("q_proj",)).adapter() for s in range(3)]
m = ml.HotSwapManager(value[0])
want = [ml.MicroLoRA(v).forward(x) for v in value]
stop, gate, inside = threading.Event(), threading.Event(), threading.Event()
def read():
    while not stop.is_set():
        m.forward(x)
def hold(value):
    inside.set()
    gate.wait(60)
threads = [threading.Thread(target=read) for _ in range(3)]
for t in threads: t.start()
future = m.prepare_standby(value[1], validate=hold)
inside.wait(30)
for _ in range(5):
    pid = os.fork()
    if pid == 0:
        try:
            assert not m.is_swapping, "the parent's work is not the child's"
            assert m.generation == 1 and (m.forward(x) == want[0]).all()
            m.prepare_standby(value[2]).result(30)
            assert not m.is_swapping
            assert m.swap() == 2 and (m.forward(x) == want[2]).all()
            assert m.rollback() == 3 and (m.forward(x) == want[0]).all()
            assert m.compare_and_swap(3, value[1]) == 4 and not m.is_swapping
        except BaseException as e:
            sys.stderr.write(repr(e))
            os._exit(1)
        os._exit(0)
    assert os.waitpid(pid, 0)[1] == 0
assert m.is_swapping and m.generation == 1
gate.set()
future.result(30)
stop.set()
for t in threads: t.join(30)
assert m.swap() == 2 and (m.forward(x) == want[1]).all() and not m.is_swapping
print("done")
"""
    )
    assert out == "done\n"
