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
from doctor_faults import A0, AGAINST, B0, BROKEN, CHECK, CONFIG, Q0, SHAPES, _truncated, times
from doctor_support import (
    RANK,
    WIDTH,
    paths,
    sound_config,
    sound_tensors,
    write_peft,
    write_tensors,
)
from microlora.exceptions import (
    ConfigError,
    FormatError,
    MicroLoraError,
    UnrepairableError,
)
from microlora.formats.conversion import WRITERS


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
    # As they are stored: B along a rank of 4 is no whole block in GGUF.
    stored = {"gguf": ("Q8_0/F16", 4 * 68 + 4 * 64), "safetensors": ("Q8_0", 4 * 68 + 4 * 34)}
    assert (report.modules[0].dtype, report.data_bytes) == stored[format]


def test_a_report_says_what_was_compared(tmp_path):
    write_peft(tmp_path / "a")
    weights = {f"{p}.weight": (WIDTH, WIDTH) for p in paths()}
    alone = ml.inspect(tmp_path / "a")
    assert (alone.compared, "compared" in str(alone)) == ("", False)
    told = ml.inspect(tmp_path / "a", base=weights)
    assert (told.findings, told.compared) == ((), "base: 10 of 10 names, 10 of 10 shapes")
    assert "compared with base: 10 of 10 names, 10 of 10 shapes" in str(told)
    assert json.loads(told.to_json())["compared"] == told.compared
    packed = {**weights, f"{paths()[0]}.weight": (WIDTH, WIDTH, 1)}
    assert ml.inspect(tmp_path / "a", base=packed).compared == "base: 10 of 10 names, 9 of 10 shapes"
    llama = {
        "model_type": "llama",
        "hidden_size": WIDTH,
        "num_hidden_layers": 5,
        "num_attention_heads": 4,
        "intermediate_size": 32,
    }
    told = ml.inspect(tmp_path / "a", base=llama)
    assert told.compared == "base: 10 of 10 names, 10 of 10 shapes, 5 layers"
    other = {"model_type": "strange", "hidden_size": WIDTH}
    assert "nothing, it does not tell" in ml.inspect(tmp_path / "a", base=other).compared
    assert ml.inspect(tmp_path / "a", base=other | {"num_hidden_layers": 5}).compared == "base: 5 layers"


@pytest.mark.parametrize("format", sorted(WRITERS))
def test_every_format_that_is_written_is_looked_at(format, tmp_path):
    if format == "gguf":
        pytest.importorskip("gguf")
    adapter = ml.load(write_peft(tmp_path / "a"))
    ml.convert(adapter, tmp_path / "b", format=format, base_config=CONFIG if format == "gguf" else None)
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
