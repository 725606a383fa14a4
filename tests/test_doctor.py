"""The doctor: every check speaks on a file that has its fault, and is silent on a sound one."""

from __future__ import annotations

import json
import os
import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import microlora as ml
from doctor_support import (
    PREFIX,
    RANK,
    WIDTH,
    paths,
    read_tensors_of,
    renamed,
    sound_config,
    sound_tensors,
    write_peft,
    write_tensors,
)
from microlora.doctor import CHECKS
from microlora.exceptions import (
    ConfigError,
    DestinationExistsError,
    FormatError,
    MicroLoraError,
    UnrepairableError,
)
from microlora.formats.conversion import WRITERS

CHECK = {c.code: c for c in CHECKS}
Q0 = "model.layers.0.self_attn.q_proj"
A0, B0 = f"{PREFIX}{Q0}.lora_A.weight", f"{PREFIX}{Q0}.lora_B.weight"


def without(tensors, *names):
    return {k: v for k, v in tensors.items() if k not in names}


def times(factor, name=B0, **more):
    tensors = sound_tensors(**more)
    tensors[name] = (tensors[name] * np.float32(factor)).astype(np.float32)
    return tensors


def put(name, value, tensors=None):
    return (tensors or sound_tensors()) | {name: np.asarray(value)}


def poisoned(value=np.nan, name=A0):
    tensors = sound_tensors()
    tensors[name][1, 2] = value
    return tensors


def all_zero():
    return {k: np.zeros_like(v) if "lora_B" in k else v for k, v in sound_tensors().items()}


def bfloats():
    return {k: (v.view("u4") & np.uint32(0xFFFF0000)).view("f4") for k, v in sound_tensors().items()}


def tensors_and(config=None, **changes):
    return lambda d: write_peft(d, None, sound_config(**(config or {}), **changes))


def weights(make):
    return lambda d: write_peft(d, make())


def _truncated(d):
    write_peft(d)
    file = d / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-7])


def _overlap(d):
    write_peft(d)
    header = {
        name: {"dtype": "F32", "shape": [2], "data_offsets": [at, at + 8]}
        for name, at in (("a", 0), ("b", 4))
    }
    text = json.dumps(header).encode()
    (d / "adapter_model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + b"\0" * 12)


def _pickle(d):
    write_peft(d)
    (d / "adapter_model.safetensors").rename(d / "x")
    (d / "x").unlink()
    (d / "adapter_model.bin").write_bytes(b"PK\x03\x04")


def _pickle_named(d):
    write_peft(d)
    (d / "adapter_model.safetensors").write_bytes(b"\x80\x04K\x01.")


def _beside(d):
    write_peft(d)
    (d / "optimizer.pt").write_bytes(b"PK\x03\x04")


def _link(d):
    write_peft(d / "real")
    d.mkdir(exist_ok=True)
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        (d / name).symlink_to(d / "real" / name)


def _executable(d):
    write_peft(d)
    (d / "adapter_config.json").chmod(0o755)


def _changed(d):
    write_peft(d)
    ml.save(ml.load(d), d)
    tensors = read_tensors_of(d)
    header = ml._core.scan_file(str(d / "adapter_model.safetensors")).header
    write_tensors(d / "adapter_model.safetensors", {k: v * np.float32(2) for k, v in tensors.items()}, header)


def _config_gone(d):
    write_peft(d, config=False)


def _no_weights(d):
    write_peft(d)
    (d / "adapter_model.safetensors").unlink()


def _config_text(text):
    def write(d):
        write_peft(d)
        (d / "adapter_config.json").write_text(text)

    return write


def rank_two_somewhere():
    tensors = sound_tensors()
    tensors[A0], tensors[B0] = tensors[A0][:2], tensors[B0][:, :2]
    return tensors


# code -> files that have the fault
BROKEN = {
    "damaged": [_truncated, _overlap],
    "pickle": [_pickle, _pickle_named],
    "no_weights": [_no_weights],
    "pickle_beside": [_beside],
    "link": [_link],
    "executable": [_executable],
    "weights_changed": [_changed],
    "empty": [weights(lambda: {"model.embed.weight": np.ones((2, 2), "f4")})],
    "mixed_styles": [weights(lambda: put("lora_unet_down_blocks_0.lora_down.weight", np.ones((2, 2), "f4")))],
    "prefix_missing": [weights(lambda: renamed(sound_tensors(), PREFIX, ""))],
    "prefix_doubled": [weights(lambda: renamed(sound_tensors(), PREFIX, PREFIX * 2))],
    "adapter_name": [
        weights(lambda: renamed(sound_tensors(), "lora_A.weight", "lora_A.default.weight")),
        weights(lambda: renamed(sound_tensors(), ".weight", ".default.weight")),
    ],
    "other_adapter_name": [
        weights(lambda: renamed(sound_tensors(), "lora_B.weight", "lora_B.other.weight")),
    ],
    "duplicate": [
        weights(lambda: put(A0.replace(PREFIX, ""), sound_tensors()[A0])),
        weights(lambda: put(A0.replace("lora_A", "lora_A.default"), np.ones((RANK, WIDTH), "f4"))),
    ],
    "orphan": [weights(lambda: without(sound_tensors(), B0)), weights(lambda: without(sound_tensors(), A0))],
    "unused": [weights(lambda: put("step", np.ones((1,), "f4")))],
    "layer_gap": [
        weights(lambda: without(sound_tensors(), A0.replace("s.0", "s.2"), B0.replace("s.0", "s.2")))
    ],
    "bad_shape": [
        weights(lambda: put(B0, np.ones((WIDTH, RANK + 1), "f4"))),
        weights(lambda: put(A0, np.ones((RANK,), "f4"))),
    ],
    "rank_contradicts": [
        tensors_and(r=8),
        weights(rank_two_somewhere),
        tensors_and(rank_pattern={"q_proj": 2}),
    ],
    "nonfinite": [weights(poisoned), weights(lambda: poisoned(-np.inf, B0))],
    "dtype": [
        weights(lambda: {k: v.astype("f8") for k, v in sound_tensors().items()}),
        weights(lambda: put(A0, np.ones((RANK, WIDTH), "i4"))),
    ],
    "mixed_dtypes": [weights(lambda: put(A0, sound_tensors()[A0].astype("f2")))],
    "upcast": [
        weights(bfloats),
        weights(lambda: {k: v.astype("f2").astype("f4") for k, v in sound_tensors().items()}),
    ],
    "untrained": [weights(all_zero)],
    "zero_layer": [weights(lambda: times(0)), weights(lambda: times(0, A0))],
    "dead_layer": [weights(lambda: times(1e-5))],
    "outlier_layer": [weights(lambda: times(1e4))],
    "config_missing": [_config_gone],
    "config_broken": [_config_text("{"), _config_text("[]"), _config_text('{"r": 1, "r": 2}')],
    "not_lora": [tensors_and(peft_type="IA3"), tensors_and(peft_type=...)],
    "invalid_setting": [
        tensors_and(r=0),
        tensors_and(lora_alpha="x"),
        tensors_and(use_rslora="yes"),
        tensors_and(bias="some"),
        tensors_and(rank_pattern=[1]),
        tensors_and(alpha_pattern={"q_proj": None}),
    ],
    "pattern_refused": [tensors_and(alpha_pattern={"(?=q)q_proj": 4}), tensors_and(alpha_pattern={"q(": 4})],
    "pattern_unmatched": [
        tensors_and(alpha_pattern={"o_proj": 4}),
        tensors_and(rank_pattern={"layers.9.q": 4}),
    ],
    "target_uncovered": [tensors_and(target_modules=["q_proj"]), tensors_and(target_modules=r".*q_proj")],
    "target_unmatched": [tensors_and(target_modules=["q_proj", "v_proj", "o_proj"])],
    "base_mutating": [tensors_and(init_lora_weights="pissa"), tensors_and(init_lora_weights="olora")],
    "variant": [
        tensors_and(use_dora=True),
        tensors_and(alora_invocation_tokens=[]),
        weights(lambda: put(A0.replace("lora_A.weight", "lora_magnitude_vector"), np.ones(WIDTH, "f4"))),
        weights(lambda: put(f"{PREFIX}{Q0}.lora_B.bias", np.ones(WIDTH, "f4"))),
        weights(lambda: put(f"{PREFIX}model.embed.lora_embedding_A", np.ones((RANK, 3), "f4"))),
    ],
    "unknown_setting": [tensors_and(use_dorra=True)],
    "alpha": [tensors_and(lora_alpha=0), tensors_and(lora_alpha=-8), tensors_and(lora_alpha=65 * RANK)],
    "rslora_scaling": [tensors_and(lora_alpha=32, use_rslora=True)],
    "saved_modules_missing": [tensors_and(modules_to_save=["score"])],
    "transposed": [tensors_and(fan_in_fan_out=True)],
    "no_base_name": [tensors_and(base_model_name_or_path=None)],
    "no_peft_version": [tensors_and(peft_version=...)],
}
CONFIG = {
    "model_type": "llama",
    "hidden_size": WIDTH,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "intermediate_size": 32,
}
SHAPES = {f"{p}.weight": (WIDTH, WIDTH) for p in paths()}
# code -> (files, base)
AGAINST = {
    "base_names": [
        (write_peft, {k.replace("model.", "model.language_model."): v for k, v in SHAPES.items()}),
        (write_peft, {k.replace("q_proj", "query"): v for k, v in SHAPES.items()}),
        (weights(lambda: renamed(sound_tensors(), "model.layers", "layers")), CONFIG),
    ],
    "base_shapes": [
        (write_peft, SHAPES | {f"{Q0}.weight": (WIDTH, 8)}),
        (write_peft, CONFIG | {"num_key_value_heads": 2}),
        (write_peft, {"text_config": CONFIG | {"hidden_size": 32}}),
    ],
    "base_layers": [(write_peft, CONFIG | {"num_hidden_layers": 4})],
    "base_name": [(write_peft, CONFIG | {"_name_or_path": "acme/other"})],
}


@pytest.mark.parametrize(("code", "make"), [(c, m) for c, makes in BROKEN.items() for m in makes])
def test_each_check_speaks_where_its_fault_is(code, make, tmp_path):
    make(tmp_path / "a")
    report = ml.inspect(tmp_path / "a")
    found = [f for f in report.findings if f.code == code]
    assert found, report.codes
    assert {f.severity for f in found} == {CHECK[code].severity}
    assert all(f.message and f.todo and f.repair == CHECK[code].way for f in found)
    assert report.ok == (not any(f.severity == "error" for f in report.findings))
    assert code in str(report)


@pytest.mark.parametrize(("code", "make", "base"), [(c, *row) for c, rows in AGAINST.items() for row in rows])
def test_each_check_against_a_base_speaks(code, make, base, tmp_path):
    make(tmp_path / "a")
    report = ml.inspect(tmp_path / "a", base=base)
    assert code in report.codes, report.codes
    assert code not in ml.inspect(tmp_path / "a").codes


def test_every_check_has_a_file_that_makes_it_speak():
    assert set(CHECK) == set(BROKEN) | set(AGAINST) | {"refused"}  # which has a test of its own


@pytest.mark.parametrize("base", [None, CONFIG, SHAPES, {"text_config": CONFIG}])
def test_a_sound_file_is_silent(base, tmp_path):
    report = ml.inspect(write_peft(tmp_path / "a"), base=base)
    assert (report.findings, report.ok, report.format) == ((), True, "peft")
    assert "nothing was found" in str(report)
    adapter = ml.load(tmp_path / "a")
    ml.save(adapter, tmp_path / "one.safetensors")
    report = ml.inspect(tmp_path / "one.safetensors", base=base)
    assert (report.findings, report.format) == ((), "safetensors")
    assert report.weights_sha256 == ml.fingerprint(adapter)


def test_a_reader_that_refuses_more_than_the_checks_see_is_quoted(tmp_path, monkeypatch):
    from microlora.doctor import facts

    def read(*_, **__):
        raise FormatError("x: a reason of its own")

    monkeypatch.setattr(facts.AdapterFile, "read", read)
    report = ml.inspect(write_peft(tmp_path / "a"))
    assert report.codes == ("refused",)
    assert "a reason of its own" in str(report)


def test_rows_say_what_the_numbers_are(tmp_path):
    tensors = sound_tensors()
    tensors[A0.replace("s.0", "s.1")][0, 0] = np.inf
    report = ml.inspect(
        write_peft(tmp_path / "a", tensors, sound_config(alpha_pattern={"layers.0.self_attn.q_proj": 20}))
    )
    row = next(m for m in report.modules if m.path == Q0)
    a, b = tensors[A0].astype("f8"), tensors[B0].astype("f8")
    assert (row.rank, row.alpha, row.scaling, row.dtype, row.nonfinite) == (RANK, 20.0, 5.0, "F32", 0)
    assert row.norm_a == pytest.approx(np.linalg.norm(a), rel=1e-12)
    assert row.norm_b == pytest.approx(np.linalg.norm(b), rel=1e-12)
    assert row.norm_delta == pytest.approx(5.0 * np.linalg.norm(b @ a), rel=1e-12)
    assert [m.nonfinite for m in report.modules if m.nonfinite] == [1]
    assert report.base_model == "acme/base"
    assert len(report.modules) == 10
    assert report.tensors == 20
    assert report.data_bytes == 20 * 4 * RANK * WIDTH


def test_reports_are_json(tmp_path):
    tensors = sound_tensors()
    tensors[A0][:] = np.inf
    del tensors[B0]
    report = ml.inspect(write_peft(tmp_path / "a", tensors))
    again = json.loads(report.to_json())
    assert again["ok"] is False
    assert {f["code"] for f in again["findings"]} == set(report.codes)
    assert again["modules"][0]["path"] == report.modules[0].path
    assert report.count("error") == sum(f["severity"] == "error" for f in again["findings"])


def test_long_tables_are_cut(tmp_path):
    report = ml.inspect(write_peft(tmp_path / "a", sound_tensors(paths(40))))
    assert "... and 69 more" in str(report)
    assert len(report.modules) == 80


# -- the base ---------------------------------------


def test_the_nearest_names_are_proposed_and_one_change_is_told(tmp_path):
    write_peft(tmp_path / "a")
    base = {k.replace("model.", "model.language_model."): v for k, v in SHAPES.items()}
    finding = ml.inspect(tmp_path / "a", base=base).findings[0]
    assert "10 of 10 modules" in finding.message
    assert "'model.language_model.' in place of 'model.'" in finding.message
    base = {k.replace("q_proj", "q_projection"): v for k, v in SHAPES.items()}
    finding = ml.inspect(tmp_path / "a", base=base).findings[0]
    assert f"{Q0} -> {Q0}ection" in finding.message


def test_an_end_that_two_modules_share_proposes_neither(tmp_path):
    write_peft(tmp_path / "a", sound_tensors(paths(2)))
    two = {
        f"{part}.{k.removeprefix('model.')}": (WIDTH, WIDTH) for part in ("vision", "text") for k in SHAPES
    }
    finding = ml.inspect(tmp_path / "a", base=two).findings[0]
    assert finding.code == "base_names"
    assert "in place of" not in finding.message


def _shards(folder, shapes):
    folder.mkdir()
    names = list(shapes)
    for i, part in enumerate((names[::2], names[1::2])):
        write_tensors(folder / f"m-{i}.safetensors", {k: np.zeros(shapes[k], "f4") for k in part})
    index = {k: f"m-{i % 2}.safetensors" for i, k in enumerate(names)}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))


def test_a_base_is_read_from_all_that_people_have(tmp_path):
    write_peft(tmp_path / "a")
    wrong = SHAPES | {f"{Q0}.weight": (WIDTH, 24)}
    _shards(tmp_path / "shards", wrong)
    write_tensors(tmp_path / "m.safetensors", {k: np.zeros(v, "f4") for k, v in wrong.items()})
    (tmp_path / "conf").mkdir()
    (tmp_path / "conf" / "config.json").write_text(json.dumps(CONFIG | {"num_key_value_heads": 1}))
    for base in (
        tmp_path / "shards",
        tmp_path / "shards" / "model.safetensors.index.json",
        tmp_path / "m.safetensors",
        tmp_path / "conf",
        str(tmp_path / "conf" / "config.json"),
        wrong,
    ):
        report = ml.inspect(tmp_path / "a", base=base)
        assert report.codes == ("base_shapes",), base
    # Packed weights have a name and no shape to compare.
    write_tensors(tmp_path / "packed.safetensors", {k: np.zeros((8, 8), "i4") for k in SHAPES})
    assert ml.inspect(tmp_path / "a", base=tmp_path / "packed.safetensors").findings == ()


@pytest.mark.parametrize("base", [{}, {"a": 1}, {"a": [1, 2]}, 3])
def test_what_is_no_base_is_refused(base, tmp_path):
    write_peft(tmp_path / "a")
    with pytest.raises((FormatError, ConfigError), match="base"):
        ml.inspect(tmp_path / "a", base=base)


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", struct.pack("<Q", 2**62) + b"{", b"\xff" * 40])
def test_a_broken_base_file_is_refused_by_name(content, tmp_path):
    write_peft(tmp_path / "a")
    (tmp_path / "base.safetensors").write_bytes(content)
    with pytest.raises(FormatError, match=r"base\.safetensors"):
        ml.inspect(tmp_path / "a", base=tmp_path / "base.safetensors")
    with pytest.raises(FileNotFoundError):
        ml.inspect(tmp_path / "a", base=tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FormatError, match=r"no config\.json"):
        ml.inspect(tmp_path / "a", base=tmp_path / "empty")


# -- repairs ---------------------------------------

#: What is repaired without being asked for; the copy is a sound file.
GIVEN = [(c, m) for c, makes in BROKEN.items() for m in makes if CHECK[c].way == "yes"]
#: These hold something that no repair takes out.
HOPELESS = {("duplicate", 1), ("dtype", 1)}


@pytest.mark.parametrize(
    ("code", "at", "make"),
    [(c, i, m) for c in BROKEN for i, m in enumerate(BROKEN[c]) if CHECK[c].way == "yes"],
)
def test_repairable_faults_are_gone_from_the_copy(code, at, make, tmp_path):
    make(tmp_path / "a")
    before = {p.name: p.read_bytes() for p in (tmp_path / "a").iterdir() if p.is_file()}
    if (code, at) in HOPELESS:
        with pytest.raises(UnrepairableError, match="fix"):
            ml.inspect(tmp_path / "a", fix=tmp_path / "b")
        assert sorted(p.name for p in tmp_path.iterdir()) == ["a"]
    else:
        report = ml.inspect(tmp_path / "a", fix=tmp_path / "b")
        assert report.fixed == str(tmp_path / "b")
        assert report.repairs
        again = ml.inspect(tmp_path / "b")
        assert code not in again.codes
        assert again.ok
        assert set(again.codes) <= {*report.codes, "layer_gap"}
        ml.load(tmp_path / "b")
        assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b"]
    assert {p.name: p.read_bytes() for p in (tmp_path / "a").iterdir() if p.is_file()} == before


@pytest.mark.parametrize("code", [c.code for c in CHECKS if c.way == "asked" and c.code in BROKEN])
def test_what_changes_the_adapter_is_repaired_when_asked(code, tmp_path):
    for i, make in enumerate(BROKEN[code]):
        make(tmp_path / f"a{i}")
        if CHECK[code].severity == "error":
            with pytest.raises(UnrepairableError, match=f"also=\\['{code}'\\]"):
                ml.inspect(tmp_path / f"a{i}", fix=tmp_path / f"b{i}")
        ml.inspect(tmp_path / f"a{i}", fix=tmp_path / f"b{i}", also=code)
        again = ml.inspect(tmp_path / f"b{i}")
        assert code not in again.codes
        assert again.ok
        ml.load(tmp_path / f"b{i}")


def test_repairs_keep_every_number_that_they_do_not_speak_of(tmp_path):
    tensors = sound_tensors()
    messy = {
        k.replace(PREFIX, PREFIX * 2).replace(".weight", ".default.weight"): v for k, v in tensors.items()
    } | {"step": np.ones(1, "f4")}
    write_peft(
        tmp_path / "a", messy, sound_config(r=8, target_modules=["k_proj"], alpha_pattern={"k_proj": 3})
    )
    report = ml.inspect(tmp_path / "a", fix=tmp_path / "b")
    assert {"prefix_doubled", "adapter_name", "unused", "rank_contradicts", "pattern_unmatched"} <= set(
        report.codes
    )
    copy = read_tensors_of(tmp_path / "b")
    assert copy.keys() == tensors.keys()
    assert all(np.array_equal(copy[k], v) for k, v in tensors.items())
    config = json.loads((tmp_path / "b" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["alpha_pattern"]) == (RANK, 8, {})
    assert set(config["target_modules"]) == set(paths())
    assert ml.inspect(tmp_path / "b").findings == ()


def test_a_layer_with_nan_is_switched_off_and_no_other(tmp_path):
    tensors = poisoned()
    write_peft(tmp_path / "a", tensors)
    ml.inspect(tmp_path / "a", fix=tmp_path / "b", also=["nonfinite"])
    copy = read_tensors_of(tmp_path / "b")
    assert not copy[B0].any()
    assert np.array_equal(copy[A0], np.nan_to_num(tensors[A0], nan=0.0))
    assert all(np.array_equal(copy[k], v) for k, v in tensors.items() if k not in (A0, B0))


def test_narrowing_halves_the_file_and_changes_no_number(tmp_path):
    for make, name in (
        (bfloats, "BF16"),
        (lambda: {k: v.astype("f2").astype("f4") for k, v in sound_tensors().items()}, "F16"),
    ):
        tensors = make()
        write_peft(tmp_path / name, tensors)
        report = ml.inspect(tmp_path / name, fix=tmp_path / (name + "b"), also="upcast")
        copy = read_tensors_of(tmp_path / (name + "b"))
        assert all(np.array_equal(copy[k], v) for k, v in tensors.items())
        again = ml.inspect(tmp_path / (name + "b"))
        assert {m.dtype for m in again.modules} == {name}
        assert 2 * again.data_bytes == report.data_bytes


def test_mixed_ranks_are_written_as_patterns(tmp_path):
    write_peft(tmp_path / "a", rank_two_somewhere(), sound_config(rank_pattern={"v_proj": 7}))
    ml.inspect(tmp_path / "a", fix=tmp_path / "b")
    adapter = ml.load(tmp_path / "b")
    assert {m: adapter.info(m).rank for m in adapter.modules()} == {
        p: 2 if p == Q0 else RANK for p in paths()
    }


def test_names_follow_the_base_when_asked(tmp_path):
    base = {k.replace("model.", "model.language_model."): v for k, v in SHAPES.items()}
    write_peft(tmp_path / "a")
    with pytest.raises(UnrepairableError, match="base_names"):
        ml.inspect(tmp_path / "a", base=base, fix=tmp_path / "b")
    report = ml.inspect(tmp_path / "a", base=base, fix=tmp_path / "b", also="base_names")
    assert "'model.language_model.' in place of 'model.'" in report.repairs[0]
    assert ml.inspect(tmp_path / "b", base=base).findings == ()
    old, new = ml.load(tmp_path / "a"), ml.load(tmp_path / "b")
    for path in old.modules():
        assert np.array_equal(old.lora_a(path), new.lora_a(path.replace("model.", "model.language_model.")))
    other = {k.replace("q_proj", "query"): v for k, v in SHAPES.items()}
    with pytest.raises(UnrepairableError, match="no one change"):
        ml.inspect(tmp_path / "a", base=other, fix=tmp_path / "c", also="base_names")
    assert not (tmp_path / "c").exists()


def test_our_single_file_is_repaired_too(tmp_path):
    adapter = ml.load(write_peft(tmp_path / "a", bfloats()))
    ml.save(adapter, tmp_path / "one.safetensors")
    report = ml.inspect(tmp_path / "one.safetensors", fix=tmp_path / "two.safetensors", also="upcast")
    assert report.codes == ("upcast",)
    again = ml.load(tmp_path / "two.safetensors")
    assert {again.info(m).dtype_a for m in again.modules()} == {"bf16"}
    assert all(np.array_equal(again.lora_a(m), adapter.lora_a(m)) for m in adapter.modules())


def test_refusals_come_before_any_work(tmp_path):
    write_peft(tmp_path / "a")
    (tmp_path / "b").mkdir()
    with pytest.raises(DestinationExistsError):
        ml.inspect(tmp_path / "a", fix=tmp_path / "b")
    with pytest.raises(ConfigError, match="also: got 'orphan'"):
        ml.inspect(tmp_path / "a", fix=tmp_path / "c", also=["orphan"])
    with pytest.raises(ConfigError, match="without fix"):
        ml.inspect(tmp_path / "a", also=["upcast"])
    with pytest.raises(FileNotFoundError):
        ml.inspect(tmp_path / "no")
    _truncated(tmp_path / "t")
    with pytest.raises(UnrepairableError, match="truncated"):
        ml.inspect(tmp_path / "t", fix=tmp_path / "c")
    only = {k: v for k, v in sound_tensors().items() if "lora_A" in k}
    with pytest.raises(UnrepairableError, match="nothing of the adapter"):
        ml.inspect(write_peft(tmp_path / "o", only), fix=tmp_path / "c")
    assert not (tmp_path / "c").exists()


def test_what_no_repair_takes_out_is_named(tmp_path):
    tensors = put(B0, np.ones((WIDTH, RANK + 1), "f4"))
    with pytest.raises(UnrepairableError, match="no repair takes out bad_shape"):
        ml.inspect(write_peft(tmp_path / "a", tensors), fix=tmp_path / "b")


def test_a_copy_is_looked_at_before_it_takes_its_place(tmp_path, monkeypatch):
    from microlora.doctor import inspecting

    nothing = [c._replace(repair=lambda *_: None) if c.code == "prefix_missing" else c for c in CHECKS]
    monkeypatch.setattr(inspecting, "CHECKS", tuple(nothing))
    write_peft(tmp_path / "a", renamed(sound_tensors(), PREFIX, ""))
    with pytest.raises(UnrepairableError, match="would still have prefix_missing"):
        ml.inspect(tmp_path / "a", fix=tmp_path / "b")
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


# -- odd places ---------------------------------------


def test_the_weights_file_of_a_directory_is_the_directory(tmp_path):
    write_peft(tmp_path / "a", times(0))
    one, two = ml.inspect(tmp_path / "a"), ml.inspect(tmp_path / "a" / "adapter_model.safetensors")
    assert one.codes == two.codes == ("zero_layer",)


@pytest.mark.parametrize("format", ["gguf", "safetensors"])
def test_blocks_are_looked_at_as_the_numbers_they_stand_for(format, tmp_path):
    r = np.random.default_rng(0)
    name = "model.layers.0.mlp.up_proj"
    a, b = r.standard_normal((4, 64), np.float32), r.standard_normal((32, 4), np.float32)
    adapter = ml.Adapter.from_factors({name: (a, b)}, alpha=8.0)
    if format == "gguf":
        pytest.importorskip("gguf")
        config = CONFIG | {"hidden_size": 64, "intermediate_size": 32}
        ml.convert(adapter, tmp_path / "x", format="gguf", base_config=config, dtype="q8_0")
    else:
        ml.save(ml.quantize(adapter, "q8_0").adapter, tmp_path / "x", format="safetensors")
    report = ml.inspect(tmp_path / "x")
    assert (report.ok, report.format) == (True, format), str(report)
    assert report.modules[0].norm_delta == pytest.approx(2 * np.linalg.norm(b @ a), rel=0.02)


@pytest.mark.parametrize("format", sorted(WRITERS))
def test_every_format_that_is_written_is_looked_at(format, tmp_path):
    if format == "gguf":
        pytest.importorskip("gguf")
    adapter = ml.load(write_peft(tmp_path / "a"))
    ml.convert(adapter, tmp_path / "b", format=format, base_config=CONFIG)
    want, report = ml.inspect(tmp_path / "a"), ml.inspect(tmp_path / "b", base=CONFIG)
    assert (report.ok, report.format) == (True, format), str(report)
    norms = [sorted(m.norm_delta for m in r.modules) for r in (want, report)]
    assert norms[1] == pytest.approx(norms[0], rel=1e-6)
    assert not {m.path for m in report.modules} - {m.path for m in want.modules}
    if format not in ("peft", "safetensors"):
        with pytest.raises(UnrepairableError, match=f"format {format}"):
            ml.inspect(tmp_path / "b", fix=tmp_path / "c")


@pytest.mark.parametrize(
    "content", [b"", b"x", b"GGUF", b"{}", b"\x89HDF", b"version https://git-lfs x", b"\0" * 99]
)
def test_any_file_is_a_report(content, tmp_path):
    (tmp_path / "x.safetensors").write_bytes(content)
    report = ml.inspect(tmp_path / "x.safetensors")
    assert not report.ok
    assert report.findings[0].code == "damaged"


def test_special_files_and_empty_folders_are_reports(tmp_path):
    assert ml.inspect(tmp_path).codes == ("no_weights",)
    os.mkfifo(tmp_path / "fifo")
    assert "regular" in ml.inspect(tmp_path / "fifo").findings[0].message
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(OSError, match="loop"):
        ml.inspect(tmp_path / "loop")


def test_limits_are_findings(tmp_path):
    report = ml.inspect(write_peft(tmp_path / "a"), limits=ml.Limits(tensors=3))
    assert report.codes == ("damaged",)
    assert "tensors" in report.findings[0].message


@given(data=st.data())
def test_a_flipped_byte_never_is_an_exception(tmp_path_factory, data):
    folder = write_peft(tmp_path_factory.mktemp("flip") / "a", sound_tensors(paths(1)))
    name = data.draw(st.sampled_from(["adapter_model.safetensors", "adapter_config.json"]))
    content = bytearray((folder / name).read_bytes())
    at = data.draw(st.integers(0, len(content) - 1))
    content[at] ^= data.draw(st.integers(1, 255))
    (folder / name).write_bytes(content)
    report = ml.inspect(folder, base=CONFIG)
    json.loads(report.to_json())
    if report.ok:
        try:
            ml.load(folder)
        except MicroLoraError:
            assert {"variant", "unused", "unknown_setting"} & set(report.codes)


def test_the_picture_shows_layers(tmp_path):
    pytest.importorskip("matplotlib")
    from microlora.doctor.plot import grid

    tensors = times(0)
    tensors[A0.replace("s.0", "s.3")][0, 0] = np.nan
    report = ml.inspect(write_peft(tmp_path / "a", tensors))
    kinds, layers, values, bad = grid(report)
    assert kinds == ["model.layers.*.self_attn.q_proj", "model.layers.*.self_attn.v_proj"]
    assert layers == [0, 1, 2, 3, 4]
    assert values[0, 0] == 0
    assert bad[0, 3]
    assert bad.sum() == 1
    assert values[1, 4] == pytest.approx(report.modules[-1].norm_delta)
    for ending in ("png", "svg"):
        report.plot(tmp_path / f"map.{ending}")
        assert (tmp_path / f"map.{ending}").stat().st_size > 1000
    with pytest.raises(ConfigError, match="path"):
        report.plot(tmp_path / "map.txt")
    _truncated(tmp_path / "t")
    with pytest.raises(ConfigError, match="no modules"):
        ml.inspect(tmp_path / "t").plot(tmp_path / "x.png")
