"""Real PEFT loads what we write and computes the same, and the other way round."""

import json
import warnings

import pytest

import microlora as ml
from microlora.exceptions import FormatError, UnsupportedVariantError
from support import close, normal, rng, set_weights

pytestmark = [pytest.mark.oracle, pytest.mark.filterwarnings("default")]
torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")

SHAPES = {"q_proj": (24, 24), "k_proj": (24, 8), "up_proj": (24, 40), "down_proj": (40, 24)}


class Block(torch.nn.Module):
    def __init__(self):
        super().__init__()
        for name, (n_in, n_out) in SHAPES.items():
            setattr(self, name, torch.nn.Linear(n_in, n_out, bias=name == "q_proj"))

    def forward(self, x):
        x = x + self.q_proj(x)
        return x + self.down_proj(torch.relu(self.up_proj(x))) + self.k_proj(x).repeat(1, 3)


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = torch.nn.ModuleList([Block(), Block()])

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Net().eval()


def paths(name):
    return [f"layers.{i}.{name}" for i in range(2)]


def check_same(model, value, sign=1.0):
    """Every adapted layer of the PEFT model adds what our adapter adds, and so does its merged weight."""
    lora, adapted = ml.MicroLoRA(value), set()
    for name, layer in model.named_modules():
        if not isinstance(layer, peft.tuners.lora.layer.Linear):
            continue
        path = name.removeprefix("base_model.model.")
        adapted.add(path)
        x = torch.randn(5, layer.in_features)
        with torch.no_grad():
            delta = (layer(x) - layer.base_layer(x)).numpy()
            scale = float(layer.base_layer(x).abs().max())
        got = lora.forward(x, path)
        close(got, delta, 1e-5, 2e-6 * scale)
        close(lora.delta_weight(path), layer.get_delta_weight("default").detach().numpy(), 1e-5)
    assert adapted == set(value.modules())
    assert adapted


def randomise(model):
    """B is zero in a new PEFT model."""
    for name, p in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(p, std=0.3)


# -- ours to PEFT --

OURS = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "patterns": {
        "module_ranks": {"k_proj": 2, "up_proj": 6},
        "module_alphas": {"k_proj": 3.0, "down_proj": 0.75},
    },
    "patterns with rslora": {
        "use_rslora": True,
        "module_ranks": {"q_proj": 3},
        "module_alphas": {"q_proj": 5.5},
    },
    "f16": {"dtype": "f16"},
    "bf16": {"dtype": "bf16"},
}


@pytest.mark.parametrize("kind", OURS)
def test_peft_loads_what_we_write(tmp_path, net, kind):
    lora = ml.MicroLoRA(
        ml.LoraConfig(rank=4, alpha=6.0, target_modules=list(SHAPES), **OURS[kind]), dims=SHAPES
    )
    r = rng(1)
    for name in SHAPES:
        for _ in range(3):
            lora.instant(normal(r, SHAPES[name][0]), ml.Target(normal(r, SHAPES[name][1])), name)
    lora.save(tmp_path / "out", layer_paths={name: paths(name) for name in SHAPES})
    model = peft.PeftModel.from_pretrained(net, tmp_path / "out")
    x = torch.randn(3, 24)
    for name in SHAPES:
        for path in paths(name):
            layer = model.get_submodule("base_model.model." + path)
            n_in = SHAPES[name][0]
            probe = torch.randn(4, n_in)
            with torch.no_grad():
                delta = (layer(probe) - layer.base_layer(probe)).numpy()
                scale = float(layer.base_layer(probe).abs().max())
            close(lora.forward(probe, name), delta, 1e-5, 2e-6 * scale)
    check_same(model, ml.load(tmp_path / "out"))
    with torch.no_grad():
        on = model(x)
        with model.disable_adapter():
            off = model(x)
    assert (on - off).abs().max() > 1e-3
    again = peft.PeftConfig.from_pretrained(str(tmp_path / "out"))
    assert again.peft_type == "LORA"
    assert again.inference_mode


def test_a_single_layer_by_its_full_path(tmp_path, net):
    path = "layers.1.up_proj"
    lora = ml.MicroLoRA(ml.LoraConfig(rank=4, target_modules=[path]), dims={path: SHAPES["up_proj"]})
    lora.instant(normal(rng(), 24), ml.Target(normal(rng(), 40)))
    lora.save(tmp_path / "out")
    model = peft.PeftModel.from_pretrained(net, tmp_path / "out")
    check_same(model, lora.adapter())


# -- PEFT to ours --

THEIRS = {
    "plain": {},
    "float alpha": {"lora_alpha": 5.5},
    "rslora": {"use_rslora": True},
    "patterns": {
        "rank_pattern": {"q_proj": 3, r"^layers\.1\.up_proj": 6, r"layers\.[0-9]\.down_proj": 2},
        "alpha_pattern": {"down_proj": 1.5, r".*\.k_proj": 12},
    },
    "regex target": {"target_modules": r".*\.(q|k)_proj"},
    "one layer": {"layers_to_transform": [1], "layers_pattern": "layers"},
    "rank above the layer": {"r": 48},
    "gaussian": {"init_lora_weights": "gaussian"},
    "bias none with dropout": {"lora_dropout": 0.1, "bias": "none"},
}


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("kind", THEIRS)
def test_we_load_what_peft_writes(tmp_path, net, kind, dtype):
    settings = {"r": 4, "lora_alpha": 6, "target_modules": list(SHAPES), **THEIRS[kind]}
    model = peft.get_peft_model(net, peft.LoraConfig(**settings)).eval()
    randomise(model)
    if dtype != "float32":
        for name, p in model.named_parameters():
            if "lora_" in name:
                p.data = p.data.to(getattr(torch, dtype))
    model.save_pretrained(tmp_path / "in")
    value = ml.load(tmp_path / "in")
    assert {value.info(m).dtype_a for m in value.modules()} == {
        {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}[dtype]
    }
    for name, p in model.named_parameters():
        if "lora_" in name:
            p.data = p.data.float()
    check_same(model, value)


def test_there_and_back_keeps_every_bit(tmp_path, net):
    from safetensors.torch import load_file

    model = peft.get_peft_model(
        net, peft.LoraConfig(r=4, target_modules=list(SHAPES), rank_pattern={"q_proj": 2})
    )
    randomise(model)
    model.save_pretrained(tmp_path / "in")
    ml.save(ml.load(tmp_path / "in"), tmp_path / "out")
    one, two = (load_file(tmp_path / d / "adapter_model.safetensors") for d in ("in", "out"))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[k], two[k]) for k in one)
    configs = [json.loads((tmp_path / d / "adapter_config.json").read_text()) for d in ("in", "out")]
    for key in ("r", "lora_alpha", "use_rslora", "peft_type", "lora_dropout", "bias"):
        assert configs[0][key] == configs[1][key]
    torch.manual_seed(0)
    check_same(peft.PeftModel.from_pretrained(Net().eval(), tmp_path / "out"), ml.load(tmp_path / "in"))


def test_learning_goes_on_from_peft_and_returns(tmp_path, net):
    model = peft.get_peft_model(net, peft.LoraConfig(r=4, target_modules=["q_proj"]))
    randomise(model)
    model.save_pretrained(tmp_path / "in")
    lora = ml.MicroLoRA.load(tmp_path / "in")
    for _ in range(5):
        lora.instant(normal(rng(), 24), ml.Target(normal(rng(), 24)), "layers.0.q_proj")
    lora.save(tmp_path / "out")
    torch.manual_seed(0)
    check_same(peft.PeftModel.from_pretrained(Net().eval(), tmp_path / "out"), lora.adapter())


REFUSED = {
    "dora": {"use_dora": True},
    "init:pissa": {"init_lora_weights": "pissa"},
    "init:olora": {"init_lora_weights": "olora"},
    "bias": {"bias": "all"},
    "lora_bias": {"lora_bias": True, "target_modules": ["q_proj"]},
    "modules_to_save": {"target_modules": ["q_proj"], "modules_to_save": ["k_proj"]},
    "trainable_tokens": {"target_modules": ["q_proj"], "trainable_token_indices": {"embed": [1]}},
}


@pytest.mark.parametrize("kind", REFUSED)
def test_variants_that_peft_writes_are_refused_by_name(tmp_path, net, kind):
    net.embed = torch.nn.Embedding(5, 24)
    settings = {"r": 4, "target_modules": list(SHAPES), **REFUSED[kind]}
    model = peft.get_peft_model(net, peft.LoraConfig(**settings))
    randomise(model)
    model.save_pretrained(tmp_path / "in")
    with pytest.raises(UnsupportedVariantError, match=f'allow=.*"drop:{kind}"'):
        ml.load(tmp_path / "in")
    assert ml.load(tmp_path / "in", allow=[f"drop:{kind}"]).modules()


def test_other_methods_and_pickles_are_refused(tmp_path, net):
    ia3 = peft.IA3Config(target_modules=["q_proj", "down_proj"], feedforward_modules=["down_proj"])
    peft.get_peft_model(net, ia3).save_pretrained(tmp_path / "ia3")
    with pytest.raises(UnsupportedVariantError, match="IA3"):
        ml.load(tmp_path / "ia3")
    model = peft.get_peft_model(Net(), peft.LoraConfig(r=4, target_modules=["q_proj"]))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(tmp_path / "bin", safe_serialization=False)
    if (tmp_path / "bin" / "adapter_model.bin").exists():
        with pytest.raises(FormatError, match=r"(?i)pickle|\.bin"):
            ml.load(tmp_path / "bin")


# -- a real architecture --


def test_a_tiny_llama_generates_the_same_logits(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    torch.manual_seed(0)
    base = transformers.LlamaForCausalLM(config).eval()
    state = {k: v.clone() for k, v in base.state_dict().items()}
    dims = {"q_proj": (32, 32), "v_proj": (32, 16), "down_proj": (48, 32)}
    prefix = {"q_proj": "self_attn", "v_proj": "self_attn", "down_proj": "mlp"}
    full = {n: [f"model.layers.{i}.{prefix[n]}.{n}" for i in range(2)] for n in dims}
    lora = ml.MicroLoRA(ml.LoraConfig(rank=4, alpha=8.0, target_modules=list(dims)), dims=dims)
    r = rng(0)
    set_weights(lora, {n: (normal(r, 4, i) * 0.3, normal(r, o, 4) * 0.3) for n, (i, o) in dims.items()})
    lora.save(tmp_path / "out", layer_paths=full)
    tokens = torch.arange(12)[None] % 64
    model = peft.PeftModel.from_pretrained(base, tmp_path / "out").eval()
    with torch.no_grad():
        want = model(tokens).logits
        fused = transformers.LlamaForCausalLM(config).eval()
        fused.load_state_dict(state)
        plain = fused(tokens).logits
        for name, modules in full.items():
            for path in modules:
                w = fused.get_submodule(path).weight.numpy()
                lora.fuse_into(w, name)
        got = fused(tokens).logits
    assert (want - plain).abs().max() > 1e-2
    close(got.numpy(), want.numpy(), 1e-5)
    model.save_pretrained(tmp_path / "again")
    check_same(model, ml.load(tmp_path / "again"))
    # The other way: what they write for this architecture.
    theirs = peft.get_peft_model(
        transformers.LlamaForCausalLM(config),
        peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"),
    ).eval()
    randomise(theirs)
    theirs.save_pretrained(tmp_path / "theirs")
    check_same(theirs, ml.load(tmp_path / "theirs"))
