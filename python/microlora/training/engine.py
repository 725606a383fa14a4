"""What the loops ask of learners, chains, the optimiser and EWC, in one place."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, cast

import microlora._core as _core
from microlora._core import Contrastive, FeedbackBase, Preference, Target
from microlora.adapter import Snapshot
from microlora.exceptions import ConfigError, DTypeError

if TYPE_CHECKING:
    from microlora.chain import LoraChain
    from microlora.ewc import EwcPlusPlus
    from microlora.micro_lora import MicroLoRA
    from microlora.training.config import TrainingConfig

__all__ = ["Trainee", "learner_of", "make_ewc", "make_optimizer", "restore", "snapshot", "state_bytes"]

Trainee = Any
"""A `MicroLoRA` or a `LoraChain`."""

State = Snapshot | bytes
"""What `snapshot` gives: a learner's costs no copy until its next step, a chain's is bytes."""


def is_chain(target: object) -> bool:
    """Whether ``target`` is a chain of layers."""
    return isinstance(target, _core.Chain)


def learner_of(target: Trainee) -> MicroLoRA:
    """The learner that holds the weights: the target itself, or a chain's.

    Raises:
        DTypeError: ``target`` is neither.
    """
    if isinstance(target, _core.MicroLora):
        return cast("MicroLoRA", target)
    if is_chain(target):
        # The public property refuses DoRA, whose factors mean nothing alone; here only dtypes are asked.
        return cast("LoraChain", target)._lora
    raise DTypeError(f"lora: got {type(target).__name__}, expected a MicroLoRA or a LoraChain")


def can_estimate(config: TrainingConfig, feedback: FeedbackBase) -> bool:
    """Whether the penalty can estimate importance from such feedback.

    ``"exact"`` and ``"sample"`` need a likelihood; the others take the observed gradient where there is none.
    """
    if config.ewc_kind == "mas" or config.fisher in ("auto", "empirical"):
        return True
    if isinstance(feedback, Target):
        return feedback.loss == "mse"
    return isinstance(feedback, Preference | Contrastive)


def make_optimizer(target: Trainee, config: TrainingConfig) -> _core.Optimizer:
    """An optimiser without moments yet."""
    return _core.Optimizer(target, config.optimizer.kind, **config.optimizer_kwargs())


def make_ewc(target: Trainee, config: TrainingConfig) -> EwcPlusPlus | None:
    """An EWC penalty without a task yet; None where the config turns it off."""
    if not config.ewc:
        return None
    from microlora.ewc import EwcPlusPlus

    return EwcPlusPlus(target, **config.ewc_kwargs())


def check_ewc(ewc: EwcPlusPlus, target: Trainee, config: TrainingConfig) -> None:
    """Refuses a given penalty of another learner, or settings of which it would follow none.

    Raises:
        ConfigError: Names what does not fit.
    """
    if getattr(ewc, "_target", target) is not target:
        raise ConfigError("ewc: got one of another learner, expected that of the learner to train")
    own = ewc.settings
    names = {"ewc_lambda": "ewc_lambda", "ewc_kind": "kind", "online_ewc_gamma": "gamma", "fisher": "fisher"}
    for item in dataclasses.fields(config):
        came = getattr(config, item.name)
        if item.name in names and came != item.default and came != own[names[item.name]]:
            raise ConfigError(
                f"{item.name}: got {came!r} beside ewc=, whose {names[item.name]} is "
                f"{own[names[item.name]]!r}, expected {item.default!r}: the given one keeps its own"
            )


def follow_ewc(ewc: EwcPlusPlus | None, config: TrainingConfig) -> TrainingConfig:
    """The settings with the kind and the Fisher of the penalty that acts."""
    if ewc is None:
        return config
    return config.replace(ewc_kind=ewc.settings["kind"], fisher=ewc.settings["fisher"])


def snapshot(target: Trainee) -> State:
    """The weights and all that learning remembers."""
    if is_chain(target):
        return cast("LoraChain", target).snapshot()
    return learner_of(target).snapshot()


def restore(target: Trainee, state: State) -> None:
    """Goes back to a snapshot, or to the bytes of one; whole or not at all."""
    if is_chain(target):
        cast("LoraChain", target).restore(state_bytes(state))
    else:
        learner_of(target).restore(Snapshot(state) if isinstance(state, bytes) else state)


def shape_of(target: Trainee) -> str:
    """Modules, widths and ranks, as a checkpoint must have them."""
    lora = learner_of(target)
    parts = [
        f"{name} {lora[name].in_features} -> {lora[name].out_features} rank {lora[name].rank}"
        for name in lora.modules()
    ]
    return ", ".join(parts)


def state_bytes(state: State) -> bytes:
    """A snapshot as bytes."""
    return state if isinstance(state, bytes) else state.to_bytes()


def storage_of(target: Trainee) -> str:
    """The storage dtype of all modules.

    Raises:
        ConfigError: They differ, so that it could not be put back after a run.
    """
    lora = learner_of(target)
    dtypes = {lora[name].dtype for name in lora.modules()}
    if len(dtypes) != 1:
        raise ConfigError(f"mixed_precision: got modules of {', '.join(sorted(dtypes))}, expected one dtype")
    return dtypes.pop()
