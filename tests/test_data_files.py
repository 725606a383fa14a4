import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import microlora as ml
from microlora.data import AdapterDataset, DatasetWriter, TrainingSample, files, reader, verify
from microlora.exceptions import ConfigError, FormatError, LeakageError, ShapeError
from strategies import texts
from support import feedback_kinds, normal, read_tensors, rng, run_python

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
