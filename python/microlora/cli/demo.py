"""``microlora demo``: adapters learn from clicks on a real search task, before your eyes."""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from microlora.cli.extras import require
from microlora.exceptions import ConfigError

if TYPE_CHECKING:
    from microlora.progress import Progress

__all__ = ["add_parser", "run"]

_PLOT_FORMATS = (".png", ".svg", ".pdf")
_TEXT = """Personalised code search over the Python standard library of this machine. A query is the first
sentence of a docstring, its document is the function's code, and each of the largest modules is a persona
with an adapter of its own. The adapter learns from half of its persona's queries, one click at a time; the
other half is ranked before and after, among all functions."""


def _at_least(least: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not an integer") from None
        if value < least:
            raise argparse.ArgumentTypeError(f"{value} is below {least}")
        return value

    return parse


def add_parser(commands: Any) -> None:
    """Add the command to the subparsers of `microlora.cli.build_parser`."""
    parser = commands.add_parser("demo", help="watch adapters learn from clicks", description=_TEXT)
    add = parser.add_argument
    add("--rank", type=_at_least(1), default=16, metavar="R", help="rank of the adapters (16)")
    add("--personas", type=_at_least(1), default=12, metavar="N", help="how many modules take part (12)")
    add("--persona", metavar="NAME", help="let only this one learn; the others are still measured")
    add("--seed", type=_at_least(0), default=0, metavar="S", help="of the split and the random starts (0)")
    add(
        "--encoder",
        default="lsa",
        metavar="lsa|MODULE:ATTRIBUTE",
        help="the built-in encoder, or a callable that makes a TextEncoder",
    )
    add("--ask", metavar="QUERY", help="show the best hits with and without the adapters, and nothing else")
    add("--json", action="store_true", help="print JSON; needs no extra")
    add("--plot", type=Path, metavar="FILE.png", help="draw the result (extra: plot)")
    add("--cache-dir", type=Path, metavar="DIR", help="of the fitted encoder (~/.cache/microlora)")
    add("--save-dir", type=Path, metavar="DIR", help="of the adapters (a folder in the cache)")
    parser.set_defaults(run=run, fail=parser.error)


def _check(args: argparse.Namespace) -> None:
    """All that can be refused before the work begins."""
    if args.ask is not None:
        if not args.ask.strip():
            raise ConfigError("ask is empty; a query is wanted")
        if args.plot is not None or args.save_dir is not None:
            args.fail("--ask draws and saves nothing; leave out --plot and --save-dir")
    if not args.json:
        require("rich", "cli", "microlora demo")
    if args.plot is not None:
        if args.plot.suffix.lower() not in _PLOT_FORMATS:
            raise ConfigError(f"plot is {str(args.plot)!r}; a name that ends in .png, .svg or .pdf is wanted")
        if not args.plot.absolute().parent.is_dir():
            raise ConfigError(f"plot is {str(args.plot)!r}, whose folder does not exist")
        require("matplotlib", "plot", "--plot")


@contextlib.contextmanager
def _progress(as_json: bool) -> Iterator[Progress | None]:
    """A progress bar on standard error, gone when the work is done; none beside JSON."""
    if as_json:
        yield None
        return
    from microlora.cli.demo_view import progress_bar

    with progress_bar() as tell:
        yield tell


def run(args: argparse.Namespace) -> int:
    """Run the demo; the exit code."""
    _check(args)
    from microlora.demo import report
    from microlora.demo.session import default_cache_dir, make_encoder, prepare
    from microlora.demo.task import default_api

    encoder, api = make_encoder(args.encoder), default_api()
    cache_dir = args.cache_dir or default_cache_dir()
    with _progress(args.json) as tell:
        session = prepare(encoder, args.personas, args.seed, cache_dir, progress=tell)
        personas = report.choose_personas(session, args.persona)
        if args.ask is not None:
            result = report.answer(session, args.ask, personas, args.rank, args.seed, api)
        else:
            folder = re.sub(r"[^\w.-]+", "_", f"{args.encoder}-r{args.rank}-seed{args.seed}")
            save_dir = args.save_dir or cache_dir / "adapters" / folder
            result = report.run(session, personas, args.rank, args.seed, save_dir, api, progress=tell)
            if args.plot is not None:
                from microlora.cli.demo_plot import draw

                draw(result, args.plot)
    if args.json:
        json.dump(result, sys.stdout, indent=2, allow_nan=False)
        print()
    else:
        from microlora.cli import demo_view

        (demo_view.show_answer if args.ask is not None else demo_view.show_run)(result)
        if args.plot is not None:
            print(f"Drawn in {args.plot}")
    return 0
