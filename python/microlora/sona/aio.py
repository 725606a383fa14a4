"""The loop for asyncio: what blocks runs in an executor, and cancelling leaves no trace."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable
from concurrent.futures import Executor
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TypeVar

import numpy as np

from microlora.exceptions import ConfigError, DTypeError
from microlora.progress import CancelToken
from microlora.sona.background import GOES_ON
from microlora.sona.loop import SonaLoop

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import ArrayLike, NDArray

    from microlora._core import AdaptationResult, FeedbackBase
    from microlora.sona.stats import SonaStats

__all__ = ["AsyncSona"]

T = TypeVar("T")

_SHORTEST = 0.001
_log = logging.getLogger("microlora.sona.background")


class AsyncSona:
    """A `SonaLoop` behind coroutines, with its background loop as a task.

    An event or a read of one vector takes microseconds and is made at once, in the thread of the event loop:
    handing it to another would cost more. Encoders, batches, consolidations and deep runs go to an executor.
    A coroutine that is cancelled while a text is encoded has learned and counted nothing; a consolidation
    that was begun comes to the end of its budget by itself, and `deep_optimize` stops and changes nothing.
    The loop can be used on in every case.

    Args:
        sona: The loop; it may be used directly as well.
        executor: Where the work goes that blocks; None is the event loop's own.

    Raises:
        DTypeError: ``sona`` is no `SonaLoop`.

    Example:
        >>> async with AsyncSona(loop) as sona:  # doctest: +SKIP
        ...     await sona.instant_adapt("how?", "like this", 0.9)
    """

    def __init__(self, sona: SonaLoop, executor: Executor | None = None) -> None:
        if not isinstance(sona, SonaLoop):
            raise DTypeError(f"sona: got {type(sona).__name__}, expected a SonaLoop")
        self._sona, self._executor = sona, executor
        self._task: asyncio.Task[None] | None = None

    @property
    def sona(self) -> SonaLoop:
        """The loop itself."""
        return self._sona

    @property
    def running(self) -> bool:
        """Whether the background task runs."""
        return self._task is not None and not self._task.done()

    async def instant_adapt(
        self,
        x: ArrayLike | str,
        feedback: FeedbackBase | str,
        quality: float | None = None,
        module: str | None = None,
        base: ArrayLike | None = None,
    ) -> AdaptationResult:
        """Learns from one event; see `SonaLoop.instant_adapt`."""
        if not isinstance(x, str):
            return self._sona.instant_adapt(x, feedback, quality, module, base)
        if base is not None:
            raise ConfigError("base: got one with a text, expected None: its embedding is it")
        event = await self._blocking(lambda: self._sona._encoders.event(x, feedback, quality))
        return self._sona.instant_adapt(event.x, event.feedback, quality, module, event.base)

    async def forward(self, x: ArrayLike, module: str | None = None) -> NDArray[np.float32]:
        """``dY(x)`` of the live weights; a batch is read in the executor."""
        if np.ndim(x) == 1:
            return self._sona.forward(x, module)
        return await self._blocking(lambda: self._sona.forward(x, module))

    async def embed(self, text: str | Sequence[str], module: str | None = None) -> NDArray[np.float32]:
        """Adapted embedding of a text, or of several; see `SonaLoop.embed`."""
        return await self._blocking(lambda: self._sona.embed(text, module))

    async def maybe_background(self, force: bool = False) -> AdaptationResult | None:
        """Consolidates if it is due, in the executor; see `SonaLoop.maybe_background`."""
        return await self._blocking(lambda: self._sona.maybe_background(force))

    async def deep_optimize(self, samples: Any = None, **options: Any) -> Any:
        """Trains in the executor; see `SonaLoop.deep_optimize`.

        Cancelling this coroutine sets the run's token and waits for the run to end; nothing is changed then.
        """
        token = options.setdefault("cancel", CancelToken())
        if token is None:
            token = options["cancel"] = CancelToken()
        work = self._submit(lambda: self._sona.deep_optimize(samples, **options))
        try:
            return await asyncio.shield(work)
        except asyncio.CancelledError:
            token.cancel()
            with contextlib.suppress(Exception):
                await work
            raise

    def stats(self) -> SonaStats:
        """What was counted and measured so far; takes microseconds."""
        return self._sona.stats()

    # -- the background task --

    def start(self) -> None:
        """Starts a task that consolidates; nothing if it runs already. Needs a running event loop."""
        if not self.running:
            self._task = asyncio.get_running_loop().create_task(self._serve(), name="microlora-sona")

    async def stop(self) -> None:
        """Ends the task; a consolidation that is under way comes to the end of its budget first."""
        task, self._task = self._task, None
        if task is None:
            return
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task

    async def _serve(self) -> None:
        period = max(_SHORTEST, self._sona.config.background_interval_ms / 4000.0)
        failures = 0
        while True:
            pause = period
            work = self._submit(self._sona.maybe_background)
            try:
                result = await asyncio.shield(work)
            except asyncio.CancelledError:
                # Whoever stops the task may rely on it that nothing of it is under way any more.
                await asyncio.wait([work])
                _forget(work)
                raise
            except Exception:
                failures += 1
                pause = min(60.0, period * 2.0 ** min(failures, 30))
                _log.exception("%r: a consolidation failed; the next try is in %.1f s", self._sona, pause)
            else:
                failures = 0
                if result is not None and result.outcome == GOES_ON:
                    pause = _SHORTEST
            await asyncio.sleep(pause)

    async def __aenter__(self) -> Self:
        self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop()

    # -- the executor --

    def _submit(self, work: Callable[[], T]) -> asyncio.Future[T]:
        return asyncio.get_running_loop().run_in_executor(self._executor, work)

    async def _blocking(self, work: Callable[[], T]) -> T:
        future = self._submit(work)
        try:
            return await asyncio.shield(future)
        except asyncio.CancelledError:
            # Nobody waits for it any more, so its error is looked at here.
            future.add_done_callback(_forget)
            raise

    def __repr__(self) -> str:
        return f"AsyncSona({self._sona!r}, {'running' if self.running else 'not running'})"


def _forget(future: asyncio.Future[Any]) -> None:
    if not future.cancelled():
        future.exception()
