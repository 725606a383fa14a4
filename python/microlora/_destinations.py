"""Where a format may be written: its name, its folder, what lies there. One rule for every writer."""

from __future__ import annotations

import contextlib
import os
import stat
from pathlib import Path

from microlora._file_checks import path_text
from microlora.exceptions import ConfigError, DestinationExistsError, MissingPathError

__all__ = ["check_destination", "check_folder", "format_of_name", "remove_other_weights"]

# Endings that say what a file is, and the formats that are written under them.
_ENDINGS = {
    ".safetensors": ("safetensors", "kohya", "diffusers", "flat"),
    ".gguf": ("gguf",),
    ".npz": ("npz",),
}
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
# Formats that are a directory, and the weights that programs look for in one.
_WEIGHTS = {
    "peft": ("adapter_model.safetensors", "adapter_model.bin"),
    "mlx": ("adapters.safetensors", "adapters.npz"),
}
_CHECKPOINTS = "_adapters.safetensors"
_SETTINGS = "adapter_config.json"


def format_of_name(path: str) -> str:
    """The format that a name asks for: by its ending, else a PEFT directory."""
    ending = os.path.splitext(path)[1].lower()
    return _ENDINGS[ending][0] if ending in _ENDINGS else "peft"


def check_destination(arg: str, value: object, format: str, *, overwrite: bool | None) -> Path:
    """Refuses a place where a format cannot or must not be written, before any work.

    Args:
        arg: What messages call it.
        value: The place.
        format: Name of the format.
        overwrite: Whether what lies there may be replaced; None where that is what the function does.

    Raises:
        DTypeError: No path.
        ConfigError: A name that is for another format.
        MissingPathError: Its folder is not there.
        DestinationExistsError: Something lies there that is not replaced.
    """
    path = path_text(arg, value)
    _check_name(arg, path, format)
    check_folder(arg, path)
    _check_free(path, format, overwrite)
    return Path(path)


def _check_name(arg: str, path: str, format: str) -> None:
    ending = os.path.splitext(os.path.normpath(path))[1].lower()
    if ending not in _PICKLES and (ending not in _ENDINGS or format in _ENDINGS[ending]):
        return
    if format in _WEIGHTS:
        want = f"the name of a directory, which {format} is"
    else:
        want = f"a name that ends in {_ending(format)} for {format}"
    if ending in _PICKLES:
        why = "is for pickles, which are not written; a single file ends in .safetensors"
    else:
        why = f"is for format {' or '.join(_ENDINGS[ending])}"
    raise ConfigError(f"{arg}: got {path!r}, expected {want} ({ending} {why})")


def check_folder(arg: str, value: str | os.PathLike[str]) -> None:
    """The folder that something is written into must be there.

    Raises:
        MissingPathError: It is not, or is none; the message names it.
    """
    path = os.fspath(value)
    folder = os.path.dirname(path.rstrip("/" + os.sep)) or "."
    if not os.path.isdir(folder):
        what = "is not a folder" if os.path.exists(folder) else "is not there"
        raise MissingPathError(
            f"{arg}: got {path!r}, expected a place in a folder that exists: {folder!r} {what}"
        )


def _check_free(path: str, format: str, overwrite: bool | None) -> None:
    folder = format in _WEIGHTS
    if not folder:
        _check_no_weights(path, format)
    if not os.path.lexists(path):
        return
    is_dir = os.path.isdir(path)
    if is_dir and not folder:
        raise DestinationExistsError(
            f"{path}: is a directory, expected the name of a file, such as "
            f"{os.path.join(path, 'adapter' + _ending(format))!r}: {format} is one"
        )
    if folder and not is_dir:
        what = "a file" if os.path.exists(path) else "a link to nothing"
        raise DestinationExistsError(
            f"{path}: is {what}, expected a directory, which {format} is; give another name"
        )
    if overwrite is False:
        raise DestinationExistsError(f"{path}: exists; pass overwrite=True to replace it")
    if not is_dir and os.path.exists(path) and not stat.S_ISREG(os.stat(path).st_mode):
        raise DestinationExistsError(f"{path}: exists and is neither a regular file nor a directory")
    if format == "peft":
        left = sorted(n for n in os.listdir(path) if n.endswith(_CHECKPOINTS))
        if left:
            raise DestinationExistsError(
                f"{path}: has checkpoints of MLX ({left[0]!r}), whose scale is in the adapter_config.json "
                "that would be replaced; give another directory"
            )


def _check_no_weights(path: str, format: str) -> None:
    """A single file must not pass for the weights of the adapter in a directory."""
    beside, name = os.path.split(os.path.normpath(path))
    if any(name in names for names in _WEIGHTS.values()) and os.path.isfile(os.path.join(beside, _SETTINGS)):
        raise DestinationExistsError(
            f"{path}: is the place of the weights that {_SETTINGS} beside it is for, expected another name: "
            f"{format} has its settings in the file"
        )


def _ending(format: str) -> str:
    return next((ending for ending, formats in _ENDINGS.items() if format in formats), "")


def remove_other_weights(path: str | os.PathLike[str], format: str) -> list[str]:
    """Takes away the weights of another adapter or format that a directory still has; notes of it.

    Files that are not an adapter's weights stay. To be called when the new ones are in their place.
    """
    notes = []
    kept = _WEIGHTS.get(format, ())[:1]
    for name in (n for names in _WEIGHTS.values() for n in names if kept and n not in kept):
        place = os.path.join(path, name)
        if os.path.isfile(place) or os.path.islink(place):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(place)
            notes.append(f"removed {name}, the weights that lay in this directory before")
    return notes
