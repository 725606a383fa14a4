"""What the keys of a weights file say, read leniently: the doctor has to understand broken ones."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

__all__ = ["PREFIX", "Key", "key_of", "ours", "template"]

#: What PEFT puts before a module's path.
PREFIX = "base_model.model."

#: Marks of tensors that are not plain LoRA on linear layers: the variant, and what it is.
MARKS = {
    "lora_embedding_A": "embedding",
    "lora_embedding_B": "embedding",
    "lora_magnitude_vector": "dora",
    "lora_diag": "kasa",
    "lora_monteclora_sampler": "monteclora",
    "token_adapter": "trainable_tokens",
    "trainable_tokens_delta": "trainable_tokens",
    "modules_to_save": "modules_to_save",
}
#: Marks of other writers' keys, which a file of PEFT's has not.
FOREIGN = ("lora_down", "lora_up", "hada_w1_a", "lokr_w1", "lora_linear_layer", "lora.down", "lora.up")


@dataclass(frozen=True)
class Key:
    """One key of a weights file.

    Attributes:
        name: The key itself.
        prefix: How often PEFT's prefix stands before the path.
        path: Path of the module, without prefix.
        factor: ``"A"``, ``"B"``, or empty for what is no factor.
        adapter: Name of an adapter left between factor and ``weight``.
        variant: Kind of a tensor that belongs to no plain LoRA on a linear layer.
        tail: What stands after the path.
    """

    name: str
    prefix: int = 0
    path: str = ""
    factor: str = ""
    adapter: str = ""
    variant: str = ""
    tail: str = ""

    def written(self) -> str:
        """The key as PEFT writes it: one prefix, no adapter's name."""
        return f"{PREFIX}{self.path}.{self.tail}" if self.path else self.name


def key_of(name: str) -> Key:
    """Understands a key of PEFT's, with what writers leave in it by mistake."""
    rest, prefix = name, 0
    while rest.startswith(PREFIX):
        rest, prefix = rest[len(PREFIX) :], prefix + 1
    parts = rest.split(".")
    if "lora_velora_embed" in parts:
        return Key(name, prefix, variant="training")
    for i in reversed(range(len(parts))):
        part = parts[i]
        head, after = ".".join(parts[:i]), parts[i + 1 :]
        if part in ("lora_A", "lora_B") and head and after:
            # `lora_A.weight`, `lora_A.<adapter>.weight`, and `lora_B.bias` of lora_bias.
            adapter, last = ".".join(after[:-1]), after[-1]
            if last == "weight" and len(after) <= 2:
                variant = "target_parameters" if parts[i - 1] == "base_layer" else ""
                return Key(name, prefix, head, part[-1], adapter, variant, f"{part}.weight")
            if last == "bias" and part == "lora_B" and len(after) <= 2:
                return Key(name, prefix, head, "", adapter, "lora_bias", "lora_B.bias")
        if part in ("lora_embedding_A", "lora_embedding_B") and head and len(after) <= 1:
            return Key(name, prefix, head, part[-1], ".".join(after), "embedding", part)
        if part in MARKS and head:
            adapter = after[0] if part == "lora_magnitude_vector" and after and after[0] != "weight" else ""
            return Key(name, prefix, head, "", adapter, MARKS[part], ".".join([part, *after]))
    if rest.endswith(".base_layer.bias"):
        return Key(
            name, prefix, rest.removesuffix(".base_layer.bias"), variant="bias", tail="base_layer.bias"
        )
    return Key(name, prefix)


def ours(name: str) -> Key:
    """Understands a key of our single file, or of a flat one."""
    for end in (".lora_a", ".lora_b"):
        if name.endswith(end) and len(name) > len(end):
            return Key(name, 0, name[: -len(end)], end[-1].upper(), tail=end[1:])
    return Key(name)


def is_foreign(name: str) -> bool:
    """Whether a key is of a writer other than PEFT (Kohya, diffusers, LyCORIS)."""
    return any(mark in name for mark in FOREIGN)


def template(path: str) -> tuple[str, int | None]:
    """A path with its first number replaced, and that number: the layer that it is in."""
    parts = path.split(".")
    for i, part in enumerate(parts):
        if part.isdecimal() and len(part) < 7:
            return ".".join([*parts[:i], "*", *parts[i + 1 :]]), int(part)
    return path, None


def shown(names: Iterable[str], most: int = 5) -> str:
    """Names for a line of text: the first few, and how many more."""
    all_names = list(names)
    more = f" and {len(all_names) - most} more" if len(all_names) > most else ""
    return ", ".join(all_names[:most]) + more
