"""What the doctor says of PEFT is true of the real one, and PEFT loads what it repaired."""

import copy
import json

import pytest

import microlora as ml
import test_peft_variants_oracle as variants
from doctor_support import PREFIX, read_tensors_of, renamed, write_tensors

pytestmark = [pytest.mark.oracle, pytest.mark.filterwarnings("default")]
torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")


class Block(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.q_proj, self.v_proj = torch.nn.Linear(16, 16), torch.nn.Linear(16, 16)

    def forward(self, x):
        return x + self.v_proj(torch.tanh(self.q_proj(x)))


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = torch.nn.ModuleList([Block() for _ in range(3)])

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Net().eval()


@pytest.fixture
def saved(net, tmp_path):
    """A directory that PEFT wrote, the input and the output of its model."""
    config = peft.LoraConfig(
        r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], base_model_name_or_path="b"
    )
    model = peft.get_peft_model(copy.deepcopy(net), config).eval()
    for name, p in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(p, std=0.3)
    model.save_pretrained(tmp_path / "peft")
    x = torch.randn(4, 16)
    with torch.no_grad():
        return tmp_path / "peft", x, model(x)


def output(net, folder, x):
    model = peft.PeftModel.from_pretrained(copy.deepcopy(net), str(folder)).eval()
    with torch.no_grad():
        return model(x)


def change(folder, target, tensors=None, **settings):
    """A copy with other tensors or settings."""
    target.mkdir()
    write_tensors(target / "adapter_model.safetensors", tensors or read_tensors_of(folder))
    config = json.loads((folder / "adapter_config.json").read_text()) | settings
    (target / "adapter_config.json").write_text(json.dumps(config))
    return target


def test_a_directory_of_pefts_is_sound(saved):
    report = ml.inspect(saved[0])
    assert report.ok
    assert set(report.codes) <= {"no_base_name"}


NAMES = {
    "prefix_missing": (PREFIX, ""),
    "prefix_doubled": (PREFIX, PREFIX * 2),
}


@pytest.mark.parametrize("code", NAMES)
def test_peft_applies_nothing_of_such_keys_and_all_of_the_copy(code, net, saved, tmp_path):
    folder, x, want = saved
    broken = change(folder, tmp_path / "broken", renamed(read_tensors_of(folder), *NAMES[code]))
    with torch.no_grad():
        plain = net(x)
    assert torch.equal(output(net, broken, x), plain)
    assert code in ml.inspect(broken, fix=tmp_path / "fixed").codes
    assert torch.equal(output(net, tmp_path / "fixed", x), want)


@pytest.mark.parametrize("name", ["default", "other"])
def test_names_of_adapters_in_keys_are_taken_off(name, net, saved, tmp_path):
    folder, x, want = saved
    tensors = renamed(read_tensors_of(folder), ".weight", f".{name}.weight")
    broken = change(folder, tmp_path / "broken", tensors)
    # PEFT forgives the name that it loads under, and finds nothing under another.
    assert torch.equal(output(net, broken, x), want) == (name == "default")
    report = ml.inspect(broken, fix=tmp_path / "fixed")
    assert {"default": "adapter_name", "other": "other_adapter_name"}[name] in report.codes
    assert report.ok == (name == "default")
    assert torch.equal(output(net, tmp_path / "fixed", x), want)


def test_modules_that_no_target_names_are_left_aside(net, saved, tmp_path):
    folder, x, want = saved
    broken = change(folder, tmp_path / "broken", target_modules=["q_proj"])
    assert not torch.equal(output(net, broken, x), want)
    assert "target_uncovered" in ml.inspect(broken, fix=tmp_path / "fixed").codes
    assert torch.equal(output(net, tmp_path / "fixed", x), want)


def test_ranks_that_contradict_do_not_load_and_the_copy_does(net, saved, tmp_path):
    folder, x, _ = saved
    broken = change(folder, tmp_path / "broken", r=8, rank_pattern={"k_proj": 2})
    with pytest.raises(RuntimeError, match="size mismatch"):
        output(net, broken, x)
    ml.inspect(broken, fix=tmp_path / "fixed")
    assert torch.equal(output(net, tmp_path / "fixed", x), saved[2])


def test_names_that_a_base_lacks_are_mended(net, saved, tmp_path):
    folder, x, want = saved
    broken = change(folder, tmp_path / "broken", renamed(read_tensors_of(folder), "layers.", "model.layers."))
    with torch.no_grad():
        assert torch.equal(output(net, broken, x), net(x))
    base = {name: tuple(p.shape) for name, p in net.state_dict().items()}
    report = ml.inspect(broken, base=base, fix=tmp_path / "fixed", also=["base_names"])
    assert "'' in place of 'model.'" in report.findings[0].message
    assert torch.equal(output(net, tmp_path / "fixed", x), want)


def test_an_upcast_adapter_is_halved_and_computes_the_same(net, saved, tmp_path):
    folder, x, _ = saved
    tensors = {k: torch.tensor(v).bfloat16().float().numpy() for k, v in read_tensors_of(folder).items()}
    wide = change(folder, tmp_path / "wide", tensors)
    assert "upcast" in ml.inspect(wide, fix=tmp_path / "narrow", also="upcast").codes
    assert torch.equal(output(net, tmp_path / "narrow", x), output(net, wide, x))


@pytest.mark.parametrize("kind", variants.KINDS)
def test_every_kind_that_peft_writes_is_looked_at_and_keeps_its_fingerprint(kind, tmp_path):
    variants.saved(kind, tmp_path / "theirs")
    report = ml.inspect(tmp_path / "theirs")
    assert report.ok, str(report)
    file = ml.AdapterFile.read(tmp_path / "theirs")
    assert ("variant" in report.codes) == bool(file.variants)
    file.save(tmp_path / "ours", format="peft")
    result = ml.verify(tmp_path / "ours")
    assert result.fingerprint == file.fingerprint()
    assert ml.inspect(tmp_path / "ours").codes == report.codes
