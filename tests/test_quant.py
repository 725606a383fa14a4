"""Codecs of the quantised types: golden blocks, the twin, laws, bounds, refusals."""

import base64
import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import quant_support as support
import reference_quant as ref
from microlora import _core
from microlora.exceptions import ConfigError, DTypeError, NonFiniteError, ShapeError

TYPES = list(ref.TYPES)
GOLDEN = json.loads((Path(__file__).parent / "data" / "quant_golden.json").read_text())
HALVES = {"q8_0": (0,), "q6_k": (208,), "q5_k": (0, 2), "q4_k": (0, 2), "q4_1": (0, 2), "q4_0": (0,)}


def quantize(name, x):
    """(blocks, bytes) of (blocks, elements)."""
    elements, size, _ = ref.TYPES[name]
    assert x.shape[1] % elements == 0
    return np.frombuffer(_core.quantize_blocks(x, name), np.uint8).reshape(-1, size)


def dequantize(name, data):
    elements = ref.TYPES[name][0]
    return _core.dequantize_blocks(data.tobytes(), name, len(data), elements)


def test_table():
    want = [(name, number, elements, size) for name, (elements, size, number) in ref.TYPES.items()]
    assert _core.block_types() == want


@pytest.mark.parametrize("kind", GOLDEN["inputs"])
@pytest.mark.parametrize("name", TYPES)
def test_golden_blocks(name, kind):
    """Bytes that llama.cpp wrote of 256 numbers of every kind, and the numbers that it read out of them."""
    x = np.frombuffer(base64.b64decode(GOLDEN["inputs"][kind]), "<f4").reshape(1, 256)
    golden = GOLDEN["types"][name][kind]
    got = quantize(name, x)
    assert base64.b64encode(got).decode() == golden["bytes"]
    assert hashlib.sha256(dequantize(name, got).tobytes()).hexdigest() == golden["numbers"]


@pytest.mark.parametrize("name", TYPES)
@pytest.mark.parametrize("kind", support.KINDS)
def test_bytes_of_the_twin(name, kind):
    x = support.blocks(kind, 12, ref.TYPES[name][0], seed=3)
    with np.errstate(all="ignore"):
        want = ref.QUANTIZE[name](x)
    assert np.array_equal(quantize(name, x), want)


@pytest.mark.parametrize("name", TYPES)
def test_numbers_of_any_bytes(name):
    """Codes that no quantiser would write dequantise as the layout says, to the bit and to the number."""
    data = support.stored(ref.TYPES[name][1], HALVES[name], 200)
    got = dequantize(name, data)
    assert got.tobytes() == ref.dequantize(name, data).astype(np.float32).tobytes()
    exact = ref.dequantize(name, data, np.float64)
    scale = np.abs(exact).max(1, keepdims=True)
    assert (np.abs(got - exact) <= 1e-6 * scale).all()


@given(st.sampled_from(TYPES), st.integers(0, 2**32 - 1), st.floats(-6, 3))
def test_any_gaussian_block_is_the_twins(name, seed, power):
    r = np.random.default_rng(seed)
    x = (r.standard_normal((2, ref.TYPES[name][0])) * 10.0**power).astype(np.float32)
    assert np.array_equal(quantize(name, x), ref.QUANTIZE[name](x))


# Off by at most this share of the largest number of the block: half a step, and what f16 and six bits add.
WORST = {"q8_0": 0.005, "q6_k": 0.04, "q5_k": 0.06, "q4_k": 0.11, "q4_1": 0.08, "q4_0": 0.13}
numbers32 = st.floats(-1e4, 1e4, width=32).filter(lambda v: v == 0 or abs(v) > 1e-2)


@given(st.sampled_from(TYPES), st.data())
def test_error_is_bounded(name, data):
    x = data.draw(hnp.arrays(np.float32, (1, ref.TYPES[name][0]), elements=numbers32))
    back = dequantize(name, quantize(name, x))
    top = np.abs(x).max() + (x.max() - x.min() if name == "q4_1" else 0)
    assert np.abs(back - x).max() <= WORST[name] * top + 1e-30


@pytest.mark.parametrize("name", TYPES)
def test_error_of_gaussian_numbers(name):
    x = support.blocks("gaussian", 200, ref.TYPES[name][0], seed=5)
    back = dequantize(name, quantize(name, x))
    error = np.linalg.norm(back - x) / np.linalg.norm(x)
    assert error == pytest.approx(ref.GAUSSIAN[name], rel=0.04)


def test_more_bits_err_less():
    x = support.blocks("gaussian", 50, 256, seed=6)
    errors = []
    for name in TYPES:
        rows = x.reshape(-1, ref.TYPES[name][0])
        errors.append(np.linalg.norm(dequantize(name, quantize(name, rows)) - rows))
    assert errors == sorted(errors)


@pytest.mark.parametrize("name", ["q8_0", "q4_0"])
def test_what_is_on_the_grid_is_exact(name):
    """A second pass changes nothing where the largest number sets the scale and the scale is one of f16."""
    r = np.random.default_rng(7)
    top, low = (127, -127) if name == "q8_0" else (7, -8)
    codes = r.integers(low, top + 1, (300, 32)).astype(np.float32)
    codes[:, 0] = low
    x = codes * (2.0 ** r.integers(-12, 5, (300, 1))).astype(np.float32)
    once = dequantize(name, quantize(name, x))
    assert np.array_equal(once, x)
    assert np.array_equal(quantize(name, once), quantize(name, x))


@pytest.mark.parametrize("name", TYPES)
def test_zero_stays_zero(name):
    x = np.zeros((1, ref.TYPES[name][0]), np.float32)
    assert not dequantize(name, quantize(name, x)).any()


@pytest.mark.parametrize("name", ["q4_k", "q5_k"])
@given(st.data())
def test_scales_pack_and_unpack(name, data):
    six = hnp.arrays(np.uint8, (1, 8), elements=st.integers(0, 63))
    sc, m = data.draw(six), data.draw(six)
    packed = ref.pack_scales(sc, m)
    back = ref.unpack_scales(packed)
    assert np.array_equal(back[0], sc)
    assert np.array_equal(back[1], m)
    # d = 1, dmin = 1, codes 1: what the core reads is sc - m of every part.
    size = ref.TYPES[name][1]
    block = np.zeros((1, size), np.uint8)
    block[0, :4] = np.array([1, 1], "<f2").view(np.uint8)
    block[0, 4:16] = packed[0]
    block[0, -128:] = 0x11
    want = np.repeat(sc.astype(np.float32) - m, 32, axis=1)
    assert np.array_equal(dequantize(name, block), want)


@pytest.mark.parametrize("name", TYPES)
def test_rows_are_quantised_apart(name):
    """Bytes of a matrix are those of its rows, and those of their blocks."""
    elements, size, _ = ref.TYPES[name]
    x = support.blocks("gaussian", 3, 4 * elements, seed=8)
    whole = _core.quantize_blocks(x, name)
    assert whole == b"".join(_core.quantize_blocks(row[None], name) for row in x)
    assert len(whole) == 3 * 4 * size
    back = _core.dequantize_blocks(whole, name, 3, 4 * elements)
    assert back.shape == (3, 4 * elements)
    assert back.dtype == np.float32
    assert np.array_equal(back.reshape(-1, elements), dequantize(name, quantize(name, x)))


def test_other_floats_and_strides_are_read():
    x = support.blocks("gaussian", 4, 64, seed=9)
    want = _core.quantize_blocks(x, "q8_0")
    assert _core.quantize_blocks(x.astype(np.float64), "q8_0") == want
    assert _core.quantize_blocks(np.asfortranarray(x), "q8_0") == want


@pytest.mark.parametrize("name", TYPES)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_numbers_that_are_none(name, bad):
    x = np.ones((2, 256), np.float32)
    x[1, 77] = bad
    with pytest.raises(NonFiniteError, match="x: contains NaN or infinity"):
        _core.quantize_blocks(x, name)


# Above these the scale (or the minimum) of a block has no f16.
TOP = {"q8_0": 8.32e6, "q6_k": 2.69e8, "q5_k": 4.13e6, "q4_k": 4.13e6, "q4_1": 65_520.0, "q4_0": 524_160.0}


@pytest.mark.parametrize("name", TYPES)
@pytest.mark.parametrize("factor", [1.02, 1e3, 1e9, 1e25, 1e30])
def test_a_scale_that_f16_does_not_hold(name, factor):
    """Refused: llama.cpp writes infinity there, or a block of zeros, and says nothing."""
    x = np.ones((3, 256), np.float32)
    x[1] = -min(TOP[name] * factor, 3e38)
    with pytest.raises(NonFiniteError, match="row 1 holds numbers too large"):
        _core.quantize_blocks(x, name)


@pytest.mark.parametrize("name", TYPES)
def test_the_largest_scale(name):
    x = np.full((1, 256), -0.97 * TOP[name], np.float32)
    back = dequantize(name, quantize(name, x))
    assert np.allclose(back.reshape(1, 256), x, rtol=0.05)


@pytest.mark.parametrize("name", TYPES)
@pytest.mark.parametrize("bits", [0x7C00, 0xFC00, 0x7E01])
def test_a_stored_scale_that_is_no_number(name, bits):
    data = np.zeros((3, ref.TYPES[name][1]), np.uint8)
    for at in HALVES[name]:
        broken = data.copy()
        broken[2, at : at + 2] = np.array([bits], "<u2").view(np.uint8)
        with pytest.raises(NonFiniteError, match=r"data: .* scale of block 2"):
            dequantize(name, broken)


def test_refusals():
    x = np.ones((2, 256), np.float32)
    with pytest.raises(ConfigError, match=r'type: got "q3_k", expected one of q8_0, q6_k'):
        _core.quantize_blocks(x, "q3_k")
    with pytest.raises(ConfigError, match="type: got"):
        _core.dequantize_blocks(b"", "Q8_0", 1, 32)
    with pytest.raises(ShapeError, match=r"x: got shape \(256,\), expected two dimensions"):
        _core.quantize_blocks(x[0], "q8_0")
    with pytest.raises(ShapeError, match=r"x: got shape \(2, 33\), expected rows of a multiple of 32"):
        _core.quantize_blocks(np.ones((2, 33), np.float32), "q8_0")
    with pytest.raises(ShapeError, match=r"x: got shape \(2, 32\), expected rows of a multiple of 256"):
        _core.quantize_blocks(x[:, :32].copy(), "q4_k")
    with pytest.raises(ShapeError):
        _core.quantize_blocks(np.ones((0, 32), np.float32), "q8_0")
    with pytest.raises(DTypeError):
        _core.quantize_blocks(np.ones((1, 32), np.int64), "q8_0")
    data = _core.quantize_blocks(x, "q8_0")
    for rows, cols in [(1, 256), (2, 224), (3, 256)]:
        with pytest.raises(ShapeError, match="data: got shape 544 bytes"):
            _core.dequantize_blocks(data, "q8_0", rows, cols)
    with pytest.raises(ShapeError):
        _core.dequantize_blocks(data, "q8_0", 2**60, 2**60)
    with pytest.raises(OverflowError):
        _core.dequantize_blocks(data, "q8_0", -1, 32)
