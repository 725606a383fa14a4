"""Checks of what functions over files are given: paths, settings of readers, losses by name."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from typing import Any

from microlora._checks import choice, flag, near, read_json, real, wrong
from microlora.exceptions import ConfigError, DTypeError, FormatError, MissingPathError

#: Bytes of a JSON document: settings, manifests and indices of shards are far below.
MOST_DOCUMENT = 64 << 20
_ORIENTATIONS = ("rank_first", "rank_last")


def path_text(arg: str, value: object) -> str:
    """A path as text.

    Raises:
        DTypeError: No path, or one of bytes.
        ConfigError: An empty one, or one with a null character.
    """
    path = os.fspath(value) if isinstance(value, str | os.PathLike) else None
    if not isinstance(path, str):
        raise DTypeError(f"{arg}: got {type(value).__name__}, expected a path as text")
    if not path or "\0" in path:
        raise wrong(arg, path, "a path as text, not empty and without null characters")
    return path


def there(arg: str, value: object, want: str) -> str:
    """The path of something that is there.

    Raises:
        MissingPathError: Nothing lies there; the message names the argument and what was wanted.
        DTypeError: No path.
        ConfigError: An empty one.
    """
    path = path_text(arg, value)
    if not os.path.exists(path):
        raise MissingPathError(f"{arg}: got {path!r}, which is not there, expected {want}")
    return path


def regular(arg: str, value: object, want: str) -> str:
    """The path of a regular file; a pipe, whose reading would wait for ever, and a device are none.

    Raises:
        FormatError: Something else lies there.
        MissingPathError: Nothing does.
        DTypeError: No path.
        ConfigError: An empty one.
    """
    path = there(arg, value, want)
    if not os.path.isfile(path):
        raise FormatError(f"{arg}: got {path!r}, which is no regular file, expected {want}")
    return path


def read_document(arg: str, value: object, want: str, *, nonfinite: bool = False) -> dict[str, Any]:
    """The JSON object of a file that an argument names; every such file is read here.

    Raises:
        FormatError: Not a regular file, of more than :data:`MOST_DOCUMENT` bytes, not JSON, with a key twice,
            or not an object.
        MissingPathError: Nothing lies there.
        DTypeError: No path.
        ConfigError: An empty one.
        OSError: It cannot be read.
    """
    path = regular(arg, value, want)
    with open(path, "rb") as file:
        data = file.read(MOST_DOCUMENT + 1)
    if len(data) > MOST_DOCUMENT:
        raise FormatError(f"{arg}: got {path!r} of more than {MOST_DOCUMENT} bytes, expected {want}")
    return read_json(f"{arg}: got {path!r}, expected {want}", data, nonfinite=nonfinite)


def check_calls(progress: object, cancel: object) -> None:
    """What long work calls: a function, and a token.

    Raises:
        ConfigError: Something else.
    """
    if progress is not None and not callable(progress):
        raise wrong("progress", progress, "a function of (done, total, message), or None")
    if cancel is not None and not callable(getattr(cancel, "raise_if_cancelled", None)):
        raise wrong("cancel", cancel, "a microlora.CancelToken, or None")


def check_reading(
    path: object, mmap: object, strict: object, alpha: object, orientation: object, names: object
) -> tuple[str, float | None]:
    """The path and the alpha of a file that is to be read; the other settings only checked.

    Raises:
        ConfigError: names the setting.
        DTypeError: ``path`` is none.
    """
    where = path_text("path", path)
    flag("mmap", mmap)
    flag("strict", strict)
    if orientation is not None:
        choice("orientation", orientation, _ORIENTATIONS)
    if names is not None:
        choice("names", names, ("gguf",))
    return where, None if alpha is None else real("alpha", alpha, "a finite number, or None")


def check_allow(allow: Iterable[str], also: Iterable[str] = ()) -> list[str]:
    """The losses that a caller accepts by name, well-formed; ``also`` names what a format takes besides.

    Whether there are such kinds is for :func:`check_kinds`, which has to know the file.

    Raises:
        ConfigError: Not a list of names of the form ``drop:<kind>``.
    """
    if isinstance(allow, str | bytes | Mapping) or not isinstance(allow, Iterable):
        raise wrong("allow", allow, "a list of names such as ['drop:dora']")
    names = list(allow)
    for name in names:
        if name in also:
            continue
        if not isinstance(name, str) or not name.startswith("drop:") or name == "drop:":
            want = " or ".join(["names of the form 'drop:<kind>'", *map(repr, also)])
            raise ConfigError(f"allow: got {name!r}, expected {want}")
    return names


def unknown_kinds(allow: Iterable[str]) -> list[str]:
    """Those of ``drop:<kind>`` that no format here can have."""
    import microlora._core as _core

    drops = [name for name in allow if name.startswith("drop:")]
    known = _core.adapter_file_kinds() if drops else []
    return [name for name in drops if name[5:] not in known]


def check_kinds(allow: Iterable[str], present: Iterable[str]) -> None:
    """Refuses the loss of a kind that there is not; one that this file lacks is no error.

    Args:
        allow: What :func:`check_allow` gave.
        present: Kinds of the file, which may name some of its own.

    Raises:
        ConfigError: names the kinds that there are, and the nearest.
    """
    here = set(present)
    for name in unknown_kinds(allow):
        if name[5:] not in here:
            import microlora._core as _core

            kinds = sorted({*_core.adapter_file_kinds(), *here})
            every = ", ".join(kinds)
            raise ConfigError(
                f"allow: got {name!r}, expected 'drop:' and one of {every}{near(name[5:], kinds)}"
            )
