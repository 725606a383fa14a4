"""Block codecs against llama.cpp itself: the library inside the package xllamacpp, called through ctypes."""

import base64
import ctypes
import hashlib
import importlib.util
import json
import sys
from functools import cache
from pathlib import Path

import numpy as np
import pytest

import quant_support as support
import reference_quant as ref
from microlora import _core
from microlora.exceptions import NonFiniteError

pytestmark = pytest.mark.interop

TYPES = list(ref.TYPES)
#: What ggml calls the types in the names of its functions.
SYMBOLS = {name: name.replace("_k", "_K") for name in TYPES}
HALVES = {"q8_0": (0,), "q6_k": (208,), "q5_k": (0, 2), "q4_k": (0, 2), "q4_1": (0, 2), "q4_0": (0,)}
GOLDEN = Path(__file__).parent / "data" / "quant_golden.json"
BLOCKS_OF_A_KIND = 10_000 // len(support.KINDS)


@cache
def ggml():
    """llama.cpp's library as the wheel ships it: the extension module that exports ggml's functions."""
    spec = importlib.util.find_spec("xllamacpp")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("xllamacpp is not installed: make test-interop")
    for folder in spec.submodule_search_locations:
        for file in sorted(Path(folder).rglob("*.so")):
            library = ctypes.CDLL(str(file))
            if hasattr(library, "ggml_quantize_chunk"):
                library.ggml_quantize_chunk.restype = ctypes.c_size_t
                library.ggml_validate_row_data.restype = ctypes.c_bool
                library.ggml_quantize_init(8)
                return library
    pytest.fail("xllamacpp: no library of it exports ggml_quantize_chunk")


def theirs(name, x):
    """(blocks, bytes) that llama.cpp writes for (blocks, elements)."""
    elements, size, number = ref.TYPES[name]
    x = np.ascontiguousarray(x, np.float32)
    out = np.full((x.size // elements, size), 0xA5, np.uint8)
    rows, cols = x.shape
    written = ggml().ggml_quantize_chunk(
        ctypes.c_int(number), x.ctypes.data_as(ctypes.c_void_p), out.ctypes.data_as(ctypes.c_void_p),
        ctypes.c_int64(0), ctypes.c_int64(rows), ctypes.c_int64(cols), None,
    )  # fmt: skip
    assert written == out.nbytes
    return out


def their_numbers(name, data):
    elements = ref.TYPES[name][0]
    out = np.full((len(data), elements), np.nan, np.float32)
    function = getattr(ggml(), f"dequantize_row_{SYMBOLS[name]}")
    function.restype = None
    data = np.ascontiguousarray(data)
    count = ctypes.c_int64(out.size)
    function(data.ctypes.data_as(ctypes.c_void_p), out.ctypes.data_as(ctypes.c_void_p), count)
    return out


def ours(name, x):
    return np.frombuffer(_core.quantize_blocks(x, name), np.uint8).reshape(-1, ref.TYPES[name][1])


def valid(name, data):
    _, size, number = ref.TYPES[name]
    data = np.ascontiguousarray(data)
    return ggml().ggml_validate_row_data(
        ctypes.c_int(number), data.ctypes.data_as(ctypes.c_void_p), ctypes.c_size_t(len(data) * size)
    )


@pytest.mark.parametrize("kind", support.KINDS)
@pytest.mark.parametrize("name", TYPES)
def test_ten_thousand_blocks_per_type(name, kind):
    x = support.blocks(kind, BLOCKS_OF_A_KIND, ref.TYPES[name][0], seed=11)
    got, want = ours(name, x), theirs(name, x)
    different = (got != want).any(1)
    assert not different.any(), f"{different.sum()} of {len(x)}, first {np.argmax(different)}"
    back = _core.dequantize_blocks(got.tobytes(), name, len(got), ref.TYPES[name][0])
    assert back.tobytes() == their_numbers(name, want).tobytes()
    assert valid(name, want)


@pytest.mark.parametrize("name", TYPES)
def test_numbers_of_any_bytes(name):
    elements, size, _ = ref.TYPES[name]
    data = support.stored(size, HALVES[name], 10_000, seed=12)
    back = _core.dequantize_blocks(data.tobytes(), name, len(data), elements)
    assert back.tobytes() == their_numbers(name, data).tobytes()


@pytest.mark.parametrize("name", TYPES)
def test_rows_of_several_blocks(name):
    x = support.blocks("adapter", 40, 1024, seed=13)
    assert ours(name, x).tobytes() == theirs(name, x).tobytes()


@pytest.mark.parametrize("name", TYPES)
@pytest.mark.parametrize("top", [1e10, 1e16, 1e25, 1e30])
def test_where_llama_cpp_loses_the_numbers_we_refuse(name, top):
    """Finite numbers whose scale f16 does not hold: there, an infinite scale or a block of zeros."""
    x = np.random.default_rng(14).standard_normal((8, 256)).astype(np.float32) * np.float32(top)
    written = theirs(name, x)
    with np.errstate(all="ignore"):
        back = their_numbers(name, written)
    assert not valid(name, written) or not back.any() or not np.isfinite(back).all()
    with pytest.raises(NonFiniteError, match="too large"):
        _core.quantize_blocks(x, name)


#: Kinds of which the fixture holds a row.
GOLDEN_KINDS = (
    "gaussian", "adapter", "positive", "tiny", "subnormal", "half_subnormal", "negative_zero", "equal",
    "outlier", "ties", "alternating", "mixed", "near_top",
)  # fmt: skip


def make_golden():
    """The fixture of the default suite, from llama.cpp alone; inputs that are there already stay."""
    if GOLDEN.exists():
        inputs = json.loads(GOLDEN.read_text())["inputs"]
    else:
        rows = {kind: support.blocks(kind, 1, 256, seed=1) for kind in GOLDEN_KINDS}
        inputs = {kind: base64.b64encode(x.astype("<f4")).decode() for kind, x in rows.items()}
    types = {}
    for name in TYPES:
        of = types[name] = {}
        for kind, text in inputs.items():
            x = np.frombuffer(base64.b64decode(text), "<f4").reshape(1, 256)
            data = theirs(name, x)
            numbers = hashlib.sha256(their_numbers(name, data).tobytes()).hexdigest()
            of[kind] = {"bytes": base64.b64encode(data).decode(), "numbers": numbers}
    return {"inputs": inputs, "types": types}


def test_golden_fixture_is_llama_cpps():
    assert json.loads(GOLDEN.read_text()) == make_golden()


if __name__ == "__main__":  # python tests/test_quant_oracle.py writes the fixture anew
    GOLDEN.parent.mkdir(exist_ok=True)
    GOLDEN.write_text(json.dumps(make_golden(), indent=1) + "\n")
    sys.stdout.write(f"{GOLDEN}\n")
