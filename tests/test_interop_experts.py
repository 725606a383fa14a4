"""One LoRA per expert in llama.cpp, beside transformers with the deltas added to its stacked weights."""

import numpy as np
import pytest

import llama_support as llama
from test_interop_llama import RMS, TINY, WORDS, adapter, base_file, converted, factors, hf_logprobs

pytestmark = [pytest.mark.interop, pytest.mark.filterwarnings("default"), pytest.mark.timeout(600)]
EXPERTS = 4
ROPE = {"rope_type": "default", "rope_theta": 10000.0}


def test_one_lora_per_expert(tmp_path):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    gguf = pytest.importorskip("gguf", reason="gguf is not installed: make test-interop")
    torch.manual_seed(5)
    settings = transformers.MixtralConfig(
        **TINY, num_local_experts=EXPERTS, num_experts_per_tok=2, sliding_window=None, rope_parameters=ROPE
    )
    model = transformers.MixtralForCausalLM(settings).eval()
    for name, weight in model.named_parameters():
        weight.data = (0 if "norm" not in name else 1) * weight.data + 0.2 * torch.randn_like(weight)
    config = settings.to_dict() | {"tie_word_embeddings": False}
    tensors = {}
    for name, value in model.state_dict().items():
        value = value.numpy().astype(np.float32)
        block = name.split(".")[2] if name.startswith("model.layers.") else ""
        if name.endswith("experts.gate_up_proj"):
            gate, up = np.split(value, 2, axis=1)
            tensors[f"blk.{block}.ffn_gate_exps.weight"] = gate
            tensors[f"blk.{block}.ffn_up_exps.weight"] = up
        elif name.endswith("experts.down_proj"):
            tensors[f"blk.{block}.ffn_down_exps.weight"] = value
        elif name.endswith("mlp.gate.weight"):
            tensors[f"blk.{block}.ffn_gate_inp.weight"] = value
        else:
            tensors[name] = value
    base_file(
        tensors, config, "llama", tmp_path / "base.gguf",
        lambda writer: (writer.add_expert_count(EXPERTS), writer.add_expert_used_count(2)),
    )  # fmt: skip
    hidden, inner = TINY["hidden_size"], TINY["intermediate_size"]
    sizes = {"gate_proj": (hidden, inner), "up_proj": (hidden, inner), "down_proj": (inner, hidden)}
    shapes = {
        f"model.layers.{i}.mlp.experts.{e}.{leaf}": size
        for i in range(2) for e in range(EXPERTS) for leaf, size in sizes.items()
    }  # fmt: skip
    shapes["model.layers.1.self_attn.q_proj"] = (hidden, hidden)
    parts = factors(np.random.default_rng(1), shapes, 4, 0.2)
    path, _ = converted(tmp_path, adapter(parts, 8.0), config)
    stacked = {t.name for t in gguf.GGUFReader(path).tensors}
    assert len(stacked) == 2 * (2 * 3 + 1)
    bare = hf_logprobs(model, WORDS)
    with torch.no_grad():
        for p, (a, b) in parts.items():
            delta = torch.from_numpy(2 * (b @ a))
            head, _, rest = p.partition(".experts.")
            if not rest:
                model.get_submodule(p).weight += delta
                continue
            number, leaf = rest.split(".")
            experts = model.get_submodule(f"{head}.experts")
            if leaf == "down_proj":
                experts.down_proj[int(number)] += delta
            else:
                start = 0 if leaf == "gate_proj" else inner
                experts.gate_up_proj[int(number), start : start + inner] += delta
    merged = hf_logprobs(model, WORDS)
    with llama.Llama(tmp_path / "base.gguf") as running:
        assert llama.rms(running.logprobs(WORDS), bare) <= RMS
        assert llama.rms(running.logprobs(WORDS, path), merged) <= RMS
        assert llama.rms(running.logprobs(WORDS), merged) > 0.1
