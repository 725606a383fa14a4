"""What the loops ask of the compiled core, in one place: an optimiser, an evaluation, an EWC penalty."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol, cast

import numpy as np

import microlora._core as _core
from microlora.exceptions import ConfigError, DTypeError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from microlora.micro_lora import MicroLoRA
    from microlora.progress import CancelToken, Progress
    from microlora.training.config import TrainingConfig

    Array = NDArray[Any]

__all__ = [
    "Ewc",
    "Optimizer",
    "evaluate",
    "lora_of",
    "make_ewc",
    "make_optimizer",
    "restore_from",
    "set_storage",
]


class Optimizer(Protocol):
    """The core's optimiser: moments per module, and the loops over them."""

    @property
    def steps(self) -> int:
        """Steps made so far."""

    def step(
        self, lora: Any, lr: float, *, max_grad_norm: float | None = None, ewc: Any = None
    ) -> tuple[int, float]:
        """Applies what `adapt` accumulated: (events, gradient norm)."""

    def train(
        self,
        target: Any,
        x: Array,
        y: Array,
        order: Array,
        lrs: Array,
        *,
        batch_size: int,
        accumulation: int = 1,
        modules: Sequence[str] | None = None,
        weights: Array | None = None,
        base: Array | None = None,
        max_grad_norm: float | None = None,
        ewc: Any = None,
        progress: Progress | None = None,
        cancel: CancelToken | None = None,
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Steps over rows: (loss of each step, gradient norm of each step)."""

    def to_bytes(self) -> bytes:
        """Moments and step count."""

    def restore(self, data: bytes) -> None:
        """Goes on from `to_bytes`."""


class Ewc(Protocol):
    """What the loops use of `EwcPlusPlus`."""

    @property
    def task_count(self) -> int:
        """Tasks that are anchored."""

    def accumulate_fisher(self, x: Any, feedback: Any, module: str | None = None, base: Any = None) -> Any:
        """Adds samples of the present task."""

    def start_new_task(self) -> None:
        """Anchors the present weights."""

    def export_state(self) -> bytes:
        """All of it."""

    def import_state(self, data: bytes) -> None:
        """Goes on from `export_state`."""


def is_chain(target: object) -> bool:
    """Whether ``target`` is a chain of layers."""
    chain = getattr(_core, "Chain", None)
    return chain is not None and isinstance(target, chain)


def lora_of(target: Any) -> MicroLoRA:
    """The learner that is trained: the target itself, or a chain's.

    Raises:
        DTypeError: ``target`` is neither.
    """
    if isinstance(target, _core.MicroLora):
        return cast("MicroLoRA", target)
    if is_chain(target):
        return cast("MicroLoRA", target.lora)
    raise DTypeError(f"lora: got {type(target).__name__}, expected a MicroLoRA or a LoraChain")


def make_optimizer(target: Any, config: TrainingConfig) -> Optimizer:
    """An optimiser without moments yet."""
    made = cast(Any, _core).Optimizer(target, config.optimizer.kind, **config.optimizer_kwargs())
    return cast(Optimizer, made)


def make_ewc(target: Any, config: TrainingConfig) -> Ewc | None:
    """An EWC penalty without a task yet; None where the config turns it off."""
    if not config.ewc:
        return None
    import microlora

    return cast(Ewc, cast(Any, microlora).EwcPlusPlus(target, **config.ewc_kwargs()))


def evaluate(target: Any, x: Array, y: Array, **options: Any) -> NDArray[np.float32]:
    """Loss per row; nothing is learned."""
    return cast("NDArray[np.float32]", cast(Any, _core).evaluate(target, x, y, **options))


def restore_from(target: Any, snapshot: bytes) -> None:
    """Puts the weights and the learner's state of a snapshot's bytes back."""
    from microlora.adapter import Snapshot

    lora_of(target).restore(Snapshot(snapshot))


def storage_of(target: Any) -> str:
    """The storage dtype of all modules.

    Raises:
        ConfigError: They differ, so that it could not be put back after a run.
    """
    lora = lora_of(target)
    dtypes = {lora[name].dtype for name in lora.modules()}
    if len(dtypes) != 1:
        raise ConfigError(f"mixed_precision: got modules of {', '.join(sorted(dtypes))}, expected one dtype")
    return dtypes.pop()


def set_storage(target: Any, dtype: str) -> None:
    """What the forward pass reads; the float32 masters stay."""
    cast(Any, lora_of(target)).set_storage(dtype)
