"""GGUF adapters: the model's names from llama.cpp's and back, and what the format cannot hold."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import microlora._core as _core
from microlora.config import LoraConfig
from microlora.exceptions import ConfigError, FormatError, UnsupportedVariantError
from microlora.formats.architectures import Base, Place

if TYPE_CHECKING:
    from microlora.formats.conversion import Options
    from microlora.formats.file import AdapterFile, FileModule

__all__ = ["DTYPES", "has_own_names", "is_own_name", "losses", "named", "unplaced", "write"]

DTYPES = ("auto", "f32", "f16", "bf16", "q8_0", "q6_k", "q5_k", "q4_k", "q4_1", "q4_0")

ARCHITECTURE = "general.architecture"
TOKENS = "adapter.alora.invocation_tokens"
_OWN = re.compile(r"blk\.\d+\..+|token_embd|output")
# Kinds that the format has room for.
_HELD = ("row_order", "embedding", "experts", "alora", "linear")


def has_own_names(file: _core.AdapterFile) -> bool:
    """Whether modules have llama.cpp's names."""
    return ARCHITECTURE in file.header


def is_own_name(path: str) -> bool:
    """Whether a module's path is a tensor of llama.cpp's."""
    return _OWN.fullmatch(path) is not None


def unplaced(file: AdapterFile) -> dict[str, str]:
    """What every other format loses of a file whose q and k lie in llama.cpp's order."""
    return {v.kind: f"{v.at}: {v.why}" for v in file.variants if v.kind == "row_order"}


def named(
    file: _core.AdapterFile, base_config: Mapping[str, Any] | None, names: str | None
) -> _core.AdapterFile:
    """A file that was read, with the names that were asked for.

    Raises:
        ConfigError: Settings that exclude each other, or that belong to another format.
        FormatError: A file of another architecture than the base's, or with a tensor that the base lacks.
    """
    if names not in (None, "gguf"):
        raise ConfigError(f"names: got {names!r}, expected 'gguf' or None")
    if base_config is None and names is None:
        return file
    if not has_own_names(file):
        which = "names" if base_config is None else "base_config"
        raise ConfigError(
            f"{which}: got one for a {file.format or 'built'} file, expected none (names are not llama.cpp's)"
        )
    if base_config is None:
        return _core.gguf_keep_names(file)
    if names is not None:
        raise ConfigError("names: got 'gguf' with base_config=, expected one of the two")
    base = Base.from_config(base_config)
    architecture = file.header.get(ARCHITECTURE)
    if architecture != base.architecture:
        raise FormatError(
            f"{file.file}: of architecture {architecture!r}, expected {base.architecture!r} "
            f"(base_config.model_type {base.family.model_type!r})"
        )
    rows = file.rows()
    places = base.places([row[0] for row in rows], file.file)
    for row in rows:
        inputs, outputs = _sizes(row[1], row[5][1], row[6][1])
        base.check_shape(row[0], f"{row[0]}.weight", inputs, outputs)
    return _core.gguf_translate(file, places)


def _sizes(
    kind: str, shape_a: list[int] | tuple[int, ...], shape_b: list[int] | tuple[int, ...]
) -> tuple[int, int]:
    """In and out of a module from the shapes of its factors."""
    at = 2 if kind == "experts" else 1
    return shape_a[at], shape_b[at - 1]


def losses(file: AdapterFile, options: Options) -> dict[str, str]:
    """What GGUF cannot hold of a file."""
    lost = {v.kind: v.at for v in reversed(file.variants) if v.kind not in _HELD}
    if not lost and file.extra():
        lost["extra"] = file.extra()[0][0]
    for module in file.modules:
        if module.kind not in _HELD:
            lost.setdefault(module.kind, module.path)
    if file.has_blocks:
        held = [m.path for m in file.modules if m.kind in _HELD]
        blocks = _core.gguf_lost_blocks(file, held, options.dtype or "auto")
        if blocks:
            more = f" and {len(blocks) - 1} more" if len(blocks) > 1 else ""
            lost["blocks"] = blocks[0] + more
    return lost


def write(file: AdapterFile, path: Path, options: Options) -> list[str]:
    """Writes what is left of a file; whatever llama.cpp would refuse is refused before.

    Raises:
        ConfigError: No base_config, or one of a model type without a row.
        FormatError: A module that the base has no tensor for.
        UnsupportedVariantError: A layer of a base whose output layer is its embedding; experts that are not
            all there, or that differ in rank, alpha or type.
        ShapeError: A module that does not fit the base's tensor.
    """
    architecture = file.header.get(ARCHITECTURE)
    base = None if options.base_config is None else Base.from_config(options.base_config)
    if base is not None:
        file = _stacked(file, base)
    modules = [m for m in file.modules if m.kind in _HELD]
    if base is not None:
        architecture, targets = base.architecture, _targets(file, modules, base)
    elif architecture is not None:
        targets = {m.path: (f"{m.path}.weight", None) for m in modules}
    else:
        raise ConfigError(
            "base_config: got None, expected the base's config.json: GGUF needs its architecture and heads"
        )
    dtype = options.dtype or "auto"
    notes = _core.save_gguf(
        file,
        os.fspath(path),
        architecture,
        targets,
        dtype,
        "drop:blocks" in options.allow,
        _tokens(file),
        _config(file, modules, dtype),
        options.progress,
        options.cancel,
    )
    roots = [m.path for m in modules if m.use_rslora]
    if roots:
        some = f"{roots[0]!r}" + (f" and {len(roots) - 1} more" if len(roots) > 1 else "")
        notes.append(f"rsLoRA of {some}: GGUF has alpha / rank alone, so alpha is another number there")
    return notes


def _stacked(file: AdapterFile, base: Base) -> AdapterFile:
    """Experts that are modules of their own as the one that llama.cpp has."""
    groups: dict[str, dict[int, str]] = {}
    for m in file.modules:
        place = base.expert(m.path) if m.kind == "linear" else None
        if place is not None:
            groups.setdefault(place[0], {})[place[1]] = m.path
    for path, members in groups.items():
        count = base.experts or max(members) + 1
        left = [i for i in range(count) if i not in members]
        over = [i for i in members if i >= count]
        if left or over:
            got = f"no expert {left[0]}" if left else f"expert {over[0]}"
            raise UnsupportedVariantError(
                f"{file.file}: {path}: got {got}, expected all of {count} (base_config): llama.cpp has one "
                "tensor for all experts"
            )
    ordered = {path: [members[i] for i in sorted(members)] for path, members in groups.items()}
    return file.wrap(_core.gguf_stack(file, ordered)) if ordered else file


def _targets(file: AdapterFile, modules: list[FileModule], base: Base) -> dict[str, Place]:
    targets: dict[str, Place] = {}
    for m in modules:
        place = base.tensor(m.path)
        if place is None:
            raise FormatError(
                f"{file.file}: module {m.path!r} is none of {base.family.model_type} with {base.blocks} "
                "blocks (base_config), expected paths such as 'model.layers.0.self_attn.o_proj'"
            )
        if base.tied and place[0] in ("output.weight", "token_embd.weight"):
            raise UnsupportedVariantError(
                f"{file.file}: module {m.path!r}: the base ties its output layer to its embedding "
                "(tie_word_embeddings), and llama.cpp has one tensor for both"
            )
        inputs, outputs = _sizes(m.kind, m.shape_a, m.shape_b)
        base.check_shape(m.path, place[0], inputs, outputs)
        targets[m.path] = place
    return targets


def _config(file: AdapterFile, modules: list[FileModule], dtype: str) -> str | None:
    """Our settings, as the weights will be: with the one alpha of the file, and its dtype."""
    if file.config_json is None:
        return None
    alpha = _core.gguf_alpha(file, [m.path for m in modules])
    changes: dict[str, Any] = {"dtype": dtype} if dtype in ("f32", "f16", "bf16") else {}
    if any((m.alpha, m.use_rslora) != (alpha, False) for m in modules):
        changes |= {"alpha": alpha, "use_rslora": False, "module_alphas": {}}
    if not changes:
        return file.config_json
    return LoraConfig.from_json(file.config_json).replace(**changes).to_json()


def _tokens(file: AdapterFile) -> list[int] | None:
    """Tokens after which an activated LoRA acts, from a GGUF file's header or PEFT's configuration."""
    text = file.header.get(TOKENS)
    value = json.loads(text) if text else json.loads(file.peft_config or "{}").get("alora_invocation_tokens")
    if value is None:
        return None
    if not isinstance(value, list) or not all(isinstance(t, int) and 0 <= t < 2**32 for t in value):
        raise FormatError(f"{file.file}: alora_invocation_tokens: got {value!r}, expected a list of tokens")
    return value
