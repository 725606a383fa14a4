"""``microlora convert``: an adapter in another format."""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from microlora.cli.words import in_flags

if TYPE_CHECKING:
    from microlora.progress import Progress

__all__ = ["add_parser", "add_reading", "progress", "run"]

_TEXT = """Writes an adapter in another format. What the format cannot hold is an error that names it,
unless it is given up by name (--allow drop:dora). Exit code: 0 when it was written, 2 when it was not."""


def add_parser(commands: Any) -> None:
    """Add the command to the subparsers of `microlora.cli.build_parser`."""
    parser = commands.add_parser("convert", help="write an adapter in another format", description=_TEXT)
    add = parser.add_argument
    add("source", type=Path, metavar="SRC", help="a file or directory of any format")
    add("target", type=Path, metavar="DST", help="file or directory to write")
    add(
        "--format", required=True, metavar="F", help="peft, safetensors, gguf, mlx, kohya, diffusers, npz ..."
    )
    add_reading(add)
    add("--dtype", metavar="T", help="element type, for formats that have a choice (gguf: f16, q8_0 ...)")
    add("--names", metavar="N", help="gguf keeps llama.cpp's names and row order of a GGUF file")
    add("--module-names", type=Path, metavar="M", help="base model whose names undo Kohya's underscores")
    add("--overwrite", action="store_true", help="replace what lies at DST")
    parser.set_defaults(run=run, fail=parser.error)


def add_reading(add: Callable[..., Any]) -> None:
    """Add what a source may need to be read."""
    add("--base-config", type=Path, metavar="C", help="config.json of the base, where its heads are needed")
    add("--allow", action="append", default=[], metavar="drop:KIND", help="give this up; may be repeated")
    add("--alpha", type=float, metavar="A", help="scaling numerator, for sources that carry none")
    add("--orientation", metavar="O", help="rank_first or rank_last, for flat files that do not say")


@contextlib.contextmanager
def progress() -> Iterator[Progress | None]:
    """A bar on standard error where a terminal and rich are there; gone when the work is done."""
    try:
        if not sys.stderr.isatty():
            raise ImportError
        from microlora.cli.demo_view import progress_bar
    except ImportError:
        yield None
        return
    with progress_bar() as tell:
        yield tell


def run(args: argparse.Namespace) -> int:
    """Convert; the exit code."""
    from microlora.formats import convert

    # Only what was asked for: each format refuses the options that mean nothing to it.
    options: dict[str, Any] = {} if args.dtype is None else {"dtype": args.dtype}
    with progress() as tell:
        done = convert(
            args.source,
            args.target,
            format=args.format,
            base_config=args.base_config,
            allow=args.allow,
            overwrite=args.overwrite,
            alpha=args.alpha,
            orientation=args.orientation,
            names=args.names,
            module_names=args.module_names,
            progress=tell,
            **options,
        )
    print(f"{done.path}: {done.format}, {done.modules} modules, from {done.source or 'memory'}")
    for kind, at in done.dropped.items():
        print(f"dropped {kind}: {at}")
    for note in done.notes:
        print(f"note: {in_flags(note, vars(args))}")
    return 0
