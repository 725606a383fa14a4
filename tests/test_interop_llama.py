"""GGUF adapters in llama.cpp itself, beside transformers with the deltas merged into its float32 weights."""

import ctypes
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import llama_support as llama
import microlora as ml
from microlora import _core
from microlora.exceptions import FormatError, UnsupportedVariantError
from microlora.formats import architectures
from reference_gguf import adapter_file, interleaved

pytestmark = [pytest.mark.interop, pytest.mark.filterwarnings("default"), pytest.mark.timeout(600)]

TOKENS = [504, 3575, 282, 4649, 314]  # "The capital of France is"
BLOCKS = (0, 14, 29)
#: in and out of the seven modules of one block of SmolLM2-135M.
SHAPES = {
    "self_attn.q_proj": (576, 576),
    "self_attn.k_proj": (576, 192),
    "self_attn.v_proj": (576, 192),
    "self_attn.o_proj": (576, 576),
    "mlp.gate_proj": (576, 1536),
    "mlp.up_proj": (576, 1536),
    "mlp.down_proj": (1536, 576),
}
SMOLLM2 = {
    "model_type": "llama", "num_hidden_layers": 30, "hidden_size": 576, "intermediate_size": 1536,
    "num_attention_heads": 9, "num_key_value_heads": 3, "vocab_size": 49152, "tie_word_embeddings": True,
    "rope_theta": 100000.0, "max_position_embeddings": 8192, "rms_norm_eps": 1e-5,
}  # fmt: skip
RMS = 0.005
RANK, ALPHA = 8, 16.0


def factors(rng, shapes, rank, size=0.02):
    """Random factors, float32, whose product is about ``size`` per number."""
    scale = np.sqrt(size / np.sqrt(rank))
    return {
        path: (
            (scale * rng.standard_normal((rank, i))).astype(np.float32),
            (scale * rng.standard_normal((o, rank))).astype(np.float32),
        )
        for path, (i, o) in shapes.items()
    }


def adapter(parts, alpha=ALPHA, use_rslora=False, dtype="f32"):
    rows = [(p, a, b, alpha[p] if isinstance(alpha, dict) else alpha) for p, (a, b) in parts.items()]
    return ml.Adapter(_core.adapter_from_factors(rows, use_rslora, dtype))


def halved(weight, heads):
    """Rows of a GGUF file's q or k in the order of transformers."""
    return weight.reshape(heads, -1, 2, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)


def hf_logprobs(model, tokens, deltas=None):
    """Log-probabilities of transformers, with deltas (out, in) added to the weights and taken off again."""
    import torch

    modules = dict(model.named_modules())
    kept = {path: modules[path].weight.data for path in deltas or {}}
    try:
        for path, delta in (deltas or {}).items():
            modules[path].weight.data = kept[path] + torch.from_numpy(delta)
        with torch.no_grad():
            logits = model(torch.tensor([tokens])).logits[0].double()
        return torch.log_softmax(logits, -1).numpy()
    finally:
        for path, weight in kept.items():
            modules[path].weight.data = weight


@dataclass
class Case:
    """SmolLM2 in llama.cpp and in transformers, and what a delta on it must give."""

    llama: Any
    parts: dict
    base: np.ndarray
    merged: np.ndarray
    bare: np.ndarray = field(repr=False, default=None)

    def of(self, path, tokens=TOKENS):
        return llama.rms(self.llama.logprobs(tokens, path), self.merged)


@pytest.fixture(scope="module")
def smollm2():
    """(transformers model with SmolLM2's weights, path of the F32 GGUF file)."""
    path, _ = llama.smollm2()
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    import gguf

    config = transformers.LlamaConfig(**{k: v for k, v in SMOLLM2.items() if k != "model_type"})
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
    names = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}
    inner = {
        "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
        "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj",
        "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
    }  # fmt: skip
    state = {}
    for tensor in gguf.GGUFReader(path).tensors:
        name = tensor.name.removesuffix(".weight")
        value = np.array(tensor.data, np.float32)
        if name.startswith("blk."):
            _, block, part = name.split(".")
            if part in ("attn_q", "attn_k"):
                value = halved(value, 9 if part == "attn_q" else 3)
            name = f"model.layers.{block}.{inner[part]}"
        state[f"{names.get(name, name)}.weight"] = torch.from_numpy(value)
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
    model.load_state_dict(state, assign=True)
    model.model.rotary_emb = type(model.model.rotary_emb)(config)
    return model.eval(), path


@pytest.fixture(scope="module")
def case(smollm2):
    model, path = smollm2
    shapes = {f"model.layers.{b}.{name}": size for b in BLOCKS for name, size in SHAPES.items()}
    parts = factors(np.random.default_rng(7), shapes, RANK)
    deltas = {p: (ALPHA / RANK) * (b @ a) for p, (a, b) in parts.items()}
    with llama.Llama(path) as running:
        yield Case(
            running,
            parts,
            hf_logprobs(model, TOKENS),
            hf_logprobs(model, TOKENS, deltas),
            running.logprobs(TOKENS),
        )


def converted(tmp_path, source, base=SMOLLM2, **options):
    path = tmp_path / "adapter.gguf"
    done = ml.convert(source, path, format="gguf", base_config=base, overwrite=True, **options)
    return path, done


def test_the_base_is_the_same_model_in_both(case):
    # q and k were put back into the order of transformers by the test's own inverse: a wrong one shows here.
    assert llama.rms(case.bare, case.base) <= RMS
    assert int(case.bare[-1].argmax()) == 7042  # " Paris"
    assert llama.rms(case.merged, case.base) > 0.3


def test_seven_modules_of_several_blocks(case, tmp_path):
    path, done = converted(tmp_path, adapter(case.parts))
    assert (done.modules, done.notes) == (21, ())
    assert case.of(path) <= RMS


def test_without_the_permutation_the_answers_are_wrong(case, tmp_path):
    path = tmp_path / "wrong.gguf"
    file = ml.AdapterFile.from_adapter(adapter(case.parts))
    base = architectures.Base.from_config(SMOLLM2)
    targets = {m.path: (base.tensor(m.path)[0], None) for m in file.modules}
    _core.save_gguf(file, path, "llama", targets, "f32", False, None, None, None, None)
    assert case.of(path) > 0.1


def rslora(parts):
    # Scaling alpha / sqrt(8) = 2: the same deltas.
    return adapter(parts, 2 * np.sqrt(RANK), use_rslora=True)


def mixed_ranks(parts):
    # Every other module twice side by side with half of B: rank 16, the same product.
    twice = {
        p: (np.vstack([a, a]), np.hstack([b, b]) / 2) if i % 2 else (a, b)
        for i, (p, (a, b)) in enumerate(parts.items())
    }
    return adapter(twice, {p: ALPHA * len(a) / RANK for p, (a, _) in twice.items()})


def mixed_rslora(parts):
    twice = {
        p: (np.vstack([a, a]), np.hstack([b, b]) / 2) if i % 3 else (a, b)
        for i, (p, (a, b)) in enumerate(parts.items())
    }
    return adapter(twice, {p: 2 * np.sqrt(len(a)) for p, (a, _) in twice.items()}, use_rslora=True)


def mixed_alphas(parts):
    weights = [1.0, 3.0, 0.25, -0.7]
    shares = {p: weights[i % 4] for i, p in enumerate(parts)}
    return adapter(
        {p: (a, b / np.float32(shares[p])) for p, (a, b) in parts.items()},
        {p: ALPHA * shares[p] for p in parts},
    )


@pytest.mark.parametrize("make", [rslora, mixed_ranks, mixed_rslora, mixed_alphas])
def test_other_scalings_are_folded(case, tmp_path, make):
    path, done = converted(tmp_path, make(case.parts))
    assert case.of(path) <= RMS
    assert done.notes


# Bounds by what a type keeps: about twice what was measured.
TYPES = {
    "f16": 0.006, "bf16": 0.015, "q8_0": 0.065, "q6_k": 0.045, "q5_k": 0.085, "q4_k": 0.19, "q4_1": 0.46,
    "q4_0": 0.35,
}  # fmt: skip


@pytest.mark.parametrize("dtype", TYPES)
def test_every_type_loads_and_stays_near(case, tmp_path, dtype):
    path, done = converted(tmp_path, adapter(case.parts), dtype=dtype)
    assert bool(done.notes) == dtype.startswith("q")  # lora_b of rank 8 is no whole block
    error = case.of(path)
    print(f"{dtype}: RMS {error:.5f}")
    assert error <= TYPES[dtype]


def test_mixed_types_of_one_pair(case, tmp_path):
    file = ml.AdapterFile.from_adapter(adapter(case.parts, dtype="bf16"))
    wide = ml.AdapterFile.from_adapter(adapter(case.parts))
    rows = []
    for i, (narrow, full) in enumerate(zip(file.modules, wide.modules, strict=True)):
        (a, _), (_, b) = file.factor_bytes(i), wide.factor_bytes(i)
        pair = (narrow.dtype_a, list(narrow.shape_a), a), (full.dtype_b, list(full.shape_b), b)
        rows.append((narrow.path, "linear", full.alpha, False, *pair))
    path, _ = converted(tmp_path, ml.AdapterFile.wrap(_core.AdapterFile.build(rows, [])))
    back = ml.AdapterFile.read(path, base_config=SMOLLM2)
    assert {(m.dtype_a, m.dtype_b) for m in back.modules} == {("BF16", "F32")}
    assert case.of(path) <= TYPES["bf16"]


@pytest.mark.parametrize("dtype", [t for t in TYPES if t.startswith("q")])
def test_quantised_adapters_run_as_the_blocks_that_they_are(case, smollm2, tmp_path, dtype):
    # Widths of 576 are no whole blocks of 256: there the type gives way, as quantize() does it.
    shapes = {f"model.layers.{b}.{name}": size for b in BLOCKS for name, size in SHAPES.items()}
    parts = factors(np.random.default_rng(11), shapes, 32)
    types = {
        p: (dtype if i % 256 == 0 or not dtype.endswith("_k") else "q8_0", "q8_0")
        for p, (i, _) in shapes.items()
    }
    made = ml.QuantizedAdapter.from_adapter(adapter(parts, 64.0), types, b_along_rank=True)
    path = tmp_path / "adapter.gguf"
    done = made.save(path, base_config=SMOLLM2)
    assert (done.modules, done.dropped) == (21, {})
    back = ml.load(path, base_config=SMOLLM2)
    assert {p: back.types(p) for p in back.modules()} == types
    # The numbers that the blocks stand for, merged: what llama.cpp runs, but for activations in 8 bits.
    numbers = made.dequantize()
    deltas = {p: 2 * (numbers.factors(p)[1] @ numbers.factors(p)[0]) for p in numbers.modules()}
    merged = hf_logprobs(smollm2[0], TOKENS, deltas)
    error = llama.rms(case.llama.logprobs(TOKENS, path), merged)
    print(f"{dtype}: RMS {error:.5f}, without it {llama.rms(case.bare, merged):.3f}")
    assert error <= 0.11  # about twice what was measured
    assert llama.rms(case.bare, merged) > 0.3


@pytest.mark.parametrize("dtype", ["q8_0", "q4_0", "q6_k"])
def test_both_factors_in_blocks(case, smollm2, tmp_path, dtype):
    parts = factors(np.random.default_rng(3), {"model.layers.3.mlp.down_proj": (1536, 576)}, 256, 0.01)
    path, done = converted(tmp_path, adapter(parts, 256.0), dtype=dtype)
    assert not done.notes
    # The numbers that the blocks stand for.
    read = ml.AdapterFile.read(path, base_config=SMOLLM2).adapter()
    deltas = {p: read.info(p).scaling * (read.factors(p)[1] @ read.factors(p)[0]) for p in read.modules()}
    merged = hf_logprobs(smollm2[0], TOKENS, deltas)
    # llama.cpp rounds activations to 8 bits where it multiplies with blocks.
    assert llama.rms(case.llama.logprobs(TOKENS, path), merged) <= 0.03


# --- Small models of other architectures -------------------------------------------------------------------

TINY = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 96, "max_position_embeddings": 64, "rms_norm_eps": 1e-6,
}  # fmt: skip
WORDS = [3, 17, 90, 41, 5, 66]


def tiny(architecture, tied=False):
    """(transformers model with random weights, its configuration)."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("gguf", reason="gguf is not installed: make test-interop")
    torch.manual_seed(5)
    if architecture == "gemma3":
        kind, config = (
            transformers.Gemma3ForCausalLM,
            transformers.Gemma3TextConfig(**TINY, head_dim=32, query_pre_attn_scalar=32, sliding_window=64),
        )
    elif architecture == "phi3":
        kind, config = (
            transformers.Phi3ForCausalLM,
            transformers.Phi3Config(
                **TINY, pad_token_id=0, bos_token_id=1, eos_token_id=2, sliding_window=64
            ),
        )
    else:
        kind, config = (
            transformers.LlamaForCausalLM,
            transformers.LlamaConfig(**TINY, tie_word_embeddings=tied),
        )
    model = kind(config).eval()
    for name, weight in model.named_parameters():
        spread = 0.2 if "norm" not in name else 0.05
        weight.data = weight.data * (0 if "norm" not in name else 1) + spread * torch.randn_like(weight)
    return model, config.to_dict()


def base_file(model, config, architecture, path, more=lambda writer: None):
    """A GGUF file of a small model (or its tensors) in F32, without a vocabulary."""
    import gguf

    writer = gguf.GGUFWriter(path, architecture)
    rope = (config.get("rope_parameters") or {}) | {"rope_theta": 10000.0}
    head = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(64)
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_rope_dimension_count(head)
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    if config.get("sliding_window"):
        writer.add_sliding_window(config["sliding_window"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_string("tokenizer.ggml.model", "no_vocab")
    more(writer)
    arch = next(a for a, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(arch, config["num_hidden_layers"])
    tensors = model if isinstance(model, dict) else model.state_dict()
    for name, value in tensors.items():
        if name == "lm_head.weight" and config["tie_word_embeddings"]:
            continue
        value = np.asarray(value).astype(np.float32)
        if architecture == "gemma3" and "norm" in name:
            value = value + 1
        if architecture == "llama" and "q_proj" in name:
            value = interleaved(value, config["num_attention_heads"])
        if architecture == "llama" and "k_proj" in name:
            value = interleaved(value, config["num_key_value_heads"])
        place = name if name.startswith("blk.") else names.get_name(name, (".weight",))
        writer.add_tensor(place, np.ascontiguousarray(value))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("architecture", ["gemma3", "phi3", "llama"])
def test_small_models_of_other_architectures(tmp_path, architecture):
    model, config = tiny(architecture)
    base_file(model, config, architecture, tmp_path / "base.gguf")
    linear = {
        name: (m.in_features, m.out_features)
        for name, m in model.named_modules()
        if hasattr(m, "in_features") and name != "lm_head"
    }
    assert any("gate_up" in p or "qkv" in p for p in linear) == (architecture == "phi3")
    parts = factors(np.random.default_rng(1), linear, 4, 0.2)
    path, _ = converted(tmp_path, adapter(parts, 8.0), config)
    merged = hf_logprobs(model, WORDS, {p: 2 * (b @ a) for p, (a, b) in parts.items()})
    with llama.Llama(tmp_path / "base.gguf") as running:
        assert llama.rms(running.logprobs(WORDS), hf_logprobs(model, WORDS)) <= RMS
        assert llama.rms(running.logprobs(WORDS, path), merged) <= RMS
        assert llama.rms(running.logprobs(WORDS), merged) > 0.1
    back = ml.load(path, base_config=config)
    for p, pair in parts.items():
        assert all(np.array_equal(got, want) for got, want in zip(back.factors(p), pair, strict=True))


def embedding_file(rng, vocabulary, width, rank=4):
    a = (0.3 * rng.standard_normal((rank, vocabulary))).astype(np.float32)
    b = (0.3 * rng.standard_normal((width, rank))).astype(np.float32)
    pair = ("F32", list(a.shape), a.tobytes()), ("F32", list(b.shape), b.tobytes())
    core = _core.AdapterFile.build([("model.embed_tokens", "embedding", 8.0, False, *pair)], [])
    return ml.AdapterFile.wrap(core), a, b


def test_an_adapter_of_the_embedding_and_the_output(tmp_path):
    model, config = tiny("llama")
    base_file(model, config, "llama", tmp_path / "base.gguf")
    file, a, b = embedding_file(np.random.default_rng(4), 96, 64)
    path, _ = converted(tmp_path, file, config)
    head = factors(np.random.default_rng(6), {"lm_head": (64, 96)}, 4, 0.2)
    other = tmp_path / "head.gguf"
    ml.convert(adapter(head, 8.0), other, format="gguf", base_config=config)
    deltas = {"model.embed_tokens": 2 * (b @ a).T, "lm_head": 2 * (head["lm_head"][1] @ head["lm_head"][0])}
    with llama.Llama(tmp_path / "base.gguf") as running:
        merged = hf_logprobs(model, WORDS, deltas)
        assert llama.rms(running.logprobs(WORDS), merged) > 0.1
        assert llama.rms(running.logprobs(WORDS, path, other), merged) <= RMS


def test_activated_lora_keeps_its_tokens(tmp_path):
    model, config = tiny("llama")
    base_file(model, config, "llama", tmp_path / "base.gguf")
    data = adapter_file("llama", {"blk.0.attn_v": (np.ones((2, 64)), np.ones((32, 2)))}, tokens=[7, 9])
    (tmp_path / "tokens.gguf").write_bytes(data)
    path = tmp_path / "again.gguf"
    ml.convert(tmp_path / "tokens.gguf", path, format="gguf", names="gguf", dtype="f16")
    with llama.Llama(tmp_path / "base.gguf") as running:
        handle = running.adapter(path)
        assert handle, running.reason
        count = running.lib.llama_adapter_get_alora_n_invocation_tokens
        count.restype = ctypes.c_uint64
        tokens = running.lib.llama_adapter_get_alora_invocation_tokens
        tokens.restype = ctypes.POINTER(ctypes.c_int32)
        assert tokens(handle)[: count(handle)] == [7, 9]
        running.lib.llama_adapter_lora_free(handle)


def test_what_llama_refuses_is_refused_here(tmp_path):
    model, config = tiny("llama")
    base_file(model, config, "llama", tmp_path / "base.gguf")
    a, b = np.ones((2, 64), np.float32), np.ones((64, 2), np.float32)
    good = {"blk.0.attn_q": (a, b)}
    files = {
        "good": adapter_file("llama", good),
        "architecture": adapter_file("qwen2", good),
        "general.type": adapter_file("llama", good, general="model"),
        "adapter.type": adapter_file("llama", good, kind="dora"),
        "orphan": adapter_file("llama", {"blk.0.attn_q": (a, None)}),
        "suffix": adapter_file("llama", good, extra={"blk.0.attn_q.weight.magnitude": b}),
        "transposed": adapter_file("llama", {"blk.0.attn_q": (a.T, b.T)}),
        "rank": adapter_file("llama", {"blk.0.attn_q": (np.ones((3, 64), np.float32), b)}),
        "shape": adapter_file("llama", {"blk.0.attn_q": (a[:, :32], b)}),
        "absent": adapter_file("llama", {"blk.7.attn_q": (a, b)}),
        "truncated": adapter_file("llama", good)[:-400],
        "name": adapter_file("llama", {"blk.0.attn_q" + "x" * 40: (a, b)}),
    }
    with llama.Llama(tmp_path / "base.gguf") as running:
        for name, data in files.items():
            path = tmp_path / f"{name}.gguf"
            path.write_bytes(data)
            handle = running.adapter(path)
            assert bool(handle) == (name == "good"), (name, running.reason)
            if handle:
                ml.load(path, base_config=config)
                running.lib.llama_adapter_lora_free(handle)
                continue
            with pytest.raises((FormatError, ml.exceptions.ShapeError)):
                ml.load(path, base_config=config)


def test_a_tied_base_is_refused_because_llama_would_end(case, tmp_path):
    file, _, _ = embedding_file(np.random.default_rng(4), 49152, 576)
    with pytest.raises(UnsupportedVariantError, match="tie_word_embeddings"):
        converted(tmp_path, file)
    assert not list(tmp_path.iterdir())


def test_llama_ends_on_an_embedding_adapter_of_a_tied_base(tmp_path):
    model, config = tiny("llama", tied=True)
    base_file(model, config, "llama", tmp_path / "base.gguf")
    file, _, _ = embedding_file(np.random.default_rng(4), 96, 64)
    path, _ = converted(tmp_path, file, config | {"tie_word_embeddings": False})
    program = (
        "import sys, llama_support as s\nwith s.Llama(sys.argv[1]) as m: m.logprobs([1, 2, 3], sys.argv[2])\n"
    )
    command = [sys.executable, "-c", program, tmp_path / "base.gguf", path]
    paths = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    run = subprocess.run(
        command, capture_output=True, text=True, check=False, env=os.environ | {"PYTHONPATH": paths}
    )
    assert run.returncode < 0, run
    assert "ggml_can_mul_mat" in run.stderr
