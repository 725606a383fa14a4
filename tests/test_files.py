"""Adapter files as Python sees them: both formats, dtypes, names, what strictness means, and mapping."""

import json
import warnings

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import microlora as ml
from microlora.exceptions import ConfigError, FormatError, UnsupportedVariantError, UnusedTensorWarning
from support import DTYPES, make, normal, read_tensors, rng, to_bits, write_tensors

NAMES = {"f32": "F32", "f16": "F16", "bf16": "BF16"}
FORMATS = ("a.safetensors", "folder")


def rich(dtype="f32", **more):
    lora = make(
        24, 10, 3, names=("q_proj", "v_proj"), dtype=dtype, name="mine", description="d", tags=["x"], **more
    )
    metric = ml.Metric("mrr@10", "abc", 0.25)
    lora.metadata = ml.AdapterMetadata(
        name="mine",
        version="1.2",
        base_model="tiny/llama",
        task_types=("search",),
        metrics=(metric,),
        parents=("p",),
    )
    return lora


def same_weights(one, two, names=None):
    for module in one.modules():
        other = names[module] if names else module
        for got, want in zip(two.raw(other), one.raw(module), strict=True):
            assert got.dtype == want.dtype
            np.testing.assert_array_equal(got, want)
        assert two.info(other) == one.info(module)


def peft_folder(path, tensors, dtype="f32", **config):
    """A folder as PEFT writes it, from ``{key: float array}``."""
    path.mkdir(exist_ok=True)
    entries, raw = {"__metadata__": {"format": "pt"}}, {}
    for key, values in tensors.items():
        entries[key] = {"dtype": NAMES[dtype], "shape": list(np.shape(values))}
        raw[key] = to_bits(values, dtype)
    (path / "adapter_model.safetensors").write_bytes(write_tensors(entries, raw))
    full = {
        "peft_type": "LORA",
        "r": 2,
        "lora_alpha": 4,
        "target_modules": ["q"],
        "task_type": "CAUSAL_LM",
        **config,
    }
    (path / "adapter_config.json").write_text(json.dumps(full))
    return path


def q_tensors(r=None, rank=2):
    r = r or rng()
    key = "base_model.model.layers.0.q.lora_{}.weight"
    return {key.format("A"): normal(r, rank, 6), key.format("B"): normal(r, 5, rank)}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", FORMATS)
def test_a_saved_adapter_comes_back_bit_for_bit(tmp_path, name, dtype):
    lora = rich(dtype)
    lora.save(tmp_path / name)
    for mmap in (False, True):
        value = ml.load(tmp_path / name, mmap=mmap)
        same_weights(lora.adapter(), value)
        assert value.config == lora.config
        assert value.metadata == lora.metadata
        again = ml.MicroLoRA.load(tmp_path / name, mmap=mmap)
        x = normal(rng(), 5, 24)
        np.testing.assert_array_equal(again.forward(x, "q_proj"), lora.forward(x, "q_proj"))
        assert (again.config, again.metadata) == (lora.config, lora.metadata)
    if name == "a.safetensors":
        assert ml.load(tmp_path / name) == lora.adapter()
        assert ml.Adapter((tmp_path / name).read_bytes()).to_bytes() == lora.export_weights()
    else:
        assert sorted(p.name for p in (tmp_path / name).iterdir())[:1] == ["adapter_config.json"]


@given(
    seed=st.integers(0, 999),
    n_in=st.integers(1, 40),
    n_out=st.integers(1, 40),
    rank=st.integers(1, 9),
    dtype=st.sampled_from(DTYPES),
    alpha=st.floats(0.01, 100),
    use_rslora=st.booleans(),
)
def test_shapes_and_scalings_of_every_kind_come_back(
    tmp_path_factory, seed, n_in, n_out, rank, dtype, alpha, use_rslora
):
    lora = make(n_in, n_out, rank, dtype=dtype, alpha=alpha, use_rslora=use_rslora, seed=seed)
    folder = tmp_path_factory.mktemp("files")
    for name in FORMATS:
        lora.save(folder / name)
        same_weights(lora.adapter(), ml.load(folder / name))


def test_the_format_follows_the_name_unless_it_is_given(tmp_path):
    lora = rich()
    ml.save(lora, tmp_path / "one.v1", format="peft")
    assert (tmp_path / "one.v1" / "adapter_config.json").is_file()
    ml.save(lora.adapter(), str(tmp_path / "two.lora"), "safetensors")
    assert (tmp_path / "two.lora").is_file()
    same_weights(ml.load(str(tmp_path / "two.lora")), ml.load(tmp_path / "one.v1"))
    same_weights(lora.adapter(), ml.load(tmp_path / "one.v1" / "adapter_model.safetensors"))
    ml.save(lora, tmp_path / "three.SAFETENSORS")
    assert (tmp_path / "three.SAFETENSORS").is_file()


def test_ranks_and_alphas_of_single_modules_come_back(tmp_path):
    cfg = ml.LoraConfig(
        rank=4,
        target_modules=["a", "b", "c"],
        module_ranks={"b": 2, "c": 7},
        module_alphas={"a": 3.5, "c": 1.25},
    )
    lora = ml.MicroLoRA(cfg, hidden_dim=16)
    for name in FORMATS:
        lora.save(tmp_path / name)
        value = ml.load(tmp_path / name)
        same_weights(lora.adapter(), value)
        assert value.config == cfg


def test_a_snapshot_saves_as_the_adapter_it_is(tmp_path):
    lora = rich()
    lora.instant(normal(rng(), 24), ml.Target(normal(rng(), 10)), "q_proj")
    ml.save(lora.snapshot(), tmp_path / "a.safetensors")
    assert ml.load(tmp_path / "a.safetensors") == lora.adapter()


def test_layer_paths_name_a_model_s_modules(tmp_path):
    lora = rich()
    paths = {
        "q_proj": [f"model.layers.{i}.self_attn.q_proj" for i in range(3)],
        "v_proj": "model.layers.1.v_proj",
    }
    lora.save(tmp_path / "out", layer_paths=paths)
    value = ml.load(tmp_path / "out")
    assert sorted(value.modules()) == sorted([*paths["q_proj"], paths["v_proj"]])
    for path in paths["q_proj"]:
        np.testing.assert_array_equal(value.lora_b(path), lora["q_proj"].lora_b)
    for wrong, word in [
        ({"q_proj": "a"}, "v_proj"),
        ({**paths, "k_proj": "b"}, "k_proj"),
        ({**paths, "q_proj": []}, "q_proj"),
    ]:
        with pytest.raises(ml.MicroLoraError, match=word):
            lora.save(tmp_path / "bad", layer_paths=wrong)
        assert not (tmp_path / "bad").exists()
    with pytest.raises(ConfigError, match="layer_paths"):
        lora.save(tmp_path / "a.safetensors", layer_paths=paths)


def test_a_foreign_folder_is_kept_whole(tmp_path):
    """The raw PEFT config travels with the value and with a learner made from it."""
    source = peft_folder(
        tmp_path / "in", q_tensors(), base_model_name_or_path="org/base", inference_mode=True
    )
    value = ml.load(source)
    assert value.modules() == ["layers.0.q"]
    assert value.config.rank == 2  # worked out from the weights
    assert json.loads(value.peft_config)["task_type"] == "CAUSAL_LM"
    learner = ml.MicroLoRA(value)
    learner.instant(normal(rng(), 6), ml.Target(normal(rng(), 5)), "layers.0.q")
    for out in (value, learner):
        ml.save(out, tmp_path / "out")
        config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
        assert (config["task_type"], config["base_model_name_or_path"]) == ("CAUSAL_LM", "org/base")
    assert learner.adapter().peft_config == value.peft_config
    assert ml.Adapter(value.to_bytes()) == value
    assert learner.config.rank == 2
    assert learner["layers.0.q"].scaling == 2.0


def test_a_file_s_rank_may_exceed_the_layer(tmp_path):
    value = ml.load(peft_folder(tmp_path / "in", q_tensors(rank=9), r=9, lora_alpha=9))
    lora = ml.MicroLoRA(value)
    x = normal(rng(), 6)
    a, b = value.factors("layers.0.q")
    np.testing.assert_allclose(lora.forward(x), b @ (a @ x), rtol=1e-5, atol=1e-6)
    assert lora.instant(x, ml.Target(normal(rng(), 5))).applied


def test_unused_tensors_are_refused_or_listed(tmp_path):
    tensors = {**q_tensors(), "base_model.model.head.weight": normal(rng(), 3, 3)}
    source = peft_folder(tmp_path / "in", tensors)
    with pytest.raises(FormatError, match=r"head\.weight"):
        ml.load(source)
    for mmap in (False, True):
        with pytest.warns(UnusedTensorWarning, match=r"unused: .*head\.weight"):
            value = ml.load(source, strict=False, mmap=mmap)
        assert value.extra_tensors() == {"base_model.model.head.weight": ("F32", [3, 3])}
        assert (
            value.extra_bytes("base_model.model.head.weight")
            == tensors["base_model.model.head.weight"].tobytes()
        )
        with pytest.raises(KeyError):
            value.extra_bytes("none")
    factors = ml.load(peft_folder(tmp_path / "plain", q_tensors())).memory_bytes
    assert value.memory_bytes == factors  # a mapped tensor takes no memory of its own
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UnusedTensorWarning)
        private = ml.load(source, strict=False)
    assert private.memory_bytes == factors + 36
    assert ml.MicroLoRA(private).memory_bytes == factors + 36
    ml.save(private, tmp_path / "kept")
    _, kept = read_tensors((tmp_path / "kept" / "adapter_model.safetensors").read_bytes())
    assert kept["base_model.model.head.weight"] == tensors["base_model.model.head.weight"].tobytes()


def test_a_private_load_does_not_see_later_writes(tmp_path):
    source = peft_folder(tmp_path / "in", q_tensors())
    value = ml.load(source)
    before = value.to_bytes()
    file = source / "adapter_model.safetensors"
    data = bytearray(file.read_bytes())
    data[-8:] = b"\0" * 8
    with file.open("r+b") as f:
        f.write(data)
    assert value.to_bytes() == before


REFUSED = {
    "use_dora": {"use_dora": True},
    "pissa": {"init_lora_weights": "pissa"},
    "pissa_niter": {"init_lora_weights": "pissa_niter_4"},
    "olora": {"init_lora_weights": "olora"},
    "corda": {"init_lora_weights": "corda"},
    "loftq": {"init_lora_weights": "loftq"},
    "kasa": {"kasa_config": {"beta": 1}},
    "use_qalora": {"use_qalora": True},
    "modules_to_save": {"modules_to_save": ["head"]},
    "lora_bias": {"lora_bias": True},
    "trainable_token_indices": {"trainable_token_indices": [1]},
    "alora": {"alora_invocation_tokens": [1, 2]},
    "layer_replication": {"layer_replication": [[0, 2]]},
    "target_parameters": {"target_parameters": ["w"]},
    "IA3": {"peft_type": "IA3"},
}


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("kind", REFUSED)
def test_variants_that_change_the_mathematics_are_refused_by_name(tmp_path, kind, strict):
    source = peft_folder(tmp_path / "in", q_tensors(), **REFUSED[kind])
    with pytest.raises(UnsupportedVariantError, match=kind):
        ml.load(source, strict=strict)


def test_wrong_tensors_are_refused_by_name(tmp_path):
    good = q_tensors()
    a, b = good
    nan = good[a].copy()
    nan[1, 2] = np.nan
    for what, tensors, word in [
        ("a alone", {a: good[a]}, "lora_A"),
        ("b alone", {b: good[b]}, "lora_B"),
        ("ranks differ", {a: good[a], b: normal(rng(), 5, 3)}, "lora_B"),
        ("one dimension", {a: good[a][0], b: good[b]}, "lora_A"),
        ("nan", {a: nan, b: good[b]}, "lora_A.*NaN"),
        ("nothing", {}, "adapter_model|no "),
        ("rank of the config", {a: normal(rng(), 3, 6), b: normal(rng(), 5, 3)}, "lora_A|rank|r"),
        (
            "dora",
            {**good, a.replace("lora_A.weight", "lora_magnitude_vector"): normal(rng(), 5)},
            "magnitude",
        ),
        ("bias", {**good, b.replace("weight", "bias"): normal(rng(), 5)}, "bias"),
    ]:
        with pytest.raises(FormatError) as caught:
            ml.load(peft_folder(tmp_path / what, tensors))
        assert any(w in str(caught.value) for w in word.replace(".*", "|").split("|")), (
            what,
            str(caught.value),
        )


@pytest.mark.parametrize("pattern", [r"layers\.0\.q", r"^layers\.0\.q$", r".*\.q", r"layers\.[0-9]+\.q", "q"])
def test_ranks_and_alphas_by_pattern(tmp_path, pattern):
    source = peft_folder(
        tmp_path / "in", q_tensors(rank=3), rank_pattern={pattern: 3}, alpha_pattern={pattern: 1.5}
    )
    info = ml.load(source).info("layers.0.q")
    assert (info.rank, info.alpha, info.scaling) == (3, 1.5, 0.5)


def test_look_around_is_refused_by_name(tmp_path):
    source = peft_folder(tmp_path / "in", q_tensors(), rank_pattern={"(?<!x)q": 2})
    with pytest.raises(FormatError, match=r"look|\(\?<!x\)q"):
        ml.load(source)


def test_a_newer_schema_is_refused(tmp_path):
    path = tmp_path / "a.safetensors"
    rich().save(path)
    header, tensors = read_tensors(path.read_bytes())
    header["__metadata__"]["format_version"] = "3"
    path.write_bytes(write_tensors(header, tensors))
    with pytest.raises(FormatError, match="version"):
        ml.load(path)


def test_saving_over_an_older_file_replaces_it_whole(tmp_path):
    one, two = make(24, 10, 3, seed=1), make(24, 10, 3, seed=2)
    for name in FORMATS:
        one.save(tmp_path / name)
        two.save(tmp_path / name)
        same_weights(two.adapter(), ml.load(tmp_path / name))
        files = [p for p in tmp_path.rglob("*") if p.is_file()]
        assert not [p for p in files if "tmp" in p.name or p.name.startswith(".")]


@pytest.mark.parametrize("suffix", [".gguf", ".npz", ".bin", ".pt"])
def test_a_name_of_another_format_is_no_name_of_a_directory(tmp_path, suffix):
    adapter = ml.Adapter.from_factors({"q": (np.ones((2, 4)), np.ones((4, 2)))}, alpha=2.0)
    want = "the name of a directory.*single file ends in .safetensors"
    if suffix in (".gguf", ".npz"):
        want = "a name that ends in .safetensors, or that of a directory"
    with pytest.raises(ConfigError, match=rf"path: got .*a\{suffix}', expected {want}"):
        ml.save(adapter, tmp_path / f"a{suffix}")
    with pytest.raises(ConfigError, match="convert writes other formats"):
        ml.save(adapter, tmp_path / f"a{suffix}", "gguf")
    assert not list(tmp_path.iterdir())
