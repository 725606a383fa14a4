"""Messages of the library in the words of the command line."""

from __future__ import annotations

import re
from collections.abc import Iterable

__all__ = ["in_flags"]

# Arguments without a flag of their own.
_POSITIONAL = ("run", "fail", "path", "source", "target")
# Arguments that messages of one command name for another.
_ELSEWHERE = ("b_along_rank",)
# What the library calls an argument that the command line calls otherwise.
_OTHERWISE = {"key": "private_key"}
# Positional arguments as the help shows them.
_SHOWN = {"src": "SRC", "dst": "DST"}


def in_flags(text: str, options: Iterable[str]) -> str:
    """A message of the library in the words of the command line: ``allow=["drop:x"]`` as ``--allow drop:x``.

    Args:
        text: The message.
        options: Names of the command's arguments; others are left as they are.
    """
    for name in (*options, *_ELSEWHERE):
        if name in _POSITIONAL:
            continue
        flag = "--" + name.replace("_", "-")
        for listed, items in re.findall(rf"(\b{name}=\[([^\]]*)\])", text):
            flags = (f"{flag} {item.strip(chr(34) + chr(39))}" for item in items.split(", "))
            text = text.replace(listed, " ".join(flags))
        text = re.sub(rf"\b{name}=True\b", flag, text)
        text = re.sub(rf"\b{name}=\"([^\"]*)\"", rf"{flag} \1", text)
        text = re.sub(rf"(?<![\w-]){name}=(?=[\s,;)]|$)", flag, text)
        text = re.sub(rf"(^|: )(?:{name}|{_OTHERWISE.get(name, name)}): got ", rf"\1{flag}: got ", text)
    for name, shown in _SHOWN.items():
        text = re.sub(rf"^{name}: got ", f"{shown}: got ", text)
    return text
