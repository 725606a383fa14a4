"""Checks shared by the settings classes, and the strict JSON they are read from."""

from __future__ import annotations

import json
import math
import operator
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Generic, TypeVar, cast

from microlora.exceptions import ConfigError, FormatError

V = TypeVar("V")

SCHEMA_KEY = "schema_version"


class FrozenMap(Mapping[str, V], Generic[V]):
    """A read-only mapping that hashes and pickles; keys are kept sorted.

    Equal to any mapping with the same items, so it compares with a plain dict.
    """

    __slots__ = ("_items",)

    def __init__(self, items: Mapping[str, V] | Iterable[tuple[str, V]] = ()) -> None:
        self._items: dict[str, V] = dict(sorted(dict(items).items()))

    def __getitem__(self, key: str) -> V:
        return self._items[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._items)

    def __len__(self) -> int:
        return len(self._items)

    def __hash__(self) -> int:
        return hash(tuple(self._items.items()))

    def __repr__(self) -> str:
        return repr(self._items)

    def __reduce__(self) -> tuple[Any, ...]:
        return (FrozenMap, (tuple(self._items.items()),))


def wrong(field: str, got: object, want: str) -> ConfigError:
    """The one form of a refused setting: field, value that came, value wanted."""
    shown = repr(got)
    if len(shown) > 80:
        shown = shown[:77] + "..."
    return ConfigError(f"{field}: got {shown}, expected {want}")


def near(name: str, known: Iterable[str]) -> str:
    """`` (did you mean 'a' or 'b'?)`` for the known names nearest to ``name``, else an empty string."""
    import difflib  # only when something is already wrong

    found = difflib.get_close_matches(name, sorted(known), n=3, cutoff=0.5)
    return f" (did you mean {' or '.join(map(repr, found))}?)" if found else ""


def integer(field: str, value: object, low: int, high: int) -> int:
    """``value`` as an int of ``low..high``; floats, bools and text are refused."""
    want = f"an integer from {low} to {high}"
    if isinstance(value, bool):
        raise wrong(field, value, want)
    try:
        number = operator.index(cast(Any, value))
    except TypeError:
        raise wrong(field, value, want) from None
    if not low <= number <= high:
        raise wrong(field, value, want)
    return number


def real(field: str, value: object, want: str) -> float:
    """``value`` as a finite float; bools, text, NaN and infinities are refused with ``want``."""
    if isinstance(value, bool | str | bytes) or not hasattr(value, "__float__"):
        raise wrong(field, value, want)
    try:
        number = float(cast(Any, value))
    except (TypeError, ValueError, OverflowError):
        raise wrong(field, value, want) from None
    if not math.isfinite(number):
        raise wrong(field, value, want)
    return number


def flag(field: str, value: object) -> bool:
    """``value`` if it is True or False."""
    if not isinstance(value, bool):
        raise wrong(field, value, "True or False")
    return value


def text(field: str, value: object, *, empty: bool = True) -> str:
    """``value`` as a str that UTF-8 can hold; ``empty=False`` refuses the empty one."""
    want = "a string" if empty else "a non-empty string"
    if not isinstance(value, str) or not (empty or value.strip()):
        raise wrong(field, value, want)
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise wrong(field, value, f"{want} without lone surrogates") from None
    return str(value)


def choice(field: str, value: object, allowed: tuple[str, ...]) -> str:
    """``value`` if it is one of ``allowed``; the message names them and the nearest."""
    if isinstance(value, str):
        if value in allowed:
            return str(value)
        raise wrong(field, value, f"one of {', '.join(map(repr, allowed))}{near(value, allowed)}")
    raise wrong(field, value, f"one of {', '.join(map(repr, allowed))}")


def texts(field: str, value: object) -> tuple[str, ...]:
    """``value`` as a tuple of non-empty, distinct strings; a bare string is refused."""
    if isinstance(value, str | bytes | Mapping) or not isinstance(value, Iterable):
        raise wrong(field, value, "a list or tuple of strings")
    out = tuple(text(f"{field}[{i}]", item, empty=False) for i, item in enumerate(value))
    if len(set(out)) != len(out):
        raise wrong(field, list(out), "every string once")
    return out


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, value in pairs:
        if key in out:
            raise ValueError(f"key {key!r} appears twice")
        out[key] = value
    return out


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a JSON number")


def read_json(what: str, document: str | bytes, *, nonfinite: bool = False) -> dict[str, Any]:
    """One JSON object, strictly: no NaN, no repeated key, nothing but an object at the top.

    Args:
        what: What messages call it.
        document: The text, or its bytes.
        nonfinite: Take the ``NaN`` and ``Infinity`` of Python's writer, which some models' settings have.

    Raises:
        FormatError: naming ``what`` and the reason.
    """
    try:
        constant = None if nonfinite else _no_constant
        value = json.loads(document, object_pairs_hook=_no_duplicates, parse_constant=constant)
    except (ValueError, TypeError, RecursionError) as error:
        raise FormatError(f"{what}: not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise FormatError(f"{what}: got a JSON {type(value).__name__}, expected an object")
    return value


def write_json(value: Mapping[str, Any], indent: int | None = None) -> str:
    """JSON text of a plain dict, NaN refused."""
    return json.dumps(value, indent=indent, allow_nan=False)


def check_document(what: str, data: object, known: Iterable[str], version: int) -> dict[str, Any]:
    """A copy of ``data`` without its schema version, its keys all of ``known``.

    A document without a schema version is taken for version 1, so that people can write one by hand.

    Raises:
        FormatError: the schema version is newer than ``version``, or no version at all.
        ConfigError: ``data`` is no mapping, or has a key that is not known.
    """
    if not isinstance(data, Mapping):
        raise wrong(what, data, "a mapping")
    out = dict(data)
    came = out.pop(SCHEMA_KEY, 1)
    if isinstance(came, bool) or not isinstance(came, int) or came < 1:
        raise FormatError(f"{what}: {SCHEMA_KEY}: got {came!r}, expected an integer of 1 or more")
    if came > version:
        raise FormatError(
            f"{what}: {SCHEMA_KEY} {came} is newer than {version}, the newest that this microlora reads"
        )
    check_keys(what, out, known)
    return out


def check_keys(what: str, data: Mapping[Any, Any], known: Iterable[str]) -> None:
    """Refuse, by name and with the nearest known one, a key that is not in ``known``."""
    names = tuple(known)
    for key in data:
        if key not in names:
            hint = near(key, names) if isinstance(key, str) else ""
            raise ConfigError(f"{what}: unknown key {key!r}{hint}; known: {', '.join(names)}")


def layer_paths(value: object) -> dict[str, list[str]] | None:
    """``{short name: [module paths]}`` from a mapping to one path or several; None stays None."""
    want = "a mapping such as {'q_proj': 'model.layers.0.self_attn.q_proj'}, to one path or several"
    if value is None:
        return None
    if not isinstance(value, Mapping):
        raise wrong("layer_paths", value, want)
    out: dict[str, list[str]] = {}
    for key, paths in value.items():
        if not isinstance(paths, str | list | tuple):
            raise wrong(f"layer_paths[{key!r}]", paths, "a path or a list of paths")
        several = [paths] if isinstance(paths, str) else list(paths)
        for path in several:
            name = text(f"layer_paths[{key!r}]", path, empty=False)
            if name.endswith(".weight"):
                raise wrong(f"layer_paths[{key!r}]", path, "the path of the module, without .weight")
        out[text("layer_paths: name", key, empty=False)] = several
    return out
