"""Damaged and hostile dataset files: each is refused with its name and the reason."""

import hashlib
import json
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from microlora.data import AdapterDataset, TrainingSample, files, tensors, verify
from microlora.exceptions import FormatError, MicroLoraError
from support import feedback_kinds, read_tensors, rng, write_tensors
from test_data_files import held_out


def damage(path, name, change):
    file = path / name
    file.write_bytes(change(file.read_bytes()))


def resum(path):
    """Makes lengths and checksums those of the files: a liar's own work."""
    index = json.loads((path / files.INDEX).read_text())
    for name in (files.DATA, files.SAMPLES):
        data = (path / name).read_bytes()
        index["files"][name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (path / files.INDEX).write_text(json.dumps(index))


def rewrite(change):
    """A change of the header and the tensors, with all offsets and sums made right again."""

    def apply(path):
        header, parts = read_tensors((path / files.DATA).read_bytes())
        change(header, parts)
        (path / files.DATA).write_bytes(write_tensors(header, parts))
        resum(path)

    return apply


def index(**changes):
    def apply(path):
        value = json.loads((path / files.INDEX).read_text())
        value.update(changes)
        (path / files.INDEX).write_text(json.dumps(value))

    return apply


def set_number(name, place, value, dtype="<f4"):
    def change(header, parts):
        np.frombuffer(parts[name], dtype)[place] = value

    return rewrite(change)


def header(change):
    """A change of the header's JSON alone."""

    def apply(path):
        data = (path / files.DATA).read_bytes()
        n = int.from_bytes(data[:8], "little")
        value = json.loads(data[8 : 8 + n])
        text = change(value)
        text = (json.dumps(value) if text is None else text).encode()
        (path / files.DATA).write_bytes(len(text).to_bytes(8, "little") + text + data[8 + n :])
        resum(path)

    return apply


def header_length(of_size):
    return lambda p: damage(p, files.DATA, lambda b: of_size(len(b)).to_bytes(8, "little") + b[8:])


def entry(name, **changes):
    return header(lambda value: value[name].update(changes))


def lines(change):
    def apply(path):
        damage(path, files.SAMPLES, change)
        resum(path)

    return apply


def replaced(pattern, by):
    """The first match made something of the same length."""
    return lambda data: re.sub(pattern, lambda match: by(len(match[0])), data, count=1)


LINE = r"samples\.jsonl: line 1"
BROKEN = {
    "cut data": (lambda p: damage(p, files.DATA, lambda b: b[:-1]), r"data\.safetensors.*cut off"),
    "cut to a header": (lambda p: damage(p, files.DATA, lambda b: b[:5]), r"data\.safetensors"),
    "cut texts": (lambda p: damage(p, files.SAMPLES, lambda b: b[:-3]), r"samples\.jsonl.*cut off"),
    "cut index": (lambda p: damage(p, files.INDEX, lambda b: b[:-9]), r"dataset\.json"),
    "no data": (lambda p: (p / files.DATA).unlink(), r"data\.safetensors.*missing"),
    "no texts": (lambda p: (p / files.SAMPLES).unlink(), r"samples\.jsonl.*missing"),
    "no index": (lambda p: (p / files.INDEX).unlink(), r"no dataset\.json"),
    "newer": (index(version=2), r"dataset\.json: version 2 is newer than 1"),
    "no version": (index(version=None), r"dataset\.json: version"),
    "another format": (index(format="other"), r"dataset\.json: format"),
    "more rows": (index(rows=41), r"data\.safetensors: tensor .*expected \(41"),
    "huge rows": (index(rows=2**61), r"data\.safetensors"),
    "negative rows": (index(rows=-1), r"dataset\.json: rows"),
    "text rows": (index(rows="40"), r"dataset\.json: rows"),
    "more held out": (index(validation_rows=0), r"data\.safetensors: held_out"),
    "other width": (index(in_features=7), r"tensor 'inputs'"),
    "no width": (index(in_features=None), r"tensor 'inputs' does not belong"),
    "list width": (index(in_features=[6]), r"tensor 'inputs'"),
    "other kind": (index(kind="labels"), r"no tensor 'labels'"),
    "unknown kind": (index(kind="magic"), r"dataset\.json: kind"),
    "bad optimum": (index(optimum={"sigma": 1}), r"dataset\.json: optimum"),
    "lost optimum": (index(optimum={"sigma": 1, "best_loss": 1, "zero_loss": 1}), "optimum_lora_a"),
    "bad files": (index(files={}), r"dataset\.json: files"),
    "bad sums": (index(files={files.DATA: 1, files.SAMPLES: 2}), r"dataset\.json: files"),
    "escape": (index(files={"../x": {}, files.SAMPLES: {}}), r"dataset\.json: files"),
    "bad metadata": (index(metadata=[1]), r"dataset\.json: metadata"),
    "index no object": (lambda p: (p / files.INDEX).write_text("[]"), r"dataset\.json"),
    "index deep": (lambda p: (p / files.INDEX).write_text("[" * 100_000), r"dataset\.json"),
    "header too long": (header_length(lambda size: 2**40), "header"),
    "header past end": (header_length(lambda size: size), "header"),
    "header no JSON": (header(lambda v: "{" * 64), "not valid JSON"),
    "header list": (header(lambda v: "[]"), "expected an object"),
    "header twice": (header(lambda v: '{"quality": 1, "quality": 2}'), "twice"),
    "metadata list": (header(lambda v: v.update(__metadata__=[])), "__metadata__"),
    "unknown tensor": (header(lambda v: v.update(evil=v.pop("weight"))), "'evil': unknown"),
    "missing tensor": (rewrite(lambda h, p: p.pop("weight")), "no tensor 'weight'"),
    "entry list": (header(lambda v: v.update(weight=[1])), "'weight'"),
    "wrong dtype": (entry("weight", dtype="F32"), "'weight': dtype"),
    "dtype list": (entry("weight", dtype=["F64"]), "'weight': dtype"),
    "shape text": (entry("weight", shape="40"), "'weight': shape"),
    "shape negative": (entry("weight", shape=[-40]), "'weight': shape"),
    "shape bool": (entry("weight", shape=[True]), "'weight': shape"),
    "shape overflows": (entry("inputs", shape=[2**61, 2**61]), "'inputs'"),
    "shape deep": (entry("inputs", shape=[1] * 64), "'inputs'"),
    "offsets past end": (entry("weight", data_offsets=[2**40, 2**40 + 320]), "'weight': data_offsets"),
    "offsets overlap": (entry("weight", data_offsets=[0, 320]), "begins at"),
    "offsets one": (entry("weight", data_offsets=[0]), "'weight'"),
    "text offsets": (set_number("text_offsets", 1, 10**9, "<i8"), r"text_offsets|line 1: lies"),
    "text offsets back": (set_number("text_offsets", 3, 0, "<i8"), r"text_offsets|line 3: lies"),
    "text start": (set_number("text_offsets", 0, 1, "<i8"), "text_offsets"),
    "texts no JSON": (lines(lambda b: b.replace(b'{"id"', b'["id"', 1)), LINE),
    "texts number": (lines(replaced(rb':"q [^"]*"', lambda size: b":%*d" % (size - 1, 1))), LINE),
    "texts unknown": (lines(lambda b: b.replace(b'"query"', b'"qverv"', 1)), LINE),
    "texts no id": (lines(replaced(rb'"id":"[^"]*",', lambda size: b" " * size)), LINE),
}  # fmt: skip
READ_ONLY = {
    "a bit of data": (lambda p: damage(p, files.DATA, lambda b: b[:-1] + bytes([b[-1] ^ 1])), "SHA-256"),
    "a bit of texts": (lambda p: damage(p, files.SAMPLES, lambda b: b.replace(b"q ", b"r ", 1)), "SHA-256"),
    "not a number": (set_number("inputs", 9, np.nan), r"tensor 'inputs': NaN or infinity in row 1"),
}


def load_all(path, mmap):
    got = AdapterDataset.load(path, mmap=mmap)
    return list(got), got.validation and list(got.validation)


@pytest.mark.parametrize("mmap", [False, True])
@pytest.mark.parametrize("name", BROKEN)
def test_a_damaged_dataset_is_refused_by_name(tmp_path, name, mmap):
    change, words = BROKEN[name]
    held_out().save(tmp_path / "d")
    change(tmp_path / "d")
    with pytest.raises(FormatError, match=words) as caught:
        load_all(tmp_path / "d", mmap)
    assert str(tmp_path / "d") in str(caught.value)


@pytest.mark.parametrize("name", READ_ONLY)
def test_what_only_a_full_reading_sees(tmp_path, name):
    change, words = READ_ONLY[name]
    held_out().save(tmp_path / "d")
    change(tmp_path / "d")
    with pytest.raises(FormatError, match=words):
        AdapterDataset.load(tmp_path / "d")
    if "SHA" in words:
        with pytest.raises(FormatError, match="SHA-256"):
            verify(tmp_path / "d")
    else:  # the row is refused when it is used
        with pytest.raises(MicroLoraError, match=r"NaN|nan"):
            load_all(tmp_path / "d", True)


@pytest.mark.parametrize("name", ["kinds", "offsets"])
def test_feedback_that_lies(tmp_path, name):
    samples = [TrainingSample([1.0], feedback=f) for f in feedback_kinds(rng(), 3).values()]
    AdapterDataset(samples).save(tmp_path / "d")
    change = {
        "kinds": set_number("feedback_kinds", 0, 6, "|u1"),
        "offsets": set_number("feedback_offsets", 1, 5, "<i8"),
    }[name]
    change(tmp_path / "d")
    for mmap in (False, True):
        with pytest.raises(FormatError, match="feedback_" + name):
            AdapterDataset.load(tmp_path / "d", mmap=mmap)


@given(st.binary(max_size=200), st.booleans())
def test_any_bytes_for_a_header_are_refused_or_read(tmp_path_factory, data, framed):
    path = tmp_path_factory.getbasetemp() / "fuzz.safetensors"
    path.write_bytes(len(data).to_bytes(8, "little") + data if framed else data)
    for mmap in (False, True):
        try:
            got = tensors.read_tensors(path, files.TENSORS, mmap=mmap)
        except FormatError:
            continue
        assert got == {}


@given(st.integers(0, 10_000), st.integers(0, 255))
@settings(max_examples=150)
def test_one_changed_byte_never_gets_past(tmp_path_factory, place, value):
    path = tmp_path_factory.getbasetemp() / "one"
    if not path.exists():
        held_out().save(path)
    whole = {name: (path / name).read_bytes() for name in (files.DATA, files.SAMPLES)}
    name = files.DATA if place % 2 else files.SAMPLES
    at = place % len(whole[name])
    if whole[name][at] == value:
        return
    (path / name).write_bytes(whole[name][:at] + bytes([value]) + whole[name][at + 1 :])
    try:
        with pytest.raises(FormatError):
            AdapterDataset.load(path)
    finally:
        (path / name).write_bytes(whole[name])
