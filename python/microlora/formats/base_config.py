"""A base model's ``config.json``, which some formats need for head counts and the architecture."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from microlora.exceptions import FormatError

__all__ = ["read_base_config"]


def read_base_config(
    config: Mapping[str, Any] | str | os.PathLike[str] | None,
) -> Mapping[str, Any] | None:
    """A base model's configuration from its path (file, or the model's directory) or as it is.

    Raises:
        FormatError: Not JSON, or not an object.
        OSError: It cannot be read.
    """
    if config is None or isinstance(config, Mapping):
        return config
    path = Path(config)
    if path.is_dir():
        path = path / "config.json"
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as e:
        raise FormatError(
            f"{path}: base_config is not JSON ({e}), expected the base's config.json or its directory"
        ) from e
    if not isinstance(value, dict):
        raise FormatError(f"{path}: base_config is {type(value).__name__}, expected an object")
    return value
