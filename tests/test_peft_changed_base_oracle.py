"""Adapters that are relative to a changed base: made plain as PEFT makes them."""

import dataclasses
import sys

import pytest

import microlora as ml
from microlora.exceptions import UnsupportedVariantError
from support import close

pytestmark = [pytest.mark.oracle, pytest.mark.filterwarnings("default")]
torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
load_file = pytest.importorskip("safetensors.torch").load_file
variants = pytest.importorskip("test_peft_variants_oracle")
LINEAR, Mlp, nn = variants.LINEAR, variants.Mlp, torch.nn
config_of, output, sub, tokens, train = (
    variants.config_of, variants.output, variants.sub, variants.tokens, variants.train,
)  # fmt: skip


def prepared(init, net, settings, monkeypatch):
    """Statistics that some initialisations need first."""
    if init == "corda":
        # All that PEFT wants of attrs there is the name of a decorator that dataclasses has too.
        monkeypatch.setitem(sys.modules, "attr", dataclasses)
        from peft.tuners.lora.corda import preprocess_corda

        corda = sub("CordaConfig")(corda_method="kpm")
        config = peft.LoraConfig(**settings, init_lora_weights=init, corda_config=corda)
        preprocess_corda(net, config, run_model=lambda: net(tokens()))
        return config
    if init == "lora_ga":
        from peft.tuners.lora.loraga import preprocess_loraga

        config = peft.LoraConfig(**settings, init_lora_weights=init, lora_ga_config=peft.LoraGAConfig())
        preprocess_loraga(net, config, lambda: (net(tokens()) ** 2).sum().backward())
        return config
    return peft.LoraConfig(**settings, init_lora_weights=init)


SETTINGS = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "patterns": {"rank_pattern": {"up": 3}, "alpha_pattern": {"down": 1.5}},
}


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "olora", "corda", "lora_ga"])
def test_adapters_of_a_changed_base_become_plain_as_peft_makes_them(tmp_path, monkeypatch, init, settings):
    if init == "lora_ga" and settings == "patterns":
        pytest.skip("PEFT prepares LoRA-GA for one rank")
    torch.manual_seed(0)
    net = Mlp().eval()
    base = {k: v.clone() for k, v in net.state_dict().items()}
    config = prepared(init, net, {"r": 2, "lora_alpha": 6, **LINEAR, **SETTINGS[settings]}, monkeypatch)
    model = peft.get_peft_model(net, config)
    stored = model.peft_config["default"]
    stored.init_lora_weights = True
    model.save_pretrained(tmp_path / "initial")
    stored.init_lora_weights = init
    train(model)
    model.save_pretrained(tmp_path / "in")
    want = output(model, tokens())
    model.save_pretrained(
        tmp_path / "theirs", path_initial_model_for_weight_conversion=str(tmp_path / "initial")
    )

    kind = "init:" + init.removesuffix("_niter_4")
    with pytest.raises(UnsupportedVariantError, match=f"convert_to_plain.*drop:{kind}"):
        ml.load(tmp_path / "in")
    plain = ml.convert_to_plain(tmp_path / "in", tmp_path / "initial", tmp_path / "ours")
    assert not plain.variants
    ours, theirs = (load_file(tmp_path / d / "adapter_model.safetensors") for d in ("ours", "theirs"))
    assert ours.keys() == theirs.keys()
    for key in ours:
        close(ours[key].numpy(), theirs[key].numpy(), 1e-6)
    mine, yours = config_of(tmp_path / "ours"), config_of(tmp_path / "theirs")
    assert mine == yours

    torch.manual_seed(0)
    fresh = Mlp().eval()
    fresh.load_state_dict(base)
    loaded = peft.PeftModel.from_pretrained(fresh, tmp_path / "ours")
    close(output(loaded, tokens()).numpy(), want.numpy(), 1e-4, 1e-5)
    # And ours runs it: base and delta of one layer.
    lora = ml.MicroLoRA(ml.load(tmp_path / "ours"))
    probe = torch.randn(3, 6)
    with torch.no_grad():
        layer = model.base_model.model.up
        got = nn.functional.linear(probe, base["up.weight"], base["up.bias"]).numpy()
        close(got + lora.forward(probe.numpy(), "up"), layer(probe).numpy(), 1e-4, 1e-5)


def loftq(weight, num_bits, reduced_rank, num_iter=1):
    """PEFT's loop with a quantiser that needs neither bitsandbytes nor a GPU: 2 ** bits even steps."""
    from peft.utils.loftq_utils import _low_rank_decomposition

    steps = 2**num_bits - 1
    low, high = weight.min(), weight.max()
    left = weight.detach().clone()
    for _ in range(num_iter):
        quantised = low + (high - low) / steps * ((left - low) / (high - low) * steps).round().clamp(0, steps)
        found = _low_rank_decomposition(weight - quantised, reduced_rank=reduced_rank)
        left = weight - found["L"] @ found["R"]
    return quantised, found["R"], found["L"]


@pytest.mark.parametrize("settings", SETTINGS)
def test_loftq_becomes_plain_as_peft_makes_it(tmp_path, monkeypatch, settings):
    monkeypatch.setattr("peft.tuners.lora.layer.loftq_init", loftq)
    torch.manual_seed(0)
    net = Mlp().eval()
    base = {k: v.clone() for k, v in net.state_dict().items()}
    config = peft.LoraConfig(
        r=2, lora_alpha=6, **LINEAR, **SETTINGS[settings], init_lora_weights="loftq",
        loftq_config=peft.LoftQConfig(loftq_bits=4, loftq_iter=3),
    )  # fmt: skip
    model = peft.get_peft_model(net, config)
    stored = model.peft_config["default"]
    stored.init_lora_weights = True
    model.save_pretrained(tmp_path / "initial")
    stored.init_lora_weights = "loftq"
    # What the initial factors stand for, on the weights that PEFT quantised: where the result belongs.
    started = {}
    for name in ("up", "down"):
        layer = getattr(model.base_model.model, name)
        started[f"{name}.weight"] = (layer.weight + layer.get_delta_weight("default")).detach().clone()
        assert (layer.weight - base[f"{name}.weight"]).abs().max() > 1e-3
    train(model)
    model.save_pretrained(tmp_path / "in")
    want = output(model, tokens())
    model.save_pretrained(
        tmp_path / "theirs", path_initial_model_for_weight_conversion=str(tmp_path / "initial")
    )

    with pytest.raises(UnsupportedVariantError, match=r"convert_to_plain.*drop:init:loftq"):
        ml.load(tmp_path / "in")
    plain = ml.convert_to_plain(tmp_path / "in", tmp_path / "initial", tmp_path / "ours")
    assert not plain.variants
    ours, theirs = (load_file(tmp_path / d / "adapter_model.safetensors") for d in ("ours", "theirs"))
    assert ours.keys() == theirs.keys()
    for key in ours:
        close(ours[key].numpy(), theirs[key].numpy(), 1e-6)
    assert config_of(tmp_path / "ours") == config_of(tmp_path / "theirs")

    torch.manual_seed(0)
    fresh = Mlp().eval()
    fresh.load_state_dict(base | started)
    loaded = peft.PeftModel.from_pretrained(fresh, tmp_path / "ours")
    close(output(loaded, tokens()).numpy(), want.numpy(), 1e-4, 1e-5)
    # On the original weights the error is what the initial factors leave of the quantiser's, as in PEFT.
    fresh = Mlp().eval()
    fresh.load_state_dict(base)
    loaded = peft.PeftModel.from_pretrained(fresh, tmp_path / "ours")
    fresh = Mlp().eval()
    fresh.load_state_dict(base)
    other = peft.PeftModel.from_pretrained(fresh, tmp_path / "theirs")
    close(output(loaded, tokens()).numpy(), output(other, tokens()).numpy(), 1e-5, 1e-6)
    assert (output(loaded, tokens()) - want).abs().max() > 1e-4


def test_rslora_with_patterns_stays_as_it_is_as_in_peft(tmp_path):
    torch.manual_seed(0)
    settings = {**LINEAR, **SETTINGS["rslora"], **SETTINGS["patterns"]}
    model = peft.get_peft_model(Mlp(), peft.LoraConfig(r=2, init_lora_weights="pissa", **settings))
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(tmp_path / "initial")
    model.peft_config["default"].init_lora_weights = "pissa"
    model.save_pretrained(tmp_path / "in")
    with pytest.raises(ValueError, match="use_rslora"):
        model.save_pretrained(
            tmp_path / "theirs", path_initial_model_for_weight_conversion=str(tmp_path / "initial")
        )
    with pytest.raises(UnsupportedVariantError, match="use_rslora"):
        ml.convert_to_plain(tmp_path / "in", tmp_path / "initial", tmp_path / "ours")
    assert not (tmp_path / "ours").exists()
