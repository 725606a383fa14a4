"""A base model, as far as its `config.json` or the header of its weights tells its layers."""

from __future__ import annotations

import os
import struct
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from microlora._checks import read_json, wrong
from microlora._file_checks import read_document, regular, there
from microlora.doctor.names import template
from microlora.exceptions import FormatError
from microlora.formats.limits import Limits

__all__ = ["Base", "nearest", "read_base"]

INDEX, WEIGHTS, CONFIG = "model.safetensors.index.json", "model.safetensors", "config.json"
WANT = f"the base's directory, {CONFIG}, safetensors file or index"
#: Families whose decoder layers have Llama's names and shapes.
# fmt: off
LLAMA_LIKE = frozenset((
    "llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "smollm3", "granite",
    "cohere", "olmo", "olmo2", "starcoder2", "stablelm",
))
# fmt: on
#: Kinds of layers that are looked up by spelling, and among how many: each costs time.
MOST_KINDS, MOST_NAMES = 20, 2000
FLOATS = ("F64", "F32", "F16", "BF16")


@dataclass(frozen=True)
class Base:
    """What is known of a base model.

    Attributes:
        source: Where it comes from, for messages.
        modules: Weight shape (out, in) by module path, None where it is not known.
        layers: Number of decoder layers, or None.
        complete: Whether every module of the model is in ``modules``.
        name: Name that the configuration gives itself.
        widths: Shapes (out, in) by short module name, for models whose paths are not known.
        config: Its ``config.json``, where there was one.
    """

    source: str
    modules: Mapping[str, tuple[int, ...] | None]
    layers: int | None = None
    complete: bool = True
    name: str = ""
    widths: Mapping[str, tuple[int, int]] | None = None
    config: Mapping[str, Any] | None = None


def read_base(base: object, limits: Limits) -> Base:
    """A base model from a mapping, a file or a directory.

    Args:
        base: ``config.json`` as a mapping, or ``{tensor name: shape}``; a path of a ``config.json``, of a
            safetensors file, of a shard index, or of the directory that they lie in.
        limits: For headers.

    Raises:
        FormatError: None of these.
        ConfigError: Not a path or a mapping.
        MissingPathError: There is no such file or directory.
        OSError: It cannot be read.
    """
    if isinstance(base, Mapping):
        return _of_mapping(base, "base")
    if not isinstance(base, str | os.PathLike):
        raise wrong("base", base, "a path, a config.json as a mapping, or {tensor name: shape}")
    path = Path(there("base", base, WANT))
    if not path.is_dir():
        return _of_file(path, limits)
    config = _json(path / CONFIG) if (path / CONFIG).is_file() else {}
    for name in (INDEX, WEIGHTS):
        if (path / name).is_file():
            found = _of_file(path / name, limits)
            rest = _of_mapping(config, str(path)) if config else found
            return Base(found.source, found.modules, rest.layers, True, rest.name, config=rest.config)
    if not config:
        raise FormatError(f"{path}: base: no {CONFIG}, {WEIGHTS} or {INDEX} in this directory")
    return _of_mapping(config, str(path / CONFIG))


def _of_file(path: Path, limits: Limits) -> Base:
    with open(regular("base", path, WANT), "rb") as file:
        head = file.read(9)
    if len(head) == 9 and head[8:] == b"{" and head[:1] != b"{":
        return _of_tensors(header_shapes(path, limits), str(path))
    value = _json(path)
    index = value.get("weight_map")
    if not isinstance(index, dict):
        return _of_mapping(value, str(path))
    shapes: dict[str, tuple[int, ...] | None] = dict.fromkeys(map(str, index))
    for name in sorted({str(shard) for shard in index.values()}):
        shard = path.parent / Path(name).name
        if shard.is_file():
            shapes.update(header_shapes(shard, limits))
    return _of_tensors(shapes, str(path))


def header_shapes(path: Path, limits: Limits) -> dict[str, tuple[int, ...] | None]:
    """Shapes of float tensors by name, None for packed ones, from a safetensors header alone."""
    with path.open("rb") as file:
        head = file.read(8)
        size = struct.unpack("<Q", head)[0] if len(head) == 8 else 0
        if not 2 <= size <= limits.header_bytes:
            raise FormatError(f"{path}: base: header of {size} bytes, expected 2 to {limits.header_bytes}")
        text = file.read(size)
    try:
        value = read_json("header", text)
        rows = {k: v for k, v in value.items() if k != "__metadata__"}
        return {k: tuple(map(int, v["shape"])) if v["dtype"] in FLOATS else None for k, v in rows.items()}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as e:
        raise FormatError(f"{path}: base: not a safetensors header: {e}") from None


def _json(path: Path) -> dict[str, Any]:
    return read_document("base", path, WANT, nonfinite=True)


def _of_mapping(value: Mapping[str, Any], source: str) -> Base:
    if value and all(isinstance(v, list | tuple) and all(type(n) is int for n in v) for v in value.values()):
        return _of_tensors({k: tuple(v) for k, v in value.items()}, source)
    if isinstance(value.get("weight_map"), Mapping):
        return _of_tensors(dict.fromkeys(map(str, value["weight_map"])), source)
    return _of_config(value, source)


def _of_tensors(shapes: Mapping[str, tuple[int, ...] | None], source: str) -> Base:
    modules: dict[str, tuple[int, ...] | None] = {}
    for name, shape in shapes.items():
        path, _, last = name.rpartition(".")
        if path and last in ("weight", "qweight", "weight_packed"):
            modules[path] = shape if last == "weight" else None
    if not modules:
        raise FormatError(f"{source}: base: no tensor named <module>.weight")
    return Base(source, modules)


def _of_config(config: Mapping[str, Any], source: str) -> Base:
    text = config.get("text_config")
    inner = text if isinstance(text, Mapping) else config
    layers, hidden = (_count(inner, key) for key in ("num_hidden_layers", "hidden_size"))
    if layers is None and hidden is None:
        raise FormatError(
            f"{source}: base: no num_hidden_layers and no hidden_size: not a config.json of a model"
        )
    name = str(config.get("_name_or_path") or "")
    kind = str(inner.get("model_type") or "")
    widths = _widths(inner) if kind in LLAMA_LIKE else None
    if widths is None or layers is None or inner is not config:
        return Base(source, {}, layers, False, name, widths, config)
    modules: dict[str, tuple[int, ...] | None] = {"model.embed_tokens": None, "lm_head": None}
    for layer in range(min(layers, 4096)):
        for short, shape in widths.items():
            part = "self_attn" if short in ("q_proj", "k_proj", "v_proj", "o_proj") else "mlp"
            modules[f"model.layers.{layer}.{part}.{short}"] = shape
    return Base(source, modules, layers, False, name, widths, config)


def _widths(config: Mapping[str, Any]) -> dict[str, tuple[int, int]] | None:
    hidden, heads = _count(config, "hidden_size"), _count(config, "num_attention_heads")
    inner = _count(config, "intermediate_size")
    if hidden is None or heads is None:
        return None
    size = _count(config, "head_dim") or hidden // heads
    queries, values = heads * size, (_count(config, "num_key_value_heads") or heads) * size
    out = {
        "q_proj": (queries, hidden),
        "k_proj": (values, hidden),
        "v_proj": (values, hidden),
        "o_proj": (hidden, queries),
    }
    if inner is not None and config.get("model_type") != "starcoder2":
        out |= {"gate_proj": (inner, hidden), "up_proj": (inner, hidden), "down_proj": (hidden, inner)}
    return out


def _count(config: Mapping[str, Any], key: str) -> int | None:
    value = config.get(key)
    return value if type(value) is int and value > 0 else None


def nearest(
    unknown: Iterable[str], base: Base, taken: Iterable[str] = ()
) -> tuple[dict[str, str], tuple[str, str] | None]:
    """For names that a base lacks: the nearest it has, and the one change of their beginning that mends all.

    Two names are near when they end in the same parts; the longest common end that one module alone has
    counts. Where nothing ends alike, the most similar spelling does. Names that are ``taken`` by other
    modules are not proposed, and a change must leave the layer's number behind it as it is.
    """
    ends: dict[str, list[str]] = {}
    gone = set(taken)
    known = [path for path in base.modules if path not in gone]
    for path in known:
        parts = path.split(".")
        for i in range(len(parts)):
            ends.setdefault(".".join(parts[i:]), []).append(path)
    found: dict[str, str] = {}
    changes: Counter[tuple[str, str]] = Counter()
    unknown = list(unknown)
    for path in unknown:
        parts = path.split(".")
        for i in range(len(parts)):
            end = ".".join(parts[i:])
            if len(ends.get(end, ())) == 1:
                found[path] = ends[end][0]
                if not any(part.isdecimal() for part in parts[:i]):
                    changes[path.removesuffix(end), found[path].removesuffix(end)] += 1
                break
    _by_spelling([path for path in unknown if path not in found], known, found)
    whole = [change for change, n in changes.items() if n == len(unknown)]
    return found, whole[0] if whole else None


def _by_spelling(lost: Iterable[str], known: Iterable[str], found: dict[str, str]) -> None:
    """Adds the known names of the most similar spelling; layers are compared by kind, numbers stay."""
    import difflib  # only when something is already wrong

    have = set(known)
    kinds = sorted({template(path)[0] for path in have})
    near: dict[str, list[str]] = {}
    for path in lost:
        kind, layer = template(path)
        if kind not in near and (len(near) == MOST_KINDS or len(kinds) > MOST_NAMES):
            continue
        if kind not in near:
            near[kind] = difflib.get_close_matches(kind, kinds, n=1, cutoff=0.6)
        for close in near[kind]:
            name = close if layer is None else close.replace("*", str(layer), 1)
            if name in have:
                found[path] = name
