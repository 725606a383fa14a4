"""Samples from and to files that people have: JSON lines, CSV and Parquet.

A row is a sample, a column a field of `TrainingSample` by its name. Embeddings are lists of numbers; in CSV
they are such a list in one cell (``[0.5, 1]`` or ``0.5 1``), or columns ``input_0, input_1, ...`` and
``output_0, output_1, ...``. ``feedback`` is an object: ``{"kind": "target", "t": [...]}``,
``{"kind": "reward", "r": 0.5, "response": [...]}`` and so on, with the arguments of the feedback's class.
"""

from __future__ import annotations

import csv
import dataclasses
import importlib
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from microlora._checks import choice, near, read_json
from microlora._core import Contrastive, FeedbackBase, Gradient, Preference, Reward, Target
from microlora.data.sample import TrainingSample
from microlora.exceptions import ConfigError, FormatError, MicroLoraError

__all__ = ["read_csv", "read_jsonl", "read_parquet", "write_jsonl"]

PathLike = str | os.PathLike[str]

FIELDS = tuple(item.name for item in dataclasses.fields(TrainingSample))
_VECTORS = {"input_embedding": "input_", "output_embedding": "output_"}
_REALS = ("quality", "weight", "latency_ms", "timestamp")
_WHOLE = ("token_count", "label")
_TEXT = tuple(f for f in FIELDS if f not in (*_VECTORS, *_REALS, *_WHOLE, "feedback"))
_LINE = 64 << 20

# Arguments of each kind in files, by the name of the kind.
_FEEDBACK: Mapping[str, tuple[Callable[..., FeedbackBase], tuple[str, ...]]] = {
    "target": (Target, ("t", "loss")),
    "gradient": (Gradient, ("g",)),
    "reward": (Reward, ("r", "response")),
    "preference": (Preference, ("chosen", "rejected", "p", "beta")),
    "contrastive": (Contrastive, ("positive", "negatives", "tau")),
}


def read_jsonl(
    path: PathLike, *, columns: Mapping[str, str] | None = None, ignore_unknown: bool = False
) -> Iterator[TrainingSample]:
    """Samples of a file of JSON lines, one at a time; empty lines are passed over.

    Args:
        path: UTF-8 text, an object a line.
        columns: The field of each name in the file that is not a field's own, as ``{"prompt": "query"}``.
        ignore_unknown: Pass over names that are no field instead of refusing them.

    Raises:
        FormatError: a line that is no sample; names the file, the line and the reason.
        ConfigError: ``columns`` names a field that is none, or a name that is not in the file.
        OSError: the file cannot be read.
    """
    rename, seen = _renaming(columns), set[str]()
    with open(path, "rb") as file:
        number = 0
        while line := file.readline(_LINE + 1):
            number += 1
            at = f"{os.fspath(path)}: line {number}"
            if len(line) > _LINE:
                raise FormatError(f"{at}: longer than {_LINE} bytes")
            if line.strip():
                given = read_json(at, line)
                if len(seen) < len(rename):
                    seen.update(rename.keys() & given.keys())
                yield _sample(at, given, rename, ignore_unknown)
        if number:
            _refuse_unseen(os.fspath(path), rename, seen)


def read_csv(
    path: PathLike,
    *,
    columns: Mapping[str, str] | None = None,
    ignore_unknown: bool = False,
    delimiter: str = ",",
) -> Iterator[TrainingSample]:
    """Samples of comma-separated values with a header line, one at a time; an empty cell is a default.

    Args:
        path: UTF-8 text; a byte order mark is passed over.
        columns: As of `read_jsonl`.
        ignore_unknown: As of `read_jsonl`.
        delimiter: What stands between cells.

    Raises:
        FormatError: a line that is no sample; names the file, the line and the reason.
        ConfigError: ``columns`` names a field that is none, or a name that is not in the file.
        OSError: the file cannot be read.
    """
    rename, name = _renaming(columns), os.fspath(path)
    with open(path, encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, delimiter=delimiter)
        try:
            header = next(reader, None)
            if not header:
                raise FormatError(f"{name}: line 1: expected the names of the columns")
            if len(set(header)) != len(header):
                raise FormatError(f"{name}: line 1: a column name appears twice")
            _refuse_unseen(name, rename, header)
            spread = _spread(name, header)
            for cells in reader:
                at = f"{name}: line {reader.line_num}"
                if not cells:
                    continue
                if len(cells) != len(header):
                    raise FormatError(f"{at}: got {len(cells)} cells, expected {len(header)}")
                row: dict[str, Any] = dict(zip(header, cells, strict=True))
                vectors = {
                    f: [row.pop(c) for c in names] for f, names in spread.items() if f not in row and names
                }
                given = {rename.get(k, k): _cell(at, rename.get(k, k), v) for k, v in row.items() if v != ""}
                given |= {f: _numbers(at, f, cells) for f, cells in vectors.items() if any(cells)}
                yield _sample(at, given, {}, ignore_unknown)
        except (csv.Error, UnicodeDecodeError) as err:
            raise FormatError(f"{name}: line {max(1, reader.line_num)}: {err}") from None


def read_parquet(
    path: PathLike,
    *,
    columns: Mapping[str, str] | None = None,
    ignore_unknown: bool = False,
    batch_rows: int = 1024,
) -> Iterator[TrainingSample]:
    """Samples of a Parquet file, ``batch_rows`` at a time; needs the extra ``data``.

    Args:
        path: The file.
        columns: As of `read_jsonl`.
        ignore_unknown: As of `read_jsonl`.
        batch_rows: Rows decoded together.

    Raises:
        MissingExtraError: pyarrow is not installed.
        FormatError: no Parquet file, or a row that is no sample; names the file, the row and the reason.
        ConfigError: ``columns`` names a field that is none, or a name that is not in the file.
        OSError: the file cannot be read.
    """
    from microlora.cli.extras import require

    require("pyarrow.parquet", "data", "reading Parquet")
    arrow, parquet = (importlib.import_module(name) for name in ("pyarrow", "pyarrow.parquet"))
    rename, name = _renaming(columns), os.fspath(path)
    with open(path, "rb") as source:
        try:
            number = 0
            table = parquet.ParquetFile(source)
            _refuse_unseen(name, rename, table.schema_arrow.names)
            for batch in table.iter_batches(batch_size=batch_rows):
                fields = {key: _arrow_column(batch.column(key)) for key in batch.schema.names}
                for row in range(batch.num_rows):
                    number += 1
                    given = {key: values[row] for key, values in fields.items() if values[row] is not None}
                    yield _sample(f"{name}: row {number}", given, rename, ignore_unknown)
        except arrow.lib.ArrowException as err:
            raise FormatError(f"{name}: not a Parquet file that can be read: {err}") from None


def write_jsonl(samples: Iterable[TrainingSample], path: PathLike) -> int:
    """Write samples as JSON lines that `read_jsonl` gives back bit for bit; a half file is never left.

    Returns:
        How many there were.

    Raises:
        OSError: the system refused; an older file is left whole.
    """
    place = Path(path)
    temporary = place.with_name(f".{place.name}.{os.getpid()}.tmp")
    count = 0
    try:
        with temporary.open("x", encoding="utf-8") as file:
            for sample in samples:
                file.write(json.dumps(_plain(sample), ensure_ascii=False, allow_nan=False) + "\n")
                count += 1
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, place)
    finally:
        temporary.unlink(missing_ok=True)
    return count


def _renaming(columns: Mapping[str, str] | None) -> Mapping[str, str]:
    for field in (columns or {}).values():
        choice("columns", field, FIELDS)
    return columns or {}


def _refuse_unseen(name: str, rename: Mapping[str, str], seen: Iterable[str]) -> None:
    """A name that is nowhere in the file is a slip of the pen."""
    found = set(seen)
    for key in rename:
        if key not in found:
            known = f" (columns: {', '.join(map(repr, sorted(found)))})" if found else ""
            raise ConfigError(f"columns: got {key!r}, expected a name in {name}{near(key, found)}{known}")


def _sample(
    at: str, given: Mapping[str, Any], rename: Mapping[str, str], ignore_unknown: bool
) -> TrainingSample:
    values: dict[str, Any] = {}
    for key, value in given.items():
        field = rename.get(key, key)
        if field not in FIELDS:
            if ignore_unknown:
                continue
            raise FormatError(f"{at}: unknown field {key!r:.80}; known: {', '.join(FIELDS)}")
        if field in values:
            raise FormatError(f"{at}: field {field!r} is given twice")
        if value is not None:
            values[field] = value
    try:
        if isinstance(values.get("feedback"), Mapping):
            values["feedback"] = _feedback(values["feedback"])
        return TrainingSample(**values)
    except MicroLoraError as err:
        raise FormatError(f"{at}: {err}") from None


def _feedback(given: Mapping[str, Any]) -> FeedbackBase:
    kind = choice("feedback: kind", given.get("kind"), tuple(_FEEDBACK))
    make, names = _FEEDBACK[kind]
    rest = {key: value for key, value in given.items() if key != "kind"}
    for key in rest:
        choice(f"feedback: arguments of {kind}", key, names)
    try:
        return make(
            **{
                key: np.asarray(value, np.float32) if isinstance(value, list) else value
                for key, value in rest.items()
            }
        )
    except (TypeError, ValueError) as err:
        raise ConfigError(f"feedback: {err}") from None


def _plain(sample: TrainingSample) -> dict[str, Any]:
    """The fields of a sample that differ from their default, as JSON can hold them."""
    out: dict[str, Any] = {}
    for item in dataclasses.fields(sample):
        value = getattr(sample, item.name)
        if isinstance(value, np.ndarray):
            out[item.name] = value.tolist()
        elif isinstance(value, FeedbackBase):
            kind = next(name for name, (cls, _) in _FEEDBACK.items() if type(value) is cls)
            parts = {name: getattr(value, name) for name in _FEEDBACK[kind][1]}
            out[item.name] = {"kind": kind} | {
                k: v.tolist() if isinstance(v, np.ndarray) else v for k, v in parts.items()
            }
        elif value != item.default:
            out[item.name] = value
    return out


def _spread(name: str, header: list[str]) -> dict[str, list[str]]:
    """Columns ``input_0, input_1 ...`` of each embedding, in order of their numbers, none missing."""
    out = {}
    for field, prefix in _VECTORS.items():
        found = {int(c[len(prefix) :]): c for c in header if re.fullmatch(prefix + "[0-9]{1,6}", c)}
        if sorted(found) != list(range(len(found))):
            raise FormatError(f"{name}: line 1: columns {prefix}*: expected {prefix}0 and on, none missing")
        out[field] = [found[i] for i in range(len(found))]
    return out


def _cell(at: str, field: str, value: str) -> Any:
    """A cell as its field wants it; what is wrong with it the sample says."""
    if field in _VECTORS:
        inner = value.strip().removeprefix("[").removesuffix("]")
        return _numbers(at, field, [part for part in re.split(r"[\s,;]+", inner) if part])
    if field in _REALS or field in _WHOLE:
        try:
            return float(value) if field in _REALS else int(value)
        except ValueError:
            raise FormatError(f"{at}: {field}: got {value!r:.80}, expected a number") from None
    if field == "feedback":
        return read_json(f"{at}: feedback", value)
    return value


def _numbers(at: str, field: str, cells: list[str]) -> list[float]:
    try:
        return [float(cell) for cell in cells]
    except ValueError:
        raise FormatError(f"{at}: {field}: got {cells!r:.80}, expected numbers") from None


def _arrow_column(column: Any) -> list[Any]:
    """A column as Python values; lists of numbers without nulls become rows of one array each."""
    arrow = importlib.import_module("pyarrow")
    kind = column.type
    types = arrow.types
    lists = types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind)
    if not lists or column.null_count or not types.is_floating(kind.value_type):
        values: list[Any] = column.to_pylist()
        return values
    flat = column.flatten()
    if flat.null_count:
        return list(column.to_pylist())
    ends = np.cumsum(column.value_lengths().to_numpy(zero_copy_only=False))
    return np.split(flat.to_numpy(zero_copy_only=False), ends[:-1])
