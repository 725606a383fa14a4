"""Small models of every kind of LoRA that PEFT writes: kept to the bit, loaded by PEFT, refused for use."""

import json
import re

import numpy as np
import pytest

import microlora as ml
from microlora.exceptions import UnsupportedVariantError
from support import close

pytestmark = [pytest.mark.oracle, pytest.mark.filterwarnings("default")]
torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
load_file = pytest.importorskip("safetensors.torch").load_file
nn = torch.nn


class Mlp(nn.Module):
    """An embedding, two linear layers, a norm and a head."""

    def __init__(self):
        super().__init__()
        self.emb = nn.Embedding(11, 6)
        self.up, self.down = nn.Linear(6, 8), nn.Linear(8, 6)
        self.norm, self.head = nn.LayerNorm(6), nn.Linear(6, 11, bias=False)

    def forward(self, x):
        return self.head(self.norm(self.down(torch.relu(self.up(self.emb(x))))))


class Convolutions(nn.Module):
    def __init__(self):
        super().__init__()
        self.g, self.c1, self.c2 = nn.Conv1d(4, 4, 1, groups=2), nn.Conv1d(4, 6, 3), nn.Conv2d(1, 4, (3, 1))

    def forward(self, x):
        return self.c2(self.c1(self.g(x))[:, None])


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.w1, self.w2 = nn.Parameter(torch.randn(3, 6, 10)), nn.Parameter(torch.randn(3, 10, 6))

    def forward(self, x):
        return torch.einsum("bi,eij,ejk->bk", x, self.w1, self.w2)


class Mixture(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.experts, self.last = nn.Linear(6, 6), Experts(), nn.Linear(6, 4)

    def forward(self, x):
        return self.last(self.experts(self.q(x)))


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attn = nn.MultiheadAttention(6, 2)

    def forward(self, x):
        return self.attn(x, x, x)[0]


def llama(**more):
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=17, hidden_size=8, intermediate_size=12, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, bos_token_id=1, eos_token_id=2, **more,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def gpt2():
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        vocab_size=17, n_embd=8, n_layer=1, n_head=2, n_positions=16, bos_token_id=1, eos_token_id=2
    )
    return transformers.GPT2LMHeadModel(config)


def tied():
    return llama(tie_word_embeddings=True)


def tokens(n=11):
    return torch.arange(n)[None]


def image():
    return torch.randn(2, 4, 7)


def rows():
    return torch.randn(5, 6)


def sub(name):
    """A nested settings object, where this PEFT has one."""
    import peft.tuners.lora.config as settings

    return getattr(settings, name, None) or pytest.skip(f"this PEFT has no {name}")


LINEAR = {"target_modules": ["up", "down"]}
# kind -> (model, input, settings, variants)
KINDS = {
    "plain": (Mlp, tokens, LINEAR, set()),
    "patterns": (
        Mlp,
        tokens,
        {**LINEAR, "rank_pattern": {"up": 3}, "alpha_pattern": {"^down": 1.5, "nothing": 7}},
        set(),
    ),
    "rslora": (Mlp, tokens, {**LINEAR, "use_rslora": True, "lora_alpha": 5.5}, set()),
    "Conv1D": (gpt2, tokens, {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}, set()),
    "velora": (Mlp, tokens, lambda: {**LINEAR, "velora_config": sub("VeloraConfig")(num_groups=2)}, set()),
    "attention": (Attention, rows, {"target_modules": ["attn"]}, set()),
    "bias all": (Mlp, tokens, {**LINEAR, "bias": "all"}, {"bias"}),
    "bias lora_only": (Mlp, tokens, {**LINEAR, "bias": "lora_only"}, {"bias"}),
    "lora_bias": (Mlp, tokens, {**LINEAR, "lora_bias": True}, {"lora_bias"}),
    "modules_to_save": (Mlp, tokens, {**LINEAR, "modules_to_save": ["head", "norm"]}, {"modules_to_save"}),
    "tokens": (Mlp, tokens, {**LINEAR, "trainable_token_indices": {"emb": [1, 3]}}, {"trainable_tokens"}),
    "tokens of a model": (
        llama,
        tokens,
        {"target_modules": ["q_proj"], "trainable_token_indices": [1, 2]},
        {"trainable_tokens"},
    ),
    "embedding": (Mlp, tokens, {"target_modules": ["emb", "up"]}, {"embedding"}),
    "saved embedding": (
        llama,
        tokens,
        {"target_modules": ["embed_tokens", "q_proj"]},
        {"embedding", "saved_embedding"},
    ),
    "tied embedding": (
        tied,
        tokens,
        {"target_modules": ["embed_tokens", "q_proj"], "ensure_weight_tying": True},
        {"embedding", "saved_embedding"},
    ),
    "tied head": (
        tied,
        tokens,
        {"target_modules": ["lm_head", "q_proj"]},
        {"saved_embedding"},
    ),
    "convolutions": (Convolutions, image, {"target_modules": ["c1", "c2", "g"]}, {"conv"}),
    "dora": (Mlp, tokens, {"target_modules": ["emb", "up", "down"], "use_dora": True}, {"dora", "embedding"}),
    "dora of convolutions": (
        Convolutions,
        image,
        {"target_modules": ["c1", "c2"], "use_dora": True},
        {"dora", "conv"},
    ),
    "experts": (
        Mixture,
        rows,
        {"target_modules": ["q"], "target_parameters": ["experts.w1", "experts.w2"]},
        {"target_parameters"},
    ),
    "experts of two ranks": (
        Mixture,
        rows,
        {
            "target_modules": ["q"],
            "target_parameters": ["experts.w1", "experts.w2"],
            "rank_pattern": {"experts.w1": 3},
        },
        {"target_parameters"},
    ),
    "experts alone": (
        Mixture,
        rows,
        {"target_modules": [], "target_parameters": ["w2"]},
        {"target_parameters"},
    ),
    "a matrix as a parameter": (
        Mixture,
        rows,
        {"target_modules": ["q"], "target_parameters": ["last.weight"]},
        {"target_parameters"},
    ),
    "alora": (
        llama,
        tokens,
        {"target_modules": ["q_proj"], "alora_invocation_tokens": [3, 4], "task_type": "CAUSAL_LM"},
        {"alora"},
    ),
    "replication": (
        llama,
        tokens,
        {"target_modules": ["q_proj"], "layer_replication": [[0, 2], [1, 2]]},
        {"layer_replication"},
    ),
    "kasa": (Mlp, tokens, lambda: {**LINEAR, "kasa_config": sub("KasaConfig")()}, {"kasa"}),
    "monteclora": (
        Mlp,
        tokens,
        lambda: {**LINEAR, "monteclora_config": sub("MontecloraConfig")()},
        {"monteclora"},
    ),
    "bdlora": (
        Mlp,
        tokens,
        lambda: {
            **LINEAR,
            "use_bdlora": sub("BdLoraConfig")(
                target_modules_bd_a=["up"], target_modules_bd_b=["down"], nblocks=2
            ),
        },
        {"bdlora"},
    ),
}
# Their factors are no pair of one linear layer, so nothing is left when they are dropped.
NOTHING_LEFT = {"kasa", "bdlora", "convolutions", "dora of convolutions", "experts alone"}


def make(kind):
    """A base model and its input, the same at every call."""
    build, data, settings, _ = KINDS[kind]
    torch.manual_seed(0)
    net = build().eval()
    x = data()
    return net, x, settings() if callable(settings) else settings


def train(model):
    """Moves everything that PEFT trains, as training would."""
    torch.manual_seed(1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.requires_grad and "monteclora" not in name:
                p += 0.3 * torch.randn_like(p)


def output(model, x):
    model.eval()
    with torch.no_grad():
        out = model(x)
    return getattr(out, "logits", out)


def saved(kind, path):
    """The trained model of a kind, and its output; its adapter lies at the path."""
    net, x, settings = make(kind)
    before = output(net, x).clone()
    model = peft.get_peft_model(net, peft.LoraConfig(**{"r": 2, "lora_alpha": 3, **settings}))
    train(model)
    model.save_pretrained(path)
    after = output(model, x)
    assert before.shape != after.shape or kind == "alora" or (before - after).abs().max() > 1e-3
    return model, x, after


def config_of(path):
    """The configuration, with lists of names as sets."""
    config = json.loads((path / "adapter_config.json").read_text())
    return {
        k: set(v) if isinstance(v, list) and all(isinstance(i, str) for i in v) else v
        for k, v in config.items()
    }


def same_files(one, two):
    a, b = (load_file(d / "adapter_model.safetensors") for d in (one, two))
    assert a.keys() == b.keys()
    for key in a:
        assert a[key].dtype == b[key].dtype
        assert torch.equal(a[key], b[key]), key
    assert config_of(one) == config_of(two)


@pytest.mark.parametrize("kind", KINDS)
def test_peft_loads_what_was_kept(tmp_path, kind):
    _, x, want = saved(kind, tmp_path / "in")
    file = ml.AdapterFile.read(tmp_path / "in")
    assert {v.kind for v in file.variants} == KINDS[kind][3]
    assert not file.unused
    done = file.save(tmp_path / "out")
    assert (done.format, done.dropped) == ("peft", {})
    same_files(tmp_path / "in", tmp_path / "out")
    ml.convert(tmp_path / "in", tmp_path / "one", format="safetensors")
    ml.convert(tmp_path / "one", tmp_path / "again", format="peft")
    same_files(tmp_path / "in", tmp_path / "again")
    net, _, _ = make(kind)
    got = output(peft.PeftModel.from_pretrained(net, tmp_path / "again"), x)
    close(got.numpy(), want.numpy(), 1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_use_is_refused_by_name_and_what_is_left_runs_as_in_peft(tmp_path, kind):
    model, _, _ = saved(kind, tmp_path / "in")
    ml.convert(tmp_path / "in", tmp_path / "one", format="safetensors")
    allow = []
    if KINDS[kind][3]:
        for path in (tmp_path / "in", tmp_path / "one"):
            with pytest.raises(UnsupportedVariantError) as caught:
                ml.load(path)
            for name in KINDS[kind][3]:
                assert name in str(caught.value)
        listed = re.search(r"allow=\[(.*)\]", str(caught.value))
        allow = [f"drop:{name}" for name in KINDS[kind][3]]
        if listed:
            assert sorted(json.loads(f"[{listed[1]}]")) == sorted(allow)
    if kind in NOTHING_LEFT:
        with pytest.raises(UnsupportedVariantError, match=r"left"):
            ml.load(tmp_path / "in", allow=allow)
        return
    value = ml.load(tmp_path / "in", allow=allow)
    assert value == ml.AdapterFile.read(tmp_path / "in").adapter(allow=allow)
    lora, seen = ml.MicroLoRA(value), set()
    for name, layer in model.named_modules():
        path = name.removeprefix("base_model.model.")
        if "default" not in getattr(layer, "lora_A", {}) or path not in value.modules():
            continue
        seen.add(path)
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        probe = torch.randn(4, a.shape[1])
        with torch.no_grad():
            want = (probe @ a.T @ b.T) * layer.scaling["default"]
        close(lora.forward(probe.numpy(), path), want.numpy(), 1e-5, 1e-6)
    assert seen == set(value.modules()) != set()


@pytest.mark.parametrize("kind", ["experts", "experts alone", "experts of two ranks"])
def test_experts_come_apart_as_peft_pairs_them(tmp_path, kind):
    """The delta of each expert is that of PEFT's own wrapper."""
    model, _, _ = saved(kind, tmp_path / "in")
    file = ml.AdapterFile.read(tmp_path / "in")
    # A rank by the parameter's name leaves the pair open: the number of experts is then told.
    apart = file.unpack_experts(3 if kind == "experts of two ranks" else None)
    modules = {m.path: i for i, m in enumerate(apart.modules)}
    found = 0
    for name, layer in model.named_modules():
        if not isinstance(layer, peft.tuners.lora.layer.ParamWrapper):
            continue
        i = modules[name.removeprefix("base_model.model.")]
        m = apart.modules[i]
        a, b = (np.frombuffer(t, np.float32).reshape(s) for t, s in
                zip(apart.factor_bytes(i), (m.shape_a, m.shape_b), strict=True))  # fmt: skip
        delta = m.alpha / m.rank * b @ a  # (experts, out, in)
        want = layer.get_delta_weight("default").detach().numpy()
        if want.shape != delta.shape or not np.allclose(want, delta, 1e-5, 1e-6):
            want = want.transpose(0, 2, 1)  # the parameter may hold (in, out)
        close(delta, want, 1e-5, 1e-6)
        found += 1
    assert found == sum(m.kind == "experts" for m in apart.modules) > 0
    apart.save(tmp_path / "out", "peft")
    same_files(tmp_path / "in", tmp_path / "out")


def test_an_adapter_of_another_name_lies_one_level_below(tmp_path):
    torch.manual_seed(0)
    model = peft.get_peft_model(Mlp(), peft.LoraConfig(r=2, **LINEAR), adapter_name="german")
    model.save_pretrained(tmp_path / "in")
    with pytest.raises(ml.exceptions.FormatError, match="german"):
        ml.AdapterFile.read(tmp_path / "in")
    ml.AdapterFile.read(tmp_path / "in" / "german").save(tmp_path / "out")
    same_files(tmp_path / "in" / "german", tmp_path / "out")
