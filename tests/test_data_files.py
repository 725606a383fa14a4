import hashlib
import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import microlora as ml
from microlora.data import AdapterDataset, DatasetWriter, TrainingSample, files, reader, tensors, verify
from microlora.exceptions import ConfigError, FormatError, LeakageError, MicroLoraError, ShapeError
from strategies import texts
from support import feedback_kinds, normal, read_tensors, rng, run_python, write_tensors

finite = st.floats(-(2.0**100), 2.0**100, width=32)


@st.composite
def datasets(draw):
    n, width = draw(st.integers(0, 8)), draw(st.integers(1, 5))
    kind = draw(st.sampled_from(["targets", "labels", "feedback", "none", "texts"]))
    x = draw(hnp.arrays(np.float32, (n, width), elements=finite))
    samples = []
    for i in range(n):
        fields = {
            "quality": draw(st.floats(0, 1)),
            "weight": draw(st.floats(1e-30, 1e30)),
            "latency_ms": draw(st.none() | st.floats(0, 1e300)),
            "timestamp": draw(st.none() | st.floats(-1e300, 1e300)),
            "token_count": draw(st.none() | st.integers(0, 2**62)),
            "query": draw(texts) if kind == "texts" else draw(st.none() | texts),
            "response": draw(st.none() | texts),
            "domain": draw(texts),
            "session_id": draw(texts),
            "module": draw(st.none() | st.just("q_proj")),
            "id": f"{i}-" + draw(texts),
        }
        if kind != "texts":
            fields["input_embedding"] = x[i]
        if kind == "targets":
            fields["output_embedding"] = draw(hnp.arrays(np.float32, 2, elements=finite))
        elif kind == "labels":
            fields["label"] = draw(st.integers(0, 2**31 - 1))
        elif kind == "feedback":
            kinds = feedback_kinds(rng(draw(st.integers(0, 99))), 3)
            fields["feedback"] = kinds[draw(st.sampled_from(sorted(kinds)))]
        samples.append(TrainingSample(**fields))
    metadata = draw(st.dictionaries(texts, st.integers() | texts | st.lists(st.booleans()), max_size=3))
    return AdapterDataset(samples, metadata=metadata)


@given(datasets(), st.data())
@settings(max_examples=30)
def test_what_is_saved_is_loaded_bit_for_bit(tmp_path_factory, data, draw):
    path = tmp_path_factory.mktemp("d") / "set"
    rows = draw.draw(st.permutations(range(len(data))))
    for value in (data, data.subset(rows)):
        value.save(path)
        for mmap in (False, True):
            got = AdapterDataset.load(path, mmap=mmap)
            assert got == value
            for name in ("inputs", "targets"):
                array = getattr(got.columns, name)
                want = getattr(value.columns, name)
                if array is not None:
                    assert array.tobytes() == want[value.rows].tobytes()  # -0.0 too
        verify(path)
    shutil.rmtree(path.parent)


def held_out(n=40):
    r = rng(3)
    data = AdapterDataset.from_arrays(
        normal(r, n, 6), normal(r, n, 2), queries=[f"q é {i}" for i in range(n)]
    )
    return data.split(0.3, seed=1)


def test_the_held_out_part_and_the_optimum_travel(tmp_path):
    data = ml.SyntheticDataGenerator(16).generate("coder", 50)
    data.save(tmp_path / "d")
    for mmap in (False, True):
        got = AdapterDataset.load(tmp_path / "d", mmap=mmap)
        assert got == data
        assert got.validation == data.validation
        assert got.optimum == data.optimum
        assert got.metadata == data.metadata
    held_out().save(tmp_path / "d")
    assert AdapterDataset.load(tmp_path / "d") == held_out()
    assert sorted(os.listdir(tmp_path / "d")) == ["data.safetensors", "dataset.json", "samples.jsonl"]
    assert os.listdir(tmp_path) == ["d"]


def test_the_same_dataset_gives_the_same_bytes(tmp_path):
    for name in ("a", "b"):
        held_out().save(tmp_path / name)
    for file in os.listdir(tmp_path / "a"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_a_mapped_dataset_is_not_read(tmp_path):
    held_out().save(tmp_path / "d")
    got = AdapterDataset.load(tmp_path / "d", mmap=True)
    assert isinstance(got.columns.inputs, np.memmap)
    assert isinstance(got.validation.columns.targets, np.memmap)
    assert isinstance(got.columns.texts, reader.LineTexts)
    whole = AdapterDataset.of(got.columns)
    assert isinstance(whole.arrays()[0], np.memmap)
    assert not whole.arrays()[0].flags.writeable
    x, y, _ = next(got.batches(4))
    assert (
        type(x) is type(y) is not np.memmap or x.base is None or not np.shares_memory(x, got.columns.inputs)
    )
    np.testing.assert_array_equal(x, held_out().arrays()[0][:4])


def test_a_mapped_dataset_larger_than_the_memory_allowed(tmp_path):
    """256 MiB of inputs, written and read in a process that may hold 200 MiB of data."""
    code = """
import resource, sys
import numpy as np
from microlora.data import AdapterDataset, DatasetWriter
resource.setrlimit(resource.RLIMIT_DATA, (200 << 20,) * 2)
with DatasetWriter(sys.argv[1]) as writer:
    for part in range(16):
        x = np.full((512, 8192), part, np.float32)
        ids = [f"{part}-{i}" for i in range(512)]
        writer.append(AdapterDataset.from_arrays(x, np.arange(512), ids=ids, copy=False))
data = AdapterDataset.load(sys.argv[1], mmap=True)
assert len(data) == 8192 and data.columns.inputs.nbytes == 256 << 20
seen = [x[0, 0] for x, y, w in data.batches(512)]
assert seen == list(range(16)), seen
assert data[8000].id == "15-320" and len(data.shuffle(1)) == 8192
try:
    AdapterDataset.load(sys.argv[1])
except MemoryError:
    print("too large to hold")
"""
    assert "too large to hold" in run_python(code, tmp_path / "big", env={"OPENBLAS_NUM_THREADS": "1"})


def test_a_writer_appends_batches_and_keeps_one_sort(tmp_path):
    path = tmp_path / "w"
    kinds = ["mse", "contrastive", "reward", "preference"] * 3
    samples = [
        TrainingSample([1.0, i], feedback=feedback_kinds(rng(i), 3)[k], id=f"s{i}", session_id="s" * (i % 2))
        for i, k in enumerate(kinds)
    ]
    with DatasetWriter(path, metadata={"k": 1}) as writer:
        assert writer.append(samples[:5]) == 5
        assert writer.append(iter(samples[5:7]), validation=True) == 2
        assert writer.append([]) == 0
        assert writer.append(AdapterDataset(samples[7:])) == 5
        assert writer.rows == 12
        with pytest.raises(ShapeError, match="in_features"):
            writer.append([TrainingSample([1.0], feedback=ml.Target([1.0, 2.0, 3.0]))])
        with pytest.raises(ConfigError, match="labels"):
            writer.append([TrainingSample([1.0, 2.0], label=1)])
    want = AdapterDataset(samples[:5] + samples[7:], validation=samples[5:7], metadata={"k": 1})
    for mmap in (False, True):
        assert AdapterDataset.load(path, mmap=mmap) == want
    with pytest.raises(ConfigError, match="closed"):
        writer.append(samples)


@pytest.mark.parametrize(
    ("rows", "error", "words"),
    [
        ([("a", "x", False), ("a", "y", False)], ConfigError, "'a' appears twice"),
        ([("a", "x", False), ("a", "y", True)], ConfigError, "'a' appears twice"),
        ([("a", "x", False), ("b", "X ", True)], LeakageError, "'a' is the same text as held-out sample 'b'"),
    ],
)
def test_a_writer_refuses_what_a_dataset_would(tmp_path, rows, error, words):
    held_out().save(tmp_path / "d")
    writer = DatasetWriter(tmp_path / "d")
    for name, query, held in rows:
        writer.append([TrainingSample(query=query, label=1, id=name)], validation=held)
    with pytest.raises(error, match=words):
        writer.close()
    assert AdapterDataset.load(tmp_path / "d") == held_out()
    assert os.listdir(tmp_path) == ["d"]


def test_a_variation_of_a_held_out_sample_is_refused_by_the_writer(tmp_path):
    writer = DatasetWriter(tmp_path / "d")
    writer.append([TrainingSample([1.0], label=1, id="v", parent_id="p")])
    writer.append([TrainingSample([2.0], label=1, id="p")], validation=True)
    with pytest.raises(LeakageError, match=r"'v'.*'p'"):
        writer.close()
    assert os.listdir(tmp_path) == []


# -- crashes and full disks --


class Full:
    """Every file of this process fills up after so many bytes."""

    def __init__(self, monkeypatch, room):
        self.room = room
        real = Path.open

        def opened(path, mode="r", *args, **kwargs):
            file = real(path, mode, *args, **kwargs)
            return file if "x" not in mode else Leaky(file, self)

        monkeypatch.setattr(Path, "open", opened)


class Leaky:
    def __init__(self, file, disk):
        self._file, self._disk = file, disk

    def write(self, data):
        self._disk.room -= len(data)
        if self._disk.room < 0:
            raise OSError(28, "No space left on device")
        return self._file.write(data)

    def __getattr__(self, name):
        return getattr(self._file, name)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._file.close()


@pytest.mark.parametrize("room", [0, 200, 2000, 4000, 5000, 5600])
def test_a_disk_that_fills_leaves_the_old_dataset(tmp_path, monkeypatch, room):
    held_out().save(tmp_path / "d")
    with monkeypatch.context() as patch:
        Full(patch, room)
        other = held_out().with_metadata({"x": "y" * 900})
        with pytest.raises(OSError, match="No space"):
            other.save(tmp_path / "d")
    assert AdapterDataset.load(tmp_path / "d") == held_out()
    assert os.listdir(tmp_path) == ["d"]
    verify(tmp_path / "d")


@pytest.mark.parametrize("step", [0, 1])
def test_a_rename_that_fails_leaves_the_old_dataset(tmp_path, monkeypatch, step):
    held_out().save(tmp_path / "d")
    calls = []
    real = os.rename

    def rename(a, b):
        calls.append(a)
        if len(calls) == step + 1:
            raise OSError(5, "Input/output error")
        real(a, b)

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", rename)
        with pytest.raises(OSError, match="Input/output"):
            AdapterDataset([TrainingSample([1.0], [1.0])]).save(tmp_path / "d")
    assert AdapterDataset.load(tmp_path / "d") == held_out()
    assert os.listdir(tmp_path) == ["d"]


KILLED = """
import os, sys
from microlora.data import AdapterDataset, TrainingSample
step, real, calls = int(sys.argv[2]), os.rename, []
def rename(a, b):
    calls.append(a)
    if len(calls) > step:
        os._exit(0)
    real(a, b)
os.rename = rename
AdapterDataset([TrainingSample([1.0], [1.0], id="new")]).save(sys.argv[1])
os._exit(1 if step < 2 else 0)
"""


@pytest.mark.parametrize("step", [0, 1])
def test_killed_between_renames_one_dataset_is_whole(tmp_path, step):
    held_out().save(tmp_path / "d")
    run_python(KILLED, tmp_path / "d", step)
    assert AdapterDataset.load(tmp_path / "d") == held_out()
    AdapterDataset([TrainingSample([1.0], [1.0], id="later")]).save(tmp_path / "d")
    assert AdapterDataset.load(tmp_path / "d")[0].id == "later"


def test_an_error_in_the_block_leaves_nothing(tmp_path):
    with pytest.raises(RuntimeError, match="mine"), DatasetWriter(tmp_path / "d") as writer:  # noqa: PT012
        writer.append([TrainingSample([1.0], [1.0])])
        raise RuntimeError("mine")
    assert os.listdir(tmp_path) == []


def test_only_datasets_are_replaced(tmp_path):
    (tmp_path / "file").write_text("x")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "notes.txt").write_text("x")
    (tmp_path / "link").symlink_to(tmp_path / "folder")
    (tmp_path / "empty").mkdir()
    for name in ("file", "folder", "link"):
        with pytest.raises(ConfigError, match=name):
            held_out().save(tmp_path / name)
    assert (tmp_path / "folder" / "notes.txt").read_text() == "x"
    held_out().save(tmp_path / "empty")
    with pytest.raises(FileNotFoundError):
        held_out().save(tmp_path / "no" / "such")
    with pytest.raises(FileNotFoundError):
        AdapterDataset.load(tmp_path / "none")
    with pytest.raises(FormatError, match=r"dataset\.json"):
        AdapterDataset.load(tmp_path / "folder")


# -- damaged files --


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


def test_files_are_safetensors(tmp_path):
    held_out().save(tmp_path / "d")
    head, parts = read_tensors((tmp_path / "d" / files.DATA).read_bytes())
    assert set(parts) <= set(files.TENSORS)
    for name, item in head.items():
        assert item["data_offsets"][0] % np.dtype(files.TENSORS[name]).itemsize == 0


@pytest.mark.oracle
def test_the_safetensors_library_reads_it(tmp_path):
    from safetensors.numpy import load_file

    data = held_out()
    data.save(tmp_path / "d")
    got = load_file(tmp_path / "d" / files.DATA)
    rows = np.concatenate([data.rows, data.validation.rows])
    np.testing.assert_array_equal(got["inputs"], data.columns.inputs[rows])


def test_a_mapped_load_reads_no_data(tmp_path, monkeypatch):
    held_out().save(tmp_path / "d")
    monkeypatch.setattr(np, "fromfile", lambda *a, **k: pytest.fail("read a whole file"))
    monkeypatch.setattr(reader.LineTexts, "row", lambda *a: pytest.fail("parsed a line"))
    got = AdapterDataset.load(tmp_path / "d", mmap=True)
    assert len(got.columns) == 40
