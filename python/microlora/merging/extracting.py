"""Adapters out of weights that were tuned whole: the largest part of ``W_tuned - W_base``."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any, NamedTuple

import microlora._core as _core
from microlora._checks import integer, text
from microlora.adapter import Adapter
from microlora.config import MAX_RANK
from microlora.exceptions import ConfigError, DTypeError
from microlora.merging.parents import described
from microlora.merging.report import MergeReport
from microlora.merging.resizing import keep_plan
from microlora.metadata import AdapterMetadata, utc_now
from microlora.progress import CancelToken, Progress

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

__all__ = ["Extracted", "extract"]

PathLike = str | os.PathLike[str]
Patterns = str | Iterable[str]


class Extracted(NamedTuple):
    """An adapter out of two models, and how much of their difference it holds."""

    adapter: Adapter
    report: MergeReport


def extract(
    tuned: PathLike | Mapping[str, ArrayLike],
    base: PathLike | Mapping[str, ArrayLike],
    *,
    rank: int | None = None,
    energy: float | None = None,
    max_error: float | None = None,
    max_rank: int = 256,
    modules: Patterns = "*",
    transposed: Patterns = (),
    dtype: str = "f32",
    seed: int = 0,
    progress: Progress | None = None,
    cancel: CancelToken | None = None,
) -> Extracted:
    """The adapter that turns ``base`` into ``tuned`` best, by a randomised SVD of every module's difference.

    Files are streamed in blocks of rows: memory is bounded by the factors (``4 passes rank (in + out)`` bytes
    and a block), never a matrix. Algorithm: Halko, Martinsson and Tropp, arXiv 0909.4061.

    Args:
        tuned: A safetensors file, a folder with one or with shards and an index, or arrays: ``{module:
            (out, in)}`` or a state dict, whose names end in ``.weight``.
        base: What it was tuned from, in the same form.
        rank: Rank of every module.
        energy: Or the least rank that keeps this share of a difference's squared norm.
        max_error: Or the least rank whose relative error is no larger.
        max_rank: Highest rank that ``energy`` and ``max_error`` may lead to; the report says where it cut.
        modules: Which modules, as patterns of their paths (``"*.self_attn.*"``). Of files: matrices named
            ``<module>.weight``. What changed and is not taken is listed in the report's notes.
        transposed: Patterns of modules whose weights lie as (in, out): GPT-2's Conv1D, embeddings.
        dtype: How the adapter is stored.
        seed: Of the random start; the result hardly depends on it.
        progress: Called with ``(done, total, what)`` between modules and blocks.
        cancel: A token looked at there.

    Returns:
        The adapter, scaling 1, and a report with ``energy_kept`` and ``error`` per module. Modules without a
        change are left away and named in its notes.

    Raises:
        ConfigError: None or several of rank, energy, max_error; no module of the patterns; nothing changed.
        ShapeError: A module of another shape in ``base``.
        NonFiniteError: NaN or infinity in a difference.
        FormatError: A file that is no safetensors model.
        OSError: A file that cannot be read.

    Example:
        >>> import numpy as np, microlora as ml
        >>> r = np.random.default_rng(0)
        >>> base = r.standard_normal((6, 8)).astype(np.float32)
        >>> change = (r.standard_normal((6, 2)) @ r.standard_normal((2, 8))).astype(np.float32)
        >>> adapter, report = ml.extract({"q_proj": base + change}, {"q_proj": base}, energy=0.999)
        >>> adapter.info("q_proj").rank
        2
    """
    plan = keep_plan(rank, energy, max_error, dtype)
    most = integer("max_rank", max_rank, 1, MAX_RANK)
    keep, amount = str(plan["keep"]), float(plan["value"])
    start = integer("seed", seed, 0, 2**64 - 1)
    wanted, turned = _patterns("modules", modules), _patterns("transposed", transposed)
    if rank is not None and rank > most:
        raise ConfigError(f"rank: got {rank}, expected at most max_rank, {most}")
    aside: list[str] = []
    if isinstance(tuned, Mapping) and isinstance(base, Mapping):
        flat = [name for name in tuned if getattr(tuned[name], "ndim", 2) != 2]
        keys = {name.removesuffix(".weight"): name for name in tuned if name not in flat}
        taken = _taken(list(keys), wanted, turned)
        for name in taken:
            if keys[name] not in base:
                raise ConfigError(f"base: got no module {name!r}, expected those of tuned")
        pairs = [(name, tuned[keys[name]], base[keys[name]], taken[name]) for name in taken]
        aside = [*flat, *(key for name, key in keys.items() if name not in taken)]
        core, report = _core.extract_from_arrays(
            pairs, keep, amount, most, dtype, start, progress=progress, cancel=cancel
        )
    elif isinstance(tuned, str | os.PathLike) and isinstance(base, str | os.PathLike):
        paths = os.fspath(tuned), os.fspath(base)
        theirs = {name for name, _, _ in _core.list_tensors(paths[1], "base")}
        names = [
            name.removesuffix(".weight")
            for name, _, shape in _core.list_tensors(paths[0], "tuned")
            if name.endswith(".weight") and len(shape) == 2 and name in theirs
        ]
        taken = _taken(names, wanted, turned)
        core, report = _core.extract_from_files(
            *paths, taken, keep, amount, most, dtype, start, progress=progress, cancel=cancel
        )
    else:
        got = f"{type(tuned).__name__} and {type(base).__name__}"
        raise DTypeError(f"tuned, base: got {got}, expected two paths or two mappings of arrays")
    document: dict[str, Any] = json.loads(report)
    unchanged, left_out = document.pop("unchanged"), document.pop("left_out") or aside
    notes = [_note("without a change", unchanged), _note("not in the adapter", left_out)]
    document["notes"] = [note for note in notes if note]
    made = described(core, AdapterMetadata(created=utc_now()), "extracted")
    return Extracted(made, MergeReport.from_dict(document))


def _patterns(name: str, value: Patterns) -> tuple[str, ...]:
    items = (value,) if isinstance(value, str) else tuple(value)
    return tuple(text(name, item, empty=False) for item in items)


def _taken(names: list[str], wanted: tuple[str, ...], turned: tuple[str, ...]) -> dict[str, bool]:
    """``{module: whether it lies as (in, out)}`` of those wanted."""

    def match(name: str, patterns: tuple[str, ...]) -> bool:
        return any(fnmatchcase(name, p) for p in patterns)

    out = {name: match(name, turned) for name in names if match(name, wanted)}
    if not out:
        have = ", ".join(names[:6]) or "none"
        raise ConfigError(f"modules: got {', '.join(wanted)}, expected a pattern of some of {have}")
    return out


def _note(what: str, names: list[str]) -> str:
    more = "" if len(names) < 4 else f", ... ({len(names)} in all)"
    return f"{what}: {', '.join(names[:3])}{more}" if names else ""
