"""``progress=True``: a bar of tqdm or rich where one is installed, else a line on standard error."""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Iterator
from typing import Any

from microlora.exceptions import DTypeError
from microlora.progress import Progress

__all__ = ["bar"]


@contextlib.contextmanager
def bar(progress: Progress | bool | None) -> Iterator[Progress | None]:
    """The callable that a run reports to.

    Args:
        progress: A callable is itself; True is a bar, shown while the context lasts; None and False nothing.

    Raises:
        DTypeError: Anything else.
    """
    if progress is None or progress is False:
        yield None
    elif progress is True:
        with _tqdm() or _rich() or _line() as shown:
            yield shown
    elif callable(progress):
        yield progress
    else:
        raise DTypeError(f"progress: got {type(progress).__name__}, expected a callable, True or None")


def _module(name: str) -> Any:
    with contextlib.suppress(ImportError):
        return importlib.import_module(name)
    return None


def _tqdm() -> contextlib.AbstractContextManager[Progress] | None:
    tqdm = _module("tqdm.auto")
    return None if tqdm is None else _with_tqdm(tqdm.tqdm)


@contextlib.contextmanager
def _with_tqdm(make: Any) -> Iterator[Progress]:
    with make(unit="step") as shown:

        def report(done: int, total: int | None, message: str) -> None:
            shown.total = total
            shown.set_description(message, refresh=False)
            shown.update(done - shown.n)

        yield report


def _rich() -> contextlib.AbstractContextManager[Progress] | None:
    rich = _module("rich.progress")
    return None if rich is None else _with_rich(rich)


@contextlib.contextmanager
def _with_rich(rich: Any) -> Iterator[Progress]:
    console = importlib.import_module("rich.console").Console(stderr=True)
    with rich.Progress(console=console) as shown:
        task = shown.add_task("training", total=None)

        def report(done: int, total: int | None, message: str) -> None:
            shown.update(task, completed=done, total=total, description=message)

        yield report


@contextlib.contextmanager
def _line() -> Iterator[Progress]:
    def report(done: int, total: int | None, message: str) -> None:
        share = f"/{total}" if total else ""
        sys.stderr.write(f"\r{message}: {done}{share} steps ")
        sys.stderr.flush()

    try:
        yield report
    finally:
        sys.stderr.write("\n")
