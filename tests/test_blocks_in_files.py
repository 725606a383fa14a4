"""Factors in blocks from file to file: byte for byte where a format has them, never silently numbers."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import microlora as ml
import reference_gguf as ref
from microlora import _core
from microlora.exceptions import ConfigError, DestinationExistsError, FormatError, UnsupportedVariantError

TYPES = ("q8_0", "q6_k", "q5_k", "q4_k", "q4_1", "q4_0")
LLAMA = {
    "model_type": "llama", "num_hidden_layers": 2, "hidden_size": 256, "intermediate_size": 512,
    "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 20,
}  # fmt: skip
Q, K, DOWN = (
    "model.layers.0.self_attn.q_proj",
    "model.layers.1.self_attn.k_proj",
    "model.layers.0.mlp.down_proj",
)
SHAPES = {Q: (256, 256), K: (256, 128), DOWN: (512, 256)}
TENSORS = {Q: "blk.0.attn_q", K: "blk.1.attn_k", DOWN: "blk.0.ffn_down"}
HEADS = {Q: 4, K: 2}


@pytest.fixture
def names():
    return pytest.importorskip("gguf", reason="names of GGUF need the gguf package")


def plain(rank=32, shapes=SHAPES, alpha=8.0, seed=0, **settings):
    rng = np.random.default_rng(seed)
    factors = {
        p: (rng.standard_normal((rank, i), np.float32), rng.standard_normal((o, rank), np.float32))
        for p, (i, o) in shapes.items()
    }
    return ml.Adapter.from_factors(factors, alpha=alpha, **settings)


def quantised(types=("q4_k", "q8_0"), rank=32, along_rank=True, **settings):
    made = plain(rank, **settings)
    return ml.QuantizedAdapter.from_adapter(
        made, dict.fromkeys(made.modules(), types), b_along_rank=along_rank
    )


def gguf_tensors(path):
    """``{tensor: (type, bytes of each row)}`` by the reader of the gguf package."""
    import gguf

    return {t.name: (t.tensor_type.name.lower(), np.array(t.data)) for t in gguf.GGUFReader(path).tensors}


def same(a, b):
    """The same blocks, or numbers, of the same modules with the same scalings."""
    assert a.modules() == b.modules()
    for m in a.modules():
        assert (a.info(m), a.along(m)) == (b.info(m), b.along(m))
    x = np.random.default_rng(3).standard_normal((2, 512)).astype(np.float32)
    for m, (n_in, _) in a.dims.items():
        np.testing.assert_array_equal(a.forward(x[:, :n_in], m), b.forward(x[:, :n_in], m))


@pytest.mark.parametrize("types", [(a, b) for a in TYPES for b in ("q8_0", "q4_1", "q4_0", "f16", "bf16")])
def test_blocks_go_to_gguf_byte_for_byte_and_come_back(tmp_path, names, types):
    made = quantised(types)
    done = made.save(tmp_path / "a.gguf", base_config=LLAMA)
    assert (done.format, done.modules, done.dropped) == ("gguf", 3, {})
    found = gguf_tensors(tmp_path / "a.gguf")
    source = plain()
    for module in SHAPES:
        a, b = source.factors(module)
        kind, rows = found[f"{TENSORS[module]}.weight.lora_a"]
        assert kind == types[0]
        assert rows.tobytes() == _core.quantize_blocks(a, types[0])
        kind, rows = found[f"{TENSORS[module]}.weight.lora_b"]
        assert kind == types[1]
        if types[1] in TYPES:
            # Rows of blocks are permuted whole: the same as blocks of permuted rows.
            moved = ref.interleaved(b, HEADS[module]) if module in HEADS else b
            assert rows.tobytes() == _core.quantize_blocks(moved, types[1])
    back = ml.load(tmp_path / "a.gguf", base_config=LLAMA)
    assert isinstance(back, ml.QuantizedAdapter)
    same(back, made)
    note = next(n for n in ml.AdapterFile.read(tmp_path / "a.gguf").notes if n.startswith("in blocks"))
    assert f"{types[0]}: " in note
    assert "blk.0.attn_q.lora_a" in note
    assert ("blk.0.attn_q.lora_b" in note) == (types[1] in TYPES)
    # The same from a file of ours, and from GGUF to GGUF and to ours.
    ml.save(made, tmp_path / "a.safetensors")
    ml.convert(tmp_path / "a.safetensors", tmp_path / "b.gguf", format="gguf", base_config=LLAMA)
    assert (tmp_path / "b.gguf").read_bytes() == (tmp_path / "a.gguf").read_bytes()
    ml.convert(tmp_path / "a.gguf", tmp_path / "c.gguf", format="gguf", base_config=LLAMA)
    assert gguf_bytes(tmp_path / "c.gguf") == gguf_bytes(tmp_path / "a.gguf")
    ml.convert(tmp_path / "a.gguf", tmp_path / "d.safetensors", format="safetensors", base_config=LLAMA)
    same(ml.load(tmp_path / "d.safetensors"), back)


def gguf_bytes(path):
    return {name: (kind, rows.tobytes()) for name, (kind, rows) in gguf_tensors(path).items()}


@given(data=st.data())
def test_what_fits_is_kept_whatever_the_mixture(tmp_path_factory, data):
    pytest.importorskip("gguf", reason="names of GGUF need the gguf package")
    rank = data.draw(st.sampled_from([32, 64, 256]))
    kinds = ("q8_0", "q4_1", "q4_0", "f32", "f16", "bf16")
    of_a = st.sampled_from((*TYPES, "f32", "f16"))
    of_b = st.sampled_from((*kinds, *TYPES) if rank == 256 else kinds)
    made = plain(rank, seed=data.draw(st.integers(0, 9)))
    types = {m: (data.draw(of_a), data.draw(of_b)) for m in made.modules()}
    made = ml.QuantizedAdapter.from_adapter(made, types, b_along_rank=True)
    folder = tmp_path_factory.mktemp("mixed")
    done = made.save(folder / "a.gguf", base_config=LLAMA)
    assert done.dropped == {}
    back = ml.AdapterFile.read(folder / "a.gguf", base_config=LLAMA)
    if not back.has_blocks:
        assert all(t[0].startswith(("f", "b")) and t[1].startswith(("f", "b")) for t in types.values())
        return
    same(ml.load(folder / "a.gguf", base_config=LLAMA), made)


def test_blocks_of_b_along_out_are_a_named_loss(tmp_path, names):
    made = quantised(("q4_k", "q8_0"), rank=8, along_rank=False, shapes={Q: SHAPES[Q], DOWN: SHAPES[DOWN]})
    for source in (made, tmp_path / "q.safetensors"):
        ml.save(made, tmp_path / "q.safetensors")
        with pytest.raises(UnsupportedVariantError, match=r"lora_b: q8_0 along the features.*drop:blocks"):
            ml.convert(source, tmp_path / "a.gguf", format="gguf", base_config=LLAMA)
    assert not (tmp_path / "a.gguf").exists()
    done = made.save(tmp_path / "a.gguf", base_config=LLAMA, allow=["drop:blocks"])
    assert "q_proj.lora_b" in done.dropped["blocks"]
    assert any("written as numbers" in n and "lora_b (f32)" in n and "lora_a" not in n for n in done.notes)
    back = ml.load(tmp_path / "a.gguf", base_config=LLAMA)
    want = made.dequantize()
    for m in made.modules():
        assert back.types(m) == ("q4_k", "f32")
        for got, expected in zip(back.dequantize().factors(m), want.factors(m), strict=True):
            np.testing.assert_array_equal(got, expected)
    # In float32 nothing is lost: the type was asked for by its name.
    done = ml.convert(made, tmp_path / "b.gguf", format="gguf", base_config=LLAMA, dtype="f32")
    assert done.dropped == {}
    assert (
        ml.load(tmp_path / "b.gguf", base_config=LLAMA).factors(Q)[1].tobytes()
        == want.factors(Q)[1].tobytes()
    )


def test_numbers_are_not_rounded_twice_unless_that_is_allowed(tmp_path, names):
    made = quantised(("q4_k", "q8_0"))
    for dtype in ("f16", "q4_0"):
        with pytest.raises(UnsupportedVariantError, match="drop:blocks"):
            ml.convert(made, tmp_path / "a.gguf", format="gguf", base_config=LLAMA, dtype=dtype)
    with pytest.raises(UnsupportedVariantError, match=r"lora_a: q4_k, where dtype asks for another type"):
        ml.convert(made, tmp_path / "a.gguf", format="gguf", base_config=LLAMA, dtype="q8_0")
    options = {"format": "gguf", "base_config": LLAMA, "dtype": "q8_0", "allow": ["drop:blocks"]}
    ml.convert(made, tmp_path / "a.gguf", **options)
    back = ml.load(tmp_path / "a.gguf", base_config=LLAMA)
    assert {back.types(m) for m in back.modules()} == {("q8_0", "q8_0")}
    b = plain().factors(DOWN)[1]
    assert gguf_bytes(tmp_path / "a.gguf")["blk.0.ffn_down.weight.lora_b"][1] == _core.quantize_blocks(
        b, "q8_0"
    )


def test_a_scaling_that_is_folded_in_would_change_blocks(tmp_path, names):
    made = quantised(alpha={Q: 8.0, K: 8.0, DOWN: 12.0})
    with pytest.raises(UnsupportedVariantError, match=r"down_proj.*which a scaling.*drop:blocks"):
        made.save(tmp_path / "a.gguf", base_config=LLAMA)
    made.save(tmp_path / "a.gguf", base_config=LLAMA, allow=["drop:blocks"])
    back = ml.load(tmp_path / "a.gguf", base_config=LLAMA)
    assert [back.types(m)[1] for m in (Q, K, DOWN)] == ["q8_0", "q8_0", "f32"]
    x = np.random.default_rng(1).standard_normal(512).astype(np.float32)
    np.testing.assert_allclose(back.forward(x, DOWN), made.forward(x, DOWN), rtol=1e-4, atol=1e-4)


def test_the_core_refuses_what_python_asks_before(tmp_path, names):
    file = ml.AdapterFile.from_adapter(quantised(rank=8, along_rank=False, types=("q4_k", "q8_0")))
    targets = {m: (f"{TENSORS[m]}.weight", None) for m in SHAPES}
    with pytest.raises(UnsupportedVariantError, match="drop:blocks"):
        _core.save_gguf(file, tmp_path / "a.gguf", "llama", targets, "auto", False, None, None, None, None)
    assert not (tmp_path / "a.gguf").exists()


@pytest.mark.parametrize("format", ["peft", "mlx", "kohya", "diffusers", "flat", "npz", "safetensors"])
def test_formats_without_blocks_get_their_numbers_and_say_so(tmp_path, format):
    made = quantised(("q6_k", "q8_0"), rank=3, along_rank=False)
    ml.save(made, tmp_path / "q.safetensors")
    allow = ["drop:blocks"] if format == "safetensors" else []
    for i, source in enumerate((made, tmp_path / "q.safetensors")):
        done = ml.convert(source, tmp_path / f"{format}{i}", format=format, allow=allow)
        note = next(n for n in done.notes if n.startswith("in blocks"))
        assert f"{Q}.lora_a" in note
        assert "q6_k:" in note
        assert "q8_0:" in note
        back = ml.load(tmp_path / f"{format}{i}")
        assert isinstance(back, ml.Adapter)
        want = made.dequantize()
        assert sorted(back.modules()) == sorted(want.modules())
        for m in want.modules():
            assert back.info(m).scaling == want.info(m).scaling
            for got, expected in zip(back.factors(m), want.factors(m), strict=True):
                np.testing.assert_array_equal(got, expected)


def test_our_own_file_is_read_whole(tmp_path):
    made = quantised(("q4_1", "q4_0"), rank=3, along_rank=False, use_rslora=True)
    made = made.with_metadata(ml.AdapterMetadata(name="small"))
    ml.save(made, tmp_path / "q.safetensors")
    file = ml.AdapterFile.read(tmp_path / "q.safetensors")
    assert (file.format, file.has_blocks, len(file.modules)) == ("safetensors", True, 3)
    assert {(m.dtype_a, m.dtype_b, m.rank, m.use_rslora) for m in file.modules} == {("F32", "F32", 3, True)}
    assert file.adapter() == made.dequantize()
    assert "q4_1:" in file.notes[0]
    # Written again it is the same file, blocks and all.
    done = file.save(tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == (tmp_path / "q.safetensors").read_bytes()
    assert (done.format, done.modules) == ("safetensors", 3)
    assert ml.load(tmp_path / "again.safetensors") == made
    with pytest.raises(DestinationExistsError):
        made.save(tmp_path / "q.safetensors")
    made.save(tmp_path / "q.safetensors", overwrite=True)
    assert not ml.AdapterFile.from_adapter(plain()).has_blocks


def test_a_damaged_file_of_blocks_is_refused_everywhere(tmp_path):
    ml.save(quantised(rank=3, along_rank=False), tmp_path / "q.safetensors")
    whole = (tmp_path / "q.safetensors").read_bytes()
    for name, data in {
        "cut": whole[:-5],
        "type": whole.replace(b"q8_0", b"q9_0"),
        "version": whole.replace(b'"format_version":"2"', b'"format_version":"9"'),
        "scale": whole[:-34] + b"\xff\x7f" + whole[-32:],  # of the last block of q8_0: NaN
    }.items():
        assert data != whole
        path = tmp_path / f"{name}.safetensors"
        path.write_bytes(data)
        for use in (
            ml.AdapterFile.read,
            ml.load,
            ml.verify,
            lambda p: ml.convert(p, tmp_path / "out", format="peft"),
        ):
            with pytest.raises(FormatError, match=rf"{name}\.safetensors"):
                use(path)
        assert not ml.inspect(path).ok
    assert not (tmp_path / "out").exists()


def test_experts_in_blocks_stay_blocks_in_gguf_and_become_numbers_in_ours(tmp_path, names):
    a = np.random.default_rng(0).standard_normal((3 * 32, 256), np.float32)
    b = np.random.default_rng(1).standard_normal((3 * 512, 32), np.float32)
    rows = [
        ("blk.0.ffn_up_exps.weight.lora_a", (256, 32, 3), 12, _core.quantize_blocks(a, "q4_k")),
        ("blk.0.ffn_up_exps.weight.lora_b", (32, 512, 3), 8, _core.quantize_blocks(b, "q8_0")),
        ("token_embd.weight.lora_a", (32, 20), 8, _core.quantize_blocks(b[:20], "q8_0")),
        ("token_embd.weight.lora_b", (32, 256), 2, _core.quantize_blocks(b[:256], "q4_0")),
    ]
    (tmp_path / "e.gguf").write_bytes(ref.encode(ref.keys("llama"), rows))
    base = LLAMA | {"model_type": "mixtral", "num_local_experts": 3}
    done = ml.convert(tmp_path / "e.gguf", tmp_path / "again.gguf", format="gguf", base_config=base)
    assert gguf_bytes(tmp_path / "again.gguf") == gguf_bytes(tmp_path / "e.gguf")
    assert done.dropped == {}
    assert ml.verify(tmp_path / "again.gguf").checked == ("weights",)
    options = {"format": "safetensors", "base_config": base}
    done = ml.convert(tmp_path / "e.gguf", tmp_path / "e.safetensors", **options)
    assert any("written as float32: the file has embedding, experts" in n for n in done.notes)
    back = ml.AdapterFile.read(tmp_path / "e.safetensors")
    assert [m.dtype_a for m in back.modules] == ["F32", "F32"]
    arrays, _ = back.to_arrays()
    want = _core.dequantize_blocks(_core.quantize_blocks(a, "q4_k"), "q4_k", 96, 256).reshape(3, 32, 256)
    np.testing.assert_array_equal(arrays["model.layers.0.mlp.experts.up_proj"][0], want)
    want = _core.dequantize_blocks(_core.quantize_blocks(b[:20], "q8_0"), "q8_0", 20, 32).T
    np.testing.assert_array_equal(arrays["model.embed_tokens"][0], want)
    # Without them nothing of blocks is left, and what runs is plain.
    with pytest.raises(UnsupportedVariantError, match="drop:experts"):
        ml.load(tmp_path / "e.gguf", base_config=base)


def test_what_is_dropped_takes_its_blocks_with_it(tmp_path):
    rows = [
        ("blk.0.attn_v.weight.lora_a", (32, 2), 0, np.ones((2, 32), "f4").tobytes()),
        ("blk.0.attn_v.weight.lora_b", (2, 5), 0, np.ones((5, 2), "f4").tobytes()),
        ("blk.0.ffn_up_exps.weight.lora_a", (32, 2, 3), 8, bytes(34 * 6)),
        ("blk.0.ffn_up_exps.weight.lora_b", (2, 4, 3), 0, np.ones((3, 4, 2), "f4").tobytes()),
    ]
    (tmp_path / "e.gguf").write_bytes(ref.encode(ref.keys("qwen2"), rows))
    left = ml.load(tmp_path / "e.gguf", allow=["drop:experts"])
    assert isinstance(left, ml.Adapter)
    assert left.modules() == ["blk.0.attn_v"]


# -- one LoRA per expert ---------------------------------------

MOE = LLAMA | {"model_type": "qwen3_moe", "num_experts": 3, "hidden_size": 64, "intermediate_size": 96}
LEAVES = {"gate_proj": (64, 32), "up_proj": (64, 32), "down_proj": (32, 64)}


def per_expert(rank=32, experts=3, alpha=8.0, layers=(0, 1)):
    shapes = {
        f"model.layers.{i}.mlp.experts.{e}.{leaf}": size
        for i in layers for e in range(experts) for leaf, size in LEAVES.items()
    }  # fmt: skip
    return plain(rank, {"model.layers.0.self_attn.v_proj": (64, 32)} | shapes, alpha)


def test_experts_that_are_modules_of_their_own_become_one_tensor(tmp_path, names):
    made = per_expert(4)
    done = ml.convert(made, tmp_path / "a.gguf", format="gguf", base_config=MOE)
    assert done.dropped == {}
    found = gguf_tensors(tmp_path / "a.gguf")
    assert len(found) == 2 * (1 + 2 * 3)
    for i in (0, 1):
        for leaf, kind in (("gate_proj", "gate"), ("up_proj", "up"), ("down_proj", "down")):
            pairs = [made.factors(f"model.layers.{i}.mlp.experts.{e}.{leaf}") for e in range(3)]
            for side, end in enumerate("ab"):
                got = found[f"blk.{i}.ffn_{kind}_exps.weight.lora_{end}"][1]
                np.testing.assert_array_equal(got, np.stack([p[side] for p in pairs]))
    back = ml.AdapterFile.read(tmp_path / "a.gguf", base_config=MOE)
    assert sorted({m.kind for m in back.modules}) == ["experts", "linear"]
    assert ml.verify(tmp_path / "a.gguf").checked == ("weights",)


def test_experts_in_blocks_become_one_tensor_too(tmp_path, names):
    made = per_expert(32, layers=(0,))
    q = ml.QuantizedAdapter.from_adapter(
        made, dict.fromkeys(made.modules(), ("q8_0", "q4_0")), b_along_rank=True
    )
    q.save(tmp_path / "a.gguf", base_config=MOE)
    found = gguf_bytes(tmp_path / "a.gguf")
    for side, (end, kind) in enumerate((("a", "q8_0"), ("b", "q4_0"))):
        of = [made.factors(f"model.layers.0.mlp.experts.{e}.up_proj")[side] for e in range(3)]
        want = b"".join(_core.quantize_blocks(f, kind) for f in of)
        assert found[f"blk.0.ffn_up_exps.weight.lora_{end}"] == (kind, want)
    types = dict.fromkeys(made.modules(), ("q8_0", "q4_0"))
    types["model.layers.0.mlp.experts.1.up_proj"] = ("q4_0", "q4_0")
    mixed = ml.QuantizedAdapter.from_adapter(made, types, b_along_rank=True)
    with pytest.raises(UnsupportedVariantError, match=r"up_proj.*blocks of different types"):
        mixed.save(tmp_path / "b.gguf", base_config=MOE)


def test_experts_that_do_not_fit_one_tensor_are_refused_by_name(tmp_path, names):
    def refused(made, words, error=UnsupportedVariantError, base=MOE):
        with pytest.raises(error, match=words):
            ml.convert(made, tmp_path / "a.gguf", format="gguf", base_config=base)
        assert not (tmp_path / "a.gguf").exists()

    one = "model.layers.0.mlp.experts.1.up_proj"
    made = per_expert(4, layers=(0,))
    factors = {m: made.factors(m) for m in made.modules()}
    a, b = factors[one]
    other = ml.Adapter.from_factors(factors | {one: (a[:2], b[:, :2])}, alpha=8.0)
    refused(other, r"experts\.1\.up_proj.*must be the same")
    alphas = dict.fromkeys(factors, 8.0) | {one: 16.0}
    refused(ml.Adapter.from_factors(factors, alpha=alphas), r"alpha 16.*alpha 8.*must be the same")
    less = {m: f for m, f in factors.items() if m != one}
    refused(ml.Adapter.from_factors(less, alpha=8.0), r"experts\.up_proj: got no expert 1, expected all of 3")
    refused(per_expert(4, experts=4, layers=(0,)), "got expert 3, expected all of 3")
    refused(per_expert(4, experts=3, layers=(5,)), r"layers\.5\.mlp\.experts\.0", FormatError)
    refused(made, "num_experts", ConfigError, MOE | {"num_experts": 0})
