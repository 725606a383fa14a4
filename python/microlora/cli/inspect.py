"""``microlora inspect``: what is wrong with an adapter file, and a repaired copy."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from microlora.cli.extras import require

if TYPE_CHECKING:
    from microlora.doctor import Report

__all__ = ["add_parser", "run"]

EXIT_FINDINGS = 1
_STYLES = {"error": "bold red", "warning": "yellow", "info": "dim"}
_TEXT = """Looks at an adapter file of any format, broken or not, and says what is wrong with it and what to
do. Nothing is loaded, and nothing is changed in place. Exit code: 0 without an error in the report, 1 with
one (with --strict also with a warning), 2 where the command itself failed."""


def add_parser(commands: Any) -> None:
    """Add the command to the subparsers of `microlora.cli.build_parser`."""
    parser = commands.add_parser("inspect", help="say what is wrong with an adapter file", description=_TEXT)
    add = parser.add_argument
    add("path", type=Path, metavar="PATH", help="a file or directory of any format")
    add(
        "--base", metavar="BASE", help="the base model: its directory, config.json, safetensors file or index"
    )
    add("--json", action="store_true", help="print the report as JSON")
    add("--fix", type=Path, metavar="OUT", help="write a repaired copy")
    add(
        "--also",
        action="append",
        default=[],
        metavar="CODE",
        help="with --fix: repair this too, though it changes the adapter (nonfinite, upcast, base_names ...)",
    )
    add("--plot", type=Path, metavar="FILE.png", help="draw the norms of the layers (extra: plot)")
    add("--strict", action="store_true", help="exit with 1 for warnings too")
    parser.set_defaults(run=run, fail=parser.error)


def run(args: argparse.Namespace) -> int:
    """Inspect; the exit code."""
    from microlora.doctor import inspect

    if args.also and args.fix is None:
        args.fail("--also says what --fix repairs; give --fix too")
    if args.plot is not None:
        from microlora.doctor.plot import check_picture

        require("matplotlib", "plot", "--plot")
        check_picture("plot", args.plot)
    report = inspect(args.path, base=args.base, fix=args.fix, also=args.also)
    if args.plot is not None:
        report.plot(args.plot)
    if args.json:
        print(report.to_json(2))
    else:
        _print(report)
        if args.plot is not None:
            print(f"Drawn in {args.plot}")
    bad = not report.ok or (args.strict and report.count("warning") > 0)
    return EXIT_FINDINGS if bad else 0


def _print(report: Report) -> None:
    """The text, coloured where a terminal and rich are there."""
    try:
        if not sys.stdout.isatty():
            raise ImportError
        from rich.console import Console
        from rich.text import Text
    except ImportError:
        print(report)
        return
    console = Console(highlight=False)
    for line in str(report).splitlines():
        console.print(Text(line, style=_STYLES.get(line.split(" ", 1)[0], "")), soft_wrap=True)
