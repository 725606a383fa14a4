"""One protocol for long work: a progress callback and a token that cancels.

A function that takes ``progress=`` calls it with ``(done, total, message)`` from the thread it works in;
``total`` is None while it is not known. One that takes ``cancel=`` looks at the token between steps; a
cancelled call raises `CancelledError` and leaves no output.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

from microlora.exceptions import CancelledError

Progress = Callable[[int, int | None, str], None]
"""``(done, total, message)``: steps done, steps in all (None while unknown), what is being done."""


class CancelToken:
    """Set by one thread, seen by the work of others; once set it stays set.

    Example:
        >>> token = CancelToken()
        >>> token.cancel()
        >>> token.cancelled
        True
    """

    __slots__ = ("_event",)

    def __init__(self) -> None:
        self._event = threading.Event()

    def cancel(self) -> None:
        """Ask the work that holds this token to stop; may be called from any thread and more than once."""
        self._event.set()

    @property
    def cancelled(self) -> bool:
        """Whether `cancel` was called."""
        return self._event.is_set()

    def raise_if_cancelled(self, what: str = "the call") -> None:
        """Raise if the token is set.

        Args:
            what: The work, as the message names it.

        Raises:
            CancelledError: the token is set.
        """
        if self._event.is_set():
            raise CancelledError(f"{what} was cancelled; no output was left behind")

    def __repr__(self) -> str:
        return f"CancelToken(cancelled={self.cancelled})"
