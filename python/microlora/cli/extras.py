"""Optional dependencies, asked for where they are needed."""

from __future__ import annotations

import importlib

from microlora.exceptions import MissingExtraError

__all__ = ["require"]


def require(module: str, extra: str, what: str) -> None:
    """Raise unless ``module`` can be imported.

    Args:
        module: an optional dependency.
        extra: the extra of this package that brings it.
        what: what needs it, for the message.

    Raises:
        MissingExtraError: it is not installed; the message is the pip line.
    """
    try:
        importlib.import_module(module)
    except ImportError as err:
        raise MissingExtraError(f"{what} needs {module}: pip install 'microlora[{extra}]'") from err
