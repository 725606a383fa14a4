"""The learner that a loop is made with, and whether settings, learner and encoders agree."""

from __future__ import annotations

from microlora.config import LoraConfig
from microlora.exceptions import ConfigError
from microlora.micro_lora import MicroLoRA
from microlora.sona.config import SonaConfig
from microlora.sona.text import Encoders

__all__ = ["dims_of", "learner"]


def learner(config: SonaConfig, lora: MicroLoRA | None, encoders: Encoders) -> tuple[SonaConfig, MicroLoRA]:
    """The settings with the widths that hold, and the live learner: the given one, or a new one.

    Raises:
        ConfigError: A learner of other settings or widths, or no widths.
    """
    if lora is not None:
        _check_same(config.learner, lora.config)
        dims = dims_of(lora)
        given = None
        if config.hidden_dim is not None or config.dims is not None:
            given = config.learner.resolve_dims(config.hidden_dim, config.dims)
        if given not in (None, dims):
            raise ConfigError(f"lora: got modules of {dims}, expected {given} as in the config")
        return (config if given is not None else config.replace(dims=dims)), lora
    if config.hidden_dim is None and config.dims is None:
        if encoders.widths is None:
            raise ConfigError(
                "config: got neither hidden_dim nor dims, expected one of them, an encoder or a learner"
            )
        config = config.replace(dims=dict.fromkeys(config.lora.target_modules, encoders.widths))
    made = MicroLoRA(config.learner, hidden_dim=config.hidden_dim, dims=config.dims, seed=config.seed)
    return config, made


def _check_same(wanted: LoraConfig, came: LoraConfig) -> None:
    ours, theirs = wanted.to_dict(), came.to_dict()
    for free in ("name", "description", "tags"):
        del ours[free], theirs[free]
    other = [f"{key} {theirs[key]!r} beside {value!r}" for key, value in ours.items() if theirs[key] != value]
    if other:
        raise ConfigError(
            f"lora: got a learner with {', '.join(other)} in the config, expected the same settings: "
            "SonaConfig(lora=lora.config)"
        )


def dims_of(lora: MicroLoRA) -> dict[str, tuple[int, int]]:
    """``{module: (in_features, out_features)}`` of a learner."""
    return {name: (lora[name].in_features, lora[name].out_features) for name in lora.modules()}
