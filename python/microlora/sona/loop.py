"""The public loop: an adapter that serves and learns on three time scales."""

from __future__ import annotations

import json
import threading
from collections.abc import Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, NoReturn, Self

from microlora._core import AdaptationResult
from microlora.adapter import Adapter
from microlora.exceptions import ConfigError, DTypeError
from microlora.hot_swap import HotSwapManager
from microlora.micro_lora import MicroLoRA
from microlora.sona import making, processes, state
from microlora.sona.background import Background
from microlora.sona.calls import Calls
from microlora.sona.config import SonaConfig
from microlora.sona.journal import JournalConfig
from microlora.sona.state import Opened
from microlora.sona.stats import SonaStats
from microlora.sona.text import Encoders
from microlora.sona.watch import EventHook

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from microlora.encoders.protocol import TextEncoder
    from microlora.files import PathLike
    from microlora.progress import CancelToken, Progress
    from microlora.sona.deep import DeepResult
    from microlora.sona.diagnose import Finding

__all__ = ["SonaLoop"]


class SonaLoop(Calls):
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
    _encoders: Encoders
    _background: Background
    _deep_lock: threading.Lock
    _install_lock: threading.Lock
    _fisher: bytes | None
    _opened: Opened | None
    _visited: bool

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
        self._on_event, self._told, self._outcomes = on_event, manager.generation, {}
        self._deep_lock, self._install_lock, self._fisher = threading.Lock(), threading.Lock(), None
        self._opened, self._visited = None, False
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

    @property
    def visited(self) -> bool:
        """Whether `maybe_background` was ever called, by the thread of `start` or by anyone."""
        return self._visited

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
        is taken as it is, and for a module as wide as its input the embedding itself is the frozen layer's
        output.
        """
        event = self._encoders.event(query, response, quality)
        return super().instant_adapt(event.x, event.feedback, quality, module, event.base)

    # -- the background loop --

    def maybe_background(self, force: bool = False) -> AdaptationResult | None:
        """Consolidates if it is due, for ``max_ms`` at most; the GIL is free meanwhile.

        Args:
            force: Consolidate what there is, whatever the interval and the number of events; not while the
                warm-up still collects its ``warmup_inputs``.

        Returns:
            What was done, or None where nothing was due: also with ``force`` while the warm-up collects, or
            where no event waits. One with the outcome ``"goes_on"`` left work for the next call.
        """
        self._visited = True
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
        if self._opened is not None:
            self.close()

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
        learning; what waits for a consolidation is consolidated first. A tenth of the samples is for early
        stopping. With ``ewc_lambda`` above 0 what earlier deep runs needed is held. The gate then compares
        held-out losses as after a consolidation: no sample that equals a held-out one is trained on.

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

    # -- files --

    def save(self, path: PathLike) -> None:
        """Writes the whole loop: weights, rules, memory, counters, what deep runs hold on to, and settings.

        Encoders are not written, only their names and their vectors of two texts, to know them by. Any number
        of threads may read and learn meanwhile.

        Args:
            path: A directory, made where it is missing. What an earlier call wrote there is whole until this
                one has written everything.

        Raises:
            ConfigError: A directory that has a journal.
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
        """A loop that goes on from `save`; nothing is written there, and a journal is not read: see `open`.

        Args:
            path: The directory.
            encoder: As of the class; the one that it was saved with (name and vectors are compared).
            response_encoder: Likewise.
            on_event: As of the class.

        Raises:
            FormatError: Not such a directory, damaged, or written by a newer version.
            ConfigError: Encoders of other names, or that give other vectors.
            OSError: It cannot be read.
        """
        parts = state.read(path)
        self = cls(parts.config, encoder, response_encoder, None, on_event)
        state.restore(self, parts)
        self._told = self._manager.generation
        return self

    @classmethod
    def open(
        cls,
        path: PathLike,
        config: SonaConfig | None = None,
        encoder: TextEncoder | None = None,
        response_encoder: TextEncoder | None = None,
        on_event: EventHook | None = None,
        journal: JournalConfig | None = None,
    ) -> Self:
        """A loop that lives in a directory: it goes on from what is there, and writes there.

        The directory is locked until `close`, or the end of the ``with`` block. With a journal every event is
        written down before it is learned, so that a killed process loses at most the one that it was writing.
        `checkpoint` saves the state at any time; without a journal `close` and the end of the ``with`` block
        save it too, and what came since then is lost with a killed process.

        Opening without a journal where there was one learns again what it holds and ends it: events of
        before can neither be audited nor forgotten any more, and `opened` warns of it.

        Args:
            path: The directory, made where it is missing.
            config: Settings of a new loop; where there is a state, None or the same settings.
            encoder: As of the class.
            response_encoder: As of the class.
            on_event: As of the class.
            journal: Settings of the journal; None keeps none, and ends an earlier one.

        Returns:
            The loop; `opened` says what was found. Warnings are logged by ``microlora.sona.journal``.

        Raises:
            ConfigError: Other settings than those of the state, or encoders of other names or vectors.
            FormatError: A damaged state, or one of a newer version.
            OSError: Another process has it open, or the system refused.
        """
        if not (journal is None or isinstance(journal, JournalConfig)):
            raise DTypeError(f"journal: got {type(journal).__name__}, expected a JournalConfig or None")
        parts = state.read(path) if state.there(path) else None
        if parts is not None and config is None:
            config = parts.config
        self = cls(config, encoder, response_encoder, None, on_event)
        if parts is not None and self._config != parts.config:
            raise ConfigError(
                f"config: got other settings than the state in {path}, expected None or the same"
            )
        self._opened = state.open_in(self, path, parts, journal)
        self._told = self._manager.generation
        return self

    @property
    def opened(self) -> Opened | None:
        """What `open` found; None for a loop without a directory."""
        return self._opened

    def checkpoint(self) -> int:
        """Saves the state in the directory of `open`; the journal goes on after it.

        Returns:
            Bytes of the state.

        Raises:
            ConfigError: A loop without a directory.
            OSError: The system refused; what was saved before is whole.
        """
        return super().checkpoint()

    def close(self) -> None:
        """Leaves the directory of `open`; the loop goes on without it, and nothing is written there any more.

        A journal is synced; without one the state is saved, as by `checkpoint`. Nothing without a directory.
        The end of a ``with`` block does it as well, after `stop`.

        Raises:
            OSError: The system refused.
        """
        super().close()
        self._opened = None

    def audit(self) -> list[dict[str, Any]]:
        """What the journal holds, in order: which events shaped the adapter, and what came of them.

        Returns:
            A dict for each record: ``record``, ``kind`` (``"event"``, ``"consolidation"``, ``"deep"``, ...),
            ``time`` (seconds since 1970), ``event``, ``module``, ``feedback``, ``quality``, ``held_out``,
            ``outcome``; None where a record has none of it.

        Raises:
            ConfigError: A loop without a journal.
        """
        found: list[dict[str, Any]] = json.loads(self.audit_json())
        return found

    # -- processes and values --

    def _before_fork(self) -> None:
        self.pause()

    def _after_fork(self, child: bool) -> None:
        if child:  # whoever held a lock is not in this process
            self._deep_lock, self._install_lock = threading.Lock(), threading.Lock()
        self.resume(child)

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
