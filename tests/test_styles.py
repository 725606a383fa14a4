"""Key styles of other programs: what is read, what is written, what is lost, and every refusal."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import microlora as ml
from microlora.exceptions import (
    CancelledError,
    ConfigError,
    FormatError,
    UnsupportedVariantError,
)
from styles_support import (
    PATHS,
    delta,
    diffusers,
    factors,
    kohya,
    mlx,
    peft,
    peft_content,
    read_safetensors,
    safetensors,
    same_deltas,
)

STYLES = ("mlx", "kohya", "diffusers", "flat", "npz")
F = factors()
UNDER = {p: "lora_te_" + p.replace(".", "_") for p in PATHS}
UNET = {
    "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q": F[PATHS[0]],
    "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_out.0": F[PATHS[1]],
    "text_encoder.text_model.encoder.layers.0.self_attn.q_proj": F[PATHS[2]],
}


def twins(fs, alpha, rename=lambda p: p):
    return {rename(p): delta(a, b, alpha / a.shape[0]) for p, (a, b) in fs.items()}


def place(tmp_path, style):
    return tmp_path / {"mlx": "mlx", "npz": "a.npz"}.get(style, "a.safetensors")


# -- reading --


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_mlx_is_read(tmp_path, dtype):
    fs = factors(dtype=dtype)
    file = ml.AdapterFile.read(mlx(tmp_path / "a", fs, scale=20.0))
    assert file.format == "mlx"
    assert {m.alpha for m in file.modules} == {60.0}
    same_deltas(file.adapter(), twins(fs, 60.0))
    assert json.loads(file.peft_config)["base_model_name_or_path"] == "org/tiny"
    same_deltas(ml.load(tmp_path / "a" / "adapters.safetensors"), twins(fs, 60.0))


def test_mlx_checkpoints_and_local_models(tmp_path):
    local = str(tmp_path / "models" / "tiny")
    mlx(tmp_path, F, name="0000100_adapters.safetensors", config={"model": local})
    file = ml.AdapterFile.read(tmp_path / "0000100_adapters.safetensors")
    assert (file.format, len(file.modules)) == ("mlx", 3)
    assert local not in file.peft_config
    with pytest.raises(FormatError, match=r"no adapters\.safetensors"):
        ml.load(tmp_path)


def test_mlx_embeddings_and_experts_and_dora_are_kept(tmp_path):
    r = np.random.default_rng(0)
    a, b = r.standard_normal((3, 11)).astype("f4"), r.standard_normal((7, 3)).astype("f4")
    x, y = r.standard_normal((4, 3, 7)).astype("f4"), r.standard_normal((4, 5, 3)).astype("f4")
    fs = {**F, "model.embed_tokens": (a, b), "model.layers.0.mlp.switch_mlp.up_proj": (x, y)}
    file = ml.AdapterFile.read(mlx(tmp_path / "a", fs))
    kinds = {m.path: (m.kind, m.shape_a, m.shape_b) for m in file.modules}
    assert kinds["model.embed_tokens"] == ("embedding", (3, 11), (7, 3))
    assert kinds["model.layers.0.mlp.switch_mlp.up_proj"] == ("experts", (4, 3, 7), (4, 5, 3))
    with pytest.raises(UnsupportedVariantError, match='"drop:embedding"'):
        file.adapter()
    same_deltas(file.adapter(allow=["drop:embedding", "drop:experts"]), twins(F, 60.0))
    ml.convert(file, tmp_path / "b", format="mlx")
    one, two = (read_safetensors(tmp_path / d / "adapters.safetensors")[1] for d in "ab")
    assert one == two

    m = {f"{p}.m": np.arange(1, 6, dtype=np.float32) for p in F}
    dora = ml.AdapterFile.read(mlx(tmp_path / "c", F, config={"fine_tune_type": "dora"}, **m))
    assert {v.kind for v in dora.variants} == {"dora"}
    ml.convert(dora, tmp_path / "d", format="mlx")
    assert json.loads((tmp_path / "d" / "adapter_config.json").read_text())["fine_tune_type"] == "dora"
    one, two = (read_safetensors(tmp_path / d / "adapters.safetensors")[1] for d in "cd")
    assert one == two
    ml.convert(dora, tmp_path / "p", format="peft")
    config, tensors = peft_content(tmp_path / "p")
    assert config["use_dora"] is True
    assert tensors[f"base_model.model.{PATHS[0]}.lora_magnitude_vector"][1] == (5,)
    ml.convert(tmp_path / "p", tmp_path / "e", format="mlx")
    assert read_safetensors(tmp_path / "e" / "adapters.safetensors")[1] == one
    same_deltas(dora.adapter(allow=["drop:dora"]), twins(F, 60.0))
    ml.convert(dora, tmp_path / "f", format="mlx", allow=["drop:dora"])
    same_deltas(ml.load(tmp_path / "f"), twins(F, 60.0))


@pytest.mark.parametrize("alpha", [1.0, 4.5, None])
def test_kohya_is_read(tmp_path, alpha):
    fs = {UNDER[p]: ab for p, ab in F.items()}
    file = ml.AdapterFile.read(kohya(tmp_path / "a", fs, alpha, {"ss_network_dim": "3"}))
    assert file.format == "kohya"
    assert file.header == {"ss_network_dim": "3"}
    same_deltas(file.adapter(), twins(fs, 3.0 if alpha is None else alpha))
    assert any("no alpha" in note for note in file.notes) == (alpha is None)


def test_an_alpha_that_is_given_counts_or_is_refused(tmp_path):
    fs = {UNDER[p]: ab for p, ab in F.items()}
    same_deltas(ml.load(kohya(tmp_path / "bare", fs), alpha=16.0), twins(fs, 16.0))
    for path in (kohya(tmp_path / "own", fs, 6.0), peft(tmp_path / "peft", F)):
        with pytest.raises(FormatError, match=r"alpha: got 99.*carries its own"):
            ml.load(path, alpha=99.0)


def test_kohya_names_become_the_bases(tmp_path):
    fs = {UNDER[p]: ab for p, ab in F.items()}
    path = kohya(tmp_path / "a", fs, 3.0)
    same_deltas(ml.AdapterFile.read(path, module_names=[*PATHS, "lm_head"]).adapter(), twins(F, 3.0))
    base = safetensors(tmp_path / "base.safetensors", {f"{p}.weight": np.zeros((5, 7), "f4") for p in PATHS})
    file = ml.AdapterFile.read(path, module_names=base)
    same_deltas(file.adapter(), twins(F, 3.0))
    ml.convert(path, tmp_path / "p", format="peft", module_names=PATHS)
    same_deltas(ml.load(tmp_path / "p"), twins(F, 3.0))
    with pytest.raises(FormatError, match="no module of the base"):
        ml.AdapterFile.read(path, module_names=PATHS[:2])
    twice = [*PATHS, "model.layers.0.self.attn_q_proj"]
    with pytest.raises(FormatError, match=r"may be .*self_attn.* or .*self\.attn"):
        ml.AdapterFile.read(path, module_names=twice)
    with pytest.raises(FormatError, match=r"may be .*self_attn.* or .*self\.attn"):
        ml.convert(peft(tmp_path / "q", F), tmp_path / "k", format="kohya", module_names=twice)
    both = dict.fromkeys(("lora_te_q_proj", "lora_te1_q_proj"), F[PATHS[0]])
    with pytest.raises(FormatError, match=r"lora_te1_q_proj.*lora_te_q_proj.*are both"):
        ml.AdapterFile.read(kohya(tmp_path / "b", both, 1.0), module_names=["text_encoder.q_proj"])
    gpt2 = kohya(tmp_path / "g", {"lora_te_transformer_h_0_attn_c_attn": F[PATHS[0]]}, 1.0)
    file = ml.AdapterFile.read(gpt2, module_names=["transformer.h.0.attn.c_attn"])
    assert [m.path for m in file.modules] == ["transformer.h.0.attn.c_attn"]
    for names in (["", "x"], [1]):
        with pytest.raises(ConfigError, match="module_names"):
            ml.AdapterFile.read(path, module_names=names)


def test_components_of_a_pipeline_have_kohyas_prefixes(tmp_path):
    src = diffusers(tmp_path / "a", UNET)
    ml.convert(src, tmp_path / "k", format="kohya")
    _, tensors = read_safetensors(tmp_path / "k")
    bases = {name.split(".")[0] for name in tensors}
    assert bases == {
        "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q",
        "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_out_0",
        "lora_te_text_model_encoder_layers_0_self_attn_q_proj",
    }
    same_deltas(ml.load(tmp_path / "k"), twins(UNET, 3.0))  # our header has the dotted names
    header, arrays = read_safetensors(tmp_path / "k")
    bare = {k: np.frombuffer(raw, "<f4").reshape(shape) for k, (_, shape, raw) in arrays.items()}
    file = ml.AdapterFile.read(safetensors(tmp_path / "bare", bare), module_names=list(UNET))
    same_deltas(file.adapter(), twins(UNET, 3.0))
    assert "microlora.modules" in header


ENDS = [
    (".lora_A.weight", ".lora_B.weight"),
    (".lora_A.default.weight", ".lora_B.default.weight"),
    (".lora.down.weight", ".lora.up.weight"),
    (".lora_linear_layer.down.weight", ".lora_linear_layer.up.weight"),
    (".lora_A", ".lora_B"),
]


@pytest.mark.parametrize("ends", ENDS, ids=[e[0] for e in ENDS])
def test_diffusers_spellings(tmp_path, ends):
    file = ml.AdapterFile.read(diffusers(tmp_path / "a", UNET, ends))
    assert file.format == "diffusers"
    same_deltas(file.adapter(), twins(UNET, 3.0))
    assert any("alpha = rank" in note for note in file.notes)
    told = ml.AdapterFile.read(diffusers(tmp_path / "b", UNET, ends), alpha=12.0)
    same_deltas(told.adapter(), twins(UNET, 12.0))


def test_old_attention_processors(tmp_path):
    base = "unet.mid_block.attentions.0.transformer_blocks.0.attn1"
    fs = {f"{base}.processor.to_q": F[PATHS[0]], f"{base}.processor.to_out": F[PATHS[1]]}
    file = ml.AdapterFile.read(diffusers(tmp_path / "a", fs, ("_lora.down.weight", "_lora.up.weight")))
    want = {f"{base}.to_q": F[PATHS[0]], f"{base}.to_out.0": F[PATHS[1]]}
    same_deltas(file.adapter(), twins(want, 3.0))


def test_diffusers_metadata_gives_alpha(tmp_path):
    keep = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj"
    said = {
        "unet.r": 3,
        "unet.lora_alpha": 9,
        "unet.alpha_pattern": {"attn1.to_q": 1.5},
        "text_encoder.r": 3,
        "text_encoder.lora_alpha": 6,
        "text_encoder.use_rslora": True,
    }
    path = diffusers(tmp_path / "a", UNET, header={"lora_adapter_metadata": json.dumps(said)})
    file = ml.AdapterFile.read(path)
    alphas = {m.path: (m.alpha, m.use_rslora) for m in file.modules}
    q, out, _ = UNET
    assert alphas == {q: (1.5, False), out: (9.0, False), keep: (6.0, True)}
    ml.convert(file, tmp_path / "b", format="diffusers")
    header, _ = read_safetensors(tmp_path / "b")
    written = json.loads(header["lora_adapter_metadata"])
    assert {"unet.r", "unet.lora_alpha", "text_encoder.use_rslora", "unet.target_modules"} <= set(written)
    assert ml.AdapterFile.read(tmp_path / "b").modules == file.modules

    for bad, match in [
        (said | {"unet.r": 4}, "gives module .* rank 4"),
        (said | {"unet.lora_alpha": "x"}, "lora_alpha"),
        ("[]", "not a JSON object"),
    ]:
        text = bad if isinstance(bad, str) else json.dumps(bad)
        with pytest.raises(FormatError, match=match):
            ml.load(diffusers(tmp_path / "c", UNET, header={"lora_adapter_metadata": text}))


def test_comfy_keys_are_told(tmp_path):
    fs = {"diffusion_model.blocks.0.q": F[PATHS[0]], "text_encoders.clip_l.q": F[PATHS[1]]}
    for path in (kohya(tmp_path / "a", fs, 3.0), diffusers(tmp_path / "b", fs)):
        file = ml.AdapterFile.read(path)
        assert any("ComfyUI" in note for note in file.notes)
        same_deltas(file.adapter(), twins(fs, 3.0))


def flat(fs, last):
    one = {f"{p}.lora_a": a.T if last else a for p, (a, _) in fs.items()}
    return one | {f"{p}.lora_b": b.T if last else b for p, (_, b) in fs.items()}


@pytest.mark.parametrize("last", [False, True], ids=["rank_first", "rank_last"])
def test_flat_orientation_by_shape(tmp_path, last):
    path = safetensors(tmp_path / "a", flat(F, last))
    file = ml.AdapterFile.read(path, alpha=6.0)
    assert file.format == "flat"
    same_deltas(file.adapter(), twins(F, 6.0))
    same_deltas(ml.load(path, alpha=6.0), twins(F, 6.0))
    with pytest.raises(FormatError, match=r"no alpha.*alpha="):
        ml.load(path)
    with pytest.raises(FormatError, match="with one rank"):
        ml.load(path, alpha=6.0, orientation="rank_first" if last else "rank_last")
    alphas = {f"{p}.alpha": np.float16(2.0) for p in F}
    same_deltas(ml.load(safetensors(tmp_path / "b", flat(F, last) | alphas)), twins(F, 2.0))


def test_a_bare_pair_of_a_square_layer(tmp_path):
    # A (768, 8) and B (8, 768), as candle's LoRA saves them.
    fs = factors(["lora"], rank=8, n_in=768, n_out=768)
    ((a, b),) = fs.values()
    for x, y in ((a, b), (a.T, b.T)):
        path = safetensors(tmp_path / "a", {"lora_a": x, "lora_b": y})
        same_deltas(ml.load(path, alpha=16.0), twins(fs, 16.0))
    ml.convert(path, tmp_path / "b", format="flat", alpha=16.0)
    header, tensors = read_safetensors(tmp_path / "b")
    assert {k: v[1] for k, v in tensors.items()} == {"lora_a": (768, 8), "lora_b": (8, 768)}
    assert header["microlora.orientation"] == "rank_last"
    same_deltas(ml.load(tmp_path / "b"), twins(fs, 16.0))


def test_square_factors_must_be_told(tmp_path):
    fs = factors(["m"], rank=4, n_in=4, n_out=4)
    path = safetensors(tmp_path / "a", flat(fs, True))
    with pytest.raises(FormatError, match=r"orientation=\"rank_first\".*orientation=\"rank_last\""):
        ml.load(path, alpha=4.0)
    same_deltas(ml.load(path, alpha=4.0, orientation="rank_last"), twins(fs, 4.0))
    with pytest.raises(ConfigError, match="orientation"):
        ml.load(path, alpha=4.0, orientation="sideways")
    # One module that is not square decides for all.
    more = fs | factors(["n"], rank=4, n_in=6, n_out=5)
    same_deltas(ml.load(safetensors(tmp_path / "b", flat(more, True)), alpha=4.0), twins(more, 4.0))
    for style in ("flat", "npz"):  # what is written here says it itself
        ml.convert(
            ml.Adapter.from_factors(fs, alpha=4.0), place(tmp_path, style), format=style, overwrite=True
        )
        same_deltas(ml.load(place(tmp_path, style)), twins(fs, 4.0))


# -- round trips --


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize(
    ("dtype", "use_rslora"), [("f32", False), ("f32", True), ("f16", False), ("bf16", True)]
)
def test_peft_there_and_back(tmp_path, style, dtype, use_rslora):
    one = peft(tmp_path / "one", F, 0.3, dtype, use_rslora)
    done = ml.convert(one, place(tmp_path, style), format=style)
    assert (done.source, done.format, done.modules, done.dropped) == ("peft", style, 3, {})
    file = ml.AdapterFile.read(place(tmp_path, style))
    assert file.format == style
    ml.convert(file, tmp_path / "two", format="peft")
    if style == "npz" and dtype == "bf16":
        assert any("bfloat16" in note for note in done.notes)
        want = {m: delta(*ml.load(one).factors(m), 0.3 / 3**0.5) for m in F}
        same_deltas(ml.load(tmp_path / "two"), want, 1e-15)
    else:
        assert peft_content(tmp_path / "two") == peft_content(one)


@pytest.mark.parametrize("style", STYLES)
def test_settings_and_metadata_stay(tmp_path, style):
    adapter = ml.Adapter.from_factors(F, alpha=6.0).with_metadata(ml.AdapterMetadata(base_model="org/tiny"))
    ml.convert(adapter, place(tmp_path, style), format=style)
    again = ml.load(place(tmp_path, style))
    assert again.metadata == adapter.metadata
    assert again.config.replace(target_modules=adapter.config.target_modules) == adapter.config
    if style == "mlx":
        assert json.loads((tmp_path / "mlx" / "adapter_config.json").read_text())["model"] == "org/tiny"


@given(
    st.sampled_from(STYLES),
    st.sampled_from(["f32", "f16", "bf16"]),
    st.integers(1, 5),
    st.integers(1, 9),
    st.integers(1, 9),
    st.integers(1, 3),
    st.floats(0.01, 100),
    st.booleans(),
)
def test_every_shape_comes_back(tmp_path_factory, style, dtype, rank, n_in, n_out, modules, alpha, rslora):
    rank = min(rank, n_in, n_out)
    fs = factors([f"model.layers.{i}.q_proj" for i in range(modules)], rank, n_in, n_out)
    adapter = ml.Adapter.from_factors(fs, alpha=alpha, use_rslora=rslora, dtype=dtype)
    path = place(tmp_path_factory.mktemp("x"), style)
    ml.convert(adapter, path, format=style)
    again = ml.load(path)
    for m in adapter.modules():
        one, two = adapter.info(m), again.info(m)
        assert (one.alpha, one.rank, one.use_rslora) == (two.alpha, two.rank, two.use_rslora)
        for x, y in zip(adapter.factors(m), again.factors(m), strict=True):
            np.testing.assert_array_equal(x, y)


def test_arrays_there_and_back():
    adapter = ml.Adapter.from_factors(F, alpha=dict(zip(F, (1.0, 2.0, 3.0), strict=True)), dtype="bf16")
    fs, alphas = ml.AdapterFile.from_adapter(adapter).to_arrays()
    again = ml.Adapter.from_factors(fs, alpha=alphas, dtype="bf16")
    assert again == adapter
    rslora = ml.Adapter.from_factors(F, alpha=2.0, use_rslora=True)
    assert ml.AdapterFile.from_adapter(rslora).to_arrays()[1] == dict.fromkeys(F, 2.0 * 3**0.5)


# -- MLX has one rank and one scale --


def test_mlx_ranks_are_refused_or_padded(tmp_path):
    fs = factors(PATHS[:1], rank=2) | factors(PATHS[1:], rank=4)
    adapter = ml.Adapter.from_factors(fs, alpha={p: a.shape[0] * 2.0 for p, (a, _) in fs.items()})
    with pytest.raises(ConfigError, match=r"rank: got .*pad:rank"):
        ml.convert(adapter, tmp_path / "a", format="mlx")
    assert not (tmp_path / "a").exists()
    done = ml.convert(adapter, tmp_path / "a", format="mlx", allow=["pad:rank"])
    assert any("zeros" in note for note in done.notes)
    same_deltas(ml.load(tmp_path / "a"), {p: delta(a, b, 2.0) for p, (a, b) in fs.items()}, 1e-15)
    assert json.loads((tmp_path / "a" / "adapter_config.json").read_text())["lora_parameters"]["rank"] == 4
    with pytest.raises(ConfigError, match="allow"):
        ml.convert(adapter, tmp_path / "b", format="kohya", allow=["pad:rank"])


def test_mlx_scales_go_into_b(tmp_path):
    alphas = dict(zip(PATHS, (6.0, 6.0, 1.5), strict=True))
    adapter = ml.Adapter.from_factors(F, alpha=alphas, dtype="f16")
    done = ml.convert(adapter, tmp_path / "a", format="mlx")
    assert any("went into their B" in note for note in done.notes)
    again = ml.load(tmp_path / "a")
    want = {p: delta(*adapter.factors(p), alphas[p] / 3) for p in PATHS}
    same_deltas(again, want, 1e-15)
    assert {again.info(p).alpha for p in PATHS} == {6.0}
    third = ml.Adapter.from_factors(F, alpha=dict(zip(PATHS, (6.0, 6.0, 2.0), strict=True)))
    with pytest.raises(ConfigError, match=r"scale.*round:scale"):
        ml.convert(third, tmp_path / "b", format="mlx")
    ml.convert(third, tmp_path / "b", format="mlx", allow=["round:scale"])
    want = {p: delta(*third.factors(p), third.info(p).scaling) for p in PATHS}
    same_deltas(ml.load(tmp_path / "b"), want, 1e-6)


def test_mlx_config_is_relative_to_blocks(tmp_path):
    fs = factors([*PATHS, "lm_head"])
    ml.convert(ml.Adapter.from_factors(fs, alpha=3.0), tmp_path / "a", format="mlx")
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert config["lora_parameters"]["keys"] == ["lm_head", "mlp.up_proj", "self_attn.q_proj"]
    assert config["num_layers"] == -1
    with pytest.raises(ConfigError, match="module path"):
        ml.convert(ml.Adapter.from_factors(factors(["q"]), alpha=3.0), tmp_path / "b", format="mlx")
    with pytest.raises(ConfigError, match=r"embed_tokens.*kind"):
        ml.convert(
            ml.Adapter.from_factors(factors(["m.embed_tokens"]), alpha=3.0), tmp_path / "b", format="mlx"
        )


# -- what is not plain LoRA --


def z(*shape):
    return np.ones(shape, np.float32)


# -- refusals --


def refuse(tmp_path, arrays, header=None):
    return safetensors(tmp_path / "bad.safetensors", arrays, header)


A, B = F[PATHS[0]]


@pytest.mark.parametrize("style", STYLES)
def test_progress_is_told_and_cancelling_leaves_nothing(tmp_path, style):
    adapter, told = ml.Adapter.from_factors(F, alpha=3.0), []
    ml.convert(adapter, place(tmp_path, style), format=style, progress=lambda *args: told.append(args[:2]))
    assert told[-1] == (3, 3)
    token = ml.CancelToken()
    token.cancel()
    with pytest.raises(CancelledError):
        ml.convert(adapter, tmp_path / "x", format=style, cancel=token)
    assert not (tmp_path / "x").exists()


def test_what_no_longer_fits_is_not_carried(tmp_path):
    adapter = ml.Adapter.from_factors(F, alpha=6.0)
    ml.convert(adapter, tmp_path / "a", format="kohya")
    header, tensors = read_safetensors(tmp_path / "a")
    arrays = {k: np.frombuffer(raw, "<f4").reshape(shape) for k, (_, shape, raw) in tensors.items()}
    assert "microlora.config" in header
    changed = {k: np.float32(9) if k.endswith(".alpha") else v for k, v in arrays.items()}
    again = ml.load(safetensors(tmp_path / "b", changed, header))
    same_deltas(again, twins(F, 9.0))
    assert again.config.alpha == 9.0


def test_limits_hold(tmp_path):
    path = kohya(tmp_path / "a", {"u": F[PATHS[0]]}, 1.0)
    for limits, match in [(ml.Limits(rank=2), "rank of u of 3"), (ml.Limits(tensors=2), "tensor count of 3")]:
        with pytest.raises(FormatError, match=match):
            ml.load(path, limits=limits)


def test_every_style_is_listed():
    assert {"mlx", "kohya", "diffusers", "flat", "npz"} <= {
        name for name, _ in ml._core.adapter_file_formats()
    }


def test_a_conversion_tells_what_the_reader_took_for_granted(tmp_path):
    down, up = np.ones((2, 4), "f4"), np.ones((4, 2), "f4")
    name = "lora_unet_mid_block_to_q"
    write = {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}
    done = ml.convert(safetensors(tmp_path / "a", write), tmp_path / "b.npz", format="npz")
    assert any("have no alpha" in note for note in done.notes)
    with pytest.raises(ml.exceptions.ConfigError, match=r"did you mean 'npz'"):
        ml.convert(tmp_path / "a", tmp_path / "c", format="NPZ")
