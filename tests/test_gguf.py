"""GGUF adapters from Python: names and rows of the model, what is lost, and every refusal."""

import json
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import microlora as ml
import reference_gguf as ref
from microlora import _core
from microlora.exceptions import (
    CancelledError,
    ConfigError,
    DestinationExistsError,
    FormatError,
    MissingExtraError,
    NonFiniteError,
    ShapeError,
    UnsupportedVariantError,
)
from microlora.formats import architectures

LLAMA = {
    "model_type": "llama", "num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 48,
    "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 20,
}  # fmt: skip
QWEN2 = LLAMA | {"model_type": "qwen2"}
PHI3 = LLAMA | {"model_type": "phi3", "num_key_value_heads": 4}
Q, K, UP, DOWN = (
    "model.layers.0.self_attn.q_proj",
    "model.layers.1.self_attn.k_proj",
    "model.layers.1.mlp.up_proj",
    "model.layers.0.mlp.down_proj",
)
SHAPES = {Q: (32, 32), K: (32, 16), UP: (32, 48), DOWN: (48, 32)}
TENSORS = {Q: "blk.0.attn_q", K: "blk.1.attn_k", UP: "blk.1.ffn_up", DOWN: "blk.0.ffn_down"}


@pytest.fixture
def names():
    return pytest.importorskip("gguf", reason="names of GGUF need the gguf package")


def factors(shapes=SHAPES, rank=4, seed=0):
    rng = np.random.default_rng(seed)
    return {
        p: (rng.standard_normal((rank, i), np.float32), rng.standard_normal((o, rank), np.float32))
        for p, (i, o) in shapes.items()
    }


def adapter(parts=None, alpha=8.0, **options):
    return ml.Adapter.from_factors(parts or factors(), alpha=alpha, **options)


def convert(source, tmp_path, base=LLAMA, **options):
    path = tmp_path / "a.gguf"
    return path, ml.convert(source, path, format="gguf", base_config=base, overwrite=True, **options)


def hand_written(tmp_path, architecture="qwen2", modules=None, **settings):
    path = tmp_path / "hand.gguf"
    modules = modules or {"blk.0.attn_q": (np.ones((2, 32)), np.arange(64.0).reshape(32, 2))}
    path.write_bytes(ref.adapter_file(architecture, modules, **settings))
    return path


def test_a_written_file_is_the_reference_s_bytes(tmp_path, names):
    parts = factors()
    path, done = convert(adapter(parts), tmp_path)
    assert (done.format, done.modules, done.dropped, done.notes) == ("gguf", 4, {}, ())
    heads = {Q: 4, K: 2}
    rows = {TENSORS[p]: (a, ref.interleaved(b, heads[p]) if p in heads else b) for p, (a, b) in parts.items()}
    more = [
        ("microlora.config", adapter(parts).config_json),
        ("microlora.weights_sha256", ref.weights_sha256(rows)),
    ]
    assert path.read_bytes() == ref.adapter_file("llama", rows, more=more)


def test_the_model_s_names_and_rows_come_back(tmp_path, names):
    parts = factors()
    path, _ = convert(adapter(parts), tmp_path)
    for source in (LLAMA, tmp_path, tmp_path / "config.json"):
        (tmp_path / "config.json").write_text(json.dumps(LLAMA))
        back = ml.load(path, base_config=source)
        assert back.modules() == list(parts)
        for p, pair in parts.items():
            assert all(np.array_equal(g, w) for g, w in zip(back.factors(p), pair, strict=True))
            assert back.info(p).scaling == 2.0


def test_peft_to_gguf_to_peft_has_the_same_bits(tmp_path, names):
    made = adapter(factors(), alpha={Q: 8.0, K: 8.0, UP: 8.0, DOWN: 8.0})
    ml.save(made, tmp_path / "peft", "peft")
    path, _ = convert(tmp_path / "peft", tmp_path)
    ml.convert(path, tmp_path / "again", format="peft", base_config=LLAMA)
    first, second = (ml.AdapterFile.read(tmp_path / d) for d in ("peft", "again"))
    assert first.modules == second.modules
    for i in range(len(first.modules)):
        assert first.factor_bytes(i) == second.factor_bytes(i)
    first_config, second_config = (
        json.loads((tmp_path / d / "adapter_config.json").read_text()) for d in ("peft", "again")
    )
    for name in ("r", "lora_alpha", "use_rslora", "peft_type"):
        assert first_config[name] == second_config[name]
    assert set(first_config["target_modules"]) == set(second_config["target_modules"])


def test_another_order_of_rows_is_not_used_silently(tmp_path):
    path = hand_written(tmp_path, "llama")
    with pytest.raises(UnsupportedVariantError, match="base_config"):
        ml.load(path)
    for format in ("peft", "safetensors"):
        with pytest.raises(UnsupportedVariantError, match=r"base_config=.*drop:row_order"):
            ml.convert(path, tmp_path / "p", format=format)
    assert [v.kind for v in ml.AdapterFile.read(path).variants] == ["row_order"]
    kept = ml.load(path, names="gguf")
    assert kept.modules() == ["blk.0.attn_q"]
    np.testing.assert_array_equal(kept.factors("blk.0.attn_q")[1], np.arange(64.0).reshape(32, 2))


def test_an_architecture_without_reordering_keeps_llama_s_names(tmp_path):
    loaded = ml.load(hand_written(tmp_path))
    assert loaded.modules() == ["blk.0.attn_q"]
    np.testing.assert_array_equal(loaded.factors("blk.0.attn_q")[1], np.arange(64.0).reshape(32, 2))


def test_names_of_llama_s_that_no_model_has_are_said(tmp_path):
    said = "keep llama.cpp's names, such as 'blk.0.attn_q'"
    kept = hand_written(tmp_path, "llama")
    for source, options in ((hand_written(tmp_path), {}), (kept, {"names": "gguf"})):
        for i, format in enumerate(("peft", "mlx", "npz", "safetensors")):
            place = tmp_path / f"{format}-{i}-{len(options)}"
            done = ml.convert(source, place, format=format, **options)
            assert [n for n in done.notes if said in n and "base_config=" in n], (format, done.notes)
    done = ml.convert(kept, tmp_path / "b.gguf", format="gguf")
    assert not any(said in note for note in done.notes)
    again = ml.convert(tmp_path / "peft-0-1", tmp_path / "again.npz", format="npz")
    assert any(said in note for note in again.notes)  # whatever file brought them


def test_names_that_were_given_back_are_not_spoken_of(tmp_path, names):
    path = hand_written(tmp_path, "llama")
    done = ml.convert(path, tmp_path / "p", format="peft", base_config=LLAMA)
    assert not any("llama.cpp" in note for note in done.notes)
    assert ml.load(tmp_path / "p").modules() == [Q]


def test_a_file_is_written_again_without_its_base(tmp_path):
    path = hand_written(tmp_path, "llama")
    for dtype, size in (("f32", 4), ("f16", 2)):
        ml.convert(path, tmp_path / "b.gguf", format="gguf", dtype=dtype, overwrite=True)
        back = ml.AdapterFile.read(tmp_path / "b.gguf", names="gguf")
        assert len(back.factor_bytes(0)[1]) == 64 * size
        assert back.header["general.architecture"] == "llama"
    ml.convert(path, tmp_path / "c.gguf", format="gguf")
    modules = {"blk.0.attn_q": (np.ones((2, 32)), np.arange(64.0).reshape(32, 2))}
    named = ("microlora.weights_sha256", ref.weights_sha256(modules))
    hand_written(tmp_path, "llama", more=[named])
    assert (tmp_path / "c.gguf").read_bytes() == path.read_bytes()


@given(data=st.data())
def test_any_module_of_any_family_goes_there_and_back(tmp_path_factory, data):
    pytest.importorskip("gguf", reason="names of GGUF need the gguf package")
    family = data.draw(st.sampled_from(sorted(architectures.FAMILIES)))
    heads = data.draw(st.integers(1, 3)) * 2
    config = LLAMA | {
        "model_type": family, "num_attention_heads": heads, "num_key_value_heads": heads // 2,
        "head_dim": 2 * data.draw(st.integers(1, 4)), "hidden_size": data.draw(st.integers(1, 9)),
        "intermediate_size": data.draw(st.integers(1, 9)),
    }  # fmt: skip
    base = architectures.Base.from_config(config)
    q, kv = heads * config["head_dim"], heads // 2 * config["head_dim"]
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    known = {
        "self_attn.q_proj": (hidden, q), "self_attn.k_proj": (hidden, kv), "self_attn.v_proj": (hidden, kv),
        "self_attn.o_proj": (q, hidden), "self_attn.qkv_proj": (hidden, q + 2 * kv),
        "mlp.gate_proj": (hidden, inner), "mlp.up_proj": (hidden, inner), "mlp.down_proj": (inner, hidden),
        "mlp.gate_up_proj": (hidden, 2 * inner),
    }  # fmt: skip
    fused = {"self_attn.qkv_proj", "mlp.gate_up_proj"}
    split = {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj"}
    known = {n: s for n, s in known.items() if n not in (split if family == "phi3" else fused)}
    known = {n: s for n, s in known.items() if base.tensor(f"model.layers.0.{n}")}
    assert len(known) >= 4
    chosen = data.draw(st.lists(st.sampled_from(sorted(known)), min_size=1, unique=True))
    parts = factors({f"model.layers.{i % 2}.{n}": known[n] for i, n in enumerate(chosen)}, rank=3)
    dtype = data.draw(st.sampled_from(["f32", "f16", "bf16"]))
    made = adapter(parts, dtype=dtype)
    folder = tmp_path_factory.mktemp("any")
    path, _ = convert(made, folder, config)
    back = ml.load(path, base_config=config)
    assert sorted(back.modules()) == sorted(parts)
    for p in parts:
        assert back.info(p).scaling == made.info(p).scaling
        assert all(np.array_equal(g, w) for g, w in zip(back.factors(p), made.factors(p), strict=True))


@pytest.mark.parametrize("dtype", ["q8_0", "q6_k", "q5_k", "q4_k", "q4_1", "q4_0"])
def test_blocks_are_those_of_the_codecs(tmp_path, names, dtype):
    parts = factors({UP: (512, 32)}, rank=4)
    path, done = convert(
        adapter(parts), tmp_path, QWEN2 | {"hidden_size": 512, "intermediate_size": 32}, dtype=dtype
    )
    a, b = parts[UP]
    assert _core.quantize_blocks(a, dtype) in path.read_bytes()
    assert b.astype(np.float16).tobytes() in path.read_bytes()
    assert "f16" in done.notes[0]
    assert "lora_b" in done.notes[0]
    raw = _core.quantize_blocks(a, dtype)
    running = ml.load(path, names="gguf")
    assert isinstance(running, ml.QuantizedAdapter)
    assert running.types("blk.1.ffn_up") == (dtype, "f16")
    back = running.dequantize()
    assert ml.AdapterFile.read(path, names="gguf").adapter() == back
    np.testing.assert_array_equal(
        back.factors("blk.1.ffn_up")[0], _core.dequantize_blocks(raw, dtype, 4, 512)
    )


def test_blocks_of_b_run_in_the_model_s_order(tmp_path, names):
    parts = factors(rank=32)
    path, done = convert(adapter(parts), tmp_path, dtype="q8_0")
    assert all(UP in note or DOWN in note or not note for note in done.notes)
    running = ml.load(path, base_config=LLAMA)
    assert isinstance(running, ml.QuantizedAdapter)
    assert running.types(Q) == ("q8_0", "q8_0")
    x = np.random.default_rng(2).standard_normal((3, 32)).astype(np.float32)
    for p in (Q, K):
        a, b = parts[p]
        want = 0.25 * x @ a.T @ b.T
        assert np.abs(running.forward(x, p) - want).max() < 0.03 * np.abs(want).max()


def test_scalings_that_differ_are_folded(tmp_path, names):
    parts = factors()
    alphas = {Q: 8.0, K: 16.0, UP: 8.0, DOWN: 3.0}
    made = adapter(parts, alphas)
    path, done = convert(made, tmp_path)
    assert any("folded" in n and DOWN in n and K in n and UP not in n for n in done.notes)
    back = ml.load(path, base_config=LLAMA)
    for p in parts:
        want = made.info(p).scaling * made.factors(p)[1].astype(np.float64)
        got = back.info(p).scaling * back.factors(p)[1].astype(np.float64)
        np.testing.assert_allclose(got, want, rtol=1e-7)
    np.testing.assert_array_equal(back.factors(K)[1], 2 * made.factors(K)[1])
    assert (back.config.alpha, back.config.alpha_of(K)) == (8.0, 8.0)


def test_rslora_of_peft_goes_through(tmp_path, names):
    ml.save(adapter(factors(rank=8), 4.0, use_rslora=True), tmp_path / "peft", "peft")
    path, done = convert(tmp_path / "peft", tmp_path)
    assert "alpha was rounded" in done.notes[0]
    ml.convert(path, tmp_path / "again", format="peft", base_config=LLAMA)
    first, second = ml.load(tmp_path / "peft"), ml.load(tmp_path / "again")
    assert second.info(Q).scaling == pytest.approx(first.info(Q).scaling, rel=1e-7)
    assert not second.info(Q).use_rslora


def test_settings_and_metadata_travel(tmp_path, names):
    made = adapter()
    made = made.with_metadata(ml.AdapterMetadata(name="ü", base_model="base"))
    path, _ = convert(made, tmp_path)
    back = ml.load(path, base_config=LLAMA)
    assert back.metadata == made.metadata
    assert back.config == made.config


@pytest.mark.parametrize(
    ("change", "error", "word"),
    [
        ({"model_type": "brand_new"}, ConfigError, "model_type"),
        ({"model_type": None}, ConfigError, "model_type"),
        ({"num_attention_heads": None}, ConfigError, "num_attention_heads"),
        ({"num_hidden_layers": True}, ConfigError, "num_hidden_layers"),
        ({"num_hidden_layers": 10**9}, ConfigError, "num_hidden_layers"),
        ({"num_hidden_layers": 1}, FormatError, "layers.1"),
        ({"num_attention_heads": 5, "head_dim": 8}, ShapeError, "q_proj"),
        ({"num_key_value_heads": 4}, ShapeError, "k_proj"),
        ({"hidden_size": 64}, ShapeError, "q_proj"),
        ({"intermediate_size": 47}, ShapeError, "up_proj"),
        ({"model_type": "phi3"}, FormatError, "phi3"),
    ],
)
def test_a_base_that_does_not_fit_is_refused_before_writing(tmp_path, names, change, error, word):
    with pytest.raises(error, match=word):
        convert(adapter(), tmp_path, LLAMA | change)
    assert not list(tmp_path.iterdir())


def test_a_multimodal_base_names_the_way_out(tmp_path, names):
    whole = {"model_type": "gemma3", "text_config": LLAMA | {"model_type": "gemma3_text"}}
    with pytest.raises(ConfigError, match=r"'gemma3', expected .*pass text_config"):
        convert(adapter(), tmp_path, whole)
    _, done = convert(adapter(), tmp_path, whole["text_config"])
    assert done.modules == 4
    with pytest.raises(ConfigError, match=r"qwen3_moe, seed_oss, smollm3$"):
        convert(adapter(), tmp_path, {"model_type": "clip", "text_config": {"model_type": "clip_text"}})


def test_another_architecture_than_the_base_s(tmp_path, names):
    with pytest.raises(FormatError, match="qwen2"):
        ml.load(hand_written(tmp_path, "llama"), base_config=QWEN2)
    for module in ("blk.7.attn_q", "blk.0.attn_qkv", "blk.0.nothing"):
        path = hand_written(tmp_path, "qwen2", {module: (np.ones((2, 32)), np.ones((32, 2)))})
        with pytest.raises(FormatError, match=module):
            ml.load(path, base_config=QWEN2)
    path = hand_written(tmp_path, "qwen2", {"blk.0.attn_q": (np.ones((2, 30)), np.ones((32, 2)))})
    with pytest.raises(ShapeError, match="attn_q"):
        ml.load(path, base_config=QWEN2)


def test_settings_that_exclude_each_other(tmp_path, names):
    path = hand_written(tmp_path, "llama")
    peft = tmp_path / "peft"
    ml.save(adapter(), peft, "peft")
    for options in ({"names": "gguf", "base_config": LLAMA}, {"names": "peft"}):
        with pytest.raises(ConfigError, match="names"):
            ml.load(path, **options)
    with pytest.raises(ConfigError, match="base_config"):
        ml.load(peft, base_config=LLAMA)
    with pytest.raises(ConfigError, match="names"):
        ml.AdapterFile.read(peft, names="gguf")
    with pytest.raises(ConfigError, match="base_config"):
        ml.convert(peft, tmp_path / "x.gguf", format="gguf")
    with pytest.raises(ConfigError, match="dtype"):
        convert(peft, tmp_path, dtype="f64")
    with pytest.raises(ConfigError, match="dtype"):
        ml.convert(peft, tmp_path / "x", format="peft", dtype="f16")
    with pytest.raises(DestinationExistsError):
        ml.convert(peft, path, format="gguf", base_config=LLAMA)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(FormatError, match="base_config"):
        ml.load(path, base_config=tmp_path)


def test_short_names_have_no_place(tmp_path, names):
    with pytest.raises(FormatError, match="model\\.layers\\.0"):
        convert(adapter(factors({"q_proj": (32, 32)})), tmp_path)


def embedding(path="model.embed_tokens", kind="embedding", shape_a=(4, 20), shape_b=(32, 4)):
    a, b = np.ones(shape_a, np.float32), np.ones(shape_b, np.float32)
    pair = ("F32", list(shape_a), a.tobytes()), ("F32", list(shape_b), b.tobytes())
    return ml.AdapterFile.wrap(_core.AdapterFile.build([(path, kind, 8.0, False, *pair)], []))


def test_embeddings_outputs_and_experts(tmp_path, names):
    path, _ = convert(embedding(), tmp_path)
    back = ml.AdapterFile.read(path, base_config=LLAMA)
    assert (back.modules[0].path, back.modules[0].kind) == ("model.embed_tokens", "embedding")
    assert back.modules[0].shape_a == (4, 20)
    with pytest.raises(UnsupportedVariantError, match="embedding"):
        back.adapter()
    for module in (embedding(), adapter(factors({"lm_head": (32, 20)}))):
        with pytest.raises(UnsupportedVariantError, match="tie_word_embeddings"):
            convert(module, tmp_path, LLAMA | {"tie_word_embeddings": True})
    experts = "model.layers.0.mlp.switch_mlp.up_proj"
    path, _ = convert(
        embedding(experts, "experts", (3, 4, 32), (3, 48, 4)), tmp_path, LLAMA | {"model_type": "mixtral"}
    )
    assert ml.AdapterFile.read(path, names="gguf").modules[0].path == "blk.0.ffn_up_exps"
    with pytest.raises(ConfigError, match="embedding"):
        convert(embedding("model.layers.0.self_attn.q_proj", shape_a=(4, 32)), tmp_path)
    with pytest.raises(UnsupportedVariantError, match="drop:conv"):
        convert(embedding(Q, "conv", (4, 32, 1), (32, 4, 1)), tmp_path)


def test_a_number_that_is_too_large_leaves_nothing(tmp_path, names):
    a, b = factors()[Q]
    with pytest.raises(NonFiniteError, match=Q):
        convert(adapter({Q: (a, b * np.float32(1e6))}), tmp_path, dtype="f16")
    assert not list(tmp_path.iterdir())


def test_progress_and_cancel(tmp_path, names):
    seen = []
    convert(adapter(), tmp_path, progress=lambda done, total, what: seen.append((done, total)))
    assert seen == [(i, 4) for i in range(5)]
    old = (tmp_path / "a.gguf").read_bytes()
    token = ml.CancelToken()

    def stop(done, total, what):
        if done == 2:
            token.cancel()

    with pytest.raises(CancelledError):
        convert(adapter(), tmp_path, progress=stop, cancel=token, dtype="f16")
    assert (tmp_path / "a.gguf").read_bytes() == old
    assert [p.name for p in tmp_path.iterdir()] == ["a.gguf"]


def test_without_the_package_the_extra_is_named(tmp_path, monkeypatch):
    architectures._names.cache_clear()
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(MissingExtraError, match=r"microlora\[gguf\]"):
        convert(adapter(), tmp_path)
    assert ml.load(hand_written(tmp_path)).modules() == ["blk.0.attn_q"]


def test_a_whole_model_is_no_adapter(tmp_path):
    path = hand_written(tmp_path, general="model")
    with pytest.raises(UnsupportedVariantError, match="whole model"):
        ml.load(path)


@given(
    names_=st.lists(st.text(min_size=1, max_size=12), min_size=1, max_size=3, unique=True),
    kind=st.integers(0, 40),
)
def test_strange_names_and_types_are_read_or_refused(tmp_path_factory, names_, kind):
    path = tmp_path_factory.mktemp("odd") / "a.gguf"
    rows = []
    for name in names_:
        for suffix, shape in (("a", (2, 4)), ("b", (3, 2))):
            data = np.ones(shape, np.float32).tobytes()
            rows.append((f"{name}.weight.lora_{suffix}", tuple(reversed(shape)), kind, data))
    path.write_bytes(ref.encode(ref.keys("qwen2"), rows))
    good = kind in (0, 1, 30) and not any(ord(c) < 32 or 127 <= ord(c) < 160 for n in names_ for c in n)
    if not good:
        with pytest.raises(FormatError, match="a\\.gguf"):
            ml.AdapterFile.read(path, names="gguf")
        return
    file = ml.AdapterFile.read(path, names="gguf")
    assert [m.path for m in file.modules] == names_


def test_rslora_that_becomes_another_alpha_is_said(tmp_path):
    pair = (np.ones((4, 64), np.float32), np.ones((128, 4), np.float32))
    a = ml.Adapter.from_factors({"model.layers.0.mlp.up_proj": pair}, alpha=8.0, use_rslora=True)
    base = {
        "model_type": "llama", "hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 1,
        "intermediate_size": 128, "vocab_size": 100,
    }  # fmt: skip
    done = ml.convert(a, tmp_path / "x.gguf", format="gguf", base_config=base)
    assert any("rsLoRA" in note for note in done.notes)
    back = ml.load(tmp_path / "x.gguf", base_config=base)
    assert back.info("model.layers.0.mlp.up_proj").scaling == 4.0
