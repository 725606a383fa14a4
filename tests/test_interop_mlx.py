"""MLX-LM itself loads what is written here, and what it saves is read: same logits, same deltas.

Needs mlx, mlx-cpu and mlx-lm; run with `make test-interop`.
"""

import json

import numpy as np
import pytest

import microlora as ml
from styles_support import delta, factors, same_deltas

mx = pytest.importorskip("mlx.core")
pytest.importorskip("mlx_lm")
pytestmark = [pytest.mark.interop, pytest.mark.filterwarnings("default")]

WIDTH, INNER, VOCABULARY, BLOCKS = 32, 48, 61, 3
SHAPES = {
    "self_attn.q_proj": (WIDTH, WIDTH),
    "self_attn.k_proj": (WIDTH, WIDTH // 2),
    "self_attn.v_proj": (WIDTH, WIDTH // 2),
    "self_attn.o_proj": (WIDTH, WIDTH),
    "mlp.gate_proj": (WIDTH, INNER),
    "mlp.down_proj": (INNER, WIDTH),
}
TOKENS = np.array([[3, 1, 4, 1, 5, 9, 2, 6], [5, 3, 5, 8, 9, 7, 9, 3]])


@pytest.fixture(scope="module", autouse=True)
def on_the_cpu():
    mx.set_default_device(mx.cpu)


def llama(seed=0):
    """A tiny random Llama with grouped queries; the same seed gives the same weights."""
    from mlx_lm.models.llama import Model, ModelArgs

    args = ModelArgs(
        model_type="llama",
        hidden_size=WIDTH,
        num_hidden_layers=BLOCKS,
        intermediate_size=INNER,
        num_attention_heads=4,
        num_key_value_heads=2,
        rms_norm_eps=1e-5,
        vocab_size=VOCABULARY,
        tie_word_embeddings=False,
    )
    mx.random.seed(seed)
    model = Model(args)
    mx.eval(model.parameters())
    return model


def logits(model):
    return np.array(model(mx.array(TOKENS)).astype(mx.float32), np.float64)


def merged(deltas):
    """The model with deltas added to its weights."""
    model = llama()
    modules = dict(model.named_modules())
    for path, value in deltas.items():
        layer = modules[path]
        layer.weight = layer.weight + mx.array(value.astype(np.float32))
    return model


def pairs(rank=4, blocks=range(BLOCKS), scale=0.3):
    out = {}
    for i in blocks:
        for j, (name, (n_in, n_out)) in enumerate(SHAPES.items()):
            path = f"model.layers.{i}.{name}"
            ((a, b),) = factors([path], rank, n_in, n_out, seed=10 * i + j).values()
            out[path] = (a * np.float32(scale), b * np.float32(scale))
    return out


def run(path):
    from mlx_lm.tuner.utils import load_adapters

    return logits(load_adapters(llama(), str(path)))


CASES = {
    "all blocks": (pairs(), {}, []),
    "some blocks": (pairs(blocks=[0, 2]), {}, []),
    "rsLoRA": (pairs(), {"use_rslora": True}, []),
    "mixed ranks": (pairs(2, [0]) | pairs(4, [1, 2]), {}, ["pad:rank", "round:scale"]),
    "mixed alphas": (pairs(), {"alpha": {p: 2.0 + i % 3 for i, p in enumerate(pairs())}}, ["round:scale"]),
}


@pytest.mark.parametrize("name", CASES)
def test_mlx_runs_what_peft_made(tmp_path, name):
    fs, settings, allow = CASES[name]
    adapter = ml.Adapter.from_factors(fs, **{"alpha": 8.0} | settings)
    ml.save(adapter, tmp_path / "peft", "peft")
    ml.convert(tmp_path / "peft", tmp_path / "mlx", format="mlx", allow=allow)
    want = logits(merged({p: delta(*adapter.factors(p), adapter.info(p).scaling) for p in fs}))
    got = run(tmp_path / "mlx")
    assert np.abs(want - logits(llama())).max() > 0.1  # the adapter does something
    assert np.abs(got - want).max() <= 1e-4
    # A wrong scale is seen.
    config = tmp_path / "mlx" / "adapter_config.json"
    text = json.loads(config.read_text())
    text["lora_parameters"]["scale"] *= 1.5
    config.write_text(json.dumps(text))
    assert np.abs(run(tmp_path / "mlx") - want).max() > 1e-2


def test_mlx_runs_heads_and_embeddings(tmp_path):
    fs = {"lm_head": next(iter(factors(["lm_head"], 4, WIDTH, VOCABULARY).values()))}
    adapter = ml.Adapter.from_factors(fs, alpha=2.0)
    ml.convert(adapter, tmp_path / "mlx", format="mlx")
    want = logits(merged({p: delta(*adapter.factors(p), 0.5) for p in fs}))
    assert np.abs(run(tmp_path / "mlx") - want).max() <= 1e-4

    from mlx_lm.tuner.utils import linear_to_lora_layers

    model = llama()
    keys = ["model.embed_tokens", "self_attn.q_proj"]
    parameters = {"rank": 2, "dropout": 0.0, "scale": 3.0, "keys": keys}
    linear_to_lora_layers(model, -1, parameters)
    save(model, tmp_path / "one", parameters, -1)
    file = ml.AdapterFile.read(tmp_path / "one")
    assert {m.kind for m in file.modules} == {"embedding", "linear"}
    file.save(tmp_path / "two")
    assert np.abs(run(tmp_path / "two") - logits(model)).max() == 0


def save(model, path, parameters, num_layers, name="adapters.safetensors", kind="lora"):
    """As mlx-lm's trainer saves; B is drawn, so that the adapter does something."""
    from mlx.utils import tree_flatten
    from mlx_lm.tuner.trainer import TrainingArgs  # noqa: F401 (the trainer whose files these are)
    from mlx_lm.utils import save_config

    path.mkdir()
    mx.random.seed(7)
    model.freeze()
    model.unfreeze(keys=["lora_a", "lora_b", "m"], strict=False)
    drawn = {
        n: mx.random.normal(v.shape) * 0.3 if n.endswith("lora_b") else v
        for n, v in tree_flatten(model.trainable_parameters())
    }
    model.load_weights(list(drawn.items()), strict=False)
    mx.save_safetensors(str(path / name), drawn)
    config = {
        "fine_tune_type": kind,
        "num_layers": num_layers,
        "lora_parameters": parameters,
        "model": "org/tiny",
    }
    save_config(config, path / "adapter_config.json")
    return drawn


@pytest.mark.parametrize("name", ["adapters.safetensors", "0000100_adapters.safetensors"])
def test_what_mlx_saves_is_read(tmp_path, name):
    from mlx_lm.tuner.utils import linear_to_lora_layers

    model = llama()
    parameters = {"rank": 3, "dropout": 0.0, "scale": 10.0}
    linear_to_lora_layers(model, 2, parameters)
    drawn = save(model, tmp_path / "a", parameters, 2, name)
    adapter = ml.load(tmp_path / "a" / name)
    assert all(".layers.0." not in path for path in adapter.modules())
    arrays = {n: np.array(v) for n, v in drawn.items()}
    paths = {n.rpartition(".")[0] for n in arrays}
    same_deltas(
        adapter, {p: delta(arrays[f"{p}.lora_a"].T, arrays[f"{p}.lora_b"].T, 10.0) for p in paths}, 1e-12
    )
    want = logits(merged({p: delta(*adapter.factors(p), 10.0) for p in paths}))
    assert np.abs(logits(model) - want).max() <= 1e-4


def test_dora_goes_there_and_back(tmp_path):
    from mlx_lm.tuner.utils import linear_to_lora_layers

    model = llama()
    parameters = {"rank": 3, "dropout": 0.0, "scale": 2.0, "keys": ["self_attn.q_proj"]}
    linear_to_lora_layers(model, 2, parameters, use_dora=True)
    save(model, tmp_path / "a", parameters, 2, kind="dora")
    ml.convert(tmp_path / "a", tmp_path / "peft", format="peft")
    ml.convert(tmp_path / "peft", tmp_path / "b", format="mlx")
    text = json.loads((tmp_path / "b" / "adapter_config.json").read_text())
    assert text["fine_tune_type"] == "dora"
    # Blocks that the adapter lacks become DoRA layers at their start, which is the base but for rounding.
    assert np.abs(run(tmp_path / "b") - logits(model)).max() <= 1e-4
