"""Which layers an adapter has: the nine short names, and full module paths."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from enum import StrEnum
from typing import Any

from microlora._checks import near, text, wrong
from microlora.exceptions import ConfigError


class TargetModule(StrEnum):
    """The projections of a transformer block that adapters are usually put on.

    A member is a ``str``: ``TargetModule.Q_PROJ == "q_proj"``. The four class methods are common choices,
    from the cheapest to the widest.
    """

    Q_PROJ = "q_proj"
    K_PROJ = "k_proj"
    V_PROJ = "v_proj"
    O_PROJ = "o_proj"
    GATE_PROJ = "gate_proj"
    UP_PROJ = "up_proj"
    DOWN_PROJ = "down_proj"
    EMBED = "embed"
    LM_HEAD = "lm_head"

    @classmethod
    def _missing_(cls, value: object) -> Any:
        names = [member.value for member in cls]
        hint = near(value, names) if isinstance(value, str) else ""
        raise wrong("target module", value, f"one of {', '.join(names)}{hint}")

    @classmethod
    def speed(cls) -> tuple[TargetModule, ...]:
        """q_proj: one module, the least work per token."""
        return (cls.Q_PROJ,)

    @classmethod
    def quality(cls) -> tuple[TargetModule, ...]:
        """q_proj and v_proj: the choice of the LoRA paper (arXiv 2106.09685), and the default."""
        return (cls.Q_PROJ, cls.V_PROJ)

    @classmethod
    def attention(cls) -> tuple[TargetModule, ...]:
        """The four projections of attention: q, k, v, o."""
        return (cls.Q_PROJ, cls.K_PROJ, cls.V_PROJ, cls.O_PROJ)

    @classmethod
    def mlp(cls) -> tuple[TargetModule, ...]:
        """The three projections of a gated feed-forward block: gate, up, down."""
        return (cls.GATE_PROJ, cls.UP_PROJ, cls.DOWN_PROJ)


def check_module_name(field: str, value: object) -> str:
    """``value`` as a module name: a short name or a dotted path, e.g. ``model.layers.3.self_attn.q_proj``.

    Any name is legal that a module of a model can have, so short names outside `TargetModule` (``c_attn``,
    ``query_key_value``) are too.

    Raises:
        ConfigError: no string, empty, an empty part between dots, blanks, commas or control characters.
    """
    name = text(field, value, empty=False)
    if any(char.isspace() or char == "," or not char.isprintable() for char in name):
        raise wrong(field, name, "a module name without blanks, commas or control characters")
    if not all(name.split(".")):
        raise wrong(field, name, "a dotted path without empty parts")
    return name


def parse_targets(value: object, field: str = "target_modules") -> tuple[str, ...]:
    """Module names from what people write.

    Args:
        value: A `TargetModule`, one string with names between commas (``"q_proj,v_proj"``), or a list or
            tuple of names. The order is kept.
        field: What the message calls the argument.

    Returns:
        Plain strings, at least one, none twice.

    Raises:
        ConfigError: empty, a duplicate, or a name that no module can have.
    """
    want = "a list, tuple or comma-separated string of module names"
    if isinstance(value, str):
        parts: list[object] = [part.strip() for part in value.split(",")]
    elif isinstance(value, Iterable) and not isinstance(value, bytes | bytearray | Mapping | set | frozenset):
        parts = list(value)
    else:
        raise wrong(field, value, want)
    if not parts or parts == [""]:
        raise wrong(field, value, "at least one module name")
    names = tuple(check_module_name(f"{field}[{i}]", part) for i, part in enumerate(parts))
    for i, name in enumerate(names):
        if name in names[:i]:
            raise ConfigError(f"{field}: {name!r} appears twice, expected every module once")
    return names
