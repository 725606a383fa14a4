"""Training part and held-out part: chosen by hash, and kept apart."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from microlora._checks import choice, integer, real, wrong
from microlora.data.columns import check_alike
from microlora.data.hashing import hash64, share, text_digest
from microlora.exceptions import ConfigError, LeakageError

if TYPE_CHECKING:
    from microlora.data.columns import Columns
    from microlora.data.dataset import AdapterDataset

__all__ = ["KEYS", "Keys", "check_held_out", "held_out", "refuse_leaks"]

KEYS = ("id", "session", "row")
"""What a split can keep together."""

Hashes = npt.NDArray[np.uint64]


class Keys:
    """64-bit hashes of what must not be on both sides: root ids and texts; 0 stands for no text."""

    def __init__(self) -> None:
        self.roots: list[int] = []
        self.texts: list[int] = []

    def add(self, row: dict[str, str]) -> None:
        """Take up one sample, given by its text fields."""
        self.roots.append(hash64(row.get("parent_id") or row["id"]))
        query, response = row.get("query"), row.get("response")
        text = 0 if query is None else int.from_bytes(text_digest(query, response)[:8], "little")
        self.texts.append(text)

    @classmethod
    def of(cls, columns: Columns, rows: Sequence[int]) -> Keys:
        """The hashes of some rows."""
        keys = cls()
        for row in rows:
            keys.add(columns.texts.row(row))
        return keys


def held_out(dataset: AdapterDataset, validation: float, by: str, seed: int) -> npt.NDArray[np.bool_]:
    """Which rows of a dataset a split holds out, bool (n,).

    Raises:
        ConfigError: a share that is none, an unknown key, a sample without a session where sessions are
            kept together, or a side that would be empty.
    """
    want = "a number above 0 and below 1"
    part = real("validation", validation, want)
    if not 0.0 < part < 1.0:
        raise wrong("validation", validation, want)
    by = choice("by", by, KEYS)
    seed = integer("seed", seed, -(2**63), 2**63 - 1)
    if by == "row":
        keys = [str(row) for row in range(len(dataset))]
    elif by == "session":
        keys = dataset.texts("session_id")  # type: ignore[assignment]
        if "" in keys:
            name = dataset[keys.index("")].id
            raise ConfigError(f"sample {name!r}: has no session_id, expected one for a split by session")
    else:
        pairs = zip(dataset.texts("parent_id"), dataset.texts("id"), strict=True)
        keys = [str(parent or own) for parent, own in pairs]
    out = np.array([share(key, seed) < part for key in keys], np.bool_)
    if not out.any() or out.all():
        side = "training" if out.any() else "validation"
        raise ConfigError(
            f"split: the {side} part of {len(out)} samples with {len(set(keys))} different keys would be "
            "empty; expected samples on both sides: give more of them, another share or another seed"
        )
    return out


def check_held_out(train: AdapterDataset, held: object) -> None:
    """Raise unless ``held`` can be the held-out part of ``train``.

    Raises:
        ConfigError: another sort of samples, or none.
        ShapeError: other widths.
        LeakageError: a sample, a text or a variation on both sides.
    """
    if not isinstance(held, type(train)):
        raise wrong("validation", held, "an AdapterDataset or None")
    if not len(held):
        raise ConfigError("validation: got an empty dataset, expected samples, or None for no part")
    check_alike(train.columns, held.columns)
    refuse_leaks(train, held)


def refuse_leaks(train: AdapterDataset, held: AdapterDataset) -> None:
    """Raise LeakageError if anything of the held-out part is in the training part as well."""
    ours = Keys.of(train.columns, train.rows.tolist())
    theirs = Keys.of(held.columns, held.rows.tolist())
    pairs = (
        ("the same sample, or a variation of it, as", ours.roots, theirs.roots),
        ("the same text as", ours.texts, theirs.texts),
    )
    for what, left, right in pairs:
        places = {key: row for row, key in enumerate(right) if key}
        for row, key in enumerate(left):
            if key in places:
                raise leak(str(train.texts("id")[row]), str(held.texts("id")[places[key]]), what)


def leak(train: str, held: str, what: str) -> LeakageError:
    """The error for two samples that stand on both sides."""
    return LeakageError(
        f"leakage: training sample {train!r} is {what} held-out sample {held!r}; expected no sample, text or "
        "variation on both sides (drop duplicates, or split by another key)"
    )
