"""Types of factors: what there is, what fits a width, and the ways to say which one is wanted."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

import microlora._core as _core
from microlora._checks import choice, near
from microlora.exceptions import ConfigError, DTypeError, NonFiniteError

__all__ = ["BLOCKS", "RECIPES", "SIDES", "BlockType", "Pair", "asked", "fitting", "size_of", "stored"]

Floats = NDArray[np.float32]

#: The two factors of a module, as files call them.
SIDES = ("lora_a", "lora_b")
#: Bytes of one number of the types without blocks.
PLAIN = {"f32": 4, "f16": 2, "bf16": 2}


class BlockType(NamedTuple):
    """A type that stores blocks of numbers.

    Attributes:
        name: Such as ``"q4_k"``.
        ggml: Its number in GGUF files.
        elements: Numbers per block.
        bytes: Bytes per block.
    """

    name: str
    ggml: int
    elements: int
    bytes: int


#: Every block type by name, most exact first.
BLOCKS: Mapping[str, BlockType] = {row[0]: BlockType(*row) for row in _core.block_types()}


class Pair(NamedTuple):
    """Types of the two factors of a module."""

    lora_a: str
    lora_b: str


#: Pairs that have a name. A width that does not fit moves a factor on to the next type that does.
RECIPES: Mapping[str, Pair] = {
    **{name: Pair(name, name) for name in (*BLOCKS, *PLAIN)},
    "q4_k_m": Pair("q4_k", "q6_k"),
}


def _recipe(field: str, value: object) -> Pair:
    """A pair of types from a name, in small or capital letters."""
    if isinstance(value, str):
        value = value.lower()
    return RECIPES[choice(field, value, tuple(RECIPES))]


def _type(field: str, value: object) -> str:
    if isinstance(value, str):
        value = value.lower()
    return choice(field, value, (*BLOCKS, *PLAIN))


def _pair(field: str, value: object) -> Pair:
    """From a name, a pair of names, or a mapping from both factors."""
    if isinstance(value, Mapping):
        if set(value) != set(SIDES):
            raise ConfigError(f"{field}: got keys {sorted(map(str, value))}, expected lora_a and lora_b")
        return Pair(*(_type(f"{field}[{side!r}]", value[side]) for side in SIDES))
    if isinstance(value, tuple | list) and len(value) == 2:
        return Pair(*(_type(f"{field}[{i}]", item) for i, item in enumerate(value)))
    return _recipe(field, value)


def asked(value: object, modules: Iterable[str]) -> dict[str, Pair]:
    """The pair that is wanted for every module.

    Args:
        value: A name for all factors; ``{"lora_a": name, "lora_b": name}`` for all modules; or
            ``{module: name, pair or such a mapping}``, in which ``"*"`` stands for all other modules.
        modules: Names of the adapter's modules.

    Raises:
        ConfigError: A name that is unknown, or a module without a type.
        DTypeError: Neither a name nor a mapping.
    """
    names = list(modules)
    if isinstance(value, str):
        return dict.fromkeys(names, _recipe("type", value))
    if not isinstance(value, Mapping):
        raise DTypeError(
            f"type: got {type(value).__name__}, expected a name, a QuantizationProfile or a mapping"
        )
    if value and set(value) <= set(SIDES) and not set(value) & set(names):
        return dict.fromkeys(names, _pair("type", value))
    for key in value:
        if key != "*" and key not in names:
            hint = near(key, names) if isinstance(key, str) else ""
            raise ConfigError(
                f"type: got module {key!r}, expected '*' or one of {', '.join(names[:9])}{hint}"
            )
    out = {}
    for name in names:
        if name not in value and "*" not in value:
            raise ConfigError(f"type: got nothing for module {name!r}, expected its type or one for '*'")
        key = name if name in value else "*"
        out[name] = _pair(f"type[{key!r}]", value[key])
    return out


def fitting(wanted: str, width: int, dtype: str) -> str:
    """The type that rows of ``width`` numbers get where ``wanted`` is asked for.

    Rows must be whole blocks: types in blocks of 256 give way to ``q8_0``, types in blocks of 32 to the 16
    bits that the factor has already, or float16.

    Args:
        wanted: A type.
        width: Numbers in a row.
        dtype: How the factor is stored now.
    """
    if wanted in PLAIN or width % BLOCKS[wanted].elements == 0:
        return wanted
    if BLOCKS[wanted].elements > 32 and width % BLOCKS["q8_0"].elements == 0:
        return "q8_0"
    return dtype if dtype in ("f16", "bf16") else "f16"


def candidates(width: int, dtype: str) -> list[str]:
    """Types that rows of this width may have: blocks that fit, and 16 bits."""
    return [t for t in BLOCKS if width % BLOCKS[t].elements == 0] + [dtype if dtype == "bf16" else "f16"]


def size_of(kind: str, shape: tuple[int, int]) -> int:
    """Bytes of a (rows, width) factor as it is stored, without padding."""
    rows, width = shape
    if kind in PLAIN:
        return PLAIN[kind] * rows * width
    return BLOCKS[kind].bytes * (width // BLOCKS[kind].elements) * rows


@dataclass(frozen=True)
class Name:
    """What errors call a factor."""

    module: str
    side: str

    def __str__(self) -> str:
        return f"module {self.module}, {self.side}"


def stored(x: Floats, kind: str, name: Name) -> Floats:
    """The numbers that come back when ``x`` (rows, width) is stored as ``kind``.

    Raises:
        NonFiniteError: Numbers too large for the type.
    """
    if kind in BLOCKS:
        try:
            data = _core.quantize_blocks(x, kind)
        except NonFiniteError as e:
            raise NonFiniteError(f"{name}: {str(e).removeprefix('x: ')}") from None
        return _core.dequantize_blocks(data, kind, *x.shape)
    if kind == "f32":
        return x
    if kind == "bf16":
        bits = x.view(np.uint32).astype(np.uint64)
        return (((bits + 0x7FFF + (bits >> 16 & 1)) >> 16 << 16).astype(np.uint32)).view(np.float32)
    with np.errstate(over="ignore"):
        back = x.astype(np.float16).astype(np.float32)
    if not np.isfinite(back).all():
        raise NonFiniteError(f"{name}: holds numbers too large for {kind}")
    return back
