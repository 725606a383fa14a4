"""Base models as GGUF knows them: architecture, tensor names and head counts, from a ``config.json``.

The names of tensors come from the ``gguf`` package (``pip install 'microlora[gguf]'``), imported when a name
is asked for; which architectures store q and k in another order is the core's table.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol, cast

import microlora._core as _core
from microlora.exceptions import ConfigError, FormatError, MissingExtraError, ShapeError

__all__ = ["FAMILIES", "Base", "Family", "Place"]

_LEAVES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "embed_tokens")
_FUSED = ("qkv_proj", "o_proj", "gate_up_proj", "down_proj", "embed_tokens")
# One expert of several, as transformers names them.
_EXPERT = re.compile(r"(.+\.experts)\.([0-9]{1,6})\.(.+)")
_EXPERT_COUNTS = ("num_local_experts", "num_experts", "n_routed_experts")
# MLX calls stacked experts switch layers.
_SWITCH = re.compile(r"\.(mlp|block_sparse_moe)\.switch_mlp\.")


@dataclass(frozen=True)
class Family:
    """One ``model_type`` of Hugging Face: a row of :data:`FAMILIES`.

    Attributes:
        model_type: As in ``config.json``.
        architecture: Name in GGUF.
        tied: What ``tie_word_embeddings`` means where the configuration lacks it.
        leaves: Last part of module names in ``transformers``, where the package lists several.
    """

    model_type: str
    architecture: str
    tied: bool = False
    leaves: tuple[str, ...] = _LEAVES


# One row per model type. A new one needs its architecture in the core's table of row orders.
FAMILIES: dict[str, Family] = {
    row.model_type: row
    for row in (
        Family("arcee", "arcee"),
        Family("cohere", "command-r", tied=True),
        Family("cohere2", "cohere2", tied=True),
        Family("gemma", "gemma", tied=True),
        Family("gemma2", "gemma2", tied=True),
        Family("gemma3_text", "gemma3", tied=True),
        Family("granite", "granite"),
        Family("granitemoe", "granitemoe"),
        Family("llama", "llama"),
        Family("mistral", "llama"),
        Family("mixtral", "llama"),
        Family("nemotron", "nemotron"),
        Family("olmo", "olmo"),
        Family("olmo2", "olmo2"),
        Family("phi3", "phi3", leaves=_FUSED),
        Family("qwen2", "qwen2"),
        Family("qwen2_moe", "qwen2moe"),
        Family("qwen3", "qwen3"),
        Family("qwen3_moe", "qwen3moe"),
        Family("seed_oss", "seed_oss"),
        Family("smollm3", "smollm3", tied=True),
    )
}


class _NameMap(Protocol):
    mapping: Mapping[str, tuple[object, str]]


@lru_cache(maxsize=8)
def _names(architecture: str, blocks: int) -> _NameMap:
    """The package's map from names of every framework to tensors of one architecture."""
    try:
        gguf: Any = importlib.import_module("gguf")
    except ImportError as e:
        raise MissingExtraError("GGUF names need the gguf package: pip install 'microlora[gguf]'") from e
    arch = next((a for a, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture), None)
    if arch is None:
        raise ConfigError(
            f"base_config: architecture {architecture!r} is unknown to this gguf package; upgrade it"
        )
    return cast(_NameMap, gguf.get_tensor_name_map(arch, blocks))


Place = tuple[str, int | None]
"""A tensor or module, and the heads whose rows are stored in another order."""


@dataclass(frozen=True)
class Base:
    """What an adapter's names and rows depend on.

    Attributes:
        family: Row of :data:`FAMILIES`.
        blocks: Number of transformer blocks.
        heads: Query heads.
        kv_heads: Key and value heads.
        head_dim: Numbers per head.
        hidden: Width of the model.
        inner: Width of the feed-forward part, 0 where it is not one number.
        vocabulary: Rows of the embedding, 0 where it is not known.
        tied: The output layer is the embedding.
        experts: Experts of a mixture, 0 where the configuration has none.
    """

    family: Family
    blocks: int
    heads: int
    kv_heads: int
    head_dim: int
    hidden: int
    inner: int
    vocabulary: int
    tied: bool
    experts: int = 0

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Base:
        """Reads a ``config.json``.

        Raises:
            ConfigError: A model type that is not in :data:`FAMILIES`, or a number that is none.
        """
        kind = config.get("model_type")
        family = FAMILIES.get(kind) if isinstance(kind, str) else None
        if family is None:
            text = config.get("text_config")
            way = (
                "; of a multimodal model pass text_config, and modules under the names of the text model"
                if isinstance(text, Mapping) and text.get("model_type") in FAMILIES
                else ""
            )
            raise ConfigError(
                f"base_config.model_type: got {kind!r}, expected one of {', '.join(sorted(FAMILIES))}{way}"
            )

        def number(name: str, default: int | None = None) -> int:
            value = config.get(name)
            if value is None and default is not None:
                return default
            if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < 2**31:
                raise ConfigError(f"base_config.{name}: got {value!r}, expected a whole number of at least 1")
            return value

        heads, hidden = number("num_attention_heads"), number("hidden_size")
        tied = config.get("tie_word_embeddings")
        blocks = number("num_hidden_layers")
        if blocks > 10_000:
            raise ConfigError(f"base_config.num_hidden_layers: got {blocks}, expected at most 10000")
        return cls(
            family=family,
            blocks=blocks,
            heads=heads,
            kv_heads=number("num_key_value_heads", heads),
            head_dim=number("head_dim", max(1, hidden // heads)),
            hidden=hidden,
            inner=number("intermediate_size") if "intermediate_size" in config else 0,
            vocabulary=number("vocab_size") if "vocab_size" in config else 0,
            tied=family.tied if not isinstance(tied, bool) else tied,
            experts=next((number(name) for name in _EXPERT_COUNTS if name in config), 0),
        )

    @property
    def architecture(self) -> str:
        """Name in GGUF."""
        return self.family.architecture

    def tensor(self, path: str) -> Place | None:
        """The base tensor that a module's path means, with its heads; None where there is none."""
        names = _names(self.architecture, self.blocks).mapping
        plain = _SWITCH.sub(".mlp.experts.", path)
        found = names.get(plain)
        if found is None or (self.family.leaves is _FUSED and _split(found[1])):
            return None
        return (f"{found[1]}.weight", self._rotated(found[1]))

    def expert(self, path: str) -> tuple[str, int] | None:
        """The module of all experts that a module of one belongs to, and its number; None of any other."""
        found = _EXPERT.fullmatch(path)
        if found is None:
            return None
        stacked = f"{found[1]}.{found[3]}"
        place = self.tensor(stacked)
        return None if place is None or not place[0].endswith("_exps.weight") else (stacked, int(found[2]))

    def module(self, name: str) -> Place | None:
        """The path in ``transformers`` of a GGUF name without ``.weight``, with its heads; None if none."""
        names = _names(self.architecture, self.blocks).mapping
        if name not in names or names[name][1] != name:
            return None
        if name == "output":
            return ("lm_head", None)
        keys = [k for k, (_, tensor) in names.items() if tensor == name and _is_transformers(k)]
        known = [k for k in keys if k.rsplit(".", 1)[-1] in self.family.leaves]
        return (known[0], self._rotated(name)) if known else None

    def _rotated(self, name: str) -> int | None:
        if _core.gguf_interleaves(self.architecture) is False:
            return None
        part = name.rsplit(".", 1)[-1]
        return {"attn_q": self.heads, "attn_k": self.kv_heads}.get(part)

    def check_shape(self, path: str, tensor: str, inputs: int, outputs: int) -> None:
        """Refuses a module whose shape the base's tensor cannot have, where the configuration says it.

        Raises:
            ShapeError: llama.cpp would refuse the file.
        """
        want = self._shapes().get(tensor.removesuffix(".weight").rsplit(".", 1)[-1])
        if want is None or (want[0] in (0, inputs) and want[1] in (0, outputs)):
            return
        raise ShapeError(
            f"{path}: got (in, out) ({inputs}, {outputs}), expected {want} for {tensor} of base_config"
        )

    def _shapes(self) -> dict[str, tuple[int, int]]:
        """(in, out) of the tensors whose shapes follow from the configuration; 0 is not known."""
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        up = 2 * self.inner if self.family.leaves is _FUSED else self.inner
        return {
            "attn_q": (self.hidden, q),
            "attn_k": (self.hidden, kv),
            "attn_v": (self.hidden, kv),
            "attn_qkv": (self.hidden, q + 2 * kv),
            "attn_output": (q, self.hidden),
            "ffn_gate": (self.hidden, self.inner),
            "ffn_up": (self.hidden, up),
            "ffn_down": (self.inner, self.hidden),
            "token_embd": (self.vocabulary, self.hidden),
            "output": (self.hidden, self.vocabulary),
        }

    def places(self, names: Sequence[str], file: str) -> dict[str, Place]:
        """Path and heads of every GGUF name.

        Raises:
            FormatError: A name that is no tensor of this architecture, or past its last block.
        """
        found = {name: self.module(name) for name in names}
        for name, place in found.items():
            if place is None:
                raise FormatError(
                    f"{file}: module {name!r} is none of {self.family.model_type} with {self.blocks} blocks "
                    f"(base_config)"
                )
        return {name: place for name, place in found.items() if place is not None}


def _split(name: str) -> bool:
    return name.rsplit(".", 1)[-1] in ("attn_q", "attn_k", "attn_v", "ffn_gate")


def _is_transformers(key: str) -> bool:
    return key == "model.embed_tokens" or (
        key.startswith("model.layers.")
        and not key.startswith("model.layers.layers.")
        and (".self_attn." in key or ".mlp." in key)
    )
