"""What key styles hold beside plain LoRA on linear layers: kept, named, and written back."""

import json

import numpy as np
import pytest

import microlora as ml
from microlora.exceptions import (
    FormatError,
    UnsupportedVariantError,
)
from styles_support import (
    PATHS,
    diffusers,
    factors,
    kohya,
    read_safetensors,
)

F = factors()


def z(*shape):
    return np.ones(shape, np.float32)


KOHYA_KINDS = {
    "locon_mid": {
        "lora_down.weight": z(3, 4, 1, 1),
        "lora_up.weight": z(5, 3, 1, 1),
        "lora_mid.weight": z(3, 3, 3, 3),
    },
    "loha": {f"hada_w{i}_{s}": z(4, 4) for i in (1, 2) for s in "ab"},
    "lokr": {"lokr_w1": z(2, 2), "lokr_w2_a": z(2, 2), "lokr_w2_b": z(2, 2)},
    "dora": {"lora_down.weight": z(3, 7), "lora_up.weight": z(5, 3), "dora_scale": z(5, 1)},
    "reshape_weight": {
        "lora_down.weight": z(3, 7),
        "lora_up.weight": z(5, 3),
        "reshape_weight": np.array([5, 7]),
    },
    "diff": {"diff": z(5, 7)},
    "diff_b": {"diff_b": z(5)},
    "conv": {"lora_down.weight": z(3, 4, 3, 3), "lora_up.weight": z(5, 3, 1, 1)},
    "glora": {f"{s}{i}.weight": z(2, 2) for i in (1, 2) for s in "ab"},
}


@pytest.mark.parametrize("kind", KOHYA_KINDS)
def test_kohyas_other_kinds_are_kept(tmp_path, kind):
    odd = {f"lora_unet_odd.{end}": values for end, values in KOHYA_KINDS[kind].items()}
    fs = {"lora_unet_q": F[PATHS[0]]}
    path = kohya(tmp_path / "a", fs, 3.0, **odd, **{"lora_unet_odd.alpha": np.float32(1)})
    if kind in ("diff", "diff_b"):
        odd_alpha = pytest.raises(FormatError, match="unused")
        with odd_alpha:
            ml.AdapterFile.read(path)
        path = kohya(tmp_path / "a", fs, 3.0, **odd)
    file = ml.AdapterFile.read(path)
    assert {v.kind for v in file.variants} == {kind}
    with pytest.raises(UnsupportedVariantError, match=f'"drop:{kind}"'):
        file.adapter()
    left = file.adapter(allow=[f"drop:{kind}"])
    plain = kind in ("dora", "reshape_weight")
    assert set(left.modules()) == {"lora_unet_q", *(["lora_unet_odd"] if plain else [])}

    ml.convert(file, tmp_path / "b", format="kohya")
    one, two = read_safetensors(path)[1], read_safetensors(tmp_path / "b")[1]
    assert one == two
    for style in ("diffusers", "flat", "npz"):
        if kind == "conv" and style == "diffusers":
            continue
        with pytest.raises(UnsupportedVariantError, match=f'"drop:{kind}"'):
            ml.convert(file, tmp_path / "c", format=style, overwrite=True)
        done = ml.convert(file, tmp_path / "c", format=style, allow=[f"drop:{kind}"], overwrite=True)
        assert list(done.dropped) == [kind]
        assert set(ml.load(tmp_path / "c").modules()) == set(left.modules())
    done = ml.convert(file, tmp_path / "d", format="kohya", allow=[f"drop:{kind}"])
    assert list(done.dropped) == [kind]
    assert ml.AdapterFile.read(tmp_path / "d").variants == ()


def test_convolutions_go_between_the_styles(tmp_path):
    fs = {"unet.conv_in": (z(3, 4, 3, 3), z(5, 3, 1, 1)), "unet.proj": (z(3, 4, 1, 1), z(5, 3))}
    file = ml.AdapterFile.read(diffusers(tmp_path / "a", fs))
    assert [(m.kind, m.shape_b) for m in file.modules] == [("conv", (5, 3, 1, 1))] * 2
    ml.convert(file, tmp_path / "k", format="kohya")
    ml.convert(tmp_path / "k", tmp_path / "d", format="diffusers")
    again = ml.AdapterFile.read(tmp_path / "d")
    assert again.modules == file.modules
    assert again.to_arrays()[0]["unet.conv_in"][0].shape == (3, 4, 3, 3)
    ml.convert(tmp_path / "k", tmp_path / "p", format="peft")
    assert ml.AdapterFile.read(tmp_path / "p").modules == file.modules
    with pytest.raises(FormatError, match="one rank"):
        ml.AdapterFile.read(diffusers(tmp_path / "b", {"unet.c": (z(3, 4, 3, 3), z(5, 2, 1, 1))}))


def test_diffusers_dora_and_biases(tmp_path):
    name = "unet.mid_block.to_q"
    path = diffusers(
        tmp_path / "a",
        {name: F[PATHS[0]]},
        **{f"{name}.lora_magnitude_vector": z(5), f"{name}.lora_B.bias": z(5)},
    )
    file = ml.AdapterFile.read(path)
    assert {v.kind for v in file.variants} == {"dora", "lora_bias"}
    ml.convert(file, tmp_path / "b", format="diffusers", allow=["drop:lora_bias"])
    header, tensors = read_safetensors(tmp_path / "b")
    assert set(tensors) == {f"{name}.lora_{x}" for x in ("A.weight", "B.weight", "magnitude_vector")}
    assert json.loads(header["lora_adapter_metadata"])["unet.use_dora"] is True
