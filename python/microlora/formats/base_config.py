"""A base model's ``config.json``, which some formats need for head counts and the architecture."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from microlora._file_checks import read_document, there

__all__ = ["read_base_config"]

WANT = "the base's config.json or its directory"


def read_base_config(
    config: Mapping[str, Any] | str | os.PathLike[str] | None,
) -> Mapping[str, Any] | None:
    """A base model's configuration from its path (file, or the model's directory) or as it is.

    Raises:
        DTypeError: Neither a path nor a mapping.
        MissingPathError: There is no such file.
        FormatError: Not a regular file, too large, not JSON, with a key twice, or not an object.
        OSError: It cannot be read.
    """
    if config is None or isinstance(config, Mapping):
        return config
    path = there("base_config", config, WANT)
    if os.path.isdir(path):
        path = os.path.join(path, "config.json")
    return read_document("base_config", path, WANT, nonfinite=True)
