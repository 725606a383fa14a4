"""What the key styles, flat files and archives refuse: file, key, what came and what was wanted."""

import numpy as np
import pytest

import microlora as ml
import reference_gguf as ref
from microlora.exceptions import (
    ConfigError,
    DestinationExistsError,
    FormatError,
    UnsupportedVariantError,
)
from styles_support import (
    PATHS,
    delta,
    factors,
    mlx,
    safetensors,
    same_deltas,
)

F = factors()
A, B = F[PATHS[0]]


def twins(fs, alpha, rename=lambda p: p):
    return {rename(p): delta(a, b, alpha / a.shape[0]) for p, (a, b) in fs.items()}


def z(*shape):
    return np.ones(shape, np.float32)


def refuse(tmp_path, arrays, header=None):
    return safetensors(tmp_path / "bad.safetensors", arrays, header)


REFUSED = {
    "both styles": (
        {"lora_unet_q.lora_down.weight": A, "base_model.model.q.lora_A.weight": A},
        r"ambiguous style.*(kohya|peft)",
    ),
    "kohya and diffusers": (
        {"lora_unet_q.lora_down.weight": A, "unet.q.lora_A.weight": A},
        "ambiguous style",
    ),
    "diffusers and flat": ({"q.lora_a": A, "unet.q.lora_A.weight": A}, "ambiguous style"),
    "two for one": (
        {"unet.q.lora_A.weight": A, "unet.q.lora_A.default.weight": A, "unet.q.lora_B.weight": B},
        r"unet\.q\.lora_A\.(default\.)?weight.* and .*unet\.q\.lora_A.*are both",
    ),
    "no up": ({"lora_unet_q.lora_down.weight": A}, "without its B"),
    "no down": ({"lora_unet_q.lora_up.weight": B}, "without its A"),
    "ranks": ({"lora_unet_q.lora_down.weight": A, "lora_unet_q.lora_up.weight": B[:, :2]}, "one rank"),
    "NaN": ({"lora_unet_q.lora_down.weight": A * np.nan, "lora_unet_q.lora_up.weight": B}, "NaN"),
    "alpha NaN": (
        {"u.lora_down.weight": A, "u.lora_up.weight": B, "u.alpha": np.float32(np.nan)},
        r"u\.alpha.*finite",
    ),
    "alpha of two": ({"u.lora_down.weight": A, "u.lora_up.weight": B, "u.alpha": z(2)}, "single number"),
    "dtype": (
        {"u.lora_down.weight": A.astype("f8"), "u.lora_up.weight": B.astype("f8")},
        "F64, expected F32",
    ),
    "stranger": ({"u.lora_down.weight": A, "u.lora_up.weight": B, "u.lora_side.weight": A}, "unused"),
    "lonely alpha": ({"u.lora_down.weight": A, "u.lora_up.weight": B, "v.alpha": np.float32(1)}, "unused"),
    "flat shapes": ({"q.lora_a": A, "q.lora_b": B.T[:2]}, "the same way"),
    "flat dims": ({"q.lora_a": A, "q.lora_b": z(3, 3, 3)}, "two dimensions"),
    "zero": ({"q.lora_a": z(0, 4), "q.lora_b": z(4, 0)}, "zero"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_bad_files_are_refused(tmp_path, name):
    arrays, match = REFUSED[name]
    path = refuse(tmp_path, arrays)
    with pytest.raises(FormatError, match=match) as e:
        ml.AdapterFile.read(path, alpha=1.0)
    assert str(path) in str(e.value)


@pytest.mark.parametrize("name", ["stranger", "lonely alpha"])
def test_strangers_are_kept_when_not_strict(tmp_path, name):
    file = ml.AdapterFile.read(refuse(tmp_path, REFUSED[name][0]), strict=False)
    assert len(file.unused) == 1
    if name == "stranger":
        with pytest.raises(UnsupportedVariantError, match='"drop:extra"'):
            ml.convert(file, tmp_path / "x", format="flat")
        assert ml.convert(file, tmp_path / "x", format="flat", allow=["drop:extra"]).dropped


MLX_REFUSED = {
    "full": ({"fine_tune_type": "full"}, UnsupportedVariantError, "whole weights"),
    "kind": ({"fine_tune_type": "other"}, UnsupportedVariantError, "expected lora or dora"),
    "kind type": ({"fine_tune_type": 1}, FormatError, "fine_tune_type"),
    "no parameters": ({"lora_parameters": None}, FormatError, "lora_parameters"),
    "no scale": ({"lora_parameters": {"rank": 3}}, FormatError, "no scale.*alpha="),
    "scale": ({"lora_parameters": {"rank": 3, "scale": "x"}}, FormatError, "scale: got"),
    "rank": ({"lora_parameters": {"rank": 0, "scale": 1}}, FormatError, "rank: got 0"),
    "other rank": ({"lora_parameters": {"rank": 4, "scale": 1}}, FormatError, "rank 3, but"),
}


@pytest.mark.parametrize("name", MLX_REFUSED)
def test_bad_mlx_configs_are_refused(tmp_path, name):
    config, error, match = MLX_REFUSED[name]
    with pytest.raises(error, match=match):
        ml.AdapterFile.read(mlx(tmp_path / "a", F, config=config))
    if name == "no scale":
        same_deltas(ml.load(tmp_path / "a", alpha=6.0), twins(F, 6.0))


def test_mlx_files_alone_do_not_say_their_scale(tmp_path):
    mlx(tmp_path / "a", F)
    (tmp_path / "a" / "adapter_config.json").unlink()
    with pytest.raises(FormatError, match=r"no adapter_config\.json"):
        ml.load(tmp_path / "a")
    with pytest.raises(FormatError, match="MLX adapter pass its directory"):
        ml.load(tmp_path / "a" / "adapters.safetensors")
    mlx(tmp_path / "b", F, **{"model.layers.0.norm.weight": z(3)})
    with pytest.raises(FormatError, match="unused"):
        ml.load(tmp_path / "b")


def test_checkpoints_of_mlx_are_said_with_the_way_to_load_one(tmp_path):
    place = mlx(tmp_path / "a", F, scale=2.0, name="0000100_adapters.safetensors")
    for n in range(2, 6):
        (place / f"0000{n}00_adapters.safetensors").write_bytes(
            (place / "0000100_adapters.safetensors").read_bytes()
        )
    want = (
        r"no adapters\.safetensors.*5 checkpoints \(.0000100_adapters\.safetensors.*\.\.\.\): pass the path"
    )
    for read in (ml.load, ml.AdapterFile.read):
        with pytest.raises(FormatError, match=want + r".*0000500_adapters\.safetensors"):
            read(place)
    report = ml.inspect(place)
    assert (report.format, report.codes) == ("mlx", ("no_weights",))  # and nothing of PEFT's settings
    assert "0000500_adapters.safetensors" in report.findings[0].message
    same_deltas(ml.load(place / "0000500_adapters.safetensors"), twins(F, 6.0))
    done = ml.convert(place / "0000300_adapters.safetensors", tmp_path / "b", format="peft")
    assert (done.source, done.modules) == ("mlx", len(F))
    for old in place.glob("0*"):
        old.unlink()
    with pytest.raises(FormatError, match=r"so there are no weights$"):
        ml.load(place)


@pytest.mark.parametrize("style", ["mlx", "peft", "safetensors", "kohya", "diffusers", "gguf"])
def test_an_orientation_without_effect_is_refused(tmp_path, style):
    if style == "gguf":
        path = tmp_path / "a.gguf"
        path.write_bytes(ref.adapter_file("qwen2", {"blk.0.attn_q": (np.ones((2, 8)), np.ones((8, 2)))}))
    else:
        path = tmp_path / "a"
        ml.convert(ml.Adapter.from_factors(F, alpha=6.0), path, format=style)
    want = rf"orientation: got \W*rank_last\W+, expected none: this file \({style}\) carries its own"
    for read in (ml.load, ml.AdapterFile.read):
        with pytest.raises(FormatError, match=want):
            read(path, orientation="rank_last")
    with pytest.raises(FormatError, match=want):
        ml.convert(path, tmp_path / "b.npz", format="npz", orientation="rank_last")
    assert not (tmp_path / "b.npz").exists()


@pytest.mark.parametrize("style", ["flat", "npz"])
def test_an_orientation_that_contradicts_the_file_is_refused(tmp_path, style):
    fs = factors(["m"], rank=4, n_in=4, n_out=4)
    ml.convert(ml.Adapter.from_factors(fs, alpha=6.0), tmp_path / "a", format=style)
    said, other = ("rank_last", "rank_first") if style == "flat" else ("rank_first", "rank_last")
    same_deltas(ml.load(tmp_path / "a", orientation=said), twins(fs, 6.0))
    with pytest.raises(FormatError, match=rf"orientation: got \W*{other}\W+, expected none: this file says"):
        ml.load(tmp_path / "a", orientation=other)


def test_writers_refuse(tmp_path):
    adapter = ml.Adapter.from_factors(F, alpha=3.0)
    with pytest.raises(ConfigError, match="format"):
        ml.convert(adapter, tmp_path / "a", format="lycoris")
    ml.convert(adapter, tmp_path / "a", format="kohya")
    old = (tmp_path / "a").read_bytes()
    with pytest.raises(DestinationExistsError, match="overwrite"):
        ml.convert(adapter, tmp_path / "a", format="flat")
    assert (tmp_path / "a").read_bytes() == old
    clash = ml.Adapter.from_factors(factors(["a.b_c", "a_b.c"]), alpha=3.0)
    with pytest.raises(ConfigError, match=r"a\.b_c.*a_b\.c"):
        ml.convert(clash, tmp_path / "b", format="kohya")
    odd = ml.Adapter.from_factors(factors(["base_model.model.q"]), alpha=3.0)
    with pytest.raises(ConfigError, match="module path"):
        ml.convert(odd, tmp_path / "b", format="diffusers")
    assert not (tmp_path / "b").exists()
    odd = ml.Adapter.from_factors(factors(["/q"]), alpha=3.0)
    with pytest.raises(ConfigError, match="module path"):
        ml.convert(odd, tmp_path / "b", format="npz")
    with pytest.raises(OSError, match="no"):
        ml.convert(adapter, tmp_path / "no" / "such" / "a", format="flat")
