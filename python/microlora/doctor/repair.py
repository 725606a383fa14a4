"""A copy with its faults taken out, described line by line; the original is never touched."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

import microlora._core as _core
from microlora._checks import write_json
from microlora.doctor.facts import CONFIG, WEIGHTS, Facts, Tensor
from microlora.doctor.names import Key
from microlora.exceptions import UnrepairableError

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["Draft", "Item"]

#: Header entries that speak of weights as they were.
STALE = ("weights_sha256", "microlora.weights_sha256")
NUMPY = {"F64": "<f8", "F32": "<f4", "F16": "<f2"}


@dataclass
class Item:
    """One tensor of the copy."""

    tensor: Tensor
    key: Key
    dtype: str
    data: bytes | None = None  # None: as it is in the file

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape, which no repair changes."""
        return self.tensor.shape


@dataclass
class Draft:
    """The copy while it is being made."""

    facts: Facts
    items: list[Item]
    config: dict[str, Any] | None
    done: list[str] = field(default_factory=list)
    renamed: bool = False

    @classmethod
    def of(cls, facts: Facts) -> Draft:
        """A copy of all tensors and settings.

        Raises:
            UnrepairableError: Not a file whose copy could be written.
        """
        if facts.scan is None or facts.damage is not None or facts.kind not in ("peft", "single"):
            what = facts.damage or f"a file of format {facts.format}"
            raise UnrepairableError(
                f"{facts.path}: fix: {what}; repairs are made of PEFT's and our own files"
            )
        items = [Item(t, t.key, t.dtype) for t in facts.tensors]
        return cls(facts, items, None if facts.config is None else dict(facts.config))

    def say(self, line: str) -> None:
        """Notes what was done."""
        self.done.append(line)

    def drop(self, names: Iterable[str]) -> None:
        """Leaves tensors out."""
        gone = set(names)
        self.items = [i for i in self.items if i.tensor.name not in gone]

    def rename(self, item: Item, **changes: Any) -> None:
        """Changes parts of a tensor's key."""
        item.key = replace(item.key, **changes)
        self.renamed = True

    def name(self, item: Item) -> str:
        """The key that a tensor is written under."""
        return item.key.written() if self.renamed and self.facts.kind == "peft" else item.tensor.name

    def bytes_of(self, item: Item) -> bytes:
        """A tensor's content as it stands."""
        if item.data is not None:
            return item.data
        assert self.facts.scan is not None
        return self.facts.scan.data(item.tensor.at)

    def numbers(self, item: Item) -> NDArray[Any]:
        """A tensor's content as numbers, to be changed; bfloat16 as float32."""
        data = self.bytes_of(item)
        if item.dtype == "BF16":
            return (np.frombuffer(data, "<u2").astype("<u4") << 16).view("<f4")
        return np.frombuffer(data, NUMPY[item.dtype]).copy()

    def put(self, item: Item, values: NDArray[Any], dtype: str) -> None:
        """Replaces a tensor's content. What goes to bfloat16 came from it, or holds no other numbers."""
        if dtype == "BF16":
            item.data = (values.astype("<f4").view("<u4") >> 16).astype("<u2").tobytes()
        else:
            item.data = values.astype(NUMPY[dtype]).tobytes()
        item.dtype = dtype

    def write(self, target: Path) -> None:
        """Writes the copy beside its place; the caller renames it."""
        names = [self.name(i) for i in self.items]
        if len(set(names)) != len(names):
            twice = next(n for n in names if names.count(n) > 1)
            raise UnrepairableError(f"{self.facts.path}: fix: two tensors would be named {twice}")
        rows = [
            (name, i.dtype, list(i.shape), self.bytes_of(i))
            for name, i in zip(names, self.items, strict=True)
        ]
        header = {k: v for k, v in self.facts.header.items() if k not in STALE}
        if self.facts.kind == "single":
            _core.write_safetensors(os.fspath(target), rows, header)
            return
        target.mkdir()
        _core.write_safetensors(os.fspath(target / WEIGHTS), rows, {"format": "pt"} | header)
        if self.config is not None:
            text = write_json(dict(sorted(self.config.items())), 2)
            _core.write_file(os.fspath(target / CONFIG), text.encode())


class Place:
    """A temporary sibling of where the copy will lie; gone unless it is kept."""

    def __init__(self, target: Path) -> None:
        self.target = target
        self.room = Path(
            tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".tmp", dir=target.absolute().parent)
        )
        self.draft = self.room / target.name

    def __enter__(self) -> Place:
        return self

    def keep(self) -> None:
        """Puts the copy in its place."""
        os.rename(self.draft, self.target)

    def __exit__(self, *_: object) -> None:
        shutil.rmtree(self.room, ignore_errors=True)
