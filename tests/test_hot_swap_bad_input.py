"""What the hot-swap manager refuses: named, and nothing changed."""

import copy
import pickle

import numpy as np
import pytest

import microlora as ml
from hot_swap_support import ROWS, N, X, adapter, in_service, state
from microlora import exceptions as ex
from microlora.hot_swap import Generation
from support import DTYPES, bf16_bits, read_tensors, write_tensors


@pytest.fixture
def manager():
    return in_service()


def poisoned(tmp_path, value, dtype):
    """A file with a NaN in B of v_proj."""
    ml.save(value, tmp_path / "good.safetensors")
    header, tensors = read_tensors((tmp_path / "good.safetensors").read_bytes())
    nan = {"f32": np.float32(np.nan).tobytes(), "f16": np.float16(np.nan).tobytes()}
    bits = nan.get(dtype) or bf16_bits(np.array([np.nan], np.float32)).tobytes()
    tensors["v_proj.lora_b"][-len(bits) :] = bits
    (tmp_path / "nan.safetensors").write_bytes(write_tensors(header, tensors))
    return tmp_path / "nan.safetensors"


@pytest.mark.parametrize("dtype", DTYPES)
def test_numbers_that_are_not_finite_are_refused(tmp_path, manager, dtype):
    path, before = poisoned(tmp_path, adapter(5, dtype=dtype), dtype), state(manager)
    try:
        bad = ml.load(path)
    except ex.MicroLoraError:
        bad = None  # the loader may refuse it first
    calls = [lambda: manager.prepare_standby(path).result(30)]
    if bad is not None:
        calls += [
            lambda: manager.set_active(bad),
            lambda: manager.compare_and_swap(2, bad),
            lambda: ml.HotSwapManager(bad),
        ]
    for call in calls:
        with pytest.raises(ex.MicroLoraError, match=r"v_proj.*(NaN|finite)|(NaN|finite).*v_proj"):
            call()
        assert state(manager) == before


WIDE = adapter(7, n_out=40)
ARRAY = np.ones(N, np.float32)
LORA = ml.MicroLoRA(adapter(1))

BAD = {
    "set_active: text": (lambda m: m.set_active("x"), ex.DTypeError, "adapter: got str"),
    "set_active: none": (lambda m: m.set_active(None), ex.DTypeError, "adapter: got NoneType"),
    "set_active: manager": (lambda m: m.set_active(m), ex.DTypeError, "adapter: got HotSwapManager"),
    "set_active: shape": (lambda m: m.set_active(WIDE), ex.ShapeError, r"q_proj.*\(24, 40\).*\(24, 24\)"),
    "set_active: reshape": (lambda m: m.set_active(WIDE, reshape=1), ex.ConfigError, "reshape: got 1"),
    "cas: number": (lambda m: m.compare_and_swap("2", LORA), ex.ConfigError, "expected: got '2'"),
    "cas: float": (lambda m: m.compare_and_swap(2.0, LORA), ex.ConfigError, "expected: got 2.0"),
    "cas: flag": (lambda m: m.compare_and_swap(True, LORA), ex.ConfigError, "expected: got True"),
    "cas: negative": (lambda m: m.compare_and_swap(-1, LORA), ex.ConfigError, "expected: got -1"),
    "cas: stale": (lambda m: m.compare_and_swap(1, LORA), ex.SwapError, "2 is active"),
    "cas: ahead": (lambda m: m.compare_and_swap(3, LORA), ex.SwapError, "2 is active"),
    "cas: type": (lambda m: m.compare_and_swap(2, ARRAY), ex.DTypeError, "adapter: got ndarray"),
    "cas: shape": (lambda m: m.compare_and_swap(2, WIDE), ex.ShapeError, "q_proj"),
    "prepare: type": (lambda m: m.prepare_standby(3), ex.DTypeError, "source: got int"),
    "prepare: bytes": (lambda m: m.prepare_standby(b"x"), ex.DTypeError, "source: got bytes"),
    "prepare: validate": (lambda m: m.prepare_standby(LORA, validate=3), ex.DTypeError, "validate: got int"),
    "prepare: progress": (lambda m: m.prepare_standby(LORA, progress=3), ex.DTypeError, "progress: got int"),
    "prepare: cancel": (lambda m: m.prepare_standby(LORA, cancel=3), ex.DTypeError, "cancel: got int"),
    "prepare: background": (lambda m: m.prepare_standby(LORA, background=1), ex.ConfigError, "background"),
    "prepare: reshape": (lambda m: m.prepare_standby(LORA, reshape=None), ex.ConfigError, "reshape"),
    "prepare: shape": (lambda m: m.prepare_standby(WIDE).result(30), ex.ShapeError, "of q_proj"),
    "prepare: shape, here": (lambda m: m.prepare_standby(WIDE, background=False), ex.ShapeError, "q_proj"),
    "prepare: nowhere": (lambda m: m.prepare_standby("nowhere").result(30), OSError, "nowhere"),
    "prepare: no adapter": (lambda m: m.prepare_standby(__file__).result(30), ex.FormatError, "test_hot"),
    "subscribe": (lambda m: m.subscribe(3), ex.DTypeError, "callback: got int"),
    "keep": (lambda m: ml.HotSwapManager(keep_previous=1), ex.ConfigError, "keep_previous: got 1"),
    "active": (lambda m: ml.HotSwapManager("x"), ex.DTypeError, "active: got str"),
    "keep, set": (lambda m: setattr(m, "keep_previous", "no"), TypeError, "keep"),
    "module": (lambda m: m["up_proj"], ex.UnknownModuleError, '"up_proj".*generation 2'),
    "module type": (lambda m: m[3], ex.DTypeError, "module: got"),
    "forward: module": (lambda m: m.forward(X, "x"), ex.UnknownModuleError, '"x".*q_proj, v_proj'),
    "forward: which": (lambda m: m.forward(X), ex.ConfigError, "module: missing"),
    "forward: width": (lambda m: m.forward(X[1:], "q_proj"), ex.ShapeError, "x: got shape"),
    "forward: nan": (lambda m: m.forward(X * np.nan, "q_proj"), ex.NonFiniteError, "x: contains NaN"),
    "forward: out": (lambda m: m.forward(X, "q_proj", ARRAY[1:]), ex.ShapeError, "out: got shape"),
    "forward_add: out": (lambda m: m.forward_add(X, "q_proj"), ex.ConfigError, "out: missing"),
    "forward_all: none": (lambda m: m.forward_all(X, []), ex.ConfigError, "modules: missing"),
    "forward_all: name": (lambda m: m.forward_all(X, ["x"]), ex.UnknownModuleError, '"x"'),
    "handle: width": (lambda m: m["q_proj"].forward(ROWS[:, 1:]), ex.ShapeError, "x: got shape"),
    "pin: module": (lambda m: m.pin().forward(X, "x"), ex.UnknownModuleError, "generation 2"),
    "pin: manager": (lambda m: Generation(3), TypeError, "manager"),
    "pickle": (pickle.dumps, ex.DTypeError, "cannot be pickled or copied"),
    "copy": (copy.copy, ex.DTypeError, "take manager.active"),
    "deepcopy": (copy.deepcopy, ex.DTypeError, "take manager.active"),
    "pickle a pin": (lambda m: pickle.dumps(m.pin()), TypeError, "pickle"),
    "pickle a handle": (lambda m: pickle.dumps(m["q_proj"]), TypeError, "pickle"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named_and_changes_nothing(manager, case):
    call, error, words = BAD[case]
    before, told = state(manager), []
    manager.subscribe(lambda *numbers: told.append(numbers))
    with pytest.raises(error, match=words):
        call(manager)
    assert state(manager) == before
    assert told == []
    assert (ARRAY == 1).all()
