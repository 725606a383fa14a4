"""Quantised adapters: what they run and say, and their file; the twin decodes blocks in NumPy float64."""

import copy
import json
import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import microlora as ml
import microlora._core as core
from microlora import exceptions as ex
from support import close, from_bf16, make, normal, read_tensors, rng, run_python, write_tensors
from test_bad_input import odd, outs

BLOCKS = {name: (elements, size) for name, _, elements, size in core.block_types()}
PLAIN = ("f32", "f16", "bf16")
TYPES = (*BLOCKS, *PLAIN)
ISAS = core.available_isas()


def adapter(n_in=256, n_out=256, rank=4, names=("m",), seed=0, **settings):
    r = rng(seed)
    factors = {n: (normal(r, rank, n_in), normal(r, n_out, rank)) for n in names}
    return ml.Adapter.from_factors(factors, alpha=2.0 * rank, **settings)


def quantized(a, type_a="q8_0", type_b=None, **settings):
    return ml.QuantizedAdapter.from_adapter(
        a, dict.fromkeys(a.modules(), (type_a, type_b or type_a)), **settings
    )


def plain64(raw, dtype, shape):
    """float64 numbers of a plain tensor's bytes."""
    if dtype == "BF16":
        return from_bf16(np.frombuffer(raw, np.uint16)).astype(np.float64).reshape(shape)
    return np.frombuffer(raw, {"F32": "f4", "F16": "f2"}[dtype]).astype(np.float64).reshape(shape)


def factors64(q, module):
    """A (rank, in) and B (rank, out) in float64, decoded from the bytes that a file would hold."""
    header, tensors = read_tensors(q.to_bytes())
    (entry,) = (m for m in json.loads(header["__metadata__"]["modules"]) if m["path"] == module)
    found = []
    for key in ("a", "b"):
        name = f"{module}.lora_{key}"
        info, blocks = header[name], entry.get(key)
        if blocks is None:
            w = plain64(tensors[name], info["dtype"], info["shape"])
            found.append(w.T if key == "b" else w)
        else:
            assert info["dtype"] == "U8"
            rows, cols = blocks["shape"]
            w = core.dequantize_blocks(bytes(tensors[name]), blocks["type"], rows, cols).astype(np.float64)
            found.append(w.T if blocks["along"] == "rank" else w)
    return found


def forward64(q, x, module="m"):
    a, b = factors64(q, module)
    return q.info(module).scaling * (np.asarray(x, np.float64) @ a.T) @ b


def width(kind, blocks):
    return BLOCKS[kind][0] * blocks if kind in BLOCKS else 16 * blocks + 5


# -- what it computes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [1, 2, 3, 4, 5, 8, 16, 31, 40])
@pytest.mark.parametrize("kind", TYPES)
def test_forward_is_that_of_its_numbers_in_float64(kind, rank):
    q = quantized(adapter(width(kind, 3), width(kind, 2), rank), kind)
    r = rng(1)
    x, base = normal(r, 3, width(kind, 3)), normal(r, 3, width(kind, 2))
    want = forward64(q, x)
    close(q.forward(x), want)
    close(q.forward(x, "m"), want)
    for i in range(3):
        close(q.forward(x[i]), want[i])
        y = base[i].copy()
        assert q.forward_add(x[i], "m", y) is None
        close(y, base[i] + want[i])
    out = np.empty_like(base)
    assert q.forward(x, "m", out) is out
    np.testing.assert_array_equal(out, q.forward(x))
    out = base.copy()
    q.forward_add(x, out=out)
    close(out, base + want)


@pytest.mark.parametrize("kind", TYPES)
def test_forward_is_that_of_the_dequantised_adapter(kind):
    q = quantized(adapter(width(kind, 4), width(kind, 4), 6), kind)
    plain = ml.MicroLoRA(q.dequantize())
    for n in (1, 2, 7, 50):
        x = normal(rng(n), n, width(kind, 4))
        close(q.forward(x), plain.forward(x))


@given(
    kinds=st.tuples(st.sampled_from(TYPES), st.sampled_from(TYPES)),
    blocks=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    rank=st.integers(1, 40),
    rows=st.integers(0, 30),
    rslora=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
def test_any_mixture_of_types_and_shapes(kinds, blocks, rank, rows, rslora, seed):
    n_in, n_out = width(kinds[0], blocks[0]), width(kinds[1], blocks[1])
    q = quantized(adapter(n_in, n_out, rank, seed=seed, use_rslora=rslora), *kinds)
    x = normal(rng(seed), rows, n_in) if rows else normal(rng(seed), n_in)
    close(q.forward(x), forward64(q, x))


@pytest.mark.parametrize("rank", [32, 64])
@pytest.mark.parametrize("kind", ["q8_0", "q4_1", "q4_0"])
def test_blocks_of_b_may_lie_along_the_rank(kind, rank):
    q = quantized(adapter(64, 37, rank), kind, b_along_rank=True)
    assert q.along("m") == ("features", "rank")
    x, base = normal(rng(2), 9, 64), normal(rng(3), 9, 37)
    want = forward64(q, x)
    close(q.forward(x), want)
    close(q.forward(x[0]), want[0])
    for rows in (0, slice(None)):
        y = base[rows].copy()
        q.forward_add(x[rows], "m", y)
        close(y, base[rows] + want[rows])
    assert pickle.loads(pickle.dumps(q)) == q
    close(ml.MicroLoRA(q.dequantize()).forward(x), want)


def test_every_instruction_set_agrees():
    code = """if True:
        import sys, numpy as np
        import microlora as ml
        q = ml.QuantizedAdapter(open(sys.argv[1], "rb").read())
        x = np.load(sys.argv[2])
        np.save(sys.argv[3], np.stack([q.forward(x, m) for m in q.modules()]))
        np.save(sys.argv[4], np.stack([q.forward(x[0], m) for m in q.modules()]))
    """
    import tempfile
    from pathlib import Path

    names = tuple(BLOCKS)
    a = adapter(512, 256, 5, names=names)
    q = ml.QuantizedAdapter.from_adapter(a, {n: (n, n) for n in names})
    x = normal(rng(4), 8, 512)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        (path / "q").write_bytes(q.to_bytes())
        np.save(path / "x.npy", x)
        for isa in ISAS:
            files = [path / f for f in ("q", "x.npy", "many.npy", "one.npy")]
            run_python(code, *files, env={"MICROLORA_ISA": isa})
            for m, many, one in zip(names, np.load(files[2]), np.load(files[3]), strict=True):
                want = forward64(q, x, m)
                close(many, want)
                close(one, want[0])


def test_threads_change_nothing():
    q = quantized(adapter(2048, 2048, 64), "q4_k")
    x = normal(rng(5), 131, 2048)
    assert 131 * q.param_count > 32e6
    alone = q.forward(x)
    ml.set_num_threads(2)
    try:
        together = q.forward(x)
    finally:
        ml.set_num_threads(1)
    close(together, alone, 1e-6)


def test_forward_all_runs_what_shares_its_input():
    q = quantized(adapter(64, 96, 2, names=("q_proj", "k_proj", "down_proj")), "q8_0", "q4_0")
    x = normal(rng(6), 64)
    found = q.forward_all(x)
    assert list(found) == ["q_proj", "k_proj"]
    for name, y in found.items():
        np.testing.assert_array_equal(y, q.forward(x, name))
    many = q.forward_all(np.stack([x, x]), ["down_proj"])
    close(many["down_proj"], np.stack([q.forward(x, "down_proj")] * 2))
    with pytest.raises(ex.UnknownModuleError, match="v_proj"):
        q.forward_all(x, ["v_proj"])


# -- what it says --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", BLOCKS)
def test_memory_is_that_of_the_blocks(kind):
    elements, size = BLOCKS[kind]
    q = quantized(adapter(1024, 2048, 8), kind)
    assert q.memory_bytes == 8 * (1024 + 2048) // elements * size
    assert q.param_count == 8 * (1024 + 2048)
    assert q.types("m") == (kind, kind)
    assert q.along("m") == ("features", "features")
    assert len(q.to_bytes()) < q.memory_bytes + 1000


def test_mixed_types_are_told_apart():
    a = adapter(256, 64, 2, names=("x", "y"))
    q = ml.QuantizedAdapter.from_adapter(a, {"x": ("q6_k", "q8_0"), "y": ("f16", "bf16")})
    assert (q.types("x"), q.types("y")) == (("q6_k", "q8_0"), ("f16", "bf16"))
    assert q.along("y") == ("", "")
    assert q.info("x")[:5] == (256, 64, 2, 4.0, False)
    assert q.dims == {"x": (256, 64), "y": (256, 64)}
    assert "x: q6_k/q8_0" in repr(q)
    assert q.dequantize().info("y").dtype_b == "bf16"


def test_settings_and_metadata_are_kept():
    lora = make(64, 64, 2, names=("q_proj", "v_proj"), name="mine", tags=["t"])
    lora.metadata = ml.AdapterMetadata(name="mine", base_model="tiny")
    a = lora.adapter()
    q = quantized(a)
    assert (q.config, q.metadata) == (a.config, a.metadata)
    back = q.dequantize()
    assert (back.config, back.metadata) == (a.config, a.metadata)
    other = q.with_metadata(ml.AdapterMetadata(name="other"))
    assert other.metadata.name == "other"
    assert other != q
    bare = ml.QuantizedAdapter(q.with_json(None, None))
    assert bare.config.target_modules == ("q_proj", "v_proj")
    assert bare.config.dtype == "f32"
    with pytest.raises(ex.FormatError, match="rank"):
        _ = ml.QuantizedAdapter(q.with_json(a.config.replace(rank=3).to_json(), None)).config


@pytest.mark.parametrize("kind", BLOCKS)
def test_dequantised_numbers_are_those_of_the_codec(kind):
    a = adapter(512, 256, 5)
    back = quantized(a, kind).dequantize()
    for got, of in ((back.lora_a("m"), a.lora_a("m")), (back.lora_b("m").T, a.lora_b("m").T)):
        of = np.ascontiguousarray(of)
        want = core.dequantize_blocks(core.quantize_blocks(of, kind), kind, *of.shape)
        np.testing.assert_array_equal(got, want)


def test_equality_hashing_pickling_and_copies():
    one, same, other = quantized(adapter()), quantized(adapter()), quantized(adapter(seed=1))
    assert one == same
    assert hash(one) == hash(same)
    assert one != other
    assert one != one.dequantize()
    for made in (pickle.loads(pickle.dumps(one)), copy.deepcopy(one), ml.QuantizedAdapter(one.to_bytes())):
        assert made == one
        assert type(made) is ml.QuantizedAdapter
        assert made.to_bytes() == one.to_bytes()
    assert len({one, same, other}) == 2


# -- the file ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mmap", [False, True])
def test_save_and_load(tmp_path, mmap):
    q = quantized(adapter(256, 512, 3, names=("x", "y")), "q5_k", "q8_0")
    path = tmp_path / "a.safetensors"
    ml.save(q, path)
    loaded = ml.load(path, mmap=mmap)
    assert isinstance(loaded, ml.QuantizedAdapter)
    assert loaded == q
    header, tensors = read_tensors(q.to_bytes())
    header["__metadata__"]["weights_sha256"] = ml.fingerprint(q)
    assert read_tensors(path.read_bytes()) == (header, tensors)
    header, _ = read_tensors(path.read_bytes())
    assert header["__metadata__"]["format_version"] == "2"
    ml.save(loaded, tmp_path / "b", "safetensors")
    assert (tmp_path / "b").read_bytes() == path.read_bytes()
    with pytest.raises(ex.ConfigError, match="its own save"):
        ml.save(q, tmp_path / "c", "peft")
    with pytest.raises(ex.ConfigError, match="layer_paths"):
        ml.save(q, tmp_path / "c", layer_paths={"x": "y"})
    for save in (ml.save, ml.QuantizedAdapter.save):
        with pytest.raises(ex.ConfigError, match=r"c\.npz.*ends in \.safetensors"):
            save(q, tmp_path / "c.npz")
    with pytest.raises(ex.ConfigError, match=r"c\.gguf.*format gguf"):
        ml.save(q, tmp_path / "c.gguf")
    assert not list(tmp_path.glob("c*"))


def test_plain_adapters_stay_in_version_1(tmp_path):
    a = adapter()
    ml.save(a, tmp_path / "a.safetensors")
    header, _ = read_tensors((tmp_path / "a.safetensors").read_bytes())
    assert header["__metadata__"]["format_version"] == "1"
    assert isinstance(ml.load(tmp_path / "a.safetensors"), ml.Adapter)


def test_places_that_need_plain_weights_say_so(tmp_path):
    q = quantized(adapter())
    path = tmp_path / "q.safetensors"
    ml.save(q, path)
    for use in (
        lambda: ml.MicroLoRA.load(path),
        lambda: ml.merge({"a": path, "b": path}),
        lambda: ml.Adapter(q.to_bytes()),
        lambda: core.load(str(path), False, True),
        lambda: core.from_bytes(q.to_bytes(), True),
    ):
        with pytest.raises(ex.UnsupportedVariantError, match="dequantize"):
            use()
    with pytest.raises(ex.FormatError, match="plain adapter"):
        ml.QuantizedAdapter(adapter().to_bytes())
    with pytest.raises(ex.DTypeError, match="source"):
        ml.QuantizedAdapter(7)


def damaged(change):
    """The bytes of a small file whose header entry, tensors or header were changed."""
    q = quantized(adapter(64, 96, 3), "q8_0", "q4_1")
    header, tensors = read_tensors(q.to_bytes())
    (entry,) = json.loads(header["__metadata__"]["modules"])
    change(entry, tensors, header)
    header["__metadata__"]["modules"] = json.dumps([entry])
    return write_tensors(header, tensors)


def set_scale(name, at, bits):
    def change(entry, tensors, header):
        tensors[name][at : at + 2] = bits.to_bytes(2, "little")

    return change


def put(which, **values):
    return lambda entry, tensors, header: entry[which].update(values)


def top(**values):
    return lambda entry, tensors, header: entry.update(values)


def reshape(name, **values):
    return lambda entry, tensors, header: header[name].update(values)


def shorter(entry, tensors, header):
    del tensors["m.lora_a"][-34:]
    header["m.lora_a"]["shape"] = [3, 68 - 34]


def gone(entry, tensors, header):
    tensors["m.lora_c"] = tensors.pop("m.lora_b")
    header["m.lora_c"] = header.pop("m.lora_b")


def plain_b(entry, tensors, header):
    del entry["b"]


def more(entry, tensors, header):
    tensors["other"] = bytearray(4)
    header["other"] = {"dtype": "U8", "shape": [4]}


HOSTILE = {
    "an unknown type": (put("a", type="q9_9"), "q9_9"),
    "another type": (put("a", type="q4_0"), "m.lora_a"),
    "a K type that does not fit": (put("a", type="q4_k"), "256"),
    "a width of no whole blocks": (put("a", shape=[3, 65]), "32"),
    "a width of zero": (put("a", shape=[3, 0]), "m.lora_a"),
    "no rows": (put("a", shape=[0, 64]), "m.lora_a"),
    "another rank": (put("a", shape=[4, 64]), "rank 3"),
    "a rank beyond the header's": (top(rank=4), "rank 4"),
    "a huge rank": (top(rank=2**40), "rank"),
    "an overflow": (put("a", shape=[3, 2**64 - 32]), "m.lora_a"),
    "a shape of three": (put("a", shape=[3, 64, 1]), "modules"),
    "a negative shape": (put("a", shape=[-3, 64]), "modules"),
    "another direction": (put("a", along="rank"), "m.lora_a"),
    "an unknown direction": (put("a", along="up"), "up"),
    "an unknown entry": (put("a", scale=1), "scale"),
    "an unknown entry of the module": (top(c=1), "c"),
    "no alpha": (top(alpha=None), "modules"),
    "a name with a newline": (top(path="m\n"), "m"),
    "blocks as f16": (reshape("m.lora_a", dtype="F16", shape=[3, 34]), "U8"),
    "another shape of bytes": (reshape("m.lora_a", shape=[68, 3]), "U8"),
    "fewer bytes": (shorter, "m.lora_a"),
    "no tensor": (gone, "m.lora_b"),
    "blocks without their entry": (plain_b, "F32, F16 or BF16"),
    "a tensor more": (more, "other"),
    "a scale of NaN": (set_scale("m.lora_a", 34, 0x7E00), "block 1"),
    "an infinite scale": (set_scale("m.lora_a", 0, 0x7C00), "block 0"),
    "an infinite minimum": (set_scale("m.lora_b", 2, 0xFC00), "block 0"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_damaged_file_is_refused_with_what_is_wrong(tmp_path, name):
    change, words = HOSTILE[name]
    data = damaged(change)
    path = tmp_path / "bad.safetensors"
    path.write_bytes(data)
    with pytest.raises(ex.FormatError, match=words) as seen:
        ml.load(path)
    assert "bad.safetensors" in str(seen.value)
    with pytest.raises(ex.FormatError, match=words):
        ml.QuantizedAdapter(data)


def test_versions_that_are_not_known_are_refused(tmp_path):
    header, tensors = read_tensors(quantized(adapter()).to_bytes())
    for version, error in (("3", ex.UnsupportedVariantError), ("0", ex.FormatError), ("two", ex.FormatError)):
        header["__metadata__"]["format_version"] = version
        with pytest.raises(error, match="version"):
            ml.QuantizedAdapter(write_tensors(header, tensors))
    header["__metadata__"]["format_version"] = "1"
    with pytest.raises(ex.FormatError, match="unknown field"):
        ml.QuantizedAdapter(write_tensors(header, tensors))


@given(st.data())
def test_any_byte_may_be_flipped(data):
    """A changed file is refused, or loads as an adapter of finite numbers."""
    raw = bytearray(quantized(adapter(64, 32, 2), "q8_0", "q4_0").to_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, len(raw) - 1))] ^= data.draw(st.integers(1, 255))
    try:
        q = ml.QuantizedAdapter(bytes(raw))
    except ml.MicroLoraError:
        return
    for name in q.modules():
        assert np.isfinite(q.dequantize().lora_a(name)).all()


# -- bad input -----------------------------------------------------------------------------------------------


Q = quantized(adapter(64, 32, 2, names=("q_proj", "k_proj")), "q8_0", "q4_0")
X = normal(rng(8), 64)


@pytest.mark.parametrize("case", odd(64))
def test_wrong_inputs(case):
    value, error, words = odd(64)[case]
    y = np.full(32, 7, np.float32)
    for call in (
        lambda: Q.forward(value, "q_proj"),
        lambda: Q.forward(value, "q_proj", y),
        lambda: Q.forward_add(value, "q_proj", y),
        lambda: Q.forward_all(value),
    ):
        with pytest.raises(error) as seen:
            call()
        assert words in str(seen.value)
        assert str(seen.value).startswith("x")
    assert (y == 7).all()


@pytest.mark.parametrize("case", outs(32))
def test_wrong_outputs(case):
    value, error, words = outs(32)[case]
    for call in (lambda: Q.forward(X, "q_proj", value), lambda: Q.forward_add(X, "q_proj", value)):
        with pytest.raises(error) as seen:
            call()
        assert words in str(seen.value)


def test_wrong_modules_and_a_bad_row():
    with pytest.raises(ex.UnknownModuleError, match="q_proj, k_proj"):
        Q.forward(X, "nope")
    with pytest.raises(ex.ConfigError, match="module: missing"):
        Q.forward(X)
    with pytest.raises(ex.ConfigError, match="out: missing"):
        Q.forward_add(X, "q_proj")
    for call in (Q.info, Q.types, Q.along, Q.describe):
        with pytest.raises(ex.UnknownModuleError, match="nope"):
            call("nope")
    rows = np.stack([X] * 9)
    rows[6, 3] = np.nan
    y = np.full((9, 32), 7, np.float32)
    with pytest.raises(ex.NonFiniteError, match="row 6"):
        Q.forward(rows, "q_proj", y)
    assert (y == 7).all()


def test_types_that_cannot_be():
    a = adapter(96, 64, 3)
    make_of = ml.QuantizedAdapter.from_adapter
    with pytest.raises(ex.ShapeError, match=r"lora_a of m.*256"):
        make_of(a, {"m": ("q4_k", "q8_0")})
    with pytest.raises(ex.ShapeError, match=r"lora_b of m.*32"):
        make_of(a, {"m": ("q8_0", "q8_0")}, b_along_rank=True)
    with pytest.raises(ex.ConfigError, match=r"q4_k_m.*one of q8_0"):
        make_of(a, {"m": ("q4_k_m", "q8_0")})
    with pytest.raises(ex.ConfigError, match='"m"'):
        make_of(a, {})
    with pytest.raises(ex.UnknownModuleError, match="other"):
        make_of(a, {"m": ("f16", "f16"), "other": ("f16", "f16")})
    large = ml.Adapter.from_factors({"m": (np.full((1, 32), 1e8, "f4"), np.ones((32, 1), "f4"))}, alpha=1.0)
    for kind in ("q8_0", "f16"):
        with pytest.raises(ex.NonFiniteError, match="lora_a of m"):
            make_of(large, {"m": (kind, "f32")})
