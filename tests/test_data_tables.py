import sys

import numpy as np
import pytest
from hypothesis import given, settings

from microlora.data import AdapterDataset, TrainingSample, read_csv, read_jsonl, write_jsonl
from microlora.exceptions import ConfigError, FormatError, MissingExtraError
from test_data_files import datasets


@given(datasets())
@settings(max_examples=30)
def test_json_lines_come_back_bit_for_bit(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "x.jsonl"
    assert write_jsonl(data, path) == len(data)
    assert list(read_jsonl(path)) == list(data)
    assert list(AdapterDataset.from_jsonl(path)) == list(data)


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text("old")

    def some():
        yield TrainingSample([1.0], [1.0])
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        write_jsonl(some(), path)
    assert path.read_text() == "old"
    assert [f.name for f in tmp_path.iterdir()] == ["x.jsonl"]


def test_foreign_names_and_extra_columns(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text('{"prompt": "a", "completion": "b", "stars": 5}\n\n{"prompt": "c"}\n')
    got = AdapterDataset.from_jsonl(
        path, columns={"prompt": "query", "completion": "response"}, ignore_unknown=True
    )
    assert got.texts("query") == ["a", "c"]
    assert got.texts("response") == ["b", None]
    with pytest.raises(FormatError, match=r"line 1: unknown field 'stars'"):
        list(read_jsonl(path, columns={"prompt": "query", "completion": "response"}))
    with pytest.raises(ConfigError, match="columns"):
        list(read_jsonl(path, columns={"prompt": "question"}))
    with pytest.raises(FormatError, match="given twice"):
        list(read_jsonl(path, columns={"prompt": "query", "completion": "query"}))


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("[1]", "expected an object"),
        ("{", "JSON"),
        ('{"quality": NaN}', "JSON"),
        ('{"quality": 2}', "quality"),
        ('{"query": "a", "query": "b"}', "twice"),
        ('{"input_embedding": [1, "a"]}', "input_embedding"),
        ('{"input_embedding": [[1], [1, 2]]}', "input_embedding"),
        ('{"id": "n7", "input_embedding": [1e999]}', "'n7': input_embedding"),
        ('{"feedback": {"kind": "magic"}}', "kind"),
        ('{"feedback": {"kind": "reward", "r": 0.5}}', "response"),
        ('{"feedback": {"kind": "target", "x": [1]}}', "arguments of target"),
        ('{"feedback": {"kind": "target", "t": ["a"]}}', "feedback"),
        ('{"feedback": {"kind": "target"}}', "feedback"),
        ('{"feedback": [1]}', "feedback"),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, words):
    path = tmp_path / "x.jsonl"
    path.write_text('{"query": "fine"}\n' + line + "\n")
    with pytest.raises(FormatError, match=rf"x\.jsonl: line 2.*{words}"):
        AdapterDataset.from_jsonl(path)


def test_comma_separated_values(tmp_path):
    path = tmp_path / "x.csv"
    path.write_text(
        "\ufeffid,query,quality,input_0,input_1,label,latency_ms\n"
        'a,"one, two",0.5,1,2.5,3,\n'
        "\n"
        'b,"three\nfour",,0.1,-1e-3,0,12.5\n',
        encoding="utf-8",
    )
    assert list(read_csv(path)) == [
        TrainingSample([1, 2.5], label=3, query="one, two", quality=0.5, id="a"),
        TrainingSample([0.1, -1e-3], label=0, query="three\nfour", id="b", latency_ms=12.5),
    ]
    path.write_text("input_embedding;output_embedding\n[1, 2];0.5\n3 4;[6]\n")
    got = AdapterDataset.from_csv(path, delimiter=";")
    np.testing.assert_array_equal(got.arrays()[0], [[1, 2], [3, 4]])
    np.testing.assert_array_equal(got.arrays()[1], [[0.5], [6]])
    assert [s.label for s in AdapterDataset.from_csv(write(path, "x,y\n1,2\n"), columns=NAMES)] == [2]


NAMES = {"x": "input_embedding", "y": "label"}


def write(path, text):
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "line 1"),
        ("query,query\na,b\n", "twice"),
        ("query,label\na\n", "line 2: got 1 cells"),
        ("query,label\na,x\n", "line 2: label"),
        ("query,quality\na,2\n", "line 2: sample: quality"),
        ("query,colour\na,red\n", "colour"),
        ("input_0,input_2\n1,2\n", "none missing"),
        ("input_0,input_1\n1,x\n", "line 2: input_embedding"),
        ("input_embedding\n1 x\n", "line 2: input_embedding"),
        ('query\n"' + "a" * 200_000 + '"\n', "line 2"),
    ],
)
def test_a_bad_table_is_named(tmp_path, text, words):
    path = write(tmp_path / "x.csv", text)
    with pytest.raises(FormatError, match=rf"x\.csv: .*{words}"):
        AdapterDataset.from_csv(path)


def test_bytes_that_are_no_text(tmp_path):
    (tmp_path / "x.csv").write_bytes(b"query\n\xff\xfe\n")
    (tmp_path / "x.jsonl").write_bytes(b'{"query": "\xff"}\n')
    for read, name in ((read_csv, "x.csv"), (read_jsonl, "x.jsonl")):
        with pytest.raises(FormatError, match="line"):
            list(read(tmp_path / name))


def test_parquet_needs_its_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'microlora\[data\]'"):
        AdapterDataset.from_parquet(tmp_path / "x.parquet")


def test_parquet(tmp_path):
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    x = np.random.default_rng(0).standard_normal((50, 8)).astype(np.float32)
    path = tmp_path / "x.parquet"
    ids = [f"r{i}" for i in range(50)]
    for kind in (arrow.list_(arrow.float32()), arrow.list_(arrow.float32(), 8)):
        table = arrow.table(
            {
                "id": ids,
                "input_embedding": arrow.array(list(x), kind),
                "target": arrow.array([[1, 2]] * 50),
                "query": arrow.array(["q", None] * 25),
                "stars": arrow.array([5] * 50),
            }
        )
        parquet.write_table(table, path)
        got = AdapterDataset.from_parquet(
            path, columns={"target": "output_embedding"}, ignore_unknown=True, batch_rows=7
        )
        assert got.arrays()[0].tobytes() == x.tobytes()
        assert got.texts("query") == ["q", None] * 25
        assert got.texts("id") == ids
    with pytest.raises(FormatError, match=r"x\.parquet: row 1: unknown field 'target'"):
        AdapterDataset.from_parquet(path)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(FormatError, match=r"x\.parquet: not a Parquet file"):
        AdapterDataset.from_parquet(path)


def test_a_name_that_the_file_lacks_is_refused(tmp_path):
    lines, table = tmp_path / "x.jsonl", tmp_path / "x.csv"
    lines.write_text('{"query": "a"}\n{"query": "b", "answer": "c"}\n')
    table.write_text("query,answer\na,b\n")
    for read, path in ((read_jsonl, lines), (read_csv, table)):
        list(read(path, columns={"answer": "response"}))
        with pytest.raises(ConfigError, match=r"columns: got 'answr', expected a name in .*x\.(jsonl|csv)"):
            list(read(path, columns={"answr": "response"}, ignore_unknown=True))
