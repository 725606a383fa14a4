"""What the doctor repairs: the fault is gone, nothing else has changed, and what it did is said."""

from __future__ import annotations

import json

import numpy as np
import pytest

import microlora as ml
from doctor_faults import (
    A0,
    B0,
    BROKEN,
    CHECK,
    Q0,
    SHAPES,
    _truncated,
    bfloats,
    poisoned,
    put,
    rank_two_somewhere,
)
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
)
from microlora.doctor import CHECKS
from microlora.exceptions import (
    ConfigError,
    DestinationExistsError,
    UnrepairableError,
)

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


@pytest.mark.parametrize("kind", ["peft", "safetensors"])
def test_a_copy_of_what_needs_no_repair_says_so(kind, tmp_path):
    ending = ".safetensors" if kind == "safetensors" else ""
    ml.convert(write_peft(tmp_path / "sound"), tmp_path / f"a{ending}", format=kind)
    report = ml.inspect(tmp_path / f"a{ending}", fix=tmp_path / f"b{ending}")
    assert (report.repairs, report.fixed) == ((), str(tmp_path / f"b{ending}"))
    assert str(report).endswith(
        f"nothing was to be repaired: {report.fixed} is a copy of the tensors and settings"
    )
    assert "repaired copy" not in str(report)
    assert ml.fingerprint(report.fixed) == ml.fingerprint(report.path)


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
