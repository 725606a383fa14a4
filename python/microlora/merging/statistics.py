"""What RegMean and Fisher merging know of a parent: Grams of inputs and importances, by module."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

import microlora._core as _core
from microlora._checks import near
from microlora.ewc import EwcPlusPlus, _grams, _sidecar
from microlora.exceptions import ConfigError, DTypeError, FormatError, NonFiniteError, ShapeError
from microlora.gram import Gram

__all__ = ["Statistics", "beside", "read", "statistics_of"]

Floats = NDArray[np.float32]


class Statistics(NamedTuple):
    """What is known of one parent.

    Attributes:
        grams: Second moments of each module's inputs.
        importance: ``{module: (a (in_features,), c (out_features,))}``: means of ``x^2`` and of ``g^2``, so
            that entry (j, i) of a delta has the importance ``c_j a_i``.
    """

    grams: Mapping[str, Gram] = {}
    importance: Mapping[str, tuple[Floats, Floats]] = {}


def statistics_of(name: str, source: Any) -> Statistics:
    """Statistics out of whatever holds them.

    Args:
        name: The parent, for messages.
        source: An :class:`~microlora.EwcPlusPlus`; the path of its file, or of the adapter beside which it
            lies; ``{module: Gram}``; ``{module: (a, c)}``; or a :class:`Statistics`.

    Raises:
        DTypeError: Anything else.
        FormatError: A file that is none of :meth:`EwcPlusPlus.save`.
        ShapeError: An importance that is no pair of vectors.
        NonFiniteError: Negative numbers, NaN or infinity in an importance.
        OSError: The file cannot be read.
    """
    where = f"statistics[{name!r}]"
    if isinstance(source, Statistics):
        return source
    if isinstance(source, EwcPlusPlus):
        target = source._target  # a learner, or a chain with one
        learner: _core.MicroLora = target if isinstance(target, _core.MicroLora) else target._lora  # type: ignore[attr-defined]
        found = {module: source.moments(module) for module in learner.modules()}
        return Statistics(source.grams, {m: (a, c) for m, (a, c, n) in found.items() if n})
    if isinstance(source, str | os.PathLike):
        return read(Path(_sidecar(source)).read_bytes())
    if isinstance(source, Mapping):
        grams: dict[str, Gram] = {}
        importance: dict[str, tuple[Floats, Floats]] = {}
        for module, value in source.items():
            if isinstance(value, Gram):
                grams[module] = value
            elif isinstance(value, tuple | list) and len(value) == 2:
                importance[module] = _pair(f"{where}[{module!r}]", value)
            else:
                raise DTypeError(
                    f"{where}[{module!r}]: got {type(value).__name__}, expected a Gram or a pair (a, c)"
                )
        return Statistics(grams, importance)
    raise DTypeError(
        f"{where}: got {type(source).__name__}, expected an EwcPlusPlus, a path, {{module: Gram}} or "
        "{module: (a, c)}"
    )


def _pair(where: str, value: Iterable[Any]) -> tuple[Floats, Floats]:
    a, c = (np.asarray(v, np.float32) for v in value)
    if a.ndim != 1 or c.ndim != 1:
        raise ShapeError(f"{where}: got shapes {a.shape} and {c.shape}, expected two vectors")
    for side in (a, c):
        if not (np.isfinite(side).all() and (side >= 0).all()):
            raise NonFiniteError(f"{where}: contains NaN, infinity or negative numbers")
    return a, c


def beside(path: Any) -> str | None:
    """The file of statistics beside an adapter's path, or None where there is none."""
    file = _sidecar(path)
    return file if os.path.isfile(file) else None


# -- the file --


def read(data: bytes) -> Statistics:
    """Statistics out of the bytes of :meth:`EwcPlusPlus.export_state`, without a learner.

    Raises:
        FormatError: Bytes of anything else, or of a newer version.
    """
    settings = json.loads(_core.Ewc.settings_of(data))  # the core checks container, format and version
    try:
        (size,) = struct.unpack_from("<Q", data)
        entries = json.loads(data[8 : 8 + size])
        header = entries.pop("__metadata__", {})
        state = json.loads(header["state"])
        shapes = {m["name"]: (int(m["in_features"]), int(m["out_features"])) for m in state["modules"]}
    except (ValueError, KeyError, TypeError, AttributeError, struct.error) as e:
        raise FormatError(f"ewc state: header: {e}") from e
    body = memoryview(data)[8 + size :]
    decay = settings["fisher_decay"]
    importance = {}
    for module, widths in shapes.items():
        found = _moments(entries, body, module, widths, decay)
        if found is not None:
            importance[module] = found
    extra = [
        (name.removeprefix("extra."), list(entry["shape"]), bytes(_raw(entry, body)))
        for name, entry in entries.items()
        if name.startswith("extra.")
    ]
    return Statistics(_grams(extra, header.get("note")), importance)


def _raw(entry: Mapping[str, Any], body: memoryview) -> memoryview:
    begin, end = entry["data_offsets"]
    return body[begin:end]


def _moments(
    entries: Mapping[str, Any],
    body: memoryview,
    module: str,
    widths: tuple[int, int],
    decay: float | None,
) -> tuple[Floats, Floats] | None:
    """Means of x^2 and g^2 over all tasks: `Accumulator::all_moments` of the core."""

    def doubles(what: str, n: int) -> NDArray[np.float64]:
        name = f"module.{module}/{what}"
        entry = entries.get(name)
        if entry is None or entry["dtype"] != "F64" or entry["shape"] != [n]:
            raise FormatError(f"ewc state: tensor {name!r}: missing, or not {n} numbers of 64 bits")
        values = np.frombuffer(_raw(entry, body), "<f8")
        if not (np.isfinite(values).all() and (values >= 0).all()):
            raise FormatError(f"ewc state: tensor {name!r}: negative, NaN or infinity")
        return values

    n, _, steps, past_n, *_ = doubles("counts", 6)
    if n + past_n == 0:
        return None
    correction = 1.0 if decay is None or n == 0 else 1.0 / (1.0 - decay**steps)
    sides = []
    for side, width in zip("xg", widths, strict=True):
        now, past = doubles(f"moment_{side}", width), doubles(f"past_{side}", width)
        share = n / (n + past_n)
        mean = past if n == 0 else past * (1 - share) + now * correction * share
        sides.append(mean.astype(np.float32))
    return sides[0], sides[1]


# -- for the core --


def for_core(
    kind: str, parent: str, known: Statistics | None, modules: Iterable[str], dims: Mapping[str, Any]
) -> dict[str, dict[str, Any]]:
    """``{module: {"gram": {...}} or {"importance": (a, c)}}`` of one parent, shapes checked.

    Raises:
        ConfigError: A module without statistics of this kind.
        ShapeError: Statistics of another width.
    """
    out: dict[str, dict[str, Any]] = {}
    have: Mapping[str, Any] = {}
    if known is not None:
        have = known.grams if kind == "gram" else known.importance
    what = "Gram" if kind == "gram" else "importance"
    source = "collect_gram" if kind == "gram" else "EwcPlusPlus.accumulate_fisher"
    for module in modules:
        if module not in have:
            came = f"none of {module!r}{near(module, have)}" if have else "nothing"
            raise ConfigError(
                f"statistics[{parent!r}]: got {came}, expected the {what} of every module (see {source})"
            )
        n_in, n_out = dims[module]
        value = have[module]
        if kind == "gram":
            if value.features != n_in:
                raise ShapeError(
                    f"statistics[{parent!r}][{module!r}]: got a Gram of {value.features} features, "
                    f"expected {n_in}"
                )
            out[module] = {"gram": value.arrays() if value.dense is None else {"dense": value.dense}}
        else:
            a, c = value
            if (len(a), len(c)) != (n_in, n_out):
                raise ShapeError(
                    f"statistics[{parent!r}][{module!r}]: got {len(a)} and {len(c)} numbers, "
                    f"expected {n_in} and {n_out}"
                )
            out[module] = {"importance": (np.ascontiguousarray(a), np.ascontiguousarray(c))}
    return out
