"""Fused weights beside those of PEFT's `merge_and_unload`, and a GPT-2 that computes the same."""

import numpy as np
import pytest

import microlora as ml
from support import close, read_tensors

pytestmark = [pytest.mark.oracle, pytest.mark.filterwarnings("default")]
torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")


def randomise(model):
    """B is zero in a new PEFT model (of an embedding it is A)."""
    for name, p in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(p, std=0.2)


def tensors_of(path):
    header, raw = read_tensors(path.read_bytes())
    return {k: np.frombuffer(v, "<f4").reshape(header[k]["shape"]) for k, v in raw.items()}


def same_weights(folder, merged):
    """Every float32 tensor of the file within 1e-6 of the merged model's, relative to its largest number."""
    state = {k: v.detach().numpy() for k, v in merged.state_dict().items()}
    found = tensors_of(folder / "model.safetensors")
    for name, got in found.items():
        key = name if name in state else f"transformer.{name}"
        close(got, state[key], 1e-6)
    return found


def gpt2():
    torch.manual_seed(0)
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 16, "vocab_size": 50}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes)).eval()


@pytest.mark.parametrize("use_rslora", [False, True])
def test_gpt2_with_transposed_and_square_layers(tmp_path, use_rslora):
    base = gpt2()
    base.save_pretrained(tmp_path / "base")
    config = peft.LoraConfig(
        r=4,
        lora_alpha=7,
        target_modules=["c_attn", "c_proj", "c_fc"],
        fan_in_fan_out=True,
        use_rslora=use_rslora,
    )
    model = peft.get_peft_model(base, config).eval()
    randomise(model)
    model.save_pretrained(tmp_path / "adapter")
    report = ml.fuse(tmp_path / "base", tmp_path / "adapter", out=tmp_path / "out")
    assert {t.layout for t in report.tensors} == {"in_out"}
    assert {t.layout_from for t in report.tensors} == {"shape", "peft_config"}
    assert len(report.tensors) == 8
    ids = torch.arange(12)[None]
    with torch.no_grad():
        want = model(ids).logits.numpy()
        fused = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "out").eval()
        close(fused(ids).logits.numpy(), want, 1e-5)
    same_weights(tmp_path / "out", model.merge_and_unload())
    ml.unfuse(tmp_path / "out", report.sidecar, out=tmp_path / "back")
    for path in (tmp_path / "base").iterdir():
        assert (tmp_path / "back" / path.name).read_bytes() == path.read_bytes()


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = torch.nn.Embedding(40, 12)
        self.up = torch.nn.Linear(12, 24)
        self.square = torch.nn.Linear(24, 24, bias=False)
        self.head = torch.nn.Linear(24, 40, bias=False)


def save_net(net, path, dtype=None):
    state = {k: v if dtype is None else v.to(dtype) for k, v in net.state_dict().items()}
    from safetensors.torch import save_file

    save_file({k: v.contiguous() for k, v in state.items()}, path)


def peft_net(targets):
    torch.manual_seed(1)
    model = peft.get_peft_model(Net(), peft.LoraConfig(r=3, lora_alpha=5, target_modules=targets))
    randomise(model)
    return model


def test_linear_layers_of_any_shape(tmp_path):
    model = peft_net(["up", "square", "head"])
    save_net(model.unload(), tmp_path / "model.safetensors")
    model = peft_net(["up", "square", "head"])
    model.save_pretrained(tmp_path / "adapter")
    ml.fuse(tmp_path / "model.safetensors", tmp_path / "adapter", out=tmp_path / "out")
    merged = {k: v.numpy() for k, v in model.merge_and_unload().state_dict().items()}
    for name, got in tensors_of(tmp_path / "out").items():
        close(got, merged[name], 1e-6)


def test_an_embedding_of_peft(tmp_path):
    torch.manual_seed(1)
    save_net(Net(), tmp_path / "model.safetensors")
    model = peft_net(["embed", "head"])
    layers = {n: model.base_model.model.get_submodule(n) for n in ("embed", "head")}
    pairs = {
        "embed": (layers["embed"].lora_embedding_A["default"], layers["embed"].lora_embedding_B["default"]),
        "head": (layers["head"].lora_A["default"].weight, layers["head"].lora_B["default"].weight),
    }
    factors = {n: (a.detach().numpy(), b.detach().numpy()) for n, (a, b) in pairs.items()}
    adapter = ml.Adapter.from_factors(factors, alpha=5.0)
    report = ml.fuse(tmp_path / "model.safetensors", adapter, out=tmp_path / "out")
    assert {t.module: t.layout for t in report.tensors} == {"embed": "in_out", "head": "out_in"}
    merged = {k: v.numpy() for k, v in model.merge_and_unload().state_dict().items()}
    for name, got in tensors_of(tmp_path / "out").items():
        close(got, merged[name], 1e-6)


@pytest.mark.parametrize(("dtype", "unit"), [(torch.float16, 2.0**-11), (torch.bfloat16, 2.0**-8)])
def test_narrow_bases_are_rounded_once(tmp_path, dtype, unit):
    torch.manual_seed(1)
    net = Net()
    save_net(net, tmp_path / "model.safetensors", dtype)
    model = peft_net(["up", "square"])
    model.save_pretrained(tmp_path / "adapter")
    ml.fuse(tmp_path / "model.safetensors", tmp_path / "adapter", out=tmp_path / "out")
    from safetensors.torch import load_file

    got = load_file(tmp_path / "out")
    adapter = ml.load(tmp_path / "adapter")
    for module in adapter.modules():
        a, b = (v.astype(np.float64) for v in adapter.factors(module))
        base = net.get_submodule(module).weight.detach().to(dtype).double().numpy()
        exact = base + adapter.info(module).scaling * (b @ a)
        error = np.abs(got[f"{module}.weight"].double().numpy() - exact)
        assert (error <= unit * np.maximum(np.abs(exact), 2.0**-14) * (1 + 1e-9)).all()
