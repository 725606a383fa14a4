"""The command line: ``microlora COMMAND``, also as ``python -m microlora``."""

from __future__ import annotations

import argparse
import io
import os
import sys
from collections.abc import Mapping, Sequence

from microlora import __version__
from microlora.cli import convert, demo, inspect, quantize, trust
from microlora.cli.words import in_flags
from microlora.exceptions import MicroLoraError

__all__ = ["build_parser", "main"]

EXIT_ERROR = 2
EXIT_INTERRUPTED = 130


def build_parser() -> argparse.ArgumentParser:
    """The parser with all commands."""
    parser = argparse.ArgumentParser(
        prog="microlora", description="LoRA adapters that learn per request, in microseconds."
    )
    parser.add_argument("--version", action="version", version=f"microlora {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for command in (demo, inspect, convert, quantize, trust):
        command.add_parser(commands)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: the arguments; those of the process by default.

    Returns:
        The exit code: 0 on success, 1 when a report holds an error (``inspect``) or something differs
        (``verify``), 2 on an error of the command, which is told in one sentence, 130 after Ctrl-C.
    """
    options: Mapping[str, object] = {}
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # A terminal without the letters of a name, or the dots of a cut one, is no reason to stop.
            stream.reconfigure(errors="backslashreplace")
    try:
        arguments = build_parser().parse_args(argv)
        options = vars(arguments)
        code: int = arguments.run(arguments)
        sys.stdout.flush()
    except KeyboardInterrupt:
        print("microlora: stopped", file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # the reader left, as `head` does; a second failure at exit would print a trace
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_ERROR
    except (MicroLoraError, OSError) as err:
        print(f"microlora: {in_flags(_told(err), options)}", file=sys.stderr)
        return EXIT_ERROR
    return code


def _told(err: Exception) -> str:
    """The message; of the system's errors the file first and no number."""
    if isinstance(err, OSError) and err.filename is not None and err.errno is not None:
        return f"{os.fsdecode(err.filename)}: {os.strerror(err.errno)}"
    return str(err)
