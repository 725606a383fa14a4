"""The public loop: an adapter that serves and learns on three time scales."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from types import MethodType, TracebackType
from typing import TYPE_CHECKING, Any, NoReturn, Self

import microlora._core as _core
from microlora._core import AdaptationResult
from microlora.adapter import Adapter
from microlora.exceptions import ConfigError, DTypeError
from microlora.hot_swap import HotSwapManager
from microlora.micro_lora import MicroLoRA
from microlora.sona import making, processes, state, telemetry
from microlora.sona.background import GOES_ON, Background
from microlora.sona.config import SonaConfig
from microlora.sona.stats import SonaStats
from microlora.sona.text import Encoders

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from microlora.encoders.protocol import TextEncoder
    from microlora.files import PathLike
    from microlora.progress import CancelToken, Progress
    from microlora.sona.deep import DeepResult
    from microlora.sona.diagnose import Finding

__all__ = ["SonaLoop"]

EventHook = Callable[["AdaptationResult | DeepResult"], object]

_log = logging.getLogger("microlora.sona")


class SonaLoop(_core.Sona):
    """An adapter that learns from every event, consolidates in the background and trains on what is kept.

    * **instant**: `instant_adapt` learns from one event in microseconds; the next `forward` sees it.
    * **background**: `maybe_background`, or the thread of `start`, brings what was learned lately together
      with what was learned before, and keeps the result only where a held-out loss does not rise. Versions
      that pass are published to `manager`.
    * **deep**: `deep_optimize` trains on what is remembered, under the same gate.

    Events are vectors, or texts where there is an encoder. Any number of threads may read and learn.

    Args:
        config: Settings; None takes the defaults, with the settings of ``lora`` where one is given.
        encoder: Turns texts into inputs; without it ``x`` must be a vector. Where the config has neither
            ``hidden_dim`` nor ``dims`` its width is that of every module.
        response_encoder: Turns responses into vectors of the outputs' width; None takes ``encoder``.
        lora: A learner to go on from, with the settings ``config.learner``. From now on it must learn through
            this loop alone. None makes a new one.
        on_event: Called with every `AdaptationResult`, in the thread that made it. What it raises is logged.

    Raises:
        ConfigError: Settings that do not fit each other, or no widths for the modules.
        ShapeError: An encoder whose width no module has.
        DTypeError: An argument of another type.

    Example:
        >>> import numpy as np, microlora as ml
        >>> loop = ml.SonaLoop(ml.SonaConfig.for_hidden_dim(64).low_latency())
        >>> x, wanted = np.ones(64, np.float32), np.full(64, 0.5, np.float32)
        >>> loop.instant_adapt(x, ml.Target(wanted)).applied
        True
    """

    _config: SonaConfig
    _lora: MicroLoRA
    _manager: HotSwapManager
    _encoders: Encoders
    _background: Background
    _on_event: EventHook | None
    _told: int
    _deep_lock: threading.Lock
    _install_lock: threading.Lock
    _fisher: bytes | None

    def __new__(
        cls,
        config: SonaConfig | None = None,
        encoder: TextEncoder | None = None,
        response_encoder: TextEncoder | None = None,
        lora: MicroLoRA | None = None,
        on_event: EventHook | None = None,
    ) -> Self:
        """Makes a loop; see the class."""
        if not (lora is None or isinstance(lora, MicroLoRA)):
            raise DTypeError(f"lora: got {type(lora).__name__}, expected a MicroLoRA or None")
        if config is None:
            config = SonaConfig() if lora is None else SonaConfig(lora=lora.config)
        if not isinstance(config, SonaConfig):
            raise DTypeError(f"config: got {type(config).__name__}, expected a SonaConfig or None")
        if not (on_event is None or callable(on_event)):
            raise DTypeError(f"on_event: got {type(on_event).__name__}, expected a function or None")
        encoders = Encoders(encoder, response_encoder)
        config, lora = making.learner(config, lora, encoders)
        encoders.check(making.dims_of(lora))
        manager = HotSwapManager(lora)
        self = super().__new__(cls, lora, manager, config.core_json())
        self._config, self._lora, self._manager, self._encoders = config, lora, manager, encoders
        self._on_event, self._told = on_event, manager.generation
        self._deep_lock, self._install_lock, self._fisher = threading.Lock(), threading.Lock(), None
        self._background = Background(self)
        processes.on_fork(self)
        self.observe()
        return self

    # -- parts --

    @property
    def config(self) -> SonaConfig:
        """The settings it was made with, widths included."""
        return self._config

    @property
    def lora(self) -> MicroLoRA:
        """The live learner; it must learn through the loop alone."""
        return self._lora

    @property
    def manager(self) -> HotSwapManager:
        """Serves the last accepted version, to be read elsewhere; the live weights are those of `forward`."""
        return self._manager

    @property
    def encoder(self) -> TextEncoder | None:
        """The encoder of queries, or None."""
        return self._encoders.query

    @property
    def running(self) -> bool:
        """Whether the background thread of `start` runs."""
        return self._background.running

    def adapter(self) -> Adapter:  # type: ignore[override]
        """The live weights as a value."""
        return Adapter(super().adapter(*self._json()))

    def consolidated(self) -> Adapter:  # type: ignore[override]
        """The last accepted weights as a value: what `manager` serves."""
        return Adapter(super().consolidated(*self._json()))

    def stats(self) -> SonaStats:  # type: ignore[override]
        """What was counted and measured so far."""
        return SonaStats.from_core(super().stats())

    def diagnose(self) -> list[Finding]:
        """What may be wrong, from what was measured so far, each with the setting to change.

        Nothing is changed. With many samples remembered it takes some tens of milliseconds.

        Returns:
            Findings in the order of the table in `microlora.sona.diagnose`; none where all looks well, or too
            little has come to tell.
        """
        from microlora.sona.diagnose import diagnose

        return diagnose(self)

    def _json(self) -> tuple[str, str]:
        return self._lora.config.to_json(), self._lora.metadata.to_json()

    # -- texts --

    def embed(self, text: str | Sequence[str], module: str | None = None) -> NDArray[np.float32]:
        """Adapted embedding of a text: the encoder's vector plus what the module adds to it.

        Args:
            text: A text, or several.
            module: Name of a square module; None where there is only one.

        Returns:
            float32 (out_features,), or (n, out_features) of several texts.

        Raises:
            ConfigError: No encoder, an empty text, or no text.
            EncoderError: The encoder raised.
            ShapeError: The module is not square.
        """
        texts = [text] if isinstance(text, str) else list(text)
        if not texts:
            raise ConfigError("text: got none, expected one or more")
        out = self._encoders.vectors(texts)
        self.forward_add(out.copy(), module, out)
        return out[0] if isinstance(text, str) else out

    def _adapt_text(
        self, query: str, response: object, quality: float | None = None, module: str | None = None
    ) -> AdaptationResult:
        """Learns from texts; called by `instant_adapt` where ``x`` is a text.

        A text as ``response`` is a `Reward` of ``quality`` for its embedding; feedback such as ``Target(t)``
        is taken as it is. For a module as wide as its input the embedding itself is the frozen layer's
        output.
        """
        event = self._encoders.event(query, response, quality)
        return super().instant_adapt(event.x, event.feedback, quality, module, event.base)

    # -- the background loop --

    def maybe_background(self, force: bool = False) -> AdaptationResult | None:
        """Consolidates if it is due, for ``max_ms`` at most; the GIL is free meanwhile.

        Args:
            force: Consolidate what there is, whatever the interval and the number of events.

        Returns:
            What was done, or None where nothing was due. A result whose notes contain ``"goes on"`` left work
            for the next call.
        """
        result = super().maybe_background(force)
        if result is not None:
            self._done(result)
        return result

    def start(self) -> Self:
        """Starts a thread that consolidates; nothing if it runs already.

        The thread does not keep the loop alive, ends with the process, and is gone in a forked child, where
        `start` may be called again.
        """
        self._background.start()
        return self

    def stop(self) -> None:
        """Ends the thread of `start`; what was learned and what waits stays."""
        self._background.stop()

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    # -- the deep loop --

    def should_trigger_deep(self) -> bool:
        """Whether the qualities since the last deep run sum up to ``deep_trigger_threshold``."""
        return self.stats().accumulated_quality >= self._config.deep_trigger_threshold

    def deep_optimize(
        self,
        samples: Any = None,
        distill: bool = False,
        progress: Progress | bool | None = None,
        cancel: CancelToken | None = None,
        base: str | None = None,
    ) -> DeepResult:
        """Trains A and B on what is remembered and on given samples, and serves the result if it is better.

        `AdapterTrainer` trains a copy with the settings ``config.deep``, while the loop goes on serving and
        learning; a tenth of the samples is for early stopping. With ``ewc_lambda`` above 0 what earlier deep
        runs needed is held. The gate then compares held-out losses as after a consolidation: no sample that
        equals a held-out one is trained on.

        Args:
            samples: `TrainingSample` objects (texts need the encoder), ``(x, feedback)`` pairs, an
                `AdapterDataset`, or arrays ``(x, y)`` or ``(x, y, weights)``; None takes the reservoir alone.
            distill: Learn the outputs of the ensemble in place of the targets, so that one adapter serves in
                its place; both held-out losses are in the notes. Needs ``consolidation="ensemble"``.
            progress: A callable of ``(done, total, message)``, or True for a bar.
            cancel: Looked at every few steps.
            base: ``"input"`` takes the input of each given sample for the frozen layer's output, as where
                embeddings are adapted; None takes their targets for those of dY. Samples of texts need no
                ``base``: their embedding is it.

        Returns:
            What was done and measured.

        Raises:
            CancelledError: ``cancel`` was set.
            ConfigError: Nothing to train on, or ``distill`` without an ensemble.
            SwapError: Another deep run is under way.
            MicroLoraError: Samples that cannot be learned from. Nothing changes in any error.
        """
        from microlora.sona.deep import deep_optimize

        return deep_optimize(self, samples, distill, progress, cancel, base)

    # -- who is told --

    @property
    def on_event(self) -> EventHook | None:
        """Called with every result; None tells nobody."""
        return self._on_event

    @on_event.setter
    def on_event(self, hook: EventHook | None) -> None:
        if not (hook is None or callable(hook)):
            raise DTypeError(f"on_event: got {type(hook).__name__}, expected a function or None")
        self._on_event = hook
        self.observe()

    def observe(self) -> bool:
        """Looks again whether anyone wants to hear of single events, and returns it.

        `instant_adapt` is the core's own, and costs nothing more, unless there is a hook or the logger
        ``microlora.sona.instant`` is enabled for DEBUG; that is looked at when the loop is made, when the
        hook changes, and here.
        """
        wanted = self._on_event is not None or telemetry.logger("instant").isEnabledFor(logging.DEBUG)
        if wanted:
            self.__dict__["instant_adapt"] = MethodType(_observed, self)
        else:
            self.__dict__.pop("instant_adapt", None)
        return wanted

    def _done(self, result: AdaptationResult | DeepResult) -> None:
        generation = self._manager.generation
        if generation != self._told:
            before, self._told = self._told, generation
            self._manager._tell((before, generation))
        if GOES_ON not in result.notes:
            self._tell(result)

    def _tell(self, result: AdaptationResult | DeepResult) -> None:
        telemetry.report(result)
        if self._on_event is not None:
            try:
                self._on_event(result)
            except Exception:
                _log.exception("on_event failed after an event of the %s loop", result.loop_type)

    # -- files --

    def save(self, path: PathLike) -> None:
        """Writes the whole loop: weights, rules, memory, counters, what deep runs hold on to, and settings.

        Encoders are not written, only their names. Any number of threads may read and learn meanwhile.

        Args:
            path: A directory, made where it is missing. What an earlier call wrote there is whole until this
                one has written everything.

        Raises:
            OSError: The system refused.
        """
        state.write(self, path)

    @classmethod
    def load(
        cls,
        path: PathLike,
        encoder: TextEncoder | None = None,
        response_encoder: TextEncoder | None = None,
        on_event: EventHook | None = None,
    ) -> Self:
        """A loop that goes on from `save`.

        Args:
            path: The directory.
            encoder: As of the class; of the name that it was saved with.
            response_encoder: Likewise.
            on_event: As of the class.

        Raises:
            FormatError: Not such a directory, damaged, or written by a newer version.
            ConfigError: Encoders of other names.
            OSError: It cannot be read.
        """
        parts = state.read(path)
        self = cls(parts.config, encoder, response_encoder, None, on_event)
        state.restore(self, parts)
        self._told = self._manager.generation
        return self

    # -- processes and values --

    def _before_fork(self) -> None:
        self.pause()

    def _after_fork(self, child: bool) -> None:
        if child:  # whoever held a lock is not in this process
            self._deep_lock, self._install_lock = threading.Lock(), threading.Lock()
        self.resume()

    def __reduce__(self) -> NoReturn:
        raise DTypeError("SonaLoop: cannot be pickled or copied: save() it, or take adapter()")

    def __repr__(self) -> str:
        """Sizes and state, never weights."""
        names = self.modules()
        shown = ", ".join(names[:4]) + (f", ... ({len(names)} modules)" if len(names) > 4 else "")
        sizes = f"{self._lora.param_count:,} parameters, {self._lora.memory_bytes:,} bytes"
        running = "running" if self.running else "not running"
        version = f"version {self._lora.version}"
        return f"{type(self).__name__}({shown}; {sizes}, {version}, {self._config.consolidation}, {running})"


def _observed(self: SonaLoop, *args: Any, **kwargs: Any) -> AdaptationResult:
    """`instant_adapt` with somebody who listens."""
    result = _core.Sona.instant_adapt(self, *args, **kwargs)
    self._tell(result)
    return result
