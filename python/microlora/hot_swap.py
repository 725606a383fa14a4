"""Hot swap: a new adapter under load, without a torn read, a lock or a copy."""

from __future__ import annotations

import itertools
import logging
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from types import TracebackType
from typing import NoReturn, Self

import microlora._core as _core
from microlora import files
from microlora._checks import flag, integer
from microlora.adapter import Adapter
from microlora.exceptions import DTypeError, SwapError
from microlora.progress import CancelToken, Progress

__all__ = ["Generation", "HotSwapManager"]

Source = Adapter | _core.MicroLora
Subscriber = Callable[[int, int], object]

_log = logging.getLogger(__name__)


def _value(arg: str, source: object) -> Adapter:
    if isinstance(source, _core.MicroLora):
        source = source.adapter()
    if not isinstance(source, _core.Adapter):
        raise DTypeError(f"{arg}: got {type(source).__name__}, expected an Adapter or a MicroLoRA")
    return source if isinstance(source, Adapter) else Adapter(source)


class Generation(_core.Generation):
    """One generation of a :class:`HotSwapManager`, held until it is released; made by its ``pin()``.

    All reads through it are of the same adapter, whatever is swapped meanwhile. It is released by
    :meth:`release`, by leaving its ``with`` block, or with the object.

    Args:
        manager: Whose active generation to pin.

    Example:
        >>> import numpy as np, microlora as ml
        >>> lora = ml.MicroLoRA(ml.LoraConfig(rank=4, target_modules=["q_proj", "v_proj"]), hidden_dim=64)
        >>> manager = ml.HotSwapManager(lora)
        >>> with manager.pin() as pinned:
        ...     number = manager.set_active(lora)
        ...     pinned.number, number, pinned.forward(np.ones(64, np.float32), "q_proj").shape
        (1, 2, (64,))
    """

    @property
    def adapter(self) -> Adapter | None:
        """Its adapter; None for generation 0, which has none.

        Raises:
            SwapError: It was released.
        """
        value = self._adapter()
        return None if value is None else Adapter(value)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    def __repr__(self) -> str:
        """Number and state."""
        return f"Generation({self.number}{', released' if self.released else ''})"


class HotSwapManager(_core.HotSwap):
    """Serves one adapter and lets another take its place while any number of threads read.

    Generations lie behind one atomic pointer. A call reads the generation that is active when it starts,
    whole and to its end; readers never wait for a swap, and a swap never waits for readers. Adapters of any
    ranks, alphas and modules may follow one another; where both have a module, its widths must agree. The
    generation before the active one is kept for :meth:`rollback`; an older one is freed when its last reader
    is done.

    A forked child serves the generation that was active, and may go on by itself. What another thread of the
    parent was preparing is not prepared in the child: its future never completes there.

    Args:
        active: The adapter to serve first (generation 1), a learner's present weights, or None (generation 0,
            which has no modules).
        keep_previous: Keep one generation for :meth:`rollback`; False frees it as soon as nobody reads it.

    Raises:
        DTypeError: ``active`` is neither.
        NonFiniteError: It contains NaN or infinity.

    Example:
        >>> import numpy as np, microlora as ml
        >>> config = ml.LoraConfig(rank=4, target_modules=["q_proj"])
        >>> manager = ml.HotSwapManager(ml.MicroLoRA(config, hidden_dim=64))
        >>> q = manager["q_proj"]  # found once, serves every later generation
        >>> future = manager.prepare_standby(ml.MicroLoRA(config.replace(rank=8), hidden_dim=64, seed=1))
        >>> _ = future.result()
        >>> manager.swap(), q.rank
        (2, 8)
    """

    _subscribers: dict[int, Subscriber]
    _keys: Iterator[int]

    def __new__(cls, active: Source | None = None, *, keep_previous: bool = True) -> Self:
        """Makes a manager; see the class."""
        self = super().__new__(cls, keep_previous=flag("keep_previous", keep_previous))
        self._subscribers, self._keys = {}, itertools.count()
        if active is not None:
            value = _value("active", active)
            self._check(value, False)
            self._publish(value, None, False)
        return self

    @property
    def active(self) -> Adapter | None:
        """The adapter that is served now; weights are shared, not copied. None before the first one."""
        value = self._active()
        return None if value is None else Adapter(value)

    @property
    def standby(self) -> Adapter | None:
        """The adapter that :meth:`swap` would make active, or None."""
        value = self._standby()
        return None if value is None else Adapter(value)

    @property
    def previous(self) -> Adapter | None:
        """The adapter that :meth:`rollback` would go back to, or None."""
        value = self._previous()
        return None if value is None else Adapter(value)

    def pin(self) -> Generation:
        """The active generation, held for several reads of one version; see :class:`Generation`."""
        return Generation(self)

    def set_active(self, adapter: Source, *, reshape: bool = False) -> int:
        """Checks an adapter in this thread and makes it active.

        Args:
            adapter: An adapter, or a learner whose present weights are taken (shared until its next step).
            reshape: Allow a module to have other widths than in the active generation.

        Returns:
            The new generation's number.

        Raises:
            DTypeError: Another type.
            ShapeError: A module has other widths than in the active generation.
            NonFiniteError: NaN or infinity in a factor.
            ConfigError: No modules. Nothing changes in any error.
        """
        value, reshape = _value("adapter", adapter), flag("reshape", reshape)
        with self._busy():
            self._check(value, reshape)
            return self._tell(self._publish(value, None, reshape))

    def compare_and_swap(self, expected: int, adapter: Source, *, reshape: bool = False) -> int:
        """Makes an adapter active if generation ``expected`` still is: two learners lose none of their work.

        Args:
            expected: Number of the generation that the adapter was learned from.
            adapter: As in :meth:`set_active`.
            reshape: As in :meth:`set_active`.

        Returns:
            The new generation's number, ``expected + 1``.

        Raises:
            SwapError: Another writer was faster; ``generation`` of the error is the number that is active.
            MicroLoraError: As :meth:`set_active`. Nothing changes in any error.
        """
        expected = integer("expected", expected, 0, 2**64 - 1)
        value, reshape = _value("adapter", adapter), flag("reshape", reshape)
        with self._busy():
            # Before the numbers are read as well: a race that is lost already costs nothing.
            self._expect(expected)
            self._check(value, reshape)
            return self._tell(self._publish(value, expected, reshape))

    def prepare_standby(
        self,
        source: Source | files.PathLike,
        *,
        validate: Callable[[Adapter], object] | None = None,
        background: bool = True,
        reshape: bool = False,
        progress: Progress | None = None,
        cancel: CancelToken | None = None,
    ) -> Future[Adapter]:
        """Loads and checks the adapter that the next :meth:`swap` is to make active.

        A file is loaded, widths are compared with the active generation's, and every number of every factor
        is read: all must be finite, and their pages are in memory then. The old standby stays until the new
        one is ready; of two preparations the one that was started later wins.

        Args:
            source: An adapter, a learner (its weights now), or a path for :func:`microlora.load`.
            validate: Called with the adapter in the thread that prepares, before it stands by; an exception,
                or False, refuses it.
            background: Work in a thread of its own; otherwise in this one, and errors are raised here.
            reshape: Allow a module to have other widths than in the active generation, now and at the swap.
            progress: Called with ``(done, total, message)`` between modules, from the thread that prepares.
            cancel: Looked at between modules.

        Returns:
            A future of the adapter; done when it stands by, or has failed. It cannot be cancelled by itself.

        Raises:
            DTypeError: An argument of another type, at once. The rest is raised by the future: what
                :func:`microlora.load` raises, errors as of :meth:`set_active`, CancelledError, what
                ``validate`` raises, and SwapError where it returned False or a later preparation is done.
        """
        loads = isinstance(source, str | os.PathLike)
        if not loads and not isinstance(source, _core.Adapter | _core.MicroLora):
            kind = type(source).__name__
            raise DTypeError(f"source: got {kind}, expected an Adapter, a MicroLoRA or a path")
        for arg, call in (("validate", validate), ("progress", progress)):
            if call is not None and not callable(call):
                raise DTypeError(f"{arg}: got {type(call).__name__}, expected a function or None")
        if cancel is not None and not isinstance(cancel, CancelToken):
            raise DTypeError(f"cancel: got {type(cancel).__name__}, expected a CancelToken or None")
        reshape, background = flag("reshape", reshape), flag("background", background)
        # Taken now: what a learner learns after this call belongs to a later preparation.
        taken = None if loads else _value("source", source)
        ticket = self._ticket()

        def work() -> Adapter:
            if cancel is not None:
                cancel.raise_if_cancelled("preparing the standby")
            value = files.load_plain(source) if taken is None else taken  # type: ignore[arg-type]
            self._check(value, reshape, progress, cancel)
            if validate is not None and validate(value) is False:
                raise SwapError("validate: returned False for the adapter", generation=self.generation)
            self._install(value, ticket, reshape)
            return value

        return self._run(work, background)

    def _run(self, work: Callable[[], Adapter], background: bool) -> Future[Adapter]:
        future: Future[Adapter] = Future()
        future.set_running_or_notify_cancel()
        if not background:
            with self._busy():
                value = work()
            future.set_result(value)
            return future

        def run() -> None:
            try:
                value = work()
            except BaseException as e:
                self._end()
                future.set_exception(e)
            else:
                self._end()
                future.set_result(value)

        self._begin()
        try:
            threading.Thread(target=run, name="microlora-prepare-standby").start()
        except BaseException:
            self._end()
            raise
        return future

    def swap(self) -> int:
        """Makes the standby active: one atomic exchange, under the GIL for about a microsecond.

        Returns:
            The new generation's number.

        Raises:
            SwapError: There is no standby, or it is not ready yet.
            ShapeError: What became active meanwhile has a module of other widths; the standby stays.
        """
        with self._busy():
            return self._tell(self._swap())

    def rollback(self) -> int:
        """Makes the adapter before the active one active again, under a new number.

        What is taken out of service is not kept: a second rollback raises instead of bringing it back. The
        standby stays.

        Returns:
            The new generation's number.

        Raises:
            SwapError: There is nothing to go back to.
        """
        with self._busy():
            return self._tell(self._rollback())

    def subscribe(self, callback: Subscriber) -> Callable[[], None]:
        """Has ``callback(old, new)`` called after each change, with the numbers of both generations.

        It runs in the thread that made the change, after it, outside any lock, and may read, pin or swap. An
        exception in it is logged and stops neither the swap nor the other subscribers. Changes of two threads
        may be told in another order than they happened; the numbers tell.

        Args:
            callback: Held until it is unsubscribed.

        Returns:
            A function that unsubscribes; calling it twice does nothing more.

        Raises:
            DTypeError: Not callable.
        """
        if not callable(callback):
            raise DTypeError(f"callback: got {type(callback).__name__}, expected a function")
        key = next(self._keys)
        self._subscribers[key] = callback

        def unsubscribe() -> None:
            self._subscribers.pop(key, None)

        return unsubscribe

    def _tell(self, numbers: tuple[int, int]) -> int:
        for callback in list(self._subscribers.values()):
            try:
                callback(*numbers)
            except Exception:
                _log.exception("a subscriber failed after the swap from generation %d to %d", *numbers)
        return numbers[1]

    @contextmanager
    def _busy(self) -> Iterator[None]:
        self._begin()
        try:
            yield
        finally:
            self._end()

    def __reduce__(self) -> NoReturn:
        raise DTypeError(
            "HotSwapManager: cannot be pickled or copied, because its readers share it: take manager.active"
        )

    def __repr__(self) -> str:
        """Number, sizes and states, never weights."""
        active = self.active
        served = "no adapter" if active is None else repr(active)
        more = "".join(
            f", {what}"
            for what, there in (("standby ready", self.standby), ("can roll back", self.previous))
            if there is not None
        )
        return f"HotSwapManager(generation {self.generation}: {served}{more})"
