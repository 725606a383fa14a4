"""Messages of the library in the words of the command line."""

from __future__ import annotations

import re
from collections.abc import Iterable

__all__ = ["in_flags"]

# Arguments without a flag of their own.
_POSITIONAL = ("run", "fail", "path", "source", "target")


def in_flags(text: str, options: Iterable[str]) -> str:
    """A message of the library in the words of the command line: ``allow=["drop:x"]`` as ``--allow drop:x``.

    Args:
        text: The message.
        options: Names of the command's arguments; others are left as they are.
    """
    for name in options:
        if name in _POSITIONAL:
            continue
        flag = "--" + name.replace("_", "-")
        for listed, items in re.findall(rf"(\b{name}=\[([^\]]*)\])", text):
            flags = (f"{flag} {item.strip(chr(34) + chr(39))}" for item in items.split(", "))
            text = text.replace(listed, " ".join(flags))
        text = re.sub(rf"\b{name}=True\b", flag, text)
        text = re.sub(rf"\b{name}=\"([^\"]*)\"", rf"{flag} \1", text)
        text = re.sub(rf"(?<![\w-]){name}=(?=[\s,;)]|$)", flag, text)
        text = re.sub(rf"^{name}: got ", f"{flag}: got ", text)
    return text
